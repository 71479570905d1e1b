"""prepare.py: token files, tokenizers, sources, the split, workers, interruption, memory, the command line."""
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
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config
import prepare
from config import Config, UserError
from prepare import Settings, TokenFile, TokenWriter


# ----------------------------------------------------------------------------------------------------------------------
# Helpers

def words(seed, n):
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("aeioubdkmnrst", k=rng.randrange(2, 9))) for _ in range(n))


def corpus(n=300, seed=0):
    return [f"{words(seed + i, 12)}.\n{words(seed - i, 9)} é 中 {i}\n" for i in range(n)]


def write_corpus(path, documents):
    path.write_text("".join(d + "<|endoftext|>\n" for d in documents), encoding="utf-8", newline="")
    return path


def make(tmp_path, folder="data", **values):
    """Prepares with the given Config and Settings fields; the folder's (train, val, tokenizer)."""
    settings = {f: values.pop(f) for f in list(values) if hasattr(Settings(), f)}
    cfg = Config(**{"dataset": "text", "tokenizer": "byte", "data_dir": str(tmp_path / folder), **values})
    prepare.prepare(cfg, Settings(**{"workers": 2, **settings}))
    return prepare.open_data(cfg)


def command(*args, **kwargs):
    return subprocess.run([sys.executable, str(ROOT / "prepare.py"), *map(str, args)], capture_output=True, text=True, timeout=60, **kwargs)


def documents_of(tokens, tokenizer):
    """Splits at EOS and decodes: the oracle for what a token file holds."""
    ids = tokens.tolist()
    ends = [i for i, t in enumerate(ids) if t == tokenizer.eos]
    return [tokenizer.decode(ids[a + 1:b]) for a, b in zip([-1] + ends, ends)]


def write_tokens(path, ids, vocab_size=257):
    with TokenWriter(str(path), vocab_size, "byte", "test: words") as writer:
        writer.write(ids)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Token files

@pytest.mark.parametrize("vocab_size, width", [(257, 2), (65536, 2), (65537, 4), (200_000, 4)])
def test_token_file_round_trip(tmp_path, vocab_size, width):
    ids = np.random.default_rng(0).integers(0, vocab_size, 10_001)
    ids[:2] = 0, vocab_size - 1
    path = tmp_path / "x.bin"
    with TokenWriter(str(path), vocab_size, "name@12", "here: there") as writer:
        for part in np.array_split(ids, 7):
            writer.write(part)
        writer.write([])
        assert not path.exists()
    raw = path.read_bytes()
    assert raw[:10] == b"tokenfile " and len(raw) == 4096 + width * len(ids)
    assert list(struct.unpack_from(f"<5{'H' if width == 2 else 'I'}", raw, 4096)) == ids[:5].tolist()
    f = TokenFile(str(path))
    f.verify()
    assert (f.vocab_size, f.tokenizer, f.source, f.count, f.checksum) == (vocab_size, "name@12", "here: there", 10_001, zlib.crc32(raw[4096:]))
    assert f.tokens.dtype == np.dtype(f"<u{width}") and f.tokens.tolist() == ids.tolist()
    with pytest.raises(ValueError):
        f.tokens[0] = 1
    assert os.listdir(tmp_path) == ["x.bin"]


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    for ids in ([1, 257], [-1], [70_000], np.array([2 ** 40])):
        with pytest.raises(UserError, match="vocabulary of 257"):
            write_tokens(tmp_path / "x.bin", ids)
    assert os.listdir(tmp_path) == []


def test_nothing_is_left_of_a_failed_writer(tmp_path):
    path = write_tokens(tmp_path / "x.bin", [1, 2, 3])
    with pytest.raises(RuntimeError), TokenWriter(str(path), 257, "byte", "other") as writer:
        writer.write([4] * 1000)
        raise RuntimeError
    assert TokenFile(str(path)).tokens.tolist() == [1, 2, 3] and os.listdir(tmp_path) == ["x.bin"]


def test_a_second_writer_is_refused_and_a_dead_ones_file_taken_over(tmp_path):
    path = tmp_path / "x.bin"
    with TokenWriter(str(path), 257, "byte", "a") as first:
        with pytest.raises(UserError, match="another process is writing"):
            TokenWriter(str(path), 257, "byte", "b")
        first.write([7])
    (tmp_path / "y.bin.tmp").write_bytes(b"x" * 10_000)
    assert TokenFile(str(path)).tokens.tolist() == [7]
    assert TokenFile(str(write_tokens(tmp_path / "y.bin", [5]))).tokens.tolist() == [5]
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "y.bin"]


