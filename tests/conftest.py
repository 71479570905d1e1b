"""What several test files share: the command line, the dense oracles, small data and small runs."""
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

# before torch loads: tiny matrices lose by threads, and one thread repeats bit for bit
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest

import config
import prepare

TINY = ["--n_layer=3", "--n_embd=32", "--n_head=2", "--block_size=16", "--batch_size=8", "--micro_batch_size=4",
        "--max_tokens=1024",  # 8 steps
        "--lr=1e-3", "--device=cpu", "--log_interval=1", "--eval_interval=0", "--eval_tokens=64",
        "--final_eval_tokens=160",
        "--save_interval=0"]
LOWRANK = ["--ffn=lowrank", "--rank=8"]
STRUCTURES = {"lowrank": LOWRANK, "blockshuffle": ["--ffn=blockshuffle", "--nblocks=4"],
              "blockdense": ["--ffn=blockdense", "--rank=8", "--nblocks=2"]}


# ----------------------------------------------------------------------------------------------------------------------
# The three maps as index loops: their dense matrices

def dense_oracle(kind, V, U):
    """The (M, N) float64 matrix of a structured map, entry by entry from the paper's definitions."""
    V, U = np.asarray(V, np.float64), np.asarray(U, np.float64)
    if kind == "lowrank":
        (R, N), M = V.shape, len(U)
        return np.array([[sum(U[i, r] * V[r, j] for r in range(R)) for j in range(N)] for i in range(M)])
    B, q, p = V.shape
    stage1 = np.zeros((B * q, B * p))  # blockdiag(V)
    for b in range(B):
        for a in range(q):
            for c in range(p):
                stage1[b * q + a, b * p + c] = V[b, a, c]
    if kind == "blockdense":
        W = np.zeros((len(U), B * p))
        for i in range(len(U)):
            for k in range(B * q):
                W[i] += U[i, k] * stage1[k]
        return W
    s = U.shape[1]
    W = np.zeros((B * s, B * p))
    for block in range(B):
        for i in range(s):
            for k in range(q):  # block l's k-th input is entry k B + l of stage 1, its i-th output entry i B + l of y
                W[i * B + block] += U[block, i, k] * stage1[k * B + block]
    return W


# ----------------------------------------------------------------------------------------------------------------------
# The command line

def assert_one_sentence(status, stdout, stderr):
    """A mistake of the user's: status 2, at most three lines on standard error, no traceback."""
    assert status == 2, (status, stdout, stderr)
    assert stderr.startswith("error: ") and stderr.count("\n") <= 3 and "Traceback" not in stderr, stderr
    assert not stdout, stdout
    assert stderr.rstrip().endswith((".", "?", ")")), stderr


def assert_stream_sentence(status, err, words):
    """A failing output: one line on standard error and status 2."""
    assert status == 2 and err.count("\n") == 1 and err.startswith("error: ") and words in err, (status, err)


def start(script, *argv, **kw):
    """A script in a process of its own."""
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, argv)], cwd=ROOT, text=True,
                            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kw})


@pytest.fixture
def cli(monkeypatch, capfd):
    """cli("train.py", *arguments) runs the script in this process -> (exit status, stdout, stderr)."""
    def run(script, *argv):
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
        capfd.readouterr()
        status = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as e:
            status = e.code or 0
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
        return (status, *capfd.readouterr())
    return run


@pytest.fixture(scope="session")
def without_torch(tmp_path_factory):
    """without_torch("train.py", *arguments) in a process that cannot import torch -> (status, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("fake")
    (folder / "torch.py").write_text("raise ImportError('torch was imported')")

    def run(script, *argv):
        done = subprocess.run([sys.executable, str(ROOT / script), *map(str, argv)], cwd=folder, capture_output=True,
                              text=True,
                              env={**os.environ, "PYTHONPATH": str(folder)})
        return done.returncode, done.stdout, done.stderr
    return run


# ----------------------------------------------------------------------------------------------------------------------
# Small data, small runs

def write_data(folder, train, val, identity="byte", blob=b"", vocab_size=257):
    """A data folder with the given token ids."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in (("val.bin", val), ("train.bin", train)):
        with prepare.TokenWriter(str(folder / name), vocab_size, identity, "text: test") as f:
            f.write(ids)
    (folder / "tokenizer.bin").write_bytes(blob)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """4001 training and 401 validation bytes."""
    rng = np.random.default_rng(0)
    ids = rng.choice(np.frombuffer(b"etaoin shrdlu\n", np.uint8), 4402)
    return write_data(tmp_path_factory.mktemp("data") / "bytes", ids[:4001], ids[4001:])


def train_run(out, data, *argv):
    """train.main in this process, as `python train.py TINY --out_dir=out --data_dir=data *argv`; returns the folder."""
    import torch
    import train
    torch.manual_seed(0)  # as in a new process: nothing of an earlier run's generator
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        train.main(*config.load([*TINY, f"--out_dir={out}", f"--data_dir={data}", *argv], train.Settings))
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return Path(out)


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """The folder of a finished LowRank run."""
    return train_run(tmp_path_factory.mktemp("out") / "finished", data, *LOWRANK)


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory):
    """The folders of the uninterrupted runs."""
    from runs import RUNS
    folder = tmp_path_factory.mktemp("whole")
    return {name: train_run(folder / name, data, *argv) for name, argv in RUNS.items()}


@pytest.fixture(scope="session")
def whole_plain(whole):
    return whole["plain"]
