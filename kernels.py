"""The structured FFN y = fc2(act(fc1(x))) on Hopper, as fast as its matmuls.

    t1 = x V1^T     hidden = act(t1 U1^T + bias)     t2 = hidden V2^T     y = t2 U2^T

Each of the four is B matmuls side by side, (T, B, K) x (B, N, K) -> (T, B, N). Two things cost as much as the arithmetic when
they are passes of their own, and cost next to nothing here:

  * BlockShuffle's permutations. With the rows of V dealt out beforehand (weight-sized), f moves whole chunks of N/B columns, so
    the matmul before it writes every tile where the next one reads it. The permutation between fc1 and fc2 commutes with the
    elementwise activation and turns into the same kind of chunks. Backward mirrors this; no activation is ever copied.
  * The activation and its derivative. They run in the epilogue of one matmul, under the main loop of another: two thread
    blocks share each multiprocessor. Forward leaves the slope act' behind as one byte per hidden unit, so that backward multiplies
    by it and never sees the pre-activation.

Plain matmuls and weight gradients are cuBLAS's. What they cannot do here, `fits` says, and the caller takes the plain path.
Behind the FFN: rotary positions on the way into attention and out of it, residual addition with the norm that follows, cross-entropy
with its gradient, and the optimiser's update of all parameters in one launch.
"""
import functools
import logging
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRET = triton.knobs.runtime.interpret


# ----------------------------------------------------------------------------------------------------------------------
# Activation, slope, and the byte that holds the slope

@triton.jit
def _tanh(u, FAST: tl.constexpr):
    if FAST:  # one special-function operation where exp and a division are two
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)
    return 1 - 2 / (tl.exp(2 * u) + 1)


@triton.jit
def _gelu(a, FAST: tl.constexpr):
    """gelu(a), tanh form, and its slope, which shares the tanh."""
    half, square = 0.5 * a, a * a
    t = _tanh(a * (0.7978845608 + 0.0356774081 * square), FAST)
    return half + half * t, 0.5 + 0.5 * t + (half - half * (t * t)) * (0.7978845608 + 0.1070322244 * square)


@triton.jit
def _to_byte(slope):
    """gelu's slope lies in [-0.129, 1.129]; steps of 1/200, 0 and 1 exact. Adding 2^23 leaves the rounded integer in the low bits."""
    return (slope * 200.0 + 8388634.0).to(tl.int32, bitcast=True).to(tl.uint8)         # 2^23 + 26


