"""Text in, token files out.

    python prepare.py [preset.py] [--name=value ...]

    python prepare.py --dataset=stdlib                        # Python's standard library, which every machine has
    python prepare.py --dataset=text --input='texts/*.txt.xz' --tokenizer=spm:16384 --data_dir=data/mine
    python prepare.py config/s.py                             # RefinedWeb in LLaMA's vocabulary

Writes train.bin, val.bin and the tokenizer into data_dir, all or nothing. corpus.py reads the text and splits it,
tokenizer.py has the tokenizers.
"""
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
import zlib
from collections import Counter, deque
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from filelock import FileLock, Timeout

import config
from config import UserError
from corpus import LOCAL_SHARE, MB, SEPARATOR, Bar, describe_files, hold_out, open_source, text_files
from tokenizer import label, load_tokenizer, name_of, pinned, tokenizer_from_blob, train_sentencepiece


@dataclass
class Settings:
    column: str = ""                     # field with a row's text, a.b: b inside a; empty: text (refinedweb: content)
    skip_bad_rows: bool = False          # leave out rows without text in the column and report their number
    val_share: float = 0.0               # share of local text to hold out without val_input; 0: 0.01 (stdlib: 0.03)
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
    """Writes a token file under a temporary name and renames it when the with block ends well; else nothing is left.

    write(ids) appends; ids outside the vocabulary raise UserError. `count` is the number of tokens so far.
    """

    def __init__(self, path, vocab_size, tokenizer, source):
        self.path, self.vocab_size, self.tokenizer, self.source = path, vocab_size, tokenizer, source
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.count = self.checksum = 0
        self.temp = path + ".tmp"
        self.file = open(self.temp, "w+b")
        self.file.seek(HEADER)

    def write(self, ids):
        ids = np.asarray(ids)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise UserError(f"{self.path}: token ids {ids.min()} to {ids.max()} do not fit the vocabulary of "
                            f"{self.vocab_size}: the tokenizer and its table disagree.")
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
        try:
            if failure is None:
                fields = {f: getattr(self, f) for f in ("vocab_size", "tokenizer", "source", "count", "checksum")}
                body = json.dumps({"dtype": self.dtype.name, **fields}).encode().ljust(HEADER - 21)
                self.file.seek(0)
                self.file.write(b"tokenfile %d %08x " % (VERSION, zlib.crc32(body)) + body)
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                os.replace(self.temp, self.path)
        finally:
            self.file.close()
            with contextlib.suppress(FileNotFoundError):  # renamed
                os.remove(self.temp)


