"""From a trained model to a smaller one: FFNs, queries and keys projected onto factors, FFNs pruned, a run's start.

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
from device import on_meta
from merge import exact_matmuls
from checkpoint import read_model
from model import Teacher, build, check_weights, flops_per_token, load_weights
from structured import Dense, FactoredQKV, linear
from tokenizer import saved_tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# One matrix

def best_factors(W, rank, L=None, S=None):
    """left (M, rank), right (rank, N): their product is nearest to W among all of that rank, (W - left right) L least.

    S (M, 1): weights of the rows, then S (W - left right) L is least. Each column of left is as long as its row of
    right, as training likes it.
    """
    A = W if L is None else W @ L
    A = A if S is None else S * A
    tall = A.size(0) >= A.size(1)
    Q = torch.linalg.eigh(A.T @ A if tall else A @ A.T)[1].flip(1)[:, :rank]  # much faster than an SVD on a GPU
    left, right = (A @ Q, Q.T) if tall else (Q, Q.T @ A)
    if L is not None:
        right = torch.linalg.solve_triangular(L, right, upper=False, left=False)
    left = left if S is None else left / S
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
# The linears of a model

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


def score_weights(Wq, Wk, cfg, C):
    """What an error of each entry of the queries and keys W x weighs in the scores q^T k, (attn_dim, 1) and (kv, 1).

    An entry is multiplied by the other side's. Rotary positions mix entries i and i + head_size / 2, whose weights are
    therefore equal, and make errors of other entries independent. So the weight of a query's entry is the root of the
    key's E[k_i^2 + k_j^2], and of a key's the same of all queries of its group. Biases count nothing.
    """
    mixed, kv = 2 if cfg.pos == "rope" else 1, cfg.n_kv_head
    q, k = (((W @ C) * W).sum(1).view(heads, mixed, -1).sum(1) for W, heads in ((Wq, cfg.n_head), (Wk, kv)))
    of_q, of_k = k.repeat_interleave(cfg.n_head // kv, 0), q.view(kv, -1, q.size(1)).sum(1)
    return [(w + 1e-6 * w.mean()).clamp(min=1e-30).sqrt().repeat(1, mixed).view(-1, 1) for w in (of_q, of_k)]


def projected_qkv(dense, cfg, C=None):
    """A dense qkv with queries and keys each the nearest of rank cfg.qk_rank -> (FactoredQKV, errors of both by name).

    With C nearest in the outputs: E|S (W - D) x|^2 is least, S of score_weights, or 1 where a norm follows, which makes
    the sizes of heads equal. Without C nearest in the weights. Values and biases stay.
    """
    C, kv = damped(C), cfg.n_kv_head * cfg.attn_dim // cfg.n_head
    L, sizes = None if C is None else torch.linalg.cholesky(C), (cfg.attn_dim, kv, kv)
    with on_meta():
        new = FactoredQKV(dense.in_features, cfg.attn_dim, kv, cfg.qk_rank, dense.bias is not None)
    Wq, Wk, values = dense.weight.split(sizes)
    Wq, Wk, weights, errors = Wq.double(), Wk.double(), {"v.weight": values}, {}
    scales = (None, None) if C is None or cfg.qk_norm else score_weights(Wq, Wk, cfg, C)
    for name, W, S in (("queries", Wq, scales[0]), ("keys", Wk, scales[1])):
        left, right = best_factors(W, cfg.qk_rank, L, S)
        weights |= {f"{name[0]}.U": left, f"{name[0]}.V": right}
        errors[name] = relative_errors(W, left @ right, C)
    if dense.bias is not None:
        weights |= {f"{part}.bias": bias for part, bias in zip("qkv", dense.bias.split(sizes))}
    own = {name: t.to(dense.weight.dtype, copy=True) for name, t in weights.items()}  # a view would be saved whole
    new.load_state_dict(own, assign=True)
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


def linears_to_fit(block, cfg, structured) -> dict:
    """{name: linear} of a block's dense linears that cfg has otherwise; structured: whether its FFN becomes that."""
    ffn = block.ffn
    found = {"qkv": block.attn.qkv} if cfg.qk_rank and isinstance(block.attn.qkv, Dense) else {}
    if cfg.ffn_dim < ffn.fc2.in_features or structured and isinstance(ffn.fc1, Dense):
        found |= {"fc1": ffn.fc1, "fc2": ffn.fc2}
    return found


