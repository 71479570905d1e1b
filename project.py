"""Projections: the structured matrix D nearest to a dense W (M, N), in float64, and of all FFNs of a model.

Plain: least |W - D|. Weighted by the inputs' second moments C = E[x x^T] = L L^T: least E|W x - D x|^2 = |(W - D) L|^2.
"""
import math

import torch

import config
from config import UserError
from merge import exact_matmuls
from structured import linear
from tokenizer import saved_tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# One matrix

def best_factors(W, rank, L=None):
    """left (M, rank), right (rank, N): their product is nearest to W among all of that rank, (W - left right) L least.

    Each column of left is as long as its row of right, as training likes it.
    """
    U, S, Vh = torch.linalg.svd(W if L is None else W @ L, full_matrices=False)
    left, right = U[:, :rank] * S[:rank], Vh[:rank]
    if L is not None:
        right = torch.linalg.solve_triangular(L, right, upper=False, left=False)
    scale = (right.norm(dim=1) / left.norm(dim=0).clamp(min=1e-300)).sqrt()
    return left * scale, right / scale.clamp(min=1e-300)[:, None]


def fit_blockdense(T, b, V, U, L=None):
    """Writes block b's factors, nearest to its columns T (M, N/B), into V (B, R/B, N/B) and U (M, R); their product."""
    r = V.size(1)
    left, V[b] = best_factors(T, r, L)
    U[:, b * r:(b + 1) * r] = left
    return left @ V[b]


