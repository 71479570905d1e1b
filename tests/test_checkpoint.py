"""Checkpoints: the ones before stay and are used, the best is kept, a thread writes them beside training."""
import math
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch

import checkpoint
import run
import train
from config import UserError
from conftest import LOWRANK, train_run
from runs import CPU, GUIDED, RUNS, assert_same_run, metrics, stopped, weights


def step_of(path):
    return torch.load(path, weights_only=True)["step"]


def damage(path):
    """One byte of a weight is another one."""
    with open(path, "r+b") as f:
        f.seek(os.path.getsize(path) // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))


# ----------------------------------------------------------------------------------------------------------------------
# The ones before

@pytest.mark.parametrize("keep, steps", [(1, [8]), (2, [8, 6]), (3, [8, 6, 4]), (9, [8, 6, 4, 2])])
def test_the_last_checkpoints_stay(keep, steps, data, tmp_path):
    out = train_run(tmp_path / "run", data, "--save_interval=2", f"--keep_checkpoints={keep}")
    names = [name for name in os.listdir(out) if name.startswith("ckpt")]
    assert len(names) == len(steps) and run.checkpoints(str(out))[0] == str(out / "ckpt.pt")
    assert [step_of(path) for path in run.checkpoints(str(out))] == steps


@pytest.mark.parametrize("name", ["plain", "guided", "muon"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(name, whole, data, tmp_path, monkeypatch, capsys):
    """It is said in one line, the damaged one is moved aside, and the result is that of no damage."""
    out, flags = tmp_path / "run", [*RUNS[name], "--save_interval=3", "--resume=auto"]
    with pytest.raises(SystemExit):
        stopped(out, data, 7, monkeypatch, *flags)
    assert [step_of(path) for path in run.checkpoints(str(out))] == [7, 6]
    damage(out / "ckpt.pt")
    broken = (out / "ckpt.pt").read_bytes()
    capsys.readouterr()
    train_run(out, data, *flags)
    stdout, err = capsys.readouterr()
    assert "continuing after step 6" in stdout and err.count("\n") == 1 and len(err) < 400
    assert "ckpt.pt is damaged" in err and "continuing with ckpt.1.pt of step 6" in err
    assert (out / "ckpt.damaged.pt").read_bytes() == broken
    assert_same_run(out, whole[name])


def test_between_two_renames_the_one_before_is_the_newest(whole_plain, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        stopped(out, data, 5, monkeypatch, "--save_interval=3")
    os.remove(out / "ckpt.pt")
    capsys.readouterr()
    assert checkpoint.read_model(str(out))[0] == str(out / "ckpt.1.pt")  # sample.py finds it too
    capsys.readouterr()
    train_run(out, data, "--save_interval=3", "--resume=auto")
    assert "ckpt.pt is missing: continuing with ckpt.1.pt of step 3, now ckpt.pt." in capsys.readouterr().err
    assert_same_run(out, whole_plain)


def test_without_a_whole_checkpoint_nothing_is_moved(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        stopped(out, data, 5, monkeypatch, "--save_interval=3")
    for name in ("ckpt.pt", "ckpt.1.pt"):
        damage(out / name)
    before = {name: (out / name).read_bytes() for name in ("ckpt.pt", "ckpt.1.pt")}
    with pytest.raises(UserError, match=r"ckpt\.pt is (damaged|not a checkpoint)"):
        train_run(out, data, "--resume=auto")
    assert {name: (out / name).read_bytes() for name in before} == before
    assert not (out / "ckpt.damaged.pt").exists() and metrics(out)[-1]["step"] == 5


# ----------------------------------------------------------------------------------------------------------------------
# The best

def test_the_best_validation_without_a_guide_is_kept(data, tmp_path, monkeypatch):
    """Validations after steps 2 (guided), 4, 6, 8, 10: that of 6 is the best, whether or not the run is interrupted."""
    losses, real = {2: 1.0, 4: 5.0, 6: 3.0, 8: 4.0, 10: 3.0, 12: 2.0}, run.Log.validation
    monkeypatch.setattr(run.Log, "validation", lambda self, step, loss: real(self, step, losses[step]))
    flags = [*GUIDED, "--eval_interval=2"]
    out = train_run(tmp_path / "run", data, *flags)
    best = torch.load(out / "best.pt", weights_only=True)
    assert best["step"] == 6
    assert best.keys() == torch.load(out / "model.pt", weights_only=True).keys()
    for stop in (5, 7, 9):
        again = tmp_path / str(stop)
        with pytest.raises(SystemExit):
            stopped(again, data, stop, monkeypatch, *flags)
        train_run(again, data, *flags, "--resume=auto")
        assert (again / "best.pt").exists() and step_of(again / "best.pt") == 6
        assert all(torch.equal(w, best["model"][n]) for n, w in weights(again, "best.pt").items())
    assert len(best["model"]) and not any(name.endswith(".W") for name in best["model"])
    monkeypatch.undo()
    plain = train_run(tmp_path / "plain", data, "--eval_interval=1")
    lowest = min((r for r in metrics(plain)[:-1] if "val_loss" in r), key=lambda r: r["val_loss"])
    saved = torch.load(plain / "best.pt", weights_only=True)
    assert (saved["step"], saved["val_loss"]) == (lowest["step"], lowest["val_loss"])


def test_the_card_says_what_the_disk_needs(data, tmp_path, capsys):
    out = train_run(tmp_path / "run", data, *LOWRANK, "--eval_interval=4", "--keep_checkpoints=3", "--save_interval=2")
    line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("folder"))
    words = line.split()
    assert "3 checkpoints of" in line and "best.pt and model.pt of" in line
    for size, name in ((words[5], "ckpt.pt"), (words[10], "model.pt"), (words[10], "best.pt")):
        number = float(size.rstrip(",B").rstrip("k")) * 1000
        assert 0.85 < number / os.path.getsize(out / name) < 1.01, (size, name)


# ----------------------------------------------------------------------------------------------------------------------
# The thread

@pytest.fixture
def slow_disk(monkeypatch):
    """save_beside that waits for `go` and notes what it does."""
    go, done, real = threading.Event(), [], checkpoint.save_beside

    def save_beside(tree, path, keep=1):
        done.append(("begins", os.path.basename(path), tree["step"]))
        assert go.wait(60)
        real(tree, path, keep)
        done.append(("ends", os.path.basename(path), tree["step"]))
    monkeypatch.setattr(checkpoint, "save_beside", save_beside)
    return go, done


def test_training_goes_on_while_a_checkpoint_is_written(slow_disk, whole_plain, data, tmp_path, monkeypatch):
    """The disk is stuck from step 2 on; steps 3 and 4 run all the same, and the file is of step 2, to the bit."""
    (go, done), real, steps = slow_disk, train.train_step, []

    def step(*args):
        steps.append(len(steps) + 1)
        if len(steps) == 4:
            until = time.monotonic() + 10  # on a busy machine the thread begins late
            while not done and time.monotonic() < until:
                time.sleep(0.01)
            assert ("begins", "ckpt.pt", 2) in done and not any(event[0] == "ends" for event in done)
            go.set()
        return real(*args)
    monkeypatch.setattr(train, "train_step", step)
    out = train_run(tmp_path / "run", data, "--save_interval=2", "--keep_checkpoints=9")
    checkpoints = [event for event in done if event[1] == "ckpt.pt"]
    assert checkpoints == [(what, "ckpt.pt", n) for n in (2, 4, 6, 8) for what in ("begins", "ends")]  # one at a time
    assert_same_run(out, whole_plain)
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        stopped(tmp_path / "two", data, 2, monkeypatch)
    for name, tensor in weights(tmp_path / "two", "ckpt.pt").items():
        assert torch.equal(tensor, weights(out, "ckpt.3.pt")[name]), name


def test_a_disk_slower_than_save_interval_delays_checkpoints_and_no_step(slow_disk, whole_plain, data, tmp_path,
                                                                         monkeypatch):
    """The checkpoint of step 2 is being written until step 5: that of step 4 comes after step 5 then."""
    (go, done), real, steps = slow_disk, train.train_step, []

    def step(*args):
        steps.append(len(steps) + 1)
        if len(steps) == 5:
            assert done == [("begins", "ckpt.pt", 2)]
            go.set()
            until = time.monotonic() + 10
            while len(done) < 2 and time.monotonic() < until:
                time.sleep(0.01)
        return real(*args)
    monkeypatch.setattr(train, "train_step", step)
    out = train_run(tmp_path / "run", data, "--save_interval=2", "--keep_checkpoints=9")
    assert [step_of(path) for path in run.checkpoints(str(out))] == [8, 6, 5, 2]
    assert_same_run(out, whole_plain)


def test_busy_waits_for_the_first_second_of_a_file(slow_disk, tmp_path):
    (go, _), saver = slow_disk, checkpoint.Saver(CPU)
    assert not saver.busy()
    saver.save(str(tmp_path / "x.pt"), {"step": 1, "model": {"a": torch.ones(8)}})
    threading.Timer(0.2, go.set).start()
    assert not saver.busy()
    go.clear()
    saver.save(str(tmp_path / "x.pt"), {"step": 2, "model": {"a": torch.ones(8)}})
    began = time.monotonic()
    assert saver.busy() and time.monotonic() - began > 0.9
    began = time.monotonic()
    assert saver.busy() and time.monotonic() - began < 0.5
    go.set()
    saver.wait()


def test_a_disk_that_is_full_while_training_goes_on_is_one_sentence(data, tmp_path, monkeypatch):
    """The thread's error ends the run at the next step that logs; the checkpoint before stays."""
    real = checkpoint.save_beside

    def save_beside(tree, path, keep=1):
        if tree["step"] == 4:
            with run.writing(path):
                raise OSError(28, "No space left on device")
        real(tree, path, keep)
    monkeypatch.setattr(checkpoint, "save_beside", save_beside)
    with pytest.raises(UserError, match="cannot write .*ckpt.pt .No space left on device.: make room"):
        train_run(tmp_path / "run", data, "--save_interval=2", "--max_tokens=128000")
    assert step_of(tmp_path / "run" / "ckpt.pt") in (2, 4) and metrics(tmp_path / "run")[-1]["step"] < 100


def test_a_stopped_run_ends_when_its_checkpoint_is_on_the_disk(slow_disk, data, tmp_path, monkeypatch):
    go, done = slow_disk
    threading.Timer(0.3, go.set).start()
    with pytest.raises(SystemExit):
        stopped(tmp_path / "run", data, 3, monkeypatch)
    assert done == [("begins", "ckpt.pt", 3), ("ends", "ckpt.pt", 3)] and step_of(tmp_path / "run" / "ckpt.pt") == 3


def test_what_is_written_is_what_stood_there_when_it_was_saved(slow_disk, tmp_path):
    """Two names of one tensor are one in the file; buffers are used again, and grow with the tensors."""
    go, _ = slow_disk
    saver, t = checkpoint.Saver(CPU), torch.arange(4.0)
    tree = {"step": 1, "model": {"a": t, "b": t}, "n": torch.tensor(3)}
    saver.save(str(tmp_path / "x.pt"), tree)
    t.fill_(9)
    go.set()
    saver.wait()
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    assert saved["model"]["a"].tolist() == saved["model"]["b"].tolist() == [0, 1, 2, 3] and saved["n"] == 3
    assert saved["model"]["a"].data_ptr() == saved["model"]["b"].data_ptr()
    buffers = {t.data_ptr() for t in sum(saver.buffers.values(), [])}
    saver.save(str(tmp_path / "x.pt"), tree)
    saver.wait()
    assert {t.data_ptr() for t in sum(saver.buffers.values(), [])} == buffers
    tree["model"] = {"a": torch.ones(7)}
    saver.save(str(tmp_path / "x.pt"), tree)
    saver.wait()
    assert torch.load(tmp_path / "x.pt", weights_only=True)["model"]["a"].tolist() == [1] * 7
    assert saver.count == 3 and saver.report().startswith("saving   3 files, 84B;")


def test_memory_for_the_copies_is_taken_beforehand(tmp_path):
    """One buffer for each tensor, however many names it has; another checkpoint's file uses the same ones."""
    saver, t = checkpoint.Saver(CPU), torch.arange(4.0)
    saver.prepare({"model": {"a": t, "b": t, "c": t + 1}, "optimizer": {"a": {"step": torch.tensor(2.0)}}})
    saver.wait()
    taken = {kind: [t.data_ptr() for t in buffers] for kind, buffers in saver.buffers.items()}
    assert {kind: len(buffers) for kind, buffers in taken.items()} == {((4,), torch.float32): 2, ((), torch.float32): 1}
    for name in ("ckpt.pt", "best.pt"):
        saver.save(str(tmp_path / name), {"step": 1, "model": {"a": t, "b": t, "c": t + 1}})
        saver.wait()
        assert torch.load(tmp_path / name, weights_only=True)["model"]["c"].tolist() == [1, 2, 3, 4]
        assert {kind: [t.data_ptr() for t in buffers] for kind, buffers in saver.buffers.items()} == taken
    saver.prepare({"model": {"a": torch.ones(7)}})  # other tensors follow: the memory of these is given back
    saver.wait()
    assert [(*kind, len(buffers)) for kind, buffers in saver.buffers.items()] == [((7,), torch.float32, 1)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no card")
@pytest.mark.parametrize("room", [True, False])
def test_weights_may_change_while_they_are_on_their_way_to_the_host(room, tmp_path, monkeypatch):
    """64 tensors of 16 MB take milliseconds; the change comes at once, and waits on the device. The file has the old
    values, two names of one tensor are one. A full device copies straight to the host."""
    if not room:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**20, 2**40))
    saver, t = checkpoint.Saver(torch.device("cuda")), [torch.full((2**22,), float(i), device="cuda") for i in range(64)]
    saver.save(str(tmp_path / "x.pt"), {"step": 1, "model": {**{str(i): x for i, x in enumerate(t)}, "again": t[0]}})
    assert saver.room == room * 2**30 and (saver.taken is saver.copied) is not room
    saver.before_update()
    for x in t:
        x.fill_(-1.0)
    saver.wait()
    saved = torch.load(tmp_path / "x.pt", weights_only=True)["model"]
    assert all(saved[str(i)].min() == saved[str(i)].max() == i for i in range(64))
    assert saved["again"].data_ptr() == saved["0"].data_ptr() and t[5].max() == -1


def test_mapped_tensors_are_copies_and_one_tensor_stays_one():
    t = torch.arange(3.0)
    found = checkpoint.mapped({"a": t, "b": {"c": t, "d": t + 1}, "n": 4}, torch.clone, {})
    t.fill_(9)
    assert found["a"].tolist() == [0, 1, 2] and found["b"]["c"] is found["a"] and found["n"] == 4
    assert found["b"]["d"].tolist() == [1, 2, 3]


def test_the_rows_of_the_log_are_synced_before_the_checkpoint_appears(data, tmp_path, monkeypatch):
    """After a power loss metrics.jsonl has all rows until the checkpoint's step."""
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"-> {b}"), replace(a, b)))
    out = train_run(tmp_path / "run", data, "--max_tokens=256")
    at = events.index(f"-> {out / 'ckpt.pt'}")
    assert str(out / "metrics.jsonl") in events[:at]


