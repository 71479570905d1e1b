"""Training runs side by side: what their folders say, what to call them, how loss falls with FLOPs; and bench.py's pictures.

python bench.py curves out/RUN ... shows it.
"""
import contextlib
import dataclasses
import math
import os
from dataclasses import dataclass

import numpy as np

import config
from config import Config, UserError, short
from model import ffn_params
from run import MAY_CHANGE, read_json, read_metrics
from train import make_plan, step_flops


# ----------------------------------------------------------------------------------------------------------------------
# One run

@dataclass
class Run:
    """A run's folder. `train` and `val` are (steps, losses); axes {name: (steps,)} what was spent up to and with each step."""
    path: str
    cfg: Config
    steps: int                           # planned
    last: int                            # finished
    train: tuple
    val: tuple
    axes: dict
    method: str = ""                     # what is compared: all settings but size and seed
    baseline: str = ""                   # the dense method that it is compared with
    label: str = ""

    @property
    def size(self):
        return f"{self.cfg.n_layer}x{self.cfg.n_embd}"

    @property
    def final(self):
        """Validation loss of a finished run, else None."""
        return float(self.val[1][-1]) if len(self.val[0]) and self.val[0][-1] == self.steps else None


def read_run(path) -> Run:
    """UserError if it is not a run's folder or has no metrics yet; a last line still being written is left out."""
    settings = os.path.join(path, "config.json")
    cfg = config.from_dict(read_json(settings), settings)
    plan, per_step = make_plan(cfg), cfg.batch_size * cfg.block_size
    rows = read_metrics(os.path.join(path, "metrics.jsonl"), plan.steps)
    train, val = ((np.array([r["step"] for r in rows if name in r], dtype=int), np.array([r[name] for r in rows if name in r], dtype=float))
                  for name in ("loss", "val_loss"))
    if not len(train[0]):
        raise UserError(f"{path} has no metrics yet: wait for its first step.")
    seconds = np.cumsum(np.diff(train[0], prepend=0) * per_step / np.array([r["tokens_per_s"] for r in rows if "loss" in r]))
    every = np.arange(1, plan.steps + 1)
    axes = {"tokens": every * per_step, "training FLOPs": np.cumsum(step_flops(cfg, plan)), "seconds": np.interp(every, [0, *train[0]], [0, *seconds])}
    return Run(path, cfg, plan.steps, int(max(train[0][-1], val[0].max(initial=0))), train, val, axes)


# ----------------------------------------------------------------------------------------------------------------------
# What to call it

# not part of a name as they stand: size, seed, what name_runs words itself, and what changes no result
NOT_NAMED = MAY_CHANGE - {"dataset", "tokenizer", "data_dir"} | {"n_layer", "n_embd", "seed", "ffn", "rank", "nblocks", "ffn_dim", "max_tokens", "guide"}


def share_of_dense(cfg) -> float:
    """Parameters of a structured FFN / of the dense one."""
    one = dataclasses.replace(cfg, n_layer=1, n_dense_layers=0)
    return ffn_params(one) / ffn_params(one, "dense")


def name_runs(runs):
    """Gives every run a method and a label, made of the settings in which runs of one size differ."""
    def differs(name, among):
        return len({str(getattr(r.cfg, name)) for r in among}) > 1

    def guided_alike(cfg, among):
        return [r for r in among if r.cfg.guide == cfg.guide != "off"]

    peers = {r.size: [p for p in runs if p.size == r.size] for r in runs}
    names = [f.name for f in dataclasses.fields(Config) if f.name not in NOT_NAMED and any(differs(f.name, group) for group in peers.values())]
    for run in runs:
        cfg = run.cfg
        percent = 100 * share_of_dense(cfg)
        nominal = next((n for n in (63, 32) if abs(n - percent) < 5), round(percent))           # the paper's names of the shares
        more = cfg.max_tokens / min(r.cfg.max_tokens for r in peers[run.size])
        common = [f"{name}={getattr(cfg, name)}" for name in names if not name.startswith("guide_")]
        parts = [cfg.ffn if cfg.ffn == "dense" else f"{cfg.ffn} {nominal} %"] + ([cfg.guide] if cfg.guide != "off" else [])
        parts += [f"{name}={getattr(cfg, name)}" for name in names if name.startswith("guide_") and getattr(cfg, name) != getattr(Config, name)
                  and any(differs(name, guided_alike(cfg, group)) for group in peers.values())] + common
        parts += [f"inner {cfg.ffn_dim / cfg.n_embd:.3g} x width"] if cfg.ffn_dim < max(r.cfg.ffn_dim for r in peers[run.size]) else []
        tokens = [f"{more:.2f} x tokens"] if more > 1.005 else []
        one_more = len({r.cfg.max_tokens for r in peers[run.size]}) == 2  # at equal FLOPs the factor depends on the size
        run.baseline = " ".join(["dense"] + common)
        run.method = " ".join(parts + (["more tokens"] if tokens and one_more else tokens))
        run.label = " ".join(([run.size] if len(peers) > 1 else []) + parts + tokens + ([f"seed {cfg.seed}"] if differs("seed", runs) else []))
    for label in {r.label for r in runs}:
        same = [r for r in runs if r.label == label]
        for run in same if len(same) > 1 else []:
            run.label += f" ({run.path})"


