"""bench, report, curves: numbers that agree with each other and with independent counts; known power laws; mistakes."""
import dataclasses
import itertools
import json
import math
import os
import shutil
import time
import types
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import config
import curves
import device
import model
import report
import train
from bench import CASES, Settings, compared, timed, with_case
from config import Config
from conftest import LOWRANK, ROOT, assert_one_sentence
from model import FFN, GPT
from structured import linear

CPU = torch.device("cpu")
FAST = ["--repeats=2", "--warmup=1", "--device=cpu"]
SMALL = ["--n_layer=2", "--n_embd=32", "--n_head=2", "--block_size=16", "--vocab_size=64", "--micro_batch_size=2",
         "--batch_size=2", *FAST]
PASSES = {"forward": 1, "forward+backward": 3}  # times the forward's FLOPs


def near(value):
    return pytest.approx(value, rel=1e-6)


@pytest.fixture
def rows(cli, tmp_path):
    """rows(command, *arguments) runs it with --json and --plot -> the JSON rows, the picture being there."""
    def run(*argv):
        out, picture = tmp_path / "rows.jsonl", tmp_path / "picture.png"
        status, stdout, stderr = cli("bench.py", *argv, f"--json={out}", f"--plot={picture}")
        assert status == 0, stderr
        found = [json.loads(line, parse_constant=pytest.fail) for line in out.read_text().splitlines()]
        assert "nan" not in stdout
        if argv[0] == "prefill" and all(r["ffn"] == "dense" for r in found if "note" not in r):
            assert f"no picture: {picture}" in stdout and not picture.exists()  # a ratio to dense needs a structure
        else:
            assert picture.read_bytes().startswith(b"\x89PNG")
            picture.unlink()
        return found
    return run


