"""Triton kernels of training around the matmuls, each one pass over memory.

Rotary positions on the way into attention and out of it, the residual add with the norm that follows it, cross-entropy
with its gradient, AdamW's update of a group's vectors or matrices in one launch, Muon's of all matrices of one shape
in two.
"""
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from device import Upload
from ops.fallback import works

INTERPRET = triton.knobs.runtime.interpret
# Device and precision of the trials' inputs
TRIAL = dict(device="cpu" if INTERPRET else "cuda", dtype=torch.float16 if INTERPRET else torch.bfloat16)


@functools.cache
def multiprocessors(device):
    return 8 if INTERPRET else torch.cuda.get_device_properties(device).multi_processor_count


def _half_precision(x) -> bool:
    """On CUDA, or in the interpreter."""
    return (x.is_cuda or INTERPRET) and x.dtype in (torch.bfloat16, torch.float16)


# ----------------------------------------------------------------------------------------------------------------------
# Rotary positions: q, k and v cut out of one tensor and joined again, rotated on the way

@triton.jit
def _copy_heads(source, target, c, s, source_head, target_head, normed, scale, gain, heads, H: tl.constexpr,
                HEADS: tl.constexpr, TURN: tl.constexpr, NORM: tl.constexpr, BACK: tl.constexpr):
    """heads vectors (2 H,), the halves a, b of each as (a c - b s, b c + a s) with TURN.

    NORM: brought to root mean square `gain` before; the factors of that go to scale (heads,). With BACK they are read
    there, and the gradients of the vectors `normed` become those of what was normed.
    """
    head, h = tl.arange(0, HEADS)[:, None], tl.arange(0, H)[None, :]
    ok = head < heads
    a = tl.load(source + head * source_head + h, mask=ok, other=0.0)                   # (HEADS, H)
    b = tl.load(source + head * source_head + H + h, mask=ok, other=0.0)
    if TURN:
        a, b = a.to(tl.float32), b.to(tl.float32)
        if NORM and BACK:  # x = n / r: dx = r (dn - n mean(dn n))
            r = tl.load(scale + head, mask=ok, other=0.0)
            na = tl.load(normed + head * 2 * H + h, mask=ok, other=0.0).to(tl.float32) / gain
            nb = tl.load(normed + head * 2 * H + H + h, mask=ok, other=0.0).to(tl.float32) / gain
            dot = tl.sum(a * na + b * nb, 1)[:, None] / (2 * H)
            a, b = r * gain * (a - na * dot), r * gain * (b - nb * dot)
        if NORM and not BACK:
            r = tl.rsqrt(tl.sum(a * a + b * b, 1)[:, None] / (2 * H) + 1e-5)
            tl.store(scale + head, r, mask=ok)
            a, b = a * r * gain, b * r * gain
        a, b = a * c - b * s, b * c + a * s
    tl.store(target + head * target_head + h, a.to(target.dtype.element_ty), mask=ok)
    tl.store(target + head * target_head + H + h, b.to(target.dtype.element_ty), mask=ok)


@triton.jit
def _rotate(qkv, q, k, v, cos, sin, normed_q, normed_k, scale, gain, T, qb, qt, qh, kb, kt, kh, vb, vt, vh,
            Q: tl.constexpr, KV: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
            NORM: tl.constexpr, BACK: tl.constexpr):
    """One token: qkv (B, T, Q + 2 KV, 2 H) -> q, k, v by their strides; BACK: from q, k, v into qkv, turned back."""
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    h = tl.arange(0, H)[None, :]
    c, s = tl.load(cos + t * 2 * H + h), tl.load(sin + t * 2 * H + H + h)  # (1, H); sin's second half is positive
    of_q = qkv + token * (Q + 2 * KV) * 2 * H
    of_k, of_v = of_q + Q * 2 * H, of_q + (Q + KV) * 2 * H
    q += b * qb + t * qt
    k += b * kb + t * kt
    v += b * vb + t * vt
    scale += token * (Q + KV)
    normed_q += token * Q * 2 * H
    normed_k += token * KV * 2 * H
    if BACK:
        _copy_heads(q, of_q, c, -s, qh, 2 * H, normed_q, scale, gain, Q, H, HEADS, True, NORM, True)
        _copy_heads(k, of_k, c, -s, kh, 2 * H, normed_k, scale + Q, gain, KV, H, KV_HEADS, True, NORM, True)
        _copy_heads(v, of_v, c, s, vh, 2 * H, normed_k, scale, gain, KV, H, KV_HEADS, False, False, True)
    else:
        _copy_heads(of_q, q, c, s, 2 * H, qh, normed_q, scale, gain, Q, H, HEADS, True, NORM, False)
        _copy_heads(of_k, k, c, s, 2 * H, kh, normed_k, scale + Q, gain, KV, H, KV_HEADS, True, NORM, False)
        _copy_heads(of_v, v, c, s, 2 * H, vh, normed_k, scale, gain, KV, H, KV_HEADS, False, False, False)