def damaged(raw, kind):
    head = raw[:4096]
    return {"cut": raw[:-3], "header cut": raw[:1000], "longer": raw + b"xx", "empty": b"", "foreign": b"\x93NUMPY" + raw[6:],
            "newer": raw.replace(b"tokenfile 1 ", b"tokenfile 2 ", 1), "count": head.replace(b'"count": 500', b'"count": 900') + raw[4096:],
            "garbled": head[:40] + b"\0" * 30 + raw[70:]}[kind]


@pytest.mark.parametrize("kind, sentence", [
    ("cut", r"truncated: its 500 tokens take 5096 bytes, the file has 5093"), ("header cut", "truncated.*4096 bytes, the file has 1000"),
    ("longer", "too long"), ("empty", "not a token file"), ("foreign", "not a token file"), ("newer", "version 2.*up to 1"),
    ("count", "damaged header"), ("garbled", "damaged header")])
def test_opening_says_what_is_wrong(tmp_path, kind, sentence):
    path = write_tokens(tmp_path / "x.bin", np.arange(500) % 257)
    path.write_bytes(damaged(path.read_bytes(), kind))
    with pytest.raises(UserError, match=sentence) as e:
        TokenFile(str(path))
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_missing_file_and_damaged_payload(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        TokenFile(str(tmp_path / "none.bin"))
    path = write_tokens(tmp_path / "x.bin", np.arange(5000) % 257)
    raw = bytearray(path.read_bytes())
    raw[6001] ^= 1
    path.write_bytes(raw)
    f = TokenFile(str(path))  # the size is right
    with pytest.raises(UserError, match="damaged: its checksum"):
        f.verify()


def test_verify_finds_ids_outside_the_vocabulary(tmp_path):
    path = write_tokens(tmp_path / "x.bin", [1, 256, 3])
    f = TokenFile(str(path))
    f.vocab_size = 256
    with pytest.raises(UserError, match="token id 256"):
        f.verify()


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers

ODD = ["", " ", "  a  ", "\n\n \n", "\ta\t\tb", "\r\n", "a\x00b", "▁ a▁▁b", "▅x", "😀é\u0301", "<unk></s><s><0x0A><|endoftext|>",
       "\ufeffa\u200b\u2028", "\ufffd\uffff", "x" * 1000 + "▁" + "y " * 50, "中文 テキスト", "self.x  =  {1234567: 'a'}\n        return\n"]


@pytest.fixture(scope="session")
def stdlib(tmp_path_factory):
    """The default data set, its Config, and its texts read independently."""
    cfg = Config(data_dir=str(tmp_path_factory.mktemp("stdlib") / "data"), tokenizer="spm:2048")
    prepare.prepare(cfg, Settings())
    root = Path(os.__file__).parent
    unwanted = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    texts = []
    for path in root.rglob("*.py"):
        if not unwanted & set(path.relative_to(root).parts):
            data = path.read_bytes()
            cookie = re.search(rb"^#.*?coding[:=][ \t]*([-\w.]+)", b"\n".join(data.split(b"\n")[:2]), re.M)
            texts.append(data.decode(cookie[1].decode() if cookie else "utf-8-sig"))
    return cfg, texts


def test_stdlib_round_trips_exactly_through_spm(stdlib):
    cfg, texts = stdlib
    train, val, tokenizer = prepare.open_data(cfg)
    train.verify(), val.verify()
    assert tokenizer.vocab_size == train.vocab_size == 2048 and tokenizer.identity.startswith("spm:2048@")
    assert sorted(documents_of(train.tokens, tokenizer) + documents_of(val.tokens, tokenizer)) == sorted(t for t in texts if t.strip())
    size = sum(len(t.encode()) for t in texts)
    assert 2.3 < size / (train.count + val.count) < 4.5 and 0.001 < val.count / train.count < 0.05


@pytest.mark.parametrize("text", ODD)
def test_every_text_round_trips(stdlib, text):
    spm = prepare.open_data(stdlib[0])[2]
    for tokenizer in (spm, prepare.load_tokenizer("byte")):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eos not in ids and all(0 <= i < tokenizer.vocab_size for i in ids)
        assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()
        assert tokenizer.decode(ids + [tokenizer.eos]) == text


def test_spm_encodes_word_by_word_what_sentencepiece_encodes_whole(stdlib):
    import sentencepiece
    tokenizer = prepare.open_data(stdlib[0])[2]
    whole = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.blob)
    rng = random.Random(0)
    parts = ["a", " ", "  ", "\n", "\t", "the", "    ", "self", ":", "é", "1", "😀", "\x00", "\r\n", "x" * 40, "<0x0A>", "</s>"]
    for text in ["".join(rng.choices(parts, k=rng.randrange(40))) for _ in range(500)] + [t[:20_000] for t in stdlib[1][:100]]:
        assert tokenizer.encode(text) == whole.encode(text)


