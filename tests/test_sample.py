"""sample: prompts in, texts out, from files and as files; merged and unfinished models, mistakes, failing streams."""
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import config
import decode
import sample
from config import UserError
from conftest import LOWRANK, ROOT, TINY, assert_one_sentence, train_run
from model import GPT, load
from test_decode import make, plain_greedy


@pytest.fixture(scope="module")
def finished(finished, tmp_path_factory):
    """A copy, since decode=auto leaves its table beside the model."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("sampled") / "finished")


@pytest.fixture(scope="module")
def gpt(finished):
    return load(str(finished), torch.device("cpu"))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder whose model has random weights and a context of 64 bytes."""
    out = tmp_path_factory.mktemp("run")
    model = make(ffn="lowrank", rank=16)
    cfg = config.to_dict(model.cfg)
    torch.save({"config": cfg, "model": model.state_dict(), "step": 1, "val_loss": 1.0,
                "tokenizer": {"identity": "byte", "blob": torch.zeros(1, dtype=torch.uint8)}}, out / "model.pt")
    return out


def script(monkeypatch, *ids):
    """Makes every model generate these tokens, on whatever device and in a CUDA graph too."""
    logits = {}

    def step(self, tokens, cache, lengths=None):
        cache.advance(1 if lengths is None else lengths, tokens[:, -1])
        if cache.position.device not in logits:
            one_hot = torch.nn.functional.one_hot(torch.tensor(ids), 257).float() * 100
            logits[cache.position.device] = one_hot.to(cache.position.device)
        return logits[cache.position.device][(cache.position - 1).clamp(max=len(ids) - 1)]

    monkeypatch.setattr(GPT, "step", step)
    monkeypatch.setattr(decode.ops, "ON", False)  # the fused step would run instead


def say(capsys, folder, **kw):
    """sample.main with these settings -> standard output."""
    s = sample.Settings(**{**dict(device="cpu", decode="structured"), **kw})
    sample.main(str(folder), s, sample.read_prompts(s))
    return capsys.readouterr().out


QUICK = ["--device=cpu", "--decode=structured"]


def json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# One text

def test_the_command_streams_prompt_and_text(cli, finished, gpt):
    given = ["--prompt=the", "--temperature=0", "--max_new_tokens=6", "--device=cpu"]
    status, out, err = cli("sample.py", finished, *given)
    assert status == 0 and not err
    assert out == "the" + bytes(plain_greedy(gpt, b"the", 6)).decode(errors="replace") + "\n"


def test_without_a_prompt_a_document_begins(cli, finished, gpt):
    out = cli("sample.py", finished, "--temperature=0", "--max_new_tokens=5", "--device=cpu")[1]
    assert out == bytes(plain_greedy(gpt, [256], 5)).decode(errors="replace") + "\n"


def test_a_text_ends_at_eos(cli, finished, tmp_path, monkeypatch):
    script(monkeypatch, *b"bc", 256, *b"de")
    assert cli("sample.py", finished, "--prompt=a", "--temperature=0") == (0, "abc\n", "")
    assert cli("sample.py", finished, "--prompt=a", "--temperature=0", f"--out={tmp_path / 'r.jsonl'}")[0] == 0
    found, = json_lines((tmp_path / "r.jsonl").read_text())
    assert (found["text"], found["new_tokens"], found["finish"]) == ("bc", 2, "eos")


def test_the_end_of_the_context_is_reported(cli, finished, monkeypatch):
    script(monkeypatch, *range(97, 113))
    status, _, err = cli("sample.py", finished, "--prompt=the")
    assert status == 0 and err == "the text ends here: it fills the model's context of 16 tokens.\n"
    assert not cli("sample.py", finished, "--prompt=the", "--max_new_tokens=3")[2]


def test_a_character_that_spans_tokens_is_written_whole(cli, finished, monkeypatch):
    ids = list("é中".encode()) + [0xE4]
    script(monkeypatch, *ids, 256)
    assert cli("sample.py", finished, "--prompt=a", "--temperature=0")[1] == "aé中\ufffd\n"


def test_samples_differ_and_each_depends_on_seed_and_number_only(cli, finished):
    def samples(*argv):
        out = cli("sample.py", finished, "--prompt=the", "--temperature=1", *argv)[1]
        return [part.split("\n", 1)[1] for part in out.split("--- sample ")[1:]]
    three, two, other = samples("--n_samples=3"), samples("--n_samples=2"), samples("--n_samples=2", "--seed=7")
    assert len(three) == 3 and len(set(three)) == 3 and three[:2] == two and not set(two) & set(other)


