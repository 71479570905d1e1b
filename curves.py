"""Training runs side by side:  python bench.py curves out/RUN ...

Reads run folders, names each run by the settings in which they differ, compares it with dense, fits loss against FLOPs.
"""
import dataclasses
import math
import os
import textwrap
from dataclasses import dataclass

import numpy as np

import config
from config import Config, UserError
from model import ffn_params
from report import Panel, Table, commit, draw_curves, grouped
from run import MAY_CHANGE, read_metrics
from schedule import make_plan, step_flops


# ----------------------------------------------------------------------------------------------------------------------
# One run

@dataclass
class Run:
    """A run's folder. `train`, `val`: (steps, losses); axes {name: (steps,)}: the cumulative cost after each step."""
    path: str
    cfg: Config
    steps: int                           # planned
    last: int                            # finished
    train: tuple
    val: tuple
    axes: dict
    method: str = ""                     # what is compared: all settings but size and seed
    baseline: str = ""                   # the dense method that it is compared with
    settings: str = ""                   # name=value of those in which runs differ, but for those in words
    label: str = ""

    @property
    def size(self):
        return f"{self.cfg.n_layer}x{self.cfg.n_embd}"

    @property
    def final(self):
        """Validation loss of a finished run, else None."""
        return float(self.val[1][-1]) if len(self.val[0]) and self.val[0][-1] == self.steps else None

    @property
    def taught(self):
        """Whether its training loss is a mixture with the divergence from a teacher, and not nats of the text."""
        return bool(self.cfg.distill and self.cfg.distill_share)

    def curve(self, kind):
        """(steps, losses) during the run of kind "training" or "validation"; the final validation is on more text."""
        return self.train if kind == "training" else tuple(values[self.val[0] < self.steps] for values in self.val)


def read_run(path) -> Run:
    """UserError if it is not a run's folder or has no metrics yet; a last line still being written is left out."""
    cfg = config.read_saved(path)
    try:
        plan, per_step = make_plan(cfg), cfg.batch_size * cfg.block_size
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    rows = read_metrics(os.path.join(path, "metrics.jsonl"), plan.steps)
    train, val = ((np.array([r["step"] for r in rows if name in r], dtype=int),
                   np.array([r[name] for r in rows if name in r], dtype=float)) for name in ("loss", "val_loss"))
    if not len(train[0]):
        raise UserError(f"{path} has no metrics yet: wait for its first step.")
    rates = np.array([r["tokens_per_s"] for r in rows if "loss" in r])
    seconds = np.cumsum(np.diff(train[0], prepend=0) * per_step / rates)
    every = np.arange(1, plan.steps + 1)
    axes = {"tokens": every * per_step, "training FLOPs": np.cumsum(step_flops(cfg, plan)),
            "seconds": np.interp(every, [0, *train[0]], [0, *seconds])}
    return Run(path, cfg, plan.steps, int(max(train[0][-1], val[0].max(initial=0))), train, val, axes)


# ----------------------------------------------------------------------------------------------------------------------
# What to call it

LONGEST = 60  # characters of settings in a label: longer ones have a number there, and stand once above the table
# Settings not listed as name=value: size, seed, those that name_runs words itself, those that change no result.
WORDED = {"ffn", "rank", "nblocks", "ffn_dim", "max_tokens", "guide"}
NOT_LISTED = MAY_CHANGE - {"dataset", "tokenizer", "data_dir"} | {"n_layer", "n_embd", "seed"} | WORDED


def setting(cfg, name):
    """A setting's value; "auto" for a rate that muon_rates gives: it gives structured FFNs others than dense ones."""
    if cfg.optimizer == "muon" and name in config.RATES:
        rule = config.muon_rates(dataclasses.replace(cfg, lr="auto"))
        if cfg.lr != rule["lr"]:  # the decay's rule goes by a rate that was given
            rule = config.muon_rates(cfg) | {"lr": rule["lr"]}
        return "auto" if getattr(cfg, name) == rule[name] else getattr(cfg, name)
    return getattr(cfg, name)


def differs(name, runs) -> bool:
    return len({str(setting(r.cfg, name)) for r in runs}) > 1


def ffn_words(cfg) -> list:
    """As in ["lowrank 32 %", "fixedstep"]: the share of a dense FFN's parameters, 63 and 32 in the paper's rounding."""
    one = dataclasses.replace(cfg, n_layer=1, n_dense_layers=0)
    percent = 100 * ffn_params(one) / ffn_params(one, "dense")
    nominal = next((n for n in (63, 32) if abs(n - percent) < 5), round(percent))
    return ["dense" if cfg.ffn == "dense" else f"{cfg.ffn} {nominal} %"] + [cfg.guide] * (cfg.guide != "off")


