"""ckpt.pt, best.pt and model.pt: what they hold, reading them with care, and the thread that writes them.

They hold tensors and plain types only. A file may be damaged, or a stranger's: it is checked before memory is taken.
"""
import contextlib
import math
import os
import sys
import threading
import time
import zipfile

import torch

import config
from config import UserError, short
from device import full, local
from run import atomic_write, checkpoints, changed_settings, sync, writing


# ----------------------------------------------------------------------------------------------------------------------
# ckpt.pt (everything that an exact continuation needs), best.pt and model.pt (results)

ENTRIES = {"model.pt": {"config": dict, "model": dict, "tokenizer": dict, "step": int},
           "ckpt.pt": {"config": dict, "model": dict, "step": int, "data": int, "optimizer": dict}}


def save_beside(obj, path, keep=1):
    """torch.save that appears whole or not at all; `keep` is that of atomic_write."""
    with atomic_write(path, keep) as temp, open(temp, "wb") as f:
        torch.save(obj, f)


def entries(cfg, weights, step, tokenizer, **more) -> dict:
    """What ckpt.pt and model.pt have in common, the tokenizer's bytes too, so that either samples without its data.

    `more` in ckpt.pt: data and teacher, the checksums of the training tokens and of the teacher's weights, and
    optimizer {parameter's name: its state}; in model.pt and best.pt: val_loss.
    """
    return {"config": config.to_dict(cfg), "model": weights, "step": step,
            "tokenizer": tokenizer_entry(tokenizer), **more}


def tokenizer_entry(tokenizer) -> dict:
    """What tokenizer.saved_tokenizer reads. torch.frombuffer takes no empty buffer."""
    blob = torch.frombuffer(bytearray(tokenizer.blob) or bytearray(1), dtype=torch.uint8)
    return {"identity": tokenizer.identity, "blob": blob}


def read_newest(folder):
    """The entries of the newest whole checkpoint, which becomes ckpt.pt; one line says so where it was not.

    A damaged one is moved to ckpt.damaged.pt: a later save would count it among those to keep. UserError where none is
    whole, and then nothing is moved.
    """
    paths, damage = checkpoints(folder), []
    for path in paths:
        try:
            saved = read_checkpoint(path, "ckpt.pt")
            break
        except UserError as e:
            damage.append(str(e))
    else:
        raise UserError(damage[0])
    newest = os.path.join(folder, "ckpt.pt")
    if path != newest:
        what = f"{damage[0].rstrip('.')}, it is kept as ckpt.damaged.pt" if damage else f"{newest} is missing"
        print(f"{what}: continuing with {os.path.basename(path)} of step {saved['step']}, now ckpt.pt.",
              file=sys.stderr)
        with writing(newest):
            if damage:
                os.replace(paths[0], os.path.join(folder, "ckpt.damaged.pt"))
            os.replace(path, newest)
            sync(folder)
    return saved


def check_archive(path):
    """Bytes of tensors in the archive. ValueError unless it is one of torch.save: parts as they are, and undamaged.

    torch looks at no checksum, takes the bytes of a compressed part for weights, and unpacks a data.pkl of any size.
    A byte of that may become 64 in memory.
    """
    size = os.path.getsize(path)
    if not size:
        raise ValueError("it is empty")
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("its parts are compressed, which torch.save does not do")
        if sum(part.file_size for part in parts) > size:
            raise ValueError("its parts are larger than the file")
        if any(part.file_size > (1 << 20) + size // 32 for part in parts if part.filename.endswith(".pkl")):
            raise ValueError("its table of contents is too large for what it holds")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of its part {damaged} does not fit")
        return sum(part.file_size for part in parts if "/data/" in part.filename)


def check_tensors(saved, size):
    """ValueError unless names are text and tensors plain ones of `size` bytes in all.

    torch maps what a tensor claims, beyond the end of its part too. With a stride of 0, or with the memory of another
    one, a tensor claims more than its memory: twice as much is left, for a head that is the embedding.
    """
    states, tokenizer = saved.get("optimizer", {}).values(), saved.get("tokenizer")
    if not all(isinstance(state, dict) and len(state) <= 3 for state in states):
        raise ValueError("its optimizer does not hold a few tensors for each parameter")
    named = [*saved["model"].items(), *(item for state in states for item in state.items())]
    if tokenizer is not None:
        named.append(("blob", blob := tokenizer.get("blob")))
        if not isinstance(tokenizer.get("identity"), str) or getattr(blob, "dtype", None) is not torch.uint8:
            raise ValueError("its tokenizer lacks identity or blob")
    for name, t in named:
        if not isinstance(name, str) or type(t) is not torch.Tensor or t.layout is not torch.strided \
                or t.device.type != "cpu" or t.requires_grad or t.is_neg():
            raise ValueError(f"{config.shown(name)} is not the name of a plain tensor")
    parts = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for _, t in named)}
    if sum(parts.values()) > size or sum(t.nbytes for _, t in named) > 2 * size:
        raise ValueError("its tensors are larger than the file")
    if not isinstance(saved.get("val_loss"), float | None) or not isinstance(saved.get("teacher"), int | None) \
            or saved["step"] < 0:
        raise ValueError("its teacher, step or val_loss is not a number that a run writes")


