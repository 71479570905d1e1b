"""project: the nearest structured matrix, against singular values, gradient descent and structured matrices."""
import copy
import dataclasses
import json
import re
import shutil
import zlib

import pytest
import torch

import checkpoint
import config
import project
import train
from config import UserError
from conftest import LOWRANK, STRUCTURES, TINY, assert_one_sentence, dense_oracle, train_run
from merge import merge_attention, replace_structured
from model import FFN, build, load
from checkpoint import save_beside
from runs import ALONE, assert_same_run, configure, metrics, stopped
from structured import Dense, linear

CPU = torch.device("cpu")
SHAPES = [("lowrank", 12, 8, 3, 0), ("lowrank", 8, 12, 8, 0), ("blockdense", 12, 8, 6, 3), ("blockdense", 8, 20, 4, 2),
          ("blockshuffle", 12, 8, 0, 2), ("blockshuffle", 8, 12, 0, 4), ("blockshuffle", 12, 18, 0, 3),
          ("blockshuffle", 16, 16, 0, 4), ("blockshuffle", 6, 6, 0, 6)]  # kind, in, out, rank, nblocks


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(n, seed=1):
    """Second moments of inputs whose directions differ in size a thousandfold."""
    x = random(4 * n, n, seed=seed) * torch.logspace(0, -1.5, n, dtype=torch.float64)
    return x.T @ x / len(x)


def module(kind, n, m, rank, nblocks):
    return linear(kind, n, m, rank, nblocks, bias=False).double()


def nearest(W, shape, C=None):
    """The projection's dense matrix, formed entry by entry."""
    kind, *_ = shape
    like = module(*shape)
    V, U = project.project(W, kind, like.V.shape, like.U.shape, C)
    assert V.shape == like.V.shape and U.shape == like.U.shape
    return torch.from_numpy(dense_oracle(kind, V, U))


def cost(rest, C=None):
    return (rest.square().sum() if C is None else ((rest @ C) * rest).sum()).item()


