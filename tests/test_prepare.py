"""prepare.py: token files, workers, interruption, memory, the data folder, the command line."""
import itertools
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from corpora import ROOT, command, documents_of, make, some_documents, words, write_corpus

import config
import corpus
import prepare
from config import Config, UserError
from prepare import Settings, TokenFile, TokenWriter


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
    assert (f.vocab_size, f.tokenizer, f.source, f.count, f.checksum) == (vocab_size, "name@12", "here: there", 10_001,
                                                                          zlib.crc32(raw[4096:]))
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


def test_a_second_writer_is_refused_and_a_dead_ones_files_are_taken_over(tmp_path, monkeypatch):
    path, data = write_corpus(tmp_path / "a.txt", some_documents(100)), tmp_path / "data"
    write_folder, found = prepare._write_folder, []

    def second(*args):
        again = command("--dataset=text", f"--input={path}", "--tokenizer=byte", f"--data_dir={data}")
        found.append((again.returncode, again.stderr, os.path.exists(data)))
        write_folder(*args)

    data.mkdir()
    for name in (".lock", "train.bin.tmp", "val.bin.tmp"):  # of a run that was killed
        (data / name).write_bytes(b"x" * 10_000)
    monkeypatch.setattr(prepare, "_write_folder", second)
    train, val, _ = make(tmp_path, input=str(path))
    (status, error, exists), = found
    assert status == 2 and f"another process is writing {data}" in error and error.count("\n") == 1 and exists
    assert train.count and val.count and sorted(os.listdir(data)) == ["tokenizer.bin", "train.bin", "val.bin"]
    assert TokenFile(str(write_tokens(data / "train.bin", [5]))).tokens.tolist() == [5]


def damaged(raw, kind):
    head = raw[:4096]
    return {"cut": raw[:-3], "header cut": raw[:1000], "longer": raw + b"xx", "empty": b"",
            "foreign": b"\x93NUMPY" + raw[6:],
            "newer": raw.replace(b"tokenfile 1 ", b"tokenfile 2 ", 1),
            "count": head.replace(b'"count": 500', b'"count": 900') + raw[4096:],
            "garbled": head[:40] + b"\0" * 30 + raw[70:]}[kind]