def test_spm_learns_line_ends_and_indentation(stdlib):
    table = prepare.open_data(stdlib[0])[2].table
    assert {b"\n", b" " * 4, b" " * 8} <= set(table) and any(b"\n" in piece and len(piece) > 1 for piece in table)


def test_blobs_rebuild_tokenizers(stdlib, tmp_path):
    tokenizer = prepare.open_data(stdlib[0])[2]
    again = prepare.tokenizer_from_blob(tokenizer.identity, tokenizer.blob)
    assert (again.encode(ODD[-1]), again.eos, again.table) == (tokenizer.encode(ODD[-1]), tokenizer.eos, tokenizer.table)
    with pytest.raises(UserError, match="damaged"):
        prepare.tokenizer_from_blob(tokenizer.identity, tokenizer.blob[:-1] + b"?")
    (tmp_path / "my.model").write_bytes(tokenizer.blob)
    by_path = prepare.load_tokenizer(str(tmp_path / "my.model"))
    assert by_path.identity == "my.model@" + hashlib.sha256(tokenizer.blob).hexdigest()[:12]
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="bad.model is not a sentencepiece model"):
        prepare.load_tokenizer(str(tmp_path / "bad.model"))


def test_gpt2_from_ranks_merges_by_rank():
    table = [bytes([i]) for i in range(256)] + [b"th", b" t", b"the", b" the"]
    tokenizer = prepare.tokenizer_from_blob("gpt2", "\n".join(t.hex() for t in table).encode())
    assert (tokenizer.vocab_size, tokenizer.eos) == (261, 260)
    assert tokenizer.encode("the then tho") == [258, 259, 110, 32, 256, 111]  # th before " t"; a word is taken with its space
    assert tokenizer.encode("<|endoftext|>") == list(b"<|endoftext|>")
    for text in ODD:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_foreign_sentencepiece_model_is_taken_as_it_is():
    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus()), model_writer=model, vocab_size=600, model_type="bpe",
                                             byte_fallback=True, minloglevel=3)  # a dummy prefix and a BOS, as LLaMA's has
    tokenizer = prepare.tokenizer_from_blob("llama", model.getvalue())
    whole = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert tokenizer.encode("bad <s> mood") == whole.encode("bad <s> mood") and tokenizer.eos == whole.eos_id()
    assert tokenizer.decode(tokenizer.encode("bad\nmood 中")) == " " + whole.decode(whole.encode("bad\nmood 中"))


# ----------------------------------------------------------------------------------------------------------------------
# Sources

@pytest.mark.parametrize("suffix, opener", [(".txt", open), (".txt.xz", lzma.open), (".txt.gz", gzip.open)])
def test_text_files(tmp_path, suffix, opener):
    docs = ["one\r\n", "\ufefftwo\n\n", " \n\t\n", "", "a <|endoftext|> b\n<|endoftext|> \n", "last without line end"]
    with opener(tmp_path / f"a{suffix}", "wb") as f:
        f.write(b"\xef\xbb\xbf" + "<|endoftext|>\n".join(docs[:-1]).encode() + b"<|endoftext|>\r\n" + docs[-1].encode())
    found = [text.decode() for text, last in prepare.text_documents(str(tmp_path / f"a{suffix}"), "", Counter()) if last]
    assert found == docs


