"""A run is a folder: config.json, metrics.jsonl, ckpt.pt and model.pt. Files appear whole or not at all."""
import contextlib
import json
import os
import zipfile

import torch

from config import UserError


@contextlib.contextmanager
def writing(path):
    """A full disk, or a folder that is not to be written, is told in one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__  # torch.save raises one of its own over the disk's
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path} ({cause.strerror}): make room there, or choose another folder.") from None


@contextlib.contextmanager
def atomic_write(path):
    """Yields the name of a file to write, which takes the place of `path` when it is whole and is removed when it fails."""
    try:
        with writing(path):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            yield path + ".tmp"
            os.replace(path + ".tmp", path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")


def read_json(path, lines=False):
    """What a file of JSON holds, or one of JSON `lines`, where a torn last one is left out."""
    try:
        with open(path, encoding="utf-8") as f:
            return [json.loads(line) for line in f if line.endswith("\n")] if lines else json.load(f)
    except OSError as e:
        raise UserError(f"{path} {'is missing' if isinstance(e, FileNotFoundError) else f'cannot be read ({e.strerror})'}.") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is not JSON.") from None


def read_metrics(path, last):
    """The rows of a metrics.jsonl, up to the `last` step."""
    rows = read_json(path, lines=True)
    for number, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and type(row.get("step")) is int and 1 <= row["step"] <= last and (row.get("tokens_per_s") if "loss" in row else True)
                and all(isinstance(value, (int, float, type(None))) for value in row.values())):
            raise UserError(f"{path} is damaged: line {number} is not what a run of {last} steps writes.")
    return rows


def save_beside(obj, path):
    """torch.save that appears whole or not at all."""
    with atomic_write(path) as temp, open(temp, "wb") as f:
        torch.save(obj, f)


ENTRIES = {"model.pt": {"config": dict, "model": dict, "tokenizer": dict}, "ckpt.pt": {"model": dict, "step": int, "data": int, "optimizer": dict}}


def read_checkpoint(path, name):
    """The dict in a run's model.pt or ckpt.pt, on the CPU, mapped rather than read; UserError if it is missing, damaged or another thing."""
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist: give a run folder such as out/quickstart or a model.pt.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not look at the checksums
        saved = None if damaged else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:
        raise UserError(f"{path} is not a checkpoint of this project or is damaged ({type(e).__name__}).") from e
    if damaged:
        raise UserError(f"{path} is damaged: the checksum of its part {damaged} does not fit.")
    lacking = [entry for entry, kind in ENTRIES[name].items() if not isinstance(saved, dict) or not isinstance(saved.get(entry), kind)]
    if lacking:
        raise UserError(f"{path} is not the {name} of a run: it lacks {', '.join(lacking)}.")
    return saved
