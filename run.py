"""A run is a folder: config.json, metrics.jsonl, checkpoints and model.pt. It has one owner at a time.

Every file is written beside its place, synced to the disk and renamed, so that it is whole or not there. The chapters:
files, the folder and its owner, metrics.jsonl, the log. checkpoint.py has what ckpt.pt and model.pt hold.
"""
import collections
import contextlib
import dataclasses
import json
import math
import os
import re
import secrets
import statistics
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import torch

import config
from config import Config, UserError, reason, short
from device import DelayedRead, peak_flops


# ----------------------------------------------------------------------------------------------------------------------
# Files

@contextlib.contextmanager
def writing(path):
    """Turns a full disk, or a folder without permission, into one sentence about `path`."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__  # torch.save raises a RuntimeError over the disk's error
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path} ({cause.strerror}): make room there, or choose another folder.") from None


def temp_name(path):
    """Of this process and this call alone: two writers of one file never share a temporary file."""
    return f"{path}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


def sync(path):
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and os.path.isdir(path):
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path, keep=1):
    """Yields the name of a temporary file to write. It replaces `path` when the block ends well, else it is removed.

    The keep - 1 files that had this place before stay, as `older` names them.
    """
    folder, temp = os.path.dirname(path) or ".", temp_name(path)
    try:
        with writing(path):
            os.makedirs(folder, exist_ok=True)
            yield temp
            sync(temp)  # before the rename: after a power loss the new name must not stand for an empty file
            for n in range(keep - 1, 0, -1):
                if os.path.exists(older(path, n - 1)):
                    os.replace(older(path, n - 1), older(path, n))
            os.replace(temp, path)
            sync(folder)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temp)


def older(path, n):
    """The name of the n-th file before the newest: ckpt.pt, ckpt.1.pt, ckpt.2.pt."""
    stem, end = os.path.splitext(path)
    return f"{stem}.{n}{end}" if n else path


def checkpoints(folder) -> list:
    """The paths of ckpt.pt, ckpt.1.pt, ...: those that are there, the newest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in
            sorted((name for name in names if re.fullmatch(r"ckpt(\.[0-9]{1,4})?\.pt", name)),
                   key=lambda name: int(name[5:-3] or 0))]


def save_json(path, value):
    with atomic_write(path) as temp, open(temp, "w") as f:
        json.dump(value, f, indent=1)


# ----------------------------------------------------------------------------------------------------------------------
# The folder: its owner, and what is in it

FILES = ("config.json", "metrics.jsonl", "ckpt.pt", "ckpt.1.pt", "best.pt", "model.pt")
# settings that may change when a run is continued: they do not change the weights, or they only name the data, whose
# checksum is compared
MAY_CHANGE = {"micro_batch_size", "eval_interval", "final_eval_tokens", "log_interval", "save_interval", "out_dir",
              "resume", "wandb", "wandb_project", "device", "compile", "recompute", "kernels", "eval_only", "data_dir",
              "input", "val_input", "dataset", "tokenizer", "teacher_flops", "keep_checkpoints", "max_bad_steps",
              "timeout", "parallel"}


@contextlib.contextmanager
def owned(folder):
    """The folder belongs to this process inside the block; UserError while another process owns it.

    The operating system locks the open file .lock: until the block ends, or the process, however it dies. A block that
    fails before it writes leaves no new folder and no new .lock.
    """
    here = Path(os.path.abspath(folder))
    new = [path for path in (here / ".lock", here, *here.parents) if not os.path.exists(path)]
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
        there = {*os.listdir(folder), ".lock"}
        lock = filelock.FileLock(os.path.join(folder, ".lock"))
        try:
            lock.acquire(timeout=0)
            os.stat(lock.lock_file)  # another process may have removed it, and what is locked is then nobody's
        except (filelock.Timeout, FileNotFoundError):
            raise UserError(f"{folder} is in use, another process is training in it: let it finish, "
                            "or choose another --out_dir.") from None
    try:
        with writing(folder):
            for name in os.listdir(folder):
                if name.endswith(".tmp") and name.startswith(FILES):  # left by a process that was killed while writing
                    os.remove(os.path.join(folder, name))
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in new if there.issuperset(os.listdir(folder)) else ():
                path.rmdir() if path.is_dir() else path.unlink()
        raise
    finally:
        lock.release()


def check_free(folder):
    """UserError while another process owns the folder."""
    if os.path.exists(os.path.join(folder, ".lock")):
        with owned(folder):
            pass


