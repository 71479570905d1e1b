"""schedule: the plan, rates, alpha, skip draws, FLOPs; the data order as a bijection, for any number of processes."""
import dataclasses
import json
import math
import types

import numpy as np
import pytest
import torch

import prepare
import schedule
from config import UserError
from conftest import LOWRANK, ROOT, STRUCTURES, TINY, assert_one_sentence, write_data
from device import Ranks
from runs import CPU, GUIDED, configure, tiny


# ----------------------------------------------------------------------------------------------------------------------
# The plan

def test_learning_rate_warms_up_and_follows_a_cosine():
    cfg = tiny("--max_tokens=12800", "--lr=1e-3", "--warmup_ratio=0.1", "--min_lr_ratio=0.1")  # 100 steps
    plan = schedule.make_plan(cfg)
    lr = [schedule.lr_at(cfg, plan, step) for step in range(100)]
    assert plan.steps == 100 and lr[:10] == pytest.approx([1e-4 * k for k in range(1, 11)])
    assert lr[10] == pytest.approx(1e-3) and lr[55] == pytest.approx(0.55e-3)
    assert lr[99] == pytest.approx(1e-4, rel=0.01)
    assert lr[10:] == sorted(lr[10:], reverse=True) and min(lr[10:]) > 1e-4
    flat = dataclasses.replace(cfg, warmup_ratio=0.0, min_lr_ratio=1.0)
    assert [schedule.lr_at(flat, plan, step) for step in (0, 50, 99)] == [1e-3] * 3
    assert schedule.lr_at(dataclasses.replace(cfg, warmup_ratio=1.0), plan, 99) == 1e-3


def test_a_line_to_zero_over_the_last_part_of_the_steps():
    cfg = tiny("--max_tokens=12800", "--lr=1e-3", "--warmup_steps=4", "--schedule=linear", "--decay_ratio=0.5",
               "--min_lr_ratio=0")  # 100 steps
    plan = schedule.make_plan(cfg)
    lr = [schedule.lr_at(cfg, plan, step) for step in range(100)]
    assert lr[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3]) and lr[4:51] == [1e-3] * 47
    assert lr[75] == pytest.approx(5e-4) and lr[99] == pytest.approx(2e-5)
    short = dataclasses.replace(cfg, decay_ratio=0.2)
    assert schedule.lr_at(short, plan, 80) == 1e-3 and schedule.lr_at(short, plan, 90) == pytest.approx(5e-4)
    late = dataclasses.replace(cfg, warmup_steps=60, min_lr_ratio=0.1)  # the warm-up ends after the fall would begin
    assert schedule.lr_at(late, plan, 60) == 1e-3 and schedule.lr_at(late, plan, 80) == pytest.approx(0.55e-3)


def test_muons_momentum_rises_and_falls_and_its_decay_ends():
    cfg = tiny("--max_tokens=128000", "--optimizer=muon", "--lr=0.01", "--weight_decay=0.8", "--decay_ratio=0.4",
               "--warmup_ratio=0")  # 1000 steps
    plan = schedule.make_plan(cfg)
    momentum, decay = zip(*(schedule.muon_at(cfg, plan, step) for step in (0, 200, 400, 600, 800, 999)))
    assert momentum == pytest.approx([0.85, 0.91, 0.97, 0.97, 0.935, 0.90], abs=2e-4)
    assert decay[0] == 0.8 and decay[1] == pytest.approx(0.8 * 0.9045, rel=1e-3) and decay[5] < 1e-5


def test_alpha_falls_from_one_to_zero():
    root = math.sqrt(0.5)
    for kind, values in (("cosine", (1, 0.5 + 0.5 * root, 0.5, 0.5 - 0.5 * root)),
                             ("linear", (1, 0.75, 0.5, 0.25))):
        cfg = tiny(*LOWRANK, "--guide=fixedstep", f"--guide_schedule={kind}", "--max_tokens=2048")  # 8 of 16 steps
        plan = schedule.make_plan(cfg)
        assert (plan.steps, plan.unique, plan.guided) == (16, 16, 8)
        assert [schedule.alpha_at(cfg, plan, step) for step in (0, 2, 4, 6)] == pytest.approx(values)
        assert all(schedule.alpha_at(cfg, plan, step) == 0 for step in (8, 9, 15))
        assert schedule.alpha_at(cfg, plan, 7) > 0