def fit_blockshuffle(T, b, V, U, L=None):
    """The same for V (B, q, p), U (B, s, q): rows l, l + B, ... of T have the rank that f deals from block b to l."""
    B, q, _ = V.shape
    D = torch.zeros_like(T)
    for l in range(B):
        dealt = [i for i in range(b * q, (b + 1) * q) if i % B == l]
        left, right = best_factors(T[l::B], len(dealt), L)
        for k, i in enumerate(dealt[:len(right)]):
            U[l, :, i // B], V[b, i - b * q] = left[:, k], right[k]
        D[l::B] = left @ right
    return D


def project_blocks(W, V, U, fit, C=None, sweeps=2):
    """Fills V and U, a block of columns at a time. C couples the blocks: each is fitted again to what others leave."""
    columns = torch.arange(W.size(1), device=W.device).view(len(V), -1)
    D = torch.cat([fit(W[:, at], b, V, U) for b, at in enumerate(columns)], dim=1)
    for _ in range(0 if C is None else sweeps):
        for b, at in enumerate(columns):
            own = C[at][:, at]
            rest = torch.linalg.solve(own, ((W - D) @ C[:, at]).T).T
            D[:, at] = fit(D[:, at] + rest, b, V, U, torch.linalg.cholesky(own))
    return V, U


def project(W, ffn, shape_V, shape_U, C=None):
    """V and U of the structure `ffn` nearest to W (M, N); with C (N, N) nearest in the outputs."""
    if ffn == "lowrank":
        left, right = best_factors(W, shape_V[0], None if C is None else torch.linalg.cholesky(C))
        return right, left
    fit = fit_blockdense if ffn == "blockdense" else fit_blockshuffle
    return project_blocks(W, W.new_zeros(shape_V), W.new_zeros(shape_U), fit, C)


# ----------------------------------------------------------------------------------------------------------------------
# A model

def projected(dense, cfg, C=None):
    """The structured linear nearest to a dense one -> (linear, relative errors of its matrix and, with C, outputs)."""
    W = dense.weight.double()
    new = linear(cfg.ffn, dense.in_features, dense.out_features, cfg.rank, cfg.nblocks, cfg.bias).to(W)
    if C is not None:  # inputs seldom span all directions
        C = C + 1e-4 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
    V, U = project(W, cfg.ffn, new.V.shape, new.U.shape, C)
    new.V.copy_(V)
    new.U.copy_(U)
    rest = W - new.dense_weight()
    errors = [(rest.norm() / W.norm()).item()]
    if C is not None:
        errors.append((((rest @ C) * rest).sum() / ((W @ C) * W).sum()).sqrt().item())
    new.to(dense.weight.dtype).bias = dense.bias
    return new, errors


class Moments:
    """C = the sum of x x^T over the inputs x of a linear."""

    def __init__(self, linear):
        size = linear.in_features
        self.C = torch.zeros(size, size, dtype=torch.float64, device=linear.weight.device)
        self.hook = linear.register_forward_pre_hook(self.add)

    def add(self, module, inputs):
        x = inputs[0].flatten(0, -2)
        self.C += (x.T @ x).double()


def project_model(model, cfg, batches=()):
    """Projects the FFNs of a dense model in place, weighted by their inputs on batches of tokens if there are any."""
    streams = []  # of each batch: x and pending of the residual stream, its token embeddings, its value embeddings
    for tokens in batches:
        x, values = model.embed(tokens)
        x = x if model.wpe is None else x + model.wpe.weight[:x.size(1)]
        streams.append((x, None, x, values))
    for layer, block in enumerate(model.blocks):
        block.ffn.kernels = False  # so that the linears are called
        moments = {name: Moments(getattr(block.ffn, name)) for name in ("fc1", "fc2")}
        streams = [(*block(x, pending, model.cos[:x.size(1)], model.sin[:x.size(1)], None, values[layer], x0),
                    x0, values)
                   for x, pending, x0, values in streams]
        errors = {}
        for name, moment in moments.items():
            moment.hook.remove()
            if layer >= cfg.n_dense_layers:
                new, errors[name] = projected(getattr(block.ffn, name), cfg, moment.C if batches else None)
                setattr(block.ffn, name, new)
        if errors:
            parts = "; ".join(" ".join((name, *(f"{e:.4f}" for e in pair))) for name, pair in errors.items())
            print(f"layer {layer:3}  relative error of W{' and of W x' if batches else ''}: {parts}", flush=True)


def calibration(path, model, saved, n_tokens):
    """A text -> (batches of tokens for the activations, other windows of tokens for the loss)."""
    tokenizer = saved_tokenizer(saved["tokenizer"], model.cfg.vocab_size)
    length = min(model.cfg.block_size, 512) + 1
    text = config.read_text(path)[:8 * (n_tokens + 20 * length)]  # enough: few tokens are longer than 8 characters
    ids = torch.tensor(tokenizer.encode(text), device=model.head.weight.device)
    windows = ids[:len(ids) // length * length].view(-1, length)
    held_out = min(16, len(windows) // 4)
    if not held_out:
        raise UserError(f"{path} has {len(ids)} tokens, at least {4 * length} are needed: give a longer text.")
    return windows[:-held_out, :-1][:math.ceil(n_tokens / length)].split(4), windows[-held_out:]


@torch.no_grad()
def project_ffns(path, model, cfg, saved, s):
    """The projection that the settings s describe, of a dense model in place; prints errors and with a text losses."""
    if cfg.ffn != "dense":
        raise UserError(f"{path} has ffn={cfg.ffn}: only a dense model can be projected.")
    for name in ("ffn", "rank", "nblocks", "n_dense_layers"):
        setattr(cfg, name, getattr(s, name))
    config.check(cfg)
    batches, held_out = calibration(s.calibrate, model, saved, s.calibrate_tokens) if s.calibrate else ((), ())

    def loss():
        return sum(model(row[None, :-1], row[None, 1:]).item() for row in held_out) / len(held_out)

    with exact_matmuls():
        before = loss() if s.calibrate else None
        project_model(model, cfg, batches if s.weighted else ())
        after = loss() if s.calibrate else None
    if s.calibrate:
        print(f"loss on {held_out[:, 1:].numel()} other tokens of {s.calibrate}: {before:.4f} before, {after:.4f} "
              f"after (PPL {math.exp(before):.2f}, {math.exp(after):.2f})")