def open_folder(cfg):
    """What cfg.out_dir holds: "new" (no run, or one without a checkpoint), "continue" or "finished".

    UserError where cfg may not go on with it. vocab_size 0 becomes the run's.
    """
    there = {name for name in FILES if os.path.exists(os.path.join(cfg.out_dir, name))}
    if "config.json" not in there:
        if there:
            raise UserError(f"{cfg.out_dir} holds {' and '.join(sorted(there))} but no config.json, so it is neither "
                            "continued nor overwritten: move it away, or choose another --out_dir.")
        return "new"
    if cfg.resume == "off":
        raise UserError(f"{cfg.out_dir} already holds a run: continue it with --resume=auto, "
                        "or choose another --out_dir.")
    old = config.read_saved(cfg.out_dir)
    cfg.vocab_size = cfg.vocab_size or old.vocab_size
    check_unchanged(cfg, old)
    return "finished" if "model.pt" in there else "continue" if checkpoints(cfg.out_dir) else "new"


def changed_settings(a, b) -> list:
    """Names of the settings that differ in two Configs, but for those that may."""
    return [f.name for f in dataclasses.fields(Config)
            if f.name not in MAY_CHANGE and getattr(a, f.name) != getattr(b, f.name)]


def check_unchanged(cfg, old):
    """UserError unless cfg continues a run with the settings `old`."""
    changed = changed_settings(old, cfg)
    if changed == ["max_tokens"]:
        raise UserError(f"the run in {cfg.out_dir} is planned for max_tokens={old.max_tokens} and its learning rates "
                        f"depend on that, so it cannot become one of {cfg.max_tokens}: start a new run from its "
                        f"weights with --init_from={cfg.out_dir} and another --out_dir.")
    if changed:
        name = changed[0]
        raise UserError(f"{cfg.out_dir} holds a run with {name}={getattr(old, name)}, this command says "
                        f"{name}={getattr(cfg, name)}: repeat its settings, or choose another --out_dir.")


def wandb_id(folder, new):
    """The run's name at Weights & Biases: random, and kept in the folder for its continuations."""
    path = os.path.join(folder, "wandb_id.json")
    if new or not os.path.exists(path):
        save_json(path, secrets.token_hex(8))
    return config.read_json(path)


# ----------------------------------------------------------------------------------------------------------------------
# metrics.jsonl

def is_row(row, last) -> bool:
    """Whether a line of metrics.jsonl is what a run of `last` steps writes."""
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 1 <= row["step"] <= last:
        return False
    numbers = {name: value for name, value in row.items() if value is not None}
    return (all(isinstance(v, (int, float)) and (abs(v) < 1e300 or name == "val_ppl") for name, v in numbers.items())
            and ("loss" not in row or {"loss", "tokens_per_s"} <= numbers.keys() and row["tokens_per_s"] > 0))


def read_metrics(path, last):
    """The rows of a metrics.jsonl, up to the `last` step. Odd rows are left out and counted on standard error.

    A log must not keep a run from continuing. A last line without its end was cut off, or is being written.
    """
    with config.reading(path, "give a run's folder"), open(path, encoding="utf-8", errors="replace") as f:
        lines = [line for line in f if line.endswith("\n")]
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line[:1 << 16]))
    kept = [row for row in rows if is_row(row, last)]
    if len(kept) < len(lines):
        print(f"{path}: {len(lines) - len(kept)} of {len(lines)} rows are damaged and are left out.", file=sys.stderr)
    return kept


def kept_rows(folder, step, last):
    """The rows of metrics.jsonl up to the checkpoint's `step`: the later ones are repeated, so that none stands twice.

    The validation after the `last` step is repeated too.
    """
    path = os.path.join(folder, "metrics.jsonl")
    rows = read_metrics(path, last) if step and os.path.exists(path) else []
    return [row for row in rows if row["step"] <= step and not (row["step"] == last and "val_loss" in row)]