def fit_block(block, cfg, structured, C):
    """Fits the linears named in C, in place, to their moments or None -> (the FFN's dense weights, errors by name)."""
    ffn, originals, errors = block.ffn, [], {}
    if "qkv" in C:
        block.attn.qkv, errors = projected_qkv(block.attn.qkv, cfg, C["qkv"])
    if cfg.ffn_dim < ffn.fc2.in_features:
        kept, errors["fc2 pruned"] = prune(ffn, cfg.ffn_dim, C["fc2"])
        C["fc2"] = None if C["fc2"] is None else C["fc2"][kept][:, kept]
    for name in ("fc1", "fc2") if structured and "fc1" in C else ():
        originals.append(getattr(ffn, name).weight)
        new, errors[name] = projected(getattr(ffn, name), cfg, C[name])
        setattr(ffn, name, new)
    return originals, errors


@torch.no_grad()
def project_model(model, cfg, batches=(), show=print) -> list:
    """Gives a dense model the linears of cfg, in place: queries and keys of rank qk_rank; FFNs pruned to a smaller
    ffn_dim, then projected onto the structure ffn. What is structured already stays.

    batches of tokens (B, T): projections and pruning are weighted by what the linears of the dense model read on them.
    Returns the dense weights (M, N) of the FFNs that were projected, in the order of the structured linears.
    """
    streams, originals = [], []  # streams: of each batch x, pending, its token embeddings, its value embeddings
    for tokens in batches:
        x, values = model.embed(tokens, tokens.new_full((len(tokens),), -1))
        x = x if model.wpe is None else x + model.wpe.weight[:x.size(1)]
        streams.append((x, None, x, values))
    for layer, block in enumerate(model.blocks):
        block.ffn.kernels = False  # so that the linears are called
        structured = cfg.ffn != "dense" and layer >= cfg.n_dense_layers
        moments = {name: Moments(linear) for name, linear in linears_to_fit(block, cfg, structured).items()}
        streams = [(*block(x, pending, model.cos[:x.size(1)], model.sin[:x.size(1)], None, values[layer], x0), values)
                   for x, pending, x0, values in streams]
        for moment in moments.values():
            moment.hook.remove()
        C = {name: moment.C if batches else None for name, moment in moments.items()}
        weights, errors = fit_block(block, cfg, structured, C)
        originals += weights
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
def make_smaller(path, model, cfg, saved, s):
    """Projects or prunes a dense model in place, as the settings s of export.py say. Prints the errors of each layer,
    and with s.calibrate the loss on other windows of that text, before and after."""
    if cfg.ffn != "dense" and (s.ffn != "dense" or s.ffn_dim):
        raise UserError(f"{path} has ffn={cfg.ffn}: only a dense model can be projected.")
    if cfg.qk_rank and s.qk_rank:
        raise UserError(f"{path} has qk_rank={cfg.qk_rank}: only dense queries and keys can be projected, leave "
                        f"qk_rank={s.qk_rank} out.")
    if s.ffn_dim > cfg.ffn_dim:
        raise UserError(f"{path} has ffn_dim={cfg.ffn_dim}: ffn_dim={s.ffn_dim} must be less, units are left out only.")
    for name in ("ffn", "rank", "nblocks", "n_dense_layers") if s.ffn != "dense" else ():
        setattr(cfg, name, getattr(s, name))
    cfg.ffn_dim, cfg.qk_rank = s.ffn_dim or cfg.ffn_dim, s.qk_rank or cfg.qk_rank
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
UNSEEN = ("n_head", "n_kv_head", "norm", "act", "pos", "rope_theta", "norm_eps", "qk_norm", "embed_norm",
          "logit_softcap")
FFN = ("ffn", "rank", "nblocks", "n_dense_layers", "ffn_dim")
SHAPES = ("n_layer", "n_embd", "n_head", "n_kv_head", "attn_dim", "qk_rank", "vocab_size", "bias", "post_norm", "smear",
          "embed_skip", "value_embeddings", *FFN)


def check_tokenizer(path, saved, cfg, tokenizer):
    if (identity := saved["tokenizer"]["identity"]) != tokenizer.identity:
        raise UserError(f"the weights in {path} are of the tokenizer {identity}, {config.data_dir(cfg)} holds tokens "
                        f"of {tokenizer.identity}: prepare the text with the weights' tokenizer.")


def other_settings(cfg, theirs, refit) -> str:
    """The command line's settings in which a model of weights that do not fit differs, those of `refit` aside."""
    made_to_fit = {*FFN} if ".ffn." in refit else set()
    made_to_fit |= {"qk_rank"} if ".attn.qkv." in refit else set()
    names = dict.fromkeys((*SHAPES, *["block_size"] * (cfg.pos == theirs.pos == "absolute"), *UNSEEN))
    return " ".join(f"--{name}={getattr(theirs, name)}" for name in names
                    if name not in made_to_fit and getattr(theirs, name) != getattr(cfg, name))


