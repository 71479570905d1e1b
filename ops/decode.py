"""Triton kernels of the decoding step, in which a few tokens meet every weight: bytes and launches are what it costs.

`linear` is x W^T for at most MAX_TOKENS tokens with everything around it: the norm before, bias, activation and
residual after. Blocks and shuffles of structured factors are addresses. `attention` rotates the new q and k of
every row by its position, stores k and v in the cache and attends to the row's own tokens, no more. `store` stores
those of prompts, `attend_prompts` is torch's attention for several in a row. `step` is model.GPT.step for one token a
row, made of the others.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
import triton
import triton.language as tl

from ops import pointwise
from ops.fallback import works
from ops.pointwise import INTERPRET, TRIAL
from structured import BlockShuffle, Structured, active_linear

MAX_TOKENS = 1  # of `linear`; above, cuBLAS is used: with 4, a step of xl took 2.16 ms instead of 1.55 on an H200
# With programmatic dependent launch a kernel starts while its predecessor ends, and loads weights until
# that has written its input.
PDL = not INTERPRET and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


# ----------------------------------------------------------------------------------------------------------------------
# A linear on few tokens

@triton.jit
def _activate(a, ACT: tl.constexpr):
    if ACT == "relu2":
        r = tl.maximum(a, 0.0)
        return r * r
    elif ACT == "gelu":
        u = 1.5957691216 * (a + 0.044715 * a * a * a)  # tanh-GELU is a sigmoid(u)
        return a / (1 + tl.exp(-u))
    else:
        return a


@triton.jit
def _normalise(tile, x, offset, row_ok, k, k_ok, gain, shift, N, eps, NORM: tl.constexpr, BN: tl.constexpr):
    """Layer norm (1) or RMS norm (2) of tile (T, BK), which is part of rows of x; these start at `offset` (T, 1), N
    entries each."""
    n = tl.arange(0, BN)[None, :]
    row = tl.load(x + offset + n, mask=row_ok & (n < N), other=0.0).to(tl.float32)                     # (T, BN)
    mean = tl.sum(row, axis=1)[:, None] / N if NORM == 1 else tl.sum(row, axis=1)[:, None] * 0.0
    centred = tl.where(n < N, row - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1)[:, None] / N + eps)
    out = (tile - mean) * scale * tl.load(gain + k, mask=k_ok, other=0.0).to(tl.float32)
    if shift is not None:
        out += tl.load(shift + k, mask=k_ok, other=0.0).to(tl.float32)
    return tl.where(k_ok, out, 0.0).to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _linear(x, w, bias, gain, shift, residual, y, tokens, M, K, N, x_row, y_row, in_block, in_stride, out_block,
            out_stride, eps, NORM: tl.constexpr, ACT: tl.constexpr, T: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
            BN: tl.constexpr, PDL: tl.constexpr):
    """Block g of w (G, M, K) maps x[g in_block + j in_stride] to y[g out_block + i out_stride]."""
    g = tl.program_id(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    t = tl.arange(0, T)[:, None]
    weights = w + (g * M + m).to(tl.int64)[:, None] * K                                               # (BM, 1)
    k = tl.arange(0, BK)[None, :]
    tile = tl.load(weights + k, mask=(m < M)[:, None] & (k < K), other=0.0)          # (BM, BK), before the wait
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((T, BM, BK), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)[None, :]
        if start > 0:
            tile = tl.load(weights + k, mask=(m < M)[:, None] & (k < K), other=0.0)
        place = g * in_block + k * in_stride
        a = tl.load(x + t * x_row + place, mask=(t < tokens) & (k < K), other=0.0).to(tl.float32)     # (T, BK)
        if NORM > 0:
            a = _normalise(a, x, t * x_row, t < tokens, place, k < K, gain, shift, N, eps, NORM, BN)
        acc += a[:, None, :] * tile.to(tl.float32)[None, :, :]
    out = tl.sum(acc, axis=2)                                                                         # (T, BM)
    column = (g * out_block + m * out_stride)[None, :]
    ok = (t < tokens) & (m < M)[None, :]
    if bias is not None:
        out += tl.load(bias + column, mask=ok, other=0.0).to(tl.float32)
    out = _activate(out, ACT)
    if residual is not None:
        out += tl.load(residual + t * y_row + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(y + t * y_row + column, out, mask=ok)


def linear(x, w, bias=None, norm=None, act="", residual=None, shuffled=False):
    """act(norm(x) W^T + bias) + residual of x (tokens, n), at most MAX_TOKENS of them.

    w (M, K), or G blocks (G, M, K): block g reads piece g of G of x, or, shuffled, entries g, g + G, ...
    """
    tokens, n = x.shape
    G, M, K = w.shape if w.dim() == 3 else (1, *w.shape)
    y = x.new_empty(tokens, G * M)
    T = triton.next_power_of_2(tokens)
    BK = min(triton.next_power_of_2(K), 2048 // T)
    BM = 4 if G * M >= 4096 else 2 if G * M >= 2048 else 1
    kind = 0 if norm is None else 1 if isinstance(norm, nn.LayerNorm) else 2
    gain, shift = (norm.weight, getattr(norm, "bias", None)) if kind else (None, None)
    layout = (1, G, 1, G) if shuffled else (K, 1, M, 1)
    _linear[triton.cdiv(M, BM), G](
        x, w, bias, gain, shift, residual, y, tokens, M, K, n, x.stride(0), y.stride(0), *layout,
        norm.eps if kind else 0.0,
        NORM=kind, ACT=act, T=T, BM=BM, BK=BK, BN=triton.next_power_of_2(n) if kind else 1, PDL=PDL, num_warps=4,
        **({"launch_pdl": True} if PDL else {}))
    return y


def can_layer(x) -> bool:
    """Whether `layer` is the way to compute a linear of x (tokens, n)."""
    return x.is_cuda and len(x) <= MAX_TOKENS and works("linear on few tokens", _try_linear)


def _try_linear():
    linear(torch.ones(1, 32, **TRIAL), torch.ones(32, 32, **TRIAL))


def layer(module, x, norm=None, act="", residual=None):
    """A Dense or structured linear on few tokens, with what stands around it."""
    if isinstance(module, Structured):
        t = linear(x, module.V, norm=norm)
        return linear(t, module.U, module.bias, act=act, residual=residual, shuffled=isinstance(module, BlockShuffle))
    return linear(x, module.weight, module.bias, norm, act, residual)


# ----------------------------------------------------------------------------------------------------------------------
# Attention of one new token per row

@triton.jit
def _attention(qkv, cos, sin, position, k_cache, v_cache, y, row_stride, k_row, k_head, scale,
               HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr, G: tl.constexpr,
               BL: tl.constexpr, PDL: tl.constexpr):
    """A thread block per row and key head, with its HEADS // KV query heads, padded to G. Rotation pairs halves of
    vectors."""
    H: tl.constexpr = D // 2
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.load(position + row)
    h = tl.arange(0, H)
    g = tl.arange(0, G)[:, None]
    group: tl.constexpr = HEADS // KV
    dtype = qkv.dtype.element_ty
    query = qkv + row * row_stride + (head * group + g) * D + h[None, :]                              # (G, H)
    q1 = tl.load(query, mask=g < group, other=0.0).to(tl.float32)
    q2 = tl.load(query + H, mask=g < group, other=0.0).to(tl.float32)
    key = qkv + row * row_stride + (HEADS + head) * D + h
    k1, k2 = tl.load(key).to(tl.float32), tl.load(key + H).to(tl.float32)                             # (H,)
    value = key + KV * D
    v1, v2 = tl.load(value), tl.load(value + H)
    if ROPE:
        c, s = tl.load(cos + place * D + h), tl.load(sin + place * D + H + h)
        q1, q2 = q1 * c[None, :] - q2 * s[None, :], q2 * c[None, :] + q1 * s[None, :]
        k1, k2 = k1 * c - k2 * s, k2 * c + k1 * s
    q1, q2, k1, k2 = q1.to(dtype), q2.to(dtype), k1.to(dtype), k2.to(dtype)
    k_cache += row * k_row + head * k_head
    v_cache += row * k_row + head * k_head
    tl.store(k_cache + place * D + h, k1)
    tl.store(k_cache + place * D + H + h, k2)
    tl.store(v_cache + place * D + h, v1)
    tl.store(v_cache + place * D + H + h, v2)
    # the new token itself begins the running softmax, so nothing just stored is read
    top = scale * tl.sum(q1.to(tl.float32) * k1.to(tl.float32)[None, :]
                         + q2.to(tl.float32) * k2.to(tl.float32)[None, :], axis=1)                    # (G,)
    total = tl.full((G,), 1.0, tl.float32)
    o1 = tl.zeros((G, H), tl.float32) + v1.to(tl.float32)[None, :]
    o2 = tl.zeros((G, H), tl.float32) + v2.to(tl.float32)[None, :]
    for start in range(0, place, BL):
        l = start + tl.arange(0, BL)
        at = l[:, None] * D + h[None, :]                                                              # (BL, H)
        ok = (l < place)[:, None]
        a1, a2 = tl.load(k_cache + at, mask=ok, other=0.0), tl.load(k_cache + at + H, mask=ok, other=0.0)
        b1, b2 = tl.load(v_cache + at, mask=ok, other=0.0), tl.load(v_cache + at + H, mask=ok, other=0.0)
        score = (tl.dot(q1, tl.trans(a1), input_precision="ieee")
                 + tl.dot(q2, tl.trans(a2), input_precision="ieee"))                                  # (G, BL)
        score = tl.where((l < place)[None, :], score * scale, -float("inf"))
        new = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp(score - new[:, None])
        fade = tl.exp(top - new)
        total = total * fade + tl.sum(weight, axis=1)
        o1 = o1 * fade[:, None] + tl.dot(weight.to(dtype), b1, input_precision="ieee")
        o2 = o2 * fade[:, None] + tl.dot(weight.to(dtype), b2, input_precision="ieee")
        top = new
    out = y + row * (HEADS * D) + (head * group + g) * D + h[None, :]
    tl.store(out, o1 / total[:, None], mask=g < group)
    tl.store(out + H, o2 / total[:, None], mask=g < group)


def attention(qkv, model, k_cache, v_cache, position):
    """qkv (B, heads x head_size) of every row's new token, not yet rotated -> (B, attn_dim); stores k and v at
    `position` (B,)."""
    B, (_, kv, _, D) = len(qkv), k_cache.shape
    heads = model.cfg.n_head
    y = qkv.new_empty(B, heads * D)
    G = max(16, triton.next_power_of_2(heads // kv))
    half = qkv.element_size() == 2
    _attention[B, kv](
        qkv, model.cos, model.sin, position, k_cache, v_cache, y, qkv.stride(0), k_cache.stride(0),
        k_cache.stride(1), D**-0.5, HEADS=heads, KV=kv, D=D, ROPE=model.cfg.pos == "rope", G=G, BL=64 if half else 32,
        PDL=PDL, num_warps=4, num_stages=3 if half else 2, **({"launch_pdl": True} if PDL else {}))
    return y


# ----------------------------------------------------------------------------------------------------------------------
# Keys and values of prompts into the cache

@triton.jit
def _store(k, v, k_cache, v_cache, row, place, k_token, k_head, v_token, v_head, cache_row, cache_head,
           KV: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """One token: all heads of k and v to its place of its row."""
    token = tl.program_id(0).to(tl.int64)
    to = tl.load(row + token)
    h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, SIZE)[None, :]
    ok = (h < tl.where(to >= 0, KV, 0)) & (d < D)
    at = to * cache_row + h * cache_head + tl.load(place + token) * D + d               # (HEADS, SIZE)
    tl.store(k_cache + at, tl.load(k + token * k_token + h * k_head + d, mask=ok), mask=ok)
    tl.store(v_cache + at, tl.load(v + token * v_token + h * v_head + d, mask=ok), mask=ok)


def can_store(k) -> bool:
    """Whether `store` takes keys k and their values."""
    return (k.is_cuda or INTERPRET) and works("storing prompts", _try_store)


def _try_store():
    k, cache = torch.zeros(2, 1, 32, **TRIAL), torch.zeros(1, 1, 2, 32, **TRIAL)
    store(k, k, cache, cache.clone(), *torch.zeros(2, 2, dtype=torch.long, device=TRIAL["device"]))


def store(k, v, k_cache, v_cache, row, place):
    """k, v (N, n_kv_head, head_size) to `place` (N,) of row `row` (N,) of the caches, in one launch; row -1: nowhere.

    Caches (rows, n_kv_head, length, head_size) are contiguous, and so is each head of k and v, and row and place.
    """
    N, KV, D = k.shape
    _store[(N,)](k, v, k_cache, v_cache, row, place, *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:2], KV=KV,
                 D=D, HEADS=triton.next_power_of_2(KV), SIZE=triton.next_power_of_2(D), num_warps=4)


def can_attend_prompts(dtype, device, size) -> bool:
    """Whether `attend_prompts` takes heads of that size."""
    return (dtype in (torch.bfloat16, torch.float16) and device.type == "cuda" and size % 8 == 0 and size <= 256
            and works("attention of prompts in a row", _try_attend_prompts))


def _try_attend_prompts():
    q = torch.zeros(3, 2, 32, dtype=torch.float16, device="cuda")
    attend_prompts(q, q[:, :1], q[:, :1], torch.tensor([0, 2, 3, 3], dtype=torch.int32, device="cuda"), 2)


def attend_prompts(q, k, v, ends, longest):
    """Causal attention of each of n texts to itself, by FlashAttention. q (N, n_head, head_size) -> as q.

    k and v have n_kv_head heads. ends (n + 1,) int32: 0 and where each text ends, of at most `longest` tokens. What
    belongs to no text is undefined in the result.
    """
    return torch.ops.aten._flash_attention_forward(q, k, v, ends, ends, longest, longest, 0.0, True, False)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Sampling a token

# As in decode.uniform
GOLDEN, MIX1, MIX2 = map(tl.constexpr, (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15))


@triton.jit
def _likelihoods(logits, n, V, top, temperature, least):
    """Of tokens n, relative to the likeliest, whose logit is top; zero where the logarithm lies below `least`."""
    x = (tl.load(logits + n, mask=n < V, other=-float("inf")).to(tl.float32) - top) / temperature
    return tl.where(x >= least, tl.exp(x), 0.0)


@triton.jit
def _sample(logits, key, position, token, new, turn, logits_row, new_row, V, temperature, least, SAMPLE: tl.constexpr,
            BLOCK: tl.constexpr):
    """A thread block per row. least: the logarithm of min_p, a lower bound of (logit - largest) / temperature."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_row
    n = tl.arange(0, BLOCK)
    tops = tl.full((BLOCK,), -float("inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + n, mask=start + n < V, other=-float("inf")).to(tl.float32)
        where = tl.where(x > tops, start + n, where)
        tops = tl.maximum(tops, x)
    top = tl.max(tops, axis=0)
    chosen = tl.min(tl.where(tops == top, where, V - 1), axis=0)
    if SAMPLE:
        bits = tl.load(key + row) + tl.load(position + row) * GOLDEN
        bits = (bits ^ (bits >> 30 & 2**34 - 1)) * MIX1
        bits = (bits ^ (bits >> 27 & 2**37 - 1)) * MIX2
        draw = (bits >> 40 & 2**24 - 1).to(tl.float32) * 2.0**-24
        total = 0.0
        for start in range(0, V, BLOCK):
            total += tl.sum(_likelihoods(logits, start + n, V, top, temperature, least), axis=0)
        below, last, reached = 0, chosen, 0.0
        for start in range(0, V, BLOCK):
            p = _likelihoods(logits, start + n, V, top, temperature, least)
            cdf = reached + tl.cumsum(p, axis=0)
            below += tl.sum((cdf <= draw * total).to(tl.int32), axis=0)
            last = tl.maximum(last, tl.max(tl.where(p > 0, start + n, 0), axis=0))
            reached = tl.max(cdf, axis=0)
        chosen = tl.minimum(below, last)  # the first token whose CDF lies above
    at = tl.load(turn + row)
    tl.store(token + row, chosen.to(tl.int64))
    tl.store(new + at * new_row + row, chosen.to(tl.int64))
    tl.store(turn + row, at + 1)


def can_sample(tokens, s) -> bool:
    """Whether `sample` implements the settings s: it does not sort."""
    sorts = s.temperature > 0 and (s.top_k > 0 or s.top_p < 1)
    return (tokens.is_cuda or INTERPRET) and not sorts and works("sampling a token", lambda: _try_sample(s))


def _try_sample(s):
    zeros = torch.zeros(1, 1, device=TRIAL["device"], dtype=torch.long)
    sample(torch.zeros(1, 32, **TRIAL), s, zeros[0], zeros[0], zeros, zeros.clone(), zeros.clone())


def sample(logits, s, key, position, token, new, turn):
    """decode.sample_token as one kernel: logits (B, V), key and position (B,) -> token (B, 1).

    The token is also written to row turn (B, 1) of new (rows, B), and turn grows by one.
    """
    V = logits.size(1)
    least = math.log(s.min_p) if s.min_p else -math.inf
    _sample[len(logits),](logits, key, position, token, new, turn, logits.stride(0), new.stride(0), V,
                          max(s.temperature, 1e-30), least, SAMPLE=s.temperature > 0,
                          BLOCK=min(8192, triton.next_power_of_2(V)), num_warps=16)


# ----------------------------------------------------------------------------------------------------------------------
# The step

def add_norm(x, pending, norm):
    """(x + pending, its norm); pending None adds nothing."""
    if pointwise.can_add_norm(x):
        return pointwise.add_norm(x, pending, norm)
    x = x if pending is None else x + pending
    return x, norm(x)


def can_step(model, cache) -> bool:
    """Whether `step` can compute this model's steps: no parts but the paper's, and tiles for its heads."""
    cfg = model.cfg
    D, group = cfg.attn_dim // cfg.n_head, cfg.n_head // cfg.n_kv_head
    if not (cache.position.is_cuda or INTERPRET) or D not in (32, 64, 128, 256) or group > 32 or cfg.extras:
        return False
    if len(cache.position) <= MAX_TOKENS and not works("linear on few tokens", _try_linear):
        return False
    return works("attention of one token", lambda: _try_attention(model, cache), D, group, cache.layers[0][0].dtype)


def _try_attention(model, cache):
    """On copies of one row, since attention writes into the cache."""
    k, v = (t[:1].clone() for t in cache.layers[0])
    attention(k.new_zeros(1, model.blocks[0].attn.qkv.out_features), model, k, v, torch.zeros_like(cache.position[:1]))


def ffn(block, x):
    """x + ffn(norm2(x)) on few tokens; x (tokens, n_embd)."""
    part, tokens = block.ffn, len(x)
    fused = part.act if part.act != "swiglu" else ""
    h = layer(active_linear(part.fc1, tokens), x, block.norm2, fused)
    if part.act == "swiglu":
        gate, value = h.chunk(2, dim=-1)
        h = F.silu(gate) * value
    return layer(active_linear(part.fc2, tokens), h, residual=x)


def step(model, tokens, cache):
    """model.step for one token a row: tokens (B, 1) -> logits (B, vocab_size)."""
    few, pending = len(tokens) <= MAX_TOKENS, None
    x = model.wte(tokens[:, 0])
    if model.wpe is not None:
        x = x + model.wpe(cache.position)
    for block, (k, v) in zip(model.blocks, cache.layers):
        if few:
            y = attention(layer(block.attn.qkv, x, block.norm1), model, k, v, cache.position)
            x = ffn(block, layer(block.attn.proj, y, residual=x))
        else:  # as in training: the residual add is deferred and fuses with the next norm
            x, h = add_norm(x, pending, block.norm1)
            y = attention(block.attn.qkv(h), model, k, v, cache.position)
            x, h = add_norm(x, block.attn.proj(y), block.norm2)
            pending = block.ffn(h)
    cache.advance(1, tokens[:, 0])
    return layer(model.head, x, model.norm) if few else model.head(add_norm(x, pending, model.norm)[1])