def multiply_adds(ffn, n, m, rank, blocks):
    """The paper's table, matrix by matrix."""
    smaller = min(n, m)
    return {"dense": n * m, "lowrank": rank * n + m * rank, "blockdense": rank * n // max(blocks, 1) + m * rank,
            "blockshuffle": smaller * n // max(blocks, 1) + m * smaller // max(blocks, 1)}[ffn]


# ----------------------------------------------------------------------------------------------------------------------
# What is compared

@pytest.mark.parametrize("width, ranks", [
    (768, {"lowrank63": (384, 0), "lowrank32": (192, 0), "blockdense63": (512, 2), "blockdense32": (256, 2)}),
    (1024, {"lowrank63": (512, 0), "lowrank32": (256, 0), "blockdense63": (768, 4), "blockdense32": (384, 4)}),
    (1536, {"lowrank63": (768, 0), "lowrank32": (384, 0), "blockdense63": (1024, 2), "blockdense32": (512, 2)}),
    (2048, {"lowrank63": (1024, 0), "lowrank32": (512, 0), "blockdense63": (1536, 4), "blockdense32": (768, 4)})])
def test_cases_are_the_papers(width, ranks):
    for case, expected in {**ranks, "blockshuffle63": (0, 2), "blockshuffle32": (0, 4)}.items():
        cfg = with_case(Config(n_embd=width, ffn_dim=4 * width, n_head=8), case)
        assert (cfg.ffn, cfg.rank, cfg.nblocks) == (case[:-2], *expected)


@pytest.mark.parametrize("width", bench.GPU_SWEEP[0][0] + bench.GPU_SWEEP[1][0])
def test_every_case_fits_every_width_of_the_sweeps(width):
    cfg, = config.load([])
    cases = compared(cfg, Settings(), width)
    assert list(cases)[0] == "dense" and len(cases) == len(CASES)
    for label, case in cases.items():
        assert case.n_embd == width and case.ffn_dim == 4 * width
        with torch.device("meta"):
            weights = sum(p.numel() for p in FFN(case, case.ffn).parameters() if p.dim() > 1)
        expected = 1 if label == "dense" else {"63 %": 0.61, "32 %": 0.305}[label[-4:]]
        assert weights / (8 * width**2) == pytest.approx(expected, abs=0.03)


def test_the_command_lines_own_ffn_stands_beside_dense():
    cfg, = config.load(["--n_embd=32", "--n_head=2", *LOWRANK, "--guide=fixedstep"])
    cases = compared(cfg, Settings())
    assert {label: case.guide for label, case in cases.items()} == {"dense": "off", "lowrank R=8": "fixedstep"}
    assert list(cases)[0] == "dense"
    assert list(compared(cfg, Settings(cases="lowrank32,dense"))) == ["dense", "lowrank 32 %"]


# ----------------------------------------------------------------------------------------------------------------------
# Timing and what is timed

def test_timed_measures_a_known_sleep():
    pauses = iter([0.2] + [0.02, 0.03, 0.04] * 3)  # the first is warm-up
    median, spread = timed(lambda: time.sleep(next(pauses)), CPU, Settings(repeats=9, warmup=1))
    assert 30 <= median < 38 and 15 <= spread < 30


def test_a_copy_counts_bytes_read_and_written(monkeypatch):
    monkeypatch.setattr(report, "timed", lambda run, device, settings: (run() is None, 2.0, 0.0)[1:])
    assert report.copy_rate(CPU, Settings()) == pytest.approx(2 * 2**22 * 4 / 2e-3 / 1e9)


@pytest.mark.parametrize("case", [case for case in CASES if case != "dense"])
@pytest.mark.parametrize("n, m", [(32, 128), (128, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_einsum_bmm_and_ours_are_one_map(case, n, m, bias):
    cfg = with_case(Config(n_embd=32, ffn_dim=128, n_head=2), case)
    module = linear(cfg.ffn, n, m, cfg.rank, cfg.nblocks, bias).double()
    if bias:
        torch.nn.init.normal_(module.bias)
    x = torch.randn(5, n, dtype=torch.float64)
    expected = torch.nn.functional.linear(x, module.dense_weight(), module.bias)
    for call in (bench.by_einsum, bench.by_bmm, bench.ours):
        torch.testing.assert_close(call(module, x), expected)


def test_copies_take_turns_and_nothing_is_zero(monkeypatch):
    ranks = train.set_up(config.load(["--device=cpu"])[0])
    turns = bench.copies(lambda: linear("lowrank", 32, 64, 8), 5, 32, 64, ranks)
    assert len(turns) == 2
    tensors = [t for module, x, dy in turns for t in (*module.parameters(), x, dy)]
    assert len({t.data_ptr() for t in tensors}) == len(tensors) and all((t != 0).all() for t in tensors)
    seen = []
    settings = Settings(repeats=3, warmup=1)
    for name, ms, spread, eager in bench.time_passes(lambda m, x: seen.append(x) or m(x), turns, ranks, settings):
        assert ms > 0 and spread >= 0 and eager is None
    assert [id(x) for x in seen] == [id(turns[i % 2][1]) for i in range(16)]
    monkeypatch.setattr(bench, "timed", lambda turn, device, settings: (8.0, 2.0))  # of both copies
    assert [row[1:] for row in bench.time_passes(bench.ours, turns, ranks, settings)] == 2 * [(4.0, 1.0, None)]


# ----------------------------------------------------------------------------------------------------------------------
# The tables

def check_speeds(found):
    """Time, FLOP/s, floors and ratios of kernel's and ffn's rows agree."""
    for r in found:
        assert r["tflops"] * 1e12 * r["ms"] / 1e3 == near(r["flops"])
        assert r["floor_ms"] == near(r["flops"] / r["matmul_tflops"] / 1e9)
        assert r["of_matmul"] == near(r["tflops"] / r["matmul_tflops"])
        assert r["over_floor"] == near(r["ms"] / max(r["floor_ms"], r["bytes_ms"]))
        same = ("linear", "width", "tokens", "pass")
        dense, = [d for d in found if d["ffn"] == "dense" and all(d.get(k) == r.get(k) for k in same)]
        assert r["speedup"] == near(dense["ms"] / r["ms"])
        assert r["device"] == "cpu" and r["dtype"] == "float32" and r["torch"] == torch.__version__ and r["commit"]


def test_kernel(rows):
    found = rows("kernel", "--widths=32", "--tokens=24", *FAST)
    assert len(found) == 2 * 2 * (1 + 6 * 3)  # passes, linears, dense and six structures three ways
    assert {r["by"] for r in found if r["ffn"] != "dense"} == {"einsum", "bmm", "ours"}
    for r in found:
        n, m = (32, 128) if r["linear"] == "fc1" else (128, 32)
        forward = 2 * 24 * multiply_adds(r["ffn"].split()[0], n, m, r["rank"], r["nblocks"])
        assert r["flops"] == forward * PASSES[r["pass"]]
        weights = r["flops"] / PASSES[r["pass"]] / 48 + m
        moved = weights + 24 * (n + m) if r["pass"] == "forward" else 3 * weights + 24 * (3 * n + 2 * m)
        assert r["bytes_ms"] == near(4 * moved / r["copy_tb_per_s"] / 1e9)
    check_speeds(found)


@pytest.mark.parametrize("act, cases", [("gelu", CASES), ("swiglu", ("dense", "blockshuffle32", "blockdense63"))])
def test_ffn(rows, act, cases):
    found = rows("ffn", "--widths=32,64", "--tokens=1,24", f"--act={act}", f"--cases={','.join(cases)}", *FAST)
    assert len(found) == 2 * 2 * 2 * len(cases)
    for r in found:
        width = r["width"]
        cfg = Config(n_embd=width, ffn_dim=4 * width, ffn=r["ffn"].split()[0], rank=r["rank"], nblocks=r["nblocks"],
                     act=act)
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            FFN(cfg, cfg.ffn)(torch.empty(r["tokens"], width))
        assert r["flops"] == counter.get_total_flops() * PASSES[r["pass"]]
    check_speeds(found)


def test_ffn_measures_the_presets_width(rows):
    found = rows("ffn", "--n_embd=64", "--n_head=2", "--tokens=8", "--cases=dense,lowrank32", *FAST)
    assert {r["width"] for r in found} == {64}


def test_copies_share_one_compilation_per_pass(rows, monkeypatch):
    graphs = []
    backend = lambda graph, inputs: graphs.append(graph) or graph
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    found = rows("ffn", "--widths=32", "--tokens=8,16", "--cases=dense,blockshuffle32", "--compile=True", *FAST)
    assert len(graphs) == len(found) == 8 and all(r["compile"] for r in found)
    check_speeds(found)


@pytest.mark.parametrize("guide", ["off", "fixedstep"])
def test_train(rows, guide):
    found = rows("train", *SMALL, *LOWRANK, f"--guide={guide}")
    expected = [("dense", False), ("lowrank R=8", False), ("lowrank R=8", True)][:2 if guide == "off" else 3]
    assert [(r["ffn"], r["guided"]) for r in found] == expected
    for r in found:
        assert r["tokens_per_s"] == pytest.approx(2 * 16 / r["ms"] * 1e3, abs=0.51)
        assert r["forward_ms"] + r["backward_ms"] + r["optimizer_ms"] == near(r["ms"])
        assert r["speedup"] == near(found[0]["ms"] / r["ms"])
        assert r["mfu"] is None and r["gib"] is None
        assert r["flops_per_token"] == (found[0] if r["guided"] else r)["flops_per_token"]
    # by hand: qkv and proj, scores and values, the FFNs (layer 0 dense), the head; forward and backward
    blocks = 2 * (4 * 32 * 32 + 2 * 16 * 32) + 64 * 32
    dense, structured = 2 * 2 * 32 * 128, 2 * 32 * 128 + 2 * 8 * (32 + 128)
    assert [r["flops_per_token"] for r in found[:2]] == [6 * (blocks + dense), 6 * (blocks + structured)]


def test_parts_of_a_step_add_up(rows, monkeypatch):
    """Of a forward that takes longer each time: the parts are of later steps than the time of a whole one."""
    forward, calls = GPT.forward, itertools.count(1)

    def slower(self, *inputs):
        time.sleep(0.01 * next(calls))
        return forward(self, *inputs)

    monkeypatch.setattr(GPT, "forward", slower)
    r, = rows("train", *SMALL, "--cases=dense")
    assert next(calls) == 1 + 4 + 1 + 2 + 1 + 2 and min(r["forward_ms"], r["backward_ms"], r["optimizer_ms"]) > 0
    assert r["forward_ms"] + r["backward_ms"] + r["optimizer_ms"] == near(r["ms"]) and 50 < r["forward_ms"] < r["ms"]


def test_train_beside_plain_torch(rows):
    found = rows("train", *SMALL, *LOWRANK, "--plain=True")
    assert [r["ffn"] for r in found] == ["dense", "dense, plain", "lowrank R=8", "lowrank R=8, plain"]
    assert all(ours["flops_per_token"] == plain["flops_per_token"] for ours, plain in (found[:2], found[2:]))


def test_plain_torch_is_the_same_model_and_runs_without_our_kernels(monkeypatch):
    cfg = Config(n_layer=2, n_embd=32, n_head=2, block_size=16, vocab_size=64, ffn="lowrank", rank=8)
    config.check(cfg)
    gpt, tokens = GPT(cfg).init_weights(), torch.randint(64, (2, 17))
    loss, optimizer = bench.plain_torch(gpt, cfg, device.Ranks(0, 1, CPU, torch.float32, False))
    torch.testing.assert_close(loss(tokens[:, :-1], tokens[:, 1:]), gpt(tokens[:, :-1], tokens[:, 1:]))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in gpt.parameters()]
    seen = []

    def train_row(row, *_):
        seen.append((row["ffn"], bench.ops.ON))
        if len(seen) == 2:
            raise RuntimeError("out of memory")
    monkeypatch.setattr(bench.ops, "ON", True)
    monkeypatch.setattr(bench, "train_row", train_row)
    _, cfg, settings = bench.read_settings(["train", *SMALL, *LOWRANK, "--plain=True"])
    bench.bench_train(cfg, settings)
    assert seen == [("dense", True), ("dense, plain", False), ("lowrank R=8", True), ("lowrank R=8, plain", False)]
    assert bench.ops.ON is True


def test_train_cases(rows):
    expected = ["dense", "lowrank 32 %", "blockshuffle 32 %", "blockdense 32 %"]
    assert [r["ffn"] for r in rows("train", *SMALL)] == expected


def test_prefill(rows):
    found = rows("prefill", *SMALL, *LOWRANK, "--tokens=4,24", "--batches=1,3")
    assert len(found) == 2 * 2 * 2
    for r in found:
        cfg = dataclasses.replace(config.from_dict(r["config"]), block_size=r["prompt"])
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model = GPT(cfg)
            model.head(model.hidden(torch.zeros(r["batch"], r["prompt"], dtype=torch.long))[:, -1])
        assert r["flops"] == counter.get_total_flops()
        assert r["tflops"] * 1e12 * r["ms"] / 1e3 == near(r["flops"])
        assert r["tokens_per_s"] == pytest.approx(r["batch"] * r["prompt"] / r["ms"] * 1e3, abs=0.51)
        dense, = [d for d in found if d["ffn"] == "dense" and (d["batch"], d["prompt"]) == (r["batch"], r["prompt"])]
        assert r["speedup"] == near(dense["ms"] / r["ms"])


# ----------------------------------------------------------------------------------------------------------------------
# Curves

def write_run(folder, losses=lambda flops: 3 + flops * 0, stop=None, rate=1000.0, **settings):
    """A run's folder of 16 steps x 64 tokens, unless settings differ.

    losses(cumulative FLOPs) is its validation loss, every 4 steps. The training loss is 0.1 above it.
    """
    cfg = Config(**{"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 16, "batch_size": 4, "micro_batch_size": 4,
                    "vocab_size": 64, "max_tokens": 1024, **settings})
    config.check(cfg)
    plan = train.make_plan(cfg)
    values = losses(np.cumsum(curves.step_flops(cfg, plan)))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict(cfg)))
    with open(folder / "metrics.jsonl", "w") as f:
        for step in range(1, (stop or plan.steps) + 1):
            row = {"step": step, "tokens": step * 64, "loss": values[step - 1] + 0.1,
                   "tokens_per_s": rate * (1 + step % 2)}
            f.write(json.dumps(row) + "\n")
            if step % 4 == 0 or step == plan.steps:
                f.write(json.dumps({"step": step, "val_loss": values[step - 1]}) + "\n")
    return str(folder)


@pytest.mark.parametrize("guide", [{}, {"guide": "fixedstep"}, {"guide": "fixedflop"},
                                   {"guide": "fixedflop", "guide_skip": True, "guide_ratio": 0.4}])
def test_step_flops_sum_to_the_phases_of_train(guide):
    cfg = Config(n_layer=3, n_embd=32, n_head=2, block_size=16, batch_size=4, micro_batch_size=4, vocab_size=64,
                 max_tokens=4096, ffn="lowrank", rank=8, **guide)
    config.check(cfg)
    plan, phases = train.make_plan(cfg), train.train_flops(cfg, train.make_plan(cfg))
    steps = curves.step_flops(cfg, plan)
    assert len(steps) == plan.steps
    assert steps[:plan.guided].sum() == near(phases["guided"])
    assert steps[plan.guided:plan.unique].sum() == near(phases["plain"])
    assert steps[plan.unique:].sum() == near(phases["replay"])


def slope_and_error(x, y):
    """Least squares by the textbook's sums."""
    dx = np.asarray(x) - np.mean(x)
    slope = (dx * y).sum() / (dx**2).sum()
    rest = np.asarray(y) - np.mean(y) - slope * dx
    return slope, math.sqrt((rest**2).sum() / (len(x) - 2) / (dx**2).sum())


def test_power_laws_of_runs_are_recovered_per_method(rows, tmp_path):
    """Three sizes, two methods with a power law each, two seeds; exact for dense, a known disturbance for lowrank."""
    paths = []
    for width in (32, 64, 96):
        for seed in (1, 2):
            paths.append(write_run(tmp_path / f"dense{width}-{seed}", lambda c: 50 * c**-0.07, n_embd=width, seed=seed))
            factor = 1 + 0.01 * (1 if seed == 1 else -1)
            paths.append(write_run(tmp_path / f"low{width}-{seed}", lambda c: factor * 60 * c**-0.08, n_embd=width,
                                   seed=seed, ffn="lowrank", rank=width // 4))
    found = rows("curves", *paths)
    runs = [r for r in found if r["benchmark"] == "curves"]
    fits = {r["method"]: r for r in found if r["benchmark"] == "scaling"}
    assert len(runs) == 12 and set(fits) == {"dense", "lowrank 32 %"} and all(f["runs"] == 6 for f in fits.values())
    assert fits["dense"]["slope"] == near(-0.07) and fits["dense"]["std_error"] < 1e-12
    assert fits["dense"]["at_1e18"] == near(50 * 1e18**-0.07)
    low = [r for r in runs if r["method"] == "lowrank 32 %"]
    slope, error = slope_and_error(*(np.log([r[name] for r in low]) for name in ("flops", "val_loss")))
    assert fits["lowrank 32 %"]["slope"] == near(slope) == pytest.approx(-0.08, abs=1e-3)
    assert fits["lowrank 32 %"]["std_error"] == near(error) and 1e-4 < error < 1e-2
    for r in runs:
        size, seed = r["run"].split()[0], int(r["run"][-1])
        dense = [d["val_loss"] for d in runs if d["run"].startswith(f"{size} dense")]
        assert r["to_dense"] == pytest.approx(r["val_loss"] - sum(dense) / 2, abs=1e-9) and seed in (1, 2)
        cfg = config.from_dict(json.loads((tmp_path / r["path"] / "config.json").read_text()))
        assert r["flops"] == near(sum(train.train_flops(cfg, train.make_plan(cfg)).values())) and r["tokens"] == 1024


def test_two_runs_have_a_slope_and_no_error(tmp_path):
    paths = [write_run(tmp_path / str(width), lambda c: 50 * c**-0.07, n_embd=width) for width in (32, 64)]
    runs = [curves.read_run(path) for path in paths]
    curves.name_runs(runs)
    fit, = curves.fit_scaling(runs)
    assert fit["slope"] == near(-0.07) and fit["std_error"] is None and fit["runs"] == 2


def test_the_table_of_runs_is_short_and_signed(cli, tmp_path):
    dense = write_run(tmp_path / "a", lambda c: 3 + 0 * c, max_tokens=64 * 20000, eval_interval=4)
    low = write_run(tmp_path / "b", lambda c: 3.25 + 0 * c, max_tokens=64 * 20000, ffn="lowrank", rank=8)
    _, stdout, _ = cli("bench.py", "curves", dense, low)
    lines = stdout.splitlines()
    assert lines[0].startswith("A run per line: steps finished and planned")
    row, = [line.split() for line in lines if line.lstrip().startswith("lowrank")]
    assert row[3:6] == ["20000", "20000", "1.28M"] and row[-3:] == ["3.350", "3.250", "+0.250"]


def test_the_gap_is_to_dense_with_the_same_seed(tmp_path):
    scale = {"dense": (50, 51, None), "lowrank": (60, 63, 66)}  # of seeds 1, 2, 3
    runs = []
    for ffn, factors in scale.items():
        for seed, factor in enumerate(filter(None, factors), 1):
            path = write_run(tmp_path / f"{ffn}{seed}", lambda c: factor * c**-0.07, seed=seed, ffn=ffn,
                             rank=8 * (ffn == "lowrank"))
            runs.append(curves.read_run(path))
    curves.name_runs(runs)
    dense = [r.final for r in runs[:2]]
    gaps = [0, 0, *(r.final - d for r, d in zip(runs[2:], [*dense, sum(dense) / 2]))]
    assert [curves.gap_to_dense(r, runs) for r in runs] == near(gaps)


def test_seconds_are_tokens_over_the_logged_rates(tmp_path):
    run = curves.read_run(write_run(tmp_path / "run"))
    assert run.axes["seconds"] == pytest.approx(np.cumsum([64 / 2000, 64 / 1000] * 8))
    assert run.axes["tokens"].tolist() == list(range(64, 1025, 64))


def test_labels_are_the_differing_settings(tmp_path):
    low, shuffle = {"ffn": "lowrank", "rank": 8}, {"ffn": "blockshuffle", "nblocks": 2, "lr": 1e-4}
    settings = {"a": {}, "b": {"ffn_dim": 64}, "c": low, "d": {**low, "guide": "fixedstep"},
                "e": {**low, "guide": "fixedstep", "guide_skip": True}, "f": {**low, "max_tokens": 1536},
                "g": shuffle, "h": {**shuffle, "eval_interval": 7}}
    runs = [curves.read_run(write_run(tmp_path / name, **s)) for name, s in settings.items()]
    curves.name_runs(runs)
    lr = "lr=0.0006"
    assert [r.label for r in runs] == [
        f"dense {lr}", f"dense {lr} inner 2 x width", f"lowrank 32 % {lr}", f"lowrank 32 % fixedstep {lr}",
        f"lowrank 32 % fixedstep guide_skip=True {lr}", f"lowrank 32 % {lr} 1.50 x tokens",
        f"blockshuffle 63 % lr=0.0001 ({tmp_path}/g)", f"blockshuffle 63 % lr=0.0001 ({tmp_path}/h)"]
    assert [curves.gap_to_dense(r, runs) is None for r in runs] == [False] * 6 + [True] * 2  # no dense run with that lr
    alone = [runs[0]]
    curves.name_runs(alone)
    assert alone[0].label == "dense"


def test_settings_too_long_for_a_label_stand_once_above_the_table(cli, rows, tmp_path):
    """Unlike runs, as of a preset with and without the recipe, two structures each: the labels stay short."""
    low = {"ffn": "lowrank", "rank": 8}
    recipe = {"norm": "rmsnorm", "act": "relu2", "bias": False, "qk_norm": 1.2, "embed_norm": True, "smear": True,
              "logit_softcap": 15.0, "init": "zero", "schedule": "linear", "grad_clip": 0.0, "data_dir": "d" * 130}
    paths = [write_run(tmp_path / name, **s) for name, s in {"a": {}, "b": low, "c": recipe, "d": recipe | low}.items()]
    lines = cli("bench.py", "curves", *paths)[1].splitlines()
    first, second = (next(i for i, line in enumerate(lines) if line.startswith(f"settings {n}: ")) for n in (1, 2))
    table = next(i for i, line in enumerate(lines) if line.split()[:1] == ["run"])
    plain, other = " ".join(lines[first:second]).split(), " ".join(lines[second:table - 1]).split()
    assert {"norm=layernorm", "smear=False", "data_dir="} < {*plain} and len(plain) == len(other) == 2 + len(recipe)
    assert {f"{name}={value}" for name, value in recipe.items()} < {*other}
    assert all(len(line) <= 120 for line in lines[second - 1:second] + lines[table:])
    found = rows("curves", *paths)
    assert [r["run"] for r in found] == ["dense settings 1", "lowrank 32 % settings 1", "dense settings 2",
                                         "lowrank 32 % settings 2"]
    assert [r["to_dense"] for r in found] == [0] * 4 and found[0]["settings"] == " ".join(plain[2:])


def test_the_rules_own_rates_for_structures_keep_none_from_its_dense_run(tmp_path):
    muon, low = {"optimizer": "muon", "lr": "auto", "weight_decay": "auto"}, {"ffn": "lowrank", "rank": 8}
    settings = {"a": muon, "b": muon | low, "c": muon | low | {"lr": 0.01}}
    runs = [curves.read_run(write_run(tmp_path / name, **s)) for name, s in settings.items()]
    assert runs[0].cfg.lr > runs[1].cfg.lr and runs[0].cfg.weight_decay < runs[1].cfg.weight_decay
    curves.name_runs(runs)
    assert [r.label for r in runs] == ["dense lr=auto", "lowrank 32 % lr=auto", "lowrank 32 % lr=0.01"]
    assert [curves.gap_to_dense(r, runs) for r in runs] == [0, 0, None]


def test_a_label_names_a_teacher_where_there_is_one(tmp_path):
    low, half = {"ffn": "lowrank", "rank": 8}, {"distill": "teacher", "distill_share": 0.5}
    settings = {"a": {}, "b": low, "c": half, "d": low | half, "e": low | {"distill": "other"}}
    runs = [curves.read_run(write_run(tmp_path / name, **s)) for name, s in settings.items()]
    curves.name_runs(runs)
    taught = "distill=teacher distill_share=0.5"
    assert [r.label for r in runs] == ["dense", "lowrank 32 %", f"dense {taught}", f"lowrank 32 % {taught}",
                                       "lowrank 32 % distill=other distill_share=1.0"]
    assert [curves.gap_to_dense(r, runs) for r in runs] == [0, 0, 0, 0, None]


def test_what_differs_at_one_size_is_named_at_all(tmp_path):
    low = {"ffn": "lowrank", "rank": 8, "guide": "fixedstep"}
    settings = {"a": low, "b": {**low, "guide_skip": True}, "c": {**low, "guide_skip": True, "n_embd": 64, "rank": 16}}
    runs = [curves.read_run(write_run(tmp_path / name, **s)) for name, s in settings.items()]
    dense = dataclasses.replace(runs[0].cfg, ffn="dense", rank=0, guide="off", guide_skip=True)
    runs.append(dataclasses.replace(runs[0], cfg=dense))
    curves.name_runs(runs)
    skipping = "lowrank 32 % fixedstep guide_skip=True"
    assert [r.method for r in runs] == ["lowrank 32 % fixedstep", skipping, skipping, "dense"]
    assert runs[0].baseline == "dense"


def test_unfinished_runs_are_shown_as_far_as_they_go(cli, rows, tmp_path):
    done, going = write_run(tmp_path / "done"), write_run(tmp_path / "going", stop=10, ffn="lowrank", rank=8)
    with open(tmp_path / "going" / "metrics.jsonl", "a") as f:
        f.write('{"step": 11, "los')  # being written
    found = {r["path"]: r for r in rows("curves", done, going)}
    assert [found[going][name] for name in ("step", "steps", "tokens", "to_dense")] == [10, 16, 640, None]
    assert found[done]["to_dense"] == 0
    _, stdout, _ = cli("bench.py", "curves", done, going)
    assert f"{going} has finished 10 of 16 steps: differences and fits leave it out" in stdout
    assert f"{done} has" not in stdout


@pytest.mark.parametrize("answer, shown", [("echo 1980 MHz", "1980 MHz"), ("exit 9", "n/a"), ("true", "n/a"),
                                           (None, "n/a")])
def test_clocks_are_those_of_the_card_itself_or_not_known(tmp_path, monkeypatch, answer, shown):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="123-abc"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if answer else str(tmp_path))
    if answer:
        (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\n[ "$1" = --id=GPU-123-abc ] && {answer}\n')
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert bench.clocks(torch.device("cuda"), "clocks.sm") == shown


def finished_row(size, method, flops, loss, **more):
    return {"size": size, "method": method, "flops": flops, "val_loss": loss, "step": 16, "steps": 16, **more}


def test_without_git_the_commit_is_not_known(monkeypatch):
    assert report.commit() != ""
    monkeypatch.setenv("PATH", "/nowhere")
    assert report.commit() == "n/a"


def test_final_losses_stand_over_flops_seed_by_seed():
    rows = [finished_row("2x32", "dense", 1e9, 3.0), finished_row("2x32", "dense", 1e9, 3.2),
            finished_row("2x32", "lowrank 32 %", 7e8, 3.4), finished_row("2x64", "dense", 3e9, 2.5),
            finished_row("2x64", "lowrank 32 %", 2e9, 2.7, step=10), finished_row("2x64", "lowrank 63 %", 2e9, None)]
    small, wide = report.final_panels(rows)
    assert "2x32" in small.title and small.means
    assert small.lines == {"dense": [(1e9, 3.0), (1e9, 3.2)], "lowrank 32 %": [(7e8, 3.4)]}
    assert "2x64" in wide.title and wide.lines == {"dense": [(3e9, 2.5)]}  # others are unfinished or have no validation


def test_distance_panels_average_over_seeds(tmp_path):
    runs = {}
    for ffn, seed in itertools.product(("dense", "lowrank"), (1, 2)):
        path = write_run(tmp_path / f"{ffn}{seed}", ffn=ffn, rank=8 * (ffn != "dense"), seed=seed)
        runs[ffn, seed] = curves.read_run(path)
    for seed, gap in ((1, 0.25), (2, 0.75)):
        steps, losses = runs["dense", seed].train
        runs["lowrank", seed].train = steps, losses + gap
    curves.name_runs(list(runs.values()))
    panel, = curves.distance_panels(list(runs.values()))
    assert panel.lines == {"lowrank 32 %": [(64 * step, near(0.5)) for step in range(1, 17)]} and panel.level == 0
    alone = runs["lowrank", 1]
    panel, = curves.distance_panels([alone])  # without dense: its own training loss
    assert panel.lines == {"lowrank 32 %": [(64 * step, near(loss)) for step, loss in zip(*alone.train)]}
    assert panel.level is None


def test_decoding_is_drawn_as_a_ratio_to_dense(monkeypatch):
    def row(kind, batch, rate, ffn="lowrank R=8", launch="graph", commit="a", width=32):
        return {"benchmark": "decode", "ffn": "dense" if kind == "dense" else ffn, "kind": kind, "launch": launch,
                "batch": batch, "tokens_per_s": rate, "commit": commit, "device": "card", "dtype": "bfloat16",
                "config": {**config.to_dict(Config(n_layer=2)), "n_embd": width}}

    rows = [row("dense", 1, 100), row("dense", 4, 200), row("structured", 1, 150), row("auto", 1, 140),
            row("structured", 4, 100), row("dense", 1, 10, launch="eager"), row("structured", 1, 8, launch="eager"),
            row("structured", 1, 999, commit="b"), row("structured", 1, 999, width=64)]
    drawn = []
    monkeypatch.setattr(report, "draw", lambda path, title, panels, looks: drawn.extend(panels[0]))
    report.draw_decode("x.png", rows)
    graph, eager = (panel.lines for panel in drawn)
    assert graph == {"lowrank R=8, factors": [(1, 1.5), (4, 0.5)], "lowrank R=8, auto": [(1, 1.4)]}
    assert eager == {"lowrank R=8, factors": [(1, 0.8)]}


def test_plot_draws_rows_of_one_benchmark(cli, tmp_path):
    rows, picture = tmp_path / "rows.jsonl", tmp_path / "again.png"
    ffn = ["ffn", "--widths=32,64", "--tokens=8", "--cases=dense,lowrank32"]
    assert cli("bench.py", *ffn, *FAST, f"--json={rows}")[0] == 0
    with open(rows, "a") as f:  # rows that are not drawn
        f.write('{"benchmark": "ffn", "ffn": "lowrank 32 %", "note": "out of memory"}\n{"benchmark": "scaling"}\n')
    status, stdout, _ = cli("bench.py", "plot", rows, f"--plot={picture}")
    assert status == 0 and picture.read_bytes().startswith(b"\x89PNG") and str(picture) in stdout
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text() + '{"benchmark": "curves"}\n')
    for argv, word in (((other,), "curves and ffn"), ((rows, "--widths=96"), "no benchmark"),
                       ((tmp_path / "none",), "cannot read"), ((picture,), "UTF-8"),
                       ((ROOT / "bench.py",), "one JSON object")):
        result = cli("bench.py", "plot", *argv, f"--plot={picture}")
        assert_one_sentence(*result)
        assert word in result[2]


def test_decode_says_that_a_cpu_has_no_graphs(cli):
    argv = [*SMALL, *LOWRANK, "--kinds=structured", "--batches=1", "--new_tokens=4"]
    for launches, lines in (("graph", 1), ("eager,graph", 1), ("eager", 0)):
        status, stdout, _ = cli("bench.py", "decode", *argv, f"--launches={launches}")
        assert status == 0 and stdout.count("device cpu has no CUDA graphs: every step runs eager.") == lines
        assert stdout.count("  eager ") == 1 and "  graph " not in stdout


def test_a_full_disk_is_one_sentence(cli):
    status, _, stderr = cli("bench.py", "ffn", "--widths=32", "--tokens=8", "--cases=dense", *FAST, "--json=/dev/full")
    assert status == 2 and "Traceback" not in stderr
    assert stderr.startswith("error: ") and "/dev/full" in stderr and "No space left on device" in stderr


def test_output_paths_expand_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = bench.read_settings(["ffn", "--json=~/rows.jsonl", "--plot=~/a.png"])[2]
    assert (settings.json, settings.plot) == (f"{tmp_path}/rows.jsonl", f"{tmp_path}/a.png")


def test_a_method_looks_the_same_in_every_picture(tmp_path):
    """At another width, in another order and company; and no two methods of a picture look alike."""
    low = {"ffn": "lowrank", "rank": 8}
    step, flop = {**low, "guide": "fixedstep"}, {**low, "guide": "fixedflop"}
    settings = {"dense": {}, "narrow": {"ffn_dim": 64}, "low": low, "low63": {**low, "rank": 16}, "step": step,
                "skip": {**step, "guide_skip": True}, "flop": flop, "replay": {**low, "guide": "replay"},
                "more": {**low, "max_tokens": 1536}, "shuffle": {"ffn": "blockshuffle", "nblocks": 4},
                "block": {"ffn": "blockdense", "rank": 12, "nblocks": 4}}
    wide = {name: {**s, "n_embd": 64, **{k: 2 * s[k] for k in ("rank", "ffn_dim") if k in s}}
            for name, s in settings.items() if name not in ("narrow", "skip")}
    pictures = []
    for width, chosen in (("small", settings), ("wide", dict(reversed(wide.items())))):
        runs = {name: curves.read_run(write_run(tmp_path / width / name, **s)) for name, s in chosen.items()}
        curves.name_runs(list(runs.values()))
        how = report.method_looks({run.method for run in runs.values()})
        assert len({str(look) for look in how.values()}) == len(runs)
        pictures.append({name: how[run.method] for name, run in runs.items()})
    assert {name: pictures[0][name] for name in wide} == pictures[1]
    colour = {name: look["color"] for name, look in pictures[0].items()}
    assert colour["dense"] == "black" and colour["low"] == colour["shuffle"] != colour["step"]
    rates = [curves.read_run(write_run(tmp_path / f"lr{lr}", lr=lr)) for lr in (1e-3, 2e-3)]
    curves.name_runs(rates)
    assert len({how["color"] for how in report.method_looks({run.method for run in rates}).values()}) == 2


def test_distance_to_dense_is_on_the_same_batches(tmp_path):
    settings = {"a": {}, "b": {"ffn": "lowrank", "rank": 8}, "c": {"seed": 3}}
    runs = [curves.read_run(write_run(tmp_path / name, **s)) for name, s in settings.items()]
    curves.name_runs(runs)
    assert curves.above_dense(runs[0], runs) == curves.above_dense(runs[2], runs) == []
    steps, losses = runs[0].train
    runs[1].train = steps[1::2], losses[1::2] + 0.25  # logged half as often
    assert curves.above_dense(runs[1], runs) == [(step, near(0.25)) for step in steps[1::2]]
    longer = curves.read_run(write_run(tmp_path / "longer", max_tokens=64 * 40))
    nearer = curves.read_run(write_run(tmp_path / "nearer", max_tokens=64 * 36, ffn="lowrank", rank=8))
    everyone = [*runs, longer, nearer]
    curves.name_runs(everyone)
    assert curves.above_dense(nearer, everyone)[-1] == (36, pytest.approx(nearer.train[1][35] - longer.train[1][35]))


def test_a_loss_that_a_teacher_is_part_of_is_no_training_loss(rows, tmp_path):
    """Validation losses, which are of the text alone, are drawn instead, but for the final one, which is of more."""
    low, half = {"ffn": "lowrank", "rank": 8}, {"distill": "teacher", "distill_share": 0.5}
    kinds = {"dense": half, "low": low | half, "all": low | {"distill": "teacher"},
             "none": low | {"distill": "teacher", "distill_share": 0.0}, "alone": low}
    losses = {name: 3 + np.arange(16) / 10**(2 + i) for i, name in enumerate(kinds)}
    paths = {name: write_run(tmp_path / name, lambda c: losses[name], **s) for name, s in kinds.items()}
    shown = {r["path"]: r["train_loss"] for r in rows("curves", *paths.values()) if r["benchmark"] == "curves"}
    assert shown == {paths[name]: near(losses[name][-1] + 0.1) if name in ("none", "alone") else None for name in kinds}
    runs = {name: curves.read_run(path) for name, path in paths.items()}

    def drawn(*names):
        chosen = [runs[name] for name in names]
        curves.name_runs(chosen)
        panel, = curves.distance_panels(chosen)
        (label, points), = panel.lines.items()
        return panel.title, points

    validated = [3, 7, 11]
    assert drawn("all") == ("2x32: validation loss, smoothed",
                            [(64 * (i + 1), near(losses["all"][i])) for i in validated])
    assert drawn("dense", "low") == ("2x32: validation loss minus dense's, same text, smoothed",
                                     [(64 * (i + 1), near(losses["low"][i] - losses["dense"][i])) for i in validated])
    for name in ("none", "alone"):
        title, points = drawn(name)
        assert (title, len(points)) == ("2x32: training loss, smoothed", 16)
    without = dataclasses.replace(runs["all"], val=tuple(values[-1:] for values in runs["all"].val))
    curves.name_runs([without])
    assert [panel.lines for panel in curves.distance_panels([without])] == [{}]  # a panel that is not drawn


def test_curves_of_a_real_run(rows, finished):
    found, = rows("curves", finished)
    last = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()][-1]
    assert (found["step"], found["steps"], found["val_loss"]) == (8, 8, last["val_loss"]) and found["seconds"] > 0


def test_folders_that_are_no_runs_are_one_sentence(cli, tmp_path):
    empty, damaged, fresh = (write_run(tmp_path / name) for name in ("empty", "damaged", "fresh"))
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    (tmp_path / "damaged" / "config.json").write_text("{")
    (tmp_path / "fresh" / "config.json").write_text('{"n_layerz": 3}')
    short = write_run(tmp_path / "short")
    (tmp_path / "short" / "config.json").write_text('{"max_tokens": 1}')
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    for path, word in ((empty, "no metrics yet"), (damaged, "not JSON"), (fresh, "n_layerz"), (short, "max_tokens=1"),
                       (tmp_path / "none", "config.json is missing")):
        result = cli("bench.py", "curves", path)
        assert_one_sentence(*result)
        assert str(path) in result[2] and word in result[2]


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes

def test_one_micro_batch_is_the_batch(cli):
    found = bench.read_settings(["train", str(ROOT / "config/s.py"), "--micro_batch_size=48"])[1]
    assert (found.batch_size, found.micro_batch_size) == (48, 48)
    for argv in (["--micro_batch_size=0"], ["--micro_batch_size=x"]):
        result = cli("bench.py", "train", *argv)
        assert_one_sentence(*result)
        assert f"error: {argv[0][2:]} " in result[2]


def test_decode_needs_no_case_of_the_papers():
    assert bench.read_settings(["decode", "--n_embd=90", "--n_head=3"])[1].n_embd == 90  # which has no four blocks


def test_an_exhausted_memory_is_seen_through_what_it_causes():
    try:
        try:
            out_of_memory()
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    except RuntimeError as e:
        assert device.out_of_memory(e)
    assert not device.out_of_memory(RuntimeError("shapes"))


def test_what_cannot_be_written_is_an_error_before_anything_runs(without_torch, tmp_path, monkeypatch):
    for argv, words in ((f"--plot={tmp_path}/a", "must end in .png, .pdf or .svg"),
                        (f"--plot={tmp_path}/a.tiff", "must end in .png"), (f"--json={tmp_path}", "cannot be written"),
                        (f"--json={ROOT}/bench.py/a", "folder of"),
                        (f"--plot={tmp_path}/no/a.png", "folder of")):
        result = without_torch("bench.py", "ffn", argv)
        assert_one_sentence(*result)
        assert words in result[2]
    assert not list(tmp_path.iterdir())
    for text in ("# Notes\n", "[1]\n", "3\n", '{"prompt": "a"}\n'):
        (tmp_path / "notes").write_text(text)
        assert_one_sentence(*without_torch("bench.py", "ffn", f"--json={tmp_path}/notes"))
        assert (tmp_path / "notes").read_text() == text
    for text in ("", '{"benchmark": "ffn"}\n'):
        (tmp_path / "notes").write_text(text)
        bench.read_settings(["ffn", f"--json={tmp_path}/notes"])
    bench.read_settings(["ffn", f"--json={tmp_path}/a", f"--plot={tmp_path}/a.svg"])
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(config.UserError, match="a.svg cannot be written"):
        bench.read_settings(["ffn", f"--plot={tmp_path}/a.svg"])


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 EiB")


@pytest.mark.parametrize("command, argv, skipped", [
    ("ffn", ["--widths=32", "--tokens=7,999", "--cases=dense,lowrank32"], [("dense", 999), ("lowrank 32 %", 999)]),
    ("train", ["--ffn=lowrank", "--rank=9"], [("lowrank R=9", None)]),
    ("prefill", ["--ffn=lowrank", "--rank=9", "--batches=1", "--tokens=8"], [("lowrank R=9", None)])])
def test_a_case_beyond_memory_is_a_row_and_the_others_run(rows, monkeypatch, command, argv, skipped):
    randn, build = torch.randn, model.build
    monkeypatch.setattr(torch, "randn", lambda *size, **kw: out_of_memory() if 999 in size else randn(*size, **kw))
    monkeypatch.setattr(model, "build", lambda cfg, *a: out_of_memory() if cfg.rank == 9 else build(cfg, *a))
    found = rows(command, *(SMALL if command != "ffn" else FAST), *argv)
    notes = [r for r in found if "note" in r]
    assert [(r["ffn"], r.get("tokens")) for r in notes] == skipped and {r["note"] for r in notes} == {"out of memory"}
    assert len([r for r in found if "ms" in r]) == {"ffn": 4, "train": 1, "prefill": 1}[command]


@pytest.mark.parametrize("command", ["decode", "crossover", "train"])
def test_a_model_beyond_memory_is_one_sentence(cli, monkeypatch, command):
    where, name = (device, "set_up") if command == "train" else (model, "build")
    monkeypatch.setattr(where, name, out_of_memory)
    status, _, err = cli("bench.py", command, *SMALL, *LOWRANK, "--prompt_tokens=1", "--new_tokens=2")
    assert status == 2 and err == (f"error: the memory does not hold what {command} needs here: give a smaller model, "
                                   "batch or number of tokens.\n")


@pytest.mark.parametrize("argv, words", [
    (["kernels"], "kernels kernel ffn train prefill"), (["ffn", "--width=3"], "width widths"),
    (["ffn", "--widths=12,x"], "widths 12,x whole"), (["ffn", "--tokens=0"], "tokens 0"),
    (["ffn", "--tokens=100000000000000000000"], "tokens 99999999"), (["ffn", "--repeats=-1"], "repeats=-1 negative"),
    (["train", "--warmup=-1"], "warmup=-1 negative"), (["crossover"], "crossover ffn=dense"),
    (["crossover", "--ffn=lowrank", "--rank=8", "--n_dense_layers=12"], "n_dense_layers=12 n_layer=12 none"),
    (["prefill", "--batches=-1"], "batches -1"), (["ffn", "--cases=lowrank30"], "lowrank30 lowrank32"),
    (["train", "--cases=dense,,"], "cases"), (["ffn", "--widths=64,30"], "nblocks 30 120"),
    (["train", "--ffn=lowrank"], "rank"), (["ffn", "--json=/no/such/folder/x"], "/no/such/folder/x folder"),
    (["train", "--plot=/no/such/folder/x.png"], "folder"), (["ffn", "--repeats=many"], "repeats many"),
    (["curves"], "curves out/NAME"), (["curves", "--plots=x"], "plots plot"), (["plot"], "rows --plot=NAME.png"),
    (["plot", "rows.jsonl"], "rows --plot=NAME.png"), (["decode", "--kinds=fast"], "kinds=fast structured"),
    (["decode", "--launches=graphs"], "launches=graphs eager"),
    (["decode", "--new_tokens=4096"], "new_tokens=4096 block_size")])
def test_a_mistake_is_one_sentence_before_torch_loads(without_torch, argv, words):
    result = without_torch("bench.py", *argv)
    assert_one_sentence(*result)
    assert all(word in result[2] for word in words.split()), result[2]


def test_help_lists_commands_and_settings(without_torch):
    status, stdout, _ = without_torch("bench.py", "--help")
    words = ("kernel", "prefill", "curves", "plot", "--cases", "--widths", "--repeats", "--micro_batch_size")
    assert status == 0 and all(word in stdout for word in words)