@pytest.mark.parametrize("kind, sentence", [
    ("cut", r"truncated: its 500 tokens take 5096 bytes, the file has 5093"),
    ("header cut", "truncated.*4096 bytes, the file has 1000"),
    ("longer", "too long"), ("empty", "not a token file"), ("foreign", "not a token file"),
    ("newer", "version 2.*up to 1"),
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


def test_verify_does_not_read_beyond_a_file_truncated_since(tmp_path):
    path = write_tokens(tmp_path / "x.bin", np.arange(500_001) % 257)
    f = TokenFile(str(path))
    f.verify()  # an odd number of tokens
    os.truncate(path, 4096 + 2 * 300_000)
    with pytest.raises(UserError, match="truncated: its 500001 tokens take 1004098 bytes, the file has 604096"):
        f.verify()
    os.remove(path)
    with pytest.raises(UserError, match="cannot read the token file .*No such file"):
        f.verify()


def test_verify_finds_the_largest_id_wherever_it_stands(tmp_path):
    for at in (0, 1, 2 ** 19 - 1, 2 ** 19, 600_000):
        ids = np.zeros(600_001, np.int64)
        ids[at] = 300
        f = TokenFile(str(write_tokens(tmp_path / "x.bin", ids, 301)))
        f.vocab_size = 300
        with pytest.raises(UserError, match="holds the token id 300, outside its vocabulary of 300"):
            f.verify()


def test_verify_in_background(tmp_path):
    good, bad = (TokenFile(str(write_tokens(tmp_path / name, np.arange(5000) % 257)))
                 for name in ("good.bin", "bad.bin"))
    raise_damage = prepare.verify_in_background(good, bad)
    raise_damage(wait=True)
    with open(bad.path, "r+b") as f:
        f.seek(5000)
        f.write(b"xx")
    raise_damage = prepare.verify_in_background(good, bad)
    with pytest.raises(UserError, match="bad.bin is damaged: its checksum"):
        raise_damage(wait=True)
    with pytest.raises(UserError, match="bad.bin is damaged"):
        raise_damage()


def test_the_background_check_is_waited_for_where_that_is_wanted():
    read = threading.Event()

    class Slow:
        def verify(self):
            read.wait()
            raise UserError("damaged.")

    raise_damage = prepare.verify_in_background(Slow())
    raise_damage()
    threading.Timer(0.2, read.set).start()
    with pytest.raises(UserError, match="damaged"):
        raise_damage(wait=True)


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
    monkeypatch.setattr(corpus, "LARGEST", 20_000)
    giants = [f"{i}\n" + "".join(f"{words(1000 * i + j, 9)}\n" for j in range(2000)) for i in range(6)]
    path = write_corpus(tmp_path / "a.txt", giants)
    pieces = list(corpus.text_documents(str(path), "", Counter()))
    assert len(pieces) > 24 and sum(last for _, last in pieces) == 6 and max(len(t) for t, _ in pieces) <= 20_000
    assert all(text.endswith(b"\n") for text, _ in pieces)
    train, val, tokenizer = make(tmp_path, input=str(path), val_share=0.5)
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
    path = write_corpus(tmp_path / "a.txt", some_documents(3000))
    assert path.stat().st_size > 30 * prepare.BATCH
    raw = []
    for workers in (1, 3, 8):
        make(tmp_path, f"w{workers}", input=str(path), tokenizer="spm:400", workers=workers)
        raw.append([(tmp_path / f"w{workers}" / name).read_bytes()
                    for name in ("train.bin", "val.bin", "tokenizer.bin")])
    assert raw[0] == raw[1] == raw[2] and sorted(os.listdir(tmp_path / "w8")) == ["tokenizer.bin", "train.bin",
                                                                                  "val.bin"]


def tree_memory(pid):
    """Resident bytes of a process and its descendants, shared pages counted once (PSS)."""
    total, pids = 0, [pid]
    while pids:
        try:
            pid = pids.pop()
            total += 1024 * int(re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1])
            pids += [int(c) for t in os.listdir(f"/proc/{pid}/task")
                     for c in Path(f"/proc/{pid}/task/{t}/children").read_text().split()]
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
    process = subprocess.Popen([sys.executable, ROOT / "prepare.py", "--dataset=text", f"--input={tmp_path}/a.txt",
                                "--tokenizer=byte",
                                f"--data_dir={tmp_path}/data", "--workers=4"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.05)
    assert process.returncode == 0, process.stderr.read()
    assert 50 << 20 < peak < 700 << 20


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interruption_leaves_nothing_half_and_no_process(tmp_path, number, status):
    path = write_corpus(tmp_path / "a.txt", some_documents(2000))
    # the documents never end, so the run is certainly under way
    code = ("import itertools, time, config, corpus, prepare\n"
            "endless = ((b'word ' * 2000, time.sleep(0.001) is None) for _ in itertools.count())\n"
            "corpus.text_documents = lambda *_: endless\n"
            "prepare.hold_out = lambda *_: lambda text: False\n"
            "config.run(prepare.main)")
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--dataset=text", f"--input={path}", "--tokenizer=byte", "--workers=2",
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
        assert sorted(os.listdir(tmp_path / "data")) == [".lock", "train.bin.tmp", "val.bin.tmp"]
    deadline = time.time() + 5
    while any(os.path.exists(f"/proc/{pid}") and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
              for pid in workers):
        assert time.time() < deadline, "a worker outlives the main process"
        time.sleep(0.05)
    train, _, _ = make(tmp_path, input=str(path))  # the next run is not disturbed
    assert train.count and sorted(os.listdir(tmp_path / "data")) == ["tokenizer.bin", "train.bin", "val.bin"]


def test_a_process_with_threads_prepares_without_forking_itself(tmp_path):
    path = write_corpus(tmp_path / "a.txt", some_documents(200))
    code = ("import os, sys, threading, prepare, config\n"
            "if __name__ == '__main__':\n"
            "    fork = os.fork\n"
            "    if sys.argv.pop() == 'threads':\n"
            "        threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
            "        os.fork = lambda: sys.exit('forked')\n"
            "    config.run(prepare.main)")
    (tmp_path / "main.py").write_text(code)
    for kind in ("threads", "alone"):
        args = ["--dataset=text", f"--input={path}", "--tokenizer=spm:400", f"--data_dir={tmp_path / kind}",
                "--workers=2", kind]
        done = subprocess.run([sys.executable, "-W", "error::DeprecationWarning", tmp_path / "main.py", *args],
                              timeout=100,
                              capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert (tmp_path / "alone/train.bin").read_bytes() == (tmp_path / "threads/train.bin").read_bytes()


def test_everything_imports_without_fcntl():
    code = "import sys; sys.modules['fcntl'] = None; import prepare, corpus, tokenizer"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("attempt", range(3))
def test_a_killed_worker_is_one_sentence(attempt, tmp_path, monkeypatch):
    """Beside a thread, where workers start one by one: one that starts while the pool breaks must not hold it up."""
    done = threading.Event()
    threading.Thread(target=done.wait, daemon=True).start()

    def killed(*_):
        yield b"text", True
        os.kill(next(iter(multiprocessing.active_children())).pid, signal.SIGKILL)
        while True:
            yield b"text" * 1000, True
    monkeypatch.setattr(corpus, "text_documents", lambda *a: itertools.chain([(b"text" * 200_000, True)], killed(*a)))
    monkeypatch.setattr(prepare, "hold_out", lambda *_: lambda text: False)
    with pytest.raises(UserError, match="worker process was killed"):
        make(tmp_path, input=str(write_corpus(tmp_path / "a.txt", ["x"])))
    done.set()
    assert os.listdir(tmp_path) == ["a.txt"]


# ----------------------------------------------------------------------------------------------------------------------
# The data folder and the command line

def test_the_command_line_from_text_to_open_data(tmp_path):
    docs = some_documents(300)
    write_corpus(tmp_path / "a.txt", docs)
    args = ["--dataset=text", f"--input={tmp_path}/*.txt", "--tokenizer=spm:400", f"--data_dir={tmp_path}/data",
            "--workers=2"]
    first = command(*args)
    assert first.returncode == 0, first.stderr
    assert "spm:400@" in first.stdout
    assert f"next: python train.py config/quickstart.py --data_dir={tmp_path}/data" in first.stdout
    train, val, tokenizer = prepare.open_data(Config(dataset="refinedweb", tokenizer="llama",
                                                     data_dir=f"{tmp_path}/data"))
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
    (["--tokenizer=nowhere.model"], "cannot read the tokenizer nowhere.model (No such"),
    (["--workers=-1"], "workers=-1"),
    (["--workers=100000"], "workers=100000 must be at most 512"),
    (["--colum=x"], "did you mean column"),
    (["--val_share=0.6"], "val_share=0.6 must lie between 0 and 0.5"),
    (["--val_share=-0.1"], "val_share=-0.1 must lie between 0 and 0.5"),
    (["--dataset=refinedweb", "--val_share=0.1"], "leave it out with a remote dataset and give --val_tokens"),
    (["--dataset=text", "--input=a.txt", "--val_input=b.txt", "--val_share=0.1"], "leave it out with --val_input"),
    (["--dataset=text", "--input=a.txt", "--train_tokens=10"], "train_tokens=10 belongs to a Hugging Face dataset"),
    (["--val_tokens=10"], "val_tokens=10 belongs to a Hugging Face dataset, of dataset=stdlib all text is taken"),
    (["--hf_config=x"], "hf_config=x belongs"), (["--hf_split=test"], "hf_split=test belongs"),
    (["--workers=many"], "expected a whole number"),
    (["--tokenizer=spm:50"], "cannot train 50 pieces")])
def test_mistakes_are_one_sentence_and_status_2(tmp_path, args, sentence):
    result = command(*args, f"--data_dir={tmp_path}/data")
    assert result.returncode == 2 and sentence in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("\n") == 1 and os.listdir(tmp_path) == []


def test_remote_failures_name_the_offline_way(tmp_path):
    # a proxy address where nothing listens: no network, wherever this test runs
    closed = {**os.environ, **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY",
                                             "all_proxy"), "http://127.0.0.1:9"),
              "NO_PROXY": "", "no_proxy": "", "HF_HOME": str(tmp_path / "hf"),
              "TIKTOKEN_CACHE_DIR": str(tmp_path / "tiktoken")}
    for args, sentence in ((["--dataset=refinedweb", "--tokenizer=byte"], "--dataset=stdlib, or --dataset=text"),
                           (["--tokenizer=llama"], "--tokenizer=spm:32000"),
                           (["--tokenizer=gpt2"], "--tokenizer=spm:16384")):
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
    run = "`python prepare.py --dataset=stdlib --tokenizer=spm:4096 --data_dir=data/typo`"
    with pytest.raises(UserError, match=f"data/typo holds no data: run {run}"):
        prepare.open_data(Config(data_dir="data/typo"))
    a, b = write_corpus(tmp_path / "a.txt", some_documents(200)), write_corpus(tmp_path / "b.txt", some_documents(210))
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
    prepare.ensure_data(cfg)
    train, val, tokenizer = prepare.open_data(cfg)
    assert os.path.dirname(train.path) == config.data_dir(cfg) == "data/stdlib-byte"
    assert tokenizer.decode(val.tokens[:-1].tolist()) and train.count > 5_000_000
    before = os.stat(train.path).st_mtime_ns
    prepare.ensure_data(cfg)
    assert os.stat(train.path).st_mtime_ns == before
    prepare.ensure_data(Config(data_dir="data/typo"))
    assert os.listdir("data") == ["stdlib-byte"]


