"""device: two processes against one, mistakes of one of several, out-of-memory."""
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import device
import train
from config import UserError
from conftest import LOWRANK, ROOT, TINY, assert_one_sentence, start, train_run
from device import Ranks, in_memory
from model import GPT, build
from runs import ALONE, CPU, GUIDED, RUNS, copy_data, metrics, set_token, stopped, tiny, weights


# ----------------------------------------------------------------------------------------------------------------------
# Two processes

WORKER = """
import contextlib, io, json, os, signal, sys
sys.path.insert(0, {root!r})
import config, device, torch, train
rank = os.environ["RANK"]
real, end = device.dist.init_process_group, device.dist.destroy_process_group
def once(*args, **kw):  # one group for all runs
    return device.dist.is_initialized() or real(*args, **kw)
device.dist.init_process_group = once
device.dist.destroy_process_group = lambda: None
good, bad, signalled = json.load(open({runs!r}))
step, held = train.train_step, {{}}
for argv in good:
    def measured(wrapped, optimizer, *args):  # bytes that this process holds of weights and optimizer state
        result = step(wrapped, optimizer, *args)
        tensors = [*wrapped.parameters(), *(t for s in optimizer.state.values() for t in s.values())]
        held[next(os.path.basename(a) for a in argv if a.startswith("--out_dir"))] = sum(
            device.local(t).numel() * t.element_size() for t in tensors)
        return result
    train.train_step = measured
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
json.dump([refusals, [len(calls), status], held], open({runs!r} + rank, "w"))
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
    dropped = [*GUIDED, "--dropout=0.2"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stopped(folder / "dropped", data, 2, patch, *dropped)
    flags = {"plain": [], "guided": GUIDED, "always": RUNS["always"], "moved": [*GUIDED, "--resume=auto"],
             "accumulated": ["--micro_batch_size=1"], "muon": RUNS["muon"], "taught": taught_by(whole["plain"])}
    flags |= {f"{name} fsdp": [*argv, "--parallel=fsdp", "--eval_interval=5"] for name, argv in flags.items()
              if name not in ("accumulated", "taught")}
    shutil.copytree(folder / "moved", folder / "moved fsdp")
    runs = [[*TINY, f"--out_dir={folder / name}", f"--data_dir={data}", *argv] for name, argv in flags.items()]
    damaged = [set_token(copy_data(data, folder / name), name, 155, 999)
               for name in ("val.bin", "train.bin")]  # in window 9, rank 1's in validation
    bad = [[*TINY, f"--out_dir={folder / 'runs.json' / 'run'}", f"--data_dir={data}"]]  # below a file
    bad += [[*TINY, f"--out_dir={folder / path.name}-run", f"--data_dir={path}", "--max_tokens=4096"]
            for path in damaged]
    signalled = [*TINY, f"--out_dir={folder / 'dropped'}", f"--data_dir={data}", *dropped, "--resume=auto",
                 "--micro_batch_size=1"]
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
    refusals, ended, held = zip(*(json.loads((folder / f"runs.json{rank}").read_text()) for rank in range(2)))
    return {name: folder / name for name in (*flags, "dropped")} | {"stdout": out, "stderr": err, "refusals": refusals,
                                                                      "ended": ended, "held": held}


def test_two_processes_equal_one(two_processes, whole, data, tmp_path):
    """plain, the same with four micro-batches a rank, guided with and without guide_skip, and begun by one process."""
    one = {name: whole[name] for name in ("plain", "always", "muon")}
    one["guided"] = train_run(tmp_path / "guided", data, *GUIDED)
    one["taught"] = train_run(tmp_path / "taught", data, *taught_by(whole["plain"]))
    one |= {"moved": one["guided"], "accumulated": one["plain"]}
    one |= {f"{name} fsdp": folder for name, folder in one.items() if name not in ("accumulated", "taught")}
    for name, out in one.items():
        a, b = (torch.load(folder / "model.pt", weights_only=True) for folder in (out, two_processes[name]))
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5) and a["model"].keys() == b["model"].keys()
        for k in a["model"]:
            torch.testing.assert_close(a["model"][k], b["model"][k], rtol=0, atol=1e-5,
                                       msg=lambda text: f"{name} {k}: {text}")
        rows = [[r for r in metrics(folder) if "loss" in r or r["step"] == a["step"]]
                for folder in (out, two_processes[name])]
        assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]]
        for x, y in zip(*rows):
            assert all(x[k] == pytest.approx(y[k], rel=1e-4)
                       for k in x.keys() & {"loss", "grad_norm", "lr", "alpha", "tokens"})


def test_fsdp_holds_half_of_what_ddp_does(two_processes):
    """Of weights and optimizer state, at the last step; what a rank has more are uneven shares."""
    for held in two_processes["held"]:
        for name in ("plain", "guided", "always", "moved", "muon"):
            assert 0.45 < held[f"{name} fsdp"] / held[name] < 0.6, (name, held)


@pytest.mark.parametrize("name", ["guided", "muon"])
def test_a_checkpoint_of_fsdp_is_one_like_any_other(name, two_processes, whole, data, tmp_path):
    """Names, shapes and types are those of one process, and one process goes on from it: it has the last step's."""
    out = shutil.copytree(two_processes[f"{name} fsdp"], tmp_path / "run")
    one, other = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in (whole[name], out))
    assert one.keys() == other.keys() and one["optimizer"].keys() == other["optimizer"].keys()
    for key, t in one["model"].items():
        assert (other["model"][key].shape, other["model"][key].dtype) == (t.shape, t.dtype)
    for key, state in one["optimizer"].items():
        for k, v in state.items():
            assert other["optimizer"][key][k].shape == v.shape, (key, k)
            if name == "muon":  # guided has dropout in the one process
                torch.testing.assert_close(other["optimizer"][key][k], v, rtol=0, atol=1e-4)
    model = (out / "model.pt").read_bytes()
    (out / "model.pt").unlink()
    train_run(out, data, *(GUIDED if name == "guided" else RUNS[name]), "--resume=auto")
    saved = torch.load(out / "model.pt", weights_only=True)["model"]
    (tmp_path / "model.pt").write_bytes(model)
    assert all(torch.equal(w, saved[n]) for n, w in weights(tmp_path).items())


