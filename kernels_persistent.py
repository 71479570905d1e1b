"""A decoding step of one sequence as one Triton kernel that stays on the GPU from the embedding to the logits.

At batch 1 a step reads every weight once and computes next to nothing: what counts is that memory never idles. So one program per
multiprocessor walks through all layers, and between two stages (qkv, attention, proj, and one for each factor of the FFN) all
programs meet at a barrier in global memory. Weights do not depend on what others compute: a program asks for the first tile of its
next matrix before it waits for the inputs of this one, so they are on their way during the whole stage. Activations are float32 in
small buffers that stay in L2.

A linear's output rows are dealt out in tiles of `share` rows; a program takes tiles number pid, pid + grid, ... `deal` plans that.
"""
import torch
import triton
import triton.language as tl

from kernels_decode import _activate, chosen
from structured import BlockShuffle, Structured

INTERPRET = triton.knobs.runtime.interpret
WARPS = 8           # of a program: with 16, a thread has 128 registers, and what stays over the layers spills
TILE_BYTES = 2**16  # of a tile of weights, which stands in registers: 64 of them per thread
LARGEST_K = 2**14   # a tile holds whole rows


# ----------------------------------------------------------------------------------------------------------------------
# The barrier: a counter that only grows, by GRID at every barrier

@triton.jit
def _arrive(counter, GRID: tl.constexpr):
    """What this program has stored may be read by those that wait for its arrival."""
    tl.debug_barrier()
    if GRID > 1:  # one thread releases for all: bar.sync has ordered their stores before it
        tl.inline_asm_elementwise("""{
            .reg .pred p;
            .reg .b32 t;
            mov.u32 t, %tid.x;
            setp.eq.u32 p, t, 0;
            @p red.release.gpu.global.add.u64 [$1], 1;
            mov.u32 $0, t;
            }""", "=r,l", [counter.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _wait(counter, target, GRID: tl.constexpr):
    """Until the counter has reached target."""
    if GRID > 1:
        tl.inline_asm_elementwise("""{
            .reg .pred p;
            .reg .b32 t;
            .reg .b64 v;
            mov.u32 t, %tid.x;
            setp.ne.u32 p, t, 0;
            @p bra DONE;
            AGAIN:
            ld.acquire.gpu.global.u64 v, [$1];
            setp.lt.s64 p, v, $2;
            @p bra AGAIN;
            DONE:
            mov.u32 $0, t;
            }""", "=r,l,l", [counter.to(tl.int64), target], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


# ----------------------------------------------------------------------------------------------------------------------
# A linear. SPEC: (rows BM and columns BK of a tile in registers, rows M and columns K of a block of w, blocks, share, tiles a block, spread)

@triton.jit
def _place(t, SPEC: tl.constexpr):
    """Tile t -> (its block, its first row there, how many rows it has)."""
    M: tl.constexpr = SPEC[2]
    blocks: tl.constexpr = SPEC[4]
    share: tl.constexpr = SPEC[5]
    per: tl.constexpr = SPEC[6]
    first = (t % per) * share
    return t // per, first, tl.where(t < blocks * per, tl.minimum(share, M - first), 0)


@triton.jit
def _weights(w, t, SPEC: tl.constexpr):
    """The weights of tile t in words of 32 bits, (BM, BK) or, two to a word, (BM, BK / 2); beyond the last tile nothing is read."""
    each: tl.constexpr = 32 // w.dtype.element_ty.primitive_bitwidth  # as single bf16s they would stand in a register each
    BM: tl.constexpr = SPEC[0]
    BK: tl.constexpr = SPEC[1] // each
    M: tl.constexpr = SPEC[2]
    K: tl.constexpr = SPEC[3] // each
    block, first, count = _place(t, SPEC)
    i, k = tl.arange(0, BM)[:, None], tl.arange(0, BK)[None, :]
    start = w.to(tl.pointer_type(tl.int32), bitcast=True) + (block * M + first).to(tl.int64) * K
    return tl.load(start + i * K + k, mask=(i < count) & (k < K), other=0, eviction_policy="evict_first")


@triton.jit
def _input(x, gain, shift, lse, active, block, eps, SPEC: tl.constexpr, IN: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr):
    """The K entries that a block of w reads (BK,). Other programs wrote them, so they come from L2: L1 may hold older ones."""
    BK: tl.constexpr = SPEC[1]
    K: tl.constexpr = SPEC[3]
    blocks: tl.constexpr = SPEC[4]
    N: tl.constexpr = K * blocks
    k = tl.arange(0, BK)
    ok = k < K
    if IN == "parts":  # of attention, each with the logarithm of its softmax's denominator
        top = tl.full((BK,), -1e30, tl.float32)
        total, a = tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.float32)
        for s in range(active):
            part = tl.load(x + s * K + k, mask=ok, other=0.0, cache_modifier=".cg")
            each = tl.load(lse + s * HEADS + k // (K // HEADS), mask=ok, other=0.0, cache_modifier=".cg")
            new = tl.maximum(top, each)
            weight, fade = tl.exp(each - new), tl.exp(top - new)
            total, a, top = total * fade + weight, a * fade + weight * part, new
        a /= total
    else:
        a = tl.load(x + block * K + k, mask=ok, other=0.0, cache_modifier=".cg")
    if IN == "swiglu":
        a = a / (1 + tl.exp(-a)) * tl.load(x + N + block * K + k, mask=ok, other=0.0, cache_modifier=".cg")
    if IN == "layernorm" or IN == "rmsnorm":  # over all N, the blocks together
        n = tl.arange(0, SPEC[8])
        row = a if blocks == 1 else tl.load(x + n, mask=n < N, other=0.0, cache_modifier=".cg")      # (BN,)
        mean = tl.sum(row, axis=0) / N if IN == "layernorm" else 0.0
        centred = tl.where(n < N, row - mean, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / N + eps)
        a = (a - mean) * scale * gain + shift
    return a


@triton.jit
def _columns(t, SPEC: tl.constexpr):
    """(where the outputs of tile t go (BM,), which of those there are)"""
    rows: tl.constexpr = SPEC[2] * SPEC[4]
    spread: tl.constexpr = SPEC[7]
    i = tl.arange(0, SPEC[0])
    block, first, count = _place(t, SPEC)
    j = block * SPEC[2] + first + i
    return (j % spread) * (rows // spread) + j // spread, i < count


@triton.jit
def _extra(bias, y, t, SPEC: tl.constexpr, ADD: tl.constexpr):
    """What is added to tile t's sums (BM,): the bias, and with ADD what y holds."""
    BM: tl.constexpr = SPEC[0]
    column, ok = _columns(t, SPEC)
    extra = tl.zeros((BM,), tl.float32)
    if bias is not None:
        extra += tl.load(bias + column, mask=ok, other=0.0)
    if ADD:
        extra += tl.load(y + column, mask=ok, other=0.0, cache_modifier=".cg")
    return extra


@triton.jit
def _block(t, SPEC: tl.constexpr):
    return tl.minimum(t // SPEC[6], SPEC[4] - 1)


@triton.jit
def _gain_and_shift(norm, t, SPEC: tl.constexpr):
    """Of the entries that tile t reads, (BK,) each."""
    gain, shift = 1.0, 0.0
    if norm is not None:
        k = tl.arange(0, SPEC[1])
        at = norm + _block(t, SPEC) * SPEC[3] + k
        gain = tl.load(at, mask=k < SPEC[3], other=0.0)
        shift = tl.load(at + SPEC[3] * SPEC[4], mask=k < SPEC[3], other=0.0)
    return gain, shift


@triton.jit
def _outputs(tile, a, extra, y, t, SPEC: tl.constexpr, ACT: tl.constexpr):
    """Tile t's rows of y = act(w a + extra)."""
    if tile.shape[1] == a.shape[0]:
        products = tile.to(tl.float32, bitcast=True) * a[None, :]                                     # (BM, BK)
    else:  # a bf16 is the upper half of a float32
        even, odd = a.reshape(a.shape[0] // 2, 2).split()
        products = (tile << 16).to(tl.float32, bitcast=True) * even[None, :] + (tile & -65536).to(tl.float32, bitcast=True) * odd[None, :]
    out = tl.sum(products, axis=1)                                                                    # (BM,)
    out = _activate(tl.sum(out[None, :], axis=0) + extra, ACT)  # of one row: without it every thread activates, and holds of extra, what its warp has
    column, ok = _columns(t, SPEC)
    tl.store(y + column, out, mask=ok)


@triton.jit
def _linear(tile, w, bias, x, y, norm, lse, active, counter, target, eps, after, first_after, SPEC: tl.constexpr, NEXT: tl.constexpr, IN: tl.constexpr,
            ACT: tl.constexpr, ADD: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr, GRID: tl.constexpr):
    """y = act(w input + bias), or y += that, after the barrier `target`; norm: the gain, with the shift behind it.

    tile: this program's first tile, asked for a stage ago. Returns that of the linear that follows: tile first_after of `after`.
    """
    tiles: tl.constexpr = SPEC[4] * SPEC[6]
    rounds: tl.constexpr = (tiles + GRID - 1) // GRID
    pid = tl.program_id(0)
    if rounds > 1:
        coming = _weights(w, pid + GRID, SPEC)
    else:
        coming = _weights(after, first_after, NEXT)
    gain, shift = _gain_and_shift(norm, pid, SPEC)
    _wait(counter, target, GRID)
    extra = _extra(bias, y, pid, SPEC, ADD)
    a = _input(x, gain, shift, lse, active, _block(pid, SPEC), eps, SPEC, IN, HEADS, SPLITS)          # (BK,)
    if rounds > 2:
        for t in range(pid, pid + (rounds - 2) * GRID, GRID):
            _outputs(tile, a, extra, y, t, SPEC, ACT)
            tile, coming = coming, _weights(w, t + 2 * GRID, SPEC)
            extra = _extra(bias, y, t + GRID, SPEC, ADD)
            if SPEC[4] > 1:
                gain, shift = _gain_and_shift(norm, t + GRID, SPEC)
                a = _input(x, gain, shift, lse, active, _block(t + GRID, SPEC), eps, SPEC, IN, HEADS, SPLITS)
    last = pid + (rounds - 1) * GRID
    if rounds > 1:
        _outputs(tile, a, extra, y, last - GRID, SPEC, ACT)
        tile = coming
        following = _weights(after, first_after, NEXT)
        extra = _extra(bias, y, last, SPEC, ADD)
        if SPEC[4] > 1:
            gain, shift = _gain_and_shift(norm, last, SPEC)
            a = _input(x, gain, shift, lse, active, _block(last, SPEC), eps, SPEC, IN, HEADS, SPLITS)
    else:
        following = coming
    _outputs(tile, a, extra, y, last, SPEC, ACT)
    return following


# ----------------------------------------------------------------------------------------------------------------------
# Attention: a program takes one query head and `reach` places of the cache, BL at a time

@triton.jit
def _turned(vector, cos, sin, D: tl.constexpr, ROPE: tl.constexpr):
    """A head's query or key (D,), turned by its position, whose rows of the tables these are."""
    d = tl.arange(0, D)
    a = tl.load(vector + d, cache_modifier=".cg")
    if ROPE:
        other = tl.load(vector + (d + D // 2) % D, cache_modifier=".cg")
        a = a * cos + other * sin  # the first half of sin is negative
    return a


@triton.jit
def _places(cache, start, stop, D: tl.constexpr, BL: tl.constexpr):
    """BL places of one head's cache in words of 32 bits (BL, D) or (BL, D / 2), those from `stop` on zero: they were written in earlier launches."""
    W: tl.constexpr = D * cache.dtype.element_ty.primitive_bitwidth // 32
    l = start + tl.arange(0, BL)[:, None]
    return tl.load(cache.to(tl.pointer_type(tl.int32), bitcast=True) + l * W + tl.arange(0, W)[None, :], mask=l < stop, other=0)


@triton.jit
def _scores(k, q):
    """k (BL, D) in words, q (D,) -> their products (BL,)."""
    if k.shape[1] == q.shape[0]:
        products = k.to(tl.float32, bitcast=True) * q[None, :]                                        # (BL, D)
    else:  # a bf16 is the upper half of a float32
        even, odd = q.reshape(q.shape[0] // 2, 2).split()
        products = (k << 16).to(tl.float32, bitcast=True) * even[None, :] + (k & -65536).to(tl.float32, bitcast=True) * odd[None, :]
    return tl.sum(products, axis=1)


@triton.jit
def _weighted(v, weight, D: tl.constexpr):
    """v (BL, D) in words, weight (BL,) -> their products (D,)."""
    if v.shape[1] == D:
        out = tl.sum(v.to(tl.float32, bitcast=True) * weight[:, None], axis=0)
    else:
        even = tl.sum((v << 16).to(tl.float32, bitcast=True) * weight[:, None], axis=0)
        odd = tl.sum((v & -65536).to(tl.float32, bitcast=True) * weight[:, None], axis=0)
        out = tl.join(even, odd).reshape(D)
    return out


@triton.jit
def _attention(qkv, cos, sin, k_cache, v_cache, part, lse, place, active, reach, length, counter, target, HEADS: tl.constexpr, KV: tl.constexpr,
               D: tl.constexpr, ROPE: tl.constexpr, BL: tl.constexpr, GRID: tl.constexpr):
    dtype: tl.constexpr = k_cache.dtype.element_ty
    d, l = tl.arange(0, D), tl.arange(0, BL)
    c, s = 1.0, 0.0
    if ROPE:
        c, s = tl.load(cos + place * D + d), tl.load(sin + place * D + d)
    for item in range(tl.program_id(0), HEADS * active, GRID):
        head, split = item % HEADS, item // HEADS
        kv = head // (HEADS // KV)
        keys, values = k_cache + kv.to(tl.int64) * length * D, v_cache + kv.to(tl.int64) * length * D
        first, stop = split * reach, tl.minimum(split * reach + reach, place)
        k, v = _places(keys, first, stop, D, BL), _places(values, first, stop, D, BL)                 # (BL, D) in words
        _wait(counter, target, GRID)
        q = _turned(qkv + head * D, c, s, D, ROPE) * (D ** -0.5)
        key = _turned(qkv + (HEADS + kv) * D, c, s, D, ROPE).to(dtype)
        value = tl.load(qkv + (HEADS + KV + kv) * D + d, cache_modifier=".cg").to(dtype)
        if (split == 0) & (head % (HEADS // KV) == 0):
            tl.store(keys + place * D + d, key)
            tl.store(values + place * D + d, value)
        # the new token begins the running softmax of split 0, so nothing just stored is read
        own = tl.sum(q * key.to(tl.float32), axis=0)
        top = tl.where(split == 0, own, -1e30)
        total = tl.where(split == 0, 1.0, 0.0)
        out = value.to(tl.float32) * total                                                            # (D,)
        for start in range(first, stop, BL):
            score = tl.where(start + l < stop, _scores(k, q), -float("inf"))                          # (BL,)
            new = tl.maximum(top, tl.max(score, axis=0))
            weight, fade = tl.exp(score - new), tl.exp(top - new)
            total = total * fade + tl.sum(weight, axis=0)
            out = out * fade + _weighted(v, weight, D)
            top = new
            k, v = _places(keys, start + BL, stop, D, BL), _places(values, start + BL, stop, D, BL)
        tl.store(part + (split * HEADS + head) * D + d, out / total)
        tl.store(lse + split * HEADS + head, top + tl.log(total))
    _wait(counter, target, GRID)  # programs without a head arrive at the next barrier only after this one


# ----------------------------------------------------------------------------------------------------------------------
# The step

@triton.constexpr_function
def _at(plan, *path):
    """plan[i][j]...; as a subscript, a tuple with tuples or strings in it does not compile under Triton 3.6."""
    for i in path:
        plan = plan[i]
    return plan


@triton.jit
def _pointer(table, i, dtype: tl.constexpr):
    return tl.multiple_of(tl.load(table + i).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _map(tile, first, second, bias, x, rank, y, norm, counter, target, eps, after, first_after, SPECS: tl.constexpr, NEXT: tl.constexpr, IN: tl.constexpr,
         ACT: tl.constexpr, ADD: tl.constexpr, GRID: tl.constexpr):
    """One linear of the FFN, dense or through its two factors. Returns the first tile of what follows and the barrier before that."""
    A: tl.constexpr = _at(SPECS, 0)
    B: tl.constexpr = _at(SPECS, -1)
    factors: tl.constexpr = len(SPECS)
    if factors == 2:
        tile = _linear(tile, first, None, x, rank, norm, x, 0, counter, target, eps, second, tl.program_id(0), A, B, IN, "", False, 1, 1, GRID)
        _arrive(counter, GRID)
        target += GRID
        tile = _linear(tile, second, bias, rank, y, None, x, 0, counter, target, eps, after, first_after, B, NEXT, "", ACT, ADD, 1, 1, GRID)
    else:
        tile = _linear(tile, first, bias, x, y, norm, x, 0, counter, target, eps, after, first_after, A, NEXT, IN, ACT, ADD, 1, 1, GRID)
    _arrive(counter, GRID)
    return tile, target + GRID


@triton.jit
def _layers(tile, w_qkv, cos, sin, table, vectors, x, qkv, part, lse, rank, hidden, place, active, reach, counter, target, length, eps,
            HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
            SPLITS: tl.constexpr, BL: tl.constexpr, OFFSETS: tl.constexpr, QKV: tl.constexpr, PROJ: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr,
            GRID: tl.constexpr):
    """The layers of one run. w_qkv and tile: the first one's weights. Returns the same of the layer that follows, and the barrier before it."""
    dtype: tl.constexpr = w_qkv.dtype.element_ty
    FC1: tl.constexpr = _at(RUNS, RUN, 2)
    FC2: tl.constexpr = _at(RUNS, RUN, 3)
    layers: tl.constexpr = _at(RUNS, -1, 1)
    gated: tl.constexpr = ACT == "swiglu"
    pid = tl.program_id(0)
    for layer in range(_at(RUNS, RUN, 0), _at(RUNS, RUN, 1)):
        row, v = table + layer * 8, vectors + layer * OFFSETS[5]
        proj, v1, k_cache, v_cache = _pointer(row, 1, dtype), _pointer(row, 2, dtype), _pointer(row, 6, dtype), _pointer(row, 7, dtype)
        tile = _linear(tile, w_qkv, v + OFFSETS[0], x, qkv, v, lse, 0, counter, target, eps, proj, pid, QKV, PROJ, NORM, "", False, 1, 1, GRID)
        _arrive(counter, GRID)
        target += GRID
        _attention(qkv, cos, sin, k_cache, v_cache, part, lse, place, active, reach, length, counter, target, HEADS, KV, D, ROPE, BL, GRID)
        _arrive(counter, GRID)
        u1, v2 = _pointer(row, 3, dtype), _pointer(row, 4, dtype)
        target += GRID
        tile = _linear(tile, proj, v + OFFSETS[1], part, x, None, lse, active, counter, target, eps, v1, pid, PROJ, _at(FC1, 0), "parts", "", True, HEADS,
                       SPLITS, GRID)
        _arrive(counter, GRID)
        u2, w_qkv = _pointer(row, 5, dtype), _pointer(row, 8, dtype)
        target += GRID
        tile, target = _map(tile, v1, u1, v + OFFSETS[3], x, rank, hidden, v + OFFSETS[2], counter, target, eps, v2, pid, FC1, _at(FC2, 0), NORM,
                            "" if gated else ACT, False, GRID)
        ahead = tl.where(layer + 1 < layers, pid, QKV[4] * QKV[6])  # behind the last layer no tile
        tile, target = _map(tile, v2, u2, v + OFFSETS[4], hidden, rank, x, None, counter, target, eps, w_qkv, ahead, FC2, QKV, "swiglu" if gated else "", "",
                            True, GRID)
    return tile, w_qkv, target


@triton.jit
def _step(token, position, wte, wpe, head, cos, sin, table, vectors, x, qkv, part, lse, rank, hidden, logits, counter, length, eps,
          N: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
          SPLITS: tl.constexpr, BL: tl.constexpr, BN: tl.constexpr, OFFSETS: tl.constexpr, QKV: tl.constexpr, PROJ: tl.constexpr, HEAD: tl.constexpr,
          RUNS: tl.constexpr, GRID: tl.constexpr):
    """Embedding, layers, head. table: the addresses of a layer's weights and cache; vectors: its norms and biases."""
    target = tl.load(counter, volatile=True) // GRID * GRID  # nobody is past the first barrier before this program arrives
    place = tl.load(position).to(tl.int32)
    reach = tl.cdiv(tl.maximum(place, 1), BL * SPLITS) * BL  # places for each of `active` programs a head
    active = tl.cdiv(tl.maximum(place, 1), reach)
    n = tl.arange(0, BN)
    row = tl.load(wte + tl.load(token) * N + n, mask=n < N, other=0.0).to(tl.float32)
    if wpe is not None:
        row += tl.load(wpe + place * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(x + n, row, mask=n < N)  # every program the same
    w, pid = _pointer(table, 0, wte.dtype.element_ty), tl.program_id(0)
    tile = _weights(w, pid, QKV)
    for run in tl.static_range(len(RUNS)):
        tile, w, target = _layers(tile, w, cos, sin, table, vectors, x, qkv, part, lse, rank, hidden, place, active, reach, counter, target, length, eps, HEADS, KV,
                                  D, ROPE, NORM, ACT, SPLITS, BL, OFFSETS, QKV, PROJ, RUNS, run, GRID)
    last, beyond = _weights(head, pid, HEAD), HEAD[4] * HEAD[6]
    _linear(last, head, None, x, logits, vectors + _at(RUNS, -1, 1) * OFFSETS[5], lse, 0, counter, target, eps, head, beyond, HEAD, HEAD, NORM, "", False,
            1, 1, GRID)
    if tl.program_id(0) == 0:  # all have read the position before the first barrier
        tl.store(position, tl.minimum(place + 1, length - 1).to(tl.int64))


# ----------------------------------------------------------------------------------------------------------------------
# The plan, on the host

def deal(rows, K, blocks, programs, tile, spread=0):
    """SPEC of a linear with `blocks` blocks (rows, K): about equal work for all programs, at most `tile` weights at a time."""
    BK = triton.next_power_of_2(K)
    slots = max(1, programs // blocks)                      # programs that share a block
    rounds = triton.cdiv(rows, slots * max(1, tile // BK))  # tiles that each of them takes
    share = triton.cdiv(rows, slots * rounds)
    return (triton.next_power_of_2(share), BK, rows, K, blocks, share, triton.cdiv(rows, share), spread or rows * blocks,
            triton.next_power_of_2(K * blocks))


def matrices(module):
    """[(weights, rows, K, blocks, spread)] of a linear's one or two stages; spread P: row j goes to j % P * (rows / P) + j // P."""
    if not isinstance(module, Structured):
        return [(module.weight, *module.weight.shape, 1, 0)]
    (blocks, q, p), shuffle = module.V.shape if module.V.dim() == 3 else (1, *module.V.shape), isinstance(module, BlockShuffle)
    V = module.V, q, p, blocks, blocks if shuffle else 0
    return [V, (module.U, *module.U.shape[1:], blocks, module.U.shape[1])] if shuffle else [V, (module.U, *module.U.shape, 1, 0)]


def usable(model) -> bool:
    """Whether `Step` can take this model's steps at batch 1."""
    cfg = model.cfg
    linears = [linear for b in model.blocks for linear in (b.attn.qkv, b.attn.proj, b.ffn.fc1, b.ffn.fc2)]
    Ks = [cfg.n_embd] + [m[2] for linear in linears for m in matrices(chosen(linear, 1))]
    words = all(K * model.head.weight.element_size() % 4 == 0 for K in Ks)
    return torch.version.hip is None and words and cfg.attn_dim // cfg.n_head in (16, 32, 64, 128, 256) and max(Ks) <= LARGEST_K


class Step:
    """model.step for one token of one sequence: step(tokens (1, 1), cache) -> logits (1, vocab_size), the same buffer each time.

    programs: how many share the work; 0: one per multiprocessor.
    """

    def __init__(self, model, cache, programs=0, warps=WARPS, tile_bytes=TILE_BYTES, **options):
        cfg, weight = model.cfg, model.head.weight
        self.device, self.model, self.cache, self.warps = weight.device, model, cache, warps
        self.options = {"launch_cooperative_grid": True, **options}  # a grid that does not fit fails, it does not wait for ever
        self.programs = programs or (1 if INTERPRET else torch.cuda.get_device_properties(self.device).multi_processor_count)
        self.grid = 1 if INTERPRET else self.programs  # the interpreter runs one program after the other: they cannot wait
        tile = tile_bytes // weight.element_size()

        def plan(linear):
            return tuple(deal(*m[1:4], self.programs, tile, m[4]) for m in matrices(linear))

        fcs = [(chosen(b.ffn.fc1, 1), chosen(b.ffn.fc2, 1)) for b in model.blocks]
        kinds = [(plan(fc1), plan(fc2)) for fc1, fc2 in fcs]
        starts = [i for i in range(cfg.n_layer) if i == 0 or kinds[i] != kinds[i - 1]]
        D, attn = cfg.attn_dim // cfg.n_head, model.blocks[0].attn
        splits = max(1, min(8, self.programs // cfg.n_head))  # programs that share a head, at most
        self.meta = dict(
            N=cfg.n_embd, HEADS=cfg.n_head, KV=cfg.n_kv_head, D=D, ROPE=cfg.pos == "rope", NORM=cfg.norm, ACT=cfg.act, SPLITS=splits,
            BL=max(16, tile // (2 * D)), BN=triton.next_power_of_2(cfg.n_embd), QKV=plan(attn.qkv)[0], PROJ=plan(attn.proj)[0], HEAD=plan(model.head)[0],
            RUNS=tuple((i, j, *kinds[i]) for i, j in zip(starts, starts[1:] + [cfg.n_layer])), GRID=self.grid)
        self.table, self.vectors = self.addresses(fcs), self.collect(fcs)
        rank = max([1] + [m[0][1] * m[0][3] for pair in fcs for m in map(matrices, pair) if len(m) == 2])
        sizes = cfg.n_embd, attn.qkv.out_features, splits * cfg.attn_dim, splits * cfg.n_head, rank, cfg.n_hidden
        self.buffers = [torch.empty(n, device=self.device) for n in sizes]
        self.logits = torch.empty(1, cfg.vocab_size, device=self.device, dtype=weight.dtype)
        self.counter = torch.zeros(1, device=self.device, dtype=torch.long)

    def addresses(self, fcs):
        """(n_layer + 1, 8): qkv, proj, fc1's V and U, fc2's V and U, k and v of every layer; where there is one matrix, it stands twice."""
        rows = []
        for block, pair, cache in zip(self.model.blocks, fcs, self.cache.layers):
            weights = [m[i][0] for m in map(matrices, pair) for i in (0, -1)]
            rows.append([t.data_ptr() for t in (block.attn.qkv.weight, block.attn.proj.weight, *weights, *cache)])
        return torch.tensor(rows + rows[-1:]).to(self.device)

    def collect(self, fcs):
        """All norms and biases in float32, layer by layer; what a model lacks is zero. Sets OFFSETS: qkv, proj, norm2, fc1, fc2, the layer's size."""
        N, parts = self.model.cfg.n_embd, []

        def add(vector, size):
            parts.append(torch.zeros(size, device=self.device) if vector is None else vector.detach().float())

        for block, (fc1, fc2) in zip(self.model.blocks, fcs):
            Q, F = block.attn.qkv.out_features, fc1.out_features
            for vector, size in ((block.norm1.weight, N), (getattr(block.norm1, "bias", None), N), (block.attn.qkv.bias, Q), (block.attn.proj.bias, N),
                                 (block.norm2.weight, N), (getattr(block.norm2, "bias", None), N), (fc1.bias, F), (fc2.bias, N)):
                add(vector, size)
        add(self.model.norm.weight, N)
        add(getattr(self.model.norm, "bias", None), N)
        self.meta["OFFSETS"] = (2 * N, 2 * N + Q, 3 * N + Q, 5 * N + Q, 5 * N + Q + F, 6 * N + Q + F)
        return torch.cat(parts)

    def __call__(self, tokens, cache):
        assert cache is self.cache, "the table holds the addresses of one cache"
        model = self.model
        wpe = None if model.wpe is None else model.wpe.weight
        _step[self.grid,](tokens, cache.position, model.wte.weight, wpe, model.head.weight, model.cos, model.sin, self.table, self.vectors, *self.buffers,
                          self.logits, self.counter, cache.length, model.norm.eps, **self.meta, num_warps=self.warps, num_stages=1,
                          **self.options)
        return self.logits
