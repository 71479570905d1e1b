"""Measures efficiency:  python bench.py train config/xl.py --ffn=lowrank --rank=512 --micro_batch_size=16

    train      whole optimiser steps, dense against structured: tokens/s, MFU, memory, where the time goes

Every comparison is timed in one run, on random data; --json=PATH appends one JSON line per row.
"""
import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass

import config
from config import UserError

COMMANDS = ("train",)


@dataclass
class Settings:
    json: str = ""                       # append one JSON line per row to this file
    plot: str = ""                       # write a picture of the table to this PNG
    repeats: int = 20                    # timed repetitions; the median and the middle half's spread are reported
    warmup: int = 5                      # repetitions before, compilation included


def read_settings(argv):
    """Command line -> (command, Config, Settings)."""
    if not argv or argv[0] in ("-h", "--help"):
        config.load(["--help"], Settings, usage=__doc__)
    if argv[0] not in COMMANDS:
        raise UserError(f"{argv[0]} is not a benchmark: choose one of {', '.join(COMMANDS)}.")
    return argv[0], *config.load(argv[1:], Settings, usage=__doc__)


if __name__ == "__main__":
    SETTINGS = config.run(read_settings)  # a wrong setting is told before torch loads

import torch

from model import build, flops_per_token, peak_flops
from train import device_name, make_optimizer, set_up, short, train_step


# ----------------------------------------------------------------------------------------------------------------------
# Timing and reporting

def timed(run, device, settings):
    """Milliseconds of run(): (median, interquartile range) over settings.repeats after warm-up."""
    for _ in range(settings.warmup):
        run()
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(settings.repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]
    else:
        import time
        times = []
        for _ in range(settings.repeats):
            began = time.perf_counter()
            run()
            times.append((time.perf_counter() - began) * 1e3)
    q = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return q[1].item(), (q[2] - q[0]).item()


def header(device) -> dict:
    """What the numbers depend on."""
    facts = {"device": device_name(device), "torch": torch.__version__}
    if device.type == "cuda":
        import triton
        facts["triton"] = triton.__version__
        query = subprocess.run(["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"], capture_output=True, text=True)
        facts["clocks"] = query.stdout.strip().splitlines()[0] if query.returncode == 0 and query.stdout.strip() else "n/a"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    facts["commit"] = commit.stdout.strip() or "n/a"
    return facts


class Table:
    """Rows on screen as they come, and as JSON lines."""

    def __init__(self, columns, facts, settings):
        self.columns, self.facts, self.path, self.rows = columns, facts, settings.json, []
        print("  ".join(f"{k} {v}" for k, v in facts.items()))
        print("  ".join(name.rjust(width) for name, width in columns.items()), flush=True)

    def row(self, **values):
        cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in (values.get(name, "") for name in self.columns))
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, self.columns.values())), flush=True)
        self.rows.append(values)
        if self.path:
            with open(self.path, "a") as f:
                f.write(json.dumps({**values, **self.facts}) + "\n")


def ffn_name(cfg) -> str:
    return cfg.ffn + (f" R={cfg.rank}" if cfg.ffn in ("lowrank", "blockdense") else "") + (f" B={cfg.nblocks}" if cfg.ffn.startswith("block") else "")


# ----------------------------------------------------------------------------------------------------------------------
# train: whole optimiser steps

def bench_train(cfg, settings):
    """The structured model of the command line beside the dense one, and guided if a guide is set; the step is train.py's own."""
    cfg.vocab_size = cfg.vocab_size or 32000
    cfg.batch_size = cfg.micro_batch_size
    place = set_up(cfg)
    columns = {"ffn": 22, "guided": 6, "ms": 8, "spread": 7, "tokens_per_s": 12, "mfu": 7, "gib": 6, "forward_ms": 10, "backward_ms": 11, "optimizer_ms": 12}
    table = Table(columns, header(place.device), settings)
    cases = [("dense", False)] + ([(cfg.ffn, False)] if cfg.ffn != "dense" else []) + ([(cfg.ffn, True)] if cfg.guide != "off" else [])
    for ffn, guided in cases:
        train_row(dataclasses.replace(cfg, ffn=ffn), place, guided, table, settings)


def train_row(cfg, place, guided, table, settings):
    on_cuda = place.device.type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = build(cfg, place.device, cfg.seed)
    if guided:
        for _, module in model.structured_linears():
            module.start_guide()
    optimizer = make_optimizer(cfg, model, place.device)
    if place.compile:
        model.compile_parts()
    batches = torch.randint(cfg.vocab_size, (8, 1, cfg.micro_batch_size, cfg.block_size + 1), device=place.device)
    alpha = torch.full((), 0.5, device=place.device)
    layers = tuple(range(cfg.n_dense_layers, cfg.n_layer)) if guided else ()
    turn = iter(range(10**9))

    def forward():
        batch = batches[next(turn) % len(batches), 0]
        with place.autocast():
            return model(batch[:, :-1], batch[:, 1:], alpha, layers)

    def forward_backward():
        forward().backward()
        optimizer.zero_grad(set_to_none=True)

    def step():
        train_step(model, optimizer, batches[next(turn) % len(batches)], cfg, place, 1e-4, alpha, layers)

    ms, spread = timed(step, place.device, settings)
    gib = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else float("nan")
    forward_ms, both_ms = timed(forward, place.device, settings)[0], timed(forward_backward, place.device, settings)[0]
    rate = cfg.micro_batch_size * cfg.block_size / ms * 1e3
    peak = peak_flops(place.device)
    mfu = 3 * flops_per_token(cfg, "dense" if guided else None) * rate / peak if peak else float("nan")
    table.row(ffn=ffn_name(cfg), guided=guided, ms=ms, spread=spread, tokens_per_s=round(rate), mfu=mfu, gib=gib, forward_ms=forward_ms,
              backward_ms=both_ms - forward_ms, optimizer_ms=ms - both_ms, benchmark="train", config=config.to_dict(cfg))


def main(command, cfg, settings):
    {"train": bench_train}[command](cfg, settings)


if __name__ == "__main__":
    config.run(lambda argv: main(*SETTINGS))
