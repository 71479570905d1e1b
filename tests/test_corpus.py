"""corpus.py: files, rows, datasets, the validation split."""
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
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from corpora import documents_of, make, some_documents, words, write_corpus

import config
import corpus
import prepare
from config import Config, UserError
from prepare import Settings


# ----------------------------------------------------------------------------------------------------------------------
# Sources

@pytest.mark.parametrize("suffix, opener", [(".txt", open), (".txt.xz", lzma.open), (".txt.gz", gzip.open)])
def test_text_files(tmp_path, suffix, opener):
    docs = ["one\r\n", "\ufefftwo\n\n", " \n\t\n", "", "a <|endoftext|> b\n<|endoftext|> \n", "last without line end"]
    with opener(tmp_path / f"a{suffix}", "wb") as f:
        f.write(b"\xef\xbb\xbf" + "<|endoftext|>\n".join(docs[:-1]).encode() + b"<|endoftext|>\r\n" + docs[-1].encode())
    found = [text.decode() for text, last in corpus.text_documents(str(tmp_path / f"a{suffix}"), "", Counter()) if last]
    assert found == docs


@pytest.mark.parametrize("longest", [4, 5, 6, 7, 8, 50])
def test_text_lines(longest):
    text = "\ufeffone\rtwo é中😀\r\n\n \n" + "é中😀" * 20 + "\n\r\r\nlast \ufeff"
    lines = list(config.text_lines(io.BytesIO(text.encode()), "x", longest))
    assert [number for number, line in lines if line.endswith(b"\n")] == [1, 2, 3, 4, 5]
    joined = {number: b"".join(part for n, part in lines if n == number).decode() for number, _ in lines}
    assert list(joined.values()) == ["one\rtwo é中😀\r\n", "\n", " \n", "é中😀" * 20 + "\n", "\r\r\n", "last \ufeff"]
    assert max(len(line) for _, line in lines) <= longest and all(line.decode() for _, line in lines)
    assert list(config.text_lines(io.BytesIO(b"\xef\xbb\xbf"), "x")) == []
    assert list(config.text_lines(io.BytesIO(b""), "x")) == []


def test_the_end_of_a_line_that_comes_in_parts_is_no_separator(tmp_path):
    text = "x" * (1 << 20) + "<|endoftext|>\nsecond\n"  # parts of 2^20 bytes, so the next one is the separator alone
    (tmp_path / "a.txt").write_text(text)
    assert list(corpus.text_documents(str(tmp_path / "a.txt"), "text", Counter())) == [(text.encode(), True)]


def test_jsonl_columns(tmp_path):
    rows = [{"text": "one", "body": "x\n"}, {"text": "", "body": None}, {"text": "half \ud800", "body": "y"}]
    for name, opener in (("a.jsonl", open), ("a.jsonl.gz", gzip.open), ("a.jsonl.xz", lzma.open)):
        with opener(tmp_path / name, "wb") as f:
            f.write("\n\n".join(map(json.dumps, rows)).encode())
        read = lambda column: [t for t, _ in corpus.text_documents(str(tmp_path / name), column, Counter())]
        assert read("text") == [b"one", b"", b"half ?"] and read("body") == [b"x\n", b"", b"y"]
        with pytest.raises(UserError, match="line 1 has no text in the column title.*text, body"):
            read("title")


@pytest.mark.parametrize("name, data, sentence", [
    ("a.txt", b"ok\nno\xff\n", r"a.txt line 2 is not UTF-8 text .invalid start byte at byte 5"),
    ("a.txt", b"x" * (1 << 20) + b"\n" + "é".encode()[:1],
     "line 2 is not UTF-8 text .unexpected end of data at byte 1048577"),
    ("a.txt.xz", lzma.compress(bytes(1000))[:-20], "cannot read .*a.txt.xz .Compressed file ended"),
    ("a.txt.gz", b"no gzip", "cannot read .*Not a gzipped file"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl line 2 is not JSON"),
    ("a.jsonl", b'{"text": "a\xff"}', "a.jsonl line 1 is not UTF-8 text .invalid start byte at byte 11 of the file"),
    ("a.jsonl", b'["a"]', "line 1 has no text in the column text, it is a list"),
    ("a.jsonl", b'{"text": 5}', "line 1 has no text in the column text, its value is of type int"),
    ("a.jsonl", b'{}', "line 1 has no text in the column text, it has no column"),
    ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
     "a.jsonl line 1 is not JSON in UTF-8 .RecursionError")])
def test_damaged_input_is_refused_with_its_place(tmp_path, name, data, sentence):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        make(tmp_path, input=str(tmp_path / name))
    assert os.listdir(tmp_path) == [name]


