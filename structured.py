"""Structured linears: y = W x with W never formed ("Building on Efficient Foundations", arXiv 2406.16450).

    LowRank       y = U (V x)                U (M, R), V (R, N)
    BlockShuffle  y = f^-1(U f(V x))         U, V block-diagonal, f a fixed permutation (the Monarch form)
    BlockDense    y = U (V x)                U (M, R), V block-diagonal

Each replaces an nn.Linear (..., N) -> (..., M), has one bias after U and knows its dense equivalent D (`dense_weight`).
In self-guided training it also holds a guide, a dense W: y = (alpha W + (1 - alpha) D) x, where alpha falls from 1 to
0. Then W is dropped, and parameters and state dict are as if it had never been there.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


# ----------------------------------------------------------------------------------------------------------------------
# B small matmuls in one call

@torch.library.custom_op("structured::block_linear", mutates_args=())
def block_linear(x: Tensor, weight: Tensor) -> Tensor:
    """y[t, b] = weight[b] x[t, b]: x (T, B, p), weight (B, q, p) -> (T, B, q), contiguous.

    An op of its own, so that the compiler keeps the strided output. bmm alone leaves y in (B, T, q) order, and whatever
    reads it by token pays for a copy.
    """
    return block_matmul(x, weight)


def block_matmul(x, weight):
    """block_linear without its own autograd: bmm that writes by token."""
    y = x.new_empty(x.size(0), x.size(1), weight.size(1))
    torch.bmm(x.transpose(0, 1), weight.transpose(1, 2), out=y.transpose(0, 1))
    return y


@block_linear.register_fake
def _(x, weight):
    return x.new_empty(x.size(0), x.size(1), weight.size(1))


def _block_linear_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _block_linear_backward(ctx, grad):  # grad (T, B, q)
    x, weight = ctx.saved_tensors
    grad, grad_x, grad_w = grad.contiguous(), None, None  # one copy here: after a permutation each bmm would make one
    if ctx.needs_input_grad[0]:
        grad_x = block_linear(grad, weight.transpose(1, 2))                            # (T, B, p)
    if ctx.needs_input_grad[1]:
        grad_w = torch.bmm(grad.permute(1, 2, 0), x.transpose(0, 1))                   # (B, q, p)
    return grad_x, grad_w


block_linear.register_autograd(_block_linear_backward, setup_context=_block_linear_save)


@register_flop_formula(torch.ops.structured.block_linear)
def _block_linear_flops(x_shape, weight_shape, out_shape=None, **kwargs):
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1] * weight_shape[2]


for _device in ("cpu", "cuda"):
    block_linear.register_autocast(_device, torch.bfloat16)


# ----------------------------------------------------------------------------------------------------------------------
# The linears

class Dense(nn.Linear):
    """y = W x + bias: nn.Linear with the methods of the structured ones. It has no guide, so alpha must be None."""

    def forward(self, x, alpha=None):
        assert alpha is None, "a dense linear has no guide"
        return super().forward(x)

    def last_product(self, x):
        return x, self.weight, self.bias

    def dense_weight(self):
        return self.weight


class Structured(nn.Module):
    """What the three parametrizations share: the bias, the guide, and the forward through factors or blended matrix.

    A subclass gives the shapes of V and U and defines `dense_weight` (the matrix D of the map through them),
    `reset_parameters`, and `last_product`, or `factors` where something follows U's product.
    """

    def __init__(self, in_features, out_features, V, U, bias):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.V = nn.Parameter(torch.empty(V))
        self.U = nn.Parameter(torch.empty(U))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)
        self.register_parameter("W", None)
        if not self.V.is_meta:
            self.reset_parameters()

    def forward(self, x, alpha=None):
        """x (..., N) -> (..., M): D x + bias; with alpha (a 0-d tensor) guided: (alpha W + (1 - alpha) D) x + bias.

        Both branches of the paper's o = alpha W x + (1 - alpha) U V x are linear in x. So one matmul with the blended
        matrix has the same output and the same gradients. The blend is in float32 at least; the matmul casts it once.
        """
        if alpha is not None:
            exact = torch.promote_types(self.W.dtype, torch.float32)
            return F.linear(x, torch.lerp(self.dense_weight().to(exact), self.W.to(exact), alpha.to(exact)), self.bias)
        return self.factors(x)

    def factors(self, x):
        """D x + bias, through V and U."""
        return F.linear(*self.last_product(x))

    @torch.no_grad()
    def start_guide(self, W=None):
        """Adds the guide, W (M, N); without one W = D, the dense equivalent: then it changes no output at first."""
        if W is None:
            exact = copy.deepcopy(self).double()  # float64: never TF32
            with torch.autocast(self.V.device.type, enabled=False):
                W = exact.dense_weight()
        self.W = nn.Parameter(W.to(self.V.dtype))

    def end_guide(self):
        """Drops W from the module's parameters and state dict."""
        self.W = None

    def extra_repr(self):
        parts = [f"{self.in_features} -> {self.out_features}", f"V {tuple(self.V.shape)}", f"U {tuple(self.U.shape)}"]
        parts += [f"W {tuple(self.W.shape)}"] if self.W is not None else []
        return ", ".join(parts + [f"bias={self.bias is not None}"])


