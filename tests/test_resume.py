"""Interruption and resume, bit for bit: signals, crashes, odd logs, outputs that fail."""
import math
import os
import signal
import sys
import time
import types

import pytest
import torch

import curves
import device
import train
from config import UserError
from conftest import LOWRANK, ROOT, TINY, assert_one_sentence, assert_stream_sentence, start, train_run
from runs import ALONE, RUNS, assert_same_run, configure, metrics, stopped, weights
from structured import Structured


# ----------------------------------------------------------------------------------------------------------------------
# Resume

@pytest.mark.parametrize("name, stops", [
    ("plain", [3]), ("always", [3]), ("guided", [2]), ("guided", [4]), ("guided", [6]), ("guided", [8]),
    ("guided", [10]), ("guided", [1, 4, 5, 9, 11]), ("muon", [2, 6])], ids=str)
def test_resume_equals_no_interruption(name, stops, whole, data, tmp_path, monkeypatch, capsys):
    """guided: 2 is before the switch, 4 at it, 6 after it, 8 before the replay, 10 inside it; dropout is on."""
    out = tmp_path / "run"
    for last, stop in zip([0, *stops], stops):
        with pytest.raises(SystemExit) as e:
            stopped(out, data, stop - last, monkeypatch, *RUNS[name], "--resume=auto")
        assert e.value.code == 75 and "--resume=auto" in capsys.readouterr().out
        saved = torch.load(out / "ckpt.pt", weights_only=True)
        assert saved["step"] == stop and not (out / "model.pt").exists()
        guides = [k for k in (*saved["model"], *saved["optimizer"]) if k.endswith(".W")]
        assert bool(guides) == (name != "plain" and stop < 4)
    train_run(out, data, *RUNS[name], "--resume=auto")
    assert f"continuing after step {stops[-1]}" in capsys.readouterr().out
    assert_same_run(out, whole[name])


@pytest.mark.parametrize("crash, torn", [(3, ""), (7, '{"step": 7, "tok'), (11, '{"step": 11, "loss": 1.5}'), (6, "")])
def test_after_a_crash_no_step_stands_twice(crash, torn, whole, data, tmp_path, monkeypatch):
    """Checkpoints every 5 steps; the steps after the last one are logged again, a torn last line goes."""
    out, flags = tmp_path / "run", [*RUNS["guided"], "--save_interval=5", "--resume=auto"]
    with pytest.raises(RuntimeError, match="machine failed"):
        stopped(out, data, crash, monkeypatch, *flags, how=RuntimeError)
    assert [r["step"] for r in metrics(out) if "loss" in r] == list(range(1, crash))
    with open(out / "metrics.jsonl", "a") as f:
        f.write(torn)
    train_run(out, data, *flags)
    assert_same_run(out, whole["guided"])


def test_a_run_cut_off_after_its_last_checkpoint_ends_well(data, tmp_path, capsys):
    out = train_run(tmp_path / "run", data, *LOWRANK)
    before, expected = metrics(out), weights(out)
    (out / "model.pt").unlink()
    train_run(out, data, *LOWRANK, "--resume=auto")
    assert metrics(out) == before and "n/a tokens/s" in capsys.readouterr().out
    assert all(torch.equal(w, expected[name]) for name, w in weights(out).items())


