"""What the tests of runs share: settings, what a folder holds, a run that is stopped, two runs that must be equal."""
import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import torch

import config
import prepare
import train
from conftest import LOWRANK, TINY, train_run
from device import Ranks

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, torch.float32, False)
# 4 steps guided, 4 plain, 4 replayed
GUIDED = ["--ffn=blockshuffle", "--nblocks=4", "--guide=fixedflop", "--guide_ratio=0.5", "--guide_skip=True"]
RUNS = {"plain": [],
        "always": [*LOWRANK, "--guide=fixedflop", "--guide_ratio=0.5", "--smear=True", "--logit_softcap=15"],
        "guided": [*GUIDED, "--dropout=0.1", "--eval_interval=3"],
        # small rates: at large ones such a small model makes differences of rounding grow
        "muon": [*GUIDED, "--optimizer=muon", "--lr=0.002", "--embed_lr=0.09", "--head_lr=0.0025", "--vector_lr=0.0003",
                 "--skip_lr=0.03", "--weight_decay=auto", "--schedule=linear", "--warmup_steps=2",
                 "--qk_norm=1.2", "--post_norm=0.3", "--embed_skip=True", "--value_embeddings=True"]}


def configure(*argv):
    cfg, = config.load([str(a) for a in argv])
    return dataclasses.replace(cfg, vocab_size=cfg.vocab_size or 257)


def tiny(*argv):
    return configure(*TINY, *argv)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def copy_data(data, folder):
    return Path(shutil.copytree(data, folder))


def set_token(folder, name, at, value):
    with open(folder / name, "r+b") as f:
        f.seek(prepare.HEADER + 2 * at)
        f.write(value.to_bytes(2, "little"))
    return folder


def weights(out, name="model.pt"):
    return torch.load(out / name, weights_only=True)["model"]


def stopped(out, data, after, monkeypatch, *argv, how=signal.SIGTERM):
    """train_run that is sent a signal, or raises, in its `after`-th step."""
    calls, real = [], train.train_step

    def step(*args):
        calls.append(args)
        if len(calls) == after:
            if how is RuntimeError:
                raise how("the machine failed")
            os.kill(os.getpid(), how)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", step)
        train_run(out, data, *argv)


def assert_same_run(out, other):
    """Weights, optimizer and every logged number are equal to the bit."""
    for name in ("model.pt", "ckpt.pt"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (out, other))
        assert a["step"] == b["step"] and a["model"].keys() == b["model"].keys()
        assert a.get("val_loss") == b.get("val_loss")
        assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
        for k, state in a.get("optimizer", {}).items():
            assert all(torch.equal(torch.as_tensor(state[s]), torch.as_tensor(b["optimizer"][k][s])) for s in state), k
    a, b = ([{k: v for k, v in row.items() if k != "tokens_per_s"} for row in metrics(folder)]
            for folder in (out, other))
    assert a == b