class LowRank(Structured):
    """y = U (V x) + bias; V (R, N), U (M, R): R (N + M) parameters."""

    def __init__(self, in_features, out_features, rank, bias=True):
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank {rank} must lie between 1 and the smaller of in {in_features} and "
                             f"out {out_features}")
        super().__init__(in_features, out_features, (rank, in_features), (out_features, rank), bias)

    @torch.no_grad()
    def reset_parameters(self, std=0.02):
        """Spectral: U V = P S Q^T, the best rank-R approximation of a dense N(0, std^2) matrix A; sqrt(S) to each side.

        Q holds the top R eigenvectors of A^T A, much faster than an SVD on a GPU. U V = (A Q) Q^T is the truncated SVD
        whatever the precision of the eigenvalues. A is drawn tall: of a wide linear it is the transpose.
        """
        (M, R), N = self.U.shape, self.V.size(1)
        dtype = torch.promote_types(self.V.dtype, torch.float32)
        A = torch.randn(max(M, N), min(M, N), device=self.V.device, dtype=dtype) * std
        Q = torch.linalg.eigh(A.double().T @ A.double())[1][:, -R:].to(A.dtype)      # (min, R), ascending eigenvalues
        AQ = A.double() @ Q.double()                                                   # (max, R)
        root = AQ.norm(dim=0).sqrt()                                                   # sqrt of the singular values
        tall, wide = AQ / root, (Q * root).T                                           # (max, R), (R, min)
        U, V = (tall, wide) if M >= N else (wide.T, tall.T)
        self.U.copy_(U)
        self.V.copy_(V)

    def last_product(self, x):
        """x, weight and bias of the product that comes last."""
        return F.linear(x, self.V), self.U, self.bias

    def dense_weight(self):
        """D = U V (M, N)."""
        return self.U @ self.V


class BlockShuffle(Structured):
    """y = f^-1(U f(V x)) + bias; V (B, q, p) with p = N/B, q = min(N, M)/B; U (B, s, q) with s = M/B.

    f deals the B q entries of V x out to the blocks of U like cards: block l receives the entries i with i mod B = l.
    f^-1 is its inverse on the B s outputs: entry i of block l becomes y[i B + l]. min(N, M) (N + M) / B parameters.
    """

    def __init__(self, in_features, out_features, nblocks, bias=True):
        if nblocks < 1 or in_features % nblocks or out_features % nblocks:
            raise ValueError(f"nblocks {nblocks} must divide both in {in_features} and out {out_features}")
        p, q, s = in_features // nblocks, min(in_features, out_features) // nblocks, out_features // nblocks
        super().__init__(in_features, out_features, (nblocks, q, p), (nblocks, s, q), bias)

    @torch.no_grad()
    def reset_parameters(self, std=0.02):
        """Every block orthonormal; std, of a dense matrix, is not used."""
        for block in (*self.V, *self.U):
            nn.init.orthogonal_(block)

    def factors(self, x):
        B, q, p = self.V.shape
        t = block_linear(x.reshape(-1, B, p), self.V)                                  # (T, B, q)
        t = t.view(-1, q, B).transpose(1, 2).contiguous()                              # (T, B, q), dealt out by f
        o = block_linear(t, self.U)                                                    # (T, B, s)
        y = o.transpose(1, 2).reshape(*x.shape[:-1], self.out_features)                # f^-1
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self):
        """D (M, N): the same map applied to the rows of blockdiag(V)."""
        B, q, p = self.V.shape
        rows = torch.block_diag(*self.V).view(q, B, B * p).transpose(0, 1)             # (B, q, N), f
        return (self.U @ rows).transpose(0, 1).reshape(-1, B * p)                      # (M, N), f^-1


