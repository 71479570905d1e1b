"""From a trained model to a smaller one: its FFNs projected onto factors or pruned, its weights a run's first ones.

The projection is the structured matrix D nearest to a dense W (M, N), in float64. Plain: least |W - D|. Weighted by the
inputs' second moments C = E[x x^T] = L L^T: least E|W x - D x|^2 = |(W - D) L|^2.
"""
import dataclasses
import math
import zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

import config
from config import UserError
from merge import exact_matmuls
from checkpoint import read_model
from model import Teacher, build, check_weights, flops_per_token, load, load_weights
from structured import Dense, linear
from tokenizer import saved_tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# One matrix

def best_factors(W, rank, L=None):
    """left (M, rank), right (rank, N): their product is nearest to W among all of that rank, (W - left right) L least.

    Each column of left is as long as its row of right, as training likes it.
    """
    A = W if L is None else W @ L
    tall = A.size(0) >= A.size(1)
    Q = torch.linalg.eigh(A.T @ A if tall else A @ A.T)[1].flip(1)[:, :rank]  # much faster than an SVD on a GPU
    left, right = (A @ Q, Q.T) if tall else (Q, Q.T @ A)
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


def project_blocks(W, V, U, fit, C=None):
    """Fills V and U, a block of columns at a time. C couples the blocks: each is fitted again to what others leave."""
    columns = torch.arange(W.size(1), device=W.device).view(len(V), -1)
    D = torch.cat([fit(W[:, at], b, V, U) for b, at in enumerate(columns)], dim=1)
    for _ in range(0 if C is None else 2):
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
# The FFNs of a model

def damped(C):
    """C with a little of every direction, since inputs seldom span all; None stays None."""
    if C is None:
        return C
    return C + torch.diag((1e-4 * C.diagonal().mean()).clamp(min=1e-30).expand(len(C)))  # inputs may be 0 too


def relative_errors(W, D, C=None) -> list:
    """|W - D| / |W| and, with C, the same of their outputs."""
    rest = W - D
    errors = [(rest.norm() / W.norm()).item()]
    return errors if C is None else errors + [(((rest @ C) * rest).sum() / ((W @ C) * W).sum()).sqrt().item()]


def projected(dense, cfg, C=None):
    """The structured linear nearest to a dense one -> (linear, its relative errors)."""
    W, C = dense.weight.double(), damped(C)
    new = linear(cfg.ffn, dense.in_features, dense.out_features, cfg.rank, cfg.nblocks, cfg.bias).to(W)
    V, U = project(W, cfg.ffn, new.V.shape, new.U.shape, C)
    new.V.copy_(V)
    new.U.copy_(U)
    errors = relative_errors(W, new.dense_weight(), C)
    new.to(dense.weight.dtype).bias = dense.bias
    return new, errors


def resized(weight, bias, like):
    """A dense linear of weight (M, N), in the precision of the linear `like`."""
    new = Dense(*weight.shape[::-1], bias=False, device="meta")
    new.weight, new.bias = nn.Parameter(weight.to(like.weight.dtype)), None if bias is None else nn.Parameter(bias)
    return new


def prune(ffn, units, C=None):
    """Leaves a dense FFN, in place, the `units` hidden units h_j of largest E[h_j^2] |w_j|^2, w_j a column of fc2.

    With C = E[h h^T] fc2 is fitted to the units that are left: least E|W h - D h|^2. Without it the rows of fc1 stand
    for E[h_j^2]. Returns the indices of the units and the relative errors of fc2.
    """
    W, C = ffn.fc2.weight.double(), damped(C)
    rows = ffn.fc1.weight.view(-1, W.size(1), ffn.fc1.in_features)               # of swiglu gate and value
    energy = rows.double().square().sum(2).prod(0) if C is None else C.diagonal()
    kept = (energy * W.square().sum(0)).topk(units).indices.sort().values
    D = torch.zeros_like(W)
    D[:, kept] = W[:, kept] if C is None else torch.linalg.solve(C[kept][:, kept], C[kept] @ W.T).T
    bias = ffn.fc1.bias
    bias = None if bias is None else bias.view(len(rows), -1)[:, kept].flatten()
    ffn.fc1 = resized(rows[:, kept].flatten(0, 1), bias, ffn.fc1)
    ffn.fc2 = resized(D[:, kept], ffn.fc2.bias, ffn.fc2)
    return kept, relative_errors(W, D, C)