def test_a_json_line_over_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LARGEST", 1000)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a" * 987}) + "\n" + json.dumps({"text": "a" * 990}))
    documents = corpus.text_documents(str(tmp_path / "a.jsonl"), "text", Counter())
    assert len(next(documents)[0]) == 987
    with pytest.raises(UserError, match="line 2 is longer than"):
        next(documents)


def test_globs(tmp_path):
    for name in ("b.txt", "a.txt", "c.txt.gz", "c.md"):
        (tmp_path / name).touch()
    names = lambda patterns: [os.path.basename(p)
                              for p in corpus.text_files(",".join(str(tmp_path / p) for p in patterns))]
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
        rows = [json.dumps({"id": i, "body": d}) for i, d in enumerate(docs) if i % 4 == shard]
        (source / f"{shard}.jsonl").write_text("\n".join(rows))
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
    def broken(*_):
        yield b"some text", True
        raise UserError("the stream broke off")
    monkeypatch.setattr(corpus, "hub_documents", broken)
    with pytest.raises(UserError, match="broke off"):
        make(tmp_path, dataset="some/where")
    assert os.listdir(tmp_path) == []


def test_the_shuffle_buffer_is_seeded_complete_and_bounded():
    documents = [(b"%d" % i, True) for i in range(5000)]
    mixed = list(corpus._shuffled(iter(documents), 1, size=20_000))
    assert mixed != documents and sorted(mixed) == sorted(documents)
    assert mixed == list(corpus._shuffled(iter(documents), 1, size=20_000))
    assert mixed != list(corpus._shuffled(iter(documents), 2, size=20_000))
    pulled = itertools.count()
    stream = corpus._shuffled(((b"x" * 900, True) for _ in iter(lambda: next(pulled) < 10_000, False)), 1, size=100_000)
    next(stream)
    assert next(pulled) <= 102
    for _ in range(1000):
        next(stream)
    assert next(pulled) <= 1200


def test_text_lines_leaves_out_lines_that_are_not_utf8():
    bad = []
    data = b"\xef\xbb\xbfone\n\xff\n two\xc3\n" + "é".encode() + b"\n\xc3"
    assert list(config.text_lines(io.BytesIO(data), "x", skip=bad.append)) == [(1, b"one\n"), (4, "é\n".encode())]
    assert bad == [2, 3, 5]
    with pytest.raises(UserError, match="x line 2 is not UTF-8 text .invalid start byte at byte 7"):
        list(config.text_lines(io.BytesIO(data), "x"))


def test_a_comma_in_a_name(tmp_path):
    for name in ("a,b.txt", "c.txt"):
        (tmp_path / name).touch()
    names = lambda patterns: [os.path.basename(path) for path in corpus.text_files(patterns)]
    assert names(f"{tmp_path}/a\\,b.txt,{tmp_path}/c.txt") == ["a,b.txt", "c.txt"]
    with pytest.raises(UserError, match=r"no file matches .*/a: .*write \\, for a comma"):
        names(f"{tmp_path}/a,b.txt")


