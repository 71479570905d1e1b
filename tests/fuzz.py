"""Does every reader refuse a damaged file in one sentence?  python tests/fuzz.py [WORD ...] [--files=2000] [--seed=0]

Damages small whole files, runs the command that reads them in a forked process, and prints for each reader how many
files were refused and how many were read. A fault is: a traceback or a crash; a refusal that is not status 2 and one
line of at most 400 characters, or that changed the folder; over twice the file and 100 MB more memory than the whole
file takes; over 10 seconds of the processor; code in the file that ran; damage that must be noticed and was not.
Words choose readers by their name. A case is repeated by its number: --first=N --files=1. Status 1 after a fault.
"""
import contextlib
import gzip
import io
import json
import lzma
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

import conftest  # noqa: F401, first: it limits torch's threads

import matplotlib.pyplot  # noqa: F401, once here and not in every fork
import pyarrow.parquet
import safetensors.torch  # noqa: F401
import sentencepiece  # noqa: F401
import tokenizers  # noqa: F401
import torch

import bench
import config
import corpus
import export
import sample
import tokenizer
import train

SECONDS, MB = 10, 1 << 20
TEXT = "etaoin shrdlu, the quick brown fox jumps over the lazy dog.\n"


# ----------------------------------------------------------------------------------------------------------------------
# Whole files

def make_files(folder):
    """Small whole files of every kind, in a process of its own: what it starts, as threads, is not forked."""
    os.chdir(folder)
    ids = [(i * i + 3 * i) % 256 for i in range(2000)]
    conftest.write_data(Path("data"), ids[:1600], ids[1600:])
    shape = ["--n_layer=2", "--max_tokens=256", "--ffn=lowrank", "--rank=8"]
    conftest.train_run("run", "data", *shape)
    shutil.copytree("run", "stopped")
    os.remove("stopped/model.pt")
    conftest.train_run("muon", "data", *shape, "--optimizer=muon", "--lr=0.01", "--weight_decay=auto")
    os.remove("muon/model.pt")
    for folder in ("stopped", "muon"):  # as if before the last step, so that continuing takes one
        saved = torch.load(f"{folder}/ckpt.pt")
        for state in saved["optimizer"].values():
            if "step" in state:
                state["step"].fill_(1)
        torch.save({**saved, "step": 1}, f"{folder}/ckpt.pt")
    sample.main(*sample.read_settings(["run", "--prompt=the", "--max_new_tokens=2", "--device=cpu"]))  # decode.json
    blob = tokenizer.train_sentencepiece(300, [TEXT] * 50)
    Path("some.model").write_bytes(blob)
    shutil.copytree("data", "spm")
    conftest.write_data(Path("spm"), [i % 300 for i in ids], ids[:400], tokenizer.pinned("spm:300", blob), blob, 300)
    export.main(*export.read_settings(["run", "--to=hf"]))
    Path("preset.py").write_text('"""Text."""\nn_layer = 2\nlr = 3 * 1e-4  # why\nbetas = (0.9, 0.95)\nbias = False\n')
    Path("prompts.jsonl").write_text('{"prompt": "the", "id": 1}\n{"prompt": "fox", "tags": ["a", {"b": null}]}\n')
    texts = [f"{n} {TEXT}" for n in range(40)]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    Path("text.txt").write_text("<|endoftext|>\n".join(texts))
    Path("text.txt.xz").write_bytes(lzma.compress("".join(texts).encode()))
    Path("text.jsonl").write_bytes(lines)
    Path("text.jsonl.gz").write_bytes(gzip.compress(lines))
    with pyarrow.CompressedOutputStream("text.txt.zst", "zstd") as f:
        f.write("".join(texts).encode())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": list(range(40))}), "text.parquet")
    rows = (conftest.ROOT / "docs/measured/crossover_h200.jsonl").read_text().splitlines(True)
    Path("rows.jsonl").write_text("".join(rows[:20]))


# ----------------------------------------------------------------------------------------------------------------------
# Damage: functions (rng, bytes of the whole file) -> (bytes, what was done, with a ! where it must be noticed)

