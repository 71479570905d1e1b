"""How bench.py measures and reports: timing, the conditions of a measurement, tables of rows, pictures of rows."""
import contextlib
import gc
import json
import math
import os
import statistics
import subprocess
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn

from config import UserError, read_text, reason, short
from device import device_name, out_of_memory
from run import writing


# ----------------------------------------------------------------------------------------------------------------------
# Timing

def laps(run, device, settings):
    """Milliseconds (repeats, parts) of run(mark), which calls mark() between its parts. Warm-up runs first."""
    on_cuda, marks = device.type == "cuda", []

    def mark():
        if on_cuda:
            marks.append(torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True)))
        else:
            marks.append(time.perf_counter())

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


def timed(run, device, settings):
    """Milliseconds of run(): (median, interquartile range) after warm-up."""
    low, median, high = np.quantile(laps(lambda mark: run(), device, settings), (0.25, 0.5, 0.75))
    return float(median), float(high - low)


def copies(make, tokens, n_in, n_out, ranks) -> list:
    """[(module, x, dy)] to run in turn, with weights in the matmuls' precision.

    Together they exceed twice the L2 cache, so that none finds its data there.
    """
    def one():
        with torch.device("meta"):
            module = make()
        module.to_empty(device=ranks.device).to(ranks.dtype)
        for p in module.parameters():
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        x, dy = (torch.randn(tokens, n, device=ranks.device, dtype=ranks.dtype) for n in (n_in, n_out))
        return module, x.requires_grad_(), dy

    first = one()
    size = sum(t.numel() * t.element_size() for t in (*first[0].parameters(), first[1]))
    cache = torch.cuda.get_device_properties(ranks.device).L2_cache_size if ranks.device.type == "cuda" else 0
    return [first] + [one() for _ in range(max(2, math.ceil(2 * cache / size)) - 1)]


