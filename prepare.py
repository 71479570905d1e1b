"""Text in, token files out.

    python prepare.py [preset.py] [--name=value ...]

    python prepare.py --dataset=stdlib                                   # the Python standard library, always there
    python prepare.py --dataset=text --input='texts/*.txt.xz' --tokenizer=spm:16384 --data_dir=data/mine
    python prepare.py config/s.py                                        # RefinedWeb in LLaMA's vocabulary

Writes train.bin, val.bin and the tokenizer into data_dir, all or nothing. The chapters: token files, sources, the validation
split, tokenising on all cores, the data folder. tokenizer.py has the tokenizers.
"""
import contextlib
import fcntl
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import random
import re
import shlex
import signal
import sys
import textwrap
import threading
import time
import tokenize
import zlib
from collections import Counter, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

import config
from config import UserError
from tokenizer import load_tokenizer, package, pinned, reason, remote, short_hash, tokenizer_from_blob, train_sentencepiece

MB = 1 << 20


@dataclass
class Settings:
    column: str = ""                     # field with the text in JSONL and datasets; empty: text (refinedweb: content)
    hf_config: str = ""                  # a Hugging Face dataset's configuration
    hf_split: str = "train"              # and its split
    train_tokens: int = 0                # training tokens to take from a remote dataset; 0: max_tokens
    val_tokens: int = 0                  # validation tokens to take from it; 0: final_eval_tokens, at most max_tokens
    workers: int = 0                     # tokenising processes; 0: one a core, at most 32


# ----------------------------------------------------------------------------------------------------------------------
# Token files: a header of 4096 bytes, `tokenfile VERSION CRC32 {json}` padded with spaces, then little-endian tokens

HEADER, VERSION = 4096, 1
AGAIN = "delete its folder and prepare it again"


class TokenWriter:
    """Writes a token file beside its place and renames it there when the with block ends well; otherwise nothing is left.

    write(ids) appends; ids outside the vocabulary raise UserError. `count` is the number of tokens so far. The unfinished file
    is locked: a second writer is refused, while what a killed one left is taken over.
    """

    def __init__(self, path, vocab_size, tokenizer, source):
        self.path, self.vocab_size, self.tokenizer, self.source = path, vocab_size, tokenizer, source
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.count = self.checksum = 0
        self.temp = path + ".tmp"
        self.file = os.fdopen(os.open(self.temp, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.temp))  # another one finished meanwhile
        except (BlockingIOError, FileNotFoundError):
            taken = True
        if taken:
            self.file.close()
            raise UserError(f"another process is writing {path} at this moment: let it finish.")
        self.file.truncate(0)
        self.file.seek(HEADER)

    def write(self, ids):
        ids = np.asarray(ids)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise UserError(f"{self.path}: token ids {ids.min()} to {ids.max()} do not fit the vocabulary of {self.vocab_size}.")
        data = ids.astype(self.dtype).tobytes()
        self.file.write(data)
        self.checksum = zlib.crc32(data, self.checksum)
        self.count += ids.size

    def move_tail(self, other, count):
        """Moves the last `count` tokens to the end of the writer `other`."""
        self.count -= count
        end = HEADER + self.count * self.dtype.itemsize
        self.file.seek(end)
        while data := self.file.read(MB):
            other.write(np.frombuffer(data, self.dtype))
        self.file.truncate(end)
        self.file.seek(HEADER)
        self.checksum = 0
        while data := self.file.read(MB):
            self.checksum = zlib.crc32(data, self.checksum)

    def __enter__(self):
        return self

    def __exit__(self, failure, *_):
        finished = False
        try:
            if failure is None:
                fields = {name: getattr(self, name) for name in ("vocab_size", "tokenizer", "source", "count", "checksum")}
                body = json.dumps({"dtype": self.dtype.name, **fields}).encode().ljust(HEADER - 21)
                self.file.seek(0)
                self.file.write(b"tokenfile %d %08x " % (VERSION, zlib.crc32(body)) + body)
                self.file.flush()
                os.fsync(self.file.fileno())
                os.replace(self.temp, self.path)
                finished = True
        finally:
            if not finished:
                os.remove(self.temp)
            self.file.close()


