"""train: the plan, data order, one step against AdamW by hand, fp32 masters, validation, compilation, real text."""
import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import config
import optim
import prepare
import train
from config import UserError
from conftest import LOWRANK, ROOT, STRUCTURES, TINY, assert_one_sentence, train_run, write_data
from device import Ranks
from model import load
from optim import MixedAdamW
from runs import ALONE, CPU, GUIDED, assert_same_run, configure, copy_data, metrics, set_token, stopped, tiny, weights
from test_model import random_model, reference_logits


# ----------------------------------------------------------------------------------------------------------------------
# The plan

def test_learning_rate_warms_up_and_follows_a_cosine():
    cfg = tiny("--max_tokens=12800", "--lr=1e-3", "--warmup_ratio=0.1", "--min_lr_ratio=0.1")  # 100 steps
    plan = train.make_plan(cfg)
    lr = [train.lr_at(cfg, plan, step) for step in range(100)]
    assert plan.steps == 100 and lr[:10] == pytest.approx([1e-4 * k for k in range(1, 11)])
    assert lr[10] == pytest.approx(1e-3) and lr[55] == pytest.approx(0.55e-3)
    assert lr[99] == pytest.approx(1e-4, rel=0.01)
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
    short = dataclasses.replace(cfg, decay_ratio=0.2)
    assert train.lr_at(short, plan, 80) == 1e-3 and train.lr_at(short, plan, 90) == pytest.approx(5e-4)
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
    for schedule, values in (("cosine", (1, 0.5 + 0.5 * root, 0.5, 0.5 - 0.5 * root)),
                             ("linear", (1, 0.75, 0.5, 0.25))):
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


def test_a_dry_run_reports_the_datas_vocabulary_where_there_is_data(cli, data, tmp_path):
    """Else what the tokenizer's name promises; a number on the command line stays."""
    for argv, size in (([f"--data_dir={data}"], 257), ([f"--data_dir={tmp_path}", "--tokenizer=gpt2"], 50257),
                       ([ROOT / "config/s.py", f"--data_dir={data}", "--vocab_size=0"], 257),
                       ([ROOT / "config/s.py", f"--data_dir={data}"], 32000)):
        status, out, err = cli("train.py", *argv, "--dry_run=True")
        assert (status, err) == (0, "") and json.loads(out)["vocab_size"] == size


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


def test_auto_ratio_of_factors_dearer_than_dense_is_refused():
    with pytest.raises(UserError, match="1.13 x as much"):
        train.make_plan(tiny("--ffn=lowrank", "--rank=32", "--guide=fixedflop", "--n_dense_layers=0"))


def test_more_steps_than_can_be_counted_are_refused(cli):
    for argv in (["--dry_run=True", "--max_tokens=1e16"], ["--max_tokens=1e299"]):
        status, out, err = cli("train.py", *TINY, *argv)
        assert_one_sentence(status, out, err)
        assert "steps, more than 2e+06" in err


# ----------------------------------------------------------------------------------------------------------------------
# Data order

@pytest.mark.parametrize("n", [*range(1, 20), *(2**k + d for k in (5, 6, 7, 8, 10) for d in (-1, 0, 1)), 1000, 4097,
                               65537])
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
        other = np.concatenate([train.windows_of(dataclasses.replace(cfg, seed=1), step, n_windows)
                                for step in range(steps)])
        assert len({e.tobytes() for e in (*epochs, other[:n_windows], np.arange(n_windows))}) == 5


def test_windows_do_not_overlap_and_targets_are_one_further(tmp_path):
    write_data(tmp_path, np.arange(1000, 1101), [1], vocab_size=2000)
    got = train.read_windows(prepare.TokenFile(str(tmp_path / "train.bin")), np.array([0, 4]), 20)
    assert got.tolist() == [list(range(1000, 1021)), list(range(1080, 1101))]
    counts = [train.count_windows(types.SimpleNamespace(count=c), 20) for c in (0, 1, 20, 21, 40, 41, 101)]
    assert counts == [0, 0, 0, 1, 1, 2, 5]