def name_runs(runs) -> dict:
    """Gives every run a method and a label, made of the settings in which runs of one size differ.

    -> {settings: what stands for them}, those too long for a label.
    """
    peers = grouped(runs, lambda r: r.size)
    numbers = {}
    names = [f.name for f in dataclasses.fields(Config)
             if f.name not in NOT_LISTED and any(differs(f.name, group) for group in peers.values())]

    def guide_differs(name, cfg):
        """Among runs with this guide: a setting of the guide that other runs do not use is left out."""
        return any(differs(name, [r for r in group if r.cfg.guide == cfg.guide != "off"]) for group in peers.values())

    for run in runs:
        cfg, alike = run.cfg, peers[run.size]
        left_out = ("guide_",) if cfg.distill else ("guide_", "distill")
        run.settings = " ".join(f"{name}={setting(cfg, name)}" for name in names if not name.startswith(left_out))
        common = [run.settings] * bool(run.settings)
        if len(run.settings) > LONGEST:
            common = [numbers.setdefault(run.settings, f"settings {len(numbers) + 1}")]
        guide = [f"{name}={value}" for name in names if name.startswith("guide_")
                 and (value := getattr(cfg, name)) != getattr(Config, name) and guide_differs(name, cfg)]
        narrow = [f"inner {cfg.ffn_dim / cfg.n_embd:.3g} x width"] * (cfg.ffn_dim < max(r.cfg.ffn_dim for r in alike))
        parts = ffn_words(cfg) + guide + common + narrow
        more = cfg.max_tokens / min(r.cfg.max_tokens for r in alike)
        tokens = [f"{more:.2f} x tokens"] * (more > 1.005)
        one_more = len({r.cfg.max_tokens for r in alike}) == 2  # at equal FLOPs the factor depends on the size
        run.baseline = " ".join(["dense"] + common)
        run.method = " ".join(parts + (["more tokens"] if tokens and one_more else tokens))
        seed = [f"seed {cfg.seed}"] * differs("seed", runs)
        run.label = " ".join([run.size] * (len(peers) > 1) + parts + tokens + seed)
    for same in grouped(runs, lambda r: r.label).values():
        for run in same if len(same) > 1 else []:
            run.label += f" ({run.path})"
    return numbers


# ----------------------------------------------------------------------------------------------------------------------
# Loss against FLOPs, and against dense

def gap_to_dense(run, runs):
    """Final loss minus that of dense runs of the same size and settings; None without one, or unfinished.

    Of several dense runs the one of the same seed counts, else the mean of all.
    """
    alike = [r for r in runs if r.method == run.baseline and r.size == run.size and r.final is not None]
    dense = [r.final for r in alike if r.cfg.seed == run.cfg.seed] or [r.final for r in alike]
    return run.final - sum(dense) / len(dense) if dense and run.final is not None else None


def fit_scaling(runs) -> list:
    """log(final loss) = a + slope log(training FLOPs) of every method with finished runs at several FLOPs.

    -> [{method, runs, slope, std_error, at_1e18 (the loss that the fit gives there)}]
    """
    fits = []
    for method, same in grouped((r for r in runs if r.final is not None), lambda r: r.method).items():
        flops, losses = np.array([(r.axes["training FLOPs"][-1], r.final) for r in same]).T
        if flops.min() < flops.max():
            x, y, error = np.log(flops), np.log(losses), None
            slope, a = np.polyfit(x, y, 1)
            if len(same) > 2:
                error = float(np.polyfit(x, y, 1, cov=True)[1][0, 0] ** 0.5)
            fits.append({"method": method, "runs": len(same), "slope": float(slope), "std_error": error,
                         "at_1e18": math.exp(a + slope * math.log(1e18))})
    return fits