def test_one_of_two_processes_speaks(two_processes):
    out = two_processes["stdout"]
    assert out.count("2 x cpu") == 13 and out.count("done     validation loss") == 12
    assert out.count("continuing after step 3 of 12") == 2 and out.count("stopped after step 6 and saved") == 1


def test_what_one_of_two_processes_refuses_both_refuse(two_processes):
    """The folder is rank 0's alone to write, the damaged window of val.bin rank 1's alone to read."""
    one, other = two_processes["refusals"]
    assert one == other and len(one) == 3
    for text, words in zip(one, ("run (Not a directory)", "val.bin holds the token", "train.bin holds the token")):
        assert words in text


def test_a_signal_to_one_rank_ends_both_after_the_same_step(two_processes):
    """One process made 2 steps; in the third of two processes, step 5, rank 1 got it. All learn of it one step later,
    and the checkpoint is of that step."""
    assert two_processes["ended"] == ([4, device.SAVED],) * 2
    saved = torch.load(two_processes["dropped"] / "ckpt.pt", weights_only=True)
    assert saved["step"] == 6 and not (two_processes["dropped"] / "model.pt").exists()


def test_one_two_and_one_processes_draw_the_same_dropout(two_processes, data, tmp_path):
    """2 steps, 4 on two processes with other micro-batches, 6 on one again: the losses are those of one process."""
    flags = [*GUIDED, "--dropout=0.2"]
    one = train_run(tmp_path / "one", data, *flags)
    moved = shutil.copytree(two_processes["dropped"], tmp_path / "moved")
    train_run(moved, data, *flags, "--resume=auto")
    rows = [{r["step"]: r["loss"] for r in metrics(folder) if "loss" in r} for folder in (one, moved)]
    assert len(rows[0]) == 12 and rows[0] == pytest.approx(rows[1], abs=1e-6)
    without = {r["step"]: r["loss"] for r in metrics(train_run(tmp_path / "without", data, *GUIDED)) if "loss" in r}
    assert max(abs(rows[0][step] - without[step]) for step in without) > 1e-3  # dropout does something