def all_batches(cfg, tokens, n_windows, steps, world):
    """{step: the sequences of all ranks in the order of the windows}, read rank by rank."""
    plan, ranks, micro = train.make_plan(cfg), [], cfg.micro_batch_size
    file = types.SimpleNamespace(read=lambda starts, size: np.stack([tokens[at:at + size] for at in starts]))
    for rank in range(world):
        ranks.append(list(train.batches(cfg, plan, file, n_windows, steps,
                                        Ranks(rank, world, CPU, torch.float32, False))))
        assert len(ranks[-1]) == len(steps) and ranks[-1][0].shape == (cfg.batch_size // world // micro, micro, 17)
    return {step: torch.stack([r[i] for r in ranks], 1).flatten(0, 2).numpy() for i, step in enumerate(steps)}


def test_batches_are_the_same_for_any_number_of_processes_and_any_start():
    tokens, cfg = np.random.default_rng(0).integers(0, 257, 16 * 50 + 1), tiny("--batch_size=16", "--max_tokens=2048")
    one, two, four = (all_batches(cfg, tokens, 50, range(8), world) for world in (1, 2, 4))
    late = all_batches(cfg, tokens, 50, range(5, 8), 2)
    for step in range(8):
        expected = np.stack([tokens[w * 16:w * 16 + 17] for w in train.windows_of(cfg, step, 50)])
        assert np.array_equal(one[step], expected)
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
    """Mean loss over micro-batches, clipping, decoupled decay on every parameter; in float64, by other code."""
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


def test_gradients_are_averaged_with_the_last_micro_batch_alone():
    """The others run inside DDP's no_sync."""
    gpt, cfg, inside, seen = random_model(tiny("--vocab_size=61")).float(), tiny("--vocab_size=61"), [], []

    class Wrapped:
        @contextlib.contextmanager
        def no_sync(self):
            inside.append(True)
            yield
            inside.pop()

        def __call__(self, *args):
            seen.append(bool(inside))
            loss = gpt(*args)
            loss.register_hook(lambda grad: seen.append(bool(inside)))  # the backward too
            return loss

    for n, expected in ((3, [True] * 4 + [False] * 2), (1, [False] * 2)):
        seen.clear()
        train.train_step(Wrapped(), train.make_optimizer(cfg, gpt, ALONE), torch.randint(61, (n, 4, 17)), cfg,
                         dataclasses.replace(ALONE, world=2), 1e-3)
        assert seen == expected


# ----------------------------------------------------------------------------------------------------------------------
# A run

def test_the_final_loss_is_that_of_the_first_validation_windows(finished, data):
    """Ten windows in micro-batches of four: the ragged last one counts what it holds."""
    gpt, cfg, saved = load(str(finished), CPU)
    tokens = torch.from_numpy(prepare.TokenFile(str(data / "val.bin")).tokens[:161].astype(np.int64))
    with torch.no_grad():
        expected = F.cross_entropy(gpt(tokens[:160].view(10, 16)).flatten(0, 1).double(), tokens[1:])
    assert saved["val_loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_loss_alpha_and_guided_validation_of_a_guided_run(data, tmp_path, monkeypatch):
    """The logged loss is that of the step, before its update, with its alpha; a validation blends as the next step."""
    seen = []

    def evaluate(model, token_file, n_windows, cfg, ranks, alpha=None, guided=(), show=None):
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


def test_mistakes_about_data_are_told_before_the_first_step(cli, data, tmp_path, monkeypatch):
    short = write_data(tmp_path / "short", np.zeros(100, int), np.zeros(100, int))
    no_val = write_data(tmp_path / "no_val", np.zeros(1000, int), np.zeros(16, int))
    torn = write_data(tmp_path / "torn", np.zeros(1000, int), np.zeros(100, int))
    os.truncate(torn / "train.bin", os.path.getsize(torn / "train.bin") - 10)
    for folder, words in ((short, ["100 tokens are 6 windows of block_size 16", "batch_size 8"]), (torn, ["truncated"]),
                          (no_val, ["16 tokens", "block_size 16 + 1"]), (tmp_path / "nowhere",
                                                                         ["no data", "prepare.py"])):
        status, out, err = cli("train.py", *TINY, f"--data_dir={folder}", f"--out_dir={tmp_path / 'run'}")
        assert_one_sentence(status, out, err)
        assert all(word in err for word in words), err
    status, out, err = cli("train.py", *TINY, f"--data_dir={data}", "--vocab_size=256", f"--out_dir={tmp_path / 'run'}")
    assert_one_sentence(status, out, err)
    assert "vocab_size=256" in err and "257" in err
    monkeypatch.setattr(prepare, "ensure_data", lambda cfg: pytest.fail("data was requested"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    for argv, words in ((["--batch_size=8"], "batch_size=8 does not divide among 3 processes x micro_batch_size=4 "),
                        (["--max_tokens=100"], "max_tokens=100 is less than one step of batch_size 8 x block_size 16"),
                        (["--device=cuda:99", "--micro_batch_size=1", "--batch_size=3"], "device=cuda:99")):
        status, out, err = cli("train.py", *TINY, *argv, f"--data_dir={data}", f"--out_dir={tmp_path / 'run'}")
        assert_one_sentence(status, out, err)
        assert words in err, err
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(cli, data, tmp_path):
    status, _, err = cli("train.py", *TINY, "--lr=1e30", "--grad_clip=0", f"--data_dir={data}",
                         f"--out_dir={tmp_path / 'run'}")
    assert status == 2 and err.count("\n") == 1 and "the loss is nan at step" in err and "lower lr" in err
    assert "another --out_dir" in err  # going on with other settings is refused


def test_a_final_loss_that_is_not_finite_is_no_result(cli, finished, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *args, **kw: math.nan)
    with pytest.raises(UserError, match="validation loss is nan at step 8"):
        train_run(tmp_path / "run", data)
    assert not (tmp_path / "run" / "model.pt").exists()
    saved = torch.load(finished / "model.pt", weights_only=True)
    for value, words in ((math.nan, "norm.weight"), (3e38, "the loss of the model")):
        saved["model"]["norm.weight"][:] = value
        torch.save(saved, tmp_path / "model.pt")
        status, out, err = cli("train.py", *TINY, "--eval_only=True", f"--out_dir={tmp_path}", f"--data_dir={data}")
        assert_one_sentence(status, out, err)
        assert words in err and "diverged" in err


def test_cards_and_progress_of_a_log_file(cli, data, tmp_path):
    status, out, err = cli("train.py", *TINY, *GUIDED, f"--data_dir={data}", f"--out_dir={tmp_path / 'run'}")
    assert status == 0 and not err and "\r" not in out
    for words in ("12 steps x 8 x 16 = 1.54k tokens", f"{8 * 8 / 250:.2f} epochs", "4 steps replayed",
                  "the first 4 steps of 12",
                  "peak n/a", "not compiled", "MFU n/a", "python sample.py"):
        assert words in out, words
    flops = train.summary(configure(*TINY, *GUIDED))["train_flops_by_phase"]
    assert all(f"{name} {value:.2e}" in out for name, value in flops.items()) and len(flops) == 3


def test_token_ids_beyond_the_vocabulary_are_one_sentence(data, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "verify_in_background", lambda *files: lambda wait=False: None)  # checksums fit
    for name, at in (("train.bin", 1000), ("val.bin", 100)):
        folder = set_token(copy_data(data, tmp_path / name), name, at, 257)
        words = f"{name} holds the token id 257, outside the vocabulary of 257: .* prepare it again"
        with pytest.raises(UserError, match=words):
            train_run(tmp_path / f"{name}-run", folder, "--max_tokens=4096")


# ----------------------------------------------------------------------------------------------------------------------
# Validation, dropout, seeds

def test_a_validation_is_without_dropout_and_training_goes_on_with_it(data, tmp_path, monkeypatch):
    modes, real = [], train.train_step

    def step(wrapped, *args):
        modes.append({m.training for m in wrapped.modules()})
        return real(wrapped, *args)
    monkeypatch.setattr(train, "train_step", step)
    out = train_run(tmp_path / "run", data, "--dropout=0.5", "--eval_interval=2")
    gpt, _, saved = load(str(out), CPU)
    tokens = torch.from_numpy(prepare.TokenFile(str(data / "val.bin")).tokens[:161].astype(np.int64))
    with torch.no_grad():
        expected = F.cross_entropy(gpt(tokens[:160].view(10, 16)).flatten(0, 1), tokens[1:])
    assert saved["val_loss"] == pytest.approx(expected.item(), rel=1e-6) and modes == [{True}] * 8


def test_a_validation_of_more_tokens_than_there_are_takes_all(data, tmp_path):
    """401 tokens are 25 windows of 16."""
    out = train_run(tmp_path / "run", data, "--eval_tokens=1e6", "--final_eval_tokens=1e9", "--eval_interval=4")
    gpt, _, saved = load(str(out), CPU)
    tokens = torch.from_numpy(prepare.TokenFile(str(data / "val.bin")).tokens[:401].astype(np.int64))
    with torch.no_grad():
        expected = F.cross_entropy(gpt(tokens[:400].view(25, 16)).flatten(0, 1), tokens[1:])
    assert saved["val_loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert [r["step"] for r in metrics(out) if "val_loss" in r] == [4, 8]


def test_a_validation_makes_no_float64_tensor(data):
    """Not every device has them, as mps has not; the sum is in double precision all the same, on the host."""
    made = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.update(t.dtype for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    cfg = tiny()
    gpt, file = random_model(cfg).float(), prepare.TokenFile(str(data / "val.bin"))
    with Watch():
        loss = train.evaluate(gpt, file, 25, cfg, ALONE)
    assert torch.float32 in made and torch.float64 not in made
    losses = []
    with torch.no_grad():
        for i in range(25):
            window = torch.from_numpy(file.tokens[16 * i:16 * i + 17].astype(np.int64))
            losses.append(F.cross_entropy(gpt(window[None, :-1])[0], window[1:]).double())
    assert loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)


def test_each_dropout_acts_in_training_alone(monkeypatch):
    """On the embeddings and on both branches of each of 3 blocks: what any of these 7 draws changes the output."""
    cfg = tiny("--dropout=0.3", "--vocab_size=61")
    gpt, tokens, calls, zeroed = random_model(cfg).float(), torch.randint(61, (2, 16)), [], None

    def dropout(x, p, training, inplace=False):
        calls.append((tuple(x.shape), p, training))
        return x * 0 if len(calls) - 1 == zeroed else x
    monkeypatch.setattr(F, "dropout", dropout)
    with torch.no_grad():
        whole = gpt.train()(tokens)
        assert calls == [((2, 16, 32), 0.3, True)] * 7
        for zeroed in range(7):
            calls.clear()
            assert not torch.allclose(gpt(tokens), whole, atol=1e-3), zeroed
        zeroed = None
        calls.clear()
        gpt.eval()(tokens)
        assert [training for _, _, training in calls] == [False] * 7


def test_the_seed_is_that_of_the_first_weights(data, tmp_path):
    """lr ~ 0 keeps them."""
    a, b, c = (weights(train_run(tmp_path / str(i), data, "--lr=1e-30", f"--seed={seed}")) for i,
               seed in enumerate((1, 1, 2)))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(not torch.equal(a[k], c[k]) for k in a if a[k].dim() > 1)


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
    for out_dir, data_dir, words in ((finished, foreign, "tokenizer byte"),
                                     (finished, empty, "validation data's 16 tokens"),
                                     (tmp_path / "none", data, "does not exist"),
                                     (finished, tmp_path / "nowhere", "no data")):
        status, out, err = cli("train.py", *TINY, "--eval_only=True", f"--out_dir={out_dir}", f"--data_dir={data_dir}")
        assert_one_sentence(status, out, err)
        assert words in err


# ----------------------------------------------------------------------------------------------------------------------
# Masters in fp32, matrices in bf16: what make_optimizer does on CUDA, here on the CPU

@pytest.fixture
def mixed(monkeypatch):
    """Runs in bf16 train by MixedAdamW."""
    real = train.make_optimizer

    def make_optimizer(cfg, model, ranks):
        if ranks.dtype is torch.float32:
            return real(cfg, model, ranks)
        return MixedAdamW(model.parameters(), cfg.lr, cfg.betas, cfg.weight_decay)
    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    return [*GUIDED, "--dtype=bfloat16", "--eval_interval=3"]


def test_files_hold_the_masters(mixed, data, tmp_path, monkeypatch):
    """All in fp32, and most entries of a matrix are no bf16 numbers; the moments are fp32 too, without a copy."""
    out = train_run(tmp_path / "run", data, *mixed, "--save_interval=3", "--max_tokens=1024")
    with pytest.raises(SystemExit):
        stopped(tmp_path / "guided", data, 3, monkeypatch, *mixed)
    for path in (out / "model.pt", out / "ckpt.pt", tmp_path / "guided" / "ckpt.pt"):
        saved = torch.load(path, weights_only=True)
        for name, t in saved["model"].items():
            assert t.dtype == torch.float32, name
            assert t.dim() < 2 or (t.bfloat16().float() != t).float().mean() > 0.9, name
        for name, state in saved.get("optimizer", {}).items():
            assert state.keys() == {"step", "exp_avg", "exp_avg_sq"} and all(t.dtype == torch.float32
                                                                             for t in state.values()), name
    assert any(name.endswith(".W") for name in saved["model"])
    assert any(name.endswith(".W") for name in saved["optimizer"])


@pytest.mark.parametrize("stops", [[2], [4], [6], [1, 3, 5, 11]], ids=str)
def test_a_mixed_run_resumes_to_the_bit(stops, mixed, data, tmp_path, monkeypatch):
    whole, out = train_run(tmp_path / "whole", data, *mixed), tmp_path / "run"
    for last, stop in zip([0, *stops], stops):
        with pytest.raises(SystemExit):
            stopped(out, data, stop - last, monkeypatch, *mixed, "--resume=auto")
    assert_same_run(train_run(out, data, *mixed, "--resume=auto"), whole)


def test_a_mixed_run_learns_what_a_float32_one_does(mixed, data, tmp_path):
    mine, exact, start = (weights(train_run(tmp_path / str(i), data, *flags))
                          for i, flags in enumerate((mixed, GUIDED, [*GUIDED, "--lr=1e-30"])))
    for name, t in exact.items():
        assert (mine[name] - t).norm() < 0.3 * (t - start[name]).norm() + 1e-6, name


def test_the_fused_update_never_sees_a_guide_that_has_left(mixed, data, tmp_path, monkeypatch):
    """Its tables hold addresses. A stand-in that updates what its tables hold must reach the plain update's weights."""
    whole, made = train_run(tmp_path / "plain", data, *mixed), []

    def adamw_tables(masters, params, m, v):
        made.append(len(masters))
        return [masters, params or masters, m, v]

    def adamw(tables, grads, corrections, scale, decay, betas, eps):
        for p, half, m, v, grad, (rate, root) in zip(*tables, grads, corrections, strict=True):
            if grad is not None:
                grad = grad.float() * scale
                m.lerp_(grad, 1 - betas[0])
                v.lerp_(grad * grad, 1 - betas[1])
                p.mul_(1 - decay).sub_(rate * m / (v.sqrt() * root + eps))
                half.copy_(p)

    fake = types.SimpleNamespace(ON=True, can_adamw=lambda _: True, adamw_tables=adamw_tables, adamw=adamw)
    monkeypatch.setattr(optim, "ops", fake)
    out = train_run(tmp_path / "fused", data, *mixed)
    matrices = sum(t.dim() > 1 for n, t in weights(out).items() if n != "head.weight")
    assert [n for n in made if n in (matrices, matrices + 4)] == [matrices + 4,
                                                                  matrices]  # with the 4 guides, then without
    for name, t in weights(whole).items():
        torch.testing.assert_close(weights(out)[name], t, rtol=1e-5, atol=1e-7, msg=lambda text: f"{name}: {text}")


# ----------------------------------------------------------------------------------------------------------------------
# Compilation

def test_one_compilation_per_phase_and_variant(data, tmp_path, monkeypatch):
    """A block: once dense, guided, plain, and once more for validation; alpha, lr and the switch compile nothing."""
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


def test_a_compiled_block_uses_one_dropout_mask_in_forward_and_recomputed_backward(monkeypatch):
    """Central differences under one seed, in float64: they see the forward's mask alone."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    gpt = random_model(tiny(*LOWRANK, "--vocab_size=61", "--dropout=0.4")).double().train()
    gpt.compile_parts()
    tokens = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value():
        torch.manual_seed(5)
        return (gpt.hidden(tokens) * weight).sum()

    value().backward()
    for name, p in gpt.named_parameters():
        if p.grad is None or name in ("head.weight", "blocks.0.norm1.weight"):
            continue
        step = 1e-6 * p.grad / p.grad.norm()
        with torch.no_grad():
            p += step
            above = value()
            p -= 2 * step
            below = value()
            p += step
        assert ((above - below) / 2e-6).item() == pytest.approx(p.grad.norm().item(), rel=1e-4), name
    torch._dynamo.reset()


# ----------------------------------------------------------------------------------------------------------------------
# Real text

def entropies(train_ids, val_ids):
    """Nats a byte of the validation text by the training text's byte frequencies: alone, and given the byte before."""
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
    out = train_run(tmp_path / "run", folder, "--n_embd=64", "--n_head=4", "--block_size=64", "--ffn=lowrank",
                    "--rank=16",
                    "--guide=fixedstep", "--max_tokens=200_000", "--batch_size=16", "--micro_batch_size=16",
                    "--lr=4e-3",
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
# Damaged data

@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_damaged_data_ends_a_run_before_a_model_is_saved(cli, data, tmp_path, name):
    folder = set_token(copy_data(data, tmp_path / "data"), name, 100, 7)
    status, _, err = cli("train.py", *TINY, f"--data_dir={folder}", f"--out_dir={tmp_path}/out")
    assert status == 2 and f"{name} is damaged" in err and "Traceback" not in err
    assert not (tmp_path / "out" / "model.pt").exists()


def test_the_check_of_large_files_is_waited_for_before_a_model_is_saved(data, tmp_path, monkeypatch):
    def found_late(*files):
        def raise_damage(wait=False):
            if wait:
                raise UserError("train.bin is damaged.")
        return raise_damage

    monkeypatch.setattr(prepare, "verify_in_background", found_late)
    with pytest.raises(UserError, match="train.bin is damaged"):
        train_run(tmp_path / "out", data)
    assert not (tmp_path / "out" / "model.pt").exists()


def test_a_run_with_muon_moves_its_rates_momentum_and_decay(data, tmp_path, monkeypatch):
    argv = ["--optimizer=muon", "--lr=0.01", "--embed_lr=0.3", "--weight_decay=0.5", "--tie_embeddings=False"]
    cfg, seen, step = tiny(*argv), [], train.train_step

    def noted(wrapped, optimizer, *args):
        result = step(wrapped, optimizer, *args)
        embed, = [group["lr"] for group in optimizer.param_groups if group["params"][0] is wrapped.wte.weight]
        seen.append((optimizer.momentum, optimizer.decay, optimizer.param_groups[0]["lr"], embed))
        return result

    monkeypatch.setattr(train, "train_step", noted)
    train_run(tmp_path / "out", data, *argv)
    plan = train.make_plan(cfg)
    rates = [train.lr_at(cfg, plan, k) for k in range(8)]
    assert seen == [(*train.muon_at(cfg, plan, k), rate, pytest.approx(30 * rate)) for k, rate in enumerate(rates)]
    assert len({momentum for momentum, *_ in seen}) == 8


def test_a_damaged_validation_file_is_not_scored(cli, data, finished, tmp_path):
    folder = set_token(copy_data(data, tmp_path / "data"), "val.bin", 100, 7)
    status, out, err = cli("train.py", "--eval_only=True", f"--out_dir={finished}", f"--data_dir={folder}",
                           "--device=cpu")
    assert status == 2 and "val.bin is damaged" in err and not out