def test_steps_of_the_guides():
    def plan(*argv):
        p = schedule.make_plan(tiny("--max_tokens=12800", *argv))
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
        plan = schedule.make_plan(cfg)
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
    dense = schedule.summary(tiny(*shape))["train_flops"]
    facts = schedule.summary(tiny(*shape, *flags, *f"--guide={guide}".split()))
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
    assert schedule.summary(cfg)["train_flops_by_phase"] == pytest.approx(expected, rel=1e-5)


def test_skip_draws_are_pure_and_have_alpha_as_their_mean():
    ten_thousand_steps = ["--guide_ratio=1", "--max_tokens=1_280_000"]
    cfg = tiny(*LOWRANK, "--guide=fixedstep", "--guide_skip=True", "--n_layer=5", *ten_thousand_steps)
    plan = schedule.make_plan(cfg)
    draws = [schedule.guided_layers(cfg, plan, step) for step in range(plan.steps)]
    assert draws[::-7] == [schedule.guided_layers(cfg, plan, step) for step in range(plan.steps)][::-7]
    assert draws[0] == (1, 2, 3, 4) and all(0 not in d for d in draws)
    for begin in range(0, 10_000, 1000):
        alpha = np.mean([schedule.alpha_at(cfg, plan, step) for step in range(begin, begin + 1000)])
        assert abs(np.mean([len(d) / 4 for d in draws[begin:begin + 1000]]) - alpha) < 0.03
    together = np.mean([(1 in d) == (2 in d) for d in draws[4500:5500]])
    assert abs(together - 0.5) < 0.06  # layers are drawn apart
    other = dataclasses.replace(cfg, seed=1)
    assert draws[4000:4100] != [schedule.guided_layers(other, plan, step) for step in range(4000, 4100)]
    always = dataclasses.replace(cfg, guide_skip=False)
    assert schedule.guided_layers(always, plan, 9999) == (1, 2, 3, 4)
    half = schedule.make_plan(dataclasses.replace(cfg, guide_ratio=0.5))
    assert schedule.guided_layers(always, half, 4999) == (1, 2, 3, 4)
    assert schedule.guided_layers(always, half, 5000) == ()


def test_auto_ratio_of_factors_dearer_than_dense_is_refused():
    with pytest.raises(UserError, match="1.13 x as much"):
        schedule.make_plan(tiny("--ffn=lowrank", "--rank=32", "--guide=fixedflop", "--n_dense_layers=0"))


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
            order = schedule.permute(np.arange(n), n, key)
            assert order[n // 2] == schedule.permute(np.array([n // 2]), n, key)[0]  # of the index alone
        assert np.array_equal(np.sort(order), np.arange(n))
        orders.add(order.tobytes())
    assert n < 20 or len(orders) == 4


def test_a_permutation_looks_random():
    """No correlation with the index, and neighbours are torn apart: few of the 9999 differences are small."""
    with np.errstate(over="ignore"):
        order = schedule.permute(np.arange(10_000), 10_000, 1005)
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(order)) < 100) < 0.04  # 2 % by chance


