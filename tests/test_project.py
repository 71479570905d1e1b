"""project: the nearest structured matrix, against singular values, gradient descent and structured matrices."""
import re

import pytest
import torch

import config
import project
from conftest import STRUCTURES, assert_one_sentence, dense_oracle, train_run
from merge import replace_structured
from model import build, load
from run import save_beside
from structured import linear

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
    assert weighted <= plain * (1 + 1e-9) and (weighted < 0.96 * plain or plain < 1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_of_low_rank_and_of_zeros_leave_no_nan(shape):
    for W in (torch.zeros(shape[2], shape[1], dtype=torch.float64), random(shape[2], 1) @ random(1, shape[1])):
        for D in (nearest(W, shape), nearest(W, shape, moments(shape[1]))):
            assert D.isfinite().all() and (shape[0] == "blockshuffle" or (D - W).abs().max() < 1e-9)


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
         "learned": ["--pos=absolute", "--act=relu2"]}


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


def test_the_moments_are_those_of_the_inputs_in_the_whole_model(monkeypatch):
    model = tiny("--pos=absolute")
    seen, tokens = {}, torch.randint(257, (6, 16))

    def listen(key):
        def hook(module, inputs):
            seen[key] = inputs[0].flatten(0, 1).double()
        return hook

    hooks = [fc.register_forward_pre_hook(listen((i, name)))
             for i, block in enumerate(model.blocks) for name, fc in block.ffn.named_children()]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    given = []

    def projected(dense, cfg, C):
        given.append(C)
        return dense, [0.0]

    monkeypatch.setattr(project, "projected", projected)
    with torch.no_grad():
        project.project_model(model, model.cfg, tokens.split(4))
    expected = [seen[layer, name].T @ seen[layer, name] for layer in (1, 2) for name in ("fc1", "fc2")]
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
    assert "projected onto the FFN" in card and "loss" not in card and "FLOPs" not in card


def test_a_projected_model_goes_out_merged(cli, tmp_path):
    """Straight to --to: the same weights as by way of a model.pt."""
    from safetensors.torch import load_file
    keep(tmp_path / "dense", tiny())
    projection = [*STRUCTURES["blockdense"], "--device=cpu"]
    assert cli("export.py", tmp_path / "dense", f"--to={tmp_path}/straight", *projection)[0] == 0
    assert cli("export.py", tmp_path / "dense", f"--out_dir={tmp_path}/model", *projection)[0] == 0
    assert cli("export.py", tmp_path / "model", f"--to={tmp_path}/around")[0] == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "around"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    card = (tmp_path / "straight" / "README.md").read_text()
    assert "blockdense rank=8 nblocks=2" in card and "merged" in card