def read_checkpoint(path, name):
    """The dict in a model.pt or ckpt.pt, as `name` says, on the CPU, mapped rather than read.

    UserError if it is missing, damaged or another thing. Whether weights fit their config, check_weights checks.
    """
    if not os.path.isfile(path):
        what = "is not a file" if os.path.exists(path) else "does not exist"
        raise UserError(f"{path} {what}: give a run folder such as out/quickstart, or a model.pt, "
                        "which export.py makes of a Hugging Face folder.")
    try:
        size = check_archive(path)
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        lacking = [entry for entry, kind in ENTRIES[name].items()
                   if not isinstance(saved, dict) or not isinstance(saved.get(entry), kind)
                   or isinstance(saved[entry], bool)]
        if lacking:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        check_tensors(saved, size)
    except Exception as e:  # whatever the libraries raise on a damaged file
        reason = e if type(e) is ValueError else type(e).__name__
        raise UserError(f"{path} is damaged or not the {name} of a run ({reason}): give another one.") from e
    return saved


def check_moments(saved, optimizer, model, path):
    """UserError unless the optimizer's state fits the parameters: a wrong shape would corrupt memory in a fused step.

    A guide that no step has drawn yet has no state.
    """
    for name, p in model.named_parameters():
        state = saved["optimizer"].get(name)
        if state is None and name.endswith(".W"):
            continue
        expected = set(optimizer.state.get(p, ("step", "exp_avg", "exp_avg_sq"))) - {"master"}
        if not isinstance(state, dict) or set(state) != expected:
            raise UserError(f"{path} is damaged: the optimizer's state of {name} is not {', '.join(sorted(expected))}.")
        for k, t in state.items():
            fits = t.shape == (() if k == "step" else p.shape) and t.dtype is torch.float32
            low, high = (x.item() for x in t.aminmax()) if fits else (math.nan, math.nan)
            least, most = 0 if k in ("step", "exp_avg_sq") else -math.inf, saved["step"] if k == "step" else math.inf
            if not least <= low <= high <= most or math.inf in (-low, high):
                raise UserError(f"{path} is damaged: {k} of {name} is not what the optimizer keeps after step "
                                f"{saved['step']}.")


def check_continues(cfg, saved, steps, identity, path):
    """UserError unless a checkpoint is one of the run with the settings cfg, its steps and tokenizer."""
    theirs = config.from_dict(saved["config"], path)
    for name in changed_settings(theirs, cfg):
        raise UserError(f"{path} is of another run: it has {name}={getattr(theirs, name)}, config.json "
                        f"{name}={getattr(cfg, name)}; restore the one that belongs there.")
    there = saved["tokenizer"]["identity"] if "tokenizer" in saved else identity  # older versions kept none
    if saved["step"] > steps or there != identity:
        raise UserError(f"{path} is of another run: step {saved['step']} of {steps}, tokenizer {there}, here "
                        f"{identity}; restore the one that belongs there.")