def open_metrics(folder, rows):
    """metrics.jsonl for appending, after these rows."""
    path = os.path.join(folder, "metrics.jsonl")
    with atomic_write(path) as temp, open(temp, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return open(path, "a")


WINDOW = 20      # losses that a spike is compared with
STEPS_AHEAD = 4  # steps that the host may be ahead of the device


def is_spike(losses, loss) -> bool:
    """Whether a loss stands far above the WINDOW logged before it: 6 standard deviations, and 0.1 nats."""
    if len(losses) < WINDOW:
        return False
    return loss - statistics.fmean(losses) > max(6 * statistics.pstdev(losses), 0.1)


# ----------------------------------------------------------------------------------------------------------------------
# The log

def perplexity(loss):
    return math.exp(loss) if loss < 700 else math.inf


def clock(seconds) -> str:
    s = int(seconds)
    return f"{s // 3600}h{s % 3600 // 60:02d}m" if s >= 3600 else f"{s // 60}m{s % 60:02d}s"


def start_wandb(cfg, new):
    try:
        import wandb
    except ImportError:
        raise UserError("wandb=True needs the wandb package: pip install wandb, or leave it out "
                        "(metrics.jsonl is always written).") from None
    try:
        return wandb.init(project=cfg.wandb_project, name=os.path.basename(os.path.abspath(cfg.out_dir)),
                          config=config.to_dict(cfg), dir=cfg.out_dir, id=wandb_id(cfg.out_dir, new), resume="allow")
    except Exception as e:
        raise UserError(f"wandb did not start ({reason(e)}): log in, set WANDB_MODE=offline, "
                        "or use --wandb=False.") from e


class Log:
    """metrics.jsonl (one object a line, flushed at once), Weights & Biases if wanted, and progress. Only rank 0 speaks.

    On a terminal progress is one line that is rewritten. In a log file it is a line for each 1 % of the run or every
    five minutes, whichever comes first. Rates leave out the time of validation and saving.
    """

    def __init__(self, cfg, ranks, step, flops, guided=0):
        """step: finished before; flops (steps,): of every step of the run; guided: how many have a guide."""
        self.cfg, self.ranks, self.steps = cfg, ranks, len(flops)
        self.tty, self.next_step, self.next_time = sys.stdout.isatty(), 0, 0.0  # when a log file gets its next line
        self.lost = None                                        # why standard output takes no more
        self.saved = step                                       # the step of the last checkpoint
        # rates: of what came after the mark, which is the last log step
        peak = peak_flops(ranks.device)
        self.peak = peak and peak * ranks.world
        self.flops = np.concatenate(([0.0], np.cumsum(flops)))  # until each step
        self.tokens_per_step = cfg.batch_size * cfg.block_size
        self.began = self.mark = time.monotonic()
        self.first = self.mark_step = step
        self.rate, self.steady = None, np.zeros(3)              # steady: tokens, seconds, FLOPs without the first steps
        # losses and gradient norms
        self.losses = collections.deque(maxlen=WINDOW)
        self.norms, self.bad_steps = DelayedRead(ranks.device, STEPS_AHEAD), 0
        self.guided, self.best, self.validated = guided, math.inf, 0  # best: the lowest validation loss without guide
        if ranks.master:
            # wandb first: it may want a login, and then the folder holds no run and the same command can be given again
            self.wandb = start_wandb(cfg, step == 0) if cfg.wandb else None
            save_json(os.path.join(cfg.out_dir, "config.json"), config.to_dict(cfg))
            rows = kept_rows(cfg.out_dir, step, self.steps)
            self.file = open_metrics(cfg.out_dir, rows)
            self.recall(rows)

    def recall(self, rows):
        """From the rows before a continuation what an uninterrupted run would have in memory."""
        self.losses.extend(row["loss"] for row in rows if "loss" in row)
        validations = [row for row in rows if row.get("val_loss") is not None]
        self.validated = max((row["step"] for row in validations), default=0)
        if os.path.exists(os.path.join(self.cfg.out_dir, "best.pt")):
            self.best = min((row["val_loss"] for row in validations if row["step"] >= self.guided), default=math.inf)

    def write(self, **values):
        with writing(self.file.name):
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()
        if self.wandb:
            self.wandb.log({k: v for k, v in values.items() if v is not None}, step=values["step"])

    def show(self, text, end="\n"):
        """Prints on rank 0. A failure, such as a closed pipe, is kept in `lost`: the run is saved before it ends."""
        try:
            if self.ranks.master:
                print(text, end=end, flush=True)
        except OSError as e:
            self.lost = self.lost or e.strerror

    def say(self, text):
        self.show(f"\r\033[K{text}" if self.tty else text)

    def progress(self, text, due=False):
        """On a terminal one line that is rewritten; in a log file one where it is due, or each five minutes."""
        if self.tty:
            self.show(f"\r\033[K{text}", end="")
        elif due or time.monotonic() >= self.next_time:
            self.show(text)
            self.next_step, self.next_time = self.mark_step + self.steps / 100, time.monotonic() + 300

    def step(self, step, loss, lr, norm, alpha):
        """A log step; loss and norm are tensors and the ranks' losses are averaged, so all ranks call it."""
        self.settle(step)
        loss, norm = (self.ranks.sum_over_ranks(loss.reshape(1)) / self.ranks.world).item(), norm.item()
        if not math.isfinite(norm):
            return  # its row says that it was skipped
        now, tokens = time.monotonic(), (step - self.mark_step) * self.tokens_per_step
        seconds, flops = max(now - self.mark, 1e-9), self.flops[step] - self.flops[self.mark_step]
        if self.mark_step > self.first + self.cfg.log_interval or not self.ranks.compile:  # the first steps compile
            self.steady += tokens, seconds, flops
        self.mark, self.mark_step, self.rate = now, step, tokens / seconds
        if not self.ranks.master:
            return
        mfu = flops / seconds / self.peak if self.peak else None
        spike = {"spike": 1} if is_spike(self.losses, loss) else {}
        self.losses.append(loss)
        self.write(step=step, tokens=step * self.tokens_per_step, loss=loss, lr=lr, grad_norm=norm, alpha=alpha,
                   tokens_per_s=max(round(self.rate, 1), 0.1), mfu=mfu and round(mfu, 4), **spike)
        left = (self.steps - step) * self.tokens_per_step / self.rate
        self.progress(f"step {step}/{self.steps}  loss {loss:.4f}  lr {lr:.2e}  {short(self.rate)} tokens/s"
                      f"{f'  MFU {mfu:.1%}' if mfu else ''}  {clock(left)} left",
                      due=step >= self.next_step or step == self.steps)

    def watch(self, step, norm):
        """After every step: notes a step whose update was skipped, STEPS_AHEAD steps after it."""
        earlier = self.norms(norm)
        if earlier is not None:
            self.note_bad(step - STEPS_AHEAD, earlier)

    def settle(self, step):
        """Waits for all steps up to this one and notes those whose update was skipped, as `watch` does."""
        for ago in reversed(range(len(self.norms.pending))):
            self.note_bad(step - ago, self.norms.next())

    def note_bad(self, step, norm):
        self.bad_steps = 0 if math.isfinite(norm) else self.bad_steps + 1
        if self.bad_steps and self.ranks.master:
            self.write(step=step, skipped=1)
            self.say(f"step {step}/{self.steps}  its loss or gradient is not finite, so its update is skipped")
        if self.bad_steps >= self.cfg.max_bad_steps:
            last = f"{self.losses[-1]:.4f}" if self.losses else "none"
            raise UserError(f"{self.bad_steps} steps in a row, the last of them {step}, have a loss or gradient that "
                            f"is not finite, the last good loss logged is {last}: the checkpoint of step {self.saved} "
                            "is kept; start again with a lower lr or grad_clip, in another --out_dir.")

    def final(self, fraction):
        self.progress(f"final validation {fraction:.0%}")

    def validation(self, step, loss) -> bool:
        """Whether the loss is the lowest of a model without guide. Ends a run that has diverged, before it is saved."""
        if not math.isfinite(loss):
            raise UserError(f"the validation loss is {loss} at step {step}: start again with a lower lr or grad_clip, "
                            "in another --out_dir.")
        if self.ranks.master:
            self.write(step=step, val_loss=loss, val_ppl=perplexity(loss))
            self.say(f"step {step}/{self.steps}  validation loss {loss:.4f}  PPL {perplexity(loss):.2f}")
        best = step >= self.guided and loss < self.best
        self.best = loss if best else self.best
        return best

    @contextlib.contextmanager
    def pause(self):
        """Time inside does not count as training."""
        began = time.monotonic()
        yield
        self.mark += time.monotonic() - began

    def end_card(self, val_loss, val_tokens, phases, saving):
        """phases {name: training FLOPs}; saving: Saver.report's line."""
        tokens, seconds, flops = self.steady.tolist()
        rate = tokens / seconds if seconds else self.rate
        mfu = flops / seconds / self.peak if self.peak and seconds else None
        on_cuda = self.ranks.device.type == "cuda"
        memory = f"{torch.cuda.max_memory_allocated(self.ranks.device) / 2**30:.1f} GiB" if on_cuda else "n/a"
        spent = ", ".join(f"{name} {flops:.2e}" for name, flops in phases.items() if flops)
        self.say(f"done     validation loss {val_loss:.4f}, PPL {perplexity(val_loss):.2f} on "
                 f"{short(val_tokens)} tokens\n"
                 f"speed    {short(rate) if rate else 'n/a'} tokens/s, MFU {f'{mfu:.1%}' if mfu else 'n/a'}, "
                 f"peak memory {memory}, {clock(time.monotonic() - self.began)} in all\n"
                 f"{saving}FLOPs    {spent}\nnext     python sample.py {self.cfg.out_dir}")