def test_complete_already_compares_contents(tmp_path, capfd):
    path = write_corpus(tmp_path / "a.txt", some_documents(200))
    make(tmp_path, input=str(path))
    (tmp_path / "elsewhere").mkdir()
    times = path.stat()
    make(tmp_path, input=shutil.copy(path, tmp_path / "elsewhere"))
    assert "data is complete already" in capfd.readouterr().out
    path.write_bytes(path.read_bytes().replace(b"e", b"o", 1))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match="data already holds another text, text: 1 \\+ 0 files"):
        make(tmp_path, input=str(path))


def test_complete_already_compares_the_tokenizers_content(tmp_path, capfd):
    text, model = write_corpus(tmp_path / "a.txt", some_documents(200)), tmp_path / "my.model"
    model.write_bytes(prepare.train_sentencepiece(300, some_documents()))
    make(tmp_path, input=str(text), tokenizer=str(model))
    make(tmp_path, input=str(text), tokenizer=str(model))
    assert "data is complete already" in capfd.readouterr().out
    model.write_bytes(prepare.train_sentencepiece(301, some_documents()))
    with pytest.raises(UserError, match="data already holds another tokenizer, text: .* in my.model@"):
        make(tmp_path, input=str(text), tokenizer=str(model))
    with pytest.raises(UserError, match="not text: 1 .* in my.model"):
        os.rename(tmp_path / "data", tmp_path / "text-model")
        folder, config.data_dir = config.data_dir, lambda cfg: str(tmp_path / "text-model")
        try:
            prepare.open_data(Config(dataset="text", input=str(text), tokenizer=str(model)))
        finally:
            config.data_dir = folder


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_complete_already_verifies_the_payload(tmp_path, name):
    path = write_corpus(tmp_path / "a.txt", some_documents(300))
    make(tmp_path, input=str(path))
    with open(tmp_path / "data" / name, "r+b") as f:
        f.seek(-2, os.SEEK_END)
        f.write(b"\0\0")
    with pytest.raises(UserError, match=f"{name} is damaged: its checksum .* prepare it again"):
        make(tmp_path, input=str(path))