# How it is drawn, in every picture alike: the FFN is the line and its points, what is done with it the colour. SPARE is for methods that differ elsewhere.
LINES = {"dense": ("-", "o"), "lowrank": ("-", "o"), "blockshuffle": ("--", "s"), "blockdense": (":", "^")}
COLOURS = {"dense": "black", "narrow": "gray", "off": "tab:blue", "wide": "tab:cyan", "more tokens": "tab:purple", "replay": "tab:red",
           "fixedstep": "tab:orange", "fixedstep skip": "gold", "fixedflop": "tab:green", "fixedflop skip": "yellowgreen"}
SPARE = ("tab:brown", "tab:pink", "navy", "olive", "crimson", "teal", "orchid", "peru")


def looks(runs) -> dict:
    """{method or label: how to draw it}; of one method a larger size is a thicker line."""
    chosen, result = {}, {}
    least = min(r.cfg.max_tokens for r in runs)
    sizes = sorted({(r.cfg.n_embd, r.cfg.n_layer) for r in runs})
    for run in runs:
        cfg = run.cfg
        if cfg.guide != "off":
            kind = cfg.guide + " skip" * (cfg.guide_skip and cfg.guide != "replay")
        elif cfg.max_tokens > 1.005 * least:
            kind = "more tokens"
        elif cfg.ffn == "dense":
            kind = "narrow" if "inner" in run.method else "dense"
        else:
            kind = "wide" if share_of_dense(cfg) > 0.5 else "off"
        line, marker = LINES[cfg.ffn]
        if run.method not in chosen:
            taken = {colour for colour, other in chosen.values() if other == line}
            chosen[run.method] = next((colour for colour in (COLOURS[kind], *SPARE) if colour not in taken), COLOURS[kind]), line
        result[run.method] = {"color": chosen[run.method][0], "linestyle": line, "marker": marker}
        result[run.label] = {**result[run.method], "linewidth": 1.5 + sizes.index((cfg.n_embd, cfg.n_layer))}
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Loss against FLOPs