@pytest.mark.parametrize("n_windows, batch", [(40, 8), (37, 8), (8, 8), (8, 16), (3, 8), (1, 4), (250, 7)])
def test_every_window_stands_once_in_every_epoch(n_windows, batch):
    cfg = tiny(f"--batch_size={batch}", "--micro_batch_size=1")
    steps = -(-3 * n_windows // batch)
    sequence = np.concatenate([schedule.windows_of(cfg, step, n_windows) for step in range(steps)])
    epochs = sequence[:3 * n_windows].reshape(3, n_windows)
    assert all(np.array_equal(np.sort(epoch), np.arange(n_windows)) for epoch in epochs)
    if n_windows > 30:
        other = np.concatenate([schedule.windows_of(dataclasses.replace(cfg, seed=1), step, n_windows)
                                for step in range(steps)])
        assert len({e.tobytes() for e in (*epochs, other[:n_windows], np.arange(n_windows))}) == 5


def test_windows_do_not_overlap_and_targets_are_one_further(tmp_path):
    write_data(tmp_path, np.arange(1000, 1101), [1], vocab_size=2000)
    got = schedule.read_windows(prepare.TokenFile(str(tmp_path / "train.bin")), np.array([0, 4]), 20)
    assert got.tolist() == [list(range(1000, 1021)), list(range(1080, 1101))]
    counts = [schedule.count_windows(types.SimpleNamespace(count=c), 20) for c in (0, 1, 20, 21, 40, 41, 101)]
    assert counts == [0, 0, 0, 1, 1, 2, 5]


def all_batches(cfg, tokens, n_windows, steps, world):
    """{step: the sequences of all ranks in the order of the windows}, read rank by rank."""
    plan, ranks, micro = schedule.make_plan(cfg), [], cfg.micro_batch_size
    file = types.SimpleNamespace(read=lambda starts, size: np.stack([tokens[at:at + size] for at in starts]))
    for rank in range(world):
        ranks.append(list(schedule.batches(cfg, plan, file, n_windows, steps,
                                        Ranks(rank, world, CPU, torch.float32, False))))
        assert len(ranks[-1]) == len(steps) and ranks[-1][0].shape == (cfg.batch_size // world // micro, micro, 17)
    return {step: torch.stack([r[i] for r in ranks], 1).flatten(0, 2).numpy() for i, step in enumerate(steps)}


def test_batches_are_the_same_for_any_number_of_processes_and_any_start():
    tokens, cfg = np.random.default_rng(0).integers(0, 257, 16 * 50 + 1), tiny("--batch_size=16", "--max_tokens=2048")
    one, two, four = (all_batches(cfg, tokens, 50, range(8), world) for world in (1, 2, 4))
    late = all_batches(cfg, tokens, 50, range(5, 8), 2)
    for step in range(8):
        expected = np.stack([tokens[w * 16:w * 16 + 17] for w in schedule.windows_of(cfg, step, 50)])
        assert np.array_equal(one[step], expected)
        assert np.array_equal(one[step], two[step]) and np.array_equal(one[step], four[step])
        assert step < 5 or np.array_equal(one[step], late[step])


def test_dropouts_keys_are_one_for_every_sequence_place_step_and_seed():
    """They belong to the sequences, whose order in `batches` they share, however these are split."""
    cfg = tiny("--batch_size=16", "--dropout=0.1")

    def keys(cfg, step, world, micro):
        cfg = dataclasses.replace(cfg, micro_batch_size=micro)
        ranks = [schedule.dropout_keys(cfg, step, Ranks(rank, world, CPU, torch.float32, False))
                 for rank in range(world)]
        assert ranks[0].shape == (16 // world // micro, 7, micro) and ranks[0].dtype is torch.int64
        return torch.stack(ranks, 1).movedim(2, 0).flatten(1)                    # (places, sequences)
    one = keys(cfg, 3, 1, 16)
    assert all(torch.equal(one, keys(cfg, 3, *split)) for split in ((1, 1), (2, 4), (2, 8), (4, 2), (8, 2)))
    every = torch.stack([keys(c, step, 1, 4) for c in (cfg, dataclasses.replace(cfg, seed=1)) for step in range(50)])
    assert len(every.unique()) == 100 * 7 * 16 and every.min() > 0 and len((every & 0x7FFFFFFF).unique()) > 11_190


def test_fixedflop_replays_the_guided_steps_data():
    tokens, cfg = np.random.default_rng(0).integers(0, 257, 16 * 100 + 1), tiny(*GUIDED)
    batch = all_batches(cfg, tokens, 100, range(12), 1)
    assert all(np.array_equal(batch[8 + k], batch[k]) for k in range(4))
    assert len({b.tobytes() for b in batch.values()}) == 8
    control = all_batches(tiny(*LOWRANK, "--guide=replay", "--guide_ratio=0.5"), tokens, 100, range(12), 1)
    assert all(np.array_equal(control[k], batch[k]) for k in range(12))