ODD = [None, True, False, -1, 0, 1, 3, 0.5, 1 << 20, 10**9, 10**12, 1 << 64, -1 << 63, 10**30, 1e300, float("nan"),
       float("inf"), "", "x", "1", "nan", "../../etc/passwd", "x" * 5000, "\x1b[31m\nTwo\nlines", "\ud800", [], {}, [0],
       [1, 2, 3], {"a": 1}, [[[[[]]]]], ["x"] * 50, {"1": [1, 2]}]


def flip(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data), "bits flipped"


def truncate(rng, data):
    at = rng.choice((0, 1, 4, len(data) - 1, rng.randrange(len(data))))
    return data[:at], f"truncated to {at}"


def blank(rng, data):
    at, n = rng.randrange(len(data)), rng.choice((1, 4, 64, 1024))
    return data[:at] + bytes(len(data[at:at + n])) + data[at + n:], f"{n} zeros at {at}"


def insert(rng, data):
    at, n = rng.choice((0, len(data), rng.randrange(len(data)))), rng.choice((1, 16, 4096))
    return data[:at] + rng.randbytes(n) + data[at:], f"{n} bytes put in at {at}"


def swap(rng, data):
    n = max(1, len(data) // 4)
    a = rng.randrange(len(data) - n)
    b = rng.randrange(len(data) - n)
    new = bytearray(data)
    new[a:a + n], new[b:b + n] = data[b:b + n], data[a:a + n]
    return bytes(new), "blocks swapped"


BYTES = (flip, flip, truncate, blank, insert, swap)


def slots(value):
    """(container, key) of every value inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from slots(inner)


def alter(rng, value):
    """Puts another value, type or name somewhere inside `value` -> what was done."""
    box, key = rng.choice(list(slots(value)))
    how = rng.choice(("odd", "odd", "odd", "drop", "add", "exchange"))
    if how == "drop":
        del box[key]
    elif how == "add":
        box[rng.choice(("x", "", "x" * 999)) if isinstance(box, dict) else slice(0, 0)] = [rng.choice(ODD)]
    elif how == "exchange":
        other, place = rng.choice(list(slots(value)))
        box[key], other[place] = other[place], box[key]
    else:
        box[key] = rng.choice(ODD)
        how = f"{str(box[key])[:40]!a}"
    return f"{key}: {how}"


def in_json(rng, data):
    """A JSON file with one value changed, or with what no writer makes."""
    value = json.loads(data)
    if rng.random() < 0.1:
        return rng.choice((b"[" * 200_000, b'{"a":' * 50_000, b"9" * 10_000, b"NaN", b"null", b"[]", b'"x"', b"\xff",
                           b"[" + b"{}," * 300_000 + b"{}]")), "other JSON"
    done = alter(rng, value)
    return json.dumps(value, indent=1).encode(), done


def in_lines(rng, data):
    """JSON lines of which one is changed."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at], done = in_json(rng, lines[at])
    lines[at] = json.dumps(json.loads(lines[at])).encode() if "other" not in done else lines[at]
    return b"\n".join(lines) + b"\n", f"line {at}: {done}"


def in_header(rng, data):
    """A token file whose header has a wrong field and the checksum that belongs to it."""
    fields, was = json.loads(data[21:4096]), data[21:4096]
    done = alter(rng, fields)
    body = (was if rng.random() < 0.02 else json.dumps(fields).encode()).ljust(4096 - 21)[:4096 - 21]
    if rng.random() < 0.1:
        body, done = rng.choice((b"[" * 4075, b"9" * 4075, b"\xff" * 4075, b"{}".ljust(4075))), "a body of its own"
    return b"tokenfile 1 %08x " % zlib.crc32(body) + body + data[4096:], f"header, {done}"


def in_safetensors(rng, data):
    """A header with one value changed, and the length that belongs to it or another."""
    size, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + size])
    done = alter(rng, header)
    text = json.dumps(header).encode()
    length = rng.choice((len(text), len(text), len(text), 0, 1 << 40, len(text) + 8))
    return struct.pack("<Q", length) + text + data[8 + size:], f"header, {done}"