def test_train_bin_appears_last(tmp_path, monkeypatch):
    path = write_corpus(tmp_path / "a.txt", some_documents(200))
    replace, seen = os.replace, []

    def recorded(old, new):
        seen.append((os.path.basename(new), sorted(os.listdir(tmp_path / "data"))))
        if os.path.basename(new) == "train.bin" and len(seen) < 3:
            raise OSError("the disk is full")
        replace(old, new)
    monkeypatch.setattr(os, "replace", recorded)
    with pytest.raises(UserError, match="the disk is full"):
        make(tmp_path, input=str(path))
    assert [name for name, _ in seen] == ["val.bin", "train.bin"] and {"val.bin", "tokenizer.bin"} <= set(seen[1][1])
    assert sorted(os.listdir(tmp_path / "data")) == ["tokenizer.bin", "val.bin"]
    train, val, _ = make(tmp_path, input=str(path))
    assert train.count and val.count and sorted(os.listdir(tmp_path / "data")) == ["tokenizer.bin", "train.bin",
                                                                                   "val.bin"]


def test_another_sources_files_are_refused(tmp_path):
    for name, docs, tokenizer in (("a", 200, "byte"), ("b", 210, "byte"), ("c", 200, "spm:400")):
        make(tmp_path, name, input=str(write_corpus(tmp_path / "x.txt", some_documents(docs))), tokenizer=tokenizer)
    for other in "bc":
        for name in ("val.bin", "train.bin"):
            mixed = tmp_path / f"{other}-{name}"
            shutil.copytree(tmp_path / "a", mixed)
            shutil.copy(tmp_path / other / name, mixed)
            with pytest.raises(UserError, match="is mixed, val.bin being text: .* prepare it again"):
                prepare.open_data(Config(data_dir=str(mixed)))
    shutil.copy(tmp_path / "c" / "tokenizer.bin", tmp_path / "b")
    shutil.copy(tmp_path / "c" / "train.bin", tmp_path / "c" / "val.bin")
    (tmp_path / "c" / "tokenizer.bin").write_bytes(b"another")
    with pytest.raises(UserError, match="spm:400@.* is damaged: it hashes to"):
        prepare.open_data(Config(data_dir=str(tmp_path / "c")))