@pytest.mark.parametrize("longest", [4, 5, 6, 7, 8, 50])
def test_text_lines(longest):
    text = "\ufeffone\rtwo é中😀\r\n\n \n" + "é中😀" * 20 + "\n\r\r\nlast \ufeff"
    lines = list(config.text_lines(io.BytesIO(text.encode()), "x", longest))
    assert [number for number, line in lines if line.endswith(b"\n")] == [1, 2, 3, 4, 5]
    joined = {number: b"".join(part for n, part in lines if n == number).decode() for number, _ in lines}
    assert list(joined.values()) == ["one\rtwo é中😀\r\n", "\n", " \n", "é中😀" * 20 + "\n", "\r\r\n", "last \ufeff"]
    assert max(len(line) for _, line in lines) <= longest and all(line.decode() for _, line in lines)
    assert list(config.text_lines(io.BytesIO(b"\xef\xbb\xbf"), "x")) == list(config.text_lines(io.BytesIO(b""), "x")) == []


def test_jsonl_columns(tmp_path):
    rows = [{"text": "one", "body": "x\n"}, {"text": "", "body": None}, {"text": "half \ud800", "body": "y"}]
    for name, opener in (("a.jsonl", open), ("a.jsonl.gz", gzip.open), ("a.jsonl.xz", lzma.open)):
        with opener(tmp_path / name, "wb") as f:
            f.write("\n\n".join(map(json.dumps, rows)).encode())
        read = lambda column: [t for t, _ in prepare.text_documents(str(tmp_path / name), column, Counter())]
        assert read("text") == [b"one", b"", b"half ?"] and read("body") == [b"x\n", b"", b"y"]
        with pytest.raises(UserError, match="line 1 has no text in the column title.*text, body"):
            read("title")


@pytest.mark.parametrize("name, data, sentence", [
    ("a.txt", b"ok\nno\xff\n", r"a.txt is not UTF-8 text .invalid start byte at byte 5"),
    ("a.txt", b"x" * (1 << 20) + b"\n" + "é".encode()[:1], "is not UTF-8 text .unexpected end of data at byte 1048577"),
    ("a.txt.xz", lzma.compress(bytes(1000))[:-20], "cannot read .*a.txt.xz: Compressed file ended"),
    ("a.txt.gz", b"no gzip", "cannot read .*Not a gzipped file"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl line 2 is not JSON"),
    ("a.jsonl", b'{"text": "a\xff"}', "a.jsonl is not UTF-8 text .invalid start byte at byte 11"),
    ("a.jsonl", b'["a"]', "line 1 has no text in the column text, it has a list"),
    ("a.jsonl", b'{"text": 5}', "line 1 has no text in the column text, there stands a value of type int"),
    ("a.jsonl", b'{}', "line 1 has no text in the column text, it has no column"),
    ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "a.jsonl line 1 is not JSON in UTF-8 .RecursionError")])
def test_damaged_input_is_refused_with_its_place(tmp_path, name, data, sentence):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        make(tmp_path, input=str(tmp_path / name))
    assert os.listdir(tmp_path) == [name]


def test_a_json_line_over_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "LARGEST", 1000)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a" * 987}) + "\n" + json.dumps({"text": "a" * 990}))
    documents = prepare.text_documents(str(tmp_path / "a.jsonl"), "text", Counter())
    assert len(next(documents)[0]) == 987
    with pytest.raises(UserError, match="line 2 is longer than"):
        next(documents)


def test_globs(tmp_path):
    for name in ("b.txt", "a.txt", "c.txt.gz", "c.md"):
        (tmp_path / name).touch()
    names = lambda patterns: [os.path.basename(p) for p in prepare.text_files(",".join(str(tmp_path / p) for p in patterns))]
    assert names(["c.txt.gz", "*.txt", "a.*"]) == ["c.txt.gz", "a.txt", "b.txt"]
    with pytest.raises(UserError, match=r"no file matches .*x\*.txt"):
        names(["*.txt", "x*.txt"])
    with pytest.raises(UserError, match="c.md is not of a kind"):
        names(["c.md"])


