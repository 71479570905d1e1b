"""device: two processes against one, mistakes of one of several, out-of-memory."""
import dataclasses
import json
import signal
import subprocess
import sys

import pytest
import torch

import device
import train
from config import UserError
from conftest import LOWRANK, ROOT, TINY, train_run
from device import Ranks, in_memory
from model import GPT
from runs import ALONE, CPU, GUIDED, RUNS, copy_data, metrics, set_token, stopped, tiny


# ----------------------------------------------------------------------------------------------------------------------
# Two processes

WORKER = """
import contextlib, io, json, os, signal, sys
sys.path.insert(0, {root!r})
import config, torch, train
rank = os.environ["RANK"]
real, end = train.dist.init_process_group, train.dist.destroy_process_group
def once(*args, **kw):  # one group for all runs
    return train.dist.is_initialized() or real(*args, **kw)
train.dist.init_process_group = once
train.dist.destroy_process_group = lambda: None
good, bad, signalled = json.load(open({runs!r}))
seeds, step = [], train.train_step
for argv in good:
    train.train_step = lambda *args: seeds.append(torch.initial_seed()) or step(*args)
    train.main(*config.load(argv, train.Settings))
calls, status = [], None
def hit(*args):  # in its third step rank 1 alone is sent a signal
    calls.append(1)
    if len(calls) == 3 and rank == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
    return step(*args)
train.train_step = hit
try:
    train.main(*config.load(signalled, train.Settings))
except SystemExit as e:
    status = e.code
train.train_step, refusals = step, []
train.prepare.verify_in_background = lambda *files: lambda wait=False: None  # before it has found what a rank finds
for argv in bad:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(*config.load(argv, train.Settings))
    except config.UserError as e:
        refusals.append(str(e))
json.dump([refusals, seeds, [len(calls), status]], open({runs!r} + rank, "w"))
end()
"""


def taught_by(run):
    """Guided from a dense run's weights and by its predictions."""
    return [*LOWRANK, "--guide=fixedstep", f"--init_from={run}", f"--distill={run}", "--distill_share=0.7"]


@pytest.fixture(scope="module")
def two_processes(data, tmp_path_factory, whole):
    """{name: folder} of runs under torchrun with two gloo processes."""
    folder = tmp_path_factory.mktemp("ddp")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stopped(folder / "moved", data, 3, patch, *GUIDED)
    flags = {"plain": [], "guided": GUIDED, "always": RUNS["always"], "moved": [*GUIDED, "--resume=auto"],
             "accumulated": ["--micro_batch_size=1"], "muon": RUNS["muon"],
             "taught": taught_by(whole["plain"]), "dropout": ["--dropout=0.1"]}
    runs = [[*TINY, f"--out_dir={folder / name}", f"--data_dir={data}", *argv] for name, argv in flags.items()]
    damaged = [set_token(copy_data(data, folder / name), name, 155, 999)
               for name in ("val.bin", "train.bin")]  # in window 9, rank 1's in validation
    bad = [[*TINY, f"--out_dir={folder / 'runs.json' / 'run'}", f"--data_dir={data}"]]  # below a file
    bad += [[*TINY, f"--out_dir={folder / path.name}-run", f"--data_dir={path}", "--max_tokens=4096"]
            for path in damaged]
    signalled = [*TINY, f"--out_dir={folder / 'signalled'}", f"--data_dir={data}"]
    (folder / "runs.json").write_text(json.dumps([runs, bad, signalled]))
    (folder / "worker.py").write_text(WORKER.format(root=str(ROOT), runs=str(folder / "runs.json")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(folder / "worker.py")]
    torchrun = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = torchrun.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        torchrun.terminate()  # it ends its workers
        out, err = torchrun.communicate()
    assert torchrun.returncode == 0, err[-3000:]
    refusals, seeds, ended = zip(*(json.loads((folder / f"runs.json{rank}").read_text()) for rank in range(2)))
    return {name: folder / name for name in (*flags, "signalled")} | {"stdout": out, "refusals": refusals,
                                                                      "seeds": seeds, "ended": ended}


def test_two_processes_equal_one(two_processes, whole, data, tmp_path):
    """plain, the same with four micro-batches a rank, guided with and without guide_skip, and begun by one process."""
    one = {name: whole[name] for name in ("plain", "always", "muon")}
    one["guided"] = train_run(tmp_path / "guided", data, *GUIDED)
    one["taught"] = train_run(tmp_path / "taught", data, *taught_by(whole["plain"]))
    one |= {"moved": one["guided"], "accumulated": one["plain"]}
    for name, out in one.items():
        a, b = (torch.load(folder / "model.pt", weights_only=True) for folder in (out, two_processes[name]))
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5) and a["model"].keys() == b["model"].keys()
        for k in a["model"]:
            torch.testing.assert_close(a["model"][k], b["model"][k], rtol=0, atol=1e-5,
                                       msg=lambda text: f"{name} {k}: {text}")
        rows = [metrics(folder) for folder in (out, two_processes[name])]
        assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]]
        for x, y in zip(*rows):
            assert all(x[k] == pytest.approx(y[k], rel=1e-4)
                       for k in x.keys() & {"loss", "grad_norm", "lr", "alpha", "tokens"})