PRESETS = ("n_layer = " + "-" * 5000 + "1", "n_layer = " + "(" * 5000 + "1" + ")" * 5000, "n_layer = 0x" + "f" * 9000,
           "n_layer = " + "+".join("1" * 20000), "lr = 9.0 ** 64 ** 64", "n_layer = {[]: 1}", "n_layer = 10 ** 9",
           "betas = (0.9,) * 10**9", "n_embd = 2 ** 50", "vocab_size = 2 ** 31", "import os\nos.system('touch canary')",
           "n_layer = __import__('os').system('touch canary')", "lr = 1 / 0", "lr = 1j", "lr = (-8) ** 0.5",
           "betas = " + "[" * 5000, "out_dir = '" + "x" * 10000 + "'", "n_layer = \x00", "n_layer: int = 3",
           "n_layer = " + "{1:" * 300 + "1" + "}" * 300, "x" * 3000 + " = 1", "block_size = 10 ** 12", "n_head = 7",
           "betas = ('" + "y" * 3000 + "', 1)", "betas = {1, 2}", "lr = -" + "9" * 5000, "n_layer = 'a' 'b'")
VALUES = ("{[]:1}", "[" * 5000, "-" * 5000 + "1", "0x" + "f" * 9000, "9" * 9000, "1e999", "nan", "\x00", "{}", "()",
          "1j", "b''", "...", "'", "10**9", "1000000000", "x" * 3000, "[[]]*9", "{1:2}", "\udcff")


def in_preset(rng, data):
    return data + rng.choice(PRESETS).encode() + b"\n", "a line of its own"


def in_argument(rng, data):
    """The settings are no file, but a script may pass them on from one."""
    name = rng.choice(("n_layer", "lr", "betas", "bias", "seed", "norm"))
    return os.fsencode(f"--{name}={rng.choice(VALUES)}"), "a value"


# ----------------------------------------------------------------------------------------------------------------------
# Damage inside a checkpoint whose checksums are right

OTHERS = {
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "float8": lambda t: t.float().to(torch.float8_e4m3fn),
    "int64": lambda t: torch.ones_like(t, dtype=torch.long),
    "uint8": lambda t: torch.ones_like(t, dtype=torch.uint8),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "NaN": lambda t: torch.full_like(t.float(), torch.nan),
    "inf": lambda t: torch.full_like(t.float(), torch.inf),
    "one -inf": lambda t: torch.where(torch.arange(t.numel()).view(t.shape) == 0, -torch.inf, t.float()),
    "negative": lambda t: -t.float().abs() - 1,
    "negated": lambda t: torch._neg_view(t.float()),
    "sparse": lambda t: torch.eye(3).to_sparse(),
    "gradient": lambda t: t.float().clone().requires_grad_(),
    "parameter": lambda t: torch.nn.Parameter(t.float().clone()),
    "meta": lambda t: torch.empty(1 << 40, device="meta"),
    "stride 0": lambda t: torch.zeros((), dtype=t.dtype).expand(t.shape),
    "huge, stride 0": lambda t: torch.zeros((), dtype=t.dtype).expand(1 << 33),
    "overlap": lambda t: torch.zeros(400).as_strided(t.shape, (1,) * t.dim()),
    "turned": lambda t: t.t() if t.dim() == 2 else t.reshape(-1)[::2],
    "one less": lambda t: t.reshape(-1)[:-1].clone(),
    "empty": lambda t: t.reshape(-1)[:0].clone(),
    "scalar": lambda t: t.reshape(-1)[:1].sum(),
    "one dimension": lambda t: t.reshape(-1).clone(),
    "larger": lambda t: torch.zeros(1000, 1000)}
# In the place of a weight of the same shape these are weights too
WEIGHTS = {"float64", "bfloat16", "negative", "stride 0", "overlap", "turned", "one dimension", "scalar"}


def one_tensor(rng, t):
    """(another tensor in the place of t, its name)"""
    name = rng.choice(sorted(OTHERS))
    return OTHERS[name](t), name


def laughs(n=40):
    """A dict of 2^n leaves out of n dicts."""
    value = {"x": 1}
    for _ in range(n):
        value = {"a": value, "b": value}
    return value


def resaved(saved):
    out = io.BytesIO()
    torch.save(saved, out)
    return out.getvalue()


