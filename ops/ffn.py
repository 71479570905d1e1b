"""The structured FFN y = fc2(act(fc1(x))) on Hopper, as fast as its matmuls.

    t1 = x V1^T     hidden = act(t1 U1^T + bias)     t2 = hidden V2^T     y = t2 U2^T

Each of the four is B matmuls side by side, (T, B, K) x (B, N, K) -> (T, B, N). Two things cost as much as the
arithmetic when they are passes of their own, and cost next to nothing here:

  * BlockShuffle's permutations. The rows of V are reordered beforehand (weight-sized), so that f moves whole chunks
    of N/B columns. The matmul before it then writes every tile where the next one reads it. The permutation between
    fc1 and fc2 commutes with the elementwise activation and becomes the same kind of chunks. Backward mirrors this;
    no activation is ever copied.
  * The activation and its derivative. They run in the epilogue of one matmul, under the main loop of another: two
    thread blocks share each multiprocessor. Forward stores the slope act' as one byte per hidden unit. Backward
    multiplies by it and never sees the pre-activation.

Plain matmuls and weight gradients are cuBLAS's. `can_ffn` says what the kernels cannot do; the caller then uses
plain torch.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from triton.tools.tensor_descriptor import TensorDescriptor

from ops.fallback import log_once, works
from ops.pointwise import INTERPRET, TRIAL, multiprocessors
from structured import block_matmul


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
    """gelu's slope lies in [-0.129, 1.129]; steps of 1/200, 0 and 1 exact. Adding 2^23 leaves the rounded integer."""
    return (slope * 200.0 + 8388634.0).to(tl.int32, bitcast=True).to(tl.uint8)         # 2^23 + 26


@triton.jit
def _from_byte(byte):
    return ((byte.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388634.0) * 0.005


# Only these kernels write and read slopes, so they lie in memory as the tensor cores leave a tile in the registers:
# 16 bytes to a thread, threads side by side. In this order neither side moves data between threads.

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
    """Writes the tile in pieces of SUB columns: staging a whole one would cost the shared memory of a pipeline
    stage."""
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
    """y[t, map(g, n)] = epilogue(sum_k x[t, g, k] w[g, n, k]); x (T, G K), w (G N, K) or, ROWS_K, (G K, N), y (T, G
    N)."""
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


# BM, BN, BK, columns that a store stages at once, warps, pipeline stages, thread blocks per multiprocessor.
# Slopes need one BM, BN and number of warps in forward and backward.
WIDE, NARROW, SLIM = (128, 256, 64, 128, 8, 4, 1), (128, 128, 64, 64, 4, 3, 2), (128, 128, 64, 32, 4, 3, 2)


def _divisor(n, *sizes):
    """The first of the sizes that divides n."""
    return next(size for size in sizes if n % size == 0)


def _launch(x, w, chunk, whole, config, epilogue="none", act="none", bias=None, slope=None, save=False):
    """x (T, G, K), w (G, N, K) -> y (T, G N) with columns in (N/chunk, G, chunk) order, slope, partial column sums.

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
    _matmul[(min(tiles, per_sm * multiprocessors(x.device)),)](
        TensorDescriptor.from_tensor(x.view(T, G * K), [BM, BK]),
        TensorDescriptor.from_tensor(w, [BK, BN] if rows_k else [BN, BK]), bias,
        TensorDescriptor.from_tensor(y, [BM, SUB]), slope, sums, T, G, K, N, chunk, rows_k, epilogue, act, save,
        not INTERPRET, BM, BN, BK, SUB, warps, num_warps=warps, num_stages=stages)
    return y, slope, sums


# ----------------------------------------------------------------------------------------------------------------------
# The FFN, forward and backward. Every activation is (T, B, columns) with B = the blocks of the matmul that reads it.

def _blocks(x, w, bias=None):
    """y = w x (+ bias) block by block, (T, B, K) x (B, N, K) -> (T, B N), by cuBLAS."""
    if w.size(0) == 1 and bias is not None:
        return torch.addmm(bias, x[:, 0], w[0].T)
    return block_matmul(x, w).view(x.size(0), -1)


def _dealt(x, w):
    """y = w x with each block's N columns spread over all blocks: (T, B, K) x (B, N, K) -> (T, N/chunk = B, B,
    chunk)."""
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
def ffn_op(x: Tensor, V1: Tensor, U1: Tensor, bias: Tensor, V2: Tensor, U2: Tensor, bias2: Tensor | None, shuffle: bool,
           act: str, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (T, N), V (B, R/B, N/B), U (B, M/B, R/B), bias (H,) -> y (T, M) in order of U2's blocks, t1, hidden, slope, t2.

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
    hidden = x.new_empty(T, H) if save else x.new_empty(0)
    return x.new_empty(T, M), x.new_empty(T, R1), hidden, slope, x.new_empty(T, R2)


@torch.library.custom_op("structured::ffn_backward", mutates_args=())
def ffn_backward_op(grad: Tensor, x: Tensor, V1: Tensor, U1: Tensor, bias: Tensor, V2: Tensor, U2: Tensor, t1: Tensor,
                    hidden: Tensor, slope: Tensor, t2: Tensor, shuffle: bool, act: str
                    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, V1, U1, bias, V2, U2 from that of y."""
    matmul = _dealt if shuffle else _blocks
    x, t1, t2, grad = _read_by(x, V1), _read_by(t1, U1), _read_by(t2, U2), _read_by(grad.contiguous(), U2)
    if hidden.numel() == 0:
        hidden, slope = _hidden(t1, U1, bias, V2, shuffle, act, True)
    chunk = _chunk(hidden.size(1), V2, shuffle)

    grad_U2 = _weight_grad(grad, t2)
    grad_t2 = _read_by(matmul(grad, U2.mT), V2)
    grad_V2 = _weight_grad(grad_t2, _read_by(hidden, V2))
    slope = slope if act == "gelu" else hidden
    pre, _, sums = _launch(grad_t2, V2.mT, chunk, chunk, SLIM, "backward", act, slope=slope)
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
def _ffn_flops(x, V1, U1, bias, V2, U2, *args, **kwargs):  # of shapes; torch.compile recomputes what costs none
    return 2 * x[0] * sum(math.prod(w) for w in (V1, U1, V2, U2))


