"""train: the plan, data order, one step against AdamW by hand, two processes, resume, the run's folder, real text."""
import collections
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import config
import curves
import prepare
import train
from config import UserError
from conftest import LOWRANK, ROOT, STRUCTURES, TINY, assert_one_sentence, train_run, write_data
from device import Ranks
from model import load
from structured import Structured
from test_model import random_model, reference_logits

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, torch.float32, False)
# 4 steps guided, 4 plain, 4 replayed
GUIDED = ["--ffn=blockshuffle", "--nblocks=4", "--guide=fixedflop", "--guide_ratio=0.5", "--guide_skip=True"]


def configure(*argv):
    cfg, = config.load([str(a) for a in argv])
    return dataclasses.replace(cfg, vocab_size=cfg.vocab_size or 257)


def tiny(*argv):
    return configure(*TINY, *argv)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def copy_data(data, folder):
    return Path(shutil.copytree(data, folder))


def set_token(folder, name, at, value):
    with open(folder / name, "r+b") as f:
        f.seek(prepare.HEADER + 2 * at)
        f.write(value.to_bytes(2, "little"))
    return folder


def weights(out, name="model.pt"):
    return torch.load(out / name, weights_only=True)["model"]


# ----------------------------------------------------------------------------------------------------------------------
# The plan

def test_learning_rate_warms_up_and_follows_a_cosine():
    cfg = tiny("--max_tokens=12800", "--lr=1e-3", "--warmup_ratio=0.1", "--min_lr_ratio=0.1")  # 100 steps
    plan = train.make_plan(cfg)
    lr = [train.lr_at(cfg, plan, step) for step in range(100)]
    assert plan.steps == 100 and lr[:10] == pytest.approx([1e-4 * k for k in range(1, 11)])
    assert lr[10] == pytest.approx(1e-3) and lr[55] == pytest.approx(0.55e-3) and lr[99] == pytest.approx(1e-4, rel=0.01)
    assert lr[10:] == sorted(lr[10:], reverse=True) and min(lr[10:]) > 1e-4
    flat = dataclasses.replace(cfg, warmup_ratio=0.0, min_lr_ratio=1.0)
    assert [train.lr_at(flat, plan, step) for step in (0, 50, 99)] == [1e-3] * 3
    assert train.lr_at(dataclasses.replace(cfg, warmup_ratio=1.0), plan, 99) == 1e-3


def test_a_line_to_zero_over_the_last_part_of_the_steps():
    cfg = tiny("--max_tokens=12800", "--lr=1e-3", "--warmup_steps=4", "--schedule=linear", "--decay_ratio=0.5",
               "--min_lr_ratio=0")  # 100 steps
    plan = train.make_plan(cfg)
    lr = [train.lr_at(cfg, plan, step) for step in range(100)]
    assert lr[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3]) and lr[4:51] == [1e-3] * 47
    assert lr[75] == pytest.approx(5e-4) and lr[99] == pytest.approx(2e-5)
    late = dataclasses.replace(cfg, warmup_steps=60, min_lr_ratio=0.1)  # the warm-up ends after the fall would begin
    assert train.lr_at(late, plan, 60) == 1e-3 and train.lr_at(late, plan, 80) == pytest.approx(0.55e-3)


def test_muons_momentum_rises_and_falls_and_its_decay_ends():
    cfg = tiny("--max_tokens=128000", "--optimizer=muon", "--lr=0.01", "--weight_decay=0.8", "--decay_ratio=0.4",
               "--warmup_ratio=0")  # 1000 steps
    plan = train.make_plan(cfg)
    momentum, decay = zip(*(train.muon_at(cfg, plan, step) for step in (0, 200, 400, 600, 800, 999)))
    assert momentum == pytest.approx([0.85, 0.91, 0.97, 0.97, 0.935, 0.90], abs=2e-4)
    assert decay[0] == 0.8 and decay[1] == pytest.approx(0.8 * 0.9045, rel=1e-3) and decay[5] < 1e-5


def test_alpha_falls_from_one_to_zero():
    root = math.sqrt(0.5)
    for schedule, values in (("cosine", (1, 0.5 + 0.5 * root, 0.5, 0.5 - 0.5 * root)), ("linear", (1, 0.75, 0.5, 0.25))):
        cfg = tiny(*LOWRANK, "--guide=fixedstep", f"--guide_schedule={schedule}", "--max_tokens=2048")  # 8 of 16 steps
        plan = train.make_plan(cfg)
        assert (plan.steps, plan.unique, plan.guided) == (16, 16, 8)
        assert [train.alpha_at(cfg, plan, step) for step in (0, 2, 4, 6)] == pytest.approx(values)
        assert all(train.alpha_at(cfg, plan, step) == 0 for step in (8, 9, 15)) and train.alpha_at(cfg, plan, 7) > 0


def test_steps_of_the_guides():
    def plan(*argv):
        p = train.make_plan(tiny("--max_tokens=12800", *argv))
        return p.steps, p.unique, p.guided
    assert plan() == (100, 100, 0)
    assert plan(*LOWRANK, "--guide=fixedstep", "--guide_ratio=0.3") == (100, 100, 30)
    assert plan(*LOWRANK, "--guide=fixedflop", "--guide_ratio=0.3") == (130, 100, 30)
    assert plan(*LOWRANK, "--guide=fixedflop", "--guide_ratio=1") == (200, 100, 100)
    assert plan(*LOWRANK, "--guide=replay", "--guide_ratio=0.3") == (130, 100, 0)
    with pytest.raises(UserError, match="max_tokens=127 .* 8 x block_size 16 = 128"):
        plan("--max_tokens=127")


@pytest.mark.parametrize("skip, ratios", [(False, (0.278, 0.345, 0.371, 0.386)), (True, (0.323, 0.416, 0.456, 0.479))])
def test_auto_ratio_is_the_papers(skip, ratios):
    for name, rank, ratio in zip(("s", "m", "l", "xl"), (192, 256, 384, 512), ratios):
        cfg = configure(ROOT / f"config/{name}.py", "--ffn=lowrank", f"--rank={rank}", "--guide=fixedflop",
                        f"--guide_skip={skip}")
        plan = train.make_plan(cfg)
        assert abs(plan.guide_ratio - ratio) < 0.003 and plan.guided == round(plan.guide_ratio * plan.unique)