def _launch_rotate(qkv, q, k, v, cos, sin, normed_q, normed_k, scale, gain, back):
    B, T, n_head, size = q.shape
    strides = [t.stride(i) for t in (q, k, v) for i in range(3)]
    _rotate[(B * T,)](qkv, q, k, v, cos, sin, normed_q, normed_k, scale, gain, T, *strides, n_head, k.size(2),
                      size // 2, triton.next_power_of_2(n_head), triton.next_power_of_2(k.size(2)), gain > 0, back,
                      num_warps=4)


def can_rotate(qkv, cos) -> bool:
    """Whether `split_rotated` can: whole positions, halves of a head a power of two."""
    half = qkv.size(-1) // 2
    fits = _half_precision(qkv) and cos.dim() == 3 and half >= 16 and half & (half - 1) == 0
    return fits and works("rotary positions", _try_rotate)


def _try_rotate():
    qkv, table = torch.zeros(1, 1, 3, 32, **TRIAL), torch.zeros(1, 1, 32, device=TRIAL["device"])
    q, k, v, scale = split_rotated(qkv, table, table, 1, 1, 1.0)
    join_rotated(q, k, v, table, table, q, k, scale, 1.0)


@torch.library.custom_op("structured::split_rotated", mutates_args=())
def split_rotated(qkv: Tensor, cos: Tensor, sin: Tensor, n_head: int, n_kv_head: int, gain: float
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv (B, T, heads, size) -> q (B, T, n_head, size) and k (B, T, n_kv_head, size) turned by their positions, v.

    cos and sin are model.rotary_table's. With a gain above 0 every q and k first gets the root mean square gain. The
    last result is for backward: the factors (B, T, n_head + n_kv_head) of these norms.
    """
    B, T, _, size = qkv.shape
    q, k, v = (qkv.new_empty(B, T, heads, size) for heads in (n_head, n_kv_head, n_kv_head))
    scale = qkv.new_empty(B, T, n_head + n_kv_head if gain > 0 else 0, dtype=torch.float32)
    _launch_rotate(qkv.contiguous(), q, k, v, cos, sin, q, k, scale, gain, False)
    return q, k, v, scale


@split_rotated.register_fake
def _(qkv, cos, sin, n_head, n_kv_head, gain):
    scale = qkv.new_empty(*qkv.shape[:2], n_head + n_kv_head if gain > 0 else 0, dtype=torch.float32)
    return *(qkv.new_empty(*qkv.shape[:2], heads, qkv.size(3)) for heads in (n_head, n_kv_head, n_kv_head)), scale


@torch.library.custom_op("structured::join_rotated", mutates_args=())
def join_rotated(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, normed_q: Tensor, normed_k: Tensor,
                 scale: Tensor, gain: float) -> Tensor:
    """The gradient of qkv from those of q, k, v; normed_q, normed_k, scale are what split_rotated returned."""
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    qkv = q.new_empty(*q.shape[:2], q.size(2) + 2 * k.size(2), q.size(3))
    _launch_rotate(qkv, q, k, v, cos, sin, normed_q, normed_k, scale, gain, True)
    return qkv


@join_rotated.register_fake
def _(q, k, v, cos, sin, normed_q, normed_k, scale, gain):
    return q.new_empty(*q.shape[:2], q.size(2) + 2 * k.size(2), q.size(3))


def _save_rotated(ctx, inputs, output):
    _, cos, sin, _, _, ctx.gain = inputs
    q, k, _, scale = output
    ctx.mark_non_differentiable(scale)
    ctx.save_for_backward(cos, sin, *((q, k, scale) if ctx.gain > 0 else (scale,) * 3))


def _rotated_grads(ctx, q, k, v, _):
    return join_rotated(q, k, v, *ctx.saved_tensors, ctx.gain), None, None, None, None, None


split_rotated.register_autograd(_rotated_grads, setup_context=_save_rotated)


# ----------------------------------------------------------------------------------------------------------------------
# x + y, or a (x + y) + b x0, and its layer or RMS norm

@triton.jit
def _add_norm(x, y, x0, a, b, weight, bias, total, normed, eps, N: tl.constexpr, BN: tl.constexpr, RMS: tl.constexpr):
    """One row: total = x + y, with x0 a (x + y) + b x0, and normed = norm(total)."""
    n = tl.arange(0, BN)
    ok, at = n < N, tl.program_id(0).to(tl.int64) * N + n
    t = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    if y is not None:
        t += tl.load(y + at, mask=ok, other=0.0).to(tl.float32)
        if x0 is not None:
            t *= tl.load(a).to(tl.float32)
            t += tl.load(b).to(tl.float32) * tl.load(x0 + at, mask=ok, other=0.0).to(tl.float32)
        t = t.to(total.dtype.element_ty)
        tl.store(total + at, t, mask=ok)
        t = t.to(tl.float32)
    if not RMS:
        t = tl.where(ok, t - tl.sum(t, 0) / N, 0.0)
    out = t * tl.rsqrt(tl.sum(t * t, 0) / N + eps) * tl.load(weight + n, mask=ok, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + n, mask=ok, other=0.0).to(tl.float32)
    tl.store(normed + at, out.to(normed.dtype.element_ty), mask=ok)


@triton.jit
def _add_norm_backward(grad_total, grad_normed, total, x0, grad_x0, a, b, weight, grad, new_grad_x0, shares, rows, eps,
                       N: tl.constexpr, BN: tl.constexpr, RMS: tl.constexpr, BIASED: tl.constexpr, L: tl.constexpr):
    """Rows pid, pid + grid, ...: the gradient of x and y, with x0 its own added to grad_x0, and this thread block's
    share (1, L) of the gradients of weight, with BIASED of bias, with x0 of a and b."""
    n = tl.arange(0, BN)
    ok = n < N
    w = tl.load(weight + n, mask=ok, other=0.0).to(tl.float32)
    sum_w, sum_b = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    if x0 is not None:
        factor, factor0, of_a, of_b = tl.load(a).to(tl.float32), tl.load(b).to(tl.float32), 0.0, 0.0
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.full((), N, tl.int64) * row + n
        t = tl.load(total + at, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(grad_normed + at, mask=ok, other=0.0).to(tl.float32)
        c = t if RMS else tl.where(ok, t - tl.sum(t, 0) / N, 0.0)
        scale = tl.rsqrt(tl.sum(c * c, 0) / N + eps)
        c *= scale
        sum_w += g * c
        if BIASED:
            sum_b += g
        g *= w
        g = scale * (g - c * (tl.sum(g * c, 0) / N) - (0.0 if RMS else tl.sum(g, 0) / N))
        if grad_total is not None:
            g += tl.load(grad_total + at, mask=ok, other=0.0).to(tl.float32)
        if x0 is not None:
            e = tl.load(x0 + at, mask=ok, other=0.0).to(tl.float32)
            of_a += tl.sum(g * (t - factor0 * e), 0)  # a times that of a: x + y is not read again
            of_b += tl.sum(g * e, 0)
            old = tl.load(grad_x0 + at, mask=ok, other=0.0).to(tl.float32)
            tl.store(new_grad_x0 + at, (old + factor0 * g).to(grad.dtype.element_ty), mask=ok)
            g *= factor
        tl.store(grad + at, g.to(grad.dtype.element_ty), mask=ok)
    shares += tl.program_id(0) * L
    tl.store(shares + n, sum_w, mask=ok)
    if BIASED:
        tl.store(shares + N + n, sum_b, mask=ok)
    if x0 is not None:
        tl.store(shares + L - 2, tl.where(factor == 0, 0.0, of_a / factor))
        tl.store(shares + L - 1, of_b)


def _row_warps(N):
    return min(16, max(1, triton.next_power_of_2(N) // 512))  # 16 entries to a thread


@torch.library.custom_op("structured::add_norm", mutates_args=())
def add_norm_op(x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool,
                x0: Tensor | None = None, a: Tensor | None = None, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x, y (..., N) -> x + y, with x0 a (x + y) + b x0, and its norm; without y the first is empty."""
    N = x.size(-1)
    x, y, x0 = (t if t is None else t.contiguous() for t in (x, y, x0))
    total, normed = x.new_empty(0) if y is None else torch.empty_like(x), torch.empty_like(x)
    _add_norm[(x.numel() // N,)](x, y, x0, a, b, weight, bias, total, normed, eps, N, triton.next_power_of_2(N), rms,
                                 num_warps=_row_warps(N))
    return total, normed


@add_norm_op.register_fake
def _(x, y, weight, bias, eps, rms, x0=None, a=None, b=None):
    return x.new_empty(0 if y is None else x.shape), x.new_empty(x.shape)


@torch.library.custom_op("structured::add_norm_backward", mutates_args=())
def add_norm_backward_op(grad_total: Tensor | None, grad_normed: Tensor, total: Tensor, weight: Tensor, eps: float,
                         rms: bool, biased: bool, grad_x0: Tensor | None = None, x0: Tensor | None = None,
                         a: Tensor | None = None, b: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x (and y); grad_x0 + that of x0, or nothing; those of weight, bias, a and b in a row."""
    N, rows = total.size(-1), total.numel() // total.size(-1)
    grad_total, grad_normed, total, grad_x0, x0 = (t if t is None else t.contiguous()
                                                   for t in (grad_total, grad_normed, total, grad_x0, x0))
    BN = triton.next_power_of_2(N)
    warps, per_sm = (2, 8) if BN <= 1024 else (min(16, BN // 256), 4)
    grid, L = min(rows, per_sm * multiprocessors(total.device)), _sums(N, biased, x0)
    shares = total.new_empty(grid, L, dtype=torch.float32)
    grad, new_grad_x0 = torch.empty_like(total), total.new_empty(0 if x0 is None else total.shape)
    _add_norm_backward[(grid,)](grad_total, grad_normed, total, x0, grad_x0, a, b, weight, grad, new_grad_x0, shares,
                                rows, eps, N, BN, rms, biased, L, num_warps=warps)
    return grad, new_grad_x0, shares.sum(0).to(weight.dtype)


def _sums(N, biased, x0):
    return N * (1 + biased) + (0 if x0 is None else 2)


@add_norm_backward_op.register_fake
def _(grad_total, grad_normed, total, weight, eps, rms, biased, grad_x0=None, x0=None, a=None, b=None):
    of_x0 = total.new_empty(0 if x0 is None else total.shape)
    return total.new_empty(total.shape), of_x0, weight.new_empty(_sums(total.size(-1), biased, x0))


def _save_total(ctx, inputs, output):
    x, y, weight, bias, ctx.eps, ctx.rms, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.added, ctx.biased = y is not None, bias is not None
    ctx.save_for_backward(output[0] if ctx.added else x, weight)


def _add_norm_grads(ctx, grad_total, grad_normed):
    grad_total, N = grad_total if ctx.added else None, grad_normed.size(-1)
    grad, _, sums = add_norm_backward_op(grad_total, grad_normed, *ctx.saved_tensors, ctx.eps, ctx.rms, ctx.biased)
    return grad, grad if ctx.added else None, sums[:N], sums[N:] if ctx.biased else None, *5 * [None]


add_norm_op.register_autograd(_add_norm_grads, setup_context=_save_total)


class SkipNorm(torch.autograd.Function):
    """x, y, x0 -> a (x + y) + b x0, its norm, and x0 itself. a is not 0.

    Every block hands x0 on to the next. So its gradient is one tensor that each of them adds to in passing, instead of
    a tensor of each and their sums.
    """
    @staticmethod
    def forward(ctx, x, y, x0, a, b, weight, bias, eps, rms):
        total, normed = add_norm_op(x, y, weight, bias, eps, rms, x0, a, b)
        ctx.eps, ctx.rms, ctx.biased = eps, rms, bias is not None
        ctx.save_for_backward(total, weight, x0, a, b)
        return total, normed, x0.view_as(x0)

    @staticmethod
    def backward(ctx, grad_total, grad_normed, grad_x0):
        total, weight, x0, a, b = ctx.saved_tensors
        N = total.size(-1)
        grad, grad_x0, sums = add_norm_backward_op(grad_total, grad_normed, total, weight, ctx.eps, ctx.rms, ctx.biased,
                                                   grad_x0, x0, a, b)
        of_bias = sums[N:2 * N] if ctx.biased else None
        return grad, grad, grad_x0, sums[-2].to(a.dtype), sums[-1].to(b.dtype), sums[:N], of_bias, None, None


def can_add_norm(x) -> bool:
    """Whether `add_norm` can: rows that registers hold."""
    return _half_precision(x) and x.size(-1) <= 16384 and works("residual add and norm", _try_add_norm)


def _try_add_norm():
    x, weight = torch.ones(1, 32, **TRIAL), torch.ones(32, device=TRIAL["device"])
    total, normed = add_norm_op(x, x, weight, None, 1e-5, False)
    add_norm_backward_op(x, normed, total, weight, 1e-5, False, True)
    add_norm_op(x, x, weight, None, 1e-5, False, x, weight[0], weight[0])
    add_norm_backward_op(x, normed, total, weight, 1e-5, False, False, x, x, weight[0], weight[0])


def add_norm(x, y, norm):
    """(x + y, norm(x + y)) for an nn.LayerNorm or nn.RMSNorm; y may be None."""
    rms, bias = isinstance(norm, torch.nn.RMSNorm), getattr(norm, "bias", None)
    total, normed = add_norm_op(x, y, norm.weight, bias, norm.eps, rms)
    return x if y is None else total, normed


def skip_norm(x, y, x0, a, b, norm):
    """(a (x + y) + b x0, its norm, x0 for the next block); a and b are 0-d."""
    rms, bias = isinstance(norm, torch.nn.RMSNorm), getattr(norm, "bias", None)
    return SkipNorm.apply(x, y, x0, a, b, norm.weight, bias, norm.eps, rms)


# ----------------------------------------------------------------------------------------------------------------------
# Cross-entropy and its gradient

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softcap(x, cap, CAPPED: tl.constexpr):
    """c = cap tanh(x / cap) and its slope; c in units of log 2, since exponentials are to base 2.

    s = 1 - tanh(x / cap) = 2 / (1 + exp(2 x / cap)). An inverse root is one instruction, a division ten of them.
    """
    if CAPPED:
        s = tl.rsqrt(0.5 + tl.exp2(x * (2 * LOG2E / cap) - 1))
        s *= s
        return s * (-cap * LOG2E) + cap * LOG2E, s * (2 - s)
    else:
        return x * LOG2E, 1.0


@triton.jit
def _token_loss(logits, targets, scale, losses, cap, V: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr,
                CAPPED: tl.constexpr, BOUNDED: tl.constexpr):
    """One row: its loss; with GRADIENT, scale x the gradient replaces the logits.

    A row of one block stays in registers. A longer one is read again, from L2. BOUNDED: no exponential overflows, so
    the largest logit is not computed.
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * V
    target = tl.load(targets + row)
    own, own_slope = _softcap(tl.load(logits + tl.maximum(target, 0)).to(tl.float32), cap, CAPPED)
    factor = tl.where(target >= 0, tl.load(scale), 0.0) if GRADIENT else 0.0
    top, total = 0.0 if BOUNDED else -float("inf"), 0.0
    if V <= BLOCK:
        n = tl.arange(0, BLOCK)
        c, slope = _softcap(tl.load(logits + n, mask=n < V, other=-float("inf")).to(tl.float32), cap, CAPPED)
        top = top if BOUNDED else tl.max(c, 0)
        softmax = tl.where(n < V, tl.exp2(c - top), 0.0)
        grad = softmax * slope
        total = tl.sum(softmax, 0)
        if GRADIENT:
            tl.debug_barrier()  # all have read the target's logit
            tl.store(logits + n, (grad * (factor / total)).to(logits.dtype.element_ty), mask=n < V)
    else:
        for start in range(0, V, BLOCK):
            n = start + tl.arange(0, BLOCK)
            c, _ = _softcap(tl.load(logits + n, mask=n < V, other=-float("inf")).to(tl.float32), cap, CAPPED)
            new = top if BOUNDED else tl.maximum(top, tl.max(c, 0))
            total = total * tl.exp2(top - new) + tl.sum(tl.where(n < V, tl.exp2(c - new), 0.0), 0)
            top = new
        if GRADIENT:
            tl.debug_barrier()  # all have read what the loop overwrites
            for start in range(0, V, BLOCK):
                n = start + tl.arange(0, BLOCK)
                c, slope = _softcap(tl.load(logits + n, mask=n < V, other=-float("inf")).to(tl.float32), cap, CAPPED)
                grad = tl.exp2(c - top) * slope * (factor / total)
                tl.store(logits + n, grad.to(logits.dtype.element_ty), mask=n < V)
    if GRADIENT:
        tl.debug_barrier()  # the target's logit has its share of the softmax already
        grad = (tl.exp2(own - top) / total - 1) * own_slope * factor
        tl.store(logits + target, grad.to(logits.dtype.element_ty), mask=target >= 0)
    tl.store(losses + row, tl.where(target >= 0, (top + tl.log2(total) - own) / LOG2E, 0.0))


def token_loss(logits, targets, scale, gradient=True, cap=0.0):
    """model.token_loss of contiguous logits (C, V), which the gradient overwrites; without `gradient` there is none."""
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    V, longest = logits.size(1), 1024 if INTERPRET else 16384  # what the registers of a thread block hold
    block = triton.next_power_of_2(V) if V <= longest else longest // 2
    _token_loss[(len(logits),)](logits, targets.contiguous(), scale, losses, cap, V, block, gradient, cap > 0,
                                0 < cap <= 60, num_warps=8 if block <= 8192 else 16)
    return losses, logits if gradient else None


def can_token_loss(x) -> bool:
    return _half_precision(x) and works("cross-entropy", _try_token_loss)


def _try_token_loss():
    targets, scale = torch.zeros(1, dtype=torch.long, device=TRIAL["device"]), torch.ones((), device=TRIAL["device"])
    token_loss(torch.zeros(1, 32, **TRIAL), targets, scale)


# ----------------------------------------------------------------------------------------------------------------------
# AdamW over all parameters in one launch

@triton.jit
def _adamw(chunks, pointers, grads, numbers, scale, beta1, beta2, eps, n,
           MIXED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """One chunk of one tensor. pointers (5, n): fp32 weights, bf16 copies, both moments, sizes; grads (n,): bf16 or
    fp32, or 0; numbers (n, 3)."""
    tensor, start = tl.load(chunks + 2 * tl.program_id(0)), tl.load(chunks + 2 * tl.program_id(0) + 1)
    f32 = tl.pointer_type(tl.float32)
    weight, copy = tl.load(pointers + tensor).to(f32), tl.load(pointers + n + tensor).to(tl.pointer_type(tl.bfloat16))
    first, second = tl.load(pointers + 2 * n + tensor).to(f32), tl.load(pointers + 3 * n + tensor).to(f32)
    address = tl.load(grads + tensor)
    grad = address.to(tl.pointer_type(tl.bfloat16) if MIXED else f32)
    if ALIGNED:
        weight, copy, grad = tl.multiple_of(weight, 16), tl.multiple_of(copy, 16), tl.multiple_of(grad, 16)
        first, second = tl.multiple_of(first, 16), tl.multiple_of(second, 16)
    at = start.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale)
    # without a gradient, or with a negative scale, nothing is done
    size = tl.where((address == 0) | (factor < 0), 0, tl.load(pointers + 4 * n + tensor))
    ok = at < (tl.multiple_of(size, 16) if ALIGNED else size)  # a mask that cuts no 16 bytes leaves loads wide
    numbers += 3 * tensor
    rate, root, decay = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    g = tl.load(grad + at, mask=ok).to(tl.float32) * factor
    m, v, w = tl.load(first + at, mask=ok), tl.load(second + at, mask=ok), tl.load(weight + at, mask=ok)
    m += (1 - beta1) * (g - m)
    v += (1 - beta2) * (g * g - v)
    w = w * (1 - decay) - rate * m / (tl.sqrt(v) * root + eps)
    tl.store(first + at, m, mask=ok)
    tl.store(second + at, v, mask=ok)
    tl.store(weight + at, w, mask=ok)
    if MIXED:
        tl.store(copy + at, w.to(tl.bfloat16), mask=ok)


ADAMW_BLOCK = 4096


class AdamWTables:
    """What the kernel reads of n contiguous tensors: addresses and sizes, and what `upload` replaces each step.

    weights, first, second: lists of n tensors; copies: theirs in bf16, or None.
    """

    def __init__(self, weights, copies, first, second):
        lists = weights, copies or weights, first, second
        assert all(t.is_contiguous() for tensors in lists for t in tensors)
        pointers = torch.tensor([[t.data_ptr() for t in tensors] for tensors in lists] + [[t.numel() for t in weights]])
        chunks = [[i, c] for i, t in enumerate(weights) for c in range(triton.cdiv(t.numel(), ADAMW_BLOCK))]
        self.n, self.mixed, device = len(weights), copies is not None, weights[0].device
        self.aligned = bool((pointers % 16 == 0).all())
        self.pointers, self.chunks = pointers.to(device), torch.tensor(chunks, dtype=torch.int32).to(device)
        self.grads, self.addresses = Upload(torch.zeros(self.n, dtype=torch.int64, device=device)), None
        self.numbers = Upload(torch.zeros(self.n, 3, device=device))

    def upload(self, grads, numbers):
        """grads: n tensors like the weights, None for those to leave alone. numbers: n triples, lr / (1 - beta1^t),
        1 / sqrt(1 - beta2^t), lr x weight decay."""
        assert all(g is None or g.is_contiguous() for g in grads)
        addresses = [0 if g is None else g.data_ptr() for g in grads]
        if addresses != self.addresses:  # the gradients of a CUDA graph stay where they are
            self.addresses, self.aligned = addresses, self.aligned and all(a % 16 == 0 for a in addresses)
            self.grads(addresses)
        self.numbers(numbers)


def adamw(tables, scale, betas, eps):
    """One step of AdamW with what was uploaded last.

    scale: a 0-d tensor that multiplies the gradients; where it is negative, nothing changes.
    """
    _adamw[(len(tables.chunks),)](tables.chunks, tables.pointers, tables.grads.tensor, tables.numbers.tensor, scale,
                                  *betas, eps, tables.n, tables.mixed, tables.aligned, ADAMW_BLOCK, num_warps=8)


def can_adamw(tensor) -> bool:
    return (tensor.is_cuda or INTERPRET) and works("AdamW", _try_adamw)


def _try_adamw():
    device = TRIAL["device"]
    weight, copy = torch.zeros(32, device=device), torch.zeros(32, device=device, dtype=torch.bfloat16)
    tables = AdamWTables([weight], [copy], [weight], [weight])
    tables.upload([copy], [(0.0, 1.0, 0.0)])
    adamw(tables, torch.ones((), device=device), (0.9, 0.95), 1e-8)


# ----------------------------------------------------------------------------------------------------------------------
# Muon before and after the orthogonalisation: equal matrices lie anywhere, their steps are one batch

@triton.jit
def _matrix(addresses, number, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to what stands in column `number` for this thread block's matrix."""
    pointer = tl.load(addresses + 4 * tl.program_id(1) + number).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _nesterov(addresses, step, rates, scale, size, MIXED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """One chunk of one matrix of MuonTable. step (K, size), rates (3,): see `nesterov`."""
    grad = _matrix(addresses, 0, tl.bfloat16 if MIXED else tl.float32, ALIGNED)
    momentum = _matrix(addresses, 1, tl.float32, ALIGNED)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor, mu = tl.load(scale), tl.load(rates + 1)
    g = tl.load(grad + at, mask=at < size).to(tl.float32) * factor
    m = tl.load(momentum + at, mask=at < size)
    m += tl.where(factor >= 0, (1 - mu) * (g - m), 0.0)  # else the step is not used either
    tl.store(momentum + at, m, mask=at < size)
    step += tl.program_id(1).to(tl.int64) * size
    tl.store(step + at, (g + mu * (m - g)).to(step.dtype.element_ty), mask=at < size)


@triton.jit
def _descend(addresses, step, norms, rates, scale, gain, size, COLUMNS: tl.constexpr, TALL: tl.constexpr,
             MIXED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """One chunk of one matrix. norms (K, rows or columns): of step's rows if they are TALL, else of its columns."""
    weight = _matrix(addresses, 2, tl.float32, ALIGNED)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    norms += tl.program_id(1) * (size // COLUMNS if TALL else COLUMNS)
    norm = tl.load(norms + (at // COLUMNS if TALL else at % COLUMNS), mask=at < size, other=1.0)
    s = tl.load(step + tl.program_id(1).to(tl.int64) * size + at, mask=at < size).to(tl.float32)
    s *= gain / tl.maximum(norm, 1e-7)
    w = tl.load(weight + at, mask=at < size)
    change = tl.load(rates) * s + tl.where(s * w > 0, tl.load(rates + 2) * w, 0.0)
    w -= tl.where(tl.load(scale) >= 0, change, 0.0)
    tl.store(weight + at, w, mask=at < size)
    if MIXED:
        tl.store(_matrix(addresses, 3, tl.bfloat16, ALIGNED) + at, w.to(tl.bfloat16), mask=at < size)


MUON_BLOCK = 2048


class MuonTable:
    """Where K matrices (m, n) lie: addresses (K, 4) of gradients, momenta, fp32 weights and their bf16 copies."""

    def __init__(self, matrices):
        """matrices: as in `upload`. With fp32 gradients there are no copies, and the last tensor is not used."""
        K, grad = len(matrices), matrices[0][0]
        self.shape, self.grid = (K, *grad.shape), (triton.cdiv(grad.numel(), MUON_BLOCK), K)
        self.mixed, self.last = grad.dtype is torch.bfloat16, None
        self.addresses = Upload(torch.zeros(K, 4, dtype=torch.int64, device=grad.device))

    def upload(self, matrices):
        """matrices: K tuples (gradient, momentum, fp32 weight, bf16 copy)."""
        assert all(t.is_contiguous() for tensors in matrices for t in tensors)
        addresses = [[t.data_ptr() for t in tensors] for tensors in matrices]
        if addresses != self.last:  # the gradients of a CUDA graph stay where they are
            self.last, self.aligned = addresses, all(a % 16 == 0 for row in addresses for a in row)
            self.addresses(addresses)


def nesterov(table, rates, scale, dtype):
    """optim.nesterov of the table's matrices -> step (K, m, n).

    rates (3,): learning rate, mu, learning rate x decay. scale: a 0-d tensor that multiplies the gradients; where it is
    negative, no momentum changes, and `descend` changes no weight.
    """
    step, (_, m, n) = torch.empty(table.shape, dtype=dtype, device=rates.device), table.shape
    _nesterov[table.grid](table.addresses.tensor, step, rates, scale, m * n, table.mixed, table.aligned, MUON_BLOCK,
                          num_warps=8)
    return step


def descend(table, step, rates, scale):
    """optim.descend of the table's fp32 weights, the rate times sqrt(max(1, m / n)), then of their copies.

    step (K, m, n): whose rows or columns get one norm.
    """
    _, m, n = table.shape
    norms = torch.linalg.vector_norm(step, dim=2 if m >= n else 1, dtype=torch.float32)
    gain = min(1, m / n) ** 0.5  # that norm, sqrt(min(m, n) / max(m, n)), x sqrt(max(1, m / n))
    _descend[table.grid](table.addresses.tensor, step.contiguous(), norms, rates, scale, gain, m * n, n, m >= n,
                         table.mixed, table.aligned, MUON_BLOCK, num_warps=8)


def can_muon(tensor) -> bool:
    return (tensor.is_cuda or INTERPRET) and works("Muon", _try_muon)


def _try_muon():
    weight, rates, scale = (torch.zeros(shape, device=TRIAL["device"]) for shape in ((4, 8), 3, ()))
    copy = weight.to(torch.bfloat16)
    table = MuonTable([(copy, weight, weight, copy)])
    table.upload([(copy, weight, weight, copy)])
    descend(table, nesterov(table, rates, scale, torch.bfloat16), rates, scale)