class TokenFile:
    """A token file opened for reading; the header is checked against the file's size at once, the payload by verify().

    Attributes: tokens (read-only memmap, (count,)), vocab_size, tokenizer (identity), source, count, checksum, path.
    Raises UserError with one sentence that says what is wrong with the file.
    """

    def __init__(self, path):
        self.path = path
        try:
            size = os.path.getsize(path)
            with open(path, "rb") as f:
                head = f.read(HEADER)
        except OSError as e:
            raise UserError(f"cannot open the token file {path}: {e.strerror}.") from None
        magic, version, crc, body = (*head.split(b" ", 3), b"", b"", b"")[:4]
        if magic != b"tokenfile" or not version.isdigit():
            raise UserError(f"{path} is not a token file: it lacks the header that prepare.py writes.")
        if int(version) > VERSION:
            raise UserError(f"{path} is a token file of version {int(version)}, this code reads up to {VERSION}: update the code.")
        if len(head) < HEADER:
            raise UserError(f"{path} is truncated: its header takes {HEADER} bytes, the file has {size}; {AGAIN}.")
        if crc != b"%08x" % zlib.crc32(body):
            raise UserError(f"{path} has a damaged header: {AGAIN}.")
        fields = json.loads(body)
        dtype = np.dtype(fields.pop("dtype")).newbyteorder("<")
        self.vocab_size, self.tokenizer, self.source, self.count, self.checksum = fields.values()
        expected = HEADER + self.count * dtype.itemsize
        if size != expected:
            wrong = "truncated" if size < expected else "too long"
            raise UserError(f"{path} is {wrong}: its {self.count} tokens take {expected} bytes, the file has {size}; {AGAIN}.")
        self.tokens = np.memmap(path, dtype, "r", HEADER, (self.count,)) if self.count else np.empty(0, dtype)

    def verify(self):
        """Reads everything: UserError unless the checksum fits and every id lies in the vocabulary."""
        crc = top = 0
        for start in range(0, self.count, MB):
            part = self.tokens[start:start + MB]
            crc, top = zlib.crc32(part, crc), max(top, int(part.max()))
        if crc != self.checksum:
            raise UserError(f"{self.path} is damaged: its checksum is {crc:08x}, its header says {self.checksum:08x}; {AGAIN}.")
        if top >= self.vocab_size:
            raise UserError(f"{self.path} holds the token id {top}, outside its vocabulary of {self.vocab_size}; {AGAIN}.")


# ----------------------------------------------------------------------------------------------------------------------
# Sources: generators of (bytes of UTF-8, last), where last ends a document; only text over 64 MB comes in several pieces

LARGEST = 64 * MB
SEPARATOR = b"<|endoftext|>"
SUFFIXES = (".txt", ".txt.xz", ".txt.gz", ".jsonl", ".jsonl.xz", ".jsonl.gz")
STDLIB, NOT_STDLIB = os.path.dirname(os.__file__), {"site-packages", "dist-packages", "test", "tests", "idle_test"}
LOCAL_SHARE = 0.01  # of the documents, for validation


def open_source(cfg, settings, meter):
    """(description, [(parts, validation share), ...]); a part is a lazy generator of documents, one a file or a dataset.

    The description stands in the token files, `dataset: details`; an equal one means the same text. meter is a Counter: total
    and done are bytes of local files (total stays 0 for a remote one), empty counts documents without text.
    """
    if cfg.dataset == "stdlib":
        names = glob.glob("**/*.py", root_dir=STDLIB, recursive=True)
        files = [os.path.join(STDLIB, name) for name in sorted(names) if not NOT_STDLIB & set(name.split(os.sep))]
        meter["total"] = sum(map(os.path.getsize, files))
        share = 5 * LOCAL_SHARE  # few documents: a steadier validation loss
        return f"stdlib: Python {sys.version.split()[0]}, {len(files)} files", [([stdlib_documents(files, meter)], share)]
    if cfg.dataset == "text":
        files, val_files = text_files(cfg.input), text_files(cfg.val_input)
        held_out = set(map(os.path.realpath, val_files))
        for path in files:
            if os.path.realpath(path) in held_out:
                raise UserError(f"{path} is among both --input and --val_input, so the model would train on what validates it: leave it out of one.")
        meter["total"] = sum(map(os.path.getsize, files + val_files))
        column = f", column {settings.column}" if ".jsonl" in "".join(files + val_files) else ""
        parts, val_parts = ([text_documents(path, settings.column, meter) for path in group] for group in (files, val_files))
        streams = [(parts, 0.0), (val_parts, 1.0)] if val_files else [(parts, LOCAL_SHARE)]
        return _describe_files(files, val_files) + column, streams
    name = "tiiuae/falcon-refinedweb" if cfg.dataset == "refinedweb" else cfg.dataset
    share = settings.val_tokens / (settings.train_tokens + settings.val_tokens)
    description = (f"{cfg.dataset}: {settings.hf_config or 'default'}/{settings.hf_split}, column {settings.column}, seed {cfg.seed}, "
                   f"{settings.train_tokens} + {settings.val_tokens} tokens")
    return description, [([_shuffled(hub_documents(name, settings, cfg.seed), cfg.seed)], share)]