def test_a_hugging_face_dataset_by_name_column_and_budget(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    docs = [f"{i} {words(i, 30)}" for i in range(2000)]
    for shard in range(4):
        (source / f"{shard}.jsonl").write_text("".join(json.dumps({"id": i, "body": d}) + "\n" for i, d in enumerate(docs) if i % 4 == shard))
    budget = dict(dataset=str(source), column="body", train_tokens=50_000, val_tokens=10_000)
    train, val, tokenizer = make(tmp_path, "a", **budget)
    again, _, _ = make(tmp_path, "b", **budget, workers=1)
    other, _, _ = make(tmp_path, "c", **budget, seed=7)
    assert (train.count, val.count) == (50_000, 10_000) and train.checksum == again.checksum != other.checksum
    seen, held = set(documents_of(train.tokens, tokenizer)), set(documents_of(val.tokens, tokenizer))
    assert seen | held <= set(docs) and not seen & held
    order = [int(d.split()[0]) for d in documents_of(train.tokens, tokenizer)]
    assert order != sorted(order)


def test_a_stream_that_breaks_leaves_nothing(tmp_path, monkeypatch):
    def broken(name, settings, seed):
        yield b"some text", True
        raise UserError("the stream broke off")
    monkeypatch.setattr(prepare, "hub_documents", broken)
    with pytest.raises(UserError, match="broke off"):
        make(tmp_path, dataset="some/where")
    assert os.listdir(tmp_path) == []


def test_the_shuffle_buffer_is_seeded_complete_and_bounded():
    documents = [(b"%d" % i, True) for i in range(5000)]
    mixed = list(prepare._shuffled(iter(documents), 1, size=20_000))
    assert mixed != documents and sorted(mixed) == sorted(documents)
    assert mixed == list(prepare._shuffled(iter(documents), 1, size=20_000)) != list(prepare._shuffled(iter(documents), 2, size=20_000))
    pulled = itertools.count()
    stream = prepare._shuffled(((b"x" * 900, True) for _ in iter(lambda: next(pulled) < 10_000, False)), 1, size=100_000)
    next(stream)
    assert next(pulled) <= 102


# ----------------------------------------------------------------------------------------------------------------------
# The split

def test_the_split_is_by_text_about_one_percent_and_stable():
    texts = [f"document {i}".encode() for i in range(20_000)]
    chosen = {t for t in texts if prepare.is_validation(t, 0.01)}
    assert 140 < len(chosen) < 260
    oracle = {t for t in texts if int.from_bytes(hashlib.blake2b(t, digest_size=8).digest(), "big") / 2 ** 64 < 0.01}
    assert chosen == oracle and all(prepare.is_validation(t + b"\n", 0.01) for t in chosen)
    assert not any(prepare.is_validation(t, 0.0) for t in texts[:100]) and all(prepare.is_validation(t, 1.0) for t in texts[:100])


def test_added_documents_move_none_and_duplicates_stay_together(tmp_path):
    few, more = corpus(400), corpus(400) + corpus(500, seed=5000) + corpus(50)
    random.Random(0).shuffle(more)
    sides = []
    for name, docs in (("a", few), ("b", more)):
        train, val, tokenizer = make(tmp_path, name, input=str(write_corpus(tmp_path / f"{name}.txt", docs)))
        sides.append((set(documents_of(train.tokens, tokenizer)), set(documents_of(val.tokens, tokenizer))))
        assert sides[-1][0] | sides[-1][1] == set(docs) and not sides[-1][0] & sides[-1][1] and sides[-1][1]
    assert sides[0][0] <= sides[1][0] and sides[0][1] <= sides[1][1]


def test_validation_input(tmp_path):
    docs = corpus(50)
    a, b = write_corpus(tmp_path / "a.txt", docs[:40]), write_corpus(tmp_path / "b.txt", docs[40:])
    train, val, tokenizer = make(tmp_path, input=str(a), val_input=str(b))
    assert documents_of(train.tokens, tokenizer) == docs[:40] and documents_of(val.tokens, tokenizer) == docs[40:]
    empty = write_corpus(tmp_path / "empty.txt", ["\n", " \n"])
    with pytest.raises(UserError, match="no text in .*empty.txt"):
        make(tmp_path, "other", input=str(a), val_input=str(empty))
    with pytest.raises(UserError, match="no text in .*empty.txt"):
        make(tmp_path, "other", input=str(empty))
    with pytest.raises(UserError, match="there is no text to train the tokenizer spm:400 on"):
        make(tmp_path, "other", input=str(empty), tokenizer="spm:400")


def test_a_validation_file_among_the_training_files_is_refused(tmp_path):
    for name in ("a.txt", "b.txt"):
        write_corpus(tmp_path / name, corpus(50))
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    for val in ("b.txt", "link.txt"):
        with pytest.raises(UserError, match="b.txt is among both --input and --val_input"):
            make(tmp_path, input=f"{tmp_path}/a.txt,{tmp_path}/b.txt", val_input=f"{tmp_path}/{val}")
    assert not (tmp_path / "data").exists()
    train, val, _ = make(tmp_path, input=f"{tmp_path}/a.txt", val_input=f"{tmp_path}/b.txt")  # equal text in two files is the user's affair
    assert train.count == val.count


@pytest.mark.parametrize("held_out", [False, True])
def test_one_document_gives_its_last_percent(tmp_path, held_out):
    text = next(t for t in (words(i, 5000) for i in range(1000)) if prepare.is_validation(t.encode(), 0.01) == held_out)
    (tmp_path / "a.txt").write_text(text)
    train, val, tokenizer = make(tmp_path, input=str(tmp_path / "a.txt"))
    train.verify(), val.verify()
    assert val.count == -(-(len(text) + 1) // 100)
    assert tokenizer.decode(train.tokens.tolist() + val.tokens.tolist()) == text and val.tokens[-1] == tokenizer.eos


def test_empty_documents_are_skipped_and_counted(tmp_path, capfd):
    docs = corpus(120)
    mixed = [d for doc in docs for d in (doc, "", " \n")]
    train, val, tokenizer = make(tmp_path, input=str(write_corpus(tmp_path / "a.txt", mixed)))
    assert train.count + val.count == sum(len(d.encode()) + 1 for d in docs)
    assert "240 empty skipped" in capfd.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Large documents, workers, memory, interruption

def test_cut_keeps_every_byte_and_cuts_between_lines_or_characters():
    rng = random.Random(3)
    for _ in range(300):
        text = "".join(rng.choices(["a", "é", "中", "😀", "\n", "word "], k=rng.randrange(200))).encode()
        size = rng.randrange(4, 40)
        pieces = list(prepare.cut(text, size))
        assert b"".join(pieces) == text and max(map(len, pieces)) <= size
        assert all(piece.decode() is not None for piece in pieces)
        assert all(piece.endswith(b"\n") or b"\n" not in piece for piece in pieces[:-1])


def test_a_giant_documents_pieces_stay_on_one_side(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "LARGEST", 20_000)
    giants = [f"{i}\n" + "".join(f"{words(1000 * i + j, 9)}\n" for j in range(2000)) for i in range(6)]
    path = write_corpus(tmp_path / "a.txt", giants)
    pieces = list(prepare.text_documents(str(path), "", Counter()))
    assert len(pieces) > 24 and sum(last for _, last in pieces) == 6 and max(len(t) for t, _ in pieces) <= 20_000
    assert all(text.endswith(b"\n") for text, _ in pieces)
    monkeypatch.setattr(prepare, "LOCAL_SHARE", 0.5)
    train, val, tokenizer = make(tmp_path, input=str(path))
    parts = documents_of(train.tokens, tokenizer), documents_of(val.tokens, tokenizer)
    assert parts[0] and parts[1] and sorted(parts[0] + parts[1]) == sorted(giants)


def test_a_line_without_end_is_survived(tmp_path):
    text = "é中😀" * 400_000  # 3.6 MB in one line
    (tmp_path / "a.txt").write_text("x" + text, encoding="utf-8")
    train, val, tokenizer = make(tmp_path, input=str(tmp_path / "a.txt"))
    ids = np.concatenate([train.tokens, val.tokens])
    assert ids[-1] == tokenizer.eos and ids[:-1].astype(np.uint8).tobytes().decode() == "x" + text


def test_the_bytes_do_not_depend_on_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH", 10_000)
    path = write_corpus(tmp_path / "a.txt", corpus(3000))
    assert path.stat().st_size > 30 * prepare.BATCH
    raw = []
    for workers in (1, 3, 8):
        make(tmp_path, f"w{workers}", input=str(path), tokenizer="spm:400", workers=workers)
        raw.append([(tmp_path / f"w{workers}" / name).read_bytes() for name in ("train.bin", "val.bin", "tokenizer.bin")])
    assert raw[0] == raw[1] == raw[2] and sorted(os.listdir(tmp_path / "w8")) == ["tokenizer.bin", "train.bin", "val.bin"]


def tree_memory(pid):
    """Resident bytes of a process and its descendants, shared pages counted once (PSS)."""
    total, pids = 0, [pid]
    while pids:
        try:
            pid = pids.pop()
            total += 1024 * int(re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1])
            pids += [int(c) for t in os.listdir(f"/proc/{pid}/task") for c in Path(f"/proc/{pid}/task/{t}/children").read_text().split()]
        except (OSError, TypeError):
            continue
    return total


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's /proc")
def test_memory_is_bounded_on_a_document_larger_than_the_limit(tmp_path):
    block = "".join(f"{words(i, 12)}\n" for i in range(20_000)).encode()
    with open(tmp_path / "a.txt", "wb") as f:  # 140 MB in one document, then many small ones
        for _ in range(140 * prepare.MB // len(block)):
            f.write(block)
        f.write(b"<|endoftext|>\n" + b"small\n<|endoftext|>\n" * 100_000)
    process = subprocess.Popen([sys.executable, ROOT / "prepare.py", "--dataset=text", f"--input={tmp_path}/a.txt", "--tokenizer=byte",
                                f"--data_dir={tmp_path}/data", "--workers=4"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.05)
    assert process.returncode == 0, process.stderr.read()
    assert 50 << 20 < peak < 700 << 20


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interruption_leaves_nothing_half_and_no_process(tmp_path, number, status):
    path = write_corpus(tmp_path / "a.txt", corpus(2000))
    # the documents never end, so the run is certainly under way
    code = ("import itertools, time, config, prepare\n"
            "prepare.text_documents = lambda *_: ((b'word ' * 2000, time.sleep(0.001) is None) for _ in itertools.count())\n"
            "config.run(prepare.main)")
    process = subprocess.Popen([sys.executable, "-c", code, "--dataset=text", f"--input={path}", "--tokenizer=byte", "--workers=2",
                                f"--data_dir={tmp_path}/data"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a background job ignores it
    temp = tmp_path / "data" / "train.bin.tmp"
    while not (temp.exists() and temp.stat().st_size > 2 * prepare.MB):
        assert process.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == status and b"Traceback" not in err, err
    if number != signal.SIGKILL:
        assert not (tmp_path / "data").exists()
    else:
        assert sorted(os.listdir(tmp_path / "data")) == ["train.bin.tmp", "val.bin.tmp"]
    deadline = time.time() + 5
    while any(os.path.exists(f"/proc/{pid}") and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in workers):
        assert time.time() < deadline, "a worker outlives the main process"
        time.sleep(0.05)
    train, _, _ = make(tmp_path, input=str(path))  # the next run is not disturbed
    assert train.count and sorted(os.listdir(tmp_path / "data")) == ["tokenizer.bin", "train.bin", "val.bin"]


def test_a_killed_worker_is_one_sentence(tmp_path, monkeypatch):
    def killed(path, column, meter):
        yield b"text", True
        os.kill(next(iter(multiprocessing.active_children())).pid, signal.SIGKILL)
        while True:
            yield b"text" * 1000, True
    monkeypatch.setattr(prepare, "text_documents", lambda *a: itertools.chain([(b"text" * 200_000, True)], killed(*a)))
    with pytest.raises(UserError, match="worker process was killed"):
        make(tmp_path, input=str(write_corpus(tmp_path / "a.txt", ["x"])))
    assert os.listdir(tmp_path) == ["a.txt"]


# ----------------------------------------------------------------------------------------------------------------------
# The data folder and the command line

def test_the_command_line_from_text_to_open_data(tmp_path):
    docs = corpus(300)
    write_corpus(tmp_path / "a.txt", docs)
    args = ["--dataset=text", f"--input={tmp_path}/*.txt", "--tokenizer=spm:400", f"--data_dir={tmp_path}/data", "--workers=2"]
    first = command(*args)
    assert first.returncode == 0, first.stderr
    assert "spm:400@" in first.stdout and f"next: python train.py config/quickstart.py --data_dir={tmp_path}/data" in first.stdout
    train, val, tokenizer = prepare.open_data(Config(dataset="refinedweb", tokenizer="llama", data_dir=f"{tmp_path}/data"))
    assert sorted(documents_of(train.tokens, tokenizer) + documents_of(val.tokens, tokenizer)) == sorted(docs)
    again = command(*args)
    assert again.returncode == 0 and "is complete already" in again.stdout
    other = command(*args[:2], "--tokenizer=byte", *args[3:])
    assert other.returncode == 2 and "already holds" in other.stderr
    write_corpus(tmp_path / "b.txt", docs[:3])
    other = command(*args)
    assert other.returncode == 2 and "already holds" in other.stderr and other.stderr.count("\n") == 1


@pytest.mark.parametrize("args, sentence", [
    (["--dataset=text"], "needs its files"),
    (["--dataset=text", "--input=nowhere/*.txt"], "no file matches nowhere"),
    (["--input=a.txt"], "belong to dataset=text"),
    (["--tokenizer=spm4096"], "is none of gpt2, llama"),
    (["--tokenizer=nowhere.model"], "cannot read the tokenizer nowhere.model"),
    (["--workers=-1"], "workers=-1"),
    (["--workers=100000"], "workers=100000 must be at most 512"),
    (["--colum=x"], "did you mean column"),
    (["--workers=many"], "expected a whole number"),
    (["--tokenizer=spm:50"], "cannot train 50 pieces")])
def test_mistakes_are_one_sentence_and_status_2(tmp_path, args, sentence):
    result = command(*args, f"--data_dir={tmp_path}/data")
    assert result.returncode == 2 and sentence in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("\n") == 1 and os.listdir(tmp_path) == []


def test_remote_failures_name_the_offline_way(tmp_path):
    # a proxy that nobody serves: no network, wherever this test runs
    closed = {**os.environ, **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"), "http://127.0.0.1:9"),
              "NO_PROXY": "", "no_proxy": "", "HF_HOME": str(tmp_path / "hf"), "TIKTOKEN_CACHE_DIR": str(tmp_path / "tiktoken")}
    for args, sentence in ((["--dataset=refinedweb", "--tokenizer=byte"], "--dataset=stdlib, or --dataset=text"),
                           (["--tokenizer=llama"], "--tokenizer=spm:32000"), (["--tokenizer=gpt2"], "--tokenizer=spm:16384")):
        start = time.time()
        result = command(*args, f"--data_dir={tmp_path}/data", env=closed)
        assert result.returncode == 2 and sentence in result.stderr and result.stderr.count("\n") == 1, result.stderr
        assert time.time() - start < 20 and not (tmp_path / "data").exists()


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match="pip install tiktoken"):
        prepare.load_tokenizer("gpt2")


def test_no_torch():
    code = "import sys, prepare; assert not {'torch', 'datasets', 'sentencepiece', 'tiktoken'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_open_data_without_and_with_the_wrong_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data/typo holds no data: run `python prepare.py --dataset=stdlib --tokenizer=spm:4096 --data_dir=data/typo`"):
        prepare.ensure_data(Config(data_dir="data/typo"))
    a, b = write_corpus(tmp_path / "a.txt", corpus(200)), write_corpus(tmp_path / "b.txt", corpus(210))
    cfg = Config(dataset="text", tokenizer="byte", input=str(a))
    prepare.prepare(cfg, Settings(workers=1))
    assert prepare.open_data(cfg)[0].count == prepare.open_data(Config(dataset="text", tokenizer="byte"))[0].count > 0
    with pytest.raises(UserError, match="data/text-byte holds text: .* not text: 1 \\+ 0 files"):
        prepare.open_data(Config(dataset="text", tokenizer="byte", input=str(b)))
    os.rename("data/text-byte", "data/refinedweb-byte")
    with pytest.raises(UserError, match="not refinedweb in byte"):
        prepare.open_data(Config(dataset="refinedweb", tokenizer="byte"))
    os.remove("data/refinedweb-byte/tokenizer.bin")
    with pytest.raises(UserError, match="tokenizer.bin"):
        prepare.open_data(Config(data_dir="data/refinedweb-byte"))


def test_ensure_data_prepares_the_standard_library_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = Config(tokenizer="byte")
    train, val, tokenizer = prepare.ensure_data(cfg)
    assert os.path.dirname(train.path) == config.data_dir(cfg) == "data/stdlib-byte"
    assert tokenizer.decode(val.tokens[:-1].tolist()) and train.count > 5_000_000
    before = os.stat(train.path).st_mtime_ns
    assert prepare.ensure_data(cfg)[0].checksum == train.checksum and os.stat(train.path).st_mtime_ns == before