def test_a_bare_model_file_is_enough(cli, finished, tmp_path, monkeypatch):
    expected = cli("sample.py", finished, "--prompt=a")
    shutil.copy(finished / "model.pt", tmp_path / "moved.pt")
    monkeypatch.chdir(tmp_path)
    assert cli("sample.py", "moved.pt", "--prompt=a") == expected and expected[0] == 0


def test_prompts_from_file_and_standard_input(cli, finished, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("née 中")
    expected = cli("sample.py", finished, "--prompt=née 中")
    assert expected[0] == 0 and expected[1].startswith("née 中")
    assert cli("sample.py", finished, f"--prompt_file={tmp_path / 'prompt.txt'}") == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("née 中".encode()), "ascii"))
    assert cli("sample.py", finished, "--prompt_file=-") == expected
    monkeypatch.setattr(sys, "stdin", None)  # as with <&-
    status, out, err = cli("sample.py", finished, "--prompt_file=-")
    assert_one_sentence(status, out, err)
    assert "standard input is closed" in err


@pytest.mark.parametrize("prompt", ['"""A."""', "'x'", "None", "1e3", "[1, 2]", "a=b", "é中✓", "--x", " y\t"])
def test_a_prompt_is_taken_as_it_is(cli, finished, prompt):
    status, out, _ = cli("sample.py", finished, f"--prompt={prompt}", "--max_new_tokens=1")
    assert status == 0 and out.startswith(prompt)


@pytest.mark.parametrize("data, prompt", [
    (b"\xef\xbb\xbfdef", "def"), (b"a\r\nb\r\n", "a\r\nb\r\n"), (b"one\rtwo\n", "one\rtwo\n"),
    ("\ufeff\ufeffé".encode(), "\ufeffé")])
def test_a_prompt_file_is_read_as_a_corpus_is(folder, tmp_path, capfdbinary, data, prompt):
    """One byte order mark is dropped; every other byte stays, the line ends too."""
    (tmp_path / "p.txt").write_bytes(data)
    s = sample.Settings(prompt_file=str(tmp_path / "p.txt"), device="cpu", decode="structured", max_new_tokens=1)
    sample.main(str(folder), s, sample.read_prompts(s))
    assert capfdbinary.readouterr().out.startswith(prompt.encode())


def test_a_prompt_in_a_terminal_without_utf8(folder):
    """The argument's bytes are UTF-8, whatever Python took them for."""
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    argv = [sys.executable, ROOT / "sample.py", folder, "--prompt=é", "--max_new_tokens=1", *QUICK]
    done = subprocess.run(argv, capture_output=True, env=env)
    assert done.returncode == 0 and done.stdout.startswith("é".encode())


def test_padding_of_the_vocabulary_is_never_sampled(cli, data, tmp_path):
    out = train_run(tmp_path / "padded", data, *LOWRANK, "--vocab_size=2000", "--max_tokens=128")
    assert load(str(out), torch.device("cpu"))[0].wte.weight.shape[0] == 2000
    for seed in range(3):
        assert cli("sample.py", out, "--temperature=100", f"--seed={seed}", "--prompt=a")[0] == 0


# ----------------------------------------------------------------------------------------------------------------------
# Many prompts

def test_prompts_from_a_file_to_json_lines(folder, tmp_path, capsys):
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "hello", "id": 7}\n{"prompt": "a longer prompt, with é"}\n')
    found = json_lines(say(capsys, folder, prompts=str(lines), n_samples=2, max_new_tokens=9))
    assert [(r["prompt"], r["fields"], r["sample"]) for r in found] == [
        ("hello", {"id": 7}, 0), ("hello", {"id": 7}, 1),
        ("a longer prompt, with é", {}, 0), ("a longer prompt, with é", {}, 1)]
    batches = json_lines(say(capsys, folder, prompts=str(lines), n_samples=2, max_new_tokens=9, batch_size=3))
    assert [{**a, "tokens_per_s": 0} for a in batches] == [{**b, "tokens_per_s": 0} for b in found]  # 3 rows, then 1
    assert found[0]["text"] != found[1]["text"] and found[0]["prompt_tokens"] == 5 and found[2]["prompt_tokens"] == 24
    assert all(r["finish"] in ("length", "eos") and r["new_tokens"] <= 9 and r["tokens_per_s"] > 0 for r in found)

    text = tmp_path / "p.txt"
    text.write_text("a longer prompt, with é\nhello\n")
    out = tmp_path / "out.jsonl"
    assert say(capsys, folder, prompts=str(text), out=str(out), max_new_tokens=9, batch_size=1) == ""
    other = json_lines(out.read_text())
    assert [r["text"] for r in other] == [found[2]["text"], found[0]["text"]] and "fields" not in other[0]
    assert say(capsys, folder, prompt="hello", max_new_tokens=9) == "hello" + found[0]["text"] + "\n"