@pytest.mark.parametrize("what", ["weight", "moment"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_checkpoint_of_numbers_that_are_not_finite_is_not_written(what, value, data, tmp_path, monkeypatch):
    """One weight of the embeddings, or one entry of their moments, is bad from step 5 on; that of step 4 stays."""
    real, calls = train.train_step, []

    def step(wrapped, optimizer, *args):
        result = real(wrapped, optimizer, *args)
        calls.append(1)
        if len(calls) == 5:
            weight = wrapped.wte.weight
            (weight.data if what == "weight" else optimizer.state[weight]["exp_avg_sq"])[200, 3] = value
        return result
    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(UserError, match="after step 6 are not finite, so .*ckpt.pt is not written"):
        train_run(tmp_path / "run", data, "--save_interval=2")
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 4


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


def test_a_damaged_checkpoint_is_told(cli, data, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        stopped(tmp_path / "run", data, 3, monkeypatch)
    path = tmp_path / "run" / "ckpt.pt"
    saved = torch.load(path, weights_only=True)
    for other, words in ((None, "damaged"), ({"epoch": 3, "model": {}}, "lacks config, step, data, optimizer"),
                         ([1], "lacks config, model"),
                         (saved | {"model": weights(tmp_path / "run", "ckpt.pt") | {"more": torch.zeros(1)}},
                          "do not match")):
        torch.save(other, path) if other else os.truncate(path, 1000)
        status, out, err = cli("train.py", *TINY, f"--out_dir={tmp_path / 'run'}", f"--data_dir={data}",
                               "--resume=auto")
        assert_one_sentence(status, out, err)
        assert "ckpt.pt" in err and words in err


def test_the_runs_padded_vocabulary_is_kept(data, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        stopped(tmp_path / "run", data, 3, monkeypatch, "--vocab_size=300")
    assert len(weights(train_run(tmp_path / "run", data, "--resume=auto"))["wte.weight"]) == 300


ODD = ["[]", "3", '{"loss": 1.0}', '{"step": "1"}', '{"step": 9}', '{"step": 1, "val_loss": []}',
       '{"step": 1, "loss": 1.0}', "{",
       100_000 * "[", '{"step": 1, "loss": 1.0, "tokens_per_s": 0.0}', '{"step": 1, "loss": 1.0, "tokens_per_s": -3.0}',
       "\udcff",
       '{"step": 1, "loss": NaN, "tokens_per_s": 1.0}', '{"step": 1, "loss": 1' + 400 * "0" + ', "tokens_per_s": 1.0}']


def test_odd_rows_of_metrics_never_block_a_resume(whole, data, tmp_path, monkeypatch, capsys):
    """They are left out and counted; what the run wrote itself stays, and curves leaves out the same."""
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        stopped(out, data, 3, monkeypatch)
    path = out / "metrics.jsonl"
    path.write_text("".join(f"{line}\n" for line in ODD) + path.read_text(), errors="surrogateescape")
    counted = f"{path}: {len(ODD)} of {len(ODD) + 3} rows are damaged and are left out."
    capsys.readouterr()
    read = curves.read_run(str(out))
    assert list(read.train[0]) == [1, 2, 3] and capsys.readouterr().err.splitlines() == [counted]
    train_run(out, data, "--resume=auto")
    assert capsys.readouterr().err.splitlines() == [counted]
    assert_same_run(out, whole["plain"])


# ----------------------------------------------------------------------------------------------------------------------
# Signals

@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_every_signal_to_end_saves(name, data, tmp_path, monkeypatch):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored
    try:
        with pytest.raises(SystemExit) as e:
            stopped(tmp_path / "run", data, 3, monkeypatch, how=number)
    finally:
        signal.signal(number, before)
    assert e.value.code == 75 and torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 3


def send(stop, number):
    os.kill(os.getpid(), number)
    return stop.agreed()


def test_a_second_signal_counts_after_a_second(monkeypatch):
    """Launchers signal the group and the ranks; the clock here is the test's."""
    now = [100.0]
    monkeypatch.setattr(device, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    before = signal.getsignal(signal.SIGTERM)
    with device.Stop(ALONE) as stop:
        assert stop.agreed() == 0 and send(stop, signal.SIGTERM) == signal.SIGTERM
        for now[0] in (100.0, 100.9):
            assert send(stop, signal.SIGINT) == signal.SIGTERM
        now[0] = 101.1
        assert send(stop, signal.SIGXCPU) == signal.SIGTERM  # a limit on CPU time sends one every second
        with pytest.raises(KeyboardInterrupt) as e:
            send(stop, signal.SIGINT)
    assert e.value.args == (signal.SIGINT,) and signal.getsignal(signal.SIGTERM) == before


STUCK = """
import ctypes, sys, torch
sys.path.insert(0, {root!r})
import device
with device.Stop(device.Ranks(0, 1, torch.device("cpu"), torch.float32, False)):
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)  # for ever
"""


def test_a_second_signal_ends_a_process_whose_main_thread_waits_in_c(tmp_path):
    """As in a collective whose other rank hangs: Python's handlers wait until it returns."""
    (tmp_path / "stuck.py").write_text(STUCK.format(root=str(ROOT)))
    process = start(str(tmp_path / "stuck.py"))
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert process.stderr.read() == ("stopping after this step; another signal ends it at once.\n"
                                     "interrupted while the main thread was waiting.\n")


def test_nohup_is_respected_and_an_ignored_ctrl_c_is_not():
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGHUP, signal.SIGINT)}
    try:
        with device.Stop(ALONE) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.agreed() == 0
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.agreed() == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def signal_in_validation(monkeypatch, batch, windows, number=signal.SIGTERM):
    """Sends a signal while the micro-batch after `batch` others is read; a further one must not be."""
    seen, real = [], train.read_windows

    def read_windows(tokens, mine, block_size):
        seen.append(mine)
        if len(seen) == batch + 1:
            os.kill(os.getpid(), number)
        elif len(seen) > batch + 1:
            pytest.fail("the validation went on")
        return real(tokens, mine, block_size)
    monkeypatch.setattr(train, "read_windows", read_windows)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_ends_the_final_validation(number, whole_plain, data, tmp_path, monkeypatch, capsys):
    """After its micro-batch, with nothing lost: the last step is saved, the same command repeats the validation."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as e:
        signal_in_validation(patch, 1, 10, number)
        train_run(out, data)
    assert e.value.code == 75
    assert "stopped in the final validation; all 8 steps are saved" in capsys.readouterr().out
    assert not (out / "model.pt").exists() and torch.load(out / "ckpt.pt", weights_only=True)["step"] == 8
    assert_same_run(train_run(out, data, "--resume=auto"), whole_plain)


@pytest.mark.parametrize("step", [3, 6], ids=["guided", "plain"])
def test_a_signal_ends_a_validation_during_the_run_which_is_repeated(step, data, tmp_path, monkeypatch):
    """Of 64 tokens in two micro-batches; after the first the run is saved. The continuation begins with it."""
    out, flags = tmp_path / "run", RUNS["guided"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as e:
        signal_in_validation(patch, 0 if step == 3 else 2, 4)
        train_run(out, data, *flags, "--micro_batch_size=2")
    assert e.value.code == 75 and torch.load(out / "ckpt.pt", weights_only=True)["step"] == step
    assert [r["step"] for r in metrics(out) if "val_loss" in r] == [3][:step // 3 - 1]
    reference = train_run(tmp_path / "whole", data, *flags, "--micro_batch_size=2")
    assert_same_run(train_run(out, data, *flags, "--micro_batch_size=2", "--resume=auto"), reference)


def test_a_signal_in_the_last_step_comes_before_the_final_validation(whole_plain, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(train, "evaluate", lambda *args, **kw: pytest.fail("it validated"))
        stopped(tmp_path / "run", data, 8, monkeypatch)
    assert e.value.code == 75
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 8
    assert_same_run(train_run(tmp_path / "run", data, "--resume=auto"), whole_plain)


# ----------------------------------------------------------------------------------------------------------------------
# Outputs that fail

def test_training_whose_reader_ends_saves_and_fails(data, tmp_path):
    """As in `train.py ... | head -2`."""
    out = tmp_path / "run"
    process = start("train.py", *TINY, "--max_tokens=1_280_000", f"--out_dir={out}", f"--data_dir={data}")
    for _ in range(7):
        process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert_stream_sentence(process.wait(60), err, "output cannot be written (Broken pipe): the run is saved after step")
    step = torch.load(out / "ckpt.pt", weights_only=True)["step"]
    assert f"saved after step {step}," in err and 0 < step < 10_000 and not (out / "model.pt").exists()


class Broken:
    """Standard output that takes `n` writes."""

    def __init__(self, n):
        self.left = n

    def write(self, text):
        self.left -= text != "\n"
        if self.left < 0:
            raise OSError(28, "No space left on device")
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return False


@pytest.mark.parametrize("writes, step", [(0, 1), (4, 4), (8, 8)])
def test_training_on_a_full_output_saves_and_resumes(writes, step, whole_plain, data, tmp_path, monkeypatch):
    """The first write is the card, then one a step: a failed one ends the run after its step."""
    out = tmp_path / "run"
    words = f"No space left on device.: the run is saved after step {step},"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=words):
        patch.setattr(sys, "stdout", Broken(writes))
        train_run(out, data)
    assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == step
    assert_same_run(train_run(out, data, "--resume=auto"), whole_plain)


def test_a_result_on_a_full_output_is_kept_and_said(whole_plain, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="but the run is finished"):
        patch.setattr(sys, "stdout", Broken(9))
        train_run(tmp_path / "run", data)
    assert_same_run(tmp_path / "run", whole_plain)