@triton.jit
def _from_byte(byte):
    return ((byte.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388634.0) * 0.005


# Slopes are private to the two kernels that write and read them, so they lie in memory as the tensor cores leave a tile in the
# registers: 16 bytes to a thread, threads side by side. In this order neither side moves data between threads.

@triton.jit
def _to_fragments(a, BM: tl.constexpr, BN: tl.constexpr, WARPS: tl.constexpr):
    a = a.reshape(BM // (16 * WARPS), WARPS, 2, 8, BN // 64, 8, 4, 2).permute(0, 2, 4, 1, 3, 6, 5, 7)
    return a.reshape(BM * BN // (512 * WARPS), 512 * WARPS)


@triton.jit
def _from_fragments(f, BM: tl.constexpr, BN: tl.constexpr, WARPS: tl.constexpr):
    f = f.reshape(BM // (16 * WARPS), 2, BN // 64, WARPS, 8, 4, 8, 2).permute(0, 3, 1, 4, 2, 6, 5, 7)
    return f.reshape(BM, BN)


@triton.jit
def _fragment_offsets(tile, BM: tl.constexpr, BN: tl.constexpr, WARPS: tl.constexpr):
    width: tl.constexpr = 512 * WARPS
    within = tl.arange(0, BM * BN // width)[:, None] * width + tl.arange(0, width)[None, :]
    return (tl.zeros((1, 1), tl.int64) + tile) * (BM * BN) + within


# ----------------------------------------------------------------------------------------------------------------------
# The matmul

@triton.jit
def _column(g, n, G: tl.constexpr, CHUNK: tl.constexpr):
    """Where column n of block g goes: (G, N/CHUNK, CHUNK) -> (N/CHUNK, G, CHUNK)."""
    return n // CHUNK * (G * CHUNK) + g * CHUNK + n % CHUNK


@triton.jit
def _store(acc, g, m, n, y, slope, sums, G: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, EPILOGUE: tl.constexpr,
           ACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SUB: tl.constexpr):
    """Writes the tile in pieces of SUB columns: staging a whole one would cost the shared memory of a pipeline stage."""
    if BN > SUB:
        left, right = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        _store(left, g, m, n, y, slope, sums, G, N, CHUNK, EPILOGUE, ACT, BM, BN // 2, SUB)
        _store(right, g, m, n + BN // 2, y, slope, sums, G, N, CHUNK, EPILOGUE, ACT, BM, BN // 2, SUB)
    else:
        column = _column(g, n, G, CHUNK)
        if EPILOGUE == "backward":
            if ACT == "relu2":
                acc *= 2 * tl.sqrt(slope.load([m * BM, g * N + n]).to(tl.float32))     # h = relu(a)^2, slope 2 relu(a)
            tl.store(sums + m * (G * N) + column + tl.arange(0, SUB), tl.sum(acc, 0))
        y.store([m * BM, column], acc.to(y.dtype))


@triton.jit(do_not_specialize=["T"])
def _matmul(x, w, bias, y, slope, sums, T, G: tl.constexpr, K: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
            ROWS_K: tl.constexpr, EPILOGUE: tl.constexpr, ACT: tl.constexpr, SAVE: tl.constexpr, FAST: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SUB: tl.constexpr, WARPS: tl.constexpr):
    """y[t, map(g, n)] = epilogue(sum_k x[t, g, k] w[g, n, k]); x (T, G K), w (G N, K) or, with ROWS_K, (G K, N), y (T, G N)."""
    per_row: tl.constexpr = G * N // BN
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, BM) * per_row, tl.num_programs(0), flatten=True):
        m, g, n = tile // per_row, tile % per_row // (N // BN), tile % (N // BN) * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            if ROWS_K:
                acc = tl.dot(x.load([m * BM, g * K + k]), w.load([g * K + k, n]), acc)
            else:
                acc = tl.dot(x.load([m * BM, g * K + k]), w.load([g * N + n, k]).T, acc)
        if EPILOGUE == "forward":
            acc += tl.load(bias + g * N + n + tl.arange(0, BN)).to(tl.float32)[None, :]
            if ACT == "relu2":
                acc = tl.maximum(acc, 0.0)
                acc *= acc
            else:
                acc, rise = _gelu(acc, FAST)
                if SAVE:
                    at = _fragment_offsets(m * per_row + _column(g, n, G, CHUNK) // BN, BM, BN, WARPS)
                    tl.store(slope + at, _to_fragments(_to_byte(rise), BM, BN, WARPS))
        if EPILOGUE == "backward" and ACT == "gelu":
            fragments = tl.load(slope + _fragment_offsets(m * per_row + (g * N + n) // BN, BM, BN, WARPS))
            acc *= _from_byte(_from_fragments(fragments, BM, BN, WARPS))
        _store(acc, g, m, n, y, slope, sums, G, N, CHUNK, EPILOGUE, ACT, BM, BN, SUB)


@functools.cache
def _multiprocessors(device):
    return 8 if INTERPRET else torch.cuda.get_device_properties(device).multi_processor_count


# BM, BN, BK, columns that a store stages at once, warps, pipeline stages, blocks per multiprocessor looping over the tiles.
# Slopes need one BM, BN and number of warps in forward and backward.
WIDE, NARROW, SLIM = (128, 256, 64, 128, 8, 4, 1), (128, 128, 64, 64, 4, 3, 2), (128, 128, 64, 32, 4, 3, 2)


def _divisor(n, *sizes):
    """The first of the sizes that divides n."""
    return next(size for size in sizes if n % size == 0)


def _launch(x, w, chunk, whole, config, epilogue="none", act="none", bias=None, slope=None, save=False):
    """x (T, G, K), w (G, N, K) -> y (T, G N) with its columns in (N/chunk, G, chunk) order, slope and the partial column sums.

    w may be the .mT of a contiguous (G, K, N). A tile's columns divide `whole`, a store's divide chunk.
    """
    T, (G, N, K) = x.size(0), w.shape
    BM, BN, BK, SUB, warps, stages, per_sm = config
    BN = _divisor(whole, BN, 128, 64)
    SUB = min(BN, _divisor(chunk, SUB, 64, 32, 16))
    BK = _divisor(K, BK, 32)
    if INTERPRET:
        BM, BK = 64, 32
    rows, rows_k = triton.cdiv(T, BM), not w.is_contiguous()
    w = w.mT.flatten(0, 1) if rows_k else w.flatten(0, 1)                              # (G K, N) or (G N, K)
    y = x.new_empty(T, G * N)
    sums = x.new_empty(rows, G * N, dtype=torch.float32) if epilogue == "backward" else None
    if epilogue == "forward":
        slope = x.new_empty(rows * BM * G * N if save and act == "gelu" else 0, dtype=torch.uint8)
    if epilogue == "backward" and act == "relu2":
        slope = TensorDescriptor.from_tensor(slope.view(T, -1), [BM, SUB])
    tiles = rows * (G * N // BN)
    _matmul[(min(tiles, per_sm * _multiprocessors(x.device)),)](
        TensorDescriptor.from_tensor(x.view(T, G * K), [BM, BK]), TensorDescriptor.from_tensor(w, [BK, BN] if rows_k else [BN, BK]), bias,
        TensorDescriptor.from_tensor(y, [BM, SUB]), slope, sums, T, G, K, N, chunk, rows_k, epilogue, act, save, not INTERPRET,
        BM, BN, BK, SUB, warps, num_warps=warps, num_stages=stages)
    return y, slope, sums


# ----------------------------------------------------------------------------------------------------------------------
# The FFN, forward and backward. Every activation is (T, B, columns) with B = the blocks of the matmul that reads it.

def _blocks(x, w, bias=None):
    """y = w x (+ bias) block by block, (T, B, K) x (B, N, K) -> (T, B N), by cuBLAS."""
    if w.size(0) == 1 and bias is not None:
        return torch.addmm(bias, x[:, 0], w[0].T)
    y = x.new_empty(x.size(0), w.size(0), w.size(1))
    torch.bmm(x.transpose(0, 1), w.transpose(1, 2), out=y.transpose(0, 1))             # strided output: no copy into token order
    return y.view(x.size(0), -1)


def _dealt(x, w):
    """y = w x with each block's N columns dealt out to all blocks: (T, B, K) x (B, N, K) -> (T, N/chunk = B, B, chunk)."""
    N, chunk = w.size(1), w.size(1) // w.size(0)
    return _launch(x, w, chunk, N, WIDE if N % 256 == 0 and chunk % 128 == 0 else NARROW)[0]


def _weight_grad(grad, x):
    """(T, B, N), (T, B, K) -> (B, N, K)"""
    return torch.bmm(grad.permute(1, 2, 0), x.transpose(0, 1))


def _read_by(t, w):
    return t.view(t.size(0), w.size(0), -1)                                            # (T, B, columns)


def _chunk(hidden, V2, shuffle):
    """The columns of hidden units that stay together on their way from U1's blocks to V2's."""
    return hidden // (V2.size(0) ** 2 if shuffle else V2.size(0))


def _hidden(t1, U1, bias, V2, shuffle, act, save):
    H = bias.numel()
    chunk = _chunk(H, V2, shuffle)
    config = WIDE if act == "relu2" and chunk % 256 == 0 else NARROW
    return _launch(t1, U1, chunk if shuffle else H, chunk, config, "forward", act, bias, save=save)[:2]


@torch.library.custom_op("structured::ffn", mutates_args=())
def ffn_op(x: Tensor, V1: Tensor, U1: Tensor, bias: Tensor, V2: Tensor, U2: Tensor, bias2: Tensor | None, shuffle: bool, act: str, save: bool
           ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (T, N), V (B, R/B, N/B), U (B, M/B, R/B), bias (H,): y (T, M) in the order of U2's blocks, t1, hidden, slope, t2.

    Without save, hidden and slope come back empty and backward computes them again from t1.
    """
    matmul = _dealt if shuffle else _blocks
    t1 = matmul(_read_by(x, V1), V1)                                                   # (T, R)
    hidden, slope = _hidden(_read_by(t1, U1), U1, bias, V2, shuffle, act, save)        # (T, H)
    t2 = matmul(_read_by(hidden, V2), V2)                                              # (T, R)
    y = _blocks(_read_by(t2, U2), U2, bias2)                                           # (T, M)
    none = x.new_empty(0, dtype=torch.uint8)
    return y, t1, hidden if save else x.new_empty(0), slope if save and act == "gelu" else none, t2


@ffn_op.register_fake
def _(x, V1, U1, bias, V2, U2, bias2, shuffle, act, save):
    T, R1, R2, M = x.size(0), V1.size(0) * V1.size(1), V2.size(0) * V2.size(1), U2.size(0) * U2.size(1)
    H = U1.size(0) * U1.size(1) if save else 0
    slope = x.new_empty((T + 127) // 128 * 128 * H if act == "gelu" else 0, dtype=torch.uint8)
    return x.new_empty(T, M), x.new_empty(T, R1), x.new_empty(T, H) if save else x.new_empty(0), slope, x.new_empty(T, R2)


@torch.library.custom_op("structured::ffn_backward", mutates_args=())
def ffn_backward_op(grad: Tensor, x: Tensor, V1: Tensor, U1: Tensor, bias: Tensor, V2: Tensor, U2: Tensor, t1: Tensor, hidden: Tensor,
                    slope: Tensor, t2: Tensor, shuffle: bool, act: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, V1, U1, bias, V2, U2 from that of y."""
    matmul = _dealt if shuffle else _blocks
    x, t1, t2, grad = _read_by(x, V1), _read_by(t1, U1), _read_by(t2, U2), _read_by(grad.contiguous(), U2)
    if hidden.numel() == 0:
        hidden, slope = _hidden(t1, U1, bias, V2, shuffle, act, True)
    chunk = _chunk(hidden.size(1), V2, shuffle)

    grad_U2 = _weight_grad(grad, t2)
    grad_t2 = _read_by(matmul(grad, U2.mT), V2)
    grad_V2 = _weight_grad(grad_t2, _read_by(hidden, V2))
    pre, _, sums = _launch(grad_t2, V2.mT, chunk, chunk, SLIM, "backward", act, slope=slope if act == "gelu" else hidden)
    pre = _read_by(pre, U1)                                                            # gradient before the activation
    grad_U1 = _weight_grad(pre, t1)
    grad_t1 = _read_by(matmul(pre, U1.mT), V1)
    grad_V1 = _weight_grad(grad_t1, x)
    grad_x = _blocks(grad_t1, V1.mT)
    return grad_x, grad_V1, grad_U1, sums.sum(0).to(bias.dtype), grad_V2, grad_U2


@ffn_backward_op.register_fake
def _(grad, x, V1, U1, bias, V2, U2, t1, hidden, slope, t2, shuffle, act):
    return tuple(a.new_empty(a.shape) for a in (x, V1, U1, bias, V2, U2))


def _save(ctx, inputs, output):
    *tensors, bias2, ctx.shuffle, ctx.act, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.bias2 = bias2 is not None


def _backward(ctx, grad, *unused):
    grads = ffn_backward_op(grad, *ctx.saved_tensors, ctx.shuffle, ctx.act)
    return *grads, grad.sum(0) if ctx.bias2 else None, None, None, None


ffn_op.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.structured.ffn)
def _ffn_flops(x, V1, U1, bias, V2, U2, *args, **kwargs):  # shapes; the partitioner of torch.compile must not take the op for free
    return 2 * x[0] * sum(math.prod(w) for w in (V1, U1, V2, U2))


@register_flop_formula(torch.ops.structured.ffn_backward)
def _ffn_backward_flops(grad, *args, **kwargs):
    return 2 * _ffn_flops(*args)


# ----------------------------------------------------------------------------------------------------------------------
# Rotary positions: q, k and v cut out of one tensor and put together again, turned on the way

@triton.jit
def _copy_heads(source, target, c, s, source_head, target_head, heads, H: tl.constexpr, HEADS: tl.constexpr, TURN: tl.constexpr):
    """heads vectors (2 H,), the halves a, b of each as (a c - b s, b c + a s) with TURN."""
    head, h = tl.arange(0, HEADS)[:, None], tl.arange(0, H)[None, :]
    ok = head < heads
    a = tl.load(source + head * source_head + h, mask=ok)                              # (HEADS, H)
    b = tl.load(source + head * source_head + H + h, mask=ok)
    if TURN:
        a, b = a.to(tl.float32), b.to(tl.float32)
        a, b = a * c - b * s, b * c + a * s
    tl.store(target + head * target_head + h, a.to(target.dtype.element_ty), mask=ok)
    tl.store(target + head * target_head + H + h, b.to(target.dtype.element_ty), mask=ok)


@triton.jit
def _rotate(qkv, q, k, v, cos, sin, T, qb, qt, qh, kb, kt, kh, vb, vt, vh, Q: tl.constexpr, KV: tl.constexpr, H: tl.constexpr,
            HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BACK: tl.constexpr):
    """One token: qkv (B, T, Q + 2 KV, 2 H) -> q, k, v by their strides; BACK: from q, k, v into qkv, turned the other way."""
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    h = tl.arange(0, H)[None, :]
    c, s = tl.load(cos + t * 2 * H + h), tl.load(sin + t * 2 * H + H + h)              # (1, H); the second half of sin is positive
    packed = qkv + token * (Q + 2 * KV) * 2 * H
    q += b * qb + t * qt
    k += b * kb + t * kt
    v += b * vb + t * vt
    if BACK:
        _copy_heads(q, packed, c, -s, qh, 2 * H, Q, H, HEADS, True)
        _copy_heads(k, packed + Q * 2 * H, c, -s, kh, 2 * H, KV, H, KV_HEADS, True)
        _copy_heads(v, packed + (Q + KV) * 2 * H, c, s, vh, 2 * H, KV, H, KV_HEADS, False)
    else:
        _copy_heads(packed, q, c, s, 2 * H, qh, Q, H, HEADS, True)
        _copy_heads(packed + Q * 2 * H, k, c, s, 2 * H, kh, KV, H, KV_HEADS, True)
        _copy_heads(packed + (Q + KV) * 2 * H, v, c, s, 2 * H, vh, KV, H, KV_HEADS, False)


def _launch_rotate(qkv, q, k, v, cos, sin, back):
    B, T, n_head, size = q.shape
    strides = [t.stride(i) for t in (q, k, v) for i in range(3)]
    _rotate[(B * T,)](qkv, q, k, v, cos, sin, T, *strides, n_head, k.size(2), size // 2, triton.next_power_of_2(n_head),
                      triton.next_power_of_2(k.size(2)), back, num_warps=4)


def rotates(qkv, cos) -> bool:
    """Whether `split_rotated` can: on CUDA (or in the interpreter), whole positions, halves of a head a power of two."""
    half = qkv.size(-1) // 2
    return halves(qkv) and cos.dim() == 3 and half >= 16 and half & (half - 1) == 0


@torch.library.custom_op("structured::split_rotated", mutates_args=())
def split_rotated(qkv: Tensor, cos: Tensor, sin: Tensor, n_head: int, n_kv_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, T, heads, size) -> q (B, T, n_head, size) and k (B, T, n_kv_head, size) turned by their positions, v; tables of model.rotary_table."""
    B, T, _, size = qkv.shape
    q, k, v = (qkv.new_empty(B, T, heads, size) for heads in (n_head, n_kv_head, n_kv_head))
    _launch_rotate(qkv.contiguous(), q, k, v, cos, sin, False)
    return q, k, v


@split_rotated.register_fake
def _(qkv, cos, sin, n_head, n_kv_head):
    return tuple(qkv.new_empty(*qkv.shape[:2], heads, qkv.size(3)) for heads in (n_head, n_kv_head, n_kv_head))


@torch.library.custom_op("structured::join_rotated", mutates_args=())
def join_rotated(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of qkv from those of q, k, v."""
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    qkv = q.new_empty(*q.shape[:2], q.size(2) + 2 * k.size(2), q.size(3))
    _launch_rotate(qkv, q, k, v, cos, sin, True)
    return qkv


@join_rotated.register_fake
def _(q, k, v, cos, sin):
    return q.new_empty(*q.shape[:2], q.size(2) + 2 * k.size(2), q.size(3))


def _save_tables(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:3])


split_rotated.register_autograd(lambda ctx, *grads: (join_rotated(*grads, *ctx.saved_tensors), None, None, None, None), setup_context=_save_tables)


# ----------------------------------------------------------------------------------------------------------------------
# x + y and its layer or RMS norm

@triton.jit
def _add_norm(x, y, weight, bias, total, normed, eps, N: tl.constexpr, BN: tl.constexpr, RMS: tl.constexpr):
    """One row: total = x + y, normed = norm(total)."""
    n = tl.arange(0, BN)
    ok, at = n < N, tl.program_id(0).to(tl.int64) * N + n
    a = tl.load(x + at, mask=ok, other=0.0)
    if y is not None:
        a = (a.to(tl.float32) + tl.load(y + at, mask=ok, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + at, a, mask=ok)
    a = a.to(tl.float32)
    if not RMS:
        a = tl.where(ok, a - tl.sum(a, 0) / N, 0.0)
    out = a * tl.rsqrt(tl.sum(a * a, 0) / N + eps) * tl.load(weight + n, mask=ok, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + n, mask=ok, other=0.0).to(tl.float32)
    tl.store(normed + at, out.to(normed.dtype.element_ty), mask=ok)


@triton.jit
def _add_norm_backward(grad_total, grad_normed, total, weight, grad, grad_weight, grad_bias, rows, eps, N: tl.constexpr, BN: tl.constexpr, RMS: tl.constexpr):
    """Rows pid, pid + grid, ...: the gradient of x and y, and this program's share (1, N) of those of weight and bias."""
    n = tl.arange(0, BN)
    ok = n < N
    w = tl.load(weight + n, mask=ok, other=0.0).to(tl.float32)
    sum_w, sum_b = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.full((), N, tl.int64) * row + n
        a, g = tl.load(total + at, mask=ok, other=0.0).to(tl.float32), tl.load(grad_normed + at, mask=ok, other=0.0).to(tl.float32)
        if not RMS:
            a = tl.where(ok, a - tl.sum(a, 0) / N, 0.0)
        scale = tl.rsqrt(tl.sum(a * a, 0) / N + eps)
        a *= scale
        sum_w += g * a
        sum_b += g
        g *= w
        g = scale * (g - a * (tl.sum(g * a, 0) / N) - (0.0 if RMS else tl.sum(g, 0) / N))
        if grad_total is not None:
            g += tl.load(grad_total + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(grad + at, g.to(grad.dtype.element_ty), mask=ok)
    tl.store(grad_weight + tl.program_id(0) * N + n, sum_w, mask=ok)
    tl.store(grad_bias + tl.program_id(0) * N + n, sum_b, mask=ok)


def _row_warps(N):
    return min(16, max(1, triton.next_power_of_2(N) // 512))  # 16 entries to a thread


@torch.library.custom_op("structured::add_norm", mutates_args=())
def add_norm_op(x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """x, y (..., N) -> x + y and its norm; without y the first is empty."""
    x, N = x.contiguous(), x.size(-1)
    y = None if y is None else y.contiguous()
    total, normed = x.new_empty(0) if y is None else torch.empty_like(x), torch.empty_like(x)
    _add_norm[(x.numel() // N,)](x, y, weight, bias, total, normed, eps, N, triton.next_power_of_2(N), rms, num_warps=_row_warps(N))
    return total, normed


@add_norm_op.register_fake
def _(x, y, weight, bias, eps, rms):
    return x.new_empty(0 if y is None else x.shape), x.new_empty(x.shape)


@torch.library.custom_op("structured::add_norm_backward", mutates_args=())
def add_norm_backward_op(grad_total: Tensor | None, grad_normed: Tensor, total: Tensor, weight: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (and y), weight, bias."""
    N, rows = total.size(-1), total.numel() // total.size(-1)
    grad_normed, total = grad_normed.contiguous(), total.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    BN = triton.next_power_of_2(N)
    warps, per_sm = (2, 8) if BN <= 1024 else (min(16, BN // 256), 4)
    programs = min(rows, per_sm * _multiprocessors(total.device))
    shares = total.new_empty(2, programs, N, dtype=torch.float32)
    grad = torch.empty_like(total)
    _add_norm_backward[(programs,)](grad_total, grad_normed, total, weight, grad, shares[0], shares[1], rows, eps, N, BN, rms, num_warps=warps)
    return grad, shares[0].sum(0).to(weight.dtype), shares[1].sum(0).to(weight.dtype)


@add_norm_backward_op.register_fake
def _(grad_total, grad_normed, total, weight, eps, rms):
    return total.new_empty(total.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _save_total(ctx, inputs, output):
    x, y, weight, bias, ctx.eps, ctx.rms = inputs
    ctx.set_materialize_grads(False)
    ctx.added, ctx.biased = y is not None, bias is not None
    ctx.save_for_backward(output[0] if ctx.added else x, weight)


def _add_norm_grads(ctx, grad_total, grad_normed):
    grad, of_weight, of_bias = add_norm_backward_op(grad_total if ctx.added else None, grad_normed, *ctx.saved_tensors, ctx.eps, ctx.rms)
    return grad, grad if ctx.added else None, of_weight, of_bias if ctx.biased else None, None, None


add_norm_op.register_autograd(_add_norm_grads, setup_context=_save_total)


def halves(x) -> bool:
    """Half precision on CUDA (or in the interpreter): what `token_loss` wants."""
    return (x.is_cuda or INTERPRET) and x.dtype in (torch.bfloat16, torch.float16)


def norms(x) -> bool:
    """Whether `add_norm` can: half precision on CUDA (or in the interpreter), rows that registers hold."""
    return halves(x) and x.size(-1) <= 16384


def add_norm(x, y, norm):
    """(x + y, norm(x + y)) for an nn.LayerNorm or nn.RMSNorm; y may be None."""
    total, normed = add_norm_op(x, y, norm.weight, getattr(norm, "bias", None), norm.eps, isinstance(norm, torch.nn.RMSNorm))
    return x if y is None else total, normed


# ----------------------------------------------------------------------------------------------------------------------
# Cross-entropy and its gradient

@triton.jit
def _token_loss(logits, targets, scale, losses, V, BLOCK: tl.constexpr, GRADIENT: tl.constexpr):
    """One row: its loss; with GRADIENT, scale x the gradient in the place of the logits. The second reading of a row is from L2."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * V
    target = tl.load(targets + row)
    picked = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
    top, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        n = start + tl.arange(0, BLOCK)
        a = tl.load(logits + n, mask=n < V, other=-float("inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(a, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(a - new), 0)
        top = new
    logz = top + tl.log(total)
    tl.store(losses + row, tl.where(target >= 0, logz - picked, 0.0))
    if GRADIENT:
        factor = tl.where(target >= 0, tl.load(scale), 0.0)
        tl.debug_barrier()  # all have read what the loop overwrites
        for start in range(0, V, BLOCK):
            n = start + tl.arange(0, BLOCK)
            a = tl.load(logits + n, mask=n < V, other=0.0).to(tl.float32)
            grad = (tl.exp(a - logz) - tl.where(n == target, 1.0, 0.0)) * factor
            tl.store(logits + n, grad.to(logits.dtype.element_ty), mask=n < V)


def token_loss(logits, targets, scale, gradient=True):
    """model.token_loss of contiguous logits (C, V), which the gradient overwrites; without `gradient` there is none."""
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    _token_loss[(len(logits),)](logits, targets.contiguous(), scale, losses, logits.size(1), 1024 if INTERPRET else 8192, gradient, num_warps=8)
    return losses, logits if gradient else None


# ----------------------------------------------------------------------------------------------------------------------
# AdamW over all parameters in one launch

@triton.jit
def _adamw(chunks, pointers, grads, corrections, scale, decay, beta1, beta2, eps, n,
           MIXED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """One chunk of one tensor. pointers (5, n): fp32 weights, their bf16 copies, both moments, sizes; grads (n,): bf16 or fp32, or 0."""
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
    size = tl.where(address == 0, 0, tl.load(pointers + 4 * n + tensor))  # without a gradient nothing is done
    ok = at < (tl.multiple_of(size, 16) if ALIGNED else size)  # a mask that cuts no 16 bytes leaves loads wide
    rate, root = tl.load(corrections + 2 * tensor), tl.load(corrections + 2 * tensor + 1)
    g = tl.load(grad + at, mask=ok).to(tl.float32) * tl.load(scale)
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


def adamw_tables(weights, copies, first, second):
    """What stays the same over the steps: who works on which chunk, where the tensors are. Lists of n contiguous tensors, copies or None."""
    device, n = weights[0].device, len(weights)
    lists = weights, copies or weights, first, second
    pointers = torch.tensor([[t.data_ptr() for t in tensors] for tensors in lists] + [[t.numel() for t in weights]])
    assert all(t.is_contiguous() for tensors in lists for t in tensors)
    chunks = torch.tensor([[i, c] for i, t in enumerate(weights) for c in range(triton.cdiv(t.numel(), ADAMW_BLOCK))], dtype=torch.int32)
    return chunks.to(device), pointers.to(device), copies is not None, bool((pointers % 16 == 0).all()), n


def adamw(tables, grads, corrections, scale, decay, betas, eps):
    """One step of AdamW: grads, n tensors like the weights, or None for those to leave alone; corrections, n pairs (lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t));
    scale, a 0-d tensor that multiplies the gradients; decay = lr x weight decay."""
    chunks, pointers, mixed, aligned, n = tables
    grads = [g if g is None else g.contiguous() for g in grads]
    places, corrections = torch.tensor([0 if g is None else g.data_ptr() for g in grads]), torch.tensor(corrections, dtype=torch.float32)
    aligned = aligned and bool((places % 16 == 0).all())
    if scale.is_cuda:  # from pinned memory: a copy from any other waits for the device
        places, corrections = (t.pin_memory().to(scale.device, non_blocking=True) for t in (places, corrections))
    _adamw[(len(chunks),)](chunks, pointers, places, corrections, scale, decay, *betas, eps, n, mixed, aligned, ADAMW_BLOCK, num_warps=8)


# ----------------------------------------------------------------------------------------------------------------------
# Structured linears in, activations out

@torch.compiler.assume_constant_result
def _hopper():
    return INTERPRET or torch.version.hip is None and torch.cuda.get_device_capability() == (9, 0)


_logged = set()


@torch.compiler.assume_constant_result
def _log_once(reason):
    if reason not in _logged:
        _logged.add(reason)
        logging.getLogger(__name__).warning("structured FFN: plain torch instead of the Hopper kernels: %s", reason)


def _dtype(x):
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def unfit(x, fc1, fc2, act):
    """Why `ffn` cannot run on these, in a few words, or None if it can."""
    if not (x.is_cuda and _hopper() or INTERPRET):
        return "the device is no Hopper card"
    if _dtype(x) not in (torch.bfloat16, torch.float16):
        return f"precision {_dtype(x)}"
    if act not in ("gelu", "relu2"):
        return f"activation {act}"
    (_, r1, p1), (_, _, R1), (B, r2, p2), (_, s2, _) = (w.shape if w.dim() == 3 else (1, *w.shape) for w in (fc1.V, fc1.U, fc2.V, fc2.U))
    shuffle = fc1.U.dim() == 3
    if any(n % 32 for n in (R1, r2)) or (p2 // B if shuffle else p2) % 64 or p1 % 8 or s2 % 8:
        return f"widths and ranks that tiles do not divide, as in {tuple(fc1.V.shape)} and {tuple(fc2.V.shape)}"
    if shuffle and any(n % 32 for n in (p1, s2)) or shuffle and any(n % 64 or n % (16 * B) for n in (r1, r2)):
        return f"nblocks {B} that does not cut {r1} and {r2} into chunks of 16"
    return None


MIN_TOKENS = 128 if INTERPRET else 512   # with fewer, tiles of 128 tokens do not fill the card
MIN_WORK = 0 if INTERPRET else 75e9      # multiply-adds of a forward: with less, launching the kernels takes the host longer than they run


def fits(x, fc1, fc2, act):
    """Whether `ffn` is the way to compute fc2(act(fc1(x))); logs once why it cannot. For few tokens or little work it is not."""
    tokens = x.numel() // x.size(-1)
    if not (hasattr(fc1, "V") and hasattr(fc2, "V")) or tokens < MIN_TOKENS:
        return False
    work = tokens * sum(w.numel() for w in (fc1.V, fc1.U, fc2.V, fc2.U)) * (4 if fc1.U.dim() == 3 else 1)  # permutations in plain torch are slow
    if work < MIN_WORK * (1 if torch.is_grad_enabled() else 3):  # no backward to launch ahead of
        return False
    reason = unfit(x, fc1, fc2, act)
    if reason is not None:
        _log_once(reason)
    return reason is None


def ffn(x, fc1, fc2, act="gelu", recompute=False):
    """fc2(act(fc1(x))) for two LowRank, BlockShuffle or BlockDense linears of one kind; x (..., N) -> (..., M).

    For backward it keeps x, both rank-wide activations, the hidden units and, for gelu, a byte of slope for each; with recompute
    only the rank-wide ones, and the wide ones are computed again.
    """
    dtype = _dtype(x)
    V1, U1, V2, U2 = (w.to(dtype) if w.dim() == 3 else w.to(dtype)[None] for w in (fc1.V, fc1.U, fc2.V, fc2.U))
    bias = x.new_zeros(fc1.out_features, dtype=dtype) if fc1.bias is None else fc1.bias.to(dtype)
    bias2 = None if fc2.bias is None else fc2.bias.to(dtype)
    shuffle = U2.size(0) > 1
    if shuffle:
        B = U2.size(0)
        V1, V2 = _deal(V1), _deal(V2)
        V2 = V2.unflatten(2, (-1, B)).transpose(2, 3).flatten(2)                       # columns (s, l) -> (l, s)
        bias = bias.view(-1, B).T.flatten()
    save = torch.is_grad_enabled() and not recompute
    x2d = x.to(dtype).reshape(-1, x.size(-1)).contiguous()                             # (T, N)
    y = ffn_op(x2d, V1.contiguous(), U1, bias, V2.contiguous(), U2, None if shuffle else bias2, shuffle, act, save)[0]
    if shuffle:
        y = y.view(-1, B, U2.size(1)).transpose(1, 2).flatten(1)                       # f^-1, fused into whatever adds y on
        y = y if bias2 is None else y + bias2
    return y.reshape(*x.shape[:-1], -1)


def _deal(V):
    """Rows (i, l) -> (l, i), l < B: V (B, q, p) with its rows in the order in which f deals them out to the B blocks."""
    return V.unflatten(1, (-1, V.size(0))).transpose(1, 2).flatten(1, 2)