def fresh(device):
    """Drops what the last case left: compiled code, cached memory and the peak of memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ----------------------------------------------------------------------------------------------------------------------
# Conditions of a measurement

def clocks(device, fields) -> str:
    """nvidia-smi's values of these fields, or n/a."""
    card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # an index would count cards that are hidden here
    command = ["nvidia-smi", f"--id={card}", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        query = subprocess.run(command, capture_output=True, text=True, check=True)
        return query.stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "n/a"


def header(device) -> dict:
    """Card, versions and commit, which go into every row."""
    facts = {"device": device_name(device), "torch": torch.__version__}
    if device.type == "cuda":
        import triton
        facts.update(triton=triton.__version__, clocks=clocks(device, "clocks.sm,clocks.max.sm,power.limit"))
    return {**facts, "commit": commit()}


def commit() -> str:
    """The commit of this code; n/a in a copy without its history, or without git."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    except OSError:
        return "n/a"
    return run.stdout.strip() or "n/a"


def conditions(ranks, settings, rates=False) -> dict:
    """The header with precision and compilation; with `rates` also the card's rates of a large matmul and of a copy."""
    facts = {**header(ranks.device), "dtype": str(ranks.dtype)[6:], "compile": ranks.compile}
    if rates:
        n = 8192 if ranks.device.type == "cuda" else 1024
        a, b = (torch.randn(n, n, device=ranks.device, dtype=ranks.dtype) for _ in range(2))
        matmul = 2 * n**3 / timed(lambda: a @ b, ranks.device, settings)[0] / 1e9
        copy = copy_rate(ranks.device, settings) / 1e3
        facts.update(matmul_tflops=float(f"{matmul:.4g}"), copy_tb_per_s=float(f"{copy:.4g}"))
    return facts


def copy_rate(device, settings) -> float:
    """GB/s of a large copy, bytes read and bytes written counted."""
    source = torch.randn(2**(28 if device.type == "cuda" else 22), device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / timed(lambda: target.copy_(source), device, settings)[0] / 1e6


# ----------------------------------------------------------------------------------------------------------------------
# Tables

class Table:
    """Prints rows as they come and appends them to --json as JSON lines.

    columns {name: width}, formats {name: format of its cells}.
    """

    def __init__(self, columns, facts, settings, formats=None):
        self.columns, self.facts, self.path, self.rows, self.formats = columns, facts, settings.json, [], formats or {}
        print("  ".join(f"{k} {v}" for k, v in facts.items()))
        print("  ".join(name.rjust(width) for name, width in columns.items()), flush=True)

    def cell(self, name, value) -> str:
        if value is None:
            return "-"
        if name in self.formats or isinstance(value, float):
            return format(value, self.formats.get(name, ".4g"))
        return short(value) if type(value) is int and value >= 10**6 else str(value)

    def row(self, note="", **values):
        """A row with a note, which stands instead of numbers, is neither drawn nor compared with."""
        cells = map(str.rjust, (self.cell(name, values.get(name)) for name in self.columns), self.columns.values())
        print("  ".join([*cells, note]).rstrip(), flush=True)
        values.update(self.facts, **{"note": note} if note else {})
        if not note:
            self.rows.append(values)
        if self.path:
            with writing(self.path), open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(values) + "\n")

    def speedup(self, ms, ffn, **alike):
        """The milliseconds of dense in an earlier row with the values `alike`, over ms; None without such a row."""
        dense = (r["ms"] for r in self.rows if r["ffn"] == "dense" and alike.items() <= r.items())
        return ratio(next(dense, ms if ffn == "dense" else None), ms)


def ratio(a, b):
    return a / b if a and b else None


@contextlib.contextmanager
def within_memory(table, **names):
    """Inside, running out of memory becomes a row with a note, and the next case runs."""
    try:
        yield
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        table.row("out of memory", **names)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures: drawing

@dataclass
class Panel:
    """One pair of axes. lines {label: [(x, y), ...]}; several lines of one point each become bars.

    means: points alone, small, with their mean large. level: a horizontal line, such as dense's ratio 1.
    """
    title: str
    xlabel: str
    ylabel: str
    lines: dict
    log_x: bool = False
    means: bool = False
    level: float | None = None


@contextlib.contextmanager
def picture(path, title, n_rows, n_columns):
    """Yields matplotlib's axes (n_rows, n_columns), then writes the picture with one legend below them."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    size = max(7, 4.8 * n_columns), 3.7 * n_rows + 1.4
    figure, axes = pyplot.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(title)
    yield axes
    handles = {}
    for ax in figure.axes:
        handles.update(zip(*reversed(ax.get_legend_handles_labels())))
    if handles:
        fit = int(figure.get_figwidth() / (0.6 + 0.085 * max(map(len, handles))))
        columns = max(1, min(len(handles), fit))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    with writing(path):
        figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"picture  {path}")


def draw(path, title, panels, looks):
    """panels: rows of Panels. looks {label: matplotlib's keywords}."""
    panels = [[panel for panel in row if panel.lines] for row in panels]
    panels = [row for row in panels if row]
    if not panels:
        print(f"no picture: {path} would show structures against dense, and the rows are not dense and a structure.")
        return
    with picture(path, title, len(panels), max(map(len, panels))) as axes:
        for row_axes, row in zip(axes, panels):
            for ax, panel in zip(row_axes, row):
                single_points = len(panel.lines) > 1 and all(len(points) == 1 for points in panel.lines.values())
                (draw_bars if single_points and not panel.means else draw_lines)(ax, panel, looks)
                ax.set_title(panel.title, fontsize="medium")
            for ax in row_axes[len(row):]:
                ax.remove()


def draw_lines(ax, panel, looks):
    for label, points in panel.lines.items():
        look = {"marker": "o", "markersize": 4, **looks.get(label, {})}
        x, y = zip(*sorted(points))
        if panel.means:
            mean = [statistics.mean(x)], [statistics.mean(y)]
            ax.plot(*mean, label=label, **{**look, "linestyle": "none", "markersize": 10, "alpha": 0.5})
            ax.plot(x, y, **{**look, "linestyle": "none"})
        else:
            ax.plot(x, y, label=label, **look)
    if panel.level is not None:
        ax.axhline(panel.level, color="black", linewidth=0.8)
    ax.set(xlabel=panel.xlabel, ylabel=panel.ylabel, xscale="log" if panel.log_x else "linear")
    ax.grid(alpha=0.3)
    xs = sorted({x for points in panel.lines.values() for x, _ in points})
    if panel.log_x and len(xs) <= 16:
        ax.minorticks_off()
        ax.set_xticks(xs, [short(x) if x >= 10_000 else f"{x:.0f}" for x in xs], rotation=45 if len(xs) > 8 else 0)
    else:
        ax.locator_params(axis="x", **({"numticks": 6} if panel.log_x else {"nbins": 5}))
        ax.xaxis.set_major_formatter(lambda x, _: short(x) if x < 1e12 else f"{x:.3g}".replace("e+", "e"))


def draw_bars(ax, panel, looks):
    values = [points[0][1] for points in panel.lines.values()]
    colours = [looks.get(label, {}).get("color", "tab:blue") for label in panel.lines]
    ax.bar_label(ax.barh(list(panel.lines), values, color=colours), [f"{v:.2f}" for v in values], padding=3)
    ax.set(xlabel=f"{panel.ylabel}, {panel.xlabel} {next(iter(panel.lines.values()))[0][0]}")
    if panel.level is not None:
        ax.axvline(panel.level, color="black", linewidth=0.8)
    ax.margins(x=0.15)
    ax.invert_yaxis()


# ----------------------------------------------------------------------------------------------------------------------
# Pictures: what each benchmark's rows show

COLOURS = {"dense": "black", "lowrank": "tab:blue", "blockshuffle": "tab:orange", "blockdense": "tab:green"}
LAUNCHED = {"graph": "step launched as one CUDA graph", "eager": "kernels launched from Python"}


def grouped(rows, key) -> dict:
    groups = {}
    for r in rows:
        groups.setdefault(key(r), []).append(r)
    return groups


def measured_on(rows) -> str:
    compiled = {True: ", compiled", False: ", eager", None: ""}
    return "; ".join(dict.fromkeys(f"{r['device']}, {r['dtype']}{compiled[r.get('compile')]}" for r in rows))


def panels_of(rows, title_of, line_of, x, y, **panel) -> list:
    """A Panel for each title_of(row), in it a line for each line_of(row): row[y] over row[x]."""
    panels = []
    for title, part in grouped(rows, title_of).items():
        lines = {line: [(r[x], r[y]) for r in group] for line, group in grouped(part, line_of).items()}
        panels.append(Panel(title, lines=lines, **panel))
    return panels


def speedup_panels(rows, title_of, line_of, x, xlabel="") -> list:
    """Panels of speed over dense."""
    rows = [r for r in rows if r["ffn"] != "dense" and r["speedup"]]
    return panels_of(rows, title_of, line_of, x, "speedup", xlabel=xlabel or x, ylabel="times as fast as dense",
                     log_x=True, level=1)


def draw_kernel(path, rows):
    rows = [r for r in rows if r["pass"] != "forward"]
    panels = [speedup_panels(part, lambda r: f"{r['linear']}, {r['ffn'].split()[0]}",
                             lambda r: f"{r['by']} {r['ffn'].partition(' ')[2]}", part[0]["sweep"])
              for part in grouped(rows, lambda r: r["linear"]).values()]
    styles = {"einsum": ":", "bmm": "--", "ours": "-"}
    looks = {line: {"linestyle": styles[line.split()[0]], "color": "tab:gray" if line.endswith("63 %") else "tab:blue"}
             for row in panels for panel in row for line in panel.lines}
    draw(path, f"One linear, forward + backward: {measured_on(rows)}", panels, looks)


def draw_ffn(path, rows):
    def fixed(r):
        return f"{short(r['tokens'])} tokens" if r["sweep"] == "width" else f"width {r['width']}"

    panels = [speedup_panels(part, lambda r: f"{r['pass']}, {fixed(r)}", lambda r: r["ffn"], part[0]["sweep"])
              for part in grouped(rows, fixed).values()]
    looks = {r["ffn"]: {"color": COLOURS[r["ffn"].split()[0]], "linestyle": "--" if r["ffn"].endswith("63 %") else "-"}
             for r in rows}
    draw(path, f"FFN, {rows[0]['act']}: {measured_on(rows)}", panels, looks)


def draw_train(path, rows):
    """Stacked bars of where a step's time goes."""
    names, left = [r["ffn"] + ", guided" * r["guided"] for r in rows], np.zeros(len(rows))
    cfg = rows[0]["config"]
    title = f"Training step, {cfg['n_layer']} layers x {cfg['n_embd']}, batch {cfg['micro_batch_size']}"
    with picture(path, f"{title}\n{measured_on(rows)}", 1, 1) as ((ax,),):
        for part in ("forward", "backward", "optimizer"):
            width = np.array([r[f"{part}_ms"] for r in rows])
            bars = ax.barh(range(len(rows)), width, left=left, label=part, tick_label=names)
            left += width
        ax.bar_label(bars, [f"{short(r['tokens_per_s'])} tokens/s" for r in rows], padding=4)
        ax.set(xlabel="milliseconds per step", xlim=(0, 1.3 * left.max()))
        ax.invert_yaxis()


def draw_prefill(path, rows):
    panels = speedup_panels(rows, lambda r: f"batch {r['batch']}", lambda r: r["ffn"], "prompt", "tokens in the prompt")
    looks = {r["ffn"]: {"color": COLOURS[r["ffn"].split()[0]]} for r in rows}
    draw(path, f"Prefill: {measured_on(rows)}", [panels], looks)


def draw_decode(path, rows):
    """Tokens/s as a ratio to dense at the same batch, of the same code and model size."""
    def setting(r):
        sizes = ("n_layer", "n_embd", "n_head", "n_kv_head", "attn_dim", "ffn_dim", "vocab_size")
        return r["commit"], r["launch"], r["batch"], *(r["config"][name] for name in sizes)

    groups = grouped([r for r in rows if r["kind"] == "dense"], setting)
    dense = {key: statistics.mean(r["tokens_per_s"] for r in group) for key, group in groups.items()}
    rows = [{**r, "line": f"{r['ffn']}, {r['kind'].replace('structured', 'factors')}",
             "ratio": r["tokens_per_s"] / dense[setting(r)]}
            for r in rows if r["kind"] != "dense" and setting(r) in dense]
    panels = panels_of(rows, lambda r: LAUNCHED[r["launch"]], lambda r: r["line"], "batch", "ratio", xlabel="batch",
                       ylabel="tokens/s, ratio to dense", log_x=True, level=1)
    looks = {r["line"]: {"color": COLOURS[r["ffn"].split()[0]],
                         "linestyle": {"structured": "-", "auto": "--"}.get(r["kind"], ":")} for r in rows}
    draw(path, f"Decoding: {measured_on(rows)}" if rows else "", [panels], looks)


def draw_crossover(path, rows):
    def shape(r):
        return r["linear"].split(", V")[0]

    panels = panels_of(rows, lambda r: LAUNCHED[r["launch"]], shape, "tokens", "speedup", xlabel="tokens in a call",
                       ylabel="time of dense equivalent / time of factors", log_x=True, level=1)
    looks = {}
    for r in rows:
        ffn, n_in, _, n_out = shape(r).split()
        looks[shape(r)] = {"color": COLOURS[ffn], "linestyle": "-" if int(n_in) < int(n_out) else "--", "marker": ""}
    draw(path, f"Factors against dense equivalents: {rows[0]['device']}", [panels], looks)


def final_panels(rows) -> list:
    """Final validation loss against training FLOPs: a panel per size, a small point per seed, their mean large."""
    rows = [r for r in rows if r["val_loss"] is not None and r["step"] == r["steps"]]
    rows.sort(key=lambda r: (list(COLOURS).index(r["method"].split()[0]), r["method"]))
    return panels_of(rows, lambda r: f"{r['size']}: final validation loss", lambda r: r["method"], "flops", "val_loss",
                     xlabel="training FLOPs", ylabel="nats per token", means=True)


# The marker is the structure, the colour how it is trained; SPARE is for methods that differ in other settings.
MARKERS = {"dense": "o", "lowrank": "o", "blockshuffle": "s", "blockdense": "^"}
TRAINED = (("fixedstep guide_skip", "gold"), ("fixedstep", "tab:orange"), ("fixedflop guide_skip", "yellowgreen"),
           ("fixedflop", "tab:green"), ("replay", "tab:red"), ("more tokens", "tab:purple"), ("63 %", "tab:cyan"),
           ("inner", "tab:gray"), ("32 %", "tab:blue"))
LINES = {"blockshuffle": "--", "blockdense": ":"}
SPARE = ("tab:brown", "tab:pink", "navy", "olive", "crimson", "teal", "orchid", "peru")


def method_looks(methods) -> dict:
    """{method: how to draw it}, the same in every picture."""
    looks = {}
    for method in sorted(methods):
        structure = method.split()[0]
        usual = next((colour for words, colour in TRAINED if words in method), COLOURS["dense"])
        taken = {look["color"] for other, look in looks.items() if other.split()[0] == structure}
        colour = next((c for c in (usual, *SPARE) if c not in taken), usual)
        looks[method] = {"color": colour, "marker": MARKERS[structure], "linestyle": LINES.get(structure, "-")}
    return looks


def draw_curves(path, rows, below=()):
    """`below`: a second row of Panels."""
    panels = [final_panels(rows), list(below)]
    methods = {label for row in panels for panel in row for label in panel.lines}
    draw(path, "Training runs, layers x width (small points: seeds, large: their mean)", panels, method_looks(methods))


DRAW = {"kernel": draw_kernel, "ffn": draw_ffn, "train": draw_train, "prefill": draw_prefill, "decode": draw_decode,
        "crossover": draw_crossover, "curves": draw_curves}


def read_rows(path) -> list:
    """The rows that --json wrote to a file."""
    try:
        return [json.loads(line) for line in read_text(path, 1 << 24).splitlines() if line.strip()]
    except (ValueError, RecursionError):
        raise UserError(f"{path} does not hold rows as --json writes them: one JSON object per line.") from None


def draw_rows(paths, settings):
    """Draws the rows of one benchmark that --json wrote, as the settings select them; empty widths and tokens: all."""
    kinds, launches, widths, tokens = settings.kinds, settings.launches, settings.widths, settings.tokens
    rows = [row for path in paths for row in read_rows(path) if isinstance(row, dict) and "note" not in row]
    rows = [r for r in rows if r.get("kind", kinds[0]) in ("dense", *kinds) and r.get("launch", launches[0]) in launches
            and (not widths or r.get("width", r.get("config", {}).get("n_embd")) in widths)
            and (not tokens or r.get("tokens") in tokens)]
    found = sorted({str(r.get("benchmark")) for r in rows} - {"scaling"})
    if len(found) != 1 or found[0] not in DRAW:
        raise UserError(f"{', '.join(paths)} has rows of {' and '.join(found) or 'no benchmark'} with these settings: "
                        f"give rows of one of {', '.join(DRAW)}.")
    try:
        DRAW[found[0]](settings.plot, [r for r in rows if r["benchmark"] == found[0]])
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{', '.join(paths)} has rows of {found[0]} that cannot be drawn ({reason(e)}): "
                        "give rows as --json writes them.") from e
