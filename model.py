"""GPT and LLaMA language models from one set of switches, with dense or structured feedforward layers.

Pre-norm blocks x + attention(norm(x)), x + ffn(norm(x)); config has the switches. Also here: a loss that never holds
all logits, parameter and FLOP counts by the paper's rules, building and loading a model.
"""
import functools
import importlib.util
import logging
import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import config
from config import GATE_WIDTH, Config, UserError
from device import ShapesOnly, on_meta
from checkpoint import read_model
from structured import Dense, FactoredQKV, Structured, linear, linear_gelu

# Fused kernels: without the folder all of the model is plain torch.
ops = importlib.import_module("ops") if importlib.util.find_spec("ops") else SimpleNamespace(ON=False)


# ----------------------------------------------------------------------------------------------------------------------
# Blocks

def make_norm(cfg):
    if cfg.norm == "rmsnorm":
        return nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
    return nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps, bias=cfg.bias)


def rms_norm(x):
    """Without weights, over the last dimension; its epsilon is the one of the fused kernel."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-5).to(x.dtype)


def add_norm(x, pending, norm):
    """(x + pending, its norm), one pass over memory where it is fused. pending None adds nothing."""
    if ops.ON and ops.can_add_norm(x):
        return ops.add_norm(x, pending, norm)
    x = x if pending is None else x + pending
    return x, norm(x).to(x.dtype)


def skip_norm(x, pending, x0, a, b, norm):
    """(a (x + pending) + b x0, its norm, x0 for the next block), as add_norm."""
    if pending is not None and ops.ON and ops.can_add_norm(x):
        return ops.skip_norm(x, pending, x0, a, b, norm)
    x = a * (x if pending is None else x + pending) + b * x0
    return *add_norm(x, None, norm), x0


def rotary_table(block_size, head_size, theta=10_000.0):
    """cos and sin (block_size, 1, head_size) for rotary positions with base theta, halves not interleaved.

    The first half of sin is negative. So (a, b) -> (a cos - b sin, b cos + a sin) is x cos + (b, a) sin.
    """
    frequency = theta ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    angle = torch.arange(block_size, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.cat((cos, cos), 1)[:, None], torch.cat((-sin, sin), 1)[:, None]


def rotate(x, cos, sin):
    """x (B, T, heads, head_size) rotated by its positions; cos, sin are rows of rotary_table."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((b, a), dim=-1) * sin).to(x.dtype)


def has_values(cfg, layer) -> bool:
    """Whether a layer has value embeddings: the last one, and every other one before it."""
    return cfg.value_embeddings and (cfg.n_layer - 1 - layer) % 2 == 0


class Attention(nn.Module):
    """Causal self-attention; n_kv_head < n_head shares keys and values among groups of query heads."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = cfg.n_head, cfg.n_kv_head, cfg.attn_dim // cfg.n_head
        self.rope, self.qk_norm = cfg.pos == "rope", cfg.qk_norm
        q, kv = cfg.attn_dim, cfg.n_kv_head * self.head_size
        if cfg.qk_rank:
            self.qkv = FactoredQKV(cfg.n_embd, q, kv, cfg.qk_rank, cfg.bias)
        else:
            self.qkv = Dense(cfg.n_embd, q + 2 * kv, cfg.bias)
        self.proj = Dense(cfg.attn_dim, cfg.n_embd, bias=cfg.bias)
        if has_values(cfg, layer):
            self.values = nn.Embedding(cfg.vocab_size, kv)
            self.gate = nn.Linear(GATE_WIDTH, cfg.n_kv_head, bias=False)
        else:
            self.values = self.gate = None

    def forward(self, x, cos, sin, values=None, cache=None):
        """x (B, T, n_embd) -> (B, T, n_embd). values (B, T, n_kv_head x head_size), with value embeddings: every key
        head adds its part to v, times 3 sigmoid(gate). cache: one layer's of `Cache.kept`."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_size)                         # (B, T, heads, head_size)
        if self.rope and ops.ON and ops.can_rotate(qkv, cos):
            q, k, v, _ = ops.split_rotated(qkv, cos, sin, self.n_head, self.n_kv_head, self.qk_norm)
        else:
            q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
            if self.qk_norm:
                q, k = rms_norm(q) * self.qk_norm, rms_norm(k) * self.qk_norm
            if self.rope:
                q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if values is not None:
            gate = 3 * torch.sigmoid(self.gate(x[..., :GATE_WIDTH]))                  # (B, T, n_kv_head)
            v = v + (gate[..., None] * values.view_as(v)).to(v.dtype)
        if cache is not None:
            return self.proj(cache.attend(q, k, v).reshape(B, T, -1))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                         # (B, heads, T, head_size)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n_kv_head < self.n_head)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))