@pytest.fixture
def group_of_one():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_leaves_a_skipped_guide_alone(group_of_one):
    """Steps of two micro-batches that skip one, both and no guided layer, and one after the guides: as without DDP."""
    cfg, ends = tiny(*LOWRANK, "--guide=fixedstep", "--guide_skip=True", "--vocab_size=61"), []
    for world in (1, 2):
        ranks, gpt, draw = dataclasses.replace(ALONE, world=world), build(cfg, CPU, seed=0), torch.manual_seed(1)
        for _, linear in gpt.structured_linears():
            linear.start_guide()
        optimizer, wrapped, losses = train.make_optimizer(cfg, gpt, ranks), train.wrap_ddp(gpt, cfg, ranks), []
        for guided in ((1, 2), (2,), (), (1, 2), (1,)):
            batch = torch.randint(61, (2, 4, 17), generator=draw)
            losses.append(train.train_step(wrapped, optimizer, batch, cfg, ranks, 1e-3, torch.tensor(0.5), guided))
        counts = {name: int(optimizer.state[p]["step"]) for name, p in gpt.named_parameters()}
        _, optimizer = train.end_guide(cfg, None, ranks, gpt, optimizer)
        losses.append(train.train_step(train.wrap_ddp(gpt, cfg, ranks), optimizer, batch, cfg, ranks, 1e-3))
        ends.append([torch.tensor(losses), counts, torch.nn.utils.parameters_to_vector(gpt.parameters())])
    one, ddp = ends
    assert torch.equal(one[0], ddp[0]) and one[1] == ddp[1] and torch.equal(one[2], ddp[2])
    assert {name: n for name, n in ddp[1].items() if n < 5} == {f"blocks.{i}.ffn.fc{k}.W": 3 for i in (1, 2)
                                                                for k in (1, 2)}


def test_ddp_does_not_warn_of_parameters(two_processes):
    assert "unused" not in two_processes["stderr"]


def test_ddp_leaves_compiled_blocks_whole(group_of_one, monkeypatch):
    """However small DDP's buckets are, a graph is compiled for each kind of block, as without DDP."""
    graphs = []
    monkeypatch.setattr(torch, "compile", functools.partial(
        torch.compile, backend=lambda graph, inputs: graphs.append(graph) or graph))
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)
    monkeypatch.setattr(train, "DistributedDataParallel", functools.partial(
        train.DistributedDataParallel, bucket_cap_mb=0.001))
    for world in (1, 2):
        torch._dynamo.reset()
        cfg = tiny(*LOWRANK, "--vocab_size=61")
        gpt = build(cfg, CPU, seed=0)
        gpt.compile_parts()
        wrapped = train.wrap_ddp(gpt, cfg, Ranks(0, world, CPU, torch.float32, True))
        tokens = torch.arange(16)[None]
        wrapped(tokens, tokens).backward()
        graphs.append(world)
    torch._dynamo.reset()
    assert graphs.index(1) == len(graphs) - 2 - graphs.index(1) >= 4  # embeddings, a dense block, a LowRank one, loss


LATE = """
import os, runpy, sys, time
sys.path.insert(0, {root!r})
if os.environ["RANK"] == "0":
    time.sleep(2)
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path({script!r}, run_name="__main__")
"""


