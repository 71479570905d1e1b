"""run: a folder and its owner, files that appear whole, what a folder may become, the log."""
import dataclasses
import json
import math
import os
import re
import shutil
import sys
import threading
import time
import types
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch

import config
import device
import checkpoint
import run
import train
from config import UserError
from conftest import LOWRANK, TINY, assert_one_sentence, start, train_run, write_data
from model import load
from runs import ALONE, GUIDED, assert_same_run, metrics, stopped, tiny, weights


# ----------------------------------------------------------------------------------------------------------------------
# One owner

LONG = ["--max_tokens=1_280_000"]  # 10 000 steps


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def lines_of(path):
    return path.read_text().count("\n") if path.exists() else 0


def test_a_folder_has_one_owner_until_that_dies(cli, data, tmp_path):
    """A second process is refused and harms nothing. After kill -9 of the first the folder is free."""
    out = tmp_path / "run"
    argv = [*TINY, *LONG, f"--out_dir={out}", f"--data_dir={data}", "--save_interval=2"]
    owner = start("train.py", *argv)
    try:
        wait_for((out / "ckpt.pt").exists)
        for more in ([], ["--resume=auto"], ["--resume=auto", "--n_layer=2"]):
            status, stdout, err = cli("train.py", *argv, *more)
            assert_one_sentence(status, stdout, err)
            assert f"{out} is in use" in err and "another process is training" in err
        before = lines_of(out / "metrics.jsonl")
        wait_for(lambda: lines_of(out / "metrics.jsonl") > before)  # the owner goes on, in the same file
        assert owner.poll() is None
    finally:
        owner.kill()
        owner.communicate()
    with run.owned(str(out)):
        there = set(os.listdir(out))
        assert {".lock", "config.json", "metrics.jsonl"} <= there and there & {"ckpt.pt", "ckpt.1.pt"}
        assert there <= {".lock", "config.json", "metrics.jsonl", "model.pt", "ckpt.pt", "ckpt.1.pt"}
    rows = [r["step"] for r in metrics(out) if "loss" in r]
    assert rows == list(range(1, len(rows) + 1))


def test_two_that_start_at_once_do_not_mix(data, tmp_path):
    argv = [*TINY, "--max_tokens=12800", f"--out_dir={tmp_path / 'run'}", f"--data_dir={data}"]
    both = [start("train.py", *argv) for _ in range(2)]
    results = [(p.communicate(timeout=120), p.returncode) for p in both]
    assert sorted(status for _, status in results) == [0, 2]
    refused = next(err for (_, err), status in results if status == 2)
    assert "is in use" in refused or "already holds a run" in refused or "meanwhile" in refused
    assert [r["step"] for r in metrics(tmp_path / "run") if "loss" in r] == list(range(1, 101))


def test_owned_ends_with_its_block_and_removes_what_a_killed_writer_left(tmp_path):
    folder = tmp_path / "run"
    with run.owned(str(folder)):
        with pytest.raises(UserError, match="in use"), run.owned(str(folder)):
            pass
        with pytest.raises(UserError, match="in use"):
            run.check_free(str(folder))
    for name in ("ckpt.pt.123-abcd.tmp", "model.pt.tmp", "notes.tmp", "ckpt.pt"):
        (folder / name).write_text("x")
    run.check_free(str(folder))
    with run.owned(str(folder)):
        assert sorted(os.listdir(folder)) == [".lock", "ckpt.pt", "notes.tmp"]