class FFN(nn.Module):
    """fc2(act(fc1(x))), both linears dense or structured; swiglu's gate and value are the halves of one fc1."""

    def __init__(self, cfg, ffn):
        super().__init__()
        self.act, self.kernels, self.recompute = cfg.act, cfg.kernels, cfg.recompute == "wide"
        self.fc1 = linear(ffn, cfg.n_embd, cfg.n_hidden, cfg.rank, cfg.nblocks, cfg.bias)
        self.fc2 = linear(ffn, cfg.ffn_dim, cfg.n_embd, cfg.rank, cfg.nblocks, cfg.bias)

    def forward(self, x, alpha=None):
        if alpha is None and self.kernels and ops.ON and ops.can_ffn(x, self.fc1, self.fc2, self.act):
            return ops.fused_ffn(x, self.fc1, self.fc2, self.act, self.recompute)
        if self.act == "gelu":
            h = linear_gelu(self.fc1, x, alpha)
        elif self.act == "relu2":
            h = F.relu(self.fc1(x, alpha)).square()
        else:
            gate, value = self.fc1(x, alpha).chunk(2, dim=-1)
            h = F.silu(gate) * value
        return self.fc2(h, alpha)


# Operations whose results a compiled block keeps: computing them again costs more time than reading them
COSTLY = ("mm", "addmm", "bmm", "block_linear", "ffn", "split_rotated", "_scaled_dot_product_flash_attention",
          "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_efficient_attention",
          "_scaled_dot_product_flash_attention_for_cpu")


