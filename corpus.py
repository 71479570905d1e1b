"""Reads text: local files and Hugging Face datasets as documents, and which of them are held out for validation."""
import contextlib
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import re
import sys
import textwrap
import tokenize
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Callable

from tqdm import tqdm

import config
from config import UserError, reason
from tokenizer import package, remote

MB = 1 << 20


# ----------------------------------------------------------------------------------------------------------------------
# Sources: generators of (UTF-8 bytes, last), where last ends a document; only text over 64 MB comes in several pieces

LARGEST, HASHED, MANY = 64 * MB, 1 << 30, 1 << 18
SEPARATOR = b"<|endoftext|>"
ROWS = (".jsonl", ".jsonl.xz", ".jsonl.gz", ".jsonl.zst", ".parquet")
SUFFIXES = (".txt", ".txt.xz", ".txt.gz", ".txt.zst", *ROWS)
STDLIB, NOT_STDLIB = os.path.dirname(os.__file__), {"site-packages", "dist-packages", "test", "tests", "idle_test"}
LOCAL_SHARE = {"text": 0.01, "stdlib": 0.03}  # for validation; of few documents more, for a steadier loss


@dataclass
class Source:
    description: str             # `dataset: details`, kept in the token files; an equal one means the same text
    train: list[Callable]        # each returns a generator of documents: of one file, or of a dataset
    val: list[Callable]          # the same for validation; empty: documents of train are held out
    share: float                 # of train's text to hold out
    size: int = 0                # bytes of all local files; 0: a remote dataset


def open_source(cfg, settings, meter) -> Source:
    """Nothing is read yet but local files' contents for their hash.

    The generators count in meter: done is bytes read of local files, bad is rows that were skipped.
    """
    if cfg.dataset == "stdlib":
        names = glob.glob("**/*.py", root_dir=STDLIB, recursive=True)
        files = [os.path.join(STDLIB, name) for name in sorted(names) if not NOT_STDLIB & set(name.split(os.sep))]
        description = f"stdlib: Python {sys.version.split()[0]}, {len(files)} files @{content_hash(files)}"
        train, val, size = [functools.partial(stdlib_documents, files, meter)], [], sum(map(os.path.getsize, files))
    elif cfg.dataset == "text":
        files, val_files = text_files(cfg.input), text_files(cfg.val_input)
        held_out = set(map(os.path.realpath, val_files))
        for path in files:
            if os.path.realpath(path) in held_out:
                raise UserError(f"{path} is among both --input and --val_input, so the model would train on what "
                                "validates it: leave it out of one.")
        description = describe_files(files, val_files)
        if any(path.lower().endswith(ROWS) for path in files + val_files):
            description += f", column {settings.column}"
        train, val = ([functools.partial(text_documents, path, settings.column, meter, settings.skip_bad_rows)
                       for path in group] for group in (files, val_files))
        size = sum(map(os.path.getsize, files + val_files))
    else:
        name = "tiiuae/falcon-refinedweb" if cfg.dataset == "refinedweb" else cfg.dataset
        description = (f"{cfg.dataset}: {settings.hf_config or 'default'}/{settings.hf_split}, column "
                       f"{settings.column}, seed {cfg.seed}, {settings.train_tokens} + {settings.val_tokens} tokens")
        share = settings.val_tokens / (settings.train_tokens + settings.val_tokens)
        train = [lambda: _shuffled(hub_documents(name, settings, cfg.seed, meter), cfg.seed)]
        return Source(description, train, [], share)
    if settings.val_share:
        description += f", val_share {settings.val_share}"
    return Source(description, train, val, settings.val_share or LOCAL_SHARE[cfg.dataset], size)


def describe_files(files, val_files):
    """With a hash of names and contents: the same files by another path are the same source."""
    names = " ".join(os.path.basename(path) for path in files + val_files)
    names = textwrap.shorten(names.encode(errors="replace").decode(), 100, placeholder=" ...")
    return f"text: {len(files)} + {len(val_files)} files ({names}) @{content_hash(files, val_files)}"