def in_moments(rng, data):
    """A ckpt.pt with a wrong tensor in the optimizer's state, or without one."""
    saved = torch.load(io.BytesIO(data), weights_only=True)
    name = rng.choice(sorted(saved["optimizer"]))
    state = saved["optimizer"][name]
    key = rng.choice(sorted(state))
    was, (state[key], how) = state[key], one_tensor(rng, state[key])
    new = state[key]
    fine = how in WEIGHTS and (new.dtype, new.shape) == (was.dtype, was.shape) and (new.min() >= 0 or "sq" not in key)
    return resaved(saved), f"{'' if fine else '!'}{name}.{key}: {how}"


def in_checkpoint(rng, data):
    """A model.pt or ckpt.pt with one value changed, saved anew."""
    saved = torch.load(io.BytesIO(data), weights_only=True)
    places = [place for place in slots(saved) if torch.is_tensor(place[0][place[1]])]
    how = rng.choice(("tensor", "tensor", "tensor", "name", "config", "config", "odd", "shared", "size", "odd state"))
    box, key = rng.choice([place for place in places if place[0] is saved["model"]] if how == "name" else places)
    if how == "tensor":
        was, (box[key], how) = box[key], one_tensor(rng, box[key])
        must = box is saved["model"] and (how not in WEIGHTS or box[key].shape != was.shape)
        must = must and (key, box[key].dtype) != ("wte.weight", torch.float32)  # the head counts
        how = f"{'!' * must}{key}: {how}"
    elif how == "name":
        how = "!name"
        box[rng.choice(("x", key + ".x", 7, None, ("a",)))] = box.pop(key)
    elif how == "config":
        how = f"config, {alter(rng, saved['config'])}"
    elif how == "size":
        name = rng.choice(("n_layer", "n_embd", "ffn_dim", "vocab_size", "block_size", "n_head", "rank", "max_tokens"))
        saved["config"][name] = rng.choice((10**5, 10**7, 10**9, 10**12, 1 << 62, 1 << 64, 10**30, 1.5, True))
        how = f"{'!' * (name not in ('max_tokens', 'block_size'))}{name}={saved['config'][name]}"
    elif how == "odd":
        top = rng.choice(sorted(saved))
        saved[top] = rng.choice([*ODD, laughs(), torch.zeros(3), 10**9, 10**12])
        how = f"{top}: {str(type(saved[top]))}"
    elif how == "odd state":
        state = saved.get("optimizer", saved["tokenizer"])
        inner = state[rng.choice(sorted(state))] if rng.random() < 0.7 else state
        inner = inner if isinstance(inner, dict) and inner else state
        name = rng.choice(sorted(inner))
        inner[name] = rng.choice([*ODD, laughs(), torch.tensor(-3.0), torch.tensor(torch.nan), torch.zeros(4096)])
        if rng.random() < 0.3:
            del inner[name]
        how = f"state {name}"
    else:
        one = torch.zeros(max(t[0][t[1]].numel() for t in places))
        for box, key in places:
            if box[key].is_floating_point():
                box[key] = one[:box[key].numel()].view(box[key].shape)
    return resaved(saved), how


class Payload:
    """What a malicious pickle does when it is loaded without care."""

    def __reduce__(self):
        return os.system, ("touch canary",)


def pickles(rng):
    return rng.choice((
        pickle.dumps(Payload(), 2), pickle.dumps({"model": Payload(), "config": {}, "tokenizer": {}}, 2),
        b"\x80\x02" + b"]" * 900_000 + b".", b"\x80\x02" + b"(" * 900_000 + b".",
        b"\x80\x02]" + b"q\x00h\x00a" * 50_000 + b".",
        b"\x80\x02cposix\nsystem\nX\x0c\x00\x00\x00touch canary\x85R.",
        b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.", b"\x80\x02X\xff\xff\xff\x7fx.",
        b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", b".", b"",
        pickle.dumps([[]] * 100_000, 2), pickle.dumps(laughs(), 2), pickle.dumps(10**600, 2)))