def what_to_keep(wide, ctx, op, *args, **kwargs):
    """Which results a compiled block keeps for its backward; the rest is computed again.

    Kept are matmuls, attention, and weights cast to another precision. Of matmuls with `wide` or more columns none is
    kept, unless `wide` is 0.
    """
    name = op._schema.name.partition("::")[2]
    too_wide = wide and name in ("mm", "addmm", "bmm") and args[-1].size(-1) >= wide  # columns of the last factor
    cast_weight = name == "_to_copy" and args[0].dim() == 2
    keep = name in COSTLY and not too_wide or cast_weight
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def scramble(x):
    """A hash of int32 tensors, one to one (Mueller's, the "lowbias32" constants); shifts are made unsigned by masks."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


def dropout(x, p, keys):
    """x (B, T, C) with a share p of its entries zeroed, the others divided by 1 - p.

    Which ones is a hash of the entry's place and its sequence's key, keys (B,) int64. So neither a generator's state
    nor the rank that holds the sequence matters, and a compiled backward hashes again instead of keeping a mask.
    """
    T, C = x.shape[1:]
    place = torch.arange(T * C, device=x.device, dtype=torch.int32).view(T, C)
    low, high = ((keys >> bits & 0x7FFFFFFF).to(torch.int32)[:, None, None] for bits in (0, 31))
    draws = scramble(scramble(place ^ low) ^ high) & 0x7FFFFFFF                  # (B, T, C), uniform below 2^31
    return torch.where(draws >= int(p * 2**31), x / (1 - p), 0)


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.empty(())) for _ in range(2)) if cfg.embed_skip else (None, None)
        self.norm1, self.attn = make_norm(cfg), Attention(cfg, layer)
        self.norm2, self.ffn = make_norm(cfg), FFN(cfg, "dense" if layer < cfg.n_dense_layers else cfg.ffn)
        self.post_norm1, self.post_norm2 = (make_norm(cfg) if cfg.post_norm else None for _ in range(2))
        self.dropout, self.recompute = cfg.dropout, cfg.recompute
        self.wide = cfg.n_hidden if cfg.recompute == "wide" else 0

    def forward(self, x, pending, cos, sin, alpha=None, values=None, x0=None, cache=None, keys=None):
        """x + pending is the residual stream (B, T, n_embd); returns the next x and pending, and x0. In plain form:

            x = x + attn(norm1(x))
            x = x + ffn(norm2(x))

        With post_norm attn's and ffn's outputs are normed before they are added.

        The last addition is deferred: ffn's output is returned as `pending`, and the next block adds it. So every
        residual add fuses with the norm that follows it. pending is None before the first block.

        alpha: weight of the guide in this layer's FFN, a 0-d tensor, or None for the factors alone. values: of the
        value embeddings. x0 (B, T, n_embd): the token embeddings, for embed_skip. keys (2, B): of the dropout, if any.
        """
        if self.a is not None:
            x, h, x0 = skip_norm(x, pending, x0, self.a, self.b, self.norm1)
        else:
            x, h = add_norm(x, pending, self.norm1)
        if torch.compiler.is_compiling() and self.recompute != "off" and torch.is_grad_enabled():
            policy = functools.partial(what_to_keep, self.wide)
            contexts = functools.partial(create_selective_checkpoint_contexts, policy)
            return *checkpoint(self.body, x, h, cos, sin, alpha, values, None, keys, use_reentrant=False,
                               context_fn=contexts), x0
        return *self.body(x, h, cos, sin, alpha, values, cache, keys), x0

    def body(self, x, h, cos, sin, alpha=None, values=None, cache=None, keys=None):
        """x and h = norm1(x) -> x + attn(h), and ffn of its norm, which is still to be added."""
        attended = self.attn(h, cos, sin, values, cache)
        if self.post_norm1 is not None:
            attended = add_norm(attended, None, self.post_norm1)[1]
        if keys is not None:
            attended = dropout(attended, self.dropout, keys[0])
        x, h = add_norm(x, attended, self.norm2)
        h = self.ffn(h, alpha)
        if self.post_norm2 is not None:
            h = add_norm(h, None, self.post_norm2)[1]
        return x, h if keys is None else dropout(h, self.dropout, keys[1])


# ----------------------------------------------------------------------------------------------------------------------
# The keys and values of decoding

class Cache:
    """Keys and values of B sequences of up to `length` tokens, in buffers that never move: a CUDA graph holds them.

    layers: of each layer k and v (B, n_kv_head, length, head_size). position (B,): the tokens that each row holds.
    newest (B,): the last of them, for smear.
    seen: a step reads the first `seen` places only. The host sets it, knowing that no row holds more.
    spare: more rows of k and v, after the B that take part in steps; `every` (n_layer, 2, B + spare, ...) holds them.
    """

    def __init__(self, cfg, batch, length, device, dtype, spare=0):
        shape = cfg.n_layer, 2, batch + spare, cfg.n_kv_head, length, cfg.attn_dim // cfg.n_head
        self.every = torch.zeros(shape, device=device, dtype=dtype)
        self.layers = [(self.every[i, 0, :batch], self.every[i, 1, :batch]) for i in range(cfg.n_layer)]
        self.position, self.newest = torch.zeros(2, batch, device=device, dtype=torch.long)
        self.index = torch.arange(batch, device=device)
        self.length = self.seen = length

    def move(self, source, to, tokens):
        """The first `tokens` keys and values of one row to another row."""
        wide = self.every.size(-1) % 4 == 0  # copies of 8 bytes are faster than those of 2
        words = self.every.view(torch.int64) if wide else self.every
        words[:, :, to, :, :tokens] = words[:, :, source, :, :tokens]

    def mask(self):
        """(B, 1, 1, seen), added to the scores of a step: a row sees its own tokens and the new one."""
        hidden = torch.arange(self.seen, device=self.position.device) > self.position[:, None]
        dtype = self.layers[0][0].dtype
        return torch.zeros((), device=hidden.device, dtype=dtype).masked_fill(hidden, -torch.inf)[:, None, None]

    # What GPT.store needs of a cache; decode.Prompts has the same

    def place(self, T):
        """The positions of T new tokens of each row. Prompts begin in empty rows."""
        return self.position[:, None] if T == 1 else slice(T)

    def before(self):
        """(B,): the token before each row's next one, -1 in an empty row."""
        return torch.where(self.position > 0, self.newest, -1)

    def begins(self):
        """None: a row holds one text."""

    def kept(self, T):
        """Of each layer what stores keys and values of T new tokens and attends to them."""
        mask = self.mask() if T == 1 else None  # prompts need none but the causal one
        return [LayerCache(*layer, self.index, self.position, mask) for layer in self.layers]

    def advance(self, tokens, newest):
        """A full row stays full; what is written to its last place is ignored. newest (B,): each row's last token."""
        self.position.add_(tokens).clamp_(max=self.length - 1)
        self.newest.copy_(newest)


