"""Measures efficiency:  python bench.py train config/xl.py --ffn=lowrank --rank=512 --micro_batch_size=16

    train      whole optimiser steps, dense against structured: tokens/s, MFU, memory, where the time goes
    decode     generation: dense, structured, merged and auto, eager and as a graph, over batch sizes; --max_batch=True: the most tokens/s
    crossover  factors against dense equivalents over the number of tokens: what decode=auto chooses from, and how well

Every comparison is timed in one run, on random data; --json=PATH appends one JSON line per row.
"""
import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import config
from config import UserError

COMMANDS = ("train", "decode", "crossover")


@dataclass
class Settings:
    json: str = ""                       # append one JSON line per row to this file
    plot: str = ""                       # write a picture of the table to this PNG
    repeats: int = 20                    # timed repetitions; the median and the middle half's spread are reported
    warmup: int = 5                      # repetitions before, compilation included
    batches: str = "1,16,256"            # decode: sequences at a time
    kinds: str = "dense,structured,merged,auto"  # decode: forms of the FFN
    launches: str = "eager,graph"        # decode: how a step is launched
    prompt_tokens: int = 1               # decode: length of the prompts; 1 is no prompt
    new_tokens: int = 256                # decode: tokens to generate
    max_batch: bool = False              # decode: double the batch until it brings nothing or nothing more fits


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

from decode import TOKENS, Choice, Decoder, Either, Row, largest_batch, measure, merge, padded, ready, step_weights, token_bytes
from model import build, flops_per_token, peak_flops
from sample import Settings as Sampling
from train import device_name, make_optimizer, pick_device, set_up, short, train_step


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


# ----------------------------------------------------------------------------------------------------------------------
# decode: sample.py's own loop, on random weights

def copy_rate(device) -> float:
    """GB/s, read and written, of a large copy."""
    source = torch.randn(2**(28 if device.type == "cuda" else 24), device=device)
    target = torch.empty_like(source)
    ms, _ = timed(lambda: target.copy_(source), device, Settings(repeats=10, warmup=2))
    return 2 * source.numel() * 4 / ms / 1e6


@torch.no_grad()
def random_model(cfg, device):
    """Weights of no meaning, but none zero; faster than the true initialisation of large factors."""
    model = build(cfg, device)
    torch.manual_seed(cfg.seed)
    for name, p in model.named_parameters():
        p.fill_(1.0) if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")) else p.normal_(std=0.02)
    return model


def generation(decoder, cfg, batch, settings):
    """One run of the loop -> (seconds to the first tokens, seconds per further token)."""
    draws = torch.Generator().manual_seed(cfg.seed)
    prompts = torch.randint(cfg.vocab_size, (batch, settings.prompt_tokens), generator=draws).tolist()
    if decoder.key.is_cuda:
        torch.cuda.synchronize()
    marks = [time.perf_counter()]
    for _ in decoder.run([Row(prompt) for prompt in prompts]):
        marks.append(time.perf_counter())
    return marks[1] - marks[0], (marks[-1] - marks[1]) / max(settings.new_tokens - 1, 1)


def decode_row(model, cfg, kind, launch, batch, ceiling, table, settings):
    """Times one case; returns its tokens/s."""
    gc.collect()
    if model.head.weight.is_cuda:
        torch.cuda.empty_cache()
    length = settings.prompt_tokens + settings.new_tokens
    decoder = Decoder(model, Sampling(temperature=0.0, max_new_tokens=settings.new_tokens), batch, length, graphs=launch == "graph")
    generation(decoder, cfg, batch, settings)
    runs = [generation(decoder, cfg, batch, settings) for _ in range(min(settings.repeats, 3))]
    first, each = (statistics.median(column) for column in zip(*runs))
    weights = step_weights(model, batch, launch)
    kv = batch * token_bytes(cfg, model.head.weight.dtype) * (settings.prompt_tokens + settings.new_tokens / 2)
    rate = batch * settings.new_tokens / (first + each * (settings.new_tokens - 1))
    gbs = (weights + kv) / each / 1e9
    table.row(ffn=ffn_name(model.cfg), kind=kind, launch=launch, batch=batch, per_user=rate / batch, tokens_per_s=round(rate), first_ms=first * 1e3,
              ms=each * 1e3, gb_s=gbs, share=gbs / ceiling, weights_mb=weights / 1e6, kv_mb=kv / 1e6, benchmark="decode",
              prompt_tokens=settings.prompt_tokens, new_tokens=settings.new_tokens, config=config.to_dict(cfg))
    return rate


