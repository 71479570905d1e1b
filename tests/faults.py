"""Does a run survive anything?  python tests/faults.py [--kills=1000] [--power=200] [--seed=0] [CASE ...]

Trains tiny models on real text, kills them at random moments, starts the same command again until they finish, and
compares weights, optimizer state and metrics with those of an uninterrupted run: they must be equal to the bit. A kill
is SIGKILL or another signal at a random time, or SIGKILL at a random call that writes, syncs, renames or removes a
file. Of two ranks one or both are killed.

--power counts power losses: what was not synced is lost. A file has what it held at its last fsync, and perhaps a part
of what was written since; of the renames since the last fsync of the folder the first few are there, the others not.
The folder in that state must hold a whole checkpoint, if one was ever finished, and the run goes on from it.

Processes are forked after torch is imported. Prints a line for each case, and one as JSON. Status 1 after a failure.
"""
import contextlib
import json
import math
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import numpy as np

import config
import checkpoint
import run
import train
from conftest import TINY, write_data
from runs import GUIDED, RUNS, assert_same_run

# 24 steps (guided: 36), a checkpoint every 3, a validation every 5
FLAGS = [*TINY, "--max_tokens=3072", "--save_interval=3", "--eval_interval=5", "--log_interval=1", "--timeout=0.5",
         "--resume=auto"]
CASES = {  # name: (processes, flags)
    "plain": (1, []), "guided": (1, [*GUIDED, "--guide_schedule=linear"]), "dropout": (1, ["--dropout=0.2"]),
    "muon": (1, RUNS["muon"]), "keep 1": (1, ["--keep_checkpoints=1"]),
    "two ranks": (2, []), "two ranks, guided": (2, [*GUIDED, "--dropout=0.1"]), "two ranks, muon": (2, RUNS["muon"]),
    "fsdp": (2, ["--parallel=fsdp"]), "fsdp, guided": (2, [*GUIDED, "--parallel=fsdp"]),
    "fsdp, muon": (2, [*RUNS["muon"], "--parallel=fsdp"])}
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
PATIENCE = 120  # seconds after which a process that should have ended hangs


def real_text(folder):
    """Bytes of the standard library's source."""
    text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))[:40_000]
    ids = np.frombuffer(text, np.uint8)
    return write_data(folder, ids[:36_000], ids[36_000:])


# ----------------------------------------------------------------------------------------------------------------------
# In the forked process

def die_at(call, after):
    """SIGKILL at the call-th one that writes a file's state, before it or after it."""
    left = [call]

    def wrap(module, name):
        real = getattr(module, name)

        def wrapped(*args, **kw):
            left[0] -= 1
            if left[0] == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kw)
            if left[0] == 0 and after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        setattr(module, name, wrapped)
    for name in ("fsync", "replace", "remove"):
        wrap(os, name)
    wrap(run.torch, "save")


class Disk:
    """What of a folder is on the disk, as power is lost at the call-th rename."""

    def __init__(self, folder, call, after, rng):
        self.folder, self.left, self.after, self.rng = folder, call, after, rng
        self.names, self.contents, self.since = {}, {}, []  # of the last fsync of the folder; of each inode's; renames
        if os.path.isdir(folder):
            self.sync_folder()
            for name, inode in self.names.items():
                self.contents[inode] = Path(folder, name).read_bytes()
        self.fsync, self.replace = os.fsync, os.replace
        os.fsync, os.replace = self.synced, self.renamed

    def sync_folder(self):
        self.names = {entry.name: entry.inode() for entry in os.scandir(self.folder) if entry.is_file()}
        self.since = []

    def synced(self, descriptor):
        self.fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path == self.folder:
            self.sync_folder()
        elif path.startswith(self.folder):
            self.contents[os.fstat(descriptor).st_ino] = Path(path).read_bytes()

    def renamed(self, a, b):
        self.left -= 1
        if self.left == 0 and not self.after:
            self.lose_power()
        inode = os.stat(a).st_ino
        self.replace(a, b)
        self.since.append((os.path.basename(a), os.path.basename(b), inode))
        if self.left == 0 and self.after:
            self.lose_power()

    def lose_power(self):
        names = dict(self.names)
        for a, b, inode in self.since[:self.rng.randint(0, len(self.since))]:
            names.pop(a, None)
            names[b] = inode
        now = {entry.inode(): Path(entry.path).read_bytes() for entry in os.scandir(self.folder) if entry.is_file()}
        after = self.folder + ".after"
        os.makedirs(after)
        for name, inode in names.items():
            old, new = self.contents.get(inode, b""), now.get(inode, b"")
            if new.startswith(old):  # appended to since: some of that may be there
                old = new[:self.rng.randint(len(old), len(new))]
            Path(after, name).write_bytes(old)
        os.kill(os.getpid(), signal.SIGKILL)


def start(out, data, flags, rank=0, world=1, port=0, fault=None):
    """Forks a process that trains; fault(folder) is called in it before. -> its id."""
    child = os.fork()
    if child:
        return child
    status = 3
    try:
        log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        if world > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=str(port))
        if fault:
            fault(str(out))
        sys.argv = ["train.py", *FLAGS, *flags, f"--out_dir={out}", f"--data_dir={data}"]
        config.run(lambda argv: train.main(*train.read_settings(argv)))
        status = 0
    except SystemExit as e:
        status = e.code or 0
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