class LayerCache(NamedTuple):
    k: torch.Tensor
    v: torch.Tensor
    index: torch.Tensor
    position: torch.Tensor
    mask: torch.Tensor

    def attend(self, q, k, v):
        """Stores k, v (B, T, n_kv_head, head_size); q (B, T, n_head, head_size) -> the output of attention, as q."""
        B, T, n_head, size = q.shape
        if T > 1:  # prompts: nothing was stored before
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))                     # (B, heads, T, head_size)
            self.k[:, :, :T], self.v[:, :, :T] = k, v
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.size(1) < n_head)
            return y.transpose(1, 2)                                             # (B, T, n_head, head_size)
        row, seen = self.index, self.mask.size(-1)
        self.k[row, :, self.position], self.v[row, :, self.position] = k[:, 0], v[:, 0]
        q = q.view(B, k.size(2), -1, size)  # query heads that share a key head become its queries: k is not repeated
        return F.scaled_dot_product_attention(q, self.k[:, :, :seen], self.v[:, :, :seen], attn_mask=self.mask)


# ----------------------------------------------------------------------------------------------------------------------
# LM head and cross-entropy, a chunk of tokens at a time

def softcap(logits, cap):
    """cap tanh(logits / cap), in at least float32; cap 0: the logits as they are."""
    return cap * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap) if cap else logits


def token_loss(logits, targets, scale, cap=0.0):
    """Cross-entropy (C,) of softcap(logits, cap) (C, V) in float32, and scale x its gradient in the logits' dtype.

    Targets below 0 count nothing.
    """
    logits32 = softcap(logits, cap).float()
    kept = targets >= 0
    index = targets.clamp(min=0)[:, None]                                        # (C, 1)
    logz = logits32.logsumexp(dim=1, keepdim=True)
    loss = (logz - logits32.gather(1, index))[:, 0] * kept
    one_hot = torch.arange(logits.size(1), device=logits.device) == index        # (C, V)
    grad = ((logits32 - logz).exp() - one_hot.float()) * (kept * scale)[:, None]
    if cap:
        grad = grad * (1 - (logits32 / cap).square())  # the slope of tanh
    return loss, grad.to(logits.dtype)