def _describe_files(files, val_files):
    """With a hash over names and sizes: the same files by another path are the same source."""
    listing = [[(os.path.basename(path), os.path.getsize(path)) for path in group] for group in (files, val_files)]
    names = textwrap.shorten(" ".join(map(os.path.basename, files + val_files)), 200, placeholder=" ...")
    return f"text: {len(files)} + {len(val_files)} files ({names}) @{short_hash(json.dumps(listing).encode())}"


def stdlib_documents(files, meter):
    """Source files in their declared encoding (PEP 263), line ends as they are; an undecodable one is skipped."""
    for path in files:
        with open(path, "rb") as f:
            data = f.read()
        meter["done"] += len(data)
        with contextlib.suppress(SyntaxError, UnicodeDecodeError):
            yield data.decode(tokenize.detect_encoding(io.BytesIO(data).readline)[0]).encode(), True


def text_files(patterns):
    """The files behind names and globs separated by commas, each once: in the patterns' order, sorted within a glob."""
    found = {}
    for pattern in filter(None, map(str.strip, patterns.split(","))):
        paths = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
        if not paths:
            raise UserError(f"no file matches {pattern}: give files or globs, separated by commas.")
        for path in paths:
            if not path.endswith(SUFFIXES):
                raise UserError(f"{path} is not of a kind that can be read: {', '.join(SUFFIXES)}.")
            found[path] = None
    return list(found)


def text_documents(path, column, meter):
    """One file's documents; UserError for a file that is damaged, not UTF-8, or not JSON lines with that column."""
    try:
        with open(path, "rb") as raw:
            file = {".xz": lzma.open, ".gz": gzip.open}.get(path[-3:], lambda f: f)(raw)
            read, before = _json_lines if ".jsonl" in path[-9:] else _plain_text, 0
            for document in read(io.BufferedReader(file, MB), path, column):
                meter["done"], before = meter["done"] + raw.tell() - before, raw.tell()
                yield document
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}.") from None


def _plain_text(file, path, _):
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


def _json_lines(file, path, column):
    for number, line in config.text_lines(file, path, LARGEST + 4):
        if len(line) > LARGEST:
            raise UserError(f"{path} line {number} is longer than {LARGEST // MB} MB: split that document.")
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path} line {number} is not JSON in UTF-8 ({reason(e)}).") from None
            yield _field(row, column, f"{path} line {number}"), True


def _field(row, column, where):
    """The text of a row as UTF-8, null as empty; half a surrogate pair, which UTF-8 cannot hold, becomes a question mark."""
    if isinstance(row, dict) and isinstance(row.get(column, 0), str | None):
        return (row[column] or "").encode("utf-8", errors="replace")
    if not isinstance(row, dict):
        found = f"it has a {type(row).__name__}"
    elif column in row:
        found = f"there stands a value of type {type(row[column]).__name__}"
    else:
        found = textwrap.shorten(f"it has {', '.join(row) or 'no column'}", 200)
    raise UserError(f"{where} has no text in the column {column}, {found}: give --column=NAME.")