def bench_decode(cfg, settings):
    """ms: per token after the first; share: of the copy rate, of the bytes that a step cannot avoid, weights and half the final cache."""
    cfg.vocab_size = cfg.vocab_size or 32000
    length = settings.prompt_tokens + settings.new_tokens
    if length > cfg.block_size or settings.prompt_tokens < 1 or settings.new_tokens < 2:
        raise UserError(f"prompt_tokens={settings.prompt_tokens} and new_tokens={settings.new_tokens} must be at least 1 and 2 "
                        f"and together fit into block_size={cfg.block_size}.")
    device = pick_device(cfg.device)
    dtype = torch.float32 if cfg.dtype == "float32" or cfg.dtype == "auto" and device.type != "cuda" else torch.bfloat16
    ceiling = copy_rate(device)
    columns = {"ffn": 18, "kind": 10, "launch": 6, "batch": 6, "per_user": 8, "tokens_per_s": 12, "first_ms": 8, "ms": 8, "gb_s": 7, "share": 7,
               "weights_mb": 10, "kv_mb": 8}
    table = Table(columns, {**header(device), "copy": f"{ceiling:.0f} GB/s", "dtype": str(dtype).removeprefix("torch.")}, settings)
    launches = [launch for launch in settings.launches.split(",") if launch == "eager" or device.type == "cuda"]
    for kind in settings.kinds.split(",") if cfg.ffn != "dense" else ["dense"]:
        model = random_model(dataclasses.replace(cfg, ffn="dense") if kind == "dense" else cfg, device)
        ready(model, "structured" if kind == "dense" else kind, dtype)
        for launch in launches[-1:] if settings.max_batch else launches:
            fits = largest_batch(cfg, padded(length, cfg.block_size), device, dtype)
            if settings.max_batch:
                most_tokens(lambda batch: decode_row(model, cfg, kind, launch, batch, ceiling, table, settings), fits, device)
                continue
            for batch in map(int, settings.batches.split(",")):
                decode_row(model, cfg, kind, launch, batch, ceiling, table, settings)
        del model


def most_tokens(rate_of, fits, device):
    """Doubles the batch while that brings 1 % or more, then says what was best of what fits."""
    batch, rates = min(256 if device.type == "cuda" else 1, fits), {}
    while batch <= fits and (len(rates) < 2 or rates[batch // 2] > 1.01 * rates[batch // 4]):
        rates[batch] = rate_of(batch)
        batch *= 2
    if batch > fits and fits not in rates:
        rates[fits] = rate_of(fits)
    best = max(rates, key=rates.get)
    print(f"most: {rates[best]:.0f} tokens/s at batch {best}; the largest batch that fits is {fits}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# crossover: what decode=auto chooses from

def bench_crossover(cfg, settings):
    """Milliseconds of one linear; behind: how much longer auto's choice takes than the better one, both timed anew."""
    if cfg.ffn == "dense":
        raise UserError("crossover compares a structured FFN with its dense equivalent: give ffn=lowrank, blockshuffle or blockdense.")
    cfg.vocab_size, device = 1024, pick_device(cfg.device)
    dtype = torch.float32 if cfg.dtype == "float32" or cfg.dtype == "auto" and device.type != "cuda" else torch.bfloat16
    model = random_model(cfg, device).to(dtype).requires_grad_(False)
    pairs = [Either(linear, merge(linear), None) for _, linear in model.structured_linears()]
    facts, began = header(device), time.perf_counter()
    choice = Choice(measure(pairs))
    facts["measured_in"] = f"{time.perf_counter() - began:.1f} s"
    again = measure(pairs, sorted({*TOKENS, *(3 * t // 2 for t in TOKENS[1:-1])}))
    table = Table({"linear": 60, "launch": 6, "tokens": 6, "factors_ms": 10, "merged_ms": 10, "speedup": 8, "auto": 8, "behind": 8}, facts, settings)
    for mode, rows in again.items():
        choice.mode = mode
        for shape, row in rows.items():
            for tokens, (factors, merged) in row.items():
                chosen = choice.merged(shape, int(tokens))
                table.row(linear=shape, launch=mode, tokens=int(tokens), factors_ms=factors, merged_ms=merged, speedup=merged / factors,
                          auto="merged" if chosen else "factors", behind=(merged if chosen else factors) / min(factors, merged) - 1, benchmark="crossover")
    if settings.plot:
        plot_crossover(table.rows, f"{ffn_name(cfg)}, {facts['device']}", settings.plot)


def plot_crossover(rows, title, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    modes = list(dict.fromkeys(row["launch"] for row in rows))
    figure, axes = plt.subplots(1, len(modes), figsize=(6 * len(modes), 4), squeeze=False, sharey=True)
    for ax, mode in zip(axes[0], modes):
        for linear in dict.fromkeys(row["linear"] for row in rows):
            points = [(row["tokens"], row["speedup"]) for row in rows if (row["launch"], row["linear"]) == (mode, linear)]
            ax.plot(*zip(*points), marker="o", label=linear.split(", V")[0])
        ax.axhline(1, color="grey", lw=1)
        ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time of the dense equivalent / time of the factors", title=f"{title}, {mode}")
        ax.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(command, cfg, settings):
    {"train": bench_train, "decode": bench_decode, "crossover": bench_crossover}[command](cfg, settings)


if __name__ == "__main__":
    config.run(lambda argv: main(*SETTINGS))