def content_hash(*groups):
    """Of names, sizes and contents. Of more than 1 GiB in all every n-th MiB is read, and the last one of each file."""
    digest = hashlib.blake2b(digest_size=6)
    every = -(-sum(os.path.getsize(path) for group in groups for path in group) // HASHED) or 1
    for group in groups:
        digest.update(b"group")
        for path in group:
            with config.reading(path, "give files that can be read"), open(path, "rb") as f:
                size = os.path.getsize(path)
                digest.update(json.dumps([os.path.basename(path), size]).encode())
                for at in (*range(0, size, every * MB), max(0, size - MB)):
                    f.seek(at)
                    digest.update(f.read(MB))
    return digest.hexdigest()


def stdlib_documents(files, meter):
    """Source files in their declared encoding (PEP 263), line ends as they are; an undecodable one is skipped."""
    for path in files:
        with open(path, "rb") as f:
            data = f.read()
        meter["done"] += len(data)
        with contextlib.suppress(SyntaxError, UnicodeDecodeError):
            yield data.decode(tokenize.detect_encoding(io.BytesIO(data).readline)[0]).encode(), True


def text_files(patterns):
    """The files of names, folders and globs separated by commas, each once: in this order, sorted within a glob."""
    found = {}
    for pattern in re.split(r"(?<!\\),", patterns):
        pattern = os.path.expanduser(pattern.strip().replace("\\,", ","))
        if not pattern:
            continue
        paths = [pattern]
        if os.path.isdir(pattern):
            inside = glob.glob(os.path.join(glob.escape(pattern), "**"), recursive=True)
            paths = sorted(path for path in inside if path.lower().endswith(SUFFIXES) and os.path.isfile(path))
        elif not os.path.isfile(pattern):
            paths = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
        if not paths:
            kinds = f" of a kind that can be read ({', '.join(SUFFIXES)})" if os.path.isdir(pattern) else ""
            raise UserError(f"no file{kinds} matches {pattern}: give files, folders or globs, separated by commas "
                            "(inside a name write \\, for a comma).")
        for path in paths:
            if not path.lower().endswith(SUFFIXES):
                raise UserError(f"{path} is not of a kind that can be read: {', '.join(SUFFIXES)}.")
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def text_documents(path, column, meter, skip=False):
    """One file's documents; UserError for a file that is damaged, not UTF-8, or without text in that column.

    skip leaves out rows without text in the column and counts them in meter["bad"].
    """
    lower, before = path.lower(), 0
    try:
        with open(path, "rb") as raw:
            if lower.endswith(".parquet"):
                documents = _row_texts(_parquet_rows(raw, path, column), column, meter, skip)
            elif lower.endswith(ROWS):
                documents = _row_texts(_json_lines(_decompressed(raw, lower), path, meter, skip), column, meter, skip)
            else:
                documents = _plain_text(_decompressed(raw, lower), path)
            for document in documents:
                position = raw.tell()
                meter["done"], before = meter["done"] + max(0, position - before), max(before, position)
                yield document
    except (OSError, EOFError, lzma.LZMAError, zlib.error, MemoryError) as e:  # a few bytes may ask for any memory
        why = getattr(e, "strerror", None) or str(e) or "it needs more memory than there is"
        raise UserError(f"cannot read {path} ({why}): it is damaged, or not what its suffix says.") from None


def _decompressed(raw, name):
    if name.endswith(".zst"):
        arrow = package("pyarrow", "a .zst file", "the text without compression, as .xz or as .gz")
        return io.BufferedReader(arrow.CompressedInputStream(raw, "zstd"), MB)
    return io.BufferedReader({".xz": lzma.open, ".gz": gzip.open}.get(name[-3:], lambda f: f)(raw), MB)


def _plain_text(file, path):
    document, new_line = bytearray(), True
    for _, line in config.text_lines(file, path):
        if new_line and line.rstrip(b"\r\n") == SEPARATOR:
            yield bytes(document), True
            document.clear()
        else:
            if len(document) + len(line) > LARGEST:
                yield bytes(document), False
                document.clear()
            document += line
        new_line = line.endswith(b"\n")
    if document:
        yield bytes(document), True


def _json_lines(file, path, meter, skip):
    """(place, line) of the lines that are not blank."""
    def count_bad(number):
        meter["bad"] += 1

    too_long = 0
    for number, line in config.text_lines(file, path, LARGEST + 4, count_bad if skip else None):
        if len(line) > LARGEST or number == too_long:
            if not skip:
                raise UserError(f"{path} line {number} is longer than {LARGEST // MB} MB: split that document.")
            meter["bad"] += number != too_long
            too_long = number
        elif line.strip():
            yield f"{path} line {number}", line


def _parquet_rows(raw, path, column):
    """(place, row) of a Parquet file, of which only the field with the column is read."""
    parquet = package("pyarrow.parquet", "a .parquet file", "the text as .jsonl")
    try:
        file = parquet.ParquetFile(raw)
        names = file.schema_arrow.names
        top = column if column in names else column.partition(".")[0]
        number = 0
        for batch in file.iter_batches(1024, columns=[top] if top in names else None):
            for number, row in enumerate(batch.to_pylist(), number + 1):
                yield f"{path} row {number}", row
    except (ValueError, OSError) as e:  # pyarrow's errors are ValueErrors
        raise UserError(f"cannot read {path} ({reason(e)}): it is damaged, or no Parquet file.") from None


def _row_texts(rows, column, meter, skip):
    for place, row in rows:
        try:
            yield _row_text(row, column, place), True
        except UserError:
            if not skip:
                raise
            meter["bad"] += 1


def _row_text(row, column, place):
    """The text in a row, a dict or JSON line, as UTF-8: null is empty, a lone surrogate becomes a question mark."""
    if isinstance(row, bytes):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{place} is not JSON in UTF-8 ({reason(e)}): repair it, or leave such rows out with "
                            "--skip_bad_rows=True.") from None
    found = row
    for name in [column] if isinstance(row, dict) and column in row else column.split("."):
        if found is None and row is not None:
            return b""
        if not isinstance(found, dict):
            kind = f"it is a {type(found).__name__}"
            break
        if name not in found:
            kind = f"it has {', '.join(found) or 'no column'}"
            break
        found = found[name]
    else:
        kind = f"its value is of type {type(found).__name__}"
        if isinstance(found, str | None):
            return (found or "").encode("utf-8", errors="replace")
    raise UserError(f"{place} has no text in the column {column}, {textwrap.shorten(kind, 150)}: give --column=NAME "
                    "(a.b for b inside a), or --skip_bad_rows=True.")