@pytest.mark.parametrize("flags", [*STRUCTURES.values()], ids=[*STRUCTURES])
@pytest.mark.parametrize("guide", ["fixedflop", "fixedflop --guide_skip=True", "replay"])
def test_fixedflop_and_its_control_cost_what_the_dense_model_costs(flags, guide):
    shape = ["--max_tokens=128000", "--ffn_dim=256", "--n_embd=64"]
    dense = train.summary(tiny(*shape))["train_flops"]
    facts = train.summary(tiny(*shape, *flags, *f"--guide={guide}".split()))
    assert abs(facts["train_flops"] / dense - 1) < 0.002 and 1100 < facts["steps"] < 1999
    assert facts["guided_steps"] == (0 if guide == "replay" else facts["steps"] - 1000)
    assert sum(facts["train_flops_by_phase"].values()) == pytest.approx(facts["train_flops"], rel=1e-4)


def test_flops_of_a_guided_run_by_phase():
    """By hand: 8 steps of 128 tokens, 3 guided at the dense price, the rest at the factors', all times 3."""
    cfg = tiny(*LOWRANK, "--guide=fixedflop", "--guide_ratio=0.375")
    attention = 3 * (32 * 4 * 32 + 2 * 16 * 32)  # qkv and proj; scores and values
    ffn_dense, ffn_lowrank = 3 * 2 * 32 * 128, 2 * 32 * 128 + 2 * 2 * 8 * (32 + 128)
    dense, factors = (6 * 128 * (attention + ffn + 257 * 32) for ffn in (ffn_dense, ffn_lowrank))
    expected = {"guided": 3 * dense, "plain": 5 * factors, "replay": 3 * factors}
    assert train.summary(cfg)["train_flops_by_phase"] == pytest.approx(expected, rel=1e-5)


def test_skip_draws_are_pure_and_have_alpha_as_their_mean():
    ten_thousand_steps = ["--guide_ratio=1", "--max_tokens=1_280_000"]
    cfg = tiny(*LOWRANK, "--guide=fixedstep", "--guide_skip=True", "--n_layer=5", *ten_thousand_steps)
    plan = train.make_plan(cfg)
    draws = [train.guided_layers(cfg, plan, step) for step in range(plan.steps)]
    assert draws[::-7] == [train.guided_layers(cfg, plan, step) for step in range(plan.steps)][::-7]
    assert draws[0] == (1, 2, 3, 4) and all(0 not in d for d in draws)
    for begin in range(0, 10_000, 1000):
        alpha = np.mean([train.alpha_at(cfg, plan, step) for step in range(begin, begin + 1000)])
        assert abs(np.mean([len(d) / 4 for d in draws[begin:begin + 1000]]) - alpha) < 0.03
    together = np.mean([(1 in d) == (2 in d) for d in draws[4500:5500]])
    assert abs(together - 0.5) < 0.06  # layers are drawn apart
    other = dataclasses.replace(cfg, seed=1)
    assert draws[4000:4100] != [train.guided_layers(other, plan, step) for step in range(4000, 4100)]
    always = dataclasses.replace(cfg, guide_skip=False)
    assert train.guided_layers(always, plan, 9999) == (1, 2, 3, 4)
    half = train.make_plan(dataclasses.replace(cfg, guide_ratio=0.5))
    assert train.guided_layers(always, half, 4999) == (1, 2, 3, 4) and train.guided_layers(always, half, 5000) == ()


# ----------------------------------------------------------------------------------------------------------------------
# Data order

@pytest.mark.parametrize("n", [*range(1, 20), *(2**k + d for k in (5, 6, 7, 8, 10) for d in (-1, 0, 1)), 1000, 4097, 65537])
def test_permute_is_a_bijection(n):
    orders = set()
    for key in (0, 1, 1005, 2**64 - 1):
        with np.errstate(over="ignore"):
            order = train.permute(np.arange(n), n, key)
            assert order[n // 2] == train.permute(np.array([n // 2]), n, key)[0]  # of the index alone
        assert np.array_equal(np.sort(order), np.arange(n))
        orders.add(order.tobytes())
    assert n < 20 or len(orders) == 4


def test_a_permutation_looks_random():
    """No correlation with the index, and neighbours are torn apart: few of the 9999 differences are small."""
    with np.errstate(over="ignore"):
        order = train.permute(np.arange(10_000), 10_000, 1005)
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(order)) < 100) < 0.04  # 2 % by chance


