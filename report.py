"""How bench.py times, and how it tells: laps, CUDA graphs, what the numbers depend on, tables of rows."""
import contextlib
import gc
import json
import os
import subprocess
import time

import numpy as np
import torch

from device import device_name, out_of_memory


# ----------------------------------------------------------------------------------------------------------------------
# Timing

def laps(run, device, settings):
    """Milliseconds (repeats, parts) of run(mark), which calls mark() between its parts, after warm-up."""
    on_cuda, marks = device.type == "cuda", []

    def mark():
        marks.append(torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True)) if on_cuda else time.perf_counter())

    for _ in range(settings.warmup or (5 if on_cuda else 1)):
        run(mark)
    marks.clear()
    repeats = settings.repeats or (20 if on_cuda else 5)
    mark()
    for _ in range(repeats):
        run(mark)
        mark()
    if on_cuda:
        torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:])] if on_cuda else np.diff(marks) * 1e3
    return np.reshape(times, (repeats, -1))


def middle(times):
    """(median, interquartile range)"""
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
    return float(median), float(high - low)


def timed(run, device, settings):
    """Milliseconds of run(): (median, interquartile range) after warm-up."""
    return middle(laps(lambda mark: run(), device, settings))


def graphed(run):
    """run() recorded as a CUDA graph: replayed, it has no gaps between its kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def fresh(device):
    """Forgets the last case: its compilations, its memory and its peak."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ----------------------------------------------------------------------------------------------------------------------
# Reporting

def clocks(device, fields) -> str:
    """What nvidia-smi says about them, or n/a."""
    card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # numbers count what CUDA_VISIBLE_DEVICES hides
    try:
        query = subprocess.run(["nvidia-smi", f"--id={card}", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, check=True)
        return query.stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "n/a"


def header(device) -> dict:
    """What the numbers depend on."""
    facts = {"device": device_name(device), "torch": torch.__version__}
    if device.type == "cuda":
        import triton
        facts.update(triton=triton.__version__, clocks=clocks(device, "clocks.sm,clocks.max.sm,power.limit"))
    return {**facts, "commit": commit()}


def commit() -> str:
    here = os.path.dirname(os.path.abspath(__file__))
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return run.stdout.strip() or "n/a"


def conditions(ranks, settings, rates=False) -> dict:
    """The header with precision and compilation; with `rates` the card's own, measured now: of a large matmul and of a copy (read + write)."""
    facts = {**header(ranks.device), "dtype": str(ranks.dtype)[6:], "compile": ranks.compile}
    if rates:
        n = 8192 if ranks.device.type == "cuda" else 1024
        a, b = (torch.randn(n, n, device=ranks.device, dtype=ranks.dtype) for _ in range(2))
        matmul = 2 * n**3 / timed(lambda: a @ b, ranks.device, settings)[0] / 1e9
        facts.update(matmul_tflops=float(f"{matmul:.4g}"), copy_tb_per_s=float(f"{copy_rate(ranks.device, settings) / 1e3:.4g}"))
    return facts


def copy_rate(device, settings) -> float:
    """GB/s, read and written, of a large copy."""
    source = torch.randn(2**(28 if device.type == "cuda" else 22), device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / timed(lambda: target.copy_(source), device, settings)[0] / 1e6


class Table:
    """Rows on screen as they come, and as JSON lines. columns = {name: width}."""

    def __init__(self, columns, facts, settings):
        self.columns, self.facts, self.path, self.rows = columns, facts, settings.json, []
        print("  ".join(f"{k} {v}" for k, v in facts.items()))
        print("  ".join(name.rjust(width) for name, width in columns.items()), flush=True)

    def card(self):
        """Where and how it was measured, for a picture's title."""
        return f"{self.facts['device']}, {self.facts['dtype']}, {'compiled' if self.facts['compile'] else 'eager'}"

    def row(self, note="", **values):
        """One with a note, which stands where numbers should, is neither drawn nor compared with."""
        cells = ("-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in (values.get(name) for name in self.columns))
        print("  ".join([*map(str.rjust, cells, self.columns.values()), note]).rstrip(), flush=True)
        if note:
            values["note"] = note
        else:
            self.rows.append(values)
        if self.path:
            with open(self.path, "a") as f:
                f.write(json.dumps({**values, **self.facts}) + "\n")


def ratio(a, b):
    return a / b if a and b else None


@contextlib.contextmanager
def within_memory(table, **names):
    """A case that the memory does not hold is a row that says so, and the next one runs."""
    try:
        yield
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        table.row("out of memory", **names)