def in_archive(rng, data):
    """The parts of a checkpoint in another archive, which torch would read."""
    out, must = io.BytesIO(), False
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = [(part.filename, archive.read(part)) for part in archive.infolist()]
    how = rng.choice(("all deflated", "pickle deflated", "weights deflated", "another pickle", "another pickle",
                      "a part less", "a part twice", "bomb", "short part", "long part", "many parts", "stored anew"))
    if how == "another pickle":
        parts = [(name, pickles(rng) if name.endswith("data.pkl") else part) for name, part in parts]
    elif how == "a part less":
        del parts[rng.randrange(len(parts))]
    elif how == "a part twice":
        parts.append(rng.choice(parts))
    elif how == "bomb":
        parts = [(name, bytes(300 * MB) if name.endswith("data.pkl") else part) for name, part in parts]
    elif how in ("short part", "long part"):
        at = rng.randrange(len(parts))
        must = how == "short part" and "/data/" in parts[at][0] and len(parts[at][1]) > 3
        parts[at] = parts[at][0], parts[at][1][:3] if how == "short part" else parts[at][1] + bytes(1000)
    elif how == "many parts":
        parts += [(f"archive/x{n}", b"") for n in range(60_000)]
    deflated = {"all deflated": "", "pickle deflated": "data.pkl", "weights deflated": "data/", "bomb": "data.pkl"}
    deflated = deflated.get(how, "none")
    with zipfile.ZipFile(out, "w") as archive:
        for name, part in parts:
            with contextlib.suppress(UserWarning):
                kind = zipfile.ZIP_DEFLATED if deflated in name else zipfile.ZIP_STORED
                archive.writestr(name, part, kind)
    must = must or "deflated" in how or how in ("another pickle", "bomb")
    return out.getvalue(), f"{'!' * must}archive, {how}"