# ----------------------------------------------------------------------------------------------------------------------
# In this process

def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def attempt(out, data, world, flags, fault=None, interrupt=None):
    """Starts a run's processes, calls interrupt(their ids), waits for them -> their statuses, by signal as -number."""
    port = free_port() if world > 1 else 0
    children = [start(out, data, flags, rank, world, port, fault if rank == 0 else None) for rank in range(world)]
    if interrupt:
        interrupt(children)
    statuses, end, first = {}, time.monotonic() + PATIENCE, None
    while len(statuses) < world:
        first = first or (time.monotonic() if statuses else None)
        if first and time.monotonic() > first + 2:  # a launcher ends the others where one has died
            first = math.inf
            for child in children:
                if child not in statuses:
                    os.kill(child, signal.SIGTERM)
        for child in children:
            if child not in statuses:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    statuses[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for child in children:
                if child not in statuses:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
            raise AssertionError(f"a process hangs; see {out}.log")
        time.sleep(0.002)
    return [statuses[child] for child in children]


def kill_once(rng, out, data, world, flags, seconds):
    """One attempt with a fault -> its kind if it hit, None if the run finished before."""
    kind = rng.choice(["kill", "kill", "call", "call", "signal"])
    if kind == "call":
        call, after = rng.randint(1, 40), rng.random() < 0.5
        statuses = attempt(out, data, world, flags, lambda folder: die_at(call, after))
        return kind if -signal.SIGKILL in statuses else check_end(out, statuses)
    number = signal.SIGKILL if kind == "kill" else rng.choice(SIGNALS)

    def interrupt(children):
        time.sleep(rng.uniform(0, seconds))
        for child in rng.choice([children, children[:1], children[-1:]]):
            os.kill(child, number)  # not waited for yet, so the id is still its own
    statuses = attempt(out, data, world, flags, None, interrupt)
    return check_end(out, statuses) if all(status == 0 for status in statuses) else kind


def check_end(out, statuses):
    assert all(status == 0 for status in statuses), f"statuses {statuses} without a kill; see {out}.log"


def lose_power(rng, out, data, world, flags):
    """One attempt that ends in a loss of power -> its kind if it hit."""
    call, after, before = rng.randint(1, 24), rng.random() < 0.5, newest(out)
    statuses = attempt(out, data, world, flags, lambda folder: Disk(folder, call, after, rng))
    left = Path(f"{out}.after")
    if not left.exists():
        return check_end(out, statuses)
    shutil.rmtree(out)
    left.rename(out)
    assert newest(out) >= before, f"{out} is back at step {newest(out)}, {before} was on the disk"
    return "power"


def newest(out):
    """The step of the newest checkpoint in a folder, which must be whole; 0 without one."""
    paths = run.checkpoints(str(out))
    return checkpoint.read_checkpoint(paths[0], "ckpt.pt")["step"] if paths else 0


def study(name, folder, data, kills, power, seed):
    """Runs of a case with so many faults -> {kind: count, runs: finished and equal}."""
    world, flags = CASES[name]
    rng, counts = random.Random(f"{seed} {name}"), {"runs": 0}
    reference = folder / "reference"
    began = time.monotonic()
    check_end(reference, attempt(reference, data, world, flags))
    seconds = time.monotonic() - began

    def left():
        return kills + power - sum(n for kind, n in counts.items() if kind != "runs")

    while left() > 0:
        out = folder / f"run{counts['runs']}"
        while not (out / "model.pt").exists():
            lost = counts.get("power", 0)
            losing = rng.random() < (power - lost) / max(left(), 1)
            began = time.monotonic()
            hit = (lose_power(rng, out, data, world, flags) if losing else
                   kill_once(rng, out, data, world, flags, seconds))
            if hit:
                counts[hit] = counts.get(hit, 0) + 1
            else:  # the machine may be busier or less busy than it was
                seconds = (seconds + time.monotonic() - began) / 2
        assert_same_run(out, reference)
        counts["runs"] += 1
        shutil.rmtree(out)
    return counts


def main(argv):
    given = dict(arg.removeprefix("--").partition("=")[::2] for arg in argv if arg.startswith("--"))
    names = [arg for arg in argv if not arg.startswith("--")] or list(CASES)
    kills, power, seed = (int(given.get(key, default))
                          for key, default in (("kills", 1000), ("power", 200), ("seed", 0)))
    folder, total, failed = Path(tempfile.mkdtemp()), {}, False
    data = real_text(folder / "data")
    for n, name in enumerate(names):
        share = [(count * (n + 1) // len(names)) - (count * n // len(names)) for count in (kills, power)]
        (folder / name).mkdir()
        try:
            counts = study(name, folder / name, data, *share, seed)
        except (AssertionError, config.UserError) as e:
            print(f"{name}: FAILED: {e}; the folder is {folder / name}", flush=True)
            failed = True
            continue
        print(f"{name}: {counts}", flush=True)
        total = {kind: total.get(kind, 0) + counts.get(kind, 0) for kind in {**total, **counts}}
    print(json.dumps({"faults": sum(n for kind, n in total.items() if kind != "runs"), **total}))
    if not failed:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