def token_mixture(logits, targets, scale, cap, theirs, share):
    """token_loss with share p + (1 - share) one_hot as the wanted distribution, p of a teacher's logits (C, V).

    The loss is share KL(p || q) + (1 - share) cross-entropy, q the softmax of softcap(logits, cap).
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    capped = softcap(logits.to(exact), cap)
    logq, logp = capped.log_softmax(1), theirs.to(exact).log_softmax(1)
    p = logp.exp()
    kept = targets >= 0
    index = targets.clamp(min=0)[:, None]                                        # (C, 1)
    loss = (share * (p * (logp - logq)).sum(1) - (1 - share) * logq.gather(1, index)[:, 0]) * kept
    one_hot = (torch.arange(logits.size(1), device=logits.device) == index).to(exact)
    grad = (logq.exp() - share * p - (1 - share) * one_hot) * (kept * scale)[:, None]
    if cap:
        grad = grad * (1 - (capped / cap).square())  # the slope of tanh
    return loss, grad.to(logits.dtype)


class LMLoss(torch.autograd.Function):
    """Mean cross-entropy of h (T, d), head weight (V, d) and targets (T,), a 0-d tensor. Targets below 0 are left out.
    token_loss: the function of that name, compiled or not; cap: the one of softcap.

    The logits of a chunk of tokens live only while its share of both gradients is formed. So there is no (T, V) tensor,
    and nothing is computed twice.

    teacher: what a Teacher returns, its h (T, d'), its head weight (V, d'), its cap and its share of the loss. Then
    token_loss is token_mixture. The teacher has no gradients.
    """
    CHUNK = 8192  # tokens; twice as many where the gradient overwrites the logits. Smaller chunks slow the matmuls down

    @staticmethod
    def forward(ctx, h, weight, targets, token_loss, cap, teacher=None):
        w = weight.to(h.dtype)
        training = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        scale = 1.0 / (targets >= 0).sum().clamp(min=1)
        exact = torch.promote_types(weight.dtype, torch.float32)
        loss = torch.zeros((), device=h.device, dtype=exact)
        grad_h = torch.empty_like(h) if training else None
        grad_w = torch.zeros_like(weight, dtype=exact) if training else None
        in_place = teacher is None and ops.ON and ops.can_token_loss(h)
        chunk = LMLoss.CHUNK * (2 if in_place else 1)
        for i in range(0, len(h), chunk):
            rows = slice(i, i + chunk)
            logits = h[rows] @ w.T                                               # (C, V)
            if in_place:
                losses, grad = ops.token_loss(logits, targets[rows], scale, training, cap)  # (C,), (C, V)
            elif teacher is None:
                losses, grad = token_loss(logits, targets[rows], scale, cap)
            else:
                their_h, their_weight, their_cap, share = teacher
                theirs = softcap(their_h[rows] @ their_weight.T.to(their_h.dtype), their_cap)  # (C, V)
                losses, grad = token_loss(logits, targets[rows], scale, cap, theirs, share)
            loss += losses.sum()
            if training:
                torch.mm(grad, w, out=grad_h[rows])
                grad_w += grad.T @ h[rows]
        ctx.save_for_backward(grad_h, grad_w)
        ctx.weight_dtype = weight.dtype
        return loss * scale

    @staticmethod
    def backward(ctx, grad_loss):
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad_loss.to(grad_h.dtype), (grad_w * grad_loss).to(ctx.weight_dtype), None, None, None, None


# ----------------------------------------------------------------------------------------------------------------------
# The model

class Smear(nn.Module):
    """x_t + scale sigmoid(gate(x_t)) x_(t-1): a token's embedding holds some of the one before it without attention."""

    def __init__(self):
        super().__init__()
        self.gate, self.scale = nn.Linear(GATE_WIDTH, 1, bias=False), nn.Parameter(torch.empty(()))

    def forward(self, x, first, begins=None):
        """x (B, T + 1, n_embd), the first of which counts where `first` (B,) is true -> (B, T, n_embd).

        begins (B, T): the tokens with which a text begins inside a row.
        """
        before = torch.cat((x[:, :1] * first[:, None, None], x[:, 1:-1]), 1)     # (B, T, n_embd)
        if begins is not None:
            before = before.masked_fill(begins[..., None], 0)
        gate = self.scale * torch.sigmoid(self.gate(x[:, 1:, :GATE_WIDTH]))           # (B, T, 1)
        return x[:, 1:] + (gate * before).to(x.dtype)