@pytest.mark.parametrize("there", ["nothing", "out", "out/run", "out/run/notes"])
def test_a_refused_run_leaves_what_was_there(there, finished, data, tmp_path):
    """Its weights are of another width, which is known only after the folder was locked."""
    path = tmp_path / there
    if path.name == "notes":
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    elif there != "nothing":
        path.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for flag in ("init_from", "distill"):
        with pytest.raises(UserError, match="n_embd|vocab_size"):
            train_run(tmp_path / "out" / "run", data, f"--{flag}={finished}", "--n_embd=64", "--vocab_size=300")
        assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_fails_after_it_wrote_keeps_its_folder(data, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "open_metrics", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_run(tmp_path / "out" / "run", data)
    assert sorted(os.listdir(tmp_path / "out" / "run")) == [".lock", "config.json"]


def test_a_lock_that_was_removed_is_nobodys(tmp_path, monkeypatch):
    """Another process may remove it between the moments at which this one opens and locks it."""
    real = filelock.FileLock.acquire

    def acquire(lock, **kw):
        got = real(lock, **kw)
        os.remove(lock.lock_file)
        return got
    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.raises(UserError, match="in use"), run.owned(str(tmp_path / "run")):
        pytest.fail("it is owned")


def test_a_run_that_appears_meanwhile_is_not_touched(data, tmp_path, monkeypatch):
    out, real = tmp_path / "run", train.open_data

    def open_data(cfg):
        opened = real(cfg)
        run.save_json(str(out / "config.json"), config.to_dict(cfg))  # another process began and ended
        (out / "ckpt.pt").write_text("theirs")
        return opened
    monkeypatch.setattr(train, "open_data", open_data)
    with pytest.raises(UserError, match="meanwhile|already holds a run"):
        train_run(out, data)
    with pytest.raises(UserError, match="meanwhile"):
        shutil.rmtree(out)
        train_run(out, data, "--resume=auto")
    assert (out / "ckpt.pt").read_text() == "theirs"


# ----------------------------------------------------------------------------------------------------------------------
# Files

def test_writers_of_one_file_never_share_a_temporary_one(tmp_path):
    """Eight threads write one file 50 times each: it is always one of theirs, whole, and nothing else stays."""
    path, failures = tmp_path / "a.json", []

    def write(number):
        try:
            for _ in range(50):
                with run.atomic_write(str(path)) as temp, open(temp, "w") as f:
                    f.write(str(number) * 1000)
                assert len(set(text := path.read_text())) == 1 and len(text) == 1000
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and os.listdir(tmp_path) == ["a.json"]
    names = {run.temp_name("x") for _ in range(1000)}
    assert len(names) == 1000 and all(str(os.getpid()) in name for name in names)


def test_a_file_is_synced_before_its_rename_and_the_folder_after(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def record_fsync(descriptor):
        done.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_replace(a, b):
        done.append(("rename", a))
        replace(a, b)
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    checkpoint.save_beside({"x": torch.ones(3)}, str(tmp_path / "ckpt.pt"))
    temp = done[1][1]
    assert done == [("sync", temp), ("rename", temp), ("sync", str(tmp_path))]
    assert temp.startswith(str(tmp_path / "ckpt.pt."))


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), run.atomic_write(str(path)) as temp:
        Path(temp).write_text("new")
        1 / 0
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_made_is_one_sentence(cli, data, tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_sentence(*cli("train.py", *TINY, f"--data_dir={data}", f"--out_dir={tmp_path / 'file' / 'run'}"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")
def test_a_full_disk_harms_nothing(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        stopped(out, data, 3, monkeypatch, "--resume=auto")
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    monkeypatch.setattr(run, "temp_name", lambda path: f"{path}.tmp-here")
    for name in ("config.json", "metrics.jsonl", "ckpt.pt"):
        os.symlink("/dev/full", out / f"{name}.tmp-here")
        with pytest.raises(UserError, match=f"cannot write .*{name} .No space left on device.: make room"):
            train_run(out, data, "--resume=auto")
        assert sorted(os.listdir(out)) == sorted(before)
        assert all((out / kept).read_bytes() == before[kept] for kept in before
                   if (name, kept) != ("ckpt.pt", "metrics.jsonl"))
    assert metrics(train_run(out, data, "--resume=auto"))[-1]["step"] == 8


def test_a_full_disk_under_the_metrics_is_one_sentence(data, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "open_metrics", lambda *args: open("/dev/full", "a"))
    with pytest.raises(UserError, match="cannot write /dev/full .No space left"):
        train_run(tmp_path / "run", data)


# ----------------------------------------------------------------------------------------------------------------------
# What a folder holds

def test_a_run_leaves_its_folder(finished):
    assert sorted(os.listdir(finished)) == [".lock", "ckpt.pt", "config.json", "metrics.jsonl", "model.pt"]
    cfg = config.from_dict(json.loads((finished / "config.json").read_text()))
    saved = torch.load(finished / "model.pt", weights_only=True)
    assert saved.keys() == {"config", "model", "tokenizer", "step", "val_loss"}
    assert config.from_dict(saved["config"]) == cfg
    assert saved["step"] == 8 and saved["tokenizer"]["identity"] == "byte"
    assert saved["tokenizer"]["blob"].dtype == torch.uint8
    rows, plan = metrics(finished), train.make_plan(cfg)
    assert [r["step"] for r in rows] == [*range(1, 9), 8] and rows[0]["loss"] == pytest.approx(math.log(257), abs=0.1)
    for row in rows[:-1]:
        assert row.keys() == {"step", "tokens", "loss", "lr", "grad_norm", "alpha", "tokens_per_s", "mfu"}
        assert row["tokens"] == 128 * row["step"] and row["lr"] == train.lr_at(cfg, plan, row["step"] - 1)
        assert row["alpha"] == 0 and row["mfu"] is None and row["tokens_per_s"] > 0
    assert rows[-1] == {"step": 8, "val_loss": saved["val_loss"], "val_ppl": math.exp(saved["val_loss"])}


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
    unfinished = shutil.copytree(finished, tmp_path / "unfinished", ignore=shutil.ignore_patterns("model.pt"))
    status, out, err = cli("train.py", *TINY, *LOWRANK, f"--out_dir={unfinished}", f"--data_dir={data}")
    assert_one_sentence(status, out, err)
    assert "already holds a run" in err and "--resume=auto" in err
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


@pytest.mark.parametrize("names", [["model.pt"], ["ckpt.pt"], ["metrics.jsonl"], ["ckpt.pt", "model.pt"]], ids=" ".join)
@pytest.mark.parametrize("resume", ["off", "auto"])
def test_a_folder_without_config_is_not_overwritten(names, resume, cli, data, tmp_path):
    for name in names:
        (tmp_path / name).write_text("somebody's")
    status, stdout, err = cli("train.py", *TINY, f"--out_dir={tmp_path}", f"--data_dir={data}", f"--resume={resume}")
    assert_one_sentence(status, stdout, err)
    assert f"{tmp_path} holds {' and '.join(names)} but no config.json" in err
    assert all((tmp_path / name).read_text() == "somebody's" for name in names)
    assert not (tmp_path / "config.json").exists()


def test_a_finished_run_and_other_data(cli, finished, data, tmp_path):
    """The quick start's answer is not for a command that names other data, be it there or not."""
    other = write_data(tmp_path / "other", np.arange(4001) % 256, np.arange(401) % 256)
    same = shutil.copytree(data, tmp_path / "same")
    for folder, words in ((other, f"{other} holds other training data than the run in {finished}"),
                          (tmp_path / "nowhere", "no data")):
        status, stdout, err = cli("train.py", *TINY, *LOWRANK, f"--out_dir={finished}", "--resume=auto",
                                  f"--data_dir={folder}")
        assert_one_sentence(status, stdout, err)
        assert words in err
    status, stdout, err = cli("train.py", *TINY, *LOWRANK, f"--out_dir={finished}", "--resume=auto",
                              f"--data_dir={same}")
    assert (status, err) == (0, "") and "holds a finished run" in stdout


def test_a_finished_run_is_known_without_its_data_or_checkpoint(cli, finished, data, tmp_path):
    out, gone = tmp_path / "run", tmp_path / "gone"
    shutil.copytree(finished, out)
    settings = json.loads((out / "config.json").read_text()) | {"data_dir": str(gone), "out_dir": str(out)}
    (out / "config.json").write_text(json.dumps(settings))
    flags = [*TINY, *LOWRANK, f"--out_dir={out}", "--resume=auto"]
    assert "holds a finished run" in cli("train.py", *flags, f"--data_dir={gone}")[1]
    (out / "ckpt.pt").unlink()
    assert "holds a finished run" in cli("train.py", *flags, f"--data_dir={data}")[1]


@pytest.mark.parametrize("kind, words", [("empty", "it is empty"), ("folder", "is not a file"), ("cut", "BadZipFile")])
def test_a_model_that_is_none_does_not_finish_a_run(kind, words, cli, finished, data, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    size, model = (out / "model.pt").stat().st_size, out / "model.pt"
    if kind == "folder":
        model.unlink()
        model.mkdir()
    else:
        os.truncate(model, size // 2 if kind == "cut" else 0)
    flags = [*TINY, *LOWRANK, f"--out_dir={out}", "--resume=auto", f"--data_dir={data}"]
    status, stdout, err = cli("train.py", *flags)
    assert_one_sentence(status, stdout, err)
    assert f"{model} " in err and words in err and "not finished: move it away" in err
    model.rename(tmp_path / "away")
    assert cli("train.py", *flags)[0] == 0 and model.stat().st_size == size  # the advice holds


def test_resume_with_the_folder_alone_takes_the_runs_settings(cli, data, tmp_path, monkeypatch):
    """Every setting but those on the command line; the result is the uninterrupted run's, to the bit."""
    flags = [*GUIDED, "--seed=7", "--lr=2e-3"]
    whole = train_run(tmp_path / "whole", data, *flags)
    with pytest.raises(SystemExit):
        stopped(tmp_path / "run", data, 5, monkeypatch, *flags)
    status, stdout, err = cli("train.py", "--resume=auto", f"--out_dir={tmp_path / 'run'}", "--log_interval=1")
    assert (status, err) == (0, "") and "continuing after step 5 of 12" in stdout
    assert_same_run(tmp_path / "run", whole)
    status, stdout, err = cli("train.py", "--resume=auto", f"--out_dir={tmp_path / 'run'}", "--seed=8")
    assert_one_sentence(status, stdout, err)
    assert "seed=7, this command says seed=8" in err
    status, stdout, err = cli("train.py", "--resume=auto", f"--out_dir={tmp_path / 'none'}")
    assert_one_sentence(status, stdout, err)  # a misspelt folder would get a new run with the defaults
    assert f"{tmp_path / 'none'} holds no run to continue" in err and not (tmp_path / "none").exists()


@pytest.mark.parametrize("after", [3, None], ids=["unfinished", "finished"])
def test_a_longer_run_is_refused_with_the_reason_and_the_way(after, cli, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    if after:
        with pytest.raises(SystemExit):
            stopped(out, data, after, monkeypatch)
    else:
        train_run(out, data)
    status, stdout, err = cli("train.py", "--resume=auto", f"--out_dir={out}", "--max_tokens=2048")
    assert_one_sentence(status, stdout, err)
    assert "max_tokens=1024 and its learning rates depend on that" in err
    assert f"--init_from={out}" in err and len(err) < 400


PROTECTED = {
    "n_layer": 2, "n_embd": 64, "n_head": 4, "n_kv_head": 1, "attn_dim": 64, "ffn_dim": 64, "block_size": 32,
    "vocab_size": 300, "norm": "rmsnorm", "act": "relu2", "pos": "absolute", "bias": False, "tie_embeddings": False,
    "dropout": 0.1, "ffn": "blockdense", "rank": 4, "nblocks": 2, "n_dense_layers": 2, "guide": "fixedstep",
    "guide_ratio": 0.25, "guide_schedule": "linear", "guide_skip": True, "max_tokens": 2048, "batch_size": 16,
    "lr": 2e-3, "min_lr_ratio": 0.2, "warmup_ratio": 0.2, "weight_decay": 0.2, "betas": (0.8, 0.9), "grad_clip": 2.0,
    "seed": 1, "eval_tokens": 128, "dtype": "bfloat16", "init_from": "elsewhere"}


def test_what_changes_the_result_may_not_change_at_a_resume(finished):
    """Refused by name; the list here is a reader's, not the code's. A setting that neither list has is refused too."""
    old = config.read_saved(str(finished))
    for name, value in PROTECTED.items():
        assert getattr(old, name) != value, name
        with pytest.raises(UserError, match=re.escape(f"{name}={getattr(old, name)}")):
            run.check_unchanged(dataclasses.replace(old, **{name: value}), old)
    for name in {f.name for f in dataclasses.fields(old)} - run.MAY_CHANGE:
        with pytest.raises(UserError, match=name):
            run.check_unchanged(dataclasses.replace(old, **{name: "other"}), old)
    for name in ("micro_batch_size", "eval_interval", "log_interval", "data_dir", "device", "compile", "wandb"):
        run.check_unchanged(dataclasses.replace(old, **{name: "other"}), old)


# ----------------------------------------------------------------------------------------------------------------------
# Weights from elsewhere, and of an unfinished run

def test_init_from_starts_with_a_models_weights(finished, data, tmp_path):
    """With lr ~ 0 the result is the model; with a guide too, which starts at the factors' dense equivalent."""
    old = weights(finished)
    for source in (finished, finished / "model.pt"):
        out = train_run(tmp_path / source.name, data, *LOWRANK, f"--init_from={source}", "--lr=1e-30", "--seed=3",
                        "--guide=fixedstep")
        new = weights(out)
        assert new.keys() == old.keys() and all(torch.equal(new[k], old[k]) for k in old)
    with pytest.raises(UserError, match="init_from=elsewhere|this command says init_from="):
        train_run(tmp_path / "model.pt", data, *LOWRANK, "--init_from=elsewhere", "--lr=1e-30", "--seed=3",
                  "--guide=fixedstep",
                  "--resume=auto")


@pytest.mark.parametrize("flag", ["--n_head=4", "--act=relu2", "--rope_theta=500", "--norm_eps=1e-3", "--qk_norm=1"])
def test_init_from_a_model_that_computes_something_else(flag, finished, data, tmp_path):
    """The shapes fit, only the settings differ."""
    name = flag[2:].partition("=")[0]
    with pytest.raises(UserError, match=f"{name}=.* give --{name}="):
        train_run(tmp_path / "run", data, *LOWRANK, f"--init_from={finished}", flag)


def test_a_run_from_weights_resumes_by_its_checkpoint(cli, finished, data, tmp_path, monkeypatch):
    """The source is not needed any more."""
    source = shutil.copytree(finished, tmp_path / "source")
    flags = [*LOWRANK, f"--init_from={source}"]
    with pytest.raises(SystemExit):
        stopped(tmp_path / "run", data, 3, monkeypatch, *flags)
    whole = train_run(tmp_path / "whole", data, *flags)
    shutil.rmtree(source)
    status, stdout, err = cli("train.py", "--resume=auto", f"--out_dir={tmp_path / 'run'}")
    assert (status, err) == (0, "") and "continuing after step 3 of 8" in stdout
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("flags, words", [
    (["--ffn=lowrank", "--rank=4"], ["blocks.1.ffn.fc1.U", "(128, 8)", "(128, 4)", "give that model's --rank=8."]),
    ([], ["blocks.1.ffn.fc1.U is (128, 8) there, none here; give that model's --ffn=lowrank --rank=8."]),
    ([*LOWRANK, "--vocab_size=300"], ["(257, 32)", "(300, 32)", "give that model's --vocab_size=257."]),
    ([*LOWRANK, "--n_layer=4", "--qk_norm=1.2"], ["blocks.3", "none there", "model's --n_layer=3 --qk_norm=0.0."]),
    ([*LOWRANK, "--pos=absolute", "--block_size=8"], ["wpe", "give that model's --pos=rope."])],
    ids=lambda v: " ".join(v))
def test_weights_of_another_shape_are_refused_by_name(flags, words, cli, finished, data, tmp_path):
    status, stdout, err = cli("train.py", *TINY, *flags, f"--init_from={finished}", f"--out_dir={tmp_path / 'run'}",
                              f"--data_dir={data}")
    assert_one_sentence(status, stdout, err)
    assert all(word in err for word in words) and len(err) < 400, err


def test_first_weights_are_floating_point_numbers(finished, data, tmp_path):
    saved = torch.load(finished / "model.pt", weights_only=True)
    saved["model"]["norm.weight"] = saved["model"]["norm.weight"].char()
    torch.save(saved, tmp_path / "model.pt")
    with pytest.raises(UserError, match="norm.weight is torch.int8"):
        train_run(tmp_path / "run", data, *LOWRANK, f"--init_from={tmp_path / 'model.pt'}")


def test_weights_that_are_not_there_or_of_another_tokenizer_are_refused(cli, without_torch, finished, tmp_path):
    status, stdout, err = without_torch("train.py", *TINY, "--init_from=nowhere")
    assert_one_sentence(status, stdout, err)
    assert "init_from=nowhere does not exist" in err
    blob = "\n".join(bytes([i]).hex() for i in range(256)).encode()
    foreign = write_data(tmp_path / "foreign", np.zeros(1000, int), np.zeros(100, int), "gpt2", blob)
    status, stdout, err = cli("train.py", *TINY, *LOWRANK, f"--init_from={finished}", f"--out_dir={tmp_path / 'run'}",
                              f"--data_dir={foreign}")
    assert_one_sentence(status, stdout, err)
    assert "of the tokenizer byte" in err and "of gpt2" in err


@pytest.mark.parametrize("after", [2, 6], ids=["guided", "plain"])
def test_an_unfinished_run_is_sampled_and_scored(after, cli, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        stopped(out, data, after, monkeypatch, *GUIDED)
    gpt, cfg, saved = load(str(out), torch.device("cpu"))
    assert saved.keys() == {"config", "tokenizer", "step", "val_loss"}
    assert (saved["step"], saved["val_loss"]) == (after, None)
    checkpoint = weights(out, "ckpt.pt")
    assert any(k.endswith(".W") for k in checkpoint) == (after == 2)
    assert all(torch.equal(v, checkpoint[k]) for k, v in gpt.state_dict().items())
    status, stdout, err = cli("sample.py", out, "--prompt=the", "--max_new_tokens=4", "--temperature=0")
    assert status == 0 and stdout.startswith("the") and f"these are its weights after step {after}" in err
    assert ("without the guides" in err) == (after == 2)
    status, stdout, err = cli("train.py", *TINY, "--eval_only=True", f"--out_dir={out}", f"--data_dir={data}")
    tokens = torch.from_numpy(np.fromfile(data / "val.bin", np.uint16, 161, offset=4096).astype(np.int64))
    with torch.no_grad():
        logits = gpt(tokens[:160].view(10, 16)).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[1:]).item()
    assert status == 0 and f"loss {expected:.4f}" in stdout


def test_a_checkpoint_without_tokenizer_still_resumes(data, tmp_path, monkeypatch):
    """As older versions wrote it; but nothing can be sampled from it."""
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        stopped(out, data, 3, monkeypatch)
    saved = torch.load(out / "ckpt.pt", weights_only=True)
    del saved["tokenizer"]
    torch.save(saved, out / "ckpt.pt")
    with pytest.raises(UserError, match="lacks tokenizer"):
        load(str(out), torch.device("cpu"))
    assert metrics(train_run(out, data, "--resume=auto"))[-1]["step"] == 8


# ----------------------------------------------------------------------------------------------------------------------
# The log

def test_wandb_gets_what_the_file_gets(data, tmp_path, monkeypatch):
    logged = []
    fake = types.SimpleNamespace(init=lambda **kw: types.SimpleNamespace(log=lambda values,
                                                                         step: logged.append((step, values))))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = train_run(tmp_path / "run", data, "--wandb=True")
    assert logged == [(r["step"], {k: v for k, v in r.items() if v is not None}) for r in metrics(out)]
    assert len(logged) == 9
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        train_run(tmp_path / "other", data, "--wandb=True")
    assert not (tmp_path / "other").exists()  # the next try finds no run


def test_wandbs_id_is_random_and_stays_with_the_folder(data, tmp_path, monkeypatch):
    """out/a/s and out/b/s are two runs there, a continuation is the same one, and a name may hold a colon."""
    calls = []

    def init(**kw):
        calls.append(kw)
        return types.SimpleNamespace(log=lambda values, step: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for folder in ("a", "b"):
        with pytest.raises(SystemExit):
            stopped(tmp_path / folder / "s:1", data, 3, monkeypatch, "--wandb=True")
        train_run(tmp_path / folder / "s:1", data, "--wandb=True", "--resume=auto")
    ids = [call["id"] for call in calls]
    assert ids[0] == ids[1] != ids[2] == ids[3] and all(i.isalnum() and len(i) == 16 for i in ids)
    assert {call["name"] for call in calls} == {"s:1"} and {call["resume"] for call in calls} == {"allow"}


def test_perplexity_has_no_largest_loss():
    assert run.perplexity(2.0) == math.exp(2) and run.perplexity(800.0) == run.perplexity(1e4) == math.inf


def test_times_are_in_minutes_and_then_in_hours():
    assert [run.clock(s) for s in (0.9, 61, 3599, 3600, 7384)] == ["0m00s", "1m01s", "59m59s", "1h00m", "2h03m"]


class Clock:
    """time.monotonic that a test moves; the wall clock jumps about."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(run.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(run.time, "time", lambda: math.sin(self.now) * 1e9)

    def takes(self, monkeypatch, module, name, seconds):
        real = getattr(module, name)

        def slow(*args, **kw):
            self.now += seconds
            return real(*args, **kw)
        monkeypatch.setattr(module, name, slow)


def test_rates_are_those_of_training_alone(data, tmp_path, monkeypatch, capsys):
    """A step takes 2 s, a validation 100 s, a checkpoint 50 s; 128 tokens a step are 64 tokens/s, on any wall clock."""
    clock = Clock(monkeypatch)
    for module, name, seconds in ((train, "train_step", 2), (train, "evaluate", 100),
                                  (train.Training, "save_checkpoint", 50)):
        clock.takes(monkeypatch, module, name, seconds)
    out = train_run(tmp_path / "run", data, "--eval_interval=3", "--save_interval=4", "--log_interval=2")
    rows = metrics(out)
    assert [r["tokens_per_s"] for r in rows if "loss" in r] == [64.0] * 5 and len(rows) == 8
    assert "speed    64 tokens/s" in capsys.readouterr().out


def test_mfu_counts_the_peak_of_every_rank(monkeypatch, tmp_path):
    """4e12 FLOPs in a second on two cards of 1e13 FLOP/s are 20 %."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(run, "peak_flops", lambda _: 1e13)
    cfg, ranks = tiny(f"--out_dir={tmp_path}"), device.Ranks(0, 2, torch.device("cpu"), torch.float32, False)
    monkeypatch.setattr(device.Ranks, "sum_over_ranks", lambda self, values: 2 * values)
    log = run.Log(cfg, ranks, 0, np.full(8, 2e12))
    clock.now += 1
    log.step(2, torch.tensor(3.0), 1e-3, torch.tensor(1.0), 0.0)
    row, = metrics(tmp_path)
    assert row["mfu"] == 0.2 and row["loss"] == 3.0 and row["tokens_per_s"] == 256.0


def test_a_standing_clock_and_a_slow_step_leave_a_rate_above_0(monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    log = run.Log(tiny(f"--out_dir={tmp_path}"), ALONE, 0, np.full(8, 1.0))
    log.step(1, torch.tensor(3.0), 1e-3, torch.tensor(1.0), 0.0)
    clock.now += 1e6
    log.step(2, torch.tensor(3.0), 1e-3, torch.tensor(1.0), 0.0)
    assert all(row["tokens_per_s"] > 0 for row in metrics(tmp_path))
    assert len(run.read_metrics(str(tmp_path / "metrics.jsonl"), 8)) == 2


def test_the_final_validation_shows_its_progress(monkeypatch, tmp_path, capsys):
    """On a terminal always, in a log file every five minutes."""
    clock = Clock(monkeypatch)
    log = run.Log(tiny(f"--out_dir={tmp_path}"), ALONE, 0, np.full(8, 1.0))
    log.next_time = clock.now + 10
    for fraction in (0.1, 0.2, 0.3, 0.4):
        log.final(fraction)
        clock.now += 160
    assert capsys.readouterr().out == "final validation 20%\nfinal validation 40%\n"
    log.tty = True
    log.final(0.5)
    assert capsys.readouterr().out == "\r\033[Kfinal validation 50%"


def test_the_final_validation_reports_what_is_done(data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(run.Log, "final", lambda self, fraction: seen.append(fraction))
    train_run(tmp_path / "run", data, "--eval_interval=2")
    assert seen == [0.0, 0.4, 0.8]  # ten windows, four at a time; validations during the run are silent