def test_folders_capital_suffixes_and_a_file_given_twice(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("A.TXT", "deep/b.jsonl.GZ", "deep/c.Parquet", "notes.md", "d.txt"):
        (tmp_path / "in" / name).touch()
    (tmp_path / "empty[1]").mkdir()
    names = lambda patterns: [os.path.relpath(path, tmp_path / "in") for path in corpus.text_files(patterns)]
    assert names(str(tmp_path / "in")) == ["A.TXT", "d.txt", "deep/b.jsonl.GZ", "deep/c.Parquet"]
    twice = f"{tmp_path}/in/d.txt,{tmp_path}/in/../in/*.txt,{tmp_path}/in"
    assert names(twice) == ["d.txt", "A.TXT", "deep/b.jsonl.GZ", "deep/c.Parquet"]
    with pytest.raises(UserError, match=r"no file of a kind that can be read .*\.parquet.* matches .*empty\[1\]"):
        names(f"{tmp_path}/empty[1]")
    with gzip.open(tmp_path / "B.JSONL.GZ", "wb") as f:
        f.write(b'{"text": "one"}\n')
    assert list(corpus.text_documents(str(tmp_path / "B.JSONL.GZ"), "text", Counter())) == [(b"one", True)]


def test_nested_columns(tmp_path):
    rows = [{"a": {"b": {"c": "deep"}}, "a.b": "dotted"}, {"a": {"b": {"c": None}}, "a.b": "d"},
            {"a": None, "a.b": "e"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = lambda column: [text for text, _ in corpus.text_documents(str(tmp_path / "x.jsonl"), column, Counter())]
    assert read("a.b.c") == [b"deep", b"", b""] and read("a.b") == [b"dotted", b"d", b"e"]
    with pytest.raises(UserError, match="line 1 has no text in the column a.b.x, it has c: .*a.b for b inside a"):
        read("a.b.x")
    with pytest.raises(UserError, match="line 1 has no text in the column a.b.c.d, it is a str"):
        read("a.b.c.d")


def test_bad_rows_are_skipped_and_counted(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(corpus, "LARGEST", 1000)
    good = [json.dumps({"text": f"{i} {words(i, 20)}"}).encode() for i in range(200)]
    bad = [b"{", b'{"text": 5}', b'["text"]', b'{"txt": "a"}', b'{"text": "\xff"}',
           b'{"text": "' + b"x" * 5000 + b'"}', b"null"]
    lines = [line for pair in itertools.zip_longest(good, bad) for line in pair if line]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    train, val, tokenizer = make(tmp_path, input=str(tmp_path / "a.jsonl"), skip_bad_rows=True)
    assert "0 empty skipped, 7 bad rows skipped" in capfd.readouterr().out
    found = documents_of(train.tokens, tokenizer) + documents_of(val.tokens, tokenizer)
    assert set(found) == {json.loads(line)["text"] for line in good}
    with pytest.raises(UserError, match="line 2 is not JSON .*skip_bad_rows=True"):
        make(tmp_path, "other", input=str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match="there is no text in .*a.jsonl, 207 bad rows were skipped"):
        make(tmp_path, "other", input=str(tmp_path / "a.jsonl"), skip_bad_rows=True, column="nowhere")


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    rows = [{"id": i, "text": f"{i}\r\n" if i % 7 else None, "meta": {"body": f"in {i}"}} for i in range(3000)]
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.PARQUET", row_group_size=500)
    meter = Counter()
    read = lambda column: [text for text, _ in corpus.text_documents(str(tmp_path / "a.PARQUET"), column, meter)]
    assert read("text") == [(row["text"] or "").encode() for row in rows] and meter["done"] > 0
    assert read("meta.body") == [f"in {i}".encode() for i in range(3000)]
    with pytest.raises(UserError, match="a.PARQUET row 1 has no text in the column id, its value is of type int"):
        read("id")
    with pytest.raises(UserError, match="row 1 has no text in the column title, it has id, text, meta"):
        read("title")
    (tmp_path / "a.PARQUET").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(UserError, match="cannot read .*a.PARQUET .*no Parquet file"):
        read("text")


def test_zst(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    text = "".join(f"{words(i, 9)} é\r\n<|endoftext|>\n" for i in range(500)).encode()
    packed = arrow.compress(text, codec="zstd", asbytes=True)
    path = tmp_path / "a.txt.zst"
    path.write_bytes(packed + packed)  # two frames
    found = b"".join(t for t, _ in corpus.text_documents(str(path), "", Counter()))
    assert found == 2 * text.replace(b"<|endoftext|>\n", b"")
    path.write_bytes(packed[:-20])
    with pytest.raises(UserError, match="cannot read .*a.txt.zst .*[Tt]runcated"):
        list(corpus.text_documents(str(path), "", Counter()))


@pytest.mark.parametrize("name, sentence", [
    ("a.txt.zst", "a .zst file needs the package pyarrow: pip install pyarrow, or use"),
    ("a.parquet", "a .parquet file needs the package pyarrow: pip install pyarrow, or use"),
    ("hub", "the package datasets: pip install datasets, or use --dataset=stdlib, or --dataset=text --input=FILES")])
def test_missing_packages_name_what_works_without(tmp_path, monkeypatch, name, sentence):
    for module in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=sentence):
        make(tmp_path, **({"dataset": "refinedweb"} if name == "hub" else {"input": str(tmp_path / name)}))


def test_the_content_hash_reads_everything_or_every_nth_megabyte(tmp_path, monkeypatch):
    path, other = tmp_path / "a.txt", tmp_path / "copy" / "a.txt"
    data = bytearray(b"x" * (8 * corpus.MB + 5))
    other.parent.mkdir()

    def hash_with(at):
        changed = bytearray(data)
        changed[at] = 0
        other.write_bytes(changed)
        return corpus.content_hash([str(other)])
    path.write_bytes(data)
    plain = corpus.content_hash([str(path)])
    assert plain == corpus.content_hash([str(path)]) and len(plain) == 12
    assert len({plain, *(hash_with(at * corpus.MB) for at in range(9)), hash_with(-1)}) == 11
    monkeypatch.setattr(corpus, "HASHED", 4 * corpus.MB)  # so every third is read
    plain = corpus.content_hash([str(path)])
    assert [at for at in range(8) if hash_with(at * corpus.MB) != plain] == [0, 3, 6] and hash_with(-1) != plain
    assert corpus.content_hash([str(path)], []) != corpus.content_hash([], [str(path)])


# ----------------------------------------------------------------------------------------------------------------------
# The split

def test_the_split_is_by_text_about_one_percent_and_stable():
    texts = [f"document {i}".encode() for i in range(20_000)]
    chosen = {t for t in texts if corpus.is_validation(t, 0.01)}
    assert 140 < len(chosen) < 260
    oracle = {t for t in texts if int.from_bytes(hashlib.blake2b(t, digest_size=8).digest(), "big") / 2 ** 64 < 0.01}
    assert chosen == oracle and all(corpus.is_validation(t + b"\n", 0.01) for t in chosen)
    assert not any(corpus.is_validation(t, 0.0) for t in texts[:100])
    assert all(corpus.is_validation(t, 1.0) for t in texts[:100])


def test_added_documents_move_none_and_duplicates_stay_together(tmp_path):
    few, more = some_documents(400), some_documents(400) + some_documents(500, seed=5000) + some_documents(50)
    random.Random(0).shuffle(more)
    sides = []
    for name, docs in (("a", few), ("b", more)):
        train, val, tokenizer = make(tmp_path, name, input=str(write_corpus(tmp_path / f"{name}.txt", docs)))
        sides.append((set(documents_of(train.tokens, tokenizer)), set(documents_of(val.tokens, tokenizer))))
        assert sides[-1][0] | sides[-1][1] == set(docs) and not sides[-1][0] & sides[-1][1] and sides[-1][1]
    assert sides[0][0] <= sides[1][0] and sides[0][1] <= sides[1][1]


def test_validation_input(tmp_path):
    docs = some_documents(50)
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
        write_corpus(tmp_path / name, some_documents(50))
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    for val in ("b.txt", "link.txt"):
        with pytest.raises(UserError, match="b.txt is among both --input and --val_input"):
            make(tmp_path, input=f"{tmp_path}/a.txt,{tmp_path}/b.txt", val_input=f"{tmp_path}/{val}")
    assert not (tmp_path / "data").exists()
    # equal text in two files is the user's affair
    train, val, _ = make(tmp_path, input=f"{tmp_path}/a.txt", val_input=f"{tmp_path}/b.txt")
    assert train.count == val.count


@pytest.mark.parametrize("held_out", [False, True])
def test_one_document_gives_its_last_percent(tmp_path, held_out):
    text = next(t for t in (words(i, 5000) for i in range(1000)) if corpus.is_validation(t.encode(), 0.01) == held_out)
    (tmp_path / "a.txt").write_text(text)
    train, val, tokenizer = make(tmp_path, input=str(tmp_path / "a.txt"))
    train.verify(), val.verify()
    assert val.count == -(-(len(text) + 1) // 100)
    assert tokenizer.decode(train.tokens.tolist() + val.tokens.tolist()) == text and val.tokens[-1] == tokenizer.eos


def test_empty_documents_are_skipped_and_counted(tmp_path, capfd):
    docs = some_documents(120)
    mixed = [d for doc in docs for d in (doc, "", " \n")]
    train, val, tokenizer = make(tmp_path, input=str(write_corpus(tmp_path / "a.txt", mixed)))
    assert train.count + val.count == sum(len(d.encode()) + 1 for d in docs)
    assert "240 empty skipped" in capfd.readouterr().out


@pytest.fixture(scope="module")
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
    found = documents_of(train.tokens, tokenizer) + documents_of(val.tokens, tokenizer)
    assert sorted(found) == sorted(t for t in texts if t.strip())
    size = sum(len(t.encode()) for t in texts)
    assert 2.3 < size / (train.count + val.count) < 4.5 and 0.001 < val.count / train.count < 0.05


def sixty(huge=(), short_first=False):
    """60 documents, some of them huge; short_first adds a short one whose hash is the lowest."""
    texts = [words(i, 4000 if i in huge else 150) + "\n" for i in range(60)]
    if short_first:
        texts.append(next(t for t in (f"short {i}\n" for i in range(100_000)) if corpus.document_hash(t.encode()) < min(
            corpus.document_hash(t.encode()) for t in texts)))
    return texts


@pytest.mark.parametrize("huge, short_first",
                         [((), False), ((), True), (range(1), False), (range(60), False), (range(3), True)])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.2])
def test_validation_is_a_share_of_the_text_within_bounds(tmp_path, capfd, huge, short_first, share):
    texts = sixty(huge, short_first)
    given = {"val_share": share} if share else {}
    train, val, tokenizer = make(tmp_path, input=str(write_corpus(tmp_path / "a.txt", texts)), **given)
    assert sorted(documents_of(train.tokens, tokenizer) + documents_of(val.tokens, tokenizer)) == sorted(texts)
    share = share or 0.01
    most = 5 * share if share < 0.05 else 1.5 * share
    assert share / 2 * 0.99 <= val.count / (train.count + val.count) <= most * 1.01
    assert "warning" not in capfd.readouterr().err.replace("tokens are few", "")


def test_the_huge_document_first_by_its_hash_trains(tmp_path):
    huge = next(t for t in (f"{i} {words(i, 20_000)}\n" for i in range(1000))
                if corpus.document_hash(t.encode()) < 2 ** 64 / 100)
    texts = [huge, *sixty()]
    train, val, tokenizer = make(tmp_path, input=str(write_corpus(tmp_path / "a.txt", texts)))
    assert huge in documents_of(train.tokens, tokenizer) and 0.004 < val.count / train.count < 0.06


def test_a_growing_corpus_moves_few_documents():
    rng, sizes, before = random.Random(5), {}, set()
    for step in range(40):
        sizes |= {rng.getrandbits(64): round(rng.lognormvariate(8, 1)) for _ in range(500)}
        chosen = corpus.choose_documents(sizes, sum(sizes.values()), 0.01)
        share = sum(sizes[key] for key in chosen) / sum(sizes.values())
        assert 0.005 <= share <= 0.015
        if step >= 4:
            assert before <= chosen  # 2500 documents on: what validates once always does
            assert all(key < 0.01 * 2 ** 64 for key in chosen)
        before = chosen


def test_without_a_fitting_choice_the_last_tokens_validate_with_a_warning(tmp_path, capfd):
    texts = [words(i, 3000) + "\n" for i in range(10)]
    train, val, tokenizer = make(tmp_path, input=str(write_corpus(tmp_path / "a.txt", texts)))
    assert val.count == -(-sum(len(t) + 1 for t in texts) // 100)
    sentence = f"no choice of documents is about 1.0% of the text, so its last {val.count:,} tokens validate"
    assert f"warning: {sentence}: give --val_input" in capfd.readouterr().err
    assert documents_of(np.concatenate([train.tokens, val.tokens]), tokenizer) == texts


def test_many_documents_are_split_with_bounded_memory(monkeypatch):
    most = []

    class Watched(Counter):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            most.append(len(self))
    monkeypatch.setattr(corpus, "Counter", Watched)
    monkeypatch.setattr(corpus, "MANY", 1000)
    documents = [(b"%d" % i, True) for i in range(50_000)]
    rule = corpus.hold_out(corpus.Source("x", [lambda: iter(documents)], [], 0.01, size=1), Counter())
    assert [rule(text) for text, _ in documents] == [corpus.is_validation(text, 0.01) for text, _ in documents]
    assert 1000 < max(most) < 2500  # at most 4 % of the documents, which is four times the share


def characters_of(tokens, tokenizer):
    return set(tokenizer.decode(tokens.tolist()))


def test_no_tokenizer_is_trained_on_validation_text(tmp_path, monkeypatch):
    mark = lambda i: chr(0x4E00 + i)  # every document has a character of its own
    docs = [f"{words(i, 30)} {mark(i) * 20}\n" for i in range(200)]
    train, val, tokenizer = make(tmp_path, input=str(write_corpus(tmp_path / "a.txt", docs)), tokenizer="spm:700",
                                 val_share=0.1)
    learned = {c for piece in tokenizer.table for c in piece.decode(errors="ignore")} & set(map(mark, range(200)))
    assert learned and learned == characters_of(train.tokens, tokenizer) & set(map(mark, range(200)))
    assert len(characters_of(val.tokens, tokenizer) & set(map(mark, range(200)))) >= 10
    # of a document that comes in several pieces the first decides, for every piece
    monkeypatch.setattr(corpus, "LARGEST", 1000)
    docs = ["".join(f"{words(50 * i + j, 9)}\n" for j in range(30)) + f"{mark(i) * 20}\n" for i in range(40)]
    train, val, tokenizer = make(tmp_path, "giant", input=str(write_corpus(tmp_path / "b.txt", docs)),
                                 tokenizer="spm:700", val_share=0.3)
    held = characters_of(val.tokens, tokenizer) & set(map(mark, range(40)))
    assert held and not held & {c for piece in tokenizer.table for c in piece.decode(errors="ignore")}