class Moments:
    """C = the sum of x x^T over the inputs x of a linear."""

    def __init__(self, linear):
        size = linear.in_features
        self.C = torch.zeros(size, size, dtype=torch.float64, device=linear.weight.device)
        self.hook = linear.register_forward_pre_hook(self.add)

    def add(self, module, inputs):
        x = inputs[0].flatten(0, -2).double()  # a sum in fp32 need not be positive definite where few inputs are large
        self.C += x.T @ x


@torch.no_grad()
def project_model(model, cfg, batches=(), show=print) -> list:
    """Gives a dense model in place the FFNs of cfg: pruned where ffn_dim is less, then projected where ffn says so.

    With batches of tokens both are weighted by what the linears of the dense model read there. Returns the dense
    weights that were projected, in the order of the structured linears.
    """
    streams, originals = [], []  # streams: of each batch x, pending, its token embeddings, its value embeddings
    for tokens in batches:
        x, values = model.embed(tokens, tokens.new_full((len(tokens),), -1))
        x = x if model.wpe is None else x + model.wpe.weight[:x.size(1)]
        streams.append((x, None, x, values))
    for layer, block in enumerate(model.blocks):
        ffn = block.ffn
        ffn.kernels = False  # so that the linears are called
        moments = {name: Moments(getattr(ffn, name)) for name in ("fc1", "fc2")}
        streams = [(*block(x, pending, model.cos[:x.size(1)], model.sin[:x.size(1)], None, values[layer], x0), values)
                   for x, pending, x0, values in streams]
        for moment in moments.values():
            moment.hook.remove()
        C, errors = {name: moment.C if batches else None for name, moment in moments.items()}, {}
        if cfg.ffn_dim < ffn.fc2.in_features:
            kept, errors["fc2 pruned"] = prune(ffn, cfg.ffn_dim, C["fc2"])
            C["fc2"] = C["fc2"][kept][:, kept] if batches else None
        for name in C if cfg.ffn != "dense" and layer >= cfg.n_dense_layers else ():
            originals.append(getattr(ffn, name).weight)
            new, errors[name] = projected(getattr(ffn, name), cfg, C[name])
            setattr(ffn, name, new)
        if errors:
            parts = "; ".join(" ".join((name, *(f"{e:.4f}" for e in pair))) for name, pair in errors.items())
            show(f"layer {layer:3}  relative error of W{' and of W x' if batches else ''}: {parts}", flush=True)
    return originals


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
    """What the settings s of export.py describe, on a dense model in place; prints errors and with a text losses."""
    if cfg.ffn != "dense":
        raise UserError(f"{path} has ffn={cfg.ffn}: only a dense model can be projected.")
    if s.ffn_dim > cfg.ffn_dim:
        raise UserError(f"{path} has ffn_dim={cfg.ffn_dim}: ffn_dim={s.ffn_dim} must be less, units are left out only.")
    for name in ("ffn", "rank", "nblocks", "n_dense_layers"):
        setattr(cfg, name, getattr(s, name))
    cfg.ffn_dim = s.ffn_dim or cfg.ffn_dim
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


# ----------------------------------------------------------------------------------------------------------------------
# The start of a run

# Settings that change what a model computes and no shape that it has
UNSEEN = ("n_head", "norm", "act", "pos", "rope_theta", "norm_eps", "qk_norm", "embed_norm", "logit_softcap")


def check_tokenizer(path, saved, cfg, tokenizer):
    if (identity := saved["tokenizer"]["identity"]) != tokenizer.identity:
        raise UserError(f"the weights in {path} are of the tokenizer {identity}, {config.data_dir(cfg)} holds tokens "
                        f"of {tokenizer.identity}: prepare the text with the weights' tokenizer.")


def check_fits(cfg, theirs, weights, model, ffns):
    """UserError unless weights of a model with settings `theirs` have this model's shapes, those of FFNs if `ffns`."""
    shapes, mine = ({n: tuple(t.shape) for n, t in tensors.items() if ffns or ".ffn." not in n}
                    for tensors in (weights, model.state_dict()))
    for name in sorted(shapes.keys() | mine.keys()):
        if shapes.get(name) != mine.get(name):
            there, here = shapes.get(name, "none"), mine.get(name, "none")
            raise UserError(f"init_from={cfg.init_from} does not fit this model: the shape of {name} is {there} there, "
                            f"{here} here; give the settings of that model.")
    for name in (*UNSEEN, *["tie_embeddings"] * cfg.tie_embeddings):  # one table cannot hold two
        if getattr(theirs, name) != getattr(cfg, name):
            raise UserError(f"init_from={cfg.init_from} has {name}={getattr(theirs, name)}, this model "
                            f"{name}={getattr(cfg, name)}: give --{name}={getattr(theirs, name)}.")