def test_a_prompts_own_fields_come_back_untouched(folder, tmp_path, capsys):
    """Fields with the names of ours; and answers that are prompts once more keep theirs."""
    own = {"text": "my gold reference", "sample": "id-7", "finish": "x", "fields": [1], "prompt_tokens": None}
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "def f():", **own}))
    once = say(capsys, folder, prompts=str(tmp_path / "p.jsonl"), max_new_tokens=3)
    (tmp_path / "q.jsonl").write_text(once)
    twice = say(capsys, folder, prompts=str(tmp_path / "q.jsonl"), max_new_tokens=3)
    (a,), (b,) = json_lines(once), json_lines(twice)
    assert a["fields"] == own and a["prompt"] == "def f():" and a["sample"] == 0 and a["finish"] == "length"
    assert b["fields"] == {name: value for name, value in a.items() if name != "prompt"} and b["text"] == a["text"]


@pytest.mark.parametrize("name, data, prompts", [
    ("p.txt", b"\xef\xbb\xbfdef f():\nimport os\n", ["def f():", "import os"]),
    ("p.txt", b"a = 1\r\nb = 2\r\n", ["a = 1", "b = 2"]),
    ("p.txt", b"one\rstill one\ntwo\nthree\r", ["one\rstill one", "two", "three\r"]),
    ("p.txt", "a\u2028b\x0bc\x85d\n".encode(), ["a\u2028b\x0bc\x85d"]),
    ("p.jsonl", b"\xef\xbb\xbf" + b'{"prompt":"def f():"}\n', ["def f():"]),
    ("p.jsonl", b'{"prompt":"a"}\r\n\r\n \n{"prompt":"b\\r\\nc"}\n\n', ["a", "b\r\nc"]),
    ("P.JSONL", b'{"prompt":"a"}\n', ["a"])])
def test_lines_of_prompts_are_read_as_a_corpus_is(tmp_path, name, data, prompts):
    (tmp_path / name).write_bytes(data)
    found = sample.read_prompts(sample.Settings(prompts=str(tmp_path / name)))
    assert [prompt.text for prompt in found] == prompts
    if name == "p.jsonl" and len(prompts) == 2:
        assert [prompt.where.split(" of ")[0] for prompt in found] == [" in line 1", " in line 4"]


# ----------------------------------------------------------------------------------------------------------------------
# A merged model

def test_merge_writes_a_dense_model_with_the_same_text(folder, capsys):
    before = say(capsys, folder, prompt="hello", temperature=0.0)
    report = say(capsys, folder, merge=True, prompt="hello")
    merged = Path(f"{folder}-merged")
    assert "largest logit difference" in report and float(report.split("difference ")[1].split()[0]) < 1e-3
    _, cfg, _ = load(str(merged), torch.device("cpu"))
    assert cfg.ffn == "dense"
    assert say(capsys, merged, prompt="hello", temperature=0.0) == before
    with pytest.raises(UserError, match="exists"):
        say(capsys, folder, merge=True)
    with pytest.raises(UserError, match="dense already"):
        say(capsys, merged, merge=True)


def test_merge_of_low_rank_queries_and_keys(data, tmp_path, capsys):
    out = train_run(tmp_path / "run", data, "--qk_rank=8")
    capsys.readouterr()
    before = say(capsys, out, prompt="the", temperature=0.0)
    say(capsys, out, merge=True)
    model, cfg, _ = load(f"{out}-merged", torch.device("cpu"))
    assert cfg.qk_rank == 0 and not any(name.endswith((".V", ".U")) for name in model.state_dict())
    assert say(capsys, f"{out}-merged", prompt="the", temperature=0.0) == before


