"""train: one step against AdamW by hand, fp32 masters, validation, compilation, real text."""
import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import config
import model as model_file
import optim
import prepare
import run
import schedule
import train
from config import UserError
from conftest import LOWRANK, TINY, assert_one_sentence, train_run, write_data
from device import Ranks
from model import load
from optim import MixedAdamW
from runs import (ALONE, CPU, GUIDED, RUNS, assert_same_run, configure, copy_data, metrics, set_token, stopped, tiny,
                  weights)
from test_model import random_model, reference_logits


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

    def evaluate(model, token_file, n_windows, cfg, ranks, alpha=None, guided=(), show=None, stop=None):
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
    for name, value in (("WORLD_SIZE", "3"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    for argv, words in ((["--batch_size=8"], "batch_size=8 does not divide among 3 processes x micro_batch_size=4 "),
                        (["--max_tokens=100"], "max_tokens=100 is less than one step of batch_size 8 x block_size 16"),
                        (["--device=cuda:99", "--micro_batch_size=1", "--batch_size=3"], "device=cuda:99")):
        status, out, err = cli("train.py", *TINY, *argv, f"--data_dir={data}", f"--out_dir={tmp_path / 'run'}")
        assert_one_sentence(status, out, err)
        assert words in err, err
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_diverged_ends_in_one_sentence(cli, data, tmp_path):
    status, _, err = cli("train.py", *TINY, "--lr=1e30", "--grad_clip=0", f"--data_dir={data}",
                         f"--out_dir={tmp_path / 'run'}", "--max_bad_steps=5")
    assert status == 2 and err.count("\n") == 1 and len(err) < 400 and "lower lr" in err
    assert "5 steps in a row, the last of them 6, have a loss or gradient that is not finite" in err
    assert f"the last good loss logged is {metrics(tmp_path / 'run')[0]['loss']:.4f}" in err
    assert "another --out_dir" in err  # going on with other settings is refused


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_updates_nothing_though_its_gradient_is(bad):
    cfg = tiny("--vocab_size=61")
    gpt = random_model(cfg).float()
    before = {n: p.detach().clone() for n, p in gpt.named_parameters()}
    optimizer = train.make_optimizer(cfg, gpt, ALONE)
    batch = torch.randint(61, (2, 4, 17), generator=torch.Generator().manual_seed(0))
    _, norm = train.train_step(lambda *args: gpt(*args) + bad, optimizer, batch, cfg, ALONE, 1e-3)
    assert not norm.isfinite() and all(torch.equal(p, before[n]) for n, p in gpt.named_parameters())
    _, norm = train.train_step(gpt, optimizer, batch, cfg, ALONE, 1e-3)
    assert norm.isfinite() and not torch.equal(gpt.wte.weight, before["wte.weight"])


@pytest.fixture
def bad_steps(monkeypatch):
    """bad_steps(2, 5): the gradients of these steps of a run are not finite."""
    calls, real = [], train.train_step

    def choose(*steps, first=1):
        calls[:] = range(first - 1)

        def step(wrapped, optimizer, batch, cfg, ranks, *args):
            calls.append(1)
            factor = math.nan if len(calls) in steps else 1
            return real(lambda *inputs: wrapped(*inputs) * factor, optimizer, batch, cfg, ranks, *args)
        monkeypatch.setattr(train, "train_step", step)
    return choose


@pytest.mark.parametrize("name", ["plain", "muon"])
def test_bad_steps_are_skipped_counted_and_resumed(name, bad_steps, data, tmp_path, monkeypatch):
    """Steps 3, 4 and 7 of a run; log lines every 2 steps. Interrupted after 3 it is the same run."""
    flags = [*RUNS[name], "--log_interval=2", "--grad_clip=0"]
    bad_steps(3, 4, 7)
    whole = train_run(tmp_path / "whole", data, *flags)
    rows = metrics(whole)
    assert [r["step"] for r in rows if "skipped" in r] == [3, 4, 7]
    assert [r["step"] for r in rows if "loss" in r] == [s for s in range(1, rows[-1]["step"] + 1)
                                                       if s in (1, rows[-1]["step"]) or s % 2 == 0 and s != 4]
    assert all(math.isfinite(v) for r in rows for v in r.values() if v is not None)
    bad_steps(3, 4, 7)
    with pytest.raises(SystemExit):
        stopped(tmp_path / "run", data, 3, monkeypatch, *flags)
    assert metrics(tmp_path / "run")[-1] == {"step": 3, "skipped": 1}
    bad_steps(3, 4, 7, first=4)
    train_run(tmp_path / "run", data, *flags, "--resume=auto")
    assert_same_run(tmp_path / "run", whole)


def test_too_many_bad_steps_in_a_row_end_the_run_with_its_checkpoint(bad_steps, data, tmp_path):
    bad_steps(2, 3, 5, 6, 7)
    words = r"3 steps in a row, the last of them 7, .* loss logged is 5\.\d+: the checkpoint of step 6 is kept"
    with pytest.raises(UserError, match=words) as e:
        train_run(tmp_path / "run", data, "--max_bad_steps=3", "--save_interval=2")
    assert len(str(e.value)) < 400
    saved = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert saved["step"] == 6 and all(t.isfinite().all() for t in saved["model"].values())


def test_a_spike_of_the_loss_is_recorded_also_after_a_resume(data, tmp_path, monkeypatch):
    """The losses are 3 but for that of step 30, which is 9 and the only spike, interrupted before it or not."""
    real = run.is_spike
    monkeypatch.setattr(run, "is_spike", lambda losses, loss: real([3.0] * len(losses), 9.0 if spiking[0] else 3.0))
    spiking, step = [False], run.Log.step

    def log_step(self, number, *args):
        spiking[0] = number == 30
        step(self, number, *args)
    monkeypatch.setattr(run.Log, "step", log_step)
    flags = ["--max_tokens=5120"]  # 40 steps
    whole = train_run(tmp_path / "whole", data, *flags)
    assert [r["step"] for r in metrics(whole) if "spike" in r] == [30]
    with pytest.raises(SystemExit):
        stopped(tmp_path / "run", data, 25, monkeypatch, *flags)
    assert_same_run(train_run(tmp_path / "run", data, *flags, "--resume=auto"), whole)


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
    keys = schedule.dropout_keys(dataclasses.replace(cfg, micro_batch_size=2, batch_size=2), 3, ALONE)[0]

    def dropout(x, p, drawn):
        calls.append((tuple(x.shape), p, drawn.tolist()))
        return x * 0 if len(calls) - 1 == zeroed else x
    monkeypatch.setattr(model_file, "dropout", dropout)
    with torch.no_grad():
        whole = gpt.train()(tokens, keys=keys)
        assert calls == [((2, 16, 32), 0.3, key.tolist()) for key in keys] and len(calls) == 7
        for zeroed in range(7):
            calls.clear()
            assert not torch.allclose(gpt(tokens, keys=keys), whole, atol=1e-3), zeroed
        with pytest.raises(AssertionError, match="needs keys"):
            gpt(tokens)
        calls.clear()
        gpt.eval()(tokens)
        assert not calls


def test_dropout_keeps_a_share_of_the_entries_by_place_and_key():
    """Each key's mask against the others and itself shifted: as independent as coins; the kept are divided by 1 - p."""
    keys = schedule.dropout_keys(tiny("--dropout=0.3", "--n_layer=2"), 5, ALONE).flatten()        # 2 x 5 x 4
    x = torch.ones(len(keys), 64, 48)
    y = model_file.dropout(x, 0.3, keys)
    kept = y != 0
    assert torch.equal(y[kept], torch.full((int(kept.sum()),), 1 / 0.7)) and len(keys) == 40
    share = kept.float().mean((1, 2))                                                             # of 3072 entries
    assert (share - 0.7).abs().max() < 4 * (0.21 / 3072) ** 0.5 and abs(share.mean() - 0.7) < 0.005
    masks = kept.flatten(1).double() - 0.7
    shifted = torch.stack([masks[0].roll(n) for n in (1, 2, 47, 48, 49, 64, 1024)])
    correlation = torch.cat((masks, shifted)) @ torch.cat((masks, shifted)).T / (0.21 * 3072)
    assert (correlation - torch.eye(47)).abs().max() < 5 / 3072 ** 0.5
    halves = model_file.dropout(torch.ones(4, 64, 48), 0.3, torch.tensor([5, 6, 5 + 2**31, 5 + 2**32])) != 0
    assert all((halves[0] == other).float().mean() < 0.65 for other in halves[1:])                # both halves count
    alone = torch.cat([model_file.dropout(x[i:i + 1], 0.3, keys[i:i + 1]) for i in range(40)])
    assert torch.equal(alone, y)                                                                  # whatever the batch


def test_the_hash_of_dropout_is_one_to_one_and_that_of_its_paper():
    """Against the same in Python's integers."""
    def by_hand(x):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return x
    values = [0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1, 0xDEADBEEF]
    got = model_file.scramble(torch.tensor([v - 2**32 if v >= 2**31 else v for v in values], dtype=torch.int32))
    assert [int(v) % 2**32 for v in got] == [by_hand(v) for v in values]
    assert len(model_file.scramble(torch.arange(100_000, dtype=torch.int32)).unique()) == 100_000


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


def test_eval_only_without_data_advises_the_runs_tokenizer(cli, finished, tmp_path, monkeypatch):
    """And what it advises leads to data that the same command opens."""
    run = shutil.copytree(finished, tmp_path / "run")
    saved = torch.load(run / "model.pt", weights_only=True)
    torch.save(saved | {"config": saved["config"] | {"tokenizer": "byte"}}, run / "model.pt")
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be or not to be\n" * 99)
    flags = ["--eval_only=True", "--dataset=text", "--input=text.txt", f"--out_dir={run}", "--device=cpu",
             "--batch_size=4", "--micro_batch_size=4"]
    for place in ([], ["--data_dir=mine"]):
        status, out, err = cli("train.py", *flags, *place)
        assert_one_sentence(status, out, err)
        command = err.partition("`python ")[2].partition("`")[0].split()
        assert command == ["prepare.py", "--dataset=text", "--input=text.txt", "--tokenizer=byte", *place]
        assert cli(*command)[0] == 0
        status, out, err = cli("train.py", *flags, *place)
        assert (status, err) == (0, "") and f"{run} on {'mine' if place else 'data/text-byte'}: loss" in out


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

    class AdamWTables:
        def __init__(self, masters, params, m, v):
            made.append(len(masters))
            self.tensors = masters, params or masters, m, v

        def upload(self, grads, numbers):
            self.new = grads, numbers

    def adamw(tables, scale, betas, eps):
        for p, half, m, v, grad, (rate, root, decay) in zip(*tables.tensors, *tables.new, strict=True):
            if grad is not None:
                grad = grad.float() * scale
                m.lerp_(grad, 1 - betas[0])
                v.lerp_(grad * grad, 1 - betas[1])
                p.mul_(1 - decay).sub_(rate * m / (v.sqrt() * root + eps))
                half.copy_(p)

    fake = types.SimpleNamespace(ON=True, can_adamw=lambda _: True, AdamWTables=AdamWTables, adamw=adamw)
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
        after.append((len(graphs), args[7]))
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
    """Central differences with one set of keys, in float64: they see the forward's mask alone."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    gpt = random_model(tiny(*LOWRANK, "--vocab_size=61", "--dropout=0.4")).double().train()
    gpt.compile_parts()
    tokens = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    keys = schedule.dropout_keys(tiny("--dropout=0.4"), 0, ALONE)[0]

    def value():
        return (gpt.hidden(tokens, keys=keys) * weight).sum()

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

def entropy(train_ids, val_ids):
    """Nats a byte of the validation text by the training text's byte frequencies."""
    counts = collections.Counter(train_ids)
    return -np.mean([math.log((counts[b] + 0.1) / (len(train_ids) + 25.7)) for b in val_ids])


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
    unigram = entropy(ids[:900_000].tolist(), ids[900_000:920_000].tolist())
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