def hub_documents(name, settings, seed):
    """A Hugging Face dataset (or a folder of its files) as a stream whose shards are shuffled by the seed."""
    datasets, hub = (package(needed, f"dataset={name}") for needed in ("datasets", "huggingface_hub"))

    def connect():
        if not os.path.isdir(name):
            hub.HfApi().dataset_info(name, timeout=10)  # tries once, so that it fails at once
        return datasets.load_dataset(name, settings.hf_config or None, split=settings.hf_split, streaming=True)

    stream = remote(connect, f"the dataset {name}", "--dataset=stdlib, or --dataset=text --input=FILES")
    try:
        for row in stream.shuffle(seed=seed, buffer_size=1):  # the shards; _shuffled does the documents
            yield _field(row, settings.column, f"the dataset {name}"), True
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"the stream of {name} broke off ({reason(e)}): nothing is kept, run the command again.") from None


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
# The validation split: a document's side depends on its text alone, so it never moves and no text is on both sides

def is_validation(text, share) -> bool:
    """By the hash of the document (of one over 64 MB: its first piece of at most 64 MB); white space around it is ignored."""
    return int.from_bytes(hashlib.blake2b(text.strip(), digest_size=8).digest(), "big") < share * 2 ** 64


def cut(text, size):
    """Pieces of at most `size` bytes: cut after a line end, in a longer line between two characters."""
    start = 0
    while len(text) - start > size:
        end = text.rfind(b"\n", start, start + size) + 1
        if not end:
            end = start + size
            while text[end] & 0xC0 == 0x80:
                end -= 1
        yield text[start:end]
        start = end
    yield text[start:]


def _sample(parts, share, size=16 * MB):
    """Training text for a tokenizer: the head of every part, about `size` bytes together, as str of up to 4 kB."""
    for part in parts:
        room = size // len(parts)
        for text, _ in part:
            if not is_validation(text, share):
                yield from (piece.decode(errors="ignore") for piece in cut(text[:room], 4096))
                room -= len(text)
            if room <= 0:
                break


# ----------------------------------------------------------------------------------------------------------------------
# Tokenising on all cores: the main process reads and writes, the others encode; what is under way is bounded in bytes

BATCH, MOST_WORKERS = MB // 2, 512


def _batches(streams, wanted, piece, meter):
    """Lists of (side, text piece) of about half a megabyte; side 0 trains, 1 validates; an empty piece ends a document."""
    batch, size, side = [], 0, None
    for parts, share in streams:
        for text, last in itertools.chain.from_iterable(parts):
            if side is None:
                side = int(is_validation(text, share))
                if last and not text.strip():
                    meter["empty"], side = meter["empty"] + 1, None
                    continue
            if wanted(side):
                for part in cut(text, piece):
                    batch.append((side, part))
                    size += len(part) + 64
                    if size >= BATCH:
                        yield batch
                        batch, size = [], 0
                if last:
                    batch.append((side, b""))
            side = None if last else side
    yield batch


TOKENIZER = None  # a worker's


def _start_worker(identity, blob):
    global TOKENIZER
    TOKENIZER = TOKENIZER or tokenizer_from_blob(identity, blob)  # a forked worker has it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # none outlives a killed parent


def _pool(workers, identity="byte", blob=b""):
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    return ProcessPoolExecutor(workers, context, _start_worker, (identity, blob))


def _encode(batch):
    """The batch's ids, one array a side, and its bytes of text."""
    ids = [np.empty(0, np.uint32)], [np.empty(0, np.uint32)]
    for side, text in batch:
        ids[side].append(np.array(TOKENIZER.encode(text.decode()) if text else [TOKENIZER.eos], np.uint32))
    return list(map(np.concatenate, ids)), sum(len(text) for _, text in batch)


def _encoded(batches, tokenizer, workers):
    """_encode of every batch, in order whatever the number of workers."""
    global TOKENIZER
    TOKENIZER = tokenizer
    pool, pending = _pool(workers, tokenizer.identity, tokenizer.blob), deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_encode, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _progress(fraction):
    """show(documents, tokens): one updating line on a terminal, a line every ten seconds in a log."""
    start = shown = time.monotonic()
    terminal = sys.stderr.isatty()

    def show(documents, tokens, end=False):
        nonlocal shown
        now = time.monotonic()
        if end or now - shown >= (0.2 if terminal else 10):
            shown, share = now, 1 if end else min(fraction(), 1)
            line = f"[{'#' * round(20 * share):<20}] {share:4.0%}  {documents:,} documents  {tokens:,} tokens"
            line += f"  {tokens / (now - start + 1e-9):,.0f} tokens/s"
            print("\r" + line if terminal else line, end="\n" if end or not terminal else "", file=sys.stderr, flush=True)

    return show