def least_squares(x, y):
    """Fits y = a + b x -> (a, b, standard error of b, None from two points)."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    n, dx = len(x), x - x.mean()
    b = (dx * y).sum() / (dx**2).sum()
    a = y.mean() - b * x.mean()
    error = math.sqrt(((y - a - b * x)**2).sum() / (n - 2) / (dx**2).sum()) if n > 2 else None
    return float(a), float(b), error


def gap_to_dense(run, runs):
    """Final loss above that of dense runs of the same size and settings: those of the same seed, or else the mean of all; None without one or unfinished."""
    alike = [r for r in runs if r.method == run.baseline and r.size == run.size and r.final is not None]
    dense = [r.final for r in alike if r.cfg.seed == run.cfg.seed] or [r.final for r in alike]
    return run.final - sum(dense) / len(dense) if dense and run.final is not None else None


def fit_scaling(runs) -> list:
    """log(final loss) = a + slope log(training FLOPs) of every method with finished runs at several FLOPs.

    -> [{method, runs, slope, std_error, at_1e18 (the loss that the fit gives there), points, fitted}]
    """
    methods, fits = {}, []
    for r in runs:
        if r.final is not None:
            methods.setdefault(r.method, []).append((float(r.axes["training FLOPs"][-1]), r.final))
    for method, points in methods.items():
        flops, losses = map(np.array, zip(*sorted(points)))
        if flops[0] < flops[-1]:
            a, slope, error = least_squares(np.log(flops), np.log(losses))
            fits.append({"method": method, "runs": len(points), "slope": slope, "std_error": error, "at_1e18": math.exp(a + slope * math.log(1e18)),
                         "points": sorted(points), "fitted": list(zip(flops.tolist(), (np.exp(a) * flops**slope).tolist()))})
    return fits


def smoothed(steps, losses, parts=60):
    """Means over about `parts` equal pieces of a run: [(step, loss)]."""
    size = max(1, len(steps) // parts)
    first = len(steps) % size
    return list(zip(steps[first:].reshape(-1, size).mean(1).tolist(), losses[first:].reshape(-1, size).mean(1).tolist()))


def above_dense(run, runs):
    """[(step, training loss above that of the dense run)] with a dense run of the same size, settings and seed, which saw the same batches; of
    several with that whose length is nearest."""
    alike = [r for r in runs if r.baseline == run.baseline and (r.size, r.cfg.seed) == (run.size, run.cfg.seed)]
    dense = [r for r in alike if r.cfg.ffn == "dense" and r.cfg.ffn_dim == max(r.cfg.ffn_dim for r in alike)]
    if not dense or run in dense:
        return []
    dense = min(dense, key=lambda r: abs(r.steps - run.steps))
    steps, i, j = np.intersect1d(run.train[0], dense.train[0], return_indices=True)
    return smoothed(steps, run.train[1][i] - dense.train[1][j], 30)


def panels(runs, fits) -> dict:
    """What `draw` draws: losses against three costs, the distance to dense and, with fits, final losses against FLOPs over sizes."""
    result = {}
    for axis in runs[0].axes:
        lines = result.setdefault(axis, (axis, {}))[1]
        for r in runs:
            spent = r.axes[axis]
            start = 0.5 * spent[r.last - 1]  # what came before would leave the differences at the end no room
            for name, curve in ((r.label, zip(*r.val)), (f"_{r.label}", smoothed(*r.train))):
                points = [(float(np.interp(step, np.arange(1, len(spent) + 1), spent)), loss) for step, loss in curve]
                points = [point for point in points if point[0] >= start]
                lines.update({name: points} if points else {})
    distances = {r.label: [(step * r.axes["tokens"][0], gap) for step, gap in above_dense(r, runs)] for r in runs}
    if any(distances.values()):
        result["training loss above dense, same batches"] = "tokens", {f"-{name}": points for name, points in distances.items() if points}, "linear"
    if fits:
        lines = result.setdefault("whole runs: final validation loss", ("training FLOPs", {}))[1]
        for fit in fits:
            lines[f"*{slope(fit)}"], lines[f"_{slope(fit)}"] = fit["points"], fit["fitted"]
    return result


def slope(fit) -> str:
    return f"{fit['method']}: slope {fit['slope']:.4f}" + (f" ± {fit['std_error']:.4f}" if fit["std_error"] is not None else "")


def draw_runs(path, runs, fits):
    how = looks(runs)
    how.update({slope(fit): how[fit["method"]] for fit in fits})
    alike = [one[0] for one in (sorted({r.size for r in runs}), sorted({f"seed {r.cfg.seed}" for r in runs})) if len(one) == 1]
    shown = list(panels(runs, fits).items())
    rows = {i: dict(shown[i:i + 2]) for i in range(0, len(shown), 2)}
    draw(path, ", ".join(alike) + ": " * bool(alike) + "validation loss, training loss faint", "loss, nats per token", rows, looks=how, width=6.2, height=4.8)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures

@contextlib.contextmanager
def picture(path, title, panels, width=4.2, height=3.4, **shared):
    """panels: {row: {panel title: what it shows}}. Yields [(axes, title, what it shows)], then writes the picture with one legend below them."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    n_rows, n_columns = len(panels), max(map(len, panels.values()))
    figure, axes = pyplot.subplots(n_rows, n_columns, figsize=(max(6.5, width * n_columns), height * n_rows + 1), squeeze=False, layout="constrained", **shared)
    figure.suptitle(title)
    for row_axes, row in zip(axes, panels.values()):
        for ax in row_axes[len(row):]:
            ax.remove()
    yield [(ax, *panel) for row_axes, row in zip(axes, panels.values()) for ax, panel in zip(row_axes, row.items())]
    handles = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    if handles:
        columns = int(figure.get_figwidth() / (0.6 + 0.085 * max(map(len, handles))))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=max(1, min(len(handles), columns)), frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"picture  {path}")


def draw(path, title, ylabel, panels, sharey=False, looks={}, **size):
    """panels: {row: {panel title: (xlabel, {line: [(x, y), ...]})}} -> a picture with logarithmic axes; with a third entry "linear", linear ones.

    A line "_NAME" is drawn faint in NAME's colour, "-NAME" without points, "*NAME" as points alone. looks: {NAME: matplotlib's keywords}.
    """
    styles = {"_": {"alpha": 0.25, "linewidth": 0.8, "marker": ""}, "-": {"marker": ""}, "*": {"linestyle": "none"}, "": {"markersize": 3.5}}
    names = list(dict.fromkeys(line.lstrip("_-*") for row in panels.values() for _, lines, *_ in row.values() for line in lines))
    with picture(path, title, panels, sharey=sharey, **size) as axes:
        for ax, panel, (xlabel, lines, *scale) in axes:
            for line, points in lines.items():
                name = line.lstrip("_-*")
                i, paired = names.index(name), line[0] == "_" and {name, "*" + name} & lines.keys()
                style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3], "marker": "o", **looks.get(name, {}), **styles[line[:-len(name)]]}
                ax.plot(*zip(*sorted(points)), label=None if paired else name, **style)
            kind = scale[0] if scale else "log"
            ax.set(title=panel, xlabel=xlabel, xscale=kind, yscale=kind, ylabel=ylabel if ax.get_subplotspec().is_first_col() else "")
        for ax, *_ in axes:
            number_axes(ax)