def test_bytes_per_token_count_only_what_was_kept(tmp_path, monkeypatch, capfd):
    def endless(*_):
        return ((f"{i} {'é' * (i % 50)}".encode(), True) for i in itertools.count())
    monkeypatch.setattr(corpus, "hub_documents", endless)
    train, val, tokenizer = make(tmp_path, dataset="some/where", train_tokens=5_001, val_tokens=777)
    assert (train.count, val.count) == (5001, 777)
    kept = sum(len(tokenizer.decode_bytes(f.tokens.tolist())) for f in (train, val))
    assert f"bytes/token  {kept / 5778:.3f}" in capfd.readouterr().out and kept < 5778


def test_warnings_count_unknown_tokens_and_separators_inside_documents(tmp_path, capfd):
    import sentencepiece
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a b c d e"] * 50), vocab_size=12,
                                             model_type="bpe",
                                             model_prefix=str(tmp_path / "small"), minloglevel=3)
    docs = [f"a b 漢 {'c ' * i} <|endoftext|> d<|endoftext|>\n" for i in range(150)]
    path = write_corpus(tmp_path / "a.txt", docs)
    train, val, tokenizer = make(tmp_path, input=str(path), tokenizer=str(tmp_path / "small.model"))
    err = capfd.readouterr().err
    unknown = sum(int((f.tokens == 0).sum()) for f in (train, val))
    total = train.count + val.count
    assert unknown >= 150
    assert f"warning: {unknown:,} of {total:,} tokens ({unknown / total:.2%}) are unknown to small.model@" in err
    assert "warning: <|endoftext|> stands inside documents 300 times as plain text" in err
    make(tmp_path, "clean", input=str(write_corpus(tmp_path / "b.txt", some_documents(300))))
    assert capfd.readouterr().err == ""