# ----------------------------------------------------------------------------------------------------------------------
# The data folder: train.bin, val.bin, tokenizer.bin; train.bin comes last, so where it is the folder is complete

def check(cfg, settings):
    """Fills in the settings left empty and refuses what cannot work, before anything is read."""
    if not re.fullmatch(r"gpt2|llama|byte|spm:[1-9]\d{0,6}|.*\.model", cfg.tokenizer):
        raise UserError(f"tokenizer={cfg.tokenizer} is none of gpt2, llama, byte, spm:VOCAB (as spm:4096), or a path ending in .model.")
    for name in ("train_tokens", "val_tokens", "workers"):
        if getattr(settings, name) < 0:
            raise UserError(f"{name}={getattr(settings, name)} must not be negative.")
    if settings.workers > MOST_WORKERS:
        raise UserError(f"workers={settings.workers} must be at most {MOST_WORKERS}: give about one for each core.")
    if cfg.dataset == "text" and not cfg.input:
        raise UserError("dataset=text needs its files: give --input=FILES (names or globs, separated by commas).")
    if cfg.dataset != "text" and (cfg.input or cfg.val_input):
        raise UserError(f"input and val_input belong to dataset=text, not to dataset={cfg.dataset}: add --dataset=text.")
    settings.column = settings.column or ("content" if cfg.dataset == "refinedweb" else "text")
    settings.train_tokens = settings.train_tokens or cfg.max_tokens
    settings.val_tokens = settings.val_tokens or min(cfg.final_eval_tokens, cfg.max_tokens)
    settings.workers = settings.workers or min(os.cpu_count(), 32)


def prepare(cfg, settings) -> str:
    """Writes cfg.dataset in cfg.tokenizer into the folder config.data_dir(cfg), which it returns. Raises UserError."""
    check(cfg, settings)
    folder = config.data_dir(cfg)
    source, _ = open_source(cfg, settings, Counter())
    if os.path.exists(os.path.join(folder, "train.bin")):
        train, val, _ = _open_folder(folder)
        if (train.source, train.tokenizer.partition("@")[0]) != (source, os.path.basename(cfg.tokenizer)):
            raise UserError(f"{folder} already holds {train.source} in {train.tokenizer}: give another --data_dir, or delete it.")
        print(f"{folder} is complete already: {train.count:,} + {val.count:,} tokens of {source}.")
        return folder
    try:
        os.makedirs(folder, exist_ok=True)
        _write_folder(folder, cfg, settings)
    except OSError as e:  # no space, no permission
        raise UserError(f"cannot prepare {folder}: {e}.") from None
    except BrokenExecutor:
        raise UserError("a worker process was killed (out of memory?): run again, perhaps with fewer --workers.") from None
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(folder)  # only an empty one goes
    return folder


def make_tokenizer(name, parts, share):
    """load_tokenizer, or spm:VOCAB trained on the head of the parts."""
    if not name.startswith("spm:"):
        return load_tokenizer(name)
    with _pool(1) as child:  # whose 400 MB go with it
        blob = child.submit(train_sentencepiece, int(name[4:]), list(_sample(parts, share))).result()
    return tokenizer_from_blob(pinned(name, blob), blob)