def test_a_mistake_reaches_the_user_when_rank_0_is_late(tmp_path):
    (tmp_path / "late.py").write_text(LATE.format(root=str(ROOT), script=str(ROOT / "train.py")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(tmp_path / "late.py"), *TINY,
               "--n_layr=3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1, done.stderr
    assert "did you mean n_layer?" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Processes that do not come, stop, die or are started again

@pytest.mark.parametrize("place, words", [
    ({"RANK": "x"}, "RANK=x in the environment is not a whole number"), ({"RANK": "-1"}, "RANK=-1"),
    ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK=3 in the environment is not below WORLD_SIZE=2"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 needs MASTER_ADDR and MASTER_PORT")], ids=str)
def test_a_place_that_cannot_be_is_one_sentence_before_torch_loads(place, words, without_torch, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    status, out, err = without_torch("train.py", *TINY)
    assert_one_sentence(status, out, err)
    assert words in err and time.monotonic() - began < 5


def place(rank, port):
    return {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


@pytest.fixture
def port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def is_listened_on(port):
    """Whether a connection is accepted there. On Linux one may reach itself where nobody listens."""
    with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=10) as s:
        return s.getsockname() != s.getpeername()


def test_a_process_whose_others_never_come_ends_or_is_interrupted(data, tmp_path, port):
    """Ctrl-C works while it waits for them; after the timeout one sentence says who waited where."""
    argv = [*TINY, f"--out_dir={tmp_path / 'run'}", f"--data_dir={data}"]
    waiting = start("train.py", *argv, env=place(0, port))
    try:
        end = time.monotonic() + 60
        while not is_listened_on(port):
            assert time.monotonic() < end and waiting.poll() is None
            time.sleep(0.1)
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(10) == -signal.SIGINT
    finally:
        waiting.kill()
    waiting = start("train.py", *argv, "--timeout=0.02", env=place(1, port))
    _, err = waiting.communicate(timeout=100)
    assert waiting.returncode == 2 and err.count("error: ") == 1 and "Traceback" not in err
    assert f"rank 1 of 2 has not met the others at localhost:{port} within 0.02 minutes" in err


def two_ranks(data, out, port, *argv):
    return [start("train.py", *TINY, f"--out_dir={out}", f"--data_dir={data}", "--max_tokens=1_280_000",
                  "--save_interval=20", "--keep_checkpoints=1", *argv, env=place(rank, port)) for rank in range(2)]


def finish_all(processes):
    for process in processes:
        process.kill()
        process.communicate()


def wait_for_step(out, step):
    end = time.monotonic() + 90
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < step:
        assert time.monotonic() < end, "it did not train"
        time.sleep(0.05)


def test_a_rank_that_stops_is_named(data, tmp_path, port):
    """Rank 1 is stopped: after the timeout rank 0 says so and ends."""
    processes = two_ranks(data, tmp_path / "run", port, "--timeout=0.05")
    try:
        wait_for_step(tmp_path / "run", 5)
        processes[1].send_signal(signal.SIGSTOP)
        _, err = processes[0].communicate(timeout=60)
        assert processes[0].returncode == 2 and err.count("error: ") == 1 and "Traceback" not in err
        assert f"rank 1 of 2 (process {processes[1].pid} on " in err and "does not answer" in err
        assert "nothing has moved for 0.05 minutes" in err and len(err) < 400
    finally:
        finish_all(processes)


def test_a_stuck_rank_says_where(data, tmp_path, port):
    """Rank 1 waits in its data for ever, and answers all the same: it has noted less than rank 0."""
    stuck = ("import runpy, sys, time, schedule; real = schedule.batches\n"
             "def batches(*args):\n"
             "    for n, batch in enumerate(real(*args)):\n"
             "        if n == 4: time.sleep(1000)\n"
             "        yield batch\n"
             "schedule.batches = batches\n"
             "sys.argv[:] = sys.argv[1:]; runpy.run_path('train.py', run_name='__main__')")
    argv = ["train.py", *TINY, f"--out_dir={tmp_path / 'run'}", f"--data_dir={data}", "--timeout=0.05"]
    processes = [start("train.py", *argv[1:], env=place(0, port)),
                 subprocess.Popen([sys.executable, "-c", stuck, *argv], cwd=ROOT, env=place(1, port), text=True,
                                  stderr=subprocess.PIPE, stdout=subprocess.PIPE)]
    try:
        _, err = processes[0].communicate(timeout=60)
        assert processes[0].returncode == 2 and "Traceback" not in err
        assert f"rank 1 of 2 (process {processes[1].pid} on " in err
        assert "is stuck in reading the tokens of step 5" in err
    finally:
        finish_all(processes)


def test_a_start_does_not_see_what_an_earlier_one_wrote(monkeypatch):
    """torchrun's store outlives the processes, with the addresses of dead ones in it."""
    stores, of_torchrun = [], torch.distributed.HashStore()
    monkeypatch.setattr(device.dist, "rendezvous", lambda *args, **more: iter([(of_torchrun, 0, 1)]))
    monkeypatch.setattr(device.dist, "init_process_group", lambda *args, store, **more: stores.append(store))
    monkeypatch.setattr(device.dist, "new_group", lambda **more: None)
    for restarts in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        device.join(0, 1, CPU, 1)
    stores[0].set("address of rank 0", "10.0.0.1")
    assert stores[0].check(["address of rank 0"]) and not stores[1].check(["address of rank 0"])


def test_torchrun_starts_a_run_again_from_its_last_checkpoint(data, tmp_path, whole_plain):
    """Without --resume=auto. Rank 1 is killed in the fourth step of the first start, the second one finishes."""
    code = ("import os, runpy, signal, sys; sys.path.insert(0, os.getcwd()); import schedule; real = schedule.batches\n"
            "def batches(*args):\n"
            "    for n, batch in enumerate(real(*args)):\n"
            "        if n == 3 and os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
            "            os.kill(os.getpid(), signal.SIGKILL)\n"
            "        yield batch\n"
            "schedule.batches = batches\n"
            "runpy.run_path('train.py', run_name='__main__')\n")
    (tmp_path / "dies.py").write_text(code)
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3",
               str(tmp_path / "dies.py"), *TINY, f"--out_dir={out}", f"--data_dir={data}", "--save_interval=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "continuing after step 2 of 8" in done.stdout
    assert "error: rank 0 of 2 has lost another process during step 4" in done.stderr
    rows = [[r["loss"] for r in metrics(folder) if "loss" in r] for folder in (out, whole_plain)]
    assert rows[0] == pytest.approx(rows[1], abs=1e-5) and len(rows[0]) == 8


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
def test_a_dry_run_imports_no_compiler_and_no_logger():
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