def test_merge_from_within_the_runs_folder(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / "run"))
    say(capsys, ".", merge=True)
    assert (tmp_path / "run-merged" / "model.pt").exists() and not list((tmp_path / "run").glob(".*"))


def test_merge_into_a_folder_that_cannot_be_written(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("decode.json"))
    (tmp_path / "run-merged").write_text("a file where the folder would be")
    long = tmp_path / "run" / ("m" * 240 + ".pt")  # with -merged it fits into a file name, the temporary name does not
    (tmp_path / "run" / "model.pt").rename(long)
    shutil.copy(long, tmp_path / "run" / "model.pt")
    before = sorted(tmp_path.rglob("*"))
    for model, words in (("run", r"run-merged/model.pt \("), (long, r".*\(File name too long\)")):
        with pytest.raises(UserError, match=f"cannot write {words}"):
            say(capsys, model, merge=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("guide", ["fixedstep", "fixedflop"])
def test_merge_of_a_guided_run(data, tmp_path, capsys, guide):
    out = train_run(tmp_path / "guided", data, *LOWRANK, f"--guide={guide}", "--guide_ratio=0.5")
    capsys.readouterr()
    before = say(capsys, out, prompt="the", temperature=0.0)
    say(capsys, out, merge=True)
    merged = Path(f"{out}-merged")
    model, cfg, _ = load(str(merged), torch.device("cpu"))
    assert (cfg.ffn, cfg.rank, cfg.guide) == ("dense", 0, "off") and not model.structured_linears()
    assert not any(name.endswith((".V", ".U", ".W")) for name in model.state_dict())
    assert say(capsys, merged, prompt="the", temperature=0.0) == before


# ----------------------------------------------------------------------------------------------------------------------
# Runs that are not finished; a copy without fused kernels

def test_an_unfinished_run_is_sampled_and_says_so(cli, finished, tmp_path):
    """ckpt.pt of the last step holds the weights of model.pt: the text is the same, with one line about the run."""
    shutil.copy(finished / "ckpt.pt", tmp_path / "ckpt.pt")
    given = ["--prompt=the", "--temperature=0", *QUICK]
    for path in (tmp_path, tmp_path / "ckpt.pt"):
        status, out, err = cli("sample.py", path, *given)
        assert (status, out) == cli("sample.py", finished, *given)[:2] and status == 0
        assert err.count("\n") == (2 if "context" in err else 1) and "before the run was finished" in err \
            and "step 8" in err
    assert "finished" not in cli("sample.py", finished, *given)[2]


def test_everything_works_without_the_folder_ops(data, tmp_path):
    """A copy without ops/ trains to the same weights, samples, and every script loads."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("config/*.py")):
        target = tmp_path / "copy" / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    argv = [*TINY, *LOWRANK, "--max_tokens=384", f"--data_dir={data}"]  # 3 steps
    code = f"""
import importlib, runpy, sys
sys.path.insert(0, ".")
for name in {sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "modeling_factors")}:  # of transformers
    importlib.import_module(name)