def draw_points(path, title, xlabel, ylabel, points, **size):
    """points: [(panel, line, x, y)] of one row of panels."""
    panels = {}
    for panel, line, x, y in points:
        panels.setdefault(panel, (xlabel, {}))[1].setdefault(line, []).append((x, y))
    draw(path, title, ylabel, {"": panels}, **size)


def draw_speedups(path, title, rows, panel_of, line_of):
    """Speed over dense of the structured rows against what varies; panel_of(row) -> (its row, its title)."""
    panels = {}
    for r in rows:
        if r["ffn"] != "dense" and r["speedup"]:
            across, name = panel_of(r)
            fixed = f"{short(r['tokens'])} tokens" if r["sweep"] == "width" else f"width {r['width']}"
            lines = panels.setdefault(across, {}).setdefault(f"{name}, {fixed}", (r["sweep"], {}))[1]
            lines.setdefault(line_of(r), []).append((r[r["sweep"]], r["speedup"]))
    if panels and all(len(points) == 1 for row in panels.values() for _, lines in row.values() for points in lines.values()):
        draw_bars(path, title, "times as fast as dense", panels)
    elif panels:
        pairs = [(line, *line.split(" ", 1)) for row in panels.values() for _, lines in row.values() for line in lines]
        colours, styles = (list(dict.fromkeys(pair[i] for pair in pairs)) for i in (1, 2))
        looks = {line: {"color": f"C{colours.index(kind)}", "linestyle": ("-", "--", ":")[styles.index(size) % 3]} for line, kind, size in pairs}
        draw(path, title, "times as fast as dense", panels, sharey=True, looks=looks)
    else:
        print(f"no picture: {path} would show speed over dense, and the cases are not dense and a structure.")


def draw_bars(path, title, xlabel, panels):
    """panels as draw_speedups has them, with a single size each."""
    with picture(path, title, panels, height=2.6, sharex=True) as axes:
        for ax, panel, (varies, lines) in axes:
            sizes, values = zip(*(points[0] for points in lines.values()))
            ax.bar_label(ax.barh(list(lines), values, color="C0"), [f"{v:.2f}" for v in values], padding=3)
            ax.set(title=panel, xlabel=f"{xlabel}, {varies} {sizes[0]}")
            ax.axvline(1, color="black", linewidth=0.8)
            ax.margins(x=0.15)
            ax.invert_yaxis()


def draw_split(path, title, rows):
    """Stacked bars of where a step's time goes."""
    names = [r["ffn"] + ", guided" * r["guided"] for r in rows]
    left = np.zeros(len(rows))
    with picture(path, title, {"": {"": rows}}, width=9) as ((ax, *_),):
        for part in ("forward", "backward", "optimizer"):
            width = np.array([r[f"{part}_ms"] for r in rows])
            bars = ax.barh(names, width, left=left, label=part)
            left += width
        ax.bar_label(bars, [f"{short(r['tokens_per_s'])} tokens/s" for r in rows], padding=4)
        ax.set(xlabel="milliseconds per step", xlim=(0, 1.25 * left.max()))
        ax.invert_yaxis()


def number_axes(ax):
    """Plain numbers on logarithmic axes: x at its values where they are few and whole, y as densely as its range allows."""
    from matplotlib.ticker import LogLocator, MaxNLocator
    ax.grid(alpha=0.3)
    if ax.get_xscale() == "linear":
        return ax.xaxis.set_major_formatter(lambda x, _: short(x))
    ax.minorticks_off()
    xs = sorted({float(x) for line in ax.lines for x in line.get_xdata()})
    if len(xs) <= 13 and xs[-1] < 1e5 and all(x.is_integer() for x in xs):
        ax.set_xticks(xs, [short(x) if x >= 10_000 else f"{x:.0f}" for x in xs], rotation=45 if len(xs) > 4 else 0)
    else:
        low, high = ax.get_xlim()
        ax.xaxis.set_major_locator(MaxNLocator(5) if high < 8 * low else LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(lambda x, _: short(x) if x < 1e12 else f"{x:.2g}")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(MaxNLocator(6) if high < 3 * low else LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 30 * low else (1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda y, _: short(y))