class GPT(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.smear = Smear() if cfg.smear else None
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd) if cfg.pos == "absolute" else None
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.norm = make_norm(cfg)
        self.head = Dense(cfg.n_embd, cfg.vocab_size, bias=False)
        self.tie()
        tables = rotary_table(cfg.block_size, cfg.attn_dim // cfg.n_head, cfg.rope_theta)
        for name, table in zip(("cos", "sin"), tables):
            self.register_buffer(name, table, persistent=False)
        self.token_loss, self.token_mixture, self.teacher = token_loss, token_mixture, None

    def tie(self):
        if self.cfg.tie_embeddings:
            self.head.weight = self.wte.weight

    @torch.no_grad()
    def init_weights(self):
        """As in the paper: matrices N(0, 0.02^2), biases 0, norms 1 or post_norm, structured linears their own way.

        With init=zero the matrices' deviation is 1 / sqrt(n_embd), and init_zero changes some.
        """
        zero = self.cfg.init == "zero"
        std = self.cfg.n_embd ** -0.5 if zero else 0.02
        small = ".ffn.fc1" if self.cfg.post_norm else ".ffn."
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                nn.init.constant_(module.weight, self.cfg.post_norm if ".post_norm" in name else 1)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, Structured):
                module.reset_parameters(0.4 * std if zero and small in name else std)
        if self.smear is not None:
            nn.init.zeros_(self.smear.scale)
        for layer, block in enumerate(self.blocks if self.cfg.embed_skip else ()):
            depth = layer / max(1, self.cfg.n_layer - 1)
            block.a.fill_(1.15 - 0.1 * depth)  # early layers weigh more, and see more of the embeddings
            block.b.fill_(0.2 - 0.15 * depth)
        if zero:
            self.init_zero()
        return self

    def init_zero(self):
        """The last matrix or factor of attention and FFN is 0, so a block adds nothing at first. With post_norm it
        stays random, since a norm of zeros has no direction: a block adds vectors of root mean square post_norm.

        The gates are 0, an untied head almost: the first loss is then log(vocab_size).
        """
        for block in self.blocks:
            fc1, fc2 = block.ffn.fc1, block.ffn.fc2
            if not self.cfg.post_norm:
                nn.init.zeros_(block.attn.proj.weight)
                nn.init.zeros_(fc2.U if isinstance(fc2, Structured) else fc2.weight)
            if not isinstance(fc1, Structured):
                fc1.weight.mul_(0.4)
            if block.attn.gate is not None:
                nn.init.zeros_(block.attn.gate.weight)
        if not self.cfg.tie_embeddings:
            nn.init.normal_(self.wte.weight)
            nn.init.normal_(self.head.weight, std=0.001)

    def embed(self, tokens, before=None, begins=None):
        """tokens (B, T) -> their embeddings, (B, T, n_embd), and of each layer its value embeddings or None.

        For smear. before (B,): the token before each row's first, -1 where there is none. None: nowhere is one.
        begins: as in Smear.
        """
        if self.cfg.smear:
            before = tokens.new_full((len(tokens),), -1) if before is None else before
            x = self.wte(torch.cat((before.clamp(min=0)[:, None], tokens), 1))   # (B, T + 1, n_embd)
        else:
            x = self.wte(tokens)
        if self.cfg.embed_norm:
            x = rms_norm(x)
        if self.cfg.smear:
            x = self.smear(x, before >= 0, begins)
        return x, [None if block.attn.values is None else block.attn.values(tokens) for block in self.blocks]

    def hidden(self, tokens, alpha=None, guided=(), keys=None):
        """tokens (B, T) -> what the LM head reads, (B, T, n_embd). guided: the layers that use their guide.

        keys (1 + 2 n_layer, B) int64, with dropout in training: those of the embeddings, then two rows for each layer.
        """
        T = tokens.size(1)
        assert keys is not None or not (self.training and self.cfg.dropout), "dropout in training needs keys"
        assert T <= self.cfg.block_size, f"{T} tokens exceed block_size {self.cfg.block_size}"
        x, values = self.embed(tokens)
        if self.wpe is not None:
            x = x + self.wpe.weight[:T]
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))  # the residual stream in the matmuls' precision
        if keys is not None:
            x = dropout(x, self.cfg.dropout, keys[0])
        cos, sin = self.cos[:T], self.sin[:T]
        x0, pending = x if self.cfg.embed_skip else None, None
        for layer, block in enumerate(self.blocks):
            drawn = None if keys is None else keys[1 + 2 * layer:3 + 2 * layer]
            given = alpha if layer in guided else None
            x, pending, x0 = block(x, pending, cos, sin, given, values[layer], x0, keys=drawn)
        return add_norm(x, pending, self.norm)[1]

    def logits(self, h):
        """h (..., n_embd) -> logits (..., vocab_size)."""
        return softcap(self.head(h), self.cfg.logit_softcap)

    def forward(self, tokens, targets=None, alpha=None, guided=(), keys=None):
        """tokens (B, T) -> logits (B, T, vocab_size), or with targets (B, T) their mean cross-entropy, a 0-d tensor.

        Targets below 0 are left out. In training with a teacher the loss is that of token_mixture.
        """
        h = self.hidden(tokens, alpha, guided, keys)
        if targets is None:
            return self.logits(h)
        if self.teacher is not None and self.training:
            return LMLoss.apply(h.flatten(0, 1), self.head.weight, targets.flatten(), self.token_mixture,
                                self.cfg.logit_softcap, self.teacher(tokens))
        # LMLoss forms gradients for what requires them: in a validation nothing does
        weight = self.head.weight if torch.is_grad_enabled() else self.head.weight.detach()
        return LMLoss.apply(h.flatten(0, 1), weight, targets.flatten(), self.token_loss, self.cfg.logit_softcap)

    @torch.no_grad()
    def step(self, tokens, cache, lengths=None):
        """A prefill or a decode step: each row's next tokens (B, T) -> logits (B, vocab_size) of what follows them.

        A decode step has one token a row. A prefill fills a cache whose rows are empty with prompts, padded on the
        right to T tokens, of which `lengths` (B,) are real. The steps in ops/ compute the same as this.
        """
        row, (x, pending) = cache.index, self.store(tokens, cache)
        last = torch.full_like(cache.position, tokens.size(1) - 1) if lengths is None else lengths - 1
        cache.advance(1 if lengths is None else lengths, tokens[row, last])
        return self.logits(add_norm(x[row, last], pending[row, last], self.norm)[1])

    @torch.no_grad()
    def store(self, tokens, cache):
        """A step without the head: stores keys and values of tokens (B, T) -> x and pending of the last block.

        cache: a Cache, whose prompts are padded on the right. The causal mask hides the padding from every real token,
        and later steps overwrite its keys. Or decode.Prompts, whose tokens (1, N) are those of several prompts.
        """
        place = cache.place(tokens.size(1))
        x, values = self.embed(tokens, cache.before(), cache.begins())
        if self.wpe is not None:
            x = x + self.wpe.weight[place]
        cos, sin = self.cos[place], self.sin[place]                              # (B, 1, 1, head_size) or (T, 1, ...)
        x0, pending = x if self.cfg.embed_skip else None, None
        for block, kept, value in zip(self.blocks, cache.kept(tokens.size(1)), values):
            x, pending, x0 = block(x, pending, cos, sin, values=value, x0=x0, cache=kept)
        return x, pending

    def compile_parts(self):
        """torch.compile, block by block: equal blocks share one compilation, and parameters keep their names."""
        torch._dynamo.config.recompile_limit = 64  # dense and structured, guided and plain, training and validation
        # a block's gradients are few buckets of DDP. Cut up by them, torch 2.11 forgets what the checkpoint keeps
        torch._dynamo.config.optimize_ddp = False
        # checkpoint warns of in-place operations; a block has none
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        for block in self.blocks:
            block.compile()
        self.embed = torch.compile(self.embed)  # the gradient of a table is one pass of sums, not a sort of the tokens
        self.token_loss, self.token_mixture = torch.compile(token_loss), torch.compile(token_mixture)
        if self.teacher is not None:
            self.teacher.model.compile_parts()

    def structured_linears(self):
        """[(layer, linear)] of the FFNs' structured linears: those that a guide can have."""
        return [(i, m) for i, block in enumerate(self.blocks) for m in block.ffn.modules() if isinstance(m, Structured)]

    def layers_with_guide(self) -> tuple:
        return tuple(dict.fromkeys(layer for layer, m in self.structured_linears() if m.W is not None))