def check_fits(cfg, theirs, weights, model, refit):
    """UserError unless weights of a model with settings `theirs` have this model's shapes, those of `refit` aside."""
    shapes, mine = ({n: tuple(t.shape) for n, t in tensors.items() if not any(part in n for part in refit)}
                    for tensors in (weights, model.state_dict()))
    for name in sorted(shapes.keys() | mine.keys()):
        if shapes.get(name) != mine.get(name):
            there, here = shapes.get(name, "none"), mine.get(name, "none")
            raise UserError(f"init_from={cfg.init_from} does not fit this model: the shape of {name} is {there} there, "
                            f"{here} here; give that model's {other_settings(cfg, theirs, refit)}.")
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

    A dense model may have other FFNs: they are projected onto this model's, or pruned to their width. Dense queries and
    keys are projected where this model has a qk_rank. Returns the dense weight (M, N) of each structured linear of an
    FFN that was projected.
    """
    with ranks.agree():
        path, saved = read_model(cfg.init_from)
        weights, theirs = saved["model"], config.from_dict(saved["config"], path)
        ffns = theirs.ffn == "dense" and (cfg.ffn != "dense" or cfg.ffn_dim < theirs.ffn_dim)
        refit = [".ffn."] * ffns + [".attn.qkv."] * (cfg.qk_rank > theirs.qk_rank == 0)
        check_tokenizer(path, saved, cfg, data.tokenizer)
        if theirs.qk_rank not in (0, cfg.qk_rank):
            raise UserError(f"init_from={cfg.init_from} has qk_rank={theirs.qk_rank}, this model {cfg.qk_rank}: only "
                            f"dense queries and keys can be projected, so give --qk_rank={theirs.qk_rank}.")
        check_fits(cfg, theirs, weights, model, refit)
        if ffns and cfg.ffn_dim > theirs.ffn_dim:
            raise UserError(f"init_from={cfg.init_from} has ffn_dim={theirs.ffn_dim}, this model {cfg.ffn_dim}: hidden "
                            f"units can only be left out, so give --ffn_dim={theirs.ffn_dim} or less.")
    if not refit:
        check_weights(model, weights, path)
        load_weights(model, weights, path)
        return {}
    device = torch.device("cpu") if ranks.device.type == "mps" else ranks.device  # mps has no float64
    shapes = {name: getattr(theirs, name) for name in ("ffn", "ffn_dim", "qk_rank")}
    dense = build(dataclasses.replace(cfg, **shapes), device, weights=weights, path=path)
    with exact_matmuls():
        originals = project_model(dense, cfg, calibration_windows(cfg, data, device),
                                  print if ranks.master else lambda *_, **__: None)
    load_weights(model, dense.state_dict(), path)
    for t in model.state_dict().values() if ranks.world > 1 else ():
        dist.broadcast(t, 0)  # of two cards each could round its own way
    return dict(zip((linear for _, linear in model.structured_linears()), originals))


def load_teacher(cfg, tokenizer, ranks, saved_run=None) -> Teacher:
    """The model of cfg.distill, in the precision of the matmuls; UserError unless `saved_run`, a checkpoint, had it."""
    path, theirs, saved = read_teacher(cfg)
    check_tokenizer(cfg.distill, saved, cfg, tokenizer)
    if theirs.vocab_size != cfg.vocab_size or theirs.block_size < cfg.block_size:
        raise UserError(f"distill={cfg.distill} has vocab_size={theirs.vocab_size} and block_size={theirs.block_size}, "
                        f"this model {cfg.vocab_size} and {cfg.block_size}: give the same vocabulary, and a context "
                        "that the teacher has.")
    weights, checksum = saved["model"], 0
    model = build(theirs, ranks.device, weights=weights, path=path)
    for name, _ in model.named_parameters():
        checksum = zlib.crc32(np.ascontiguousarray(weights[name].float()), checksum)
    if saved_run and saved_run.get("teacher", checksum) != checksum:
        raise UserError(f"distill={cfg.distill} holds other weights than when the run in {cfg.out_dir} was saved: "
                        "restore them, or choose another --out_dir.")
    for p in model.requires_grad_(False).parameters():
        if ranks.device.type == "cuda" and p.dim() > 1:
            p.data = p.data.to(ranks.dtype)
    return Teacher(model, cfg.distill_share, checksum)


def read_teacher(cfg):
    """(path, settings, entries) of cfg.distill's model; the FLOPs per token of its forward become cfg.teacher_flops."""
    path, saved = read_model(cfg.distill)
    theirs = config.from_dict(saved["config"], path)
    cfg.teacher_flops = flops_per_token(dataclasses.replace(theirs, block_size=cfg.block_size))
    return path, theirs, saved