def test_one_of_two_processes_speaks(two_processes):
    out = two_processes["stdout"]
    assert out.count("2 x cpu") == 9 and out.count("done     validation loss") == 8
    assert out.count("continuing after step 3 of 12") == out.count("stopped after step 4 and saved") == 1


def test_what_one_of_two_processes_refuses_both_refuse(two_processes):
    """The folder is rank 0's alone to write, the damaged window of val.bin rank 1's alone to read."""
    one, other = two_processes["refusals"]
    assert one == other and len(one) == 3
    for text, words in zip(one, ("run (Not a directory)", "val.bin holds the token", "train.bin holds the token")):
        assert words in text


def test_a_signal_to_one_rank_ends_both_after_the_same_step(two_processes):
    """Rank 1 got it in step 3; all learn of it one step later, and the checkpoint is of that step."""
    assert two_processes["ended"] == ([4, 128 + signal.SIGUSR1],) * 2
    saved = torch.load(two_processes["signalled"] / "ckpt.pt", weights_only=True)
    assert saved["step"] == 4 and not (two_processes["signalled"] / "model.pt").exists()


def test_dropout_is_drawn_anew_for_every_step_and_rank(two_processes):
    seeds = [seed for rank in two_processes["seeds"] for seed in rank[-8:]]  # of the run with dropout, 8 steps
    assert len(set(seeds)) == 16


def test_dropouts_seed_is_one_for_every_seed_step_and_rank():
    cfg = tiny("--dropout=0.1")
    other = dataclasses.replace(cfg, seed=1)
    assert len({train.dropout_seed(c, step, rank) for c in (cfg, other) for step in range(50)
                for rank in range(4)}) == 400


def test_unused_parameters_are_searched_for_only_with_guide_skip(monkeypatch):
    calls = []
    monkeypatch.setattr(train, "DistributedDataParallel", lambda model,
                        **kw: calls.append(kw["find_unused_parameters"]))
    for flags in (LOWRANK, [*LOWRANK, "--guide=fixedstep"], [*LOWRANK, "--guide=fixedstep", "--guide_skip=True"]):
        cfg = tiny(*flags)
        for step in (0, 3, 4):
            train.wrap_ddp(None, cfg, train.make_plan(cfg), step, Ranks(0, 2, CPU, torch.float32, False))
    assert calls == [False] * 6 + [True, True, False]


LATE = """
import os, runpy, sys, time
sys.path.insert(0, {root!r})
if os.environ["RANK"] == "0":
    time.sleep(2)
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path({script!r}, run_name="__main__")
"""


def test_a_mistake_reaches_the_user_when_rank_0_is_late(data, tmp_path):
    (tmp_path / "late.py").write_text(LATE.format(root=str(ROOT), script=str(ROOT / "train.py")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(tmp_path / "late.py"), *TINY,
               "--n_layr=3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1, done.stderr
    assert "did you mean n_layer?" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Memory

@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")],
    ids=lambda e: type(e).__name__)
def test_what_does_not_fit_into_memory_is_told(error, data, tmp_path, monkeypatch):
    def fail(*args):
        raise error
    monkeypatch.setattr(train, "train_step", fail)
    words = "memory of cpu .* micro-batches of 4 x 16 tokens: lower --micro_batch_size, or choose a smaller"
    with pytest.raises(UserError, match=words) as e:
        train_run(tmp_path / "run", data)
    assert f"{train.short(train.summary(tiny())['params'])} parameters" in str(e.value)
    compiled = dataclasses.replace(ALONE, compile=True)
    for recompute, words in (("cheap", "give --recompute=wide, or"), ("wide", "lower --micro_batch_size, or")):
        with pytest.raises(UserError, match=words), in_memory(tiny(f"--recompute={recompute}"), compiled, 1):
            raise error


# ----------------------------------------------------------------------------------------------------------------------
# Precision, shapes without memory

def test_the_dtype_rule():
    for name, kind, dtype in (("auto", "cuda", torch.bfloat16), ("auto", "cpu", torch.float32),
                              ("auto", "mps", torch.float32),
                              ("float32", "cuda", torch.float32), ("bfloat16", "cpu", torch.bfloat16)):
        assert device.pick_dtype(name, torch.device(kind)) is dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a card the fused kernels load, and Triton's compiler with them")
def test_a_dry_run_imports_no_compiler_and_no_logger(data):
    """Neither wandb nor torch's compiler, of which the second alone takes longer than all that a dry run needs."""
    code = ("import sys; sys.argv = 'train.py --dry_run=True --vocab_size=9 --ffn=lowrank --rank=8'.split()\n"
            "import runpy; runpy.run_path('train.py', run_name='__main__')\n"
            "print([name for name in 'torch._dynamo torch._inductor wandb datasets'.split() if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.splitlines()[1:] == ["[]"], done.stderr


def test_a_model_on_meta_has_shapes_and_no_memory():
    with device.on_meta():
        gpt = GPT(tiny(*LOWRANK))
    assert all(p.is_meta for p in gpt.parameters()) and gpt.wte.weight.shape == (257, 32) and not gpt.cos.is_meta