class Teacher:
    """A trained model that another one learns from, and no part of it: neither its parameters nor its state dict."""

    def __init__(self, model, share, checksum=0):
        self.model, self.share, self.checksum = model.eval(), share, checksum

    @torch.no_grad()
    def __call__(self, tokens):
        """tokens (B, T) -> h (B T, d'), head weight (V, d'), soft cap and share of the loss, as LMLoss takes them."""
        return (self.model.hidden(tokens).flatten(0, 1), self.model.head.weight, self.model.cfg.logit_softcap,
                self.share)


def build(cfg, device, seed=None, weights=None, path=""):
    """A GPT whose weights are made on `device`: drawn with the seed, or `weights`, which errors call those of `path`.

    Weights are checked before memory is taken. Without a seed and weights the memory is left as it is.
    """
    with on_meta():
        model = GPT(cfg)
    if weights is not None:
        check_weights(model, weights, path)
    with ShapesOnly():
        model.to_empty(device=device)
    model.tie()  # to_empty gave each its own memory
    cos, sin = rotary_table(cfg.block_size, cfg.attn_dim // cfg.n_head, cfg.rope_theta)
    model.cos, model.sin = cos.to(device), sin.to(device)
    if seed is not None:
        torch.manual_seed(seed)
        model.init_weights()
    if weights is not None:
        load_weights(model, weights, path)
    return model


PRECISIONS = torch.float32, torch.bfloat16, torch.float16, torch.float64


def check_weights(model, weights, path):
    """UserError unless the weights of the file at path are those of a model, which may be on the meta device."""
    def shape(tensors, name):
        return tuple(tensors[name].shape) if name in tensors else "none"

    mine, refusal = model.state_dict(), f"the weights in {path} do not match its config"
    for name in sorted(mine.keys() | weights.keys()):
        there, expected = shape(weights, name), shape(mine, name)
        if there != expected:
            raise UserError(f"{refusal}: the shape of {name} is {there}, expected {expected}.")
        if weights[name].dtype not in PRECISIONS:
            raise UserError(f"{refusal}: {name} is {weights[name].dtype}.")
    positions = model.cos.numel()  # no weights, and yet memory
    if positions > (1 << 23) + sum(t.numel() for t in mine.values()):
        raise UserError(f"the config in {path} has block_size={model.cfg.block_size}, whose rotary positions take more "
                        "memory than the model: give a model of a shorter context.")


def load_weights(model, weights, path):
    """Weights of the file at path that check_weights has passed; UserError unless they are finite."""
    model.load_state_dict(dict(weights))
    for name, t in model.state_dict().items():
        if t.numel() and not all(map(math.isfinite, t.aminmax())):
            raise UserError(f"the weights in {path} are not finite, {name} for one: its training has diverged, or the "
                            "file is damaged.")


def load(path, device):
    """model.pt, or a run folder, finished or not -> (model ready to use, config, the file's other entries)."""
    path, saved = read_model(path)
    cfg = config.from_dict(saved["config"], path)
    return build(cfg, device, weights=saved.pop("model"), path=path).eval(), cfg, saved


# ----------------------------------------------------------------------------------------------------------------------
# Counting, as in the paper's tables: a multiply-add is 2 FLOPs, and only matmuls count. The LM head does, and so do
# attention's products, in full

def linear_params(ffn, n, m, rank, nblocks):
    """Matrix parameters = multiply-adds per token of one linear n -> m."""
    return {"dense": n * m, "lowrank": rank * (n + m), "blockshuffle": min(n, m) * (n + m) // max(nblocks, 1),
            "blockdense": rank * (m + n // max(nblocks, 1))}[ffn]


def ffn_params(cfg, ffn=None):
    """Matrix parameters of all FFNs; `ffn` replaces cfg's in the structured layers."""
    def layer(kind):
        return (linear_params(kind, cfg.n_embd, cfg.n_hidden, cfg.rank, cfg.nblocks)
                + linear_params(kind, cfg.ffn_dim, cfg.n_embd, cfg.rank, cfg.nblocks))
    n_dense = min(cfg.n_dense_layers, cfg.n_layer)
    return n_dense * layer("dense") + (cfg.n_layer - n_dense) * layer(ffn or cfg.ffn)


def flops_per_token(cfg, ffn=None):
    """FLOPs of the forward per token at block_size; times 3 for a training step."""
    kv = cfg.n_kv_head * cfg.attn_dim // cfg.n_head
    kind = "lowrank" if cfg.qk_rank else "dense"
    queries_keys = sum(linear_params(kind, cfg.n_embd, m, cfg.qk_rank, 0) for m in (cfg.attn_dim, kv))
    attention = queries_keys + cfg.n_embd * (kv + cfg.attn_dim)                  # with values and output
    products = 2 * cfg.block_size * cfg.attn_dim                                 # scores and values
    gates = GATE_WIDTH * (sum(has_values(cfg, layer) for layer in range(cfg.n_layer)) * cfg.n_kv_head + cfg.smear)
    return 2 * (cfg.n_layer * (attention + products) + gates + ffn_params(cfg, ffn) + cfg.vocab_size * cfg.n_embd)