def read_model(path):
    """(path, entries) of a model.pt, given as such or by its folder; of ckpt.pt where the run there is not finished.

    The entries are those of a model.pt: an unfinished run's guides are left out.
    """
    if os.path.isdir(path):
        folder, path = path, os.path.join(path, "model.pt")
        if not os.path.exists(path):
            path = next(iter(checkpoints(folder)), path)
    saved = read_checkpoint(path, "model.pt")
    if "optimizer" in saved:
        guides = [name for name in saved["model"] if name.endswith(".W")]
        print(f"{path}: saved before the run was finished, these are its weights after step {saved['step']}"
              f"{', without the guides' if guides else ''}.", file=sys.stderr)
        for name in guides:
            del saved["model"][name]
    kept = {name: saved[name] for name in ("config", "model", "tokenizer", "step", "val_loss") if name in saved}
    return path, {"val_loss": None, **kept}


def data_checksum(folder):
    """The checksum of the training data of the run in the folder, None where its checkpoints are gone."""
    newest = checkpoints(folder)[:1]
    return read_checkpoint(newest[0], "ckpt.pt")["data"] if newest else None


# ----------------------------------------------------------------------------------------------------------------------
# Saving beside training

def tensors_in(tree) -> list:
    if isinstance(tree, dict):
        return [t for branch in tree.values() for t in tensors_in(branch)]
    return [tree] if torch.is_tensor(tree) else []


def identity(t):
    """A key that is equal for two names of one tensor. Not its address: all empty shares of split tensors have one."""
    mine = local(t)
    return mine.untyped_storage()._cdata, mine.storage_offset(), t.shape, t.dtype


def distinct(tree) -> list:
    """The tensors in nested dicts, one that stands in several places once."""
    return list({identity(t): t for t in tensors_in(tree)}.values())


def size_of(tree) -> int:
    """Bytes of the tensors in nested dicts."""
    return sum(t.numel() * t.element_size() for t in distinct(tree))


def mapped(tree, f, found):
    """Nested dicts with f of their tensors, called once for one that stands in several places; found: its results."""
    if isinstance(tree, dict):
        return {key: mapped(value, f, found) for key, value in tree.items()}
    if not torch.is_tensor(tree):
        return tree
    key = identity(tree)
    if key not in found:
        found[key] = f(tree)
    return found[key]


def peak_of(tensors):
    """The largest absolute value of the floating-point tensors with dimensions, those that are split left out.

    0-d, NaN where one is; None without any.
    """
    tensors = [t for t in tensors if t.is_floating_point() and t.dim() and local(t) is t]
    norms = []
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        norms += [n.float() for n in torch._foreach_norm([t for t in tensors if t.dtype is dtype], math.inf)]
    return torch.stack(norms).amax() if norms else None