def test_the_report_says_how_long_the_loop_waited(monkeypatch, tmp_path):
    saver, tree = checkpoint.Saver(CPU), {"step": 1, "model": {"a": torch.ones(8)}}
    real = checkpoint.save_beside
    monkeypatch.setattr(checkpoint, "save_beside", lambda *args: (time.sleep(0.3), real(*args)))
    for _ in range(2):
        saver.save(str(tmp_path / "x.pt"), tree)  # the second one waits for the first
    saver.wait()
    assert 0.2 < saver.blocked < 0.5 and 0.6 <= saver.written < 1.0
    assert f"the loop waited {saver.blocked:.2f} s" in saver.report() and checkpoint.Saver(CPU).report() == ""


def test_old_checkpoints_and_folders_are_read(finished, data, tmp_path):
    """A folder of a version that kept one checkpoint, and knew none of these settings."""
    import json
    out = shutil.copytree(finished, tmp_path / "old")
    settings = json.loads((out / "config.json").read_text())
    for name in ("keep_checkpoints", "max_bad_steps"):
        del settings[name]
    (out / "config.json").write_text(json.dumps(settings | {"out_dir": str(out)}))
    (out / "model.pt").unlink()
    train_run(out, data, *LOWRANK, "--resume=auto")
    assert (out / "model.pt").exists() and math.isfinite(metrics(out)[-1]["val_loss"])


def test_is_a_spike_what_stands_far_above_the_losses_before():
    noise = list(3 + 0.05 * np.random.default_rng(0).standard_normal(20))
    assert not run.is_spike(noise[:19], 9.0) and run.is_spike(noise, 3.5) and not run.is_spike(noise, 3.2)
    assert not run.is_spike([3.0] * 20, 3.09) and run.is_spike([3.0] * 20, 3.11)
    falling = [7 - 0.2 * k for k in range(20)]
    assert not run.is_spike(falling, 7.5) and not run.is_spike(falling, 1.0)