def tiny_preset(folder, **values):
    values = {"n_layer": 1, "n_embd": 16, "n_head": 1, "block_size": 64, "batch_size": 2, "micro_batch_size": 2,
              "max_tokens": 256,
              "device": "cpu", "resume": "auto", **values}
    (folder / "tiny.py").write_text("".join(f"{name} = {value!r}\n" for name, value in values.items()))
    return str(folder / "tiny.py")


def test_the_next_command_names_a_run_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preset = tiny_preset(tmp_path, dataset="text", tokenizer="byte", input="a.txt")
    write_corpus(tmp_path / "a.txt", some_documents(300))
    prepare.prepare(config.load([preset])[0], Settings(workers=1))
    train = ["python", str(ROOT / "train.py"), preset]
    hint = lambda folder: shlex.split(prepare.next_command(preset, folder))
    assert hint("data/text-byte") == train  # the preset's own data
    os.makedirs("out/tiny")
    Path("out/tiny/config.json").touch()
    assert hint("data/text-byte") == [*train, "--out_dir=out/tiny-2"]
    shutil.copytree("data/text-byte", "data/my own")
    assert hint("data/my own") == hint("data/my own/")[:3] + ["--data_dir=data/my own", "--out_dir=out/my own"]
    for name in ("my own", "my own-2"):
        os.makedirs(f"out/{name}")
        Path(f"out/{name}/config.json").touch()
    assert hint("data/my own")[-1] == "--out_dir=out/my own-3"


@pytest.mark.parametrize("docs, values", [(300, {}), (60, {"batch_size": 400, "block_size": 1024})])
def test_the_next_command_trains(tmp_path, docs, values):
    pytest.importorskip("torch")
    preset = tiny_preset(tmp_path, **values)
    (tmp_path / "out/data").mkdir(parents=True)
    (tmp_path / "out/data/config.json").write_text("{}")
    path = write_corpus(tmp_path / "a.txt", some_documents(docs))
    done = command(preset, "--dataset=text", f"--input={path}", "--tokenizer=byte", "--data_dir=data", "--workers=1",
                   cwd=tmp_path)
    assert done.returncode == 0 and ("warning" in done.stderr) == bool(values), done.stderr
    train, val = (TokenFile(str(tmp_path / "data" / name)) for name in ("train.bin", "val.bin"))
    fits = min(val.count - 1, (train.count - 1) // values.get("batch_size", 2))
    words = [f"--block_size={2 ** int(np.log2(fits))}"] if values else []
    line = shlex.split(done.stdout.splitlines()[-1].removeprefix("next: "))
    assert line[2:5] == [preset, "--data_dir=data", "--out_dir=out/data-2"] and line[5:] == words
    line += ["--max_tokens=10000", "--final_eval_tokens=64"]
    done = subprocess.run([sys.executable, *line[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "done" in done.stdout, done.stderr
    assert (tmp_path / "out/data-2/model.pt").exists()


def test_too_little_text_for_any_training_gives_no_command(tmp_path):
    (tmp_path / "hi.txt").write_text("hi\n")
    done = command("--dataset=text", "--input=hi.txt", "--tokenizer=byte", "--data_dir=data", "--workers=1",
                   cwd=tmp_path)
    assert done.returncode == 0 and "next" not in done.stdout
    assert "3 training and 1 validation tokens are few for" in done.stderr