def calibration_windows(cfg, data, device):
    """Batches of windows, (4, block_size) tokens or less, spread evenly over the training data."""
    n = min(data.n_windows, -(-cfg.calibrate_tokens // cfg.block_size))
    starts = np.linspace(0, data.n_windows - 1, n).astype(np.int64) * cfg.block_size
    tokens = data.train.read(starts, cfg.block_size).clip(max=cfg.vocab_size - 1)  # the first step reports damage
    return torch.from_numpy(tokens).to(device).split(4) if n else ()


def load_init(cfg, model, data, ranks) -> dict:
    """cfg.init_from: the weights of another model of the same shapes, settings and tokenizer.

    A dense model may have other FFNs: they are projected onto this model's, or pruned to their width. Returns the dense
    weight (M, N) of each structured linear that was projected.
    """
    with ranks.agree():
        path, saved = read_model(cfg.init_from)
        weights, theirs = saved["model"], config.from_dict(saved["config"], path)
        refit = theirs.ffn == "dense" and (cfg.ffn != "dense" or cfg.ffn_dim < theirs.ffn_dim)
        check_tokenizer(path, saved, cfg, data.tokenizer)
        check_fits(cfg, theirs, weights, model, ffns=not refit)
        if refit and cfg.ffn_dim > theirs.ffn_dim:
            raise UserError(f"init_from={cfg.init_from} has ffn_dim={theirs.ffn_dim}, this model {cfg.ffn_dim}: hidden "
                            f"units can only be left out, so give --ffn_dim={theirs.ffn_dim} or less.")
    if not refit:
        check_weights(model, weights, path)
        load_weights(model, weights, path)
        return {}
    device = torch.device("cpu") if ranks.device.type == "mps" else ranks.device  # mps has no float64
    dense = build(dataclasses.replace(cfg, ffn="dense", ffn_dim=theirs.ffn_dim), device, weights=weights, path=path)
    with exact_matmuls():
        originals = project_model(dense, cfg, calibration_windows(cfg, data, device),
                                  print if ranks.master else lambda *_, **__: None)
    load_weights(model, dense.state_dict(), path)
    for t in model.state_dict().values() if ranks.world > 1 else ():
        dist.broadcast(t, 0)  # of two cards each could round its own way
    return dict(zip((linear for _, linear in model.structured_linears()), originals))


def load_teacher(cfg, tokenizer, ranks, saved_run=None) -> Teacher:
    """The model of cfg.distill, in the precision of the matmuls; UserError unless `saved_run`, a checkpoint, had it."""
    model, theirs, saved = load(cfg.distill, ranks.device)
    check_tokenizer(cfg.distill, saved, cfg, tokenizer)
    if theirs.vocab_size != cfg.vocab_size or theirs.block_size < cfg.block_size:
        raise UserError(f"distill={cfg.distill} has vocab_size={theirs.vocab_size} and block_size={theirs.block_size}, "
                        f"this model {cfg.vocab_size} and {cfg.block_size}: give the same vocabulary, and a context "
                        "that the teacher has.")
    checksum = 0
    for p in model.parameters():
        checksum = zlib.crc32(np.ascontiguousarray(p.detach().cpu()), checksum)
    if saved_run and saved_run.get("teacher", checksum) != checksum:
        raise UserError(f"distill={cfg.distill} holds other weights than when the run in {cfg.out_dir} was saved: "
                        "restore them, or choose another --out_dir.")
    for p in model.requires_grad_(False).parameters():
        if ranks.device.type == "cuda" and p.dim() > 1:
            p.data = p.data.to(ranks.dtype)
    return Teacher(model, cfg.distill_share, checksum)


def teacher_flops(cfg) -> float:
    """FLOPs per token of the forward of cfg.distill's model."""
    path, saved = read_model(cfg.distill)
    theirs = config.from_dict(saved["config"], path)
    return flops_per_token(dataclasses.replace(theirs, block_size=cfg.block_size))