def in_persistent(rng, data):
    """The data.pkl of a checkpoint with a byte changed, in an archive whose checksums are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w") as new:
        for part in archive.infolist():
            content = archive.read(part)
            new.writestr(part.filename, flip(rng, content)[0] if part.filename.endswith("data.pkl") else content)
    return out.getvalue(), "pickle, bits flipped"


def in_model_file(rng, data):
    """A sentencepiece model with a field of a message changed: fields are (tag, varint) or (tag, length, bytes)."""
    at, n = rng.randrange(len(data)), rng.randrange(1, 9)
    new = rng.choice((data[:at] + b"\xff" * n + data[at + n:], data[:at] + data[at + n:], data + data[:at], data[at:],
                      data[:at] + b"\x0a\x00" * 1000 + data[at:], data + b"\x1a\x07\x12\x05" + rng.randbytes(5)))
    return new, "fields changed"


def in_xz(rng, data):
    """An archive that wants a dictionary of 4 GB, or expands to a thousand times its size."""
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    small = bytearray(lzma.compress(b"x" * 100, filters=filters))
    at = small.index(b"\x21\x01") + 2
    small[at] = 40
    header = bytes(small[12:12 + (small[12] + 1) * 4 - 4])
    small[12:12 + len(header) + 4] = header + struct.pack("<I", zlib.crc32(header))
    return rng.choice((bytes(small), data + bytes(small), data + bytes(4), data + b"x")), "another archive"


# ----------------------------------------------------------------------------------------------------------------------
# Readers

class Reader(NamedTuple):
    name: str
    file: str                            # that is damaged
    run: Callable                        # what reads it, as a command
    damage: tuple
    why: str                             # why a damaged file may be read with another result; "": it may not


def sampled(*more):
    return lambda: sample.main(*sample.read_settings([*more, "--prompt=the", "--max_new_tokens=3", "--device=cpu"]))


def trained(*argv):
    return lambda: train.main(*config.load([*argv], train.Settings))


def benched(*argv):
    return lambda: bench.main(*bench.read_settings([*argv]))


def tokenised(path):
    return lambda: print(tokenizer.load_tokenizer(path).encode(TEXT))


def read_corpus(path):
    return lambda: print(list(corpus.text_documents(path, "text", Counter())))


def imported():
    model, cfg, saved = export.read_hf("hf")
    print(sum(p.abs().sum() for p in model.parameters()), cfg, saved["tokenizer"]["identity"])
    tokenizer.saved_tokenizer(saved["tokenizer"], cfg.vocab_size).encode(TEXT)


def opened(folder):
    def read():
        cfg, = config.load([f"--data_dir={folder}", "--block_size=16", "--batch_size=4", "--micro_batch_size=4"])
        data = train.open_data(cfg)
        for file in (data.train, data.val):
            file.verify()
            print(file.count, file.checksum)
        print(data.tokenizer.encode(TEXT))
    return read


ARCHIVE = (in_checkpoint, in_checkpoint, in_checkpoint, in_archive, in_persistent, *BYTES)
RUN, JSON, LINES = (*ARCHIVE, *[in_moments] * 4), (in_json, in_json, in_json, *BYTES), (in_lines, in_lines, *BYTES)
VALUE, WEIGHT = "another value of the right kind", "outside what is read, or other finite weights and settings that fit"
READERS = (
    Reader("model", "run/model.pt", sampled("run", "--decode=structured"), ARCHIVE, WEIGHT),
    Reader("continue", "stopped/ckpt.pt", trained("--resume=auto", "--out_dir=stopped"), RUN, WEIGHT),
    Reader("continue-muon", "muon/ckpt.pt", trained("--resume=auto", "--out_dir=muon"), RUN, WEIGHT),
    Reader("unfinished", "stopped/ckpt.pt", sampled("stopped", "--decode=structured"), ARCHIVE, WEIGHT),
    Reader("config", "run/config.json", benched("curves", "run"), JSON, VALUE),
    Reader("metrics", "run/metrics.jsonl", benched("curves", "run"), LINES, "an odd row of a log is left out, counted"),
    Reader("decode", "run/decode.json", sampled("run"), JSON, VALUE + ", or a table for another card"),
    Reader("train.bin", "data/train.bin", opened("data"), (in_header, in_header, *BYTES), ""),
    Reader("val.bin", "data/val.bin", opened("data"), (in_header, in_header, *BYTES), ""),
    Reader("tokenizer.bin", "spm/tokenizer.bin", opened("spm"), BYTES, ""),
    Reader("spm.model", "some.model", tokenised("some.model"), (in_model_file, *BYTES), "other pieces or scores"),
    Reader("tokenizer.json", "hf/tokenizer.json", tokenised("hf/tokenizer.json"), JSON, VALUE),
    Reader("hf-config", "hf/config.json", imported, JSON, VALUE),
    Reader("safetensors", "hf/model.safetensors", imported, (in_safetensors, *BYTES), "the format has no checksum"),
    Reader("preset", "preset.py", lambda: print(config.load(["preset.py"])), (in_preset, in_preset, *BYTES), VALUE),
    Reader("argument", "argument", lambda: print(config.load([os.fsdecode(Path("argument").read_bytes())])),
           (in_argument,), VALUE),
    Reader("prompts", "prompts.jsonl", lambda: print(sample.read_settings(["run", "--prompts=prompts.jsonl"])), LINES,
           "another prompt"),
    Reader("rows", "rows.jsonl", benched("plot", "rows.jsonl", "--plot=picture.png"), LINES, VALUE),
    Reader("txt", "text.txt", read_corpus("text.txt"), BYTES, "other text"),
    Reader("xz", "text.txt.xz", read_corpus("text.txt.xz"), (in_xz, *BYTES), ""),
    Reader("zst", "text.txt.zst", read_corpus("text.txt.zst"), BYTES, "the format's checksum is optional"),
    Reader("jsonl", "text.jsonl", read_corpus("text.jsonl"), LINES, "other text"),
    Reader("gz", "text.jsonl.gz", read_corpus("text.jsonl.gz"), BYTES, ""),
    Reader("parquet", "text.parquet", read_corpus("text.parquet"), BYTES, "the format's checksums are optional"))


# ----------------------------------------------------------------------------------------------------------------------
# One case

def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*")
            if p.is_file() and p.name != ".lock"}


def peak():
    """Bytes of memory of this process at most since reset_peak()."""
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))


def child(reader, folder):
    """Runs the command in this forked process, which ends here."""
    status = 3
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(12 * SECONDS)  # of a busy machine
        resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))  # a fault must not take the machine's memory
        os.chdir(folder)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (open(number, "w", errors="backslashreplace", closefd=False) for number in (1, 2))
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = peak()
        try:
            config.run(lambda argv: reader.run())
            status = 0
        except SystemExit as e:
            status = e.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 1
        Path(f"{folder}.peak").write_text(str(peak() - before))
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(status)


class Result(NamedTuple):
    status: int
    out: str
    err: str
    memory: int
    seconds: float


def attempt(reader, folder) -> Result:
    began, pid = time.monotonic(), os.fork()
    if not pid:
        child(reader, folder)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out, err = (Path(f"{folder}.{name}").read_text(errors="replace") for name in ("out", "err"))
    memory = Path(f"{folder}.peak")
    return Result(status, out, err, int(memory.read_text()) if memory.exists() else 0, time.monotonic() - began)


def fault(reader, result, whole, size, before, after, must):
    """What is wrong with a result, "" where nothing is; whole: the result of the undamaged file."""
    if result.status < 0:
        name = signal.Signals(-result.status).name
        return "endless" if name in ("SIGALRM", "SIGPROF") else f"killed by {name}"
    if result.status not in (0, 2):
        return f"status {result.status}: {result.err.strip().splitlines()[-1:]}"
    if result.memory > whole.memory + 2 * size + 100 * MB:
        return f"takes {result.memory // MB} MB"
    if "canary" in after:
        return "executed"
    if result.status == 2:
        line = result.err.strip("\n").rpartition("\nerror: ")[2].removeprefix("error: ")
        if "error: " not in result.err or "\n" in line or len(line) > 400 or not line.endswith((".", "?", ")")):
            return f"not a sentence: {line[:100]} ({len(line)})"
        if before != after:
            return f"changed {sorted(set(before.items()) ^ set(after.items()))[0][0]}"
    elif must or not reader.why and size and result.out != whole.out:
        return "read, as if nothing had happened"
    return ""


def fuzz(files, seed=0, words=(), first=0):
    """Yields (reader, number, damage, Result, fault) of every case."""
    with tempfile.TemporaryDirectory() as temp:
        clean = Path(temp, "clean")
        clean.mkdir()
        pid = os.fork()
        if not pid:
            code = 1
            try:
                with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
                    make_files(clean)
                (clean / "argument").write_text("--n_layer=3")
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0, "the whole files could not be made"
        readers = [r for r in READERS if not words or r.name in words]
        whole = {}
        for reader in readers:
            work = Path(shutil.copytree(clean, Path(temp, "work")))
            whole[reader.name] = attempt(reader, work)
            assert whole[reader.name].status == 0, (reader.name, whole[reader.name])
            shutil.rmtree(work)
        for number in range(first, first + files):
            reader = readers[number % len(readers)]
            rng = random.Random(f"{seed} {number}")
            work = Path(shutil.copytree(clean, Path(temp, "work")))
            path = work / reader.file
            data, damage = rng.choice(reader.damage)(rng, path.read_bytes())
            path.write_bytes(data)
            before = contents(work)
            result = attempt(reader, work)
            wrong = fault(reader, result, whole[reader.name], len(data), before, contents(work), damage.startswith("!"))
            yield reader, number, damage, result, wrong
            shutil.rmtree(work)


def main(words, files=2000, seed=0, first=0, verbose=False):
    counts, began = Counter(), time.monotonic()
    for reader, number, damage, result, wrong in fuzz(files, seed, words, first):
        counts[reader.name, "fault" if wrong else result.status] += 1
        if wrong or verbose:
            print(f"{reader.name} {number} ({damage}): {wrong or result.err[-300:].strip() or 'read'}", flush=True)
        if wrong and verbose:
            print(result.err)
    print(f"{'':16}refused   read faults  read are")
    for reader in READERS:
        if any((reader.name, kind) in counts for kind in (0, 2, "fault")):
            numbers = "".join(f"{counts[reader.name, kind]:7}" for kind in (2, 0, "fault"))
            print(f"{reader.name:16}{numbers}  {reader.why or 'the same result, or of an empty file'}")
    total = [sum(n for (_, kind), n in counts.items() if kind == want) for want in (2, 0, "fault")]
    print(f"{'all':16}{''.join(f'{n:7}' for n in total)}  in {time.monotonic() - began:.0f} s")
    return bool(total[2])


if __name__ == "__main__":
    given = dict(arg.removeprefix("--").partition("=")[::2] for arg in sys.argv[1:] if arg.startswith("--"))
    words = [arg for arg in sys.argv[1:] if not arg.startswith("--")]
    numbers = {name: int(value) for name, value in given.items() if name != "verbose"}
    sys.exit(main(words, **numbers, verbose="verbose" in given))