def descended(W, shape, C, start=None):
    """The least cost that L-BFGS finds from V, U of `start`, or of a random beginning."""
    torch.manual_seed(2)
    like = module(*shape)
    for i, p in enumerate((like.V, like.U)):
        p.data = random(*p.shape, seed=3 + i) if start is None else start[i].clone().contiguous()
    optimizer = torch.optim.LBFGS([like.V, like.U], max_iter=300, max_eval=600, tolerance_grad=1e-9,
                                  tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        rest = W - like.dense_weight()
        value = (rest.square() if C is None else (rest @ C) * rest).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return loss().item()


# ----------------------------------------------------------------------------------------------------------------------
# One matrix

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_matrix_of_the_structure_is_found_again(shape, weighted):
    original = module(*shape)
    original.V.data, original.U.data = random(*original.V.shape, seed=5), random(*original.U.shape, seed=6)
    W = torch.from_numpy(dense_oracle(shape[0], original.V.detach(), original.U.detach()))
    for C in (moments(shape[1]),) if weighted and shape[0] != "lowrank" else (None, moments(shape[1])):
        torch.testing.assert_close(nearest(W, shape, C), W, rtol=0, atol=1e-6 * W.abs().max().item())


def tail(W, rank):
    return torch.linalg.svdvals(W)[rank:].square().sum().item()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_plain_projection_leaves_the_small_singular_values_of_its_free_pieces(shape):
    kind, n, m, rank, B = shape
    W = random(m, n)
    if kind == "lowrank":
        expected = tail(W, rank)
    elif kind == "blockdense":
        expected = sum(tail(W[:, b * n // B:(b + 1) * n // B], rank // B) for b in range(B))
    else:  # piece (row l mod B, block b): as many ranks as stage 1 has entries i of block b with i = l mod B
        q = min(n, m) // B
        expected = sum(tail(W[l::B, b * n // B:(b + 1) * n // B], sum(i % B == l for i in range(b * q, b * q + q)))
                       for l in range(B) for b in range(B))
    assert cost(W - nearest(W, shape)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shape", [SHAPES[i] for i in (0, 3, 5, 6)])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_descent_finds_nothing_nearer(shape, weighted):
    W = random(shape[2], shape[1])
    C = moments(shape[1]) if weighted else None
    like = module(*shape)
    V, U = project.project(W, shape[0], like.V.shape, like.U.shape, C)
    found = cost(W - nearest(W, shape, C), C)
    slack = 0.01 if weighted and shape[0] != "lowrank" else 1e-6  # blocks that C couples: two sweeps come close
    assert found <= (1 + slack) * descended(W, shape, C) + 1e-9
    assert descended(W, shape, C, (V, U)) >= (1 - slack) * found - 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_one_change_nothing_and_others_help(shape):
    W, n = random(shape[2], shape[1]), shape[1]
    torch.testing.assert_close(nearest(W, shape, 3 * torch.eye(n, dtype=torch.float64)), nearest(W, shape), rtol=0,
                               atol=1e-9)
    C = moments(n)
    plain, weighted = cost(W - nearest(W, shape), C), cost(W - nearest(W, shape, C), C)
    assert weighted <= plain * (1 + 1e-9) + 1e-20 and (weighted < 0.96 * plain or plain < 1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_of_low_rank_and_of_zeros_leave_no_nan(shape):
    for W in (torch.zeros(shape[2], shape[1], dtype=torch.float64), random(shape[2], 1) @ random(1, shape[1])):
        for D in (nearest(W, shape), nearest(W, shape, moments(shape[1]))):
            assert D.isfinite().all() and (shape[0] == "blockshuffle" or (D - W).abs().max() < 1e-9)


@pytest.mark.parametrize("few", [0.0, 1e5])
def test_inputs_that_are_zero_or_of_very_different_size_are_weights_too(few):
    x = random(40, 12, seed=3).float()
    x[:, 1:] *= few > 0
    x[:, 0] *= few
    fc = torch.nn.Linear(12, 20)
    moments = project.Moments(fc)
    with torch.no_grad():
        fc(x)
        new, errors = project.projected(fc, configure("--ffn=lowrank", "--rank=3"), moments.C)
    assert new.V.isfinite().all() and new.U.isfinite().all()
    torch.testing.assert_close(moments.C, x.double().T @ x.double(), rtol=1e-12, atol=0)


def test_factors_are_balanced():
    left, right = project.best_factors(random(9, 14), 5, torch.linalg.cholesky(moments(14)))
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


# ----------------------------------------------------------------------------------------------------------------------
# A model

def tiny(*argv):
    cfg, = config.load(["--n_layer=3", "--n_embd=32", "--n_head=4", "--block_size=16", "--vocab_size=257", *argv])
    torch.manual_seed(0)
    model = build(cfg, CPU, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def keep(path, model, ffn="dense"):
    """A model.pt of the byte tokenizer, said to be dense."""
    values = config.to_dict(model.cfg) | {"ffn": ffn, "rank": 0, "nblocks": 0}
    save_beside({"config": values, "model": model.state_dict(), "step": 0, "val_loss": None,
                 "tokenizer": {"identity": "byte", "blob": torch.zeros(1, dtype=torch.uint8)}}, str(path / "model.pt"))
    return path


TEXT = "".join(f"line {i * i % 97} of the text, {i % 7} words\n" for i in range(40))
KINDS = {"gpt": [], "llama": ["--norm=rmsnorm", "--act=swiglu", "--bias=False", "--n_kv_head=2"],
         "learned": ["--pos=absolute", "--act=relu2"],
        "recipe": ["--norm=rmsnorm", "--act=relu2", "--bias=False", "--tie_embeddings=False", "--qk_norm=1.2",
                   "--embed_norm=True", "--smear=True", "--embed_skip=True", "--value_embeddings=True"]}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_factors_are_found_again_in_a_model(structure, kind, cli, tmp_path):
    model = tiny(*KINDS[kind], *STRUCTURES[structure])
    tokens = torch.randint(257, (2, 16))
    with torch.no_grad():
        expected = model(tokens)
        replace_structured(model)
    keep(tmp_path / "dense", model)
    (tmp_path / "text.txt").write_text(TEXT)
    for name, how in (("plain", []), ("weighted", [f"--calibrate={tmp_path}/text.txt"])):
        status, out, err = cli("export.py", tmp_path / "dense", f"--out_dir={tmp_path}/{name}", *STRUCTURES[structure],
                               *how, "--device=cpu")
        assert status == 0 and out.count("relative error") == 2 and "layer   0" not in out, err
        found, cfg, _ = load(str(tmp_path / name), CPU)
        assert cfg.ffn == structure and len(found.structured_linears()) == 4
        with torch.no_grad():
            torch.testing.assert_close(found(tokens), expected, rtol=0, atol=2e-3 if how else 2e-4)
        assert all(float(e) < 1e-4 for e in re.findall(r"(?<=fc[12]) ([\d.]+)", out))


@pytest.mark.parametrize("kind", ["learned", "recipe"])
def test_the_moments_are_those_of_the_inputs_in_the_whole_model(kind, monkeypatch):
    model = tiny(*KINDS[kind])
    seen, tokens = {}, torch.randint(257, (6, 16))

    def listen(key):
        def hook(module, inputs):
            seen[key] = inputs[0].flatten(0, 1).double()
        return hook

    hooks = [fc.register_forward_pre_hook(listen((i, name)))
             for i, block in enumerate(model.blocks)
             for name, fc in [("qkv", block.attn.qkv), *block.ffn.named_children()]]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    given = []

    def projected(errors):
        return lambda dense, cfg, C: given.append(C) or (dense, errors)

    monkeypatch.setattr(project, "projected", projected([0.0]))
    monkeypatch.setattr(project, "projected_qkv", projected({}))
    with torch.no_grad():
        project.project_model(model, dataclasses.replace(model.cfg, ffn="lowrank", qk_rank=4), tokens.split(4))
    inputs = [seen[layer, name] for layer in (0, 1, 2) for name in (("qkv", "fc1", "fc2") if layer else ("qkv",))]
    expected = [x.T @ x for x in inputs]
    for C, right in zip(given, expected, strict=True):
        torch.testing.assert_close(C, right, rtol=1e-5, atol=1e-5)


def test_losses_and_errors_are_printed_and_weights_help(cli, tmp_path):
    keep(tmp_path / "dense", tiny())
    (tmp_path / "text.txt").write_text(TEXT)
    printed = {}
    for weighted in (True, False):
        argv = [tmp_path / "dense", f"--out_dir={tmp_path}/{weighted}", *STRUCTURES["lowrank"],
                f"--calibrate={tmp_path}/text.txt", f"--weighted={weighted}",
                "--n_dense_layers=0", "--calibrate_tokens=200", "--device=cpu"]
        status, out, err = cli("export.py", *argv)
        assert status == 0 and out.count("relative error") == 3, err
        printed[weighted] = out
        before, after = map(float, re.search(r"([\d.]+) before, ([\d.]+) after", out).groups())
        windows = torch.tensor(list(TEXT.encode()))[:len(TEXT) // 17 * 17].view(-1, 17)[-16:]
        for folder, value in (("dense", before), (str(weighted), after)):
            model = load(str(tmp_path / folder), CPU)[0]
            with torch.no_grad():
                loss = torch.nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
            assert value == pytest.approx(loss.item(), abs=2e-4)
    outputs = re.findall(r"(?<=fc1) ([\d.]+) ([\d.]+)", printed[True])
    assert len(outputs) == 3 and all(0 < float(of_output) < float(of_matrix) < 1 for of_matrix, of_output in outputs)


def test_the_text_of_the_loss_is_apart_from_that_of_the_weights(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    saved = {"tokenizer": {"identity": "byte", "blob": torch.zeros(1, dtype=torch.uint8)}}
    batches, held_out = project.calibration(str(tmp_path / "a.txt"), tiny(), saved, 10**6)
    windows = torch.tensor(list(TEXT.encode()))[:len(TEXT) // 17 * 17].view(-1, 17)
    assert len(held_out) == len(windows) // 4 and torch.equal(torch.cat(batches), windows[:-len(held_out), :-1])
    assert torch.equal(held_out, windows[-len(held_out):])


def test_what_cannot_be_projected_is_one_sentence(cli, finished, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    keep(tmp_path / "dense", tiny())
    for path, argv, word in ((finished, [], "ffn=lowrank"), (tmp_path / "dense", ["--rank=99"], "rank=99"),
                             (tmp_path / "dense", [f"--calibrate={tmp_path}/short.txt"], "longer text")):
        status, out, err = cli("export.py", path, f"--to={tmp_path}/hf", "--ffn=lowrank", "--rank=4", *argv,
                               "--device=cpu")
        assert_one_sentence(status, out, err)
        assert word in err


def test_a_trained_models_loss_is_not_said_of_its_projection(cli, data, tmp_path):
    run = train_run(tmp_path / "run", data)
    assert cli("export.py", run, f"--to={tmp_path}/hf", *STRUCTURES["lowrank"], "--device=cpu")[0] == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "projected onto factors" in card and "loss" not in card and "FLOPs" not in card


def test_a_projected_model_goes_out_merged(cli, tmp_path):
    """Straight to --to: the same weights as by way of a model.pt."""
    from safetensors.torch import load_file
    keep(tmp_path / "dense", tiny())
    projection = [*STRUCTURES["blockdense"], "--qk_rank=6", "--device=cpu"]
    assert cli("export.py", tmp_path / "dense", f"--to={tmp_path}/straight", *projection)[0] == 0
    assert cli("export.py", tmp_path / "dense", f"--out_dir={tmp_path}/model", *projection)[0] == 0
    assert cli("export.py", tmp_path / "model", f"--to={tmp_path}/around")[0] == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "around"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    card = (tmp_path / "straight" / "README.md").read_text()
    assert "blockdense rank=8 nblocks=2" in card and "merged" in card and "factors of rank 6" in card


# ----------------------------------------------------------------------------------------------------------------------
# Pruning

def tiny_ffn(act):
    """An FFN of 12 hidden units in double precision, and its hidden values h (500, 12) of random inputs x (500, 8)."""
    cfg = config.load(["--n_embd=8", "--n_head=1", "--ffn_dim=12", f"--act={act}"])[0]
    ffn, x, seen = FFN(cfg, "dense").double(), random(500, 8, seed=9), []
    for i, p in enumerate(ffn.parameters()):
        sizes = torch.logspace(0, 1, len(p), dtype=p.dtype).view(-1, *[1] * (p.dim() - 1))
        p.data = random(*p.shape, seed=i) * sizes
    hook = ffn.fc2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    y = ffn(x)
    hook.remove()
    return ffn, x, seen[0].detach(), y.detach()


@pytest.mark.parametrize("act", ["gelu", "swiglu"])
@torch.no_grad()
def test_pruning_leaves_the_units_that_add_most_and_fits_the_rest_to_them(act):
    ffn, x, h, y = tiny_ffn(act)
    W, bias = ffn.fc2.weight.clone(), ffn.fc2.bias.clone()
    adds = [sum((h[t, j] * W[i, j]) ** 2 for t in range(500) for i in range(8)).item() for j in range(12)]
    kept, errors = project.prune(ffn, 7, h.T @ h)
    assert kept.tolist() == sorted(sorted(range(12), key=lambda j: -adds[j])[:7])
    best = torch.linalg.lstsq(h[:, kept], h @ W.T).solution.T
    torch.testing.assert_close(ffn.fc2.weight, best, rtol=0, atol=2e-3 * best.abs().max().item())
    assert torch.equal(ffn.fc2.bias, bias) and ffn.fc1.out_features == (14 if act == "swiglu" else 7)
    left = ((ffn(x) - y).norm() / (y - bias).norm()).item()
    assert errors[1] == pytest.approx(left, rel=1e-2) and 0 < left < 1


@pytest.mark.parametrize("act", ["gelu", "swiglu"])
@torch.no_grad()
def test_plain_pruning_weighs_units_by_their_weights_and_changes_none(act):
    ffn, *_ = tiny_ffn(act)
    before = {name: p.clone() for name, p in ffn.named_parameters()}
    rows, columns = before["fc1.weight"].split(12), before["fc2.weight"]
    sizes = [columns[:, j].norm() * torch.stack([part[j].norm() for part in rows]).prod() for j in range(12)]
    kept, errors = project.prune(ffn, 5)
    assert kept.tolist() == sorted(sorted(range(12), key=lambda j: -sizes[j])[:5]) and len(errors) == 1
    assert torch.equal(ffn.fc2.weight, columns[:, kept])
    for name in ("fc1.weight", "fc1.bias"):
        expected = torch.cat([part[kept] for part in before[name].split(12)])
        assert torch.equal(dict(ffn.named_parameters())[name], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_units_that_add_nothing_are_left_out(kind, calibrated, cli, tmp_path):
    """Every third unit works; the others read nothing, or nothing reads them."""
    model, tokens = tiny(*KINDS[kind], "--ffn_dim=48"), torch.randint(257, (2, 16))
    with torch.no_grad():
        for block in model.blocks:
            rows = block.ffn.fc1.weight.view(-1, 48, 32)
            rows[:, 1::3] = 0
            block.ffn.fc2.weight[:, 2::3] = 0
            if block.ffn.fc1.bias is not None:
                block.ffn.fc1.bias.view(-1, 48)[:, 1::3] = 0
        expected = model(tokens)
    keep(tmp_path / "dense", model)
    (tmp_path / "text.txt").write_text(TEXT)
    how = [f"--calibrate={tmp_path}/text.txt"] if calibrated else []
    status, out, err = cli("export.py", tmp_path / "dense", f"--out_dir={tmp_path}/narrow", "--ffn_dim=16", *how,
                           "--device=cpu")
    assert status == 0 and out.count("fc2 pruned") == 3, err
    found, cfg, _ = load(str(tmp_path / "narrow"), CPU)
    assert (cfg.ffn, cfg.ffn_dim) == ("dense", 16)
    with torch.no_grad():
        torch.testing.assert_close(found(tokens), expected, rtol=0, atol=2e-2 if calibrated else 1e-5)
    status, out, err = cli("export.py", tmp_path / "dense", f"--out_dir={tmp_path}/wide", "--ffn_dim=49")
    assert_one_sentence(status, out, err)
    assert "ffn_dim=48" in err


# ----------------------------------------------------------------------------------------------------------------------
# Queries and keys

ATTENTION = {**KINDS, "wide attention": [*KINDS["llama"], "--attn_dim=48"],
             "one key head": ["--n_kv_head=1", "--attn_dim=24", "--pos=absolute"]}


def attention(*argv):
    """A config of 4 heads, and its qkv with inputs x (200, 32) whose directions differ in size a thousandfold."""
    cfg = configure("--n_layer=1", "--n_embd=32", "--n_head=4", "--block_size=16", "--qk_rank=4", *argv)
    qkv = Dense(32, cfg.attn_dim + 2 * cfg.n_kv_head * cfg.attn_dim // cfg.n_head, cfg.bias).double()
    for i, p in enumerate(qkv.parameters()):  # heads and rotary pairs differ in size too
        order = random(len(p), seed=8).argsort()
        sizes = torch.logspace(0, 1, len(p), dtype=p.dtype)[order].view(-1, *[1] * (p.dim() - 1))
        p.data = random(*p.shape, seed=i) * (sizes if p.dim() > 1 else 0.1)
    return cfg, qkv, random(200, 32, seed=7) @ torch.linalg.cholesky(moments(32)).T


def scores(qkv, x, cfg):
    """q^T k of each head, of every two rows of x, at distances of 0 to 15 positions with rotary ones."""
    kv = cfg.n_kv_head
    heads = qkv(x).view(len(x), -1, cfg.attn_dim // cfg.n_head)                  # (T, heads, head_size)
    q, k = heads[:, :cfg.n_head], heads[:, cfg.n_head:cfg.n_head + kv].repeat_interleave(cfg.n_head // kv, 1)
    if cfg.pos == "rope":
        angle = 10_000.0 ** -torch.linspace(0, 1, q.size(2) // 2 + 1, dtype=q.dtype)[:-1]
        turned = torch.complex(*q.chunk(2, -1)) * torch.exp(1j * angle * torch.arange(16)[:, None, None, None])
        q = torch.cat((turned.real, turned.imag), -1)                            # (16, T, n_head, head_size)
    return torch.einsum("...thd,shd->...tsh", q, k)


@pytest.mark.parametrize("kind", ATTENTION)
@torch.no_grad()
def test_queries_and_keys_of_full_rank_compute_the_same(kind):
    model, tokens = tiny(*ATTENTION[kind]).double(), torch.randint(257, (6, 16))
    cfg = model.cfg
    kv = cfg.n_kv_head * cfg.attn_dim // cfg.n_head
    for block in model.blocks:  # of no higher rank than keys can have
        W = block.attn.qkv.weight[:cfg.attn_dim]
        W.copy_(random(cfg.attn_dim, kv) @ random(kv, 32) / 32)
    expected = model(tokens)
    for batches in ((), tokens.split(4)):
        found = copy.deepcopy(model)
        assert project.project_model(found, dataclasses.replace(cfg, qk_rank=min(kv, 32)), batches) == []
        assert all(block.attn.qkv.q.V.size(0) == min(kv, 32) for block in found.blocks)
        torch.testing.assert_close(found(tokens), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("weighted", [False, True])
@torch.no_grad()
def test_queries_and_keys_leave_the_small_singular_values(kind, weighted):
    """Weighted, an entry counts as much as what it is multiplied by in the scores, unless it is normed first."""
    cfg, qkv, x = attention(*ATTENTION[kind])
    C = x.T @ x
    new, errors = project.projected_qkv(qkv, cfg, C if weighted else None)
    rows, size, kv, group = cfg.attn_dim, cfg.attn_dim // cfg.n_head, cfg.n_kv_head, cfg.n_head // cfg.n_kv_head
    W, D = qkv.weight, new.dense_weight()
    q, k = (x @ W[:rows].T).square().sum(0), (x @ W[rows:rows + kv * size].T).square().sum(0)
    opposite = [[], []]
    for h in range(cfg.n_head):
        for i in range(size):
            with_it = (i, (i + size // 2) % size) if cfg.pos == "rope" else (i,)
            opposite[0].append(sum(k[h // group * size + j] for j in with_it))
    for g in range(kv):
        for i in range(size):
            with_it = (i, (i + size // 2) % size) if cfg.pos == "rope" else (i,)
            opposite[1].append(sum(q[h * size + j] for h in range(g * group, g * group + group) for j in with_it))
    L = torch.linalg.cholesky(C) if weighted else torch.eye(32, dtype=torch.float64)
    for part, energy, name in zip((slice(0, rows), slice(rows, rows + kv * size)), opposite, ("queries", "keys")):
        S = torch.stack(energy).sqrt()[:, None] if weighted and not cfg.qk_norm else 1
        left = (S * (W[part] - D[part]) @ L).square().sum().item()
        assert left == pytest.approx(tail(S * W[part] @ L, cfg.qk_rank), rel=1e-2)
        rest = W[part] - D[part]
        assert errors[name][0] == pytest.approx((rest.norm() / W[part].norm()).item())
        if weighted:
            assert errors[name][1] == pytest.approx(((x @ rest.T).norm() / (x @ W[part].T).norm()).item(), rel=1e-2)
    assert torch.equal(D[rows + kv * size:], W[rows + kv * size:])
    assert new.bias is None if not cfg.bias else torch.equal(new.bias, qkv.bias)


@pytest.mark.parametrize("kind", [kind for kind in ATTENTION if kind != "recipe"])
@torch.no_grad()
def test_weighted_queries_and_keys_are_nearer_in_outputs_and_scores(kind):
    """Where queries and keys are normed, the outputs alone count."""
    cfg, qkv, x = attention(*ATTENTION[kind])
    expected, found = (qkv(x), scores(qkv, x, cfg)), {}
    normed = dataclasses.replace(cfg, qk_norm=1.0)
    for how, like, C in (("weighted", cfg, x.T @ x), ("outputs alone", normed, x.T @ x), ("plain", cfg, None)):
        new = project.projected_qkv(qkv, like, C)[0]
        found[how] = [(a - b).norm().item() for a, b in zip(expected, (new(x), scores(new, x, cfg)))]
    assert found["outputs alone"][0] < found["weighted"][0] < found["plain"][0]
    assert found["weighted"][1] < found["outputs alone"][1] < found["plain"][1]


@pytest.mark.parametrize("kind", ATTENTION)
def test_merged_queries_and_keys_are_found_again_in_a_model(kind, cli, tmp_path):
    """Beside FFNs that stay, dense or structured."""
    for ffn in ([], LOWRANK):
        model, tokens = tiny(*ATTENTION[kind], "--qk_rank=4", *ffn), torch.randint(257, (2, 16))
        with torch.no_grad():
            expected = model(tokens)
            merge_attention(model)
        model.cfg.qk_rank = 0
        folder = tmp_path / str(len(ffn))
        folder.mkdir()
        save_beside({"config": config.to_dict(model.cfg), "model": model.state_dict(), "step": 0, "val_loss": None,
                     "tokenizer": {"identity": "byte", "blob": torch.zeros(1, dtype=torch.uint8)}},
                    str(folder / "model.pt"))
        (folder / "text.txt").write_text(TEXT)
        for name, how in (("plain", []), ("weighted", [f"--calibrate={folder}/text.txt"])):
            status, out, err = cli("export.py", folder, f"--out_dir={folder}/{name}", "--qk_rank=4", *how,
                                   "--device=cpu")
            assert status == 0 and out.count("relative error") == out.count(": queries") == 3, err
            found, cfg, _ = load(str(folder / name), CPU)
            assert (cfg.qk_rank, cfg.ffn, cfg.rank) == (4, model.cfg.ffn, model.cfg.rank)
            with torch.no_grad():
                torch.testing.assert_close(found(tokens), expected, rtol=0, atol=2e-3 if how else 2e-4)
            assert all(float(e) < 1e-4 for e in re.findall(r"(?:queries|keys) ([\d.]+)", out))
            assert (folder / name / "model.pt").stat().st_size < (folder / "model.pt").stat().st_size


def test_queries_and_keys_that_cannot_be_projected_are_one_sentence(cli, tmp_path):
    keep(tmp_path, tiny())
    (tmp_path / "factored").mkdir()
    keep(tmp_path / "factored", tiny("--qk_rank=4"))
    for folder, rank, words in ((".", 33, ["qk_rank=33", "exceeds 32"]), (".", -1, ["qk_rank=-1", "at least 0"]),
                                ("factored", 4, ["has qk_rank=4", "leave qk_rank=4 out"])):
        status, out, err = cli("export.py", tmp_path / folder, f"--to={tmp_path}/hf", f"--qk_rank={rank}",
                               "--device=cpu")
        assert_one_sentence(status, out, err)
        assert all(word in err for word in words), err


# ----------------------------------------------------------------------------------------------------------------------
# The start of a run

NARROWER = {**STRUCTURES, "narrow": ["--ffn_dim=40"], "narrow lowrank": [*LOWRANK, "--ffn_dim=40"]}


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    """A folder with a dense model of TINY's sizes, whose weights are large: what is left out shows."""
    model = build(configure(*TINY), CPU, seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return keep(tmp_path_factory.mktemp("dense"), model)


def opened(data, *argv):
    cfg = configure(*TINY, f"--data_dir={data}", *argv)
    return cfg, train.open_data(cfg), train.make_plan(cfg)


@torch.no_grad()
def first_loss(model, cfg, plan, files, **how):
    """The loss on the batch of the first step."""
    batch = next(train.batches(cfg, plan, files.train, files.n_windows, range(1), ALONE)).flatten(0, 1)
    return model(batch[:, :-1], batch[:, 1:], **how).item()


@pytest.mark.parametrize("name", [name for name in NARROWER if name != "narrow"])
def test_a_guided_run_begins_at_the_dense_model_and_ends_at_its_factors(name, data, dense_run, tmp_path):
    flags = [*NARROWER[name], f"--init_from={dense_run}", "--guide=fixedstep"]
    cfg, files, plan = opened(data, *flags)
    model, optimizer, step = train.start_or_continue(cfg, plan, ALONE, "new", files)
    source = load(str(dense_run), CPU)[0]
    if "narrow" in name:  # pruned first: the guide is the pruned model
        source = train.start_or_continue(*opened(data, "--ffn_dim=40", flags[-2])[::2], ALONE, "new", files)[0]
    dense, layers = first_loss(source, cfg, plan, files), (1, 2)
    guided = first_loss(model, cfg, plan, files, alpha=torch.ones(()), guided=layers)
    assert guided == pytest.approx(dense, abs=1e-6)
    at_the_switch = first_loss(model, cfg, plan, files, alpha=torch.zeros(()), guided=layers)
    train.end_guide(cfg, plan, ALONE, model, optimizer)
    factors = first_loss(model, cfg, plan, files)
    assert at_the_switch == pytest.approx(factors, abs=1e-6) and abs(factors - dense) > 0.005

    run = train_run(tmp_path / "run", data, *flags, "--lr=1e-30")  # nothing moves but alpha
    rows = [row["loss"] for row in metrics(run) if "loss" in row]
    assert rows[0] == pytest.approx(dense, abs=1e-5)
    last = load(str(run), CPU)[0].state_dict()
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in last.items())


SMALLER = {**NARROWER, "queries and keys": ["--qk_rank=6"], "all": [*LOWRANK, "--ffn_dim=40", "--qk_rank=6"]}


@pytest.mark.parametrize("name", SMALLER)
def test_a_run_from_a_dense_model_starts_where_export_would(name, data, dense_run, cli, tmp_path):
    cfg, files, plan = opened(data, *SMALLER[name], f"--init_from={dense_run}", "--calibrate_tokens=0")
    ours = train.start_or_continue(cfg, plan, ALONE, "new", files)[0].state_dict()
    assert cli("export.py", dense_run, f"--out_dir={tmp_path}/out", *SMALLER[name], "--device=cpu")[0] == 0
    theirs = load(str(tmp_path / "out"), CPU)[0].state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_weights_of_a_start_are_windows_of_the_training_data(data, dense_run):
    cfg, files, plan = opened(data, *LOWRANK, f"--init_from={dense_run}", "--calibrate_tokens=130")
    windows = torch.cat(project.calibration_windows(cfg, files, CPU))
    tokens = torch.from_numpy(files.train.tokens[:4000].astype("int64")).view(-1, 16)
    assert windows.shape == (9, 16) and torch.equal(windows[0], tokens[0]) and torch.equal(windows[-1], tokens[-1])
    assert all((tokens == window).all(1).any() for window in windows)
    ours = train.start_or_continue(cfg, plan, ALONE, "new", files)[0]
    source = load(str(dense_run), CPU)[0]
    project.project_model(source, cfg, windows.split(4))
    for key, t in source.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], t, rtol=0, atol=1e-6)
    plain, losses = configure(*TINY, f"--data_dir={data}", *LOWRANK, f"--init_from={dense_run}",
                              "--calibrate_tokens=0"), []
    for each in (cfg, plain):
        model = train.start_or_continue(each, plan, ALONE, "new", files)[0]
        losses.append(sum(errors_of(model, load(str(dense_run), CPU)[0], windows)))
    assert losses[0] < losses[1]


def test_factors_of_a_pruned_model_are_fitted_to_the_units_that_are_left():
    """In the first layer pruning and projecting at once is the same as one after the other."""
    tokens, models = torch.randint(257, (6, 16)), (tiny(), tiny())
    narrow = dataclasses.replace(models[0].cfg, ffn_dim=40)
    both = dataclasses.replace(narrow, ffn="lowrank", rank=8, n_dense_layers=0)
    for model, steps in zip(models, ([both], [narrow, both])):
        for cfg in steps:
            project.project_model(model, cfg, tokens.split(4))
    at_once, after = (dict(model.blocks[0].ffn.named_parameters()) for model in models)
    for key, t in at_once.items():
        torch.testing.assert_close(t, after[key], rtol=0, atol=1e-4)


@torch.no_grad()
def errors_of(model, dense, windows):
    """Squared errors of the FFNs' outputs on the inputs that the dense model gives them."""
    inputs = {}
    for i, block in enumerate(dense.blocks):
        block.ffn.fc1.register_forward_pre_hook(lambda module, args, i=i: inputs.update({i: args[0]}))
    dense(windows)
    return [(dense.blocks[i].ffn.fc1(x) - model.blocks[i].ffn.fc1(x)).square().sum().item()
            for i, x in inputs.items() if i]


def test_queries_and_keys_of_a_run_with_structured_ffns_are_projected(data, finished):
    cfg, files, plan = opened(data, *LOWRANK, "--qk_rank=6", f"--init_from={finished}", "--guide=fixedstep")
    model, source = train.start_or_continue(cfg, plan, ALONE, "new", files)[0], load(str(finished), CPU)[0]
    for ours, theirs in zip(model.blocks, source.blocks):
        a, b = ours.ffn.state_dict(), theirs.ffn.state_dict()
        assert all(torch.equal(t, a[key]) for key, t in b.items())
        W, D = theirs.attn.qkv.weight, ours.attn.qkv.dense_weight()
        assert torch.equal(W[64:], D[64:])
        assert all(0 < (W[part] - D[part]).norm() < W[part].norm() for part in (slice(0, 32), slice(32, 64)))
    for _, module in model.structured_linears():  # as without a projection
        torch.testing.assert_close(module.W, module.dense_weight())


@pytest.mark.parametrize("qk", [[], ["--qk_rank=6"]])
def test_a_guided_run_from_a_dense_model_resumes_without_it(qk, data, dense_run, tmp_path, monkeypatch, cli):
    source = shutil.copytree(dense_run, tmp_path / "source")
    flags = [*STRUCTURES["blockdense"], *qk, f"--init_from={source}", "--guide=fixedstep", "--optimizer=muon"]
    whole = train_run(tmp_path / "whole", data, *flags)
    with pytest.raises(SystemExit):
        stopped(tmp_path / "run", data, 2, monkeypatch, *flags)
    shutil.rmtree(source)
    status, out, err = cli("train.py", "--resume=auto", f"--out_dir={tmp_path / 'run'}")
    assert (status, err) == (0, "") and "continuing after step 2 of 8" in out
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("flags, words", [
    (["--n_layer=4"], ["blocks.3", "none there", "give that model's --n_layer=3."]),
    (["--act=relu2"], ["act=gelu", "--act=gelu"]),
    (["--ffn_dim=200"], ["ffn.fc1.bias", "(128,) there, (200,) here"]),
    (["--qk_rank=6", "--n_kv_head=1"], ["n_kv_head=2", "--n_kv_head=2"]),
    (["--qk_rank=6", "--attn_dim=64"], ["attn.proj.weight", "(32, 32) there, (32, 64) here", "model's --attn_dim=32."]),
    ([*LOWRANK, "--ffn_dim=200"], ["ffn_dim=128", "this model 200", "--ffn_dim=128 or less"])])
def test_a_dense_model_that_does_not_fit_is_not_projected(flags, words, data, dense_run, monkeypatch):
    structure = [] if "--ffn_dim=200" in flags else LOWRANK
    cfg, files, plan = opened(data, *structure, f"--init_from={dense_run}", *flags)
    monkeypatch.setattr(project, "project_model", None)
    with pytest.raises(UserError) as e:
        train.start_or_continue(cfg, plan, ALONE, "new", files)
    assert all(word in str(e.value) for word in words), e.value


# ----------------------------------------------------------------------------------------------------------------------
# A teacher

TAUGHT = [*LOWRANK, "--optimizer=muon", "--guide=fixedstep", "--distill_share=0.6"]


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(data, dense_run, tmp_path):
    """Guided from the dense weights; and the validation is without teacher."""
    run = train_run(tmp_path / "run", data, *LOWRANK, "--guide=fixedstep", f"--init_from={dense_run}",
                    f"--distill={dense_run}", "--lr=1e-30")
    rows = metrics(run)
    assert abs(rows[0]["loss"]) < 1e-6 and rows[0]["grad_norm"] < 1e-4 and rows[7]["loss"] > 0.01
    plain = train_run(tmp_path / "plain", data, *LOWRANK, f"--init_from={dense_run}", "--lr=1e-30")
    assert metrics(plain)[-1]["val_loss"] == rows[-1]["val_loss"] > 1


def test_a_step_with_a_teacher_has_the_loss_of_torchs_divergence(data, dense_run, tmp_path):
    run = train_run(tmp_path / "run", data, *LOWRANK, f"--distill={dense_run}", "--distill_share=0.3", "--seed=4")
    cfg, files, plan = opened(data, *LOWRANK, "--seed=4")
    batch = next(train.batches(cfg, plan, files.train, files.n_windows, range(1), ALONE)).flatten(0, 1)
    x, y = batch[:, :-1], batch[:, 1:].flatten()
    student, teacher = build(cfg, CPU, seed=4).double(), load(str(dense_run), CPU)[0].double()
    with torch.no_grad():
        q, p = (model(x).flatten(0, 1).log_softmax(1) for model in (student, teacher))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    expected = 0.3 * kl + 0.7 * torch.nn.functional.nll_loss(q, y)
    assert metrics(run)[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert load(str(run), CPU)[0].state_dict().keys() == student.state_dict().keys()


@pytest.mark.parametrize("rank", [0, 6])
def test_queries_and_keys_of_another_rank_do_not_fit(rank, data, tmp_path):
    run = train_run(tmp_path / "run", data, "--qk_rank=8")
    cfg, files, plan = opened(data, f"--qk_rank={rank}", f"--init_from={run}")
    with pytest.raises(UserError, match=f"has qk_rank=8, this model {rank}: .* give --qk_rank=8"):
        train.start_or_continue(cfg, plan, ALONE, "new", files)
    kept, *_ = train.start_or_continue(*opened(data, "--qk_rank=8", "--ffn_dim=40", f"--init_from={run}")[::2], ALONE,
                                       "new", files)
    assert torch.equal(kept.blocks[1].attn.qkv.q.V, load(str(run), CPU)[0].blocks[1].attn.qkv.q.V)


@pytest.mark.parametrize("qk", [[], ["--qk_rank=6"]])
def test_a_taught_run_resumes_and_accumulates(qk, data, dense_run, tmp_path, monkeypatch):
    flags = [*TAUGHT, *qk, f"--distill={dense_run}", f"--init_from={dense_run}"]
    whole = train_run(tmp_path / "whole", data, *flags)
    with pytest.raises(SystemExit):
        stopped(tmp_path / "run", data, 3, monkeypatch, *flags)
    assert_same_run(train_run(tmp_path / "run", data, *flags, "--resume=auto"), whole)
    split = train_run(tmp_path / "split", data, *flags, "--micro_batch_size=2")
    a, b = ([row["loss"] for row in metrics(run) if "loss" in row] for run in (whole, split))
    assert a == pytest.approx(b, abs=2e-5)


def test_a_run_is_not_continued_with_another_teacher(data, dense_run, tmp_path, monkeypatch):
    """Such as one that has trained on meanwhile."""
    teacher = shutil.copytree(dense_run, tmp_path / "teacher")
    flags = [*LOWRANK, f"--distill={teacher}", "--resume=auto"]
    with pytest.raises(SystemExit):
        stopped(tmp_path / "run", data, 3, monkeypatch, *flags)
    kept = (teacher / "model.pt").read_bytes()
    saved = torch.load(teacher / "model.pt", weights_only=True)
    saved["model"]["wte.weight"][0, 0] += 1
    torch.save(saved, teacher / "model.pt")
    with pytest.raises(UserError, match="holds other weights than when the run in .* was saved"):
        train_run(tmp_path / "run", data, *flags)
    (teacher / "model.pt").write_bytes(kept)
    assert metrics(train_run(tmp_path / "run", data, *flags))[-1]["step"] == 8


def test_the_teachers_file_is_read_once(data, dense_run, tmp_path, monkeypatch):
    """The checksum is that of its weights in float32, in whatever precision they are kept."""
    saved, read, real = torch.load(dense_run / "model.pt", weights_only=True), [], checkpoint.check_archive
    saved["model"] = {name: t.bfloat16() for name, t in saved["model"].items()}
    torch.save(saved, tmp_path / "half.pt")
    monkeypatch.setattr(checkpoint, "check_archive", lambda path: read.append(path) or real(path))
    run = train_run(tmp_path / "run", data, *LOWRANK, f"--distill={tmp_path / 'half.pt'}")
    assert read == [str(tmp_path / "half.pt")]
    kept = b"".join(p.detach().numpy().tobytes() for p in load(str(tmp_path / "half.pt"), CPU)[0].parameters())
    assert torch.load(run / "ckpt.pt", weights_only=True)["teacher"] == zlib.crc32(kept)
    assert json.loads((run / "config.json").read_text())["teacher_flops"] > 0


def test_a_finished_run_needs_no_teacher(data, dense_run, cli, tmp_path):
    teacher = shutil.copytree(dense_run, tmp_path / "teacher")
    run = train_run(tmp_path / "run", data, *LOWRANK, f"--distill={teacher}")
    shutil.rmtree(teacher)
    status, out, err = cli("train.py", "--resume=auto", f"--out_dir={run}")
    assert (status, err) == (0, "") and "holds a finished run" in out


def test_the_teachers_forwards_are_among_the_training_flops(data, dense_run, cli):
    shape = [*TINY, *LOWRANK, f"--data_dir={data}", "--guide=fixedflop", "--guide_ratio=0.5"]
    said = {}
    for name, flags in (("alone", shape), ("taught", [*shape, f"--distill={dense_run}"]),
                        ("dense", [*TINY, f"--data_dir={data}"])):
        status, out, err = cli("train.py", *flags, "--dry_run=True")
        assert status == 0, err
        said[name] = json.loads(out)
    phases = said["taught"]["train_flops_by_phase"]
    teacher = said["dense"]["flops_per_token"] * said["taught"]["tokens"]
    assert phases == {**said["alone"]["train_flops_by_phase"], "teacher": pytest.approx(teacher, rel=1e-5)}
    assert said["taught"]["train_flops"] == pytest.approx(said["alone"]["train_flops"] + teacher, rel=1e-5)


@pytest.mark.parametrize("flags, words", [
    (["--vocab_size=300"], ["vocab_size=257", "300"]), (["--block_size=32"], ["block_size=16", "32"])])
def test_a_teacher_of_other_sizes_is_refused(flags, words, data, dense_run, tmp_path):
    with pytest.raises(UserError, match=".*".join(words)):
        train_run(tmp_path / "run", data, f"--distill={dense_run}", *flags)


def test_a_teacher_that_is_not_there_is_refused_without_torch(without_torch):
    status, out, err = without_torch("train.py", *TINY, "--distill=nowhere")
    assert_one_sentence(status, out, err)
    assert "distill=nowhere does not exist" in err