@register_flop_formula(torch.ops.structured.ffn_backward)
def _ffn_backward_flops(grad, *args, **kwargs):
    return 2 * _ffn_flops(*args)


# ----------------------------------------------------------------------------------------------------------------------
# Structured linears in, activations out

@torch.compiler.assume_constant_result
def _hopper():
    return INTERPRET or torch.version.hip is None and torch.cuda.get_device_capability() == (9, 0)


def _dtype(x):
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def unfit(x, fc1, fc2, act):
    """Why `fused_ffn` cannot run on these, in a few words, or None if it can."""
    if not (x.is_cuda and _hopper() or INTERPRET):
        return "the device is no Hopper card"
    if _dtype(x) not in (torch.bfloat16, torch.float16):
        return f"precision {_dtype(x)}"
    if act not in ("gelu", "relu2"):
        return f"activation {act}"
    weights = fc1.V, fc1.U, fc2.V, fc2.U
    V1, U1, V2, U2 = (w.shape if w.dim() == 3 else (1, *w.shape) for w in weights)     # (blocks, rows, columns)
    (_, r1, p1), (_, _, R1), (B, r2, p2), (_, s2, _) = V1, U1, V2, U2
    shuffle = fc1.U.dim() == 3
    chunk = p2 // B if shuffle else p2  # of hidden units that stay together
    if R1 % 32 or r2 % 32 or chunk % 64 or p1 % 8 or s2 % 8:
        return f"widths and ranks that tiles do not divide, as in {tuple(fc1.V.shape)} and {tuple(fc2.V.shape)}"
    if shuffle and (p1 % 32 or s2 % 32 or any(r % 64 or r % (16 * B) for r in (r1, r2))):
        return f"nblocks {B} that does not cut {r1} and {r2} into chunks of 16"
    return None


MIN_TOKENS = 128 if INTERPRET else 512   # with fewer, tiles of 128 tokens do not fill the card
MIN_WORK = 0 if INTERPRET else 75e9      # multiply-adds of a forward: with less, launching takes longer than running


def can_ffn(x, fc1, fc2, act):
    """Whether `fused_ffn` is the way to compute fc2(act(fc1(x))): not for few tokens or little work. Logs once why it
    cannot."""
    tokens = x.numel() // x.size(-1)
    if not (hasattr(fc1, "V") and hasattr(fc2, "V")) or tokens < MIN_TOKENS:
        return False
    work = tokens * sum(w.numel() for w in (fc1.V, fc1.U, fc2.V, fc2.U))
    work *= 4 if fc1.U.dim() == 3 else 1                               # permutations in plain torch are slow
    if work < MIN_WORK * (1 if torch.is_grad_enabled() else 3):  # no backward to launch ahead of
        return False
    reason = unfit(x, fc1, fc2, act)
    if reason is not None:
        log_once(f"structured FFN: plain torch instead of the Hopper kernels: {reason}")
    return reason is None and works("structured FFN", _try_ffn)


def _try_ffn():
    shapes = (1, 64), (1, 32, 64), (1, 128, 32), (128,), (1, 32, 128), (1, 64, 32)
    x, V1, U1, bias, V2, U2 = (torch.ones(shape, **TRIAL) for shape in shapes)
    y, *saved = ffn_op(x, V1, U1, bias, V2, U2, None, False, "gelu", True)
    ffn_backward_op(y, x, V1, U1, bias, V2, U2, *saved, False, "gelu")


def fused_ffn(x, fc1, fc2, act="gelu", recompute=False):
    """fc2(act(fc1(x))) for two LowRank, BlockShuffle or BlockDense linears of one kind; x (..., N) -> (..., M).

    For backward it keeps x, both rank-wide activations, the hidden units and, for gelu, a byte of slope for each. With
    recompute it keeps only the rank-wide ones and computes the wide ones again.
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
        y = y.view(-1, B, U2.size(1)).transpose(1, 2).flatten(1)  # f^-1, fused into whatever adds y on
        y = y if bias2 is None else y + bias2
    return y.reshape(*x.shape[:-1], -1)


def _deal(V):
    """Rows (i, l) -> (l, i), l < B: V (B, q, p) with its rows in the order in which f gives them to the B blocks."""
    return V.unflatten(1, (-1, V.size(0))).transpose(1, 2).flatten(1, 2)