class BlockDense(Structured):
    """y = U (V x) + bias; V (B, R/B, N/B), U (M, R): R (M + N/B) parameters."""

    def __init__(self, in_features, out_features, rank, nblocks, bias=True):
        if nblocks < 1 or rank < 1 or in_features % nblocks or rank % nblocks:
            raise ValueError(f"nblocks {nblocks} must divide both in {in_features} and rank {rank}")
        V, U = (nblocks, rank // nblocks, in_features // nblocks), (out_features, rank)
        super().__init__(in_features, out_features, V, U, bias)

    @torch.no_grad()
    def reset_parameters(self, std=0.02):
        """Every block of V, and U, orthonormal; std, of a dense matrix, is not used."""
        for matrix in (*self.V, self.U):
            nn.init.orthogonal_(matrix)

    def last_product(self, x):
        """x, weight and bias of the product that comes last."""
        B, r, p = self.V.shape
        t = block_linear(x.reshape(-1, B, p), self.V)                                  # (T, B, r)
        return t.view(*x.shape[:-1], B * r), self.U, self.bias

    def dense_weight(self):
        """D (M, N): block b of its columns is U's block b of columns times V[b]."""
        B, r, p = self.V.shape
        columns = self.U.view(-1, B, r).transpose(0, 1)                                # (B, M, r)
        return (columns @ self.V).transpose(0, 1).reshape(-1, B * p)


class FactoredQKV(nn.Module):
    """Queries U_q V_q x and keys U_k V_k x of one rank, and dense values: x (..., N) -> (..., q + 2 kv), side by side.

    A head uses its queries and keys in products alone, x^T W_q^T W_k x', whose rank is at most the head's size. Values
    are what attention adds to the residual stream, so they stay dense. There is no guide.
    """

    def __init__(self, in_features, q, kv, rank, bias=True):
        super().__init__()
        self.in_features, self.out_features = in_features, q + 2 * kv
        self.q, self.k = LowRank(in_features, q, rank, bias), LowRank(in_features, kv, rank, bias)
        self.v = Dense(in_features, kv, bias)

    def forward(self, x):
        flat = x.reshape(-1, self.in_features)    # 2-D: compiled, matmuls write straight into what cat and split join
        h = F.linear(flat, torch.cat((self.q.V, self.k.V))).chunk(2, dim=1)                       # twice (tokens, R)
        q, k = (F.linear(part, m.U, m.bias) for part, m in zip(h, (self.q, self.k)))
        return torch.cat((q, k, self.v(flat)), dim=1).view(*x.shape[:-1], self.out_features)

    def dense_weight(self):
        return torch.cat([part.dense_weight() for part in (self.q, self.k, self.v)])

    @property
    def bias(self):
        """The three biases as one Parameter, which merge gives to the dense equivalent."""
        parts = self.q.bias, self.k.bias, self.v.bias
        return None if parts[0] is None else nn.Parameter(torch.cat(parts), requires_grad=False)


def linear(ffn, in_features, out_features, rank=0, nblocks=0, bias=True):
    """A linear of Config's kind `ffn`."""
    if ffn == "lowrank":
        return LowRank(in_features, out_features, rank, bias)
    if ffn == "blockshuffle":
        return BlockShuffle(in_features, out_features, nblocks, bias)
    if ffn == "blockdense":
        return BlockDense(in_features, out_features, rank, nblocks, bias)
    return Dense(in_features, out_features, bias)


# ----------------------------------------------------------------------------------------------------------------------
# Factors beside their dense equivalent; a linear with gelu

class FactorsOrMerged(nn.Module):
    """A structured linear beside its dense equivalent; the table `speeds` (merge.SpeedTable) decides per call."""

    def __init__(self, factors, merged, speeds=None):
        super().__init__()
        self.factors, self.merged, self.speeds, self.shape = factors, merged, speeds, shape_of(factors)

    def active(self, tokens):
        return self.merged if self.speeds.merged(self.shape, tokens) else self.factors

    def forward(self, x, alpha=None):
        return self.active(x.numel() // x.size(-1))(x)


def active_linear(module, tokens):
    """The linear to use for this many tokens: of a FactorsOrMerged the faster one, else the module itself."""
    return module.active(tokens) if isinstance(module, FactorsOrMerged) else module


def can_fuse_gelu(x, linear) -> bool:
    """Whether `linear_gelu` has no pass of its own for gelu: for bf16 without gradients, of which it keeps nothing."""
    return (x.is_cuda and x.dtype == torch.bfloat16 and not torch.is_grad_enabled() and linear.bias is not None
            and linear.bias.dtype == x.dtype and hasattr(linear, "last_product"))


def linear_gelu(linear, x, alpha=None):
    """gelu(linear(x)), the form with tanh, x (..., N) -> (..., M). The last product applies it where that is possible.

    There gelu reads float32 sums. By itself it reads what was rounded to bf16.
    """
    linear = active_linear(linear, x.numel() // x.size(-1))
    if alpha is not None or not can_fuse_gelu(x, linear):
        return F.gelu(linear(x, alpha), approximate="tanh")
    x, weight, bias = linear.last_product(x)
    y = torch._addmm_activation(bias, x.flatten(0, -2), weight.T, use_gelu=True)  # on CUDA with tanh, on a CPU with erf
    return y.view(*x.shape[:-1], -1)                                                   # (..., M)


def shape_of(linear) -> str:
    """What a timing depends on besides the card, as in: lowrank 2048 -> 8192, V 512x2048, U 8192x512."""
    V, U = ("x".join(map(str, w.shape)) for w in (linear.V, linear.U))
    return f"{type(linear).__name__.lower()} {linear.in_features} -> {linear.out_features}, V {V}, U {U}"