class TokenFile:
    """A token file opened for reading; its header and size are checked here, its payload by verify().

    Attributes: tokens (read-only memmap, (count,)), vocab_size, tokenizer (identity), source, count, checksum, path.
    Raises UserError with one sentence that says what is wrong with the file.
    """
    FIELDS = {"dtype": str, "vocab_size": int, "tokenizer": str, "source": str, "count": int, "checksum": int}

    def __init__(self, path):
        self.path = path
        try:
            self.file = open(path, "rb", buffering=0)
            size, head = os.fstat(self.file.fileno()).st_size, self.file.read(HEADER)
        except OSError as e:
            raise UserError(f"cannot open the token file {path} ({e.strerror}): prepare the data first.") from None
        magic, version, crc, body = (*head.split(b" ", 3), b"", b"", b"")[:4]
        if magic != b"tokenfile" or not version.isdigit():
            raise UserError(f"{path} is not a token file: it lacks the header that prepare.py writes; {AGAIN}.")
        if int(version) > VERSION:
            raise UserError(f"{path} is a token file of version {int(version)}, this code reads up to {VERSION}: "
                            "update the code.")
        if len(head) < HEADER:
            raise UserError(f"{path} is truncated: its header takes {HEADER} bytes, the file has {size}; {AGAIN}.")
        if crc != b"%08x" % zlib.crc32(body):
            raise UserError(f"{path} has a damaged header: {AGAIN}.")
        with contextlib.suppress(ValueError, RecursionError):  # not JSON
            body = json.loads(body)
        if not isinstance(body, dict) or {name: type(value) for name, value in body.items()} != self.FIELDS \
                or body["dtype"] not in ("uint16", "uint32") or not 0 < body["vocab_size"] <= config.MOST["vocab_size"]:
            raise UserError(f"{path} has a header whose fields are not those that prepare.py writes: {AGAIN}.")
        dtype = np.dtype(body.pop("dtype")).newbyteorder("<")
        vars(self).update(body)
        self._check_size(size, HEADER + self.count * dtype.itemsize)
        self.tokens = np.memmap(path, dtype, "r", HEADER, (self.count,)) if self.count else np.empty(0, dtype)

    def _check_size(self, size, expected):
        if size != expected:
            wrong = "truncated" if size < expected else "too long"
            raise UserError(f"{self.path} is {wrong}: its {self.count} tokens take {expected} bytes, the file has "
                            f"{size}; {AGAIN}.")

    def read(self, starts, size):
        """The `size` tokens from each of starts (n,) -> (n, size) int64. Of one thread at a time.

        Reads the file, which is as fast as its mapping: beyond the end of a file that was truncated since, or where the
        disk fails, a mapping kills the process without a word.
        """
        out = np.empty((len(starts), size), self.tokens.dtype)
        with config.reading(f"the token file {self.path}", AGAIN):
            for row, start in zip(out, starts.tolist()):
                self.file.seek(HEADER + start * out.itemsize)
                if self.file.readinto(row) < row.nbytes:
                    self._check_size(os.fstat(self.file.fileno()).st_size, HEADER + self.tokens.nbytes)
        return out.astype(np.int64)

    def verify(self):
        """Reads everything: UserError unless size and checksum fit and every id lies in the vocabulary."""
        crc = top = size = 0
        width = self.tokens.itemsize
        with config.reading(f"the token file {self.path}", AGAIN), open(self.path, "rb") as f:
            f.seek(HEADER)
            while part := f.read(MB):
                size += len(part)
                crc = zlib.crc32(part, crc)
                ids = np.frombuffer(part[:len(part) // width * width], self.tokens.dtype)
                top = max(top, int(ids.max(initial=0)))
        self._check_size(HEADER + size, HEADER + self.tokens.nbytes)
        if crc != self.checksum:
            raise UserError(f"{self.path} is damaged: its checksum is {crc:08x}, its header says {self.checksum:08x}; "
                            f"{AGAIN}.")
        if top >= self.vocab_size:
            raise UserError(f"{self.path} holds the token id {top}, outside its vocabulary of {self.vocab_size}; "
                            f"{AGAIN}.")


def verify_in_background(*files):
    """Starts verify() of token files in a thread, which reads about 2 GB/s -> raise_damage(wait=False).

    raise_damage raises the UserError found so far; with wait=True it first waits for the end.
    """
    verified = Future()

    def work():
        try:
            verified.set_result([file.verify() for file in files])
        except Exception as e:
            verified.set_exception(e)

    threading.Thread(target=work, daemon=True).start()  # the process may end before

    def raise_damage(wait=False):
        if wait or verified.done():
            verified.result()

    return raise_damage


# ----------------------------------------------------------------------------------------------------------------------
# Tokenising on all cores: the main process reads and writes, workers encode; what is under way is bounded in bytes

BATCH = MB // 2
MOST_WORKERS = 61 if sys.platform == "win32" else 512  # Windows cannot wait for more processes


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


def _with_sides(part, rule):
    """The part's (text, last, side): the first piece of a document decides, 0 trains, 1 validates."""
    side = None
    for text, last in part():
        side = int(rule(text)) if side is None else side
        yield text, last, side
        side = None if last else side


def _sample(parts, held_out):
    """Training text for a tokenizer: the head of every part, about 16 MB together, as str of up to 4 kB."""
    for part in parts:
        room = 16 * MB // len(parts)
        for text, _, side in _with_sides(part, held_out):
            if side == 0:
                yield from (piece.decode(errors="ignore") for piece in cut(text[:room], 4096))
                room -= len(text)
            if room <= 0:
                break


def _batches(source, held_out, wanted, piece, meter):
    """Lists of (side, text of at most `piece` bytes), about half a megabyte each; an empty text ends a document."""
    batch, size, first = [], 0, True
    streams = [(part, held_out) for part in source.train] + [(part, lambda text: True) for part in source.val]
    for text, last, side in itertools.chain.from_iterable(itertools.starmap(_with_sides, streams)):
        if first and last and not text.strip():
            meter["empty"] += 1
        elif wanted(side):
            meter["separators"] += text.count(SEPARATOR)
            for part in cut(text, piece):
                batch.append((side, part))
                size += len(part) + 64
                if size >= BATCH:
                    yield batch
                    batch, size = [], 0
            if last:
                batch.append((side, b""))
        first = last
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
    """Forked where this process has no other thread: forking a process with threads can deadlock."""
    method = "spawn"
    if sys.platform == "linux":
        method = "fork" if len(os.listdir("/proc/self/task")) == 1 else "forkserver"
    return ProcessPoolExecutor(workers, multiprocessing.get_context(method), _start_worker, (identity, blob))


def _encode(batch):
    """For each side the batch's ids, one array, and its bytes of text."""
    ids, sizes = [[np.empty(0, np.uint32)] for _ in range(2)], [0, 0]
    for side, text in batch:
        ids[side].append(np.array(TOKENIZER.encode(text.decode()) if text else [TOKENIZER.eos], np.uint32))
        sizes[side] += len(text)
    return [(np.concatenate(arrays), size) for arrays, size in zip(ids, sizes)]


def _encoded(batches, tokenizer, workers):
    """_encode of every batch, in order whatever the number of workers."""
    global TOKENIZER
    TOKENIZER = tokenizer
    others = multiprocessing.active_children()
    pool, pending = _pool(workers, tokenizer.identity, tokenizer.blob), deque()
    try:
        for batch in batches:
            try:
                pending.append(pool.submit(_encode, batch))
            except OSError as e:  # its pipes are closed while it breaks
                raise BrokenExecutor(str(e)) from None
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenExecutor:
        # A worker that starts while the pool breaks is not ended by it and holds its pipes: shutdown would wait forever
        for worker in set(multiprocessing.active_children()) - set(others):
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# The data folder: train.bin, val.bin, tokenizer.bin; train.bin comes last, so where it is the folder is complete

def check(cfg, settings):
    """Fills in the settings left empty and refuses what cannot work, before anything is read."""
    if not re.fullmatch(r"gpt2|llama|byte|spm:[1-9]\d{0,6}|.*\.(model|json)", cfg.tokenizer):
        raise UserError(f"tokenizer={cfg.tokenizer} is none of gpt2, llama, byte, spm:VOCAB (as spm:4096), or a path "
                        "ending in .model or .json.")
    for name in ("train_tokens", "val_tokens", "workers"):
        if getattr(settings, name) < 0:
            raise UserError(f"{name}={getattr(settings, name)} must not be negative.")
    if settings.workers > MOST_WORKERS:
        here = " on Windows" if sys.platform == "win32" else ""
        raise UserError(f"workers={settings.workers} must be at most {MOST_WORKERS}{here}: give about one a core.")
    if cfg.dataset == "text" and not cfg.input:
        raise UserError("dataset=text needs its files: give --input=FILES (files, folders, globs, between commas).")
    if cfg.dataset != "text" and (cfg.input or cfg.val_input):
        raise UserError(f"input and val_input belong to dataset=text, not to {cfg.dataset}: add --dataset=text.")
    for name in ("hf_config", "hf_split", "train_tokens", "val_tokens") if cfg.dataset in LOCAL_SHARE else ():
        if getattr(settings, name) != getattr(Settings, name):
            raise UserError(f"{name}={getattr(settings, name)} belongs to a Hugging Face dataset, of "
                            f"dataset={cfg.dataset} all text is taken: leave {name} out.")
    if not 0 <= settings.val_share <= 0.5:
        raise UserError(f"val_share={settings.val_share} must lie between 0 and 0.5: 0.01 holds out one percent.")
    if settings.val_share and (cfg.val_input or cfg.dataset not in LOCAL_SHARE):
        raise UserError(f"val_share={settings.val_share} holds out documents of local text: leave it out with "
                        f"{'--val_input' if cfg.val_input else 'a remote dataset and give --val_tokens'}.")
    settings.column = settings.column or ("content" if cfg.dataset == "refinedweb" else "text")
    settings.train_tokens = settings.train_tokens or cfg.max_tokens
    settings.val_tokens = settings.val_tokens or min(cfg.final_eval_tokens, cfg.max_tokens)
    settings.workers = settings.workers or min(os.cpu_count(), 32)


def prepare(cfg, settings) -> str:
    """Writes cfg.dataset in cfg.tokenizer into the folder config.data_dir(cfg), which it returns. Raises UserError."""
    check(cfg, settings)
    folder, meter = config.data_dir(cfg), Counter()
    source = open_source(cfg, settings, meter)
    if _is_complete(folder, cfg, source):
        return folder
    try:
        os.makedirs(folder, exist_ok=True)
        with _locked(folder):
            if not _is_complete(folder, cfg, source):  # another process may have finished it meanwhile
                _write_folder(folder, cfg, settings, source, meter)
    except OSError as e:  # no space, no permission
        raise UserError(f"cannot prepare {folder} ({e}): make room there, or give another --data_dir.") from None
    except BrokenExecutor:
        raise UserError("a worker process was killed (out of memory?): run again with fewer --workers.") from None
    return folder


@contextlib.contextmanager
def _locked(folder):
    """One process at a time writes a folder; the lock ends with its process. Afterwards an empty folder is removed."""
    lock = FileLock(os.path.join(folder, ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is writing {folder} at this moment: let it finish.") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.remove(lock.lock_file)
            os.rmdir(folder)
        lock.release()


def _same_tokenizer(name, identity):
    """Whether the setting `name` means the tokenizer of that identity: a file by its content, others by name."""
    if name.endswith((".model", ".json")) and os.path.isfile(name):
        return load_tokenizer(name).identity == identity
    return label(name) == name_of(identity)


def _is_complete(folder, cfg, source):
    """Whether the folder holds this source in this tokenizer, undamaged; UserError if it holds anything else."""
    if not os.path.exists(os.path.join(folder, "train.bin")):
        return False
    train, val, _ = _open_folder(folder)
    other = "text" if train.source != source.description else "tokenizer"
    if other == "text" or not _same_tokenizer(cfg.tokenizer, train.tokenizer):
        raise UserError(f"{folder} already holds another {other}, {train.source} in {train.tokenizer}: give another "
                        "--data_dir, or delete it.")
    train.verify()
    val.verify()
    print(f"{folder} is complete already: {train.count:,} + {val.count:,} tokens of {source.description}; "
          "contents and checksums agree.")
    return True


def make_tokenizer(name, parts, held_out):
    """load_tokenizer, or spm:VOCAB trained on the head of the parts."""
    if not name.startswith("spm:"):
        return load_tokenizer(name)
    with _pool(1) as child:  # whose 400 MB go with it
        blob = child.submit(train_sentencepiece, int(name[4:]), list(_sample(parts, held_out))).result()
    return tokenizer_from_blob(pinned(name, blob), blob)


def _write_folder(folder, cfg, settings, source, meter):
    start = time.monotonic()
    held_out = hold_out(source, meter)
    tokenizer = make_tokenizer(cfg.tokenizer, source.train, held_out)
    meter.clear()
    budgets = (sys.maxsize, sys.maxsize) if source.size else (settings.train_tokens, settings.val_tokens)
    new = functools.partial(TokenWriter, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.identity,
                            source=source.description)
    # val.bin is renamed first, as the inner block of the two
    with new(os.path.join(folder, "train.bin")) as train, new(os.path.join(folder, "val.bin")) as val:
        _tokenise(source, held_out, tokenizer, (train, val), budgets, settings.workers, meter)
        moved = _fill_empty_side(train, val, cfg, source, meter)
        with open(os.path.join(folder, "tokenizer.bin"), "wb") as f:
            f.write(tokenizer.blob)
            f.flush()
            os.fsync(f.fileno())
    seconds, tokens = time.monotonic() - start, train.count + val.count
    bad = f", {meter['bad']:,} bad rows skipped" if meter["bad"] else ""
    print(f"{folder}\n"
          f"  source       {source.description}\n"
          f"  documents    {meter[0]:,} train, {meter[1]:,} validation, {meter['empty']:,} empty skipped{bad}\n"
          f"  tokens       {train.count:,} train, {val.count:,} validation ({val.count / tokens:.2%})\n"
          f"  vocabulary   {tokenizer.vocab_size:,} ({tokenizer.identity})\n"
          f"  bytes/token  {meter['bytes'] / tokens:.3f}\n"
          f"  time         {seconds:.1f} s, {meter['bytes'] / MB / seconds:.1f} MB/s")
    _warn(tokenizer, tokens, moved, source, meter)


def _tokenise(source, held_out, tokenizer, writers, budgets, workers, meter):
    """Encodes the source into the writers (train, val) up to their budgets.

    Counts in meter: 0 and 1 documents of the sides, bytes of text, unknown tokens, separators inside documents.
    """
    batches = _batches(source, held_out, lambda side: writers[side].count < budgets[side], tokenizer.piece, meter)
    bar = Bar("tokenising", source.size or sum(budgets), "B" if source.size else " tokens")
    with bar, contextlib.closing(_encoded(batches, tokenizer, workers)) as encoded:
        for sides in encoded:
            for side, (ids, size) in enumerate(sides):
                room = budgets[side] - writers[side].count
                if ids.size > room:
                    ids = ids[:room]
                    size = len(tokenizer.decode_bytes(ids.tolist()))
                writers[side].write(ids)
                meter["bytes"] += size
                meter[side] += int(np.count_nonzero(ids == tokenizer.eos))
                meter["unknown"] += int(np.count_nonzero(ids == tokenizer.unknown))
            tokens = sum(writer.count for writer in writers)
            bar.show(meter["done"] if source.size else tokens, f"{meter[0] + meter[1]:,} documents, {tokens:,} tokens")
            if all(writer.count >= budget for writer, budget in zip(writers, budgets)):
                break


def _fill_empty_side(train, val, cfg, source, meter):
    """Where no document validates, the last tokens do; returns their number."""
    if not (train.count and val.count if cfg.val_input else train.count + val.count):
        bad = f", {meter['bad']:,} bad rows were skipped" if meter["bad"] else ""
        where = cfg.input if cfg.input and not train.count else cfg.val_input or cfg.dataset
        raise UserError(f"there is no text in {where}{bad}: give files that hold some.")
    if not train.count:
        val.move_tail(train, val.count)
    moved = 0 if val.count else -(-train.count // round(1 / source.share))
    if moved:
        train.move_tail(val, moved)
    return moved


def _warn(tokenizer, tokens, moved, source, meter):
    """What the numbers above do not say by themselves; moved: tokens that became validation for want of documents."""
    warnings = []
    if moved:
        warnings.append(f"no choice of documents is about {source.share:.1%} of the text, so its last {moved:,} tokens "
                        "validate: give --val_input, another --val_share, or documents that a line <|endoftext|> ends.")
    if meter["unknown"]:
        warnings.append(f"{meter['unknown']:,} of {tokens:,} tokens ({meter['unknown'] / tokens:.2%}) are unknown to "
                        f"{tokenizer.identity}: the model never sees such characters; --tokenizer=spm:VOCAB keeps all.")
    if meter["separators"]:
        warnings.append(f"{SEPARATOR.decode()} stands inside documents {meter['separators']:,} times as plain text: it "
                        "ends a document only where it is alone on a line of a .txt file.")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _open_folder(folder):
    train, val = (TokenFile(os.path.join(folder, name)) for name in ("train.bin", "val.bin"))
    if (train.tokenizer, train.source) != (val.tokenizer, val.source):
        raise UserError(f"{folder} is mixed, val.bin being {val.source} in {val.tokenizer}, train.bin {train.source}: "
                        f"{AGAIN}.")
    with config.reading(f"{folder}/tokenizer.bin", AGAIN), open(os.path.join(folder, "tokenizer.bin"), "rb") as f:
        tokenizer = tokenizer_from_blob(train.tokenizer, f.read())
    if not tokenizer.vocab_size == train.vocab_size == val.vocab_size:
        raise UserError(f"{folder} is mixed, its tokenizer has {tokenizer.vocab_size} tokens, train.bin is for "
                        f"{train.vocab_size} and val.bin for {val.vocab_size}: {AGAIN}.")
    return train, val, tokenizer


def open_data(cfg):
    """(train, val, tokenizer): two TokenFiles and the Tokenizer of the folder config.data_dir(cfg). Raises UserError.

    A folder given as data_dir is used for what it holds; in the folder named after dataset and tokenizer these must
    agree. The payload is not read: see verify_in_background.
    """
    folder = config.data_dir(cfg)
    if not os.path.exists(os.path.join(folder, "train.bin")):
        names = [name for name in ("dataset", "input", "val_input", "tokenizer", "data_dir") if getattr(cfg, name)]
        command = shlex.join(["python", "prepare.py"] + [f"--{name}={getattr(cfg, name)}" for name in names])
        raise UserError(f"{folder} holds no data: run `{command}` first.")
    train, val, tokenizer = _open_folder(folder)
    if not cfg.data_dir:
        files = describe_files(text_files(cfg.input), text_files(cfg.val_input)) if cfg.input else cfg.dataset + ": "
        if not train.source.startswith(files) or not _same_tokenizer(cfg.tokenizer, train.tokenizer):
            raise UserError(f"{folder} holds {train.source} in {train.tokenizer}, not {files.removesuffix(': ')} in "
                            f"{os.path.basename(cfg.tokenizer)}: delete it, or give another --data_dir.")
    return train, val, tokenizer


def ensure_data(cfg):
    """Prepares the standard library into its own folder where only that is missing; open_data opens what is there."""
    complete = os.path.exists(os.path.join(config.data_dir(cfg), "train.bin"))
    if cfg.dataset == "stdlib" and not cfg.data_dir and not complete:
        prepare(cfg, Settings())


def next_command(preset, folder):
    """The command that trains the preset on the folder as a new run; "" and a warning where the data are too few."""
    home = os.path.dirname(os.path.abspath(__file__))
    home = "" if home == os.getcwd() else home
    preset = preset or os.path.join(home, "config", "quickstart.py")
    plan, = config.load([preset])
    train, val, _ = _open_folder(folder)
    words, out = ["python", os.path.join(home, "train.py"), preset], plan.out_dir
    if config.data_dir(plan) != folder:
        words.append(f"--data_dir={folder}")
        out = os.path.join("out", os.path.basename(os.path.normpath(folder)))
    numbers = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    out = next(out + n for n in numbers if not os.path.exists(os.path.join(out + n, "config.json")))
    if out != plan.out_dir:
        words.append(f"--out_dir={out}")
    if 0 < plan.vocab_size < train.vocab_size:
        words.append("--vocab_size=0")
    fits = min(val.count - 1, (train.count - 1) // plan.batch_size)
    if fits < plan.block_size:
        print(f"warning: {train.count:,} training and {val.count:,} validation tokens are few for {preset} (batch_size "
              f"{plan.batch_size}, block_size {plan.block_size}): give more text, or a larger --val_share.",
              file=sys.stderr)
        words.append(f"--block_size={1 << fits.bit_length() - 1}" if fits > 0 else "")
    return shlex.join(words) if words[-1] else ""


def main(argv):
    cfg, settings = config.load(argv, Settings, usage=__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds as Ctrl-C does
    folder = prepare(cfg, settings)
    preset = next((word for word in argv if word.endswith(".py") and "=" not in word), "")
    if command := next_command(preset, folder):
        print(f"next: {command}")


if __name__ == "__main__":
    config.run(main)