def smoothed(steps, losses, parts=30):
    """Means over about `parts` equal pieces of a run: [(step, loss)]."""
    size = max(1, len(steps) // parts)
    first = len(steps) % size
    return list(zip(*(values[first:].reshape(-1, size).mean(1).tolist() for values in (steps, losses))))


def above_dense(run, runs, kind="training"):
    """[(step, loss minus that of a dense run)], smoothed; [] without a dense run that saw the same batches.

    Such a run has the same size, settings and seed. Of several the one whose length is nearest counts.
    """
    alike = [r for r in runs if r.baseline == run.baseline and (r.size, r.cfg.seed) == (run.size, run.cfg.seed)]
    dense = [r for r in alike if r.cfg.ffn == "dense" and r.cfg.ffn_dim == max(r.cfg.ffn_dim for r in alike)]
    if not dense or run in dense:
        return []
    dense = min(dense, key=lambda r: abs(r.steps - run.steps))
    (mine, losses), (theirs, dense_losses) = run.curve(kind), dense.curve(kind)
    steps, i, j = np.intersect1d(mine, theirs, return_indices=True)
    return smoothed(steps, losses[i] - dense_losses[j])


def distance_panels(runs) -> list:
    """A panel per size: training loss minus dense's on the same batches, mean over seeds; else training loss.

    Validation loss where a run of that size has a teacher.
    """
    panels = []
    for size, group in grouped(runs, lambda r: r.size).items():
        kind = "validation" if any(r.taught for r in group) else "training"
        above = {id(r): above_dense(r, runs, kind) for r in group}
        compared = any(above.values())
        lines = {}
        for method, same in grouped(group, lambda r: r.method).items():
            found = [(r, above[id(r)] if compared else smoothed(*r.curve(kind))) for r in same]
            found = [(r, curve) for r, curve in found if curve]
            if found:
                steps = [step for step, _ in min((curve for _, curve in found), key=lambda curve: curve[-1])]
                losses = np.mean([np.interp(steps, *zip(*curve)) for _, curve in found], axis=0)
                per_step = float(found[0][0].axes["tokens"][0])
                lines[method] = [(step * per_step, float(loss)) for step, loss in zip(steps, losses)]
        of_both = "same batches" if kind == "training" else "same text"
        title = f"{kind} loss minus dense's, {of_both}" if compared else f"{kind} loss"
        level = 0 if compared else None
        panels.append(Panel(f"{size}: {title}, smoothed", "tokens", "nats per token", lines, level=level))
    return panels


# ----------------------------------------------------------------------------------------------------------------------
# bench.py curves

EXPLAINED = """A run per line: steps finished and planned, what they cost, training loss at the last logged step and
validation loss, both in nats per token. to_dense is the final validation loss minus that of the dense run of the
same size and seed. A training loss that includes the divergence from a teacher is left out."""


def compare(paths, settings):
    """Prints final losses and fits of the runs, and draws them."""
    runs = [read_run(path) for path in paths]
    numbers = name_runs(runs)
    print(EXPLAINED)
    for words, number in numbers.items():
        print(textwrap.fill(f"{number}: {words}", 118, subsequent_indent="    ", break_long_words=False,
                            break_on_hyphens=False))
    columns = {"run": max(len(r.label) for r in runs), "step": 8, "steps": 8, "tokens": 8, "flops": 9, "seconds": 9,
               "train_loss": 10, "val_loss": 8, "to_dense": 8}
    formats = {"flops": ".3g", "seconds": ".0f", "train_loss": ".3f", "val_loss": ".3f", "to_dense": "+.3f"}
    table = Table(columns, {"commit": commit()}, settings, formats)
    for r in runs:
        tokens, flops, seconds = (float(spent[r.last - 1]) for spent in r.axes.values())
        table.row(benchmark="curves", run=r.label, path=r.path, size=r.size, seed=r.cfg.seed, method=r.method,
                  settings=r.settings, step=r.last, steps=r.steps, tokens=int(tokens), flops=flops, seconds=seconds,
                  train_loss=None if r.taught else float(r.train[1][-1]),
                  val_loss=float(r.val[1][-1]) if len(r.val[1]) else None, to_dense=gap_to_dense(r, runs))
    for r in runs:
        if r.final is None:
            print(f"{r.path} has finished {r.last} of {r.steps} steps: differences and fits leave it out.")
    fits = fit_scaling(runs)
    if fits:
        print("\nFits of log loss against log FLOPs: slope, its standard error, the loss at 1e18 FLOPs.")
        columns = {"method": max(len(f["method"]) for f in fits), "runs": 4, "slope": 10, "std_error": 10, "at_1e18": 8}
        fitted = Table(columns, table.facts, settings)
        for fit in fits:
            fitted.row(benchmark="scaling", **fit)
    if settings.plot:
        draw_curves(settings.plot, table.rows, distance_panels(runs))