@pytest.mark.parametrize("n_windows, batch", [(40, 8), (37, 8), (8, 8), (8, 16), (3, 8), (1, 4), (250, 7)])
def test_every_window_stands_once_in_every_epoch(n_windows, batch):
    cfg = tiny(f"--batch_size={batch}", "--micro_batch_size=1")
    steps = -(-3 * n_windows // batch)
    sequence = np.concatenate([train.windows_of(cfg, step, n_windows) for step in range(steps)])
    epochs = sequence[:3 * n_windows].reshape(3, n_windows)
    assert all(np.array_equal(np.sort(epoch), np.arange(n_windows)) for epoch in epochs)
    if n_windows > 30:
        other = np.concatenate([train.windows_of(dataclasses.replace(cfg, seed=1), step, n_windows) for step in range(steps)])
        assert len({e.tobytes() for e in (*epochs, other[:n_windows], np.arange(n_windows))}) == 5


def test_windows_do_not_overlap_and_targets_are_one_further():
    tokens = np.arange(1000, 1101)
    got = train.read_windows(tokens, np.array([0, 4]), 20)
    assert got.tolist() == [list(range(1000, 1021)), list(range(1080, 1101))]
    assert [train.count_windows(types.SimpleNamespace(count=c), 20) for c in (0, 1, 20, 21, 40, 41, 101)] == [0, 0, 0, 1, 1, 2, 5]


def all_batches(cfg, tokens, n_windows, steps, world):
    """{step: the sequences of all ranks in the order of the windows}, read rank by rank."""
    plan, ranks, micro = train.make_plan(cfg), [], cfg.micro_batch_size
    for rank in range(world):
        ranks.append(list(train.batches(cfg, plan, tokens, n_windows, steps, Ranks(rank, world, CPU, torch.float32, False))))
        assert len(ranks[-1]) == len(steps) and ranks[-1][0].shape == (cfg.batch_size // world // micro, micro, 17)
    return {step: torch.stack([r[i] for r in ranks], 1).flatten(0, 2).numpy() for i, step in enumerate(steps)}


def test_batches_are_the_same_for_any_number_of_processes_and_any_start():
    tokens, cfg = np.random.default_rng(0).integers(0, 257, 16 * 50 + 1), tiny("--batch_size=16", "--max_tokens=2048")
    one, two, four = (all_batches(cfg, tokens, 50, range(8), world) for world in (1, 2, 4))
    late = all_batches(cfg, tokens, 50, range(5, 8), 2)
    for step in range(8):
        assert np.array_equal(one[step], np.stack([tokens[w * 16:w * 16 + 17] for w in train.windows_of(cfg, step, 50)]))
        assert np.array_equal(one[step], two[step]) and np.array_equal(one[step], four[step])
        assert step < 5 or np.array_equal(one[step], late[step])


def test_fixedflop_replays_the_guided_steps_data():
    tokens, cfg = np.random.default_rng(0).integers(0, 257, 16 * 100 + 1), tiny(*GUIDED)
    batch = all_batches(cfg, tokens, 100, range(12), 1)
    assert all(np.array_equal(batch[8 + k], batch[k]) for k in range(4))
    assert len({b.tobytes() for b in batch.values()}) == 8
    control = all_batches(tiny(*LOWRANK, "--guide=replay", "--guide_ratio=0.5"), tokens, 100, range(12), 1)
    assert all(np.array_equal(control[k], batch[k]) for k in range(12))


# ----------------------------------------------------------------------------------------------------------------------
# One step

def test_steps_equal_adamw_by_hand():
    """Mean loss over micro-batches, clipping, decoupled decay on every parameter; float64, by the second implementation."""
    cfg = tiny("--n_layer=2", "--grad_clip=0.7", "--weight_decay=0.1", "--betas=(0.9,0.98)", "--vocab_size=61")
    gpt = random_model(cfg, scale=0.1).float()
    params = {n: p.detach().double().requires_grad_() for n, p in gpt.named_parameters()}
    before = {n: p.detach().clone() for n, p in params.items()}
    m, v = ({n: torch.zeros_like(p) for n, p in params.items()} for _ in range(2))
    optimizer = train.make_optimizer(cfg, gpt, ALONE)
    for t, lr in enumerate((1e-3, 3e-3, 2e-3), start=1):
        batch = torch.randint(61, (2, 4, 17), generator=torch.Generator().manual_seed(t))
        loss, norm = train.train_step(gpt, optimizer, batch, cfg, ALONE, lr)

        tokens = batch.flatten(0, 1)
        expected = F.cross_entropy(reference_logits(cfg, params, tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        grads = dict(zip(params, torch.autograd.grad(expected, list(params.values()))))
        total = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert total > 0.7 and norm.item() == pytest.approx(total, rel=1e-4)
        with torch.no_grad():
            for n, p in params.items():
                g = grads[n] * 0.7 / total
                m[n], v[n] = 0.9 * m[n] + 0.1 * g, 0.98 * v[n] + 0.02 * g * g
                p -= lr * 0.1 * p + lr * m[n] / (1 - 0.9**t) / ((v[n] / (1 - 0.98**t)).sqrt() + 1e-8)
    for n, p in gpt.named_parameters():
        error, moved = (p.detach().double() - params[n].detach()), (params[n].detach() - before[n])
        assert error.norm() < 2e-3 * moved.norm(), n
        assert error.abs().max() < 5e-4, n  # where there is almost no gradient, Adam multiplies rounding


def test_without_clipping_only_the_norm_is_reported():
    runs = []
    for clip in (0.0, 1e6):
        cfg = tiny(f"--grad_clip={clip}", "--vocab_size=61")
        gpt = random_model(cfg).float()
        batch = torch.randint(61, (2, 4, 17), generator=torch.Generator().manual_seed(0))
        _, norm = train.train_step(gpt, train.make_optimizer(cfg, gpt, ALONE), batch, cfg, ALONE, 1e-3)
        runs.append([norm, *gpt.state_dict().values()])
    assert runs[0][0] > 0.1 and all(torch.equal(a, b) for a, b in zip(*runs))


def test_micro_batches_do_not_change_the_result(data, tmp_path):
    a, b = (weights(train_run(tmp_path / str(size), data, *GUIDED, f"--micro_batch_size={size}")) for size in (8, 2))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)


def test_a_skipped_layers_guide_is_left_alone():
    cfg = tiny(*LOWRANK, "--vocab_size=61")
    gpt = random_model(cfg).float()
    for _, layer in gpt.structured_linears():
        layer.start_guide()
    before = {n: p.detach().clone() for n, p in gpt.named_parameters()}
    optimizer = train.make_optimizer(cfg, gpt, ALONE)
    train.train_step(gpt, optimizer, torch.randint(61, (2, 4, 17)), cfg, ALONE, 1e-3, torch.tensor(0.5), (1,))
    changed = {n for n, p in gpt.named_parameters() if not torch.equal(p, before[n])}
    assert set(before) - changed == {"blocks.2.ffn.fc1.W", "blocks.2.ffn.fc2.W"}


# ----------------------------------------------------------------------------------------------------------------------
# A run and its folder

def test_a_run_leaves_its_folder(finished, data):
    assert sorted(os.listdir(finished)) == ["ckpt.pt", "config.json", "metrics.jsonl", "model.pt"]
    cfg = config.from_dict(json.loads((finished / "config.json").read_text()))
    saved = torch.load(finished / "model.pt", weights_only=True)
    assert saved.keys() == {"config", "model", "tokenizer", "step", "val_loss"} and config.from_dict(saved["config"]) == cfg
    assert saved["step"] == 8 and saved["tokenizer"]["identity"] == "byte" and saved["tokenizer"]["blob"].dtype == torch.uint8
    rows, plan = metrics(finished), train.make_plan(cfg)
    assert [r["step"] for r in rows] == [*range(1, 9), 8] and rows[0]["loss"] == pytest.approx(math.log(257), abs=0.1)
    for row in rows[:-1]:
        assert row.keys() == {"step", "tokens", "loss", "lr", "grad_norm", "alpha", "tokens_per_s", "mfu"}
        assert row["tokens"] == 128 * row["step"] and row["lr"] == train.lr_at(cfg, plan, row["step"] - 1)
        assert row["alpha"] == 0 and row["mfu"] is None and row["tokens_per_s"] > 0
    assert rows[-1] == {"step": 8, "val_loss": saved["val_loss"], "val_ppl": math.exp(saved["val_loss"])}


def test_the_final_loss_is_that_of_the_first_validation_windows(finished, data):
    """Ten windows in micro-batches of four: the ragged last one counts what it holds."""
    gpt, cfg, saved = load(str(finished), CPU)
    tokens = torch.from_numpy(prepare.TokenFile(str(data / "val.bin")).tokens[:161].astype(np.int64))
    with torch.no_grad():
        expected = F.cross_entropy(gpt(tokens[:160].view(10, 16)).flatten(0, 1).double(), tokens[1:])
    assert saved["val_loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_loss_alpha_and_guided_validation_of_a_guided_run(data, tmp_path, monkeypatch):
    """The logged loss is that of the step, before its update, with the alpha used; validation blends as the next step would."""
    seen = []

    def evaluate(model, token_file, n_windows, cfg, ranks, alpha=None, guided=()):
        seen.append((n_windows, None if alpha is None else alpha.item(), guided))
        return real(model, token_file, n_windows, cfg, ranks, alpha, guided)

    real, _ = train.evaluate, monkeypatch.setattr(train, "evaluate", evaluate)
    out = train_run(tmp_path / "run", data, *GUIDED, "--eval_interval=2")
    cfg = config.from_dict(json.loads((out / "config.json").read_text()))
    plan, rows = train.make_plan(cfg), [r for r in metrics(out) if "loss" in r]
    assert [r["alpha"] for r in rows] == [train.alpha_at(cfg, plan, step) for step in range(12)]
    assert rows[2]["alpha"] == pytest.approx(0.5)
    assert seen == [(4, pytest.approx(0.5), (1, 2)), *[(4, 0.0, ())] * 4, (10, None, ())]
    assert [r["step"] for r in metrics(out) if "val_loss" in r] == [2, 4, 6, 8, 10, 12]


def test_folders_are_continued_refused_or_finished(cli, finished, data, tmp_path):
    def again(*argv):
        return cli("train.py", *TINY, *LOWRANK, f"--out_dir={finished}", f"--data_dir={data}", *argv)
    before = (finished / "model.pt").read_bytes()
    for argv, words in (([], "--resume=auto"), (["--resume=auto", "--lr=2e-3"], "lr=0.001, this command says lr=0.002"),
                        (["--resume=auto", "--rank=4"], "rank=8, this command says rank=4"),
                        (["--resume=auto", "--seed=1"], "seed=1")):
        status, out, err = again(*argv)
        assert_one_sentence(status, out, err)
        assert words in err and str(finished) in err
    status, out, err = again("--resume=auto", "--log_interval=3")
    assert status == 0 and "finished" in out and not err and before == (finished / "model.pt").read_bytes()
    for text in ("{", "[]", "3", '{"n_layer": []}', 100_000 * "["):
        (tmp_path / "config.json").write_text(text)
        status, out, err = cli("train.py", *TINY, f"--out_dir={tmp_path}", "--resume=auto")
        assert_one_sentence(status, out, err)
        assert str(tmp_path / "config.json") in err


def test_another_runs_data_is_refused(cli, data, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        stopped(tmp_path / "run", data, 3, monkeypatch)
    other = write_data(tmp_path / "other", np.arange(4001) % 256, np.arange(401) % 256)
    status, out, err = cli("train.py", *TINY, f"--out_dir={tmp_path / 'run'}", f"--data_dir={other}", "--resume=auto")
    assert_one_sentence(status, out, err)
    assert "other training data" in err


def test_mistakes_about_data_are_told_before_the_first_step(cli, data, tmp_path, monkeypatch):
    short = write_data(tmp_path / "short", np.zeros(100, int), np.zeros(100, int))
    no_val = write_data(tmp_path / "no_val", np.zeros(1000, int), np.zeros(16, int))
    torn = write_data(tmp_path / "torn", np.zeros(1000, int), np.zeros(100, int))
    os.truncate(torn / "train.bin", os.path.getsize(torn / "train.bin") - 10)
    for folder, words in ((short, ["100 tokens are 6 windows of block_size 16", "batch_size 8"]), (torn, ["truncated"]),
                          (no_val, ["16 tokens", "block_size 16 + 1"]), (tmp_path / "nowhere", ["no data", "prepare.py"])):
        status, out, err = cli("train.py", *TINY, f"--data_dir={folder}", f"--out_dir={tmp_path / 'run'}")
        assert_one_sentence(status, out, err)
        assert all(word in err for word in words), err
    status, out, err = cli("train.py", *TINY, f"--data_dir={data}", "--vocab_size=256", f"--out_dir={tmp_path / 'run'}")
    assert_one_sentence(status, out, err)
    assert "vocab_size=256" in err and "257" in err
    monkeypatch.setattr(prepare, "ensure_data", lambda cfg: pytest.fail("data was asked for"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    for argv, words in ((["--batch_size=8"], "batch_size=8 does not divide among 3 processes x micro_batch_size=4 = 12"),
                        (["--max_tokens=100"], "max_tokens=100 is less than one step of batch_size 8 x block_size 16 = 128"),
                        (["--device=cuda:99", "--micro_batch_size=1", "--batch_size=3"], "device=cuda:99")):
        status, out, err = cli("train.py", *TINY, *argv, f"--data_dir={data}", f"--out_dir={tmp_path / 'run'}")
        assert_one_sentence(status, out, err)
        assert words in err, err
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(cli, data, tmp_path):
    status, _, err = cli("train.py", *TINY, "--lr=1e30", "--grad_clip=0", f"--data_dir={data}", f"--out_dir={tmp_path / 'run'}")
    assert status == 2 and err.count("\n") == 1 and "the loss is nan at step" in err and "lower lr" in err
    assert "another --out_dir" in err  # going on with other settings is refused


def test_a_final_loss_that_is_not_finite_is_no_result(cli, finished, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *args: math.nan)
    with pytest.raises(UserError, match="validation loss is nan at step 8"):
        train_run(tmp_path / "run", data)
    assert not (tmp_path / "run" / "model.pt").exists()
    saved = torch.load(finished / "model.pt", weights_only=True)
    saved["model"]["norm.weight"][3] = math.nan
    torch.save(saved, tmp_path / "model.pt")
    status, out, err = cli("train.py", *TINY, "--eval_only=True", f"--out_dir={tmp_path}", f"--data_dir={data}")
    assert_one_sentence(status, out, err)
    assert "is nan" in err


def test_perplexity_has_no_largest_loss():
    assert train.perplexity(2.0) == math.exp(2) and train.perplexity(1e4) == math.inf


def test_cards_and_progress_of_a_log_file(cli, data, tmp_path):
    status, out, err = cli("train.py", *TINY, *GUIDED, f"--data_dir={data}", f"--out_dir={tmp_path / 'run'}")
    assert status == 0 and not err and "\r" not in out
    for words in ("12 steps x 8 x 16 = 1.54k tokens", f"{8 * 8 / 250:.2f} epochs", "4 steps replayed", "the first 4 steps of 12",
                  "peak n/a", "not compiled", "MFU n/a", "python sample.py"):
        assert words in out, words
    flops = train.summary(configure(*TINY, *GUIDED))["train_flops_by_phase"]
    assert all(f"{name} {value:.2e}" in out for name, value in flops.items()) and len(flops) == 3


def test_wandb_gets_what_the_file_gets(data, tmp_path, monkeypatch):
    logged = []
    fake = types.SimpleNamespace(init=lambda **kw: types.SimpleNamespace(log=lambda values, step: logged.append((step, values))))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = train_run(tmp_path / "run", data, "--wandb=True")
    assert logged == [(r["step"], {k: v for k, v in r.items() if v is not None}) for r in metrics(out)] and len(logged) == 9
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        train_run(tmp_path / "other", data, "--wandb=True")
    assert os.listdir(tmp_path / "other") == []  # the next try finds it free


# ----------------------------------------------------------------------------------------------------------------------
# eval_only

def test_eval_only_repeats_the_runs_loss_and_scores_other_text(cli, finished, data, tmp_path):
    loss = torch.load(finished / "model.pt", weights_only=True)["val_loss"]
    status, out, err = cli("train.py", *TINY, "--eval_only=True", f"--out_dir={finished}", f"--data_dir={data}",
                           "--micro_batch_size=8")
    assert status == 0 and not err and f"loss {loss:.4f}, PPL {math.exp(loss):.2f} on 160 tokens" in out
    other = write_data(tmp_path / "other", np.zeros(17, int), np.full(33, 200))
    out = cli("train.py", *TINY, "--eval_only=True", f"--out_dir={finished}", f"--data_dir={other}")[1]
    gpt, _, _ = load(str(finished), CPU)
    with torch.no_grad():
        expected = F.cross_entropy(gpt(torch.full((2, 16), 200)).flatten(0, 1), torch.full((32,), 200)).item()
    assert f"loss {expected:.4f}" in out and "on 32 tokens" in out


def test_eval_only_refuses_other_tokens_no_model_and_no_window(cli, finished, data, tmp_path):
    blob = "\n".join(bytes([i]).hex() for i in range(256)).encode()
    foreign = write_data(tmp_path / "foreign", np.zeros(100, int), np.zeros(100, int), "gpt2", blob)
    empty = write_data(tmp_path / "empty", np.zeros(100, int), np.zeros(16, int))
    for out_dir, data_dir, words in ((finished, foreign, "tokenizer byte"), (finished, empty, "validation data's 16 tokens"),
                                     (tmp_path / "none", data, "does not exist"),
                                     (finished, tmp_path / "nowhere", "no data")):
        status, out, err = cli("train.py", *TINY, "--eval_only=True", f"--out_dir={out_dir}", f"--data_dir={data_dir}")
        assert_one_sentence(status, out, err)
        assert words in err


# ----------------------------------------------------------------------------------------------------------------------
# Interruption and resume, bit for bit

def stopped(out, data, after, monkeypatch, *argv, how=signal.SIGTERM):
    """train_run that is sent a signal, or raises, in its `after`-th step."""
    calls, real = [], train.train_step

    def step(*args):
        calls.append(args)
        if len(calls) == after:
            if how is RuntimeError:
                raise how("the machine failed")
            os.kill(os.getpid(), how)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", step)
        train_run(out, data, *argv)


def assert_same_run(out, other):
    """Weights, optimiser and every logged number are equal to the bit."""
    for name in ("model.pt", "ckpt.pt"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (out, other))
        assert a["step"] == b["step"] and a["model"].keys() == b["model"].keys() and a.get("val_loss") == b.get("val_loss")
        assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
        for k, state in a.get("optimizer", {}).items():
            assert all(torch.equal(torch.as_tensor(state[s]), torch.as_tensor(b["optimizer"][k][s])) for s in state), k
    a, b = ([{k: v for k, v in row.items() if k != "tokens_per_s"} for row in metrics(folder)] for folder in (out, other))
    assert a == b


RUNS = {"plain": [], "always": [*LOWRANK, "--guide=fixedflop", "--guide_ratio=0.5"],
        "guided": [*GUIDED, "--dropout=0.1", "--eval_interval=3"],
        "muon": [*GUIDED, "--optimizer=muon", "--lr=0.01", "--weight_decay=auto", "--schedule=linear",
                 "--warmup_steps=2", "--qk_norm=1.2", "--embed_skip=True", "--value_embeddings=True"]}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folders of the uninterrupted runs."""
    folder = tmp_path_factory.mktemp("whole")
    return {name: train_run(folder / name, data, *argv) for name, argv in RUNS.items()}


@pytest.mark.parametrize("name, stops", [
    ("plain", [3]), ("always", [3]), ("guided", [2]), ("guided", [4]), ("guided", [6]), ("guided", [8]), ("guided", [10]),
    ("guided", [1, 4, 5, 9, 11]), ("muon", [2, 6])], ids=str)
def test_resume_equals_no_interruption(name, stops, whole, data, tmp_path, monkeypatch, capsys):
    """guided: 2 is before the switch, 4 at it, 6 after it, 8 before the replay, 10 inside it; dropout is on."""
    out = tmp_path / "run"
    for last, stop in zip([0, *stops], stops):
        with pytest.raises(SystemExit) as e:
            stopped(out, data, stop - last, monkeypatch, *RUNS[name], "--resume=auto")
        assert e.value.code == 128 + signal.SIGTERM and "--resume=auto" in capsys.readouterr().out
        saved = torch.load(out / "ckpt.pt", weights_only=True)
        assert saved["step"] == stop and not (out / "model.pt").exists()
        guides = [k for k in (*saved["model"], *saved["optimizer"]) if k.endswith(".W")]
        assert bool(guides) == (name != "plain" and stop < 4)
    train_run(out, data, *RUNS[name], "--resume=auto")
    assert f"continuing after step {stops[-1]}" in capsys.readouterr().out
    assert_same_run(out, whole[name])


@pytest.mark.parametrize("crash, torn", [(3, ""), (7, '{"step": 7, "tok'), (11, '{"step": 11, "loss": 1.5}'), (6, "")])
def test_after_a_crash_no_step_stands_twice(crash, torn, whole, data, tmp_path, monkeypatch):
    """Checkpoints every 5 steps; the steps after the last one are told again, a torn last line goes."""
    out, flags = tmp_path / "run", [*RUNS["guided"], "--save_interval=5", "--resume=auto"]
    with pytest.raises(RuntimeError, match="machine failed"):
        stopped(out, data, crash, monkeypatch, *flags, how=RuntimeError)
    assert [r["step"] for r in metrics(out) if "loss" in r] == list(range(1, crash))
    with open(out / "metrics.jsonl", "a") as f:
        f.write(torn)
    train_run(out, data, *flags)
    assert_same_run(out, whole["guided"])


def test_a_damaged_checkpoint_is_told(cli, data, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        stopped(tmp_path / "run", data, 3, monkeypatch)
    path = tmp_path / "run" / "ckpt.pt"
    saved = torch.load(path, weights_only=True)
    for other, words in ((None, "damaged"), ({"epoch": 3, "model": {}}, "lacks step, data, optimizer"), ([1], "lacks model, step"),
                         (saved | {"model": weights(tmp_path / "run", "ckpt.pt") | {"more": torch.zeros(1)}}, "do not match")):
        torch.save(other, path) if other else os.truncate(path, 1000)
        status, out, err = cli("train.py", *TINY, f"--out_dir={tmp_path / 'run'}", f"--data_dir={data}", "--resume=auto")
        assert_one_sentence(status, out, err)
        assert "ckpt.pt" in err and words in err


def test_the_runs_padded_vocabulary_is_kept(data, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        stopped(tmp_path / "run", data, 3, monkeypatch, "--vocab_size=300")
    assert len(weights(train_run(tmp_path / "run", data, "--resume=auto"))["wte.weight"]) == 300


@pytest.mark.parametrize("line", ["[]", "3", '{"loss": 1.0}', '{"step": "1"}', '{"step": 9}', '{"step": 1, "val_loss": []}', '{"step": 1, "loss": 1.0}',
                                  "{", 100_000 * "["])
def test_metrics_of_another_kind_are_told(line, data, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        stopped(tmp_path / "run", data, 3, monkeypatch)
    path = tmp_path / "run" / "metrics.jsonl"
    text = f"{line}\n{path.read_text()}"
    path.write_text(text)
    for read in (lambda: train_run(tmp_path / "run", data, "--resume=auto"), lambda: curves.read_run(str(tmp_path / "run"))):
        with pytest.raises(UserError, match="metrics.jsonl is damaged"):
            read()
    assert path.read_text() == text


def test_ctrl_c_saves_and_a_second_one_ends_at_once(data, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as e:
        stopped(tmp_path / "run", data, 3, monkeypatch, how=signal.SIGINT)
    assert e.value.code == 130 and torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 3
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = train.Stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(ALONE) == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            stop.agreed(ALONE)
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def test_after_the_switch_the_guide_is_gone_from_everything(data, tmp_path, monkeypatch):
    made, seen = [], []
    real_optimizer, real_step = train.make_optimizer, train.train_step

    def make_optimizer(cfg, model, ranks):
        made.append((model, real_optimizer(cfg, model, ranks)))
        return made[0][1]

    def train_step(*args):
        model, optimizer = made[0]
        trained = [p for g in optimizer.param_groups for p in g["params"]]
        moments = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
        seen.append(tuple(sum(t.numel() for t in tensors) for tensors in (model.parameters(), trained, moments)))
        return real_step(*args)

    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    monkeypatch.setattr(train, "train_step", train_step)
    out = train_run(tmp_path / "run", data, *LOWRANK, "--guide=fixedstep")
    facts = train.summary(configure(*TINY, *LOWRANK, "--guide=fixedstep"))
    plain, guided = facts["params"], facts["params"] + facts["params_guide"]
    assert seen[1:4] == [(guided, guided, 2 * guided)] * 3 and seen[4:] == [(plain, plain, 2 * plain)] * 4
    assert all(m.W is None for m in made[0][0].modules() if isinstance(m, Structured))
    monkeypatch.undo()
    assert weights(out).keys() == weights(train_run(tmp_path / "plain", data, *LOWRANK)).keys()


# ----------------------------------------------------------------------------------------------------------------------
# Two processes

WORKER = """
import contextlib, io, json, os, sys
sys.path.insert(0, {root!r})
import config, train
real, end = train.dist.init_process_group, train.dist.destroy_process_group
train.dist.init_process_group = lambda *args, **kw: train.dist.is_initialized() or real(*args, **kw)  # one group for all runs
train.dist.destroy_process_group = lambda: None
good, bad = json.load(open({runs!r}))
for argv in good:
    train.main(*config.load(argv, train.Settings))
refusals = []
for argv in bad:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(*config.load(argv, train.Settings))
    except config.UserError as e:
        refusals.append(str(e))
json.dump(refusals, open({runs!r} + os.environ["RANK"], "w"))
end()
"""


@pytest.fixture(scope="module")
def two_processes(data, tmp_path_factory, whole):
    """{name: folder} of runs under torchrun with two gloo processes."""
    folder = tmp_path_factory.mktemp("ddp")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stopped(folder / "moved", data, 3, patch, *GUIDED)
    flags = {"plain": [], "guided": GUIDED, "always": RUNS["always"], "moved": [*GUIDED, "--resume=auto"],
             "muon": RUNS["muon"]}
    runs = [[*TINY, f"--out_dir={folder / name}", f"--data_dir={data}", *argv] for name, argv in flags.items()]
    damaged = [set_token(copy_data(data, folder / name), name, 155, 999) for name in ("val.bin", "train.bin")]  # in window 9, rank 1's in validation
    bad = [[*TINY, f"--out_dir={folder / 'runs.json' / 'run'}", f"--data_dir={data}"]]  # below a file
    bad += [[*TINY, f"--out_dir={folder / path.name}-run", f"--data_dir={path}", "--max_tokens=4096"] for path in damaged]
    (folder / "runs.json").write_text(json.dumps([runs, bad]))
    (folder / "worker.py").write_text(WORKER.format(root=str(ROOT), runs=str(folder / "runs.json")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(folder / "worker.py")]
    torchrun = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = torchrun.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        torchrun.terminate()  # it ends its workers
        out, err = torchrun.communicate()
    assert torchrun.returncode == 0, err[-3000:]
    refusals = [json.loads((folder / f"runs.json{rank}").read_text()) for rank in range(2)]
    return {name: folder / name for name in flags} | {"stdout": out, "refusals": refusals}


def test_two_processes_equal_one(two_processes, whole, data, tmp_path):
    """plain, guided with and without guide_skip, and a guided run that one process began and two finished."""
    one = {name: whole[name] for name in ("plain", "always", "muon")}
    one["guided"] = train_run(tmp_path / "guided", data, *GUIDED)
    one["moved"] = one["guided"]
    for name, out in one.items():
        a, b = (torch.load(folder / "model.pt", weights_only=True) for folder in (out, two_processes[name]))
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5) and a["model"].keys() == b["model"].keys()
        for k in a["model"]:
            torch.testing.assert_close(a["model"][k], b["model"][k], rtol=0, atol=1e-5, msg=lambda text: f"{name} {k}: {text}")
        rows = [metrics(folder) for folder in (out, two_processes[name])]
        assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]]
        for x, y in zip(*rows):
            assert all(x[k] == pytest.approx(y[k], rel=1e-4) for k in x.keys() & {"loss", "grad_norm", "lr", "alpha", "tokens"})


def test_one_of_two_processes_speaks(two_processes):
    out = two_processes["stdout"]
    assert out.count("2 x cpu") == out.count("done     validation loss") == 5
    assert out.count("continuing after step 3 of 12") == 1


def test_what_one_of_two_processes_refuses_both_refuse(two_processes):
    """The folder is rank 0's alone to write, the damaged window of val.bin rank 1's alone to read."""
    one, other = two_processes["refusals"]
    assert one == other and len(one) == 3
    for text, words in zip(one, ("config.json (Not a directory)", "val.bin holds the token id 999", "train.bin holds the token id 999")):
        assert words in text


def test_unused_parameters_are_searched_for_only_with_guide_skip(monkeypatch):
    calls = []
    monkeypatch.setattr(train, "DistributedDataParallel", lambda model, **kw: calls.append(kw["find_unused_parameters"]))
    for flags in (LOWRANK, [*LOWRANK, "--guide=fixedstep"], [*LOWRANK, "--guide=fixedstep", "--guide_skip=True"]):
        cfg = tiny(*flags)
        for step in (0, 3, 4):
            train.wrap_ddp(None, cfg, train.make_plan(cfg), step, Ranks(0, 2, CPU, torch.float32, False))
    assert calls == [False] * 6 + [True, True, False]


# ----------------------------------------------------------------------------------------------------------------------
# Compilation

def test_one_compilation_per_phase_and_variant(data, tmp_path, monkeypatch):
    """A block: once dense, once guided, once plain, once more for validation; alpha, lr and the switch compile nothing."""
    graphs, after, real = [], [], train.train_step

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def train_step(*args):
        result = real(*args)
        after.append((len(graphs), args[-1]))
        return result

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(train, "train_step", train_step)
    flags = [*GUIDED, "--guide_ratio=1", "--max_tokens=2048", "--seed=3"]  # 16 + 16 steps
    out = train_run(tmp_path / "run", data, *flags, "--compile=True")
    seen, variants = set(), []
    for _, guided in after:
        seen |= {"dense"} | {"guided" if layer in guided else "plain" for layer in (1, 2)}
        variants.append(len(seen))
    others = after[0][0] - variants[0]  # the embeddings, the loss, perhaps the last norm
    assert seen == {"dense", "guided", "plain"} and 2 <= others <= 3
    assert [count for count, _ in after] == [n + others for n in variants]
    assert len(graphs) - after[-1][0] == 2 + others - 1  # the last validation: a dense block, a plain one, not the loss
    torch._dynamo.reset()
    monkeypatch.undo()
    eager = train_run(tmp_path / "eager", data, *flags)
    for a, b in zip(weights(out).values(), weights(eager).values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Real text

def entropies(train_ids, val_ids):
    """Nats a byte of the validation text under the training text's byte frequencies: alone, and given the byte before."""
    pairs = collections.Counter(zip(train_ids[:-1], train_ids[1:]))
    single, before = collections.Counter(train_ids), collections.Counter(train_ids[:-1])
    unigram = -np.mean([math.log((single[b] + 0.1) / (len(train_ids) + 25.7)) for b in val_ids])
    bigram = -np.mean([math.log((pairs[a, b] + 0.1) / (before[a] + 25.7)) for a, b in zip(val_ids[:-1], val_ids[1:])])
    return unigram, bigram


def test_the_loss_falls_on_real_text(tmp_path):
    """The standard library's bytes: the loss begins at ln 257 and ends below what byte frequencies alone allow."""
    library = Path(os.__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))[:1_000_000]
    ids = np.frombuffer(text, np.uint8)
    folder = write_data(tmp_path / "data", ids[:900_000], ids[900_000:])
    out = train_run(tmp_path / "run", folder, "--n_embd=64", "--n_head=4", "--block_size=64", "--ffn=lowrank", "--rank=16",
                    "--guide=fixedstep", "--max_tokens=200_000", "--batch_size=16", "--micro_batch_size=16", "--lr=4e-3",
                    "--betas=(0.9,0.95)", "--final_eval_tokens=20_000")
    rows = metrics(out)
    unigram, bigram = entropies(ids[:900_000].tolist(), ids[900_000:920_000].tolist())
    assert rows[0]["loss"] == pytest.approx(math.log(257), abs=0.2)  # the tied head favours repetition
    losses = [r["loss"] for r in rows[:-1]]
    assert 3.0 < unigram < 4.0 and rows[-1]["val_loss"] < unigram - 0.5
    assert abs(np.mean(losses[-20:]) - rows[-1]["val_loss"]) < 0.4


# ----------------------------------------------------------------------------------------------------------------------
# CUDA

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_compiled_steps_equal_eager_steps():
    cfg = tiny(*GUIDED, "--vocab_size=512", "--n_embd=128", "--block_size=64")
    torch.manual_seed(0)
    batches = torch.randint(512, (4, 2, 4, 65), device="cuda")
    losses = []
    for compiled in (False, True):
        gpt = train.build(cfg, torch.device("cuda"), seed=0)
        for _, layer in gpt.structured_linears():
            layer.start_guide()
        if compiled:
            gpt.compile_parts()
        ranks = Ranks(0, 1, torch.device("cuda"), torch.bfloat16, compiled)
        optimizer, alpha = train.make_optimizer(cfg, gpt, ranks), torch.tensor(0.5, device="cuda")
        losses.append([train.train_step(gpt, optimizer, b, cfg, ranks, 1e-3, alpha, guided)[0].item()
                       for b, guided in zip(batches, ((1, 2), (1,), (2,), ()))])
    assert losses[0] == pytest.approx(losses[1], abs=0.02) and losses[0][0] == pytest.approx(math.log(512), abs=0.1)


# ----------------------------------------------------------------------------------------------------------------------
# What users run into

def test_auto_ratio_of_factors_dearer_than_dense_is_refused():
    with pytest.raises(UserError, match="1.13 x as much"):
        train.make_plan(tiny("--ffn=lowrank", "--rank=32", "--guide=fixedflop", "--n_dense_layers=0"))


def test_a_run_cut_off_after_its_last_checkpoint_ends_well(data, tmp_path, capsys):
    out = train_run(tmp_path / "run", data, *LOWRANK)
    before, expected = metrics(out), weights(out)
    (out / "model.pt").unlink()
    train_run(out, data, *LOWRANK, "--resume=auto")
    assert metrics(out) == before and "n/a tokens/s" in capsys.readouterr().out
    assert all(torch.equal(w, expected[name]) for name, w in weights(out).items())


def test_a_checkpoint_without_numbers_is_not_written(data, tmp_path, monkeypatch):
    real = train.train_step

    def step(*args):
        loss, norm = real(*args)
        return loss, norm * math.nan
    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(UserError, match="gradient norm is nan at step 3"):
        train_run(tmp_path / "run", data, "--save_interval=3", "--log_interval=100")
    assert not (tmp_path / "run" / "ckpt.pt").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(cli, data, tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_sentence(*cli("train.py", *TINY, f"--data_dir={data}", f"--out_dir={tmp_path / 'file' / 'run'}"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")
def test_a_full_disk_harms_nothing(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        stopped(out, data, 3, monkeypatch, "--resume=auto")
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    for name in ("config.json", "metrics.jsonl", "ckpt.pt"):
        os.symlink("/dev/full", out / f"{name}.tmp")
        with pytest.raises(UserError, match=f"cannot write .*{name} .No space left on device.: make room"):
            train_run(out, data, "--resume=auto")
        assert sorted(os.listdir(out)) == sorted(before)
        assert all((out / kept).read_bytes() == before[kept] for kept in before if (name, kept) != ("ckpt.pt", "metrics.jsonl"))
    assert metrics(train_run(out, data, "--resume=auto"))[-1]["step"] == 8


def test_a_full_disk_under_the_metrics_is_one_sentence(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "open_metrics", lambda *args: open("/dev/full", "a"))
    with pytest.raises(UserError, match="cannot write /dev/full .No space left"):
        train_run(tmp_path / "run", data)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), MemoryError(),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")], ids=lambda e: type(e).__name__)
def test_what_does_not_fit_into_memory_is_told(error, data, tmp_path, monkeypatch):
    def fail(*args):
        raise error
    monkeypatch.setattr(train, "train_step", fail)
    with pytest.raises(UserError, match="memory of cpu .* micro-batches of 4 x 16 tokens: lower --micro_batch_size, give --recompute=wide") as e:
        train_run(tmp_path / "run", data)
    assert f"{train.short(train.summary(tiny())['params'])} parameters" in str(e.value)


def test_token_ids_beyond_the_vocabulary_are_told(data, tmp_path):
    for name, at in (("train.bin", 1000), ("val.bin", 100)):
        folder = set_token(copy_data(data, tmp_path / name), name, at, 257)
        with pytest.raises(UserError, match=f"{name} holds the token id 257, outside the vocabulary of 257: .* prepare it again"):
            train_run(tmp_path / f"{name}-run", folder, "--max_tokens=4096")


def test_more_steps_than_can_be_counted_are_refused(cli):
    for argv in (["--dry_run=True", "--max_tokens=1e16"], ["--max_tokens=1e299"]):
        status, out, err = cli("train.py", *TINY, *argv)
        assert_one_sentence(status, out, err)
        assert "steps, more than 1e+08" in err