def hub_documents(name, settings, seed, meter):
    """A Hugging Face dataset (or a folder of its files) as a stream whose shards are shuffled by the seed."""
    instead = "--dataset=stdlib, or --dataset=text --input=FILES"
    datasets, hub = (package(needed, f"dataset={name}", instead) for needed in ("datasets", "huggingface_hub"))

    def connect():
        if not os.path.isdir(name):
            hub.HfApi().dataset_info(name, timeout=10)  # without retries, so that it fails at once
        return datasets.load_dataset(name, settings.hf_config or None, split=settings.hf_split, streaming=True)

    stream = remote(connect, f"the dataset {name}", instead).shuffle(seed=seed, buffer_size=1)  # only the shards
    rows = ((f"row {number} of the dataset {name}", row) for number, row in enumerate(stream, 1))
    try:
        yield from _row_texts(rows, settings.column, meter, settings.skip_bad_rows)
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"the stream of {name} broke off ({reason(e)}): nothing is kept, run it again.") from None


def _shuffled(documents, seed, size=LARGEST):
    """A shuffle buffer bounded in bytes."""
    rng, buffer, held = random.Random(seed), [], 0
    for document in documents:
        buffer.append(document)
        held += len(document[0]) + 100
        while held > size:
            i = rng.randrange(len(buffer))
            buffer[i], buffer[-1] = buffer[-1], buffer[i]
            held -= len(buffer[-1][0]) + 100
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


# ----------------------------------------------------------------------------------------------------------------------
# The validation split: by document and by the document's text alone, so that no text is on both sides

def document_hash(text) -> int:
    """64 bits of the text without white space around it; of a document over 64 MB: of its first piece."""
    return int.from_bytes(hashlib.blake2b(text.strip(), digest_size=8).digest(), "big")


def is_validation(text, share) -> bool:
    """The rule where sizes are unknown: hashes are uniform, so this holds out about `share` of the documents."""
    return document_hash(text) < share * 2 ** 64


def hold_out(source, meter):
    """Which documents of source.train validate: a function text -> bool."""
    if source.val:
        return lambda text: False
    if not source.size:
        return functools.partial(is_validation, share=source.share)
    sizes, total, key, below = Counter(), 0, None, 1 << 64
    with Bar("splitting", source.size, "B") as bar:
        for text, last in itertools.chain.from_iterable(part() for part in source.train):
            key = document_hash(text) if key is None else key
            if text.strip():
                total += len(text)
                if key < below:
                    sizes[key] += len(text)
            key = None if last else key
            while len(sizes) > MANY and below > 4 * source.share * 2 ** 64:  # of many documents low hashes suffice
                below //= 2
                sizes = Counter({k: size for k, size in sizes.items() if k < below})
            bar.show(meter["done"])
    held_out = choose_documents(sizes, total, source.share)
    return lambda text: document_hash(text) in held_out


def choose_documents(sizes, total, share):
    """The hashes to hold out, given {hash: bytes}: those below share, which stay as a corpus grows, within bounds.

    Documents follow in the order of their hashes. One that would exceed 1.5 share of the bytes is left out, and further
    ones follow until half the share is reached. Where documents are too large for that, up to 5 shares are allowed.
    An empty set: no documents fit.
    """
    for most in (1.5 * share, min(0.5, 5 * share)):
        size, held_out = 0, set()
        for key in sorted(sizes):
            if key >= share * 2 ** 64 and size >= share / 2 * total:
                break
            if size + sizes[key] <= most * total:
                size += sizes[key]
                held_out.add(key)
        if size >= share / 2 * total:
            return held_out
    return set()


class Bar(tqdm):
    """Progress on standard error after the first second; in a log file a line every ten seconds."""
    monitor_interval = 0  # without tqdm's thread, beside which workers could not be forked

    def __init__(self, what, total, unit):
        interval, end = (0.2, "") if sys.stderr.isatty() else (10, "\n")
        super().__init__(desc=what, total=total, unit=unit, unit_scale=True, delay=1, mininterval=interval, leave=False,
                         bar_format="{l_bar}{bar:20}{r_bar}" + end)

    def show(self, done, text=""):
        self.set_postfix_str(text, refresh=False)
        self.update(done - self.n)