class Saver:
    """Writes checkpoints in a thread while training goes on, one at a time, from a copy in host memory.

    On CUDA the copy runs beside the next steps, on a stream of its own and into pinned memory. Where the device has
    room the tensors are copied there first: 8.9 GB take 4 ms there and 160 ms to the host, a step of xl. The next
    update of the weights waits on the device for that first copy (`before_update`), a step that is a CUDA graph waits
    as a whole, the host waits for nothing. An error of the thread, as of a full disk, is raised by the next `wait` or
    `raise_error`.
    """

    def __init__(self, device, master=True):
        """master: this rank writes; of tensors that are split the others only give their shares."""
        self.master, self.on_cuda = master, device.type == "cuda"
        self.stream = torch.cuda.Stream() if self.on_cuda else None
        self.thread = self.error = None
        self.taken = self.copied = None  # events: weights may change; all is in host memory
        self.room = 0       # bytes of tensors that the device has held twice
        self.buffers = {}   # {(shape, dtype): [tensors]} of the copies, used again: pinning takes longer than copying
        self.free = {}      # those that the copy under way has not taken yet
        self.count, self.bytes, self.blocked, self.written = 0, 0, 0.0, 0.0  # files, bytes, seconds

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if self.thread and self.thread.is_alive():
            if kind is KeyboardInterrupt:  # a second signal: nothing is waited for, and Python would wait for threads
                print("interrupted while a checkpoint was written; the one before stays.", file=sys.stderr, flush=True)
                os._exit(128 + (error.args[0] if error.args else 2))
            self.thread.join()

    def save(self, path, tree, keep=1, after=None):
        """The tensors of the entries `tree` are copied now, the thread writes them to path later.

        after: a file that the thread syncs first, so that no checkpoint is newer on the disk than it is. The thread
        writes nothing where a tensor is not finite.
        """
        began = time.monotonic()
        self.wait()
        with self.beside():
            peaks = [peak_of(tensors_in(tree))]
            self.free = {kind: list(buffers) for kind, buffers in self.buffers.items()}
            if self.has_room(tree):
                tree = mapped(tree, torch.clone, {})
                self.taken = self.stream.record_event()
            tree = mapped(tree, lambda t: self.copy(t, peaks), {})
            peak = self.copy(torch.stack([peak for peak in peaks if peak is not None]).amax(), peaks)
        if self.master:
            self.start(self.write, path, tree, keep, after, peak)
            self.blocked += self.began - began

    def prepare(self, tree):
        """Memory for the copies of `tree`, and of no other, taken in a thread.

        Pinning takes 0.6 s a GB, which the first steps hide.
        """
        self.wait()
        self.buffers.clear()
        self.free.clear()
        if self.master:
            self.start(lambda: [self.buffer(t) for t in distinct(tree)])

    def start(self, work, *args):
        def guarded():
            try:
                work(*args)
            except BaseException as e:
                self.error = e
        self.thread, self.began = threading.Thread(target=guarded, daemon=True), time.monotonic()
        self.thread.start()

    @contextlib.contextmanager
    def beside(self):
        """Work inside runs on the stream of copies, after what was launched before."""
        if not self.on_cuda:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        self.taken = None
        with torch.cuda.stream(self.stream):
            yield
            self.copied = self.stream.record_event()
            self.taken = self.taken or self.copied

    def has_room(self, tree):
        """Whether the device takes a copy of the tensors and leaves as much free. Split ones are gathered anyway."""
        if not self.on_cuda or any(local(t) is not t for t in tensors_in(tree)):
            return False
        size = size_of(tree)
        if self.room < size < torch.cuda.mem_get_info()[0] / 2:
            self.room = size
        return size <= self.room

    def before_update(self):
        """On the device: the weights may change once they are copied."""
        if self.taken:
            torch.cuda.current_stream().wait_event(self.taken)

    def copy(self, t, peaks):
        """The tensor in host memory. Of one that is split, gathered first, peaks gets the peak."""
        whole = full(t)
        if whole is not t:
            peaks.append(peak_of([whole]))
        return self.buffer(whole).copy_(whole, non_blocking=True) if self.master else None

    def buffer(self, t):
        """Host memory for a copy of t: of an earlier copy, or new."""
        kind = t.shape, t.dtype
        if self.free.get(kind):
            return self.free[kind].pop()
        new = torch.empty(t.shape, dtype=t.dtype, pin_memory=self.on_cuda)
        self.buffers.setdefault(kind, []).append(new)
        return new

    def write(self, path, tree, keep, after, peak):
        began = time.monotonic()
        if self.copied:
            self.copied.synchronize()
        if not math.isfinite(peak.item()):
            raise UserError(f"the weights or the optimizer's state after step {tree['step']} are not finite, "
                            f"so {path} is not written: start again with a lower lr, in another --out_dir.")
        if after:
            with writing(after):
                sync(after)
        save_beside(tree, path, keep)
        self.count, self.bytes = self.count + 1, self.bytes + size_of(tree)
        self.written += time.monotonic() - began

    def busy(self):
        """Whether a file is still being written a second after its start. A quick one is waited for."""
        if self.thread:
            self.thread.join(max(0.0, self.began + 1 - time.monotonic()))
        return bool(self.thread and self.thread.is_alive())

    def raise_error(self):
        error, self.error = self.error, None
        if error:
            raise error

    def wait(self):
        """Until what was saved is on the disk."""
        if self.thread:
            self.thread.join()
        self.thread = None
        self.raise_error()

    def report(self) -> str:
        if not self.count:
            return ""
        return (f"saving   {self.count} files, {short(self.bytes, 'G')}B; the loop waited {self.blocked:.2f} s for "
                f"them, the thread wrote for {self.written:.2f} s\n")