sampling = ["sample.py", "out", "--prompt=the", "--temperature=0", "--device=cpu"]
commands = ["train.py", *{argv}, "--out_dir=out"], sampling
for argv in commands:
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "copy", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = load(str(train_run(tmp_path / "here", data, *argv)), torch.device("cpu"))[0]
    there = load(str(tmp_path / "copy" / "out"), torch.device("cpu"))[0]
    for (name, a), b in zip(here.state_dict().items(), there.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=name)
    assert done.stdout.endswith("the" + bytes(plain_greedy(there, b"the", 13)).decode(errors="replace") + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes

@pytest.mark.parametrize("argv, word", [
    (["--prompt=" + "a" * 16], "16 tokens"), (["--prompt_file=nowhere.txt"], "nowhere.txt"),
    (["--prompt=a", "--prompt_file=b"], "exclude"), (["--temperature=-1"], "temperature=-1"),
    (["--temperature=hot"], "temperature=hot"), (["--top_p=0"], "top_p=0"), (["--top_k=-1"], "top_k=-1"),
    (["--min_p=2"], "min_p=2"), (["--top_p=1.5"], "top_p=1.5"), (["--prompt="], "the prompt is empty"),
    (["--prompt=a", "--prompts=b"], "exclude"), (["--decode=fast"], "decode=fast"),
    (["--prompts=nowhere.txt"], "nowhere.txt"),
    (["--out=/no/such/folder/x.jsonl"], "/no/such/folder/x.jsonl"), (["--n_samples=0"], "n_samples=0"),
    (["--temprature=1"], "did you mean temperature?"), (["out/second"], "2 were given"),
    (["--device=cuda:99"], "cuda:99"), (["--device=cpu", "--graphs=True"], "graphs=True needs a CUDA device")])
def test_mistakes_are_one_sentence_and_status_2(cli, finished, argv, word):
    status, out, err = cli("sample.py", finished, *argv)
    assert_one_sentence(status, out, err)
    assert word in err


def test_mistakes_about_the_model_and_the_prompts_bytes(cli, finished, tmp_path):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    for argv, word in (([tmp_path / "none"], "does not exist"), ([tmp_path], "does not exist"),
                       ([finished / "metrics.jsonl"], "damaged"),
                       ([finished, f"--prompt_file={tmp_path / 'latin1.txt'}"], "UTF-8"),
                       ([finished, f"--prompt_file={tmp_path}"], "cannot read")):
        status, out, err = cli("sample.py", *argv)
        assert_one_sentence(status, out, err)
        assert word in err


def test_bad_input_is_one_sentence_each(folder, tmp_path, monkeypatch, capsys):
    def refused(match, **kw):
        with pytest.raises(UserError, match=match) as e:
            say(capsys, folder, **kw)
        assert "\n" not in str(e.value) and len(str(e.value)) <= 400

    def file(text, name="f.txt"):
        path = tmp_path / name
        path.write_bytes(text)
        return str(path)

    refused("has 64 tokens, the model's context holds 64: shorten it to 63", prompt="x" * 64)
    refused("in line 2 of .* has 70 tokens", prompts=file(b"ok\n" + b"y" * 70))
    long = b'{"prompt": "a"}\n\n{"prompt": "%s"}' % (b"y" * 70)
    refused("in line 3 of .* has 70 tokens", prompts=file(long, "f.jsonl"))
    refused("in line 1 of .* is empty", prompts=file(b"\nok\n"))
    refused("is empty", prompt_file=file(b""))
    refused("holds no prompts", prompts=file(b""))
    refused("not UTF-8", prompt_file=file(b"\xff\xfe"))
    refused("not UTF-8", prompt="\udcff")
    refused("line 1 of .* is not JSON", prompts=file(b"{]\n", "f.jsonl"))
    refused("no field \"prompt\"", prompts=file(b'{"text": "x"}\n', "f.jsonl"))
    for line in (b'{"prompt": "a", "id": "\\ud800"}', b'{"prompt": "a", "id": NaN}', b'{"prompt": "a", "id": 1e999}',
                 b"[" * 100_000, b'{"prompt": "\\udcff"}'):
        refused("line 2 of .* is not JSON in UTF-8", prompts=file(b'{"prompt": "a"}\n' + line, "f.jsonl"))
    monkeypatch.setattr(decode, "free_bytes", lambda device: 2**28 + 2**25)
    refused("a batch of 2000 sequences .* largest that fits is", prompts=file(b"x\n"), n_samples=2000, batch_size=4000)


def test_a_context_of_one_token_is_refused(data, tmp_path, capsys):
    """No token fits after the first one: its samples were lost, without a line."""
    run = train_run(tmp_path / "run", data, "--block_size=1", "--max_tokens=8")
    for how in ({}, {"prompt": "x"}, {"out": str(tmp_path / "texts.jsonl")}):
        with pytest.raises(UserError, match="block_size=1, a context without room"):
            say(capsys, run, **how)
    assert not (tmp_path / "texts.jsonl").exists()


def test_models_of_another_version_and_status(cli, folder, tmp_path):
    saved = torch.load(folder / "model.pt", weights_only=True)
    saved["config"]["heads_of_tomorrow"] = 3
    torch.save(saved, tmp_path / "model.pt")
    status, out, err = cli("sample.py", tmp_path)
    assert_one_sentence(status, out, err)
    assert "heads_of_tomorrow" in err and err.count("\n") == 1
    assert cli("sample.py", folder, "--top_p=2") == (2, "", "error: top_p=2.0 must be above 0 and at most 1.\n")


def test_mistakes_in_prompts_are_found_before_torch_loads(without_torch, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "x"}\n')
    for given, word in ((f"--prompts={tmp_path / 'p.jsonl'}", "has no field"), ("--prompt=", "empty"),
                        (f"--out={tmp_path / 'p.jsonl'}", "exists already")):
        status, out, err = without_torch("sample.py", "run", given)
        assert_one_sentence(status, out, err)
        assert word in err


# ----------------------------------------------------------------------------------------------------------------------
# Result files and failing streams

def test_a_result_is_never_overwritten(cli, folder, tmp_path):
    """Neither an old one nor the prompts themselves, by whatever name."""
    prompts, old = tmp_path / "p.txt", tmp_path / "old.jsonl"
    prompts.write_text("hello\n")
    old.write_text("old\n")
    (tmp_path / "link").symlink_to(prompts)
    for out in (prompts, f"{tmp_path}/./p.txt", tmp_path / "link", old, tmp_path):
        status, stdout, err = cli("sample.py", folder, f"--prompts={prompts}", f"--out={out}", "--device=cpu")
        assert_one_sentence(status, stdout, err)
        assert f"{out} exists already" in err
    assert prompts.read_text() == "hello\n" and old.read_text() == "old\n"


def test_a_result_that_came_while_torch_loaded_is_not_overwritten(capsys, folder, tmp_path):
    (tmp_path / "new.jsonl").write_text("of the same command, given twice\n")
    with pytest.raises(UserError, match="new.jsonl .File exists"):
        say(capsys, folder, out=str(tmp_path / "new.jsonl"))
    assert (tmp_path / "new.jsonl").read_text() == "of the same command, given twice\n"


def test_a_full_disk_leaves_whole_lines(folder, tmp_path, capsys):
    """The file system takes 700 bytes, about four answers and a half: the half is cut off again."""
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\ne\nf\ng\nh\n")
    out = tmp_path / "r.jsonl"

    def answer(limit, **kw):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(UserError, match=rf"cannot write {out} \(File too large\): make room there"):
                say(capsys, folder, prompts=str(tmp_path / "p.txt"), out=str(out), max_new_tokens=3, **kw)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return capsys.readouterr().err

    err = answer(700, batch_size=2)
    found = json_lines(out.read_text())
    assert out.read_text().endswith("\n") and 2 <= len(found) < 8
    assert [r["prompt"] for r in found] == list("abcdefgh")[:len(found)]
    assert err == f"{out} keeps the {len(found)} samples that were finished.\n"
    out.unlink()
    assert answer(50) == "" and not out.exists()  # nothing is kept, and the same command may come again


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("given", [["--prompt=a"], ["--prompt=a", "--out=/dev/full"], ["--prompts=p.txt"]])
def test_a_full_device_is_one_sentence(cli, folder, tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a\n")
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    status, _, err = cli("sample.py", folder, *given, *QUICK)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and "(No space left on device)" in err


def test_a_closed_pipe_is_a_quiet_end(folder):
    argv = [sys.executable, ROOT / "sample.py", folder, "--prompts=-", "--n_samples=500", "--batch_size=1", *QUICK]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b"a\n")
        process.stdin.close()
        assert json.loads(process.stdout.readline())["prompt"] == "a"
        process.stdout.close()  # as head -1 does
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("given", [["--prompt=é"], ["--prompts=p.txt"]])
def test_standard_output_that_cannot_show_the_text(cli, folder, tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("é\n")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    status, _, err = cli("sample.py", folder, *given, *QUICK)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and "PYTHONIOENCODING=utf-8" in err


def test_characters_that_the_tokenizer_does_not_know_are_refused():
    """A replacement character of the text itself is another matter."""
    stub = SimpleNamespace(identity="m.model@12", eos=2, table=["\ufffd".encode(), b"a", b""],
                           encode=lambda text: [int(c == "a") for c in text])
    cfg = SimpleNamespace(block_size=8)
    assert sample.encode(sample.Prompt("aa"), stub, cfg) == [1, 1]
    assert sample.encode(sample.Prompt("a\ufffd"), stub, cfg) == [1, 0]
    with pytest.raises(UserError, match="in line 3 holds characters that the tokenizer m.model@12 does not know"):
        sample.encode(sample.Prompt("ab", " in line 3"), stub, cfg)