def _write_folder(folder, cfg, settings):
    start, meter = time.monotonic(), Counter()
    tokenizer = make_tokenizer(cfg.tokenizer, *open_source(cfg, settings, Counter())[1][0])
    source, streams = open_source(cfg, settings, meter)
    budgets = (float("inf"), float("inf")) if meter["total"] else (settings.train_tokens, settings.val_tokens)
    new = functools.partial(TokenWriter, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.identity, source=source)
    with new(os.path.join(folder, "train.bin")) as train, new(os.path.join(folder, "val.bin")) as val:  # val.bin appears first
        sides, documents, size = (train, val), [0, 0], 0
        show = _progress(lambda: meter["done"] / meter["total"] if meter["total"] else (train.count + val.count) / sum(budgets))
        batches = _batches(streams, lambda side: sides[side].count < budgets[side], tokenizer.piece, meter)
        with contextlib.closing(_encoded(batches, tokenizer, settings.workers)) as encoded:
            for arrays, text_size in encoded:
                for side, ids in enumerate(arrays):
                    ids = ids[:int(min(budgets[side] - sides[side].count, ids.size))]
                    sides[side].write(ids)
                    documents[side] += int(np.count_nonzero(ids == tokenizer.eos))
                size += text_size
                show(sum(documents), train.count + val.count)
                if all(writer.count >= budget for writer, budget in zip(sides, budgets)):
                    break
        show(sum(documents), train.count + val.count, end=True)
        _fill_empty_side(train, val, cfg)
        with open(os.path.join(folder, "tokenizer.bin"), "wb") as f:
            f.write(tokenizer.blob)
            f.flush()
            os.fsync(f.fileno())
    seconds = time.monotonic() - start
    print(f"{folder}\n"
          f"  source       {source}\n"
          f"  documents    {documents[0]:,} train, {documents[1]:,} validation, {meter['empty']:,} empty skipped\n"
          f"  tokens       {train.count:,} train, {val.count:,} validation\n"
          f"  vocabulary   {tokenizer.vocab_size:,} ({tokenizer.identity})\n"
          f"  bytes/token  {size / (train.count + val.count):.3f}\n"
          f"  time         {seconds:.1f} s, {size / MB / seconds:.1f} MB/s")


def _fill_empty_side(train, val, cfg):
    """Where the hash leaves a side without any document, the last 1 % of all tokens is the validation set."""
    if not (train.count and val.count if cfg.val_input else train.count + val.count):
        raise UserError(f"there is no text in {cfg.input if cfg.input and not train.count else cfg.val_input or cfg.dataset}.")
    if not train.count:
        val.move_tail(train, val.count)
    if not val.count:
        train.move_tail(val, -(-train.count // 100))


def _open_folder(folder):
    train, val = (TokenFile(os.path.join(folder, name)) for name in ("train.bin", "val.bin"))
    if (train.tokenizer, train.source) != (val.tokenizer, val.source):
        raise UserError(f"{folder} is mixed, val.bin being {val.source} in {val.tokenizer}, train.bin {train.source}: {AGAIN}.")
    try:
        with open(os.path.join(folder, "tokenizer.bin"), "rb") as f:
            return train, val, tokenizer_from_blob(train.tokenizer, f.read())
    except OSError as e:
        raise UserError(f"cannot read {folder}/tokenizer.bin ({e.strerror}): {AGAIN}.") from None


def open_data(cfg):
    """(train, val, tokenizer): two TokenFiles and the Tokenizer of the folder config.data_dir(cfg). Raises UserError.

    A folder given as data_dir is taken for what it holds; in the folder named after dataset and tokenizer these must agree.
    """
    folder = config.data_dir(cfg)
    if not os.path.exists(os.path.join(folder, "train.bin")):
        names = ("dataset", "input", "val_input", "tokenizer", "data_dir")
        command = shlex.join(["python", "prepare.py"] + [f"--{name}={getattr(cfg, name)}" for name in names if getattr(cfg, name)])
        raise UserError(f"{folder} holds no data: run `{command}` first.")
    train, val, tokenizer = _open_folder(folder)
    if not cfg.data_dir:
        found, asked = (train.source.partition(": ")[0], train.tokenizer.partition("@")[0]), (cfg.dataset, os.path.basename(cfg.tokenizer))
        files = _describe_files(text_files(cfg.input), text_files(cfg.val_input)) if cfg.input else ""
        if found != asked or not train.source.startswith(files):
            asked = files or " in ".join(asked)
            raise UserError(f"{folder} holds {train.source} in {train.tokenizer}, not {asked}: delete it, or give another --data_dir.")
    return train, val, tokenizer


def ensure_data(cfg):
    """open_data, after preparing the standard library into its own folder where that is all that is missing."""
    if cfg.dataset == "stdlib" and not cfg.data_dir and not os.path.exists(os.path.join(config.data_dir(cfg), "train.bin")):
        prepare(cfg, Settings())
    return open_data(cfg)


def main(argv):
    cfg, settings = config.load(argv, Settings, usage=__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds as Ctrl-C does
    folder = prepare(cfg, settings)
    preset = next((word for word in argv if word.endswith(".py")), "config/quickstart.py")
    print(f"next: {shlex.join(['python', 'train.py', preset, '--data_dir=' + folder])}")


if __name__ == "__main__":
    config.run(main)
