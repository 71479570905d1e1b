"""decode and sample: cached against full forwards, equal texts over forms and batches, draws, ends, the table of speeds, the command."""
import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import config
import decode
import merge
import sample
import structured
from config import Config, UserError
from conftest import ROOT
from decode import Decoder, Row, row_key
from merge import ready
from model import Cache, build, load

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))
DEVICES = ["cpu", CUDA]
KERNELS = pytest.mark.skipif(not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or TRITON_INTERPRET=1")
MODELS = {
    "dense": {},
    "absolute, grouped": dict(pos="absolute", n_kv_head=2, attn_dim=64),
    "lowrank swiglu": dict(act="swiglu", norm="rmsnorm", ffn="lowrank", rank=16, bias=False, tie_embeddings=False),
    "blockshuffle, one key head": dict(ffn="blockshuffle", nblocks=4, n_kv_head=1),
    "blockdense": dict(ffn="blockdense", rank=32, nblocks=2, n_kv_head=2, act="relu2"),
    "wide attention": dict(ffn="lowrank", rank=24, attn_dim=256, n_kv_head=2),
}


def make(device="cpu", block_size=64, **kw):
    cfg = Config(**{**dict(n_layer=3, n_embd=128, n_head=4, block_size=block_size, vocab_size=257), **kw})
    config.check(cfg)
    model = build(cfg, torch.device(device), seed=1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)  # logits far apart: equal text is a sharp test
    return model.eval()


def settings(**kw):
    return sample.Settings(**{**dict(temperature=0.0, max_new_tokens=20), **kw})


def prompts_of(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (n,), generator=g).tolist() for n in lengths]


def texts(model, prompts, s, batch, length=64, **kw):
    decoder = Decoder(model, s, batch, length, **kw)
    rows = [Row(p, row_key(s.seed, p)) for p in prompts]
    for i in range(0, len(rows), batch):
        for _ in decoder.run(rows[i:i + batch], chunk=7):
            pass
    return [row.new for row in rows]


@torch.no_grad()
def plain_greedy(model, prompt, n):
    """The oracle: a full forward per token."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(model(torch.tensor([tokens], device=model.head.weight.device))[0, -1].argmax().item())
    return tokens[len(prompt):]


# ----------------------------------------------------------------------------------------------------------------------
# The cache

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_cached_logits_are_those_of_the_full_forward(name, device):
    model = make(device, **MODELS[name])
    lengths = torch.tensor([5, 1, 9, 20], device=device)
    tokens = torch.randint(257, (4, 60), device=device)
    cache = Cache(model.cfg, 4, 64, device, torch.float32)
    logits = model.step(tokens[:, :20], cache, lengths)
    for step in range(40):
        if step % 8 == 0:
            full = torch.stack([model(tokens[b:b + 1, :n + step])[0, -1] for b, n in enumerate(lengths.tolist())])
            torch.testing.assert_close(logits, full, atol=1e-4, rtol=1e-4)
        logits = model.step(tokens[torch.arange(4), lengths + step][:, None], cache)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_factors_merged_auto_and_graphs_give_the_same_greedy_text(name, device):
    prompts = prompts_of([7, 1, 30])
    expected = [plain_greedy(make(device, **MODELS[name]), p, 20) for p in prompts]
    for kind in ("structured", "merged", "auto"):
        model = ready(make(device, **MODELS[name]), kind, torch.float32)
        for graphs in {False, device == "cuda"}:
            assert texts(model, prompts, settings(), 3, graphs=graphs) == expected, (kind, graphs)


def test_prompts_in_slices_and_a_half_full_batch(monkeypatch):
    model = ready(make(ffn="lowrank", rank=16), "structured", torch.float32)
    prompts = prompts_of([9, 3, 12, 5, 20])
    one_by_one = [texts(model, [p], settings(), 1)[0] for p in prompts]
    monkeypatch.setattr(decode, "PREFILL", 25)
    assert texts(model, prompts, settings(), 3) == one_by_one


def test_a_step_looks_at_few_places_and_at_all_that_count():
    model = ready(make(block_size=1024, n_layer=1), "structured", torch.float32)
    decoder = Decoder(model, settings(), 1, 1024)
    seen = []
    for tokens in range(1, 1025):
        decoder.look(tokens)
        assert tokens <= decoder.cache.seen <= tokens + 128
        seen.append(decoder.cache.seen)
    assert len(set(seen)) <= 8


@KERNELS
@pytest.mark.parametrize("name", [name for name in MODELS if "absolute" not in name])
@pytest.mark.parametrize("batch", [1, 6])
@torch.no_grad()
def test_fused_step_is_the_step(name, batch):
    kernels = pytest.importorskip("ops.decode")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make(device, **{**MODELS[name], "n_layer": 2})
    assert kernels.can_step(model, Cache(model.cfg, batch, 64, device, torch.float32))
    lengths, tokens = torch.arange(3, 3 + 5 * batch, 5, device=device), torch.randint(257, (batch, 64), device=device)
    caches = [Cache(model.cfg, batch, 64, device, torch.float32) for _ in range(2)]
    for cache in caches:
        model.step(tokens[:, :max(lengths.tolist())], cache, lengths)
    for i in range(2):
        token = tokens[torch.arange(batch), lengths + i][:, None]
        torch.testing.assert_close(kernels.step(model, token, caches[1]), model.step(token, caches[0]), atol=1e-4, rtol=1e-4)


@KERNELS
@pytest.mark.parametrize("name", ["dense", "lowrank swiglu", "blockshuffle, one key head"])
@torch.no_grad()
def test_fused_step_in_half_precision_is_near(name):
    kernels = pytest.importorskip("ops.decode")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exact = make(device, **{**MODELS[name], "n_layer": 2})
    model = ready(copy.deepcopy(exact), "structured", torch.float16)
    lengths, tokens = torch.arange(3, 3 + 25, 5, device=device), torch.randint(257, (5, 64), device=device)
    fresh, old = (Cache(model.cfg, 5, 64, device, dtype) for dtype in (torch.float16, torch.float32))
    exact.step(tokens[:, :max(lengths.tolist())], old, lengths)
    for a, b in zip(fresh.layers, old.layers):
        for low, full in zip(a, b):
            low.copy_(full)
    fresh.position.copy_(lengths)
    for i in range(2):
        token = tokens[torch.arange(5), lengths + i][:, None]
        ours, theirs = kernels.step(model, token, fresh).float(), exact.step(token, old)
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()


@KERNELS
@pytest.mark.parametrize("given", [dict(temperature=0.0), dict(temperature=0.8), dict(temperature=1e-3), dict(temperature=1.3, min_p=0.05), dict(temperature=2.0, min_p=1.0)])
@torch.no_grad()
def test_fused_choice_is_the_choice(given):
    """Against float64; where a draw falls within 1e-5 of an edge between two tokens either is right."""
    kernels = pytest.importorskip("ops.decode")
    device, s, B, V = "cuda" if torch.cuda.is_available() else "cpu", settings(**given), 40, 9000 if torch.cuda.is_available() else 300
    logits = (2 * torch.randn(B, V + 60, device=device))[:, :V]  # a padded vocabulary
    logits[:, 17] = logits[:, 5] = logits.max() + 0.1
    key, position = torch.randint(-2**62, 2**62, (B,), device=device), torch.arange(B, device=device) * 37
    token, new, turn = torch.zeros(B, 1, dtype=torch.long, device=device), torch.zeros(B, 9, dtype=torch.long, device=device), torch.arange(B, device=device)[:, None] % 8
    noted = turn.clone()
    kernels.sample(logits, s, key, position, token, new, turn)
    draw = decode.uniform(key, position)
    torch.testing.assert_close(turn, noted + 1)
    torch.testing.assert_close(new.gather(1, noted), token)
    assert new.count_nonzero() == token.count_nonzero()
    if not s.temperature:
        return torch.testing.assert_close(token, torch.full_like(token, 5))
    p = (logits.double() / s.temperature).softmax(-1)
    p = p.where(p >= s.min_p * p.amax(-1, keepdim=True), 0.0)
    cdf = p.cumsum(-1) / p.sum(-1, keepdim=True)
    above, below = cdf.gather(1, token)[:, 0], (cdf - p / p.sum(-1, keepdim=True)).gather(1, token)[:, 0]
    assert (p.gather(1, token) > 0).all() and (below - 1e-5 <= draw).all() and (draw <= above + 1e-5).all()
    near = (cdf - draw[:, None]).abs().amin(1) < 1e-5
    torch.testing.assert_close(token[~near, 0], decode.sample_token(logits, s, draw)[~near])


# ----------------------------------------------------------------------------------------------------------------------
# Ends

def test_finish_reasons():
    model = ready(make(), "structured", torch.float32)
    decoder = Decoder(model, settings(max_new_tokens=30), 3, 64)
    rows = [Row(p) for p in prompts_of([4, 50, 63])]
    for _ in decoder.run(rows):
        pass
    assert [(row.finish, len(row.new)) for row in rows] == [("length", 30), ("context", 14), ("context", 1)]
    stop = rows[0].new[5]
    decoder = Decoder(model, settings(max_new_tokens=30), 1, 64, eos=stop)
    again = Row(rows[0].prompt)
    pieces = [tokens for fresh in decoder.run([again], chunk=4) for _, tokens in fresh]
    assert again.finish == "eos" and again.new == rows[0].new[:rows[0].new.index(stop)] == sum(pieces, [])


def test_padded_vocabulary_is_never_chosen():
    model = ready(make(), "structured", torch.float32)
    new = texts(model, prompts_of([5] * 8), settings(temperature=5.0), 8, n_tokens=40)
    assert max(max(row) for row in new) < 40


# ----------------------------------------------------------------------------------------------------------------------
# Draws

@pytest.mark.parametrize("device", DEVICES)
def test_samples_do_not_depend_on_batch_size_and_order(device):
    model = ready(make(device, ffn="lowrank", rank=16), "structured", torch.float32)
    s = settings(temperature=1.5, top_p=0.95, top_k=200, min_p=1e-4)
    prompts = prompts_of([3, 17, 8, 1, 30])
    alone = [texts(model, [p], s, 1)[0] for p in prompts]
    assert texts(model, prompts, s, 5) == alone
    assert texts(model, prompts[::-1], s, 2)[::-1] == alone
    assert texts(model, prompts, dataclasses.replace(s, seed=2), 5) != alone
    assert row_key(1, [1, 2], 0) != row_key(1, [1, 2], 1) != row_key(1, [12], 1)


def test_draws_are_uniform_and_independent():
    keys = torch.tensor([row_key(5, [i]) for i in range(200)])
    u = torch.stack([decode.uniform(keys, torch.full((200,), t)) for t in range(200)]).double()
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003
    assert abs(torch.corrcoef(torch.stack((u[:-1].flatten(), u[1:].flatten())))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack((u[:, :-1].flatten(), u[:, 1:].flatten())))[0, 1]) < 0.03


def test_pick_draws_from_the_distribution():
    logits = torch.randn(1, 12) * 2
    n = 20000
    draws = torch.arange(n) / n
    picked = decode.sample_token(logits.expand(n, -1), settings(temperature=0.7), draws)
    share = torch.bincount(picked, minlength=12) / n
    torch.testing.assert_close(share, (logits[0] / 0.7).softmax(0), atol=2e-4, rtol=0)


def test_filters_keep_what_they_say():
    p = torch.tensor([[0.05, 0.4, 0.3, 0.15, 0.1]])
    draws = torch.linspace(0, 1 - 1e-7, 1000)

    def kept(**kw):
        return set(decode.sample_token(p.log().expand(1000, -1), settings(temperature=1.0, **kw), draws).tolist())

    assert kept() == {0, 1, 2, 3, 4}
    assert kept(top_k=2) == {1, 2}
    assert kept(top_p=0.75) == {1, 2, 3}
    assert kept(top_p=0.0001) == {1}
    assert kept(min_p=0.3) == {1, 2, 3}


# ----------------------------------------------------------------------------------------------------------------------
# auto

def test_auto_keeps_its_table_and_follows_it(tmp_path, monkeypatch):
    path = str(tmp_path / "decode.json")
    monkeypatch.setattr(merge, "TOKENS", [1, 4, 16])
    ready(make(ffn="lowrank", rank=16), "auto", torch.float32, path)
    tables = json.loads(Path(path).read_text())
    (key, modes), = tables.items()
    assert torch.__version__ in key and "float32" in key and len(modes["eager"]) == 2

    for shape in modes["eager"]:
        modes["eager"][shape] = {"1": [2.0, 1.0], "4": [2.0, 1.0], "16": [1.0, 2.0]}
    Path(path).write_text(json.dumps(tables))
    monkeypatch.setattr(merge, "measure", lambda pairs: pytest.fail("measured again"))
    model = ready(make(ffn="lowrank", rank=16), "auto", torch.float32, path)
    pair = model.blocks[1].ffn.fc1
    assert [model.choice.merged(pair.shape, t) for t in (1, 3, 4, 5, 16, 4096)] == [True, True, True, False, False, False]
    x = torch.randn(1, 128)
    torch.testing.assert_close(pair(x), pair.factors(x), atol=1e-4, rtol=1e-4)
    few, many = merge.step_weights(model, 1, "eager"), merge.step_weights(model, 16, "eager")
    assert few - many == 4 * sum(m.merged.weight.numel() - m.factors.V.numel() - m.factors.U.numel()
                                 for m in model.modules() if isinstance(m, merge.FactorsOrMerged))

    for shape in modes["eager"]:
        modes["eager"][shape] = {"1": [1.0, 2.0], "16": [1.0, 2.0]}
    Path(path).write_text(json.dumps(tables))
    model = ready(make(ffn="lowrank", rank=16), "auto", torch.float32, path)
    assert not any(isinstance(m, merge.FactorsOrMerged) for m in model.modules())  # the dense equivalents were not worth their memory


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_auto_times_the_step_that_few_sequences_take():
    """As a graph, all linears of a model go the way in which the whole step was faster."""
    model = ready(make("cuda", **MODELS["blockshuffle, one key head"]), "auto", torch.float32)
    rows = model.choice.times["graph"]
    for few in map(str, merge.FEW):
        assert len({tuple(row[few]) for row in rows.values()}) == 1
    assert len({tuple(row["8"]) for row in rows.values()}) == len(rows) == 2
    with model.choice.under("graph"):
        assert all(len({model.choice.merged(shape, tokens) for shape in rows}) == 1 for tokens in (1, 2, 3, 4))
    assert merge.measure_few(model.cpu(), []) == {}


def test_table_of_another_card_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "decode.json"
    path.write_text(json.dumps({"another card": {"eager": {}}}))
    monkeypatch.setattr(merge, "TOKENS", [1])
    ready(make(ffn="blockshuffle", nblocks=2), "auto", torch.float32, str(path))
    assert len(json.loads(path.read_text())) == 2


def test_a_damaged_table_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "decode.json"
    monkeypatch.setattr(merge, "TOKENS", [1])
    key = merge.table_key(torch.device("cpu"), torch.float32)
    shape = structured.shape_of(make(ffn="blockshuffle", nblocks=2).blocks[1].ffn.fc1)
    tables = [{key: value} for value in (3, [], {"eager": 3}, {"eager": {shape: {}}}, {"eager": {shape: {"one": [1, 2]}}}, {"eager": {shape: {"1": [1, "2"]}}},
                                         {"eager": {shape: {"1": [1]}}}, {"eager": {shape: {"1": [0, 1]}}})]
    for text in ("{", "[]", "[" * 100_000, *map(json.dumps, tables)):
        path.write_text(text)
        with pytest.raises(UserError, match="decode.json is damaged: delete it"):
            ready(make(ffn="blockshuffle", nblocks=2), "auto", torch.float32, str(path))
        assert path.read_text() == text


def test_batch_beyond_memory_names_the_largest(monkeypatch):
    model = ready(make(), "structured", torch.float32)
    monkeypatch.setattr(decode, "free_bytes", lambda device: 2**29)
    fits = decode.largest_batch(model.cfg, 64, torch.device("cpu"), torch.float32)
    assert fits > 10
    Decoder(model, settings(), fits, 64)
    with pytest.raises(UserError, match=f"largest that fits is {fits}"):
        Decoder(model, settings(), fits + 1, 64)


# ----------------------------------------------------------------------------------------------------------------------
# The command

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    model = make(ffn="lowrank", rank=16)
    cfg = config.to_dict(model.cfg)
    torch.save({"config": cfg, "model": model.state_dict(), "step": 1, "val_loss": 1.0,
                "tokenizer": {"identity": "byte", "blob": torch.zeros(1, dtype=torch.uint8)}}, out / "model.pt")
    return out


def command(*args, **kw):
    return subprocess.run([sys.executable, str(ROOT / "sample.py"), *map(str, args)], capture_output=True, text=True, **kw)


def say(capsys, folder, **kw):
    sample.main(str(folder), sample.Settings(**{**dict(device="cpu", decode="structured"), **kw}))
    return capsys.readouterr().out


def test_prompts_from_a_file_to_json_lines(folder, tmp_path, capsys):
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "hello", "id": 7}\n{"prompt": "a longer prompt, with é"}\n')
    found = [json.loads(line) for line in say(capsys, folder, prompts=str(lines), n_samples=2, max_new_tokens=9).splitlines()]
    assert [(r["prompt"], r.get("id"), r["sample"]) for r in found] == [
        ("hello", 7, 0), ("hello", 7, 1), ("a longer prompt, with é", None, 0), ("a longer prompt, with é", None, 1)]
    assert found[0]["text"] != found[1]["text"] and found[0]["prompt_tokens"] == 5 and found[2]["prompt_tokens"] == 24
    assert all(r["finish"] in ("length", "eos") and r["new_tokens"] <= 9 and r["tokens_per_s"] > 0 for r in found)

    text = tmp_path / "p.txt"
    text.write_text("a longer prompt, with é\nhello\n")
    out = tmp_path / "out.jsonl"
    assert say(capsys, folder, prompts=str(text), out=str(out), max_new_tokens=9, batch_size=1) == ""
    other = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["text"] for r in other] == [found[2]["text"], found[0]["text"]]
    assert say(capsys, folder, prompt="hello", max_new_tokens=9) == "hello" + found[0]["text"] + "\n"


def test_merge_writes_a_dense_model_with_the_same_text(folder, capsys):
    before = say(capsys, folder, prompt="hello", temperature=0.0)
    told = say(capsys, folder, merge=True, prompt="hello")
    merged = Path(f"{folder}-merged")
    assert "largest logit difference" in told and float(told.split("difference ")[1].split()[0]) < 1e-3
    _, cfg, _ = load(str(merged), torch.device("cpu"))
    assert cfg.ffn == "dense"
    assert say(capsys, merged, prompt="hello", temperature=0.0) == before
    with pytest.raises(UserError, match="exists"):
        say(capsys, folder, merge=True)
    with pytest.raises(UserError, match="dense already"):
        say(capsys, merged, merge=True)


def test_merge_into_a_folder_that_cannot_be_written(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("decode.json"))
    (tmp_path / "run-merged").write_text("a file where the folder would be")
    (tmp_path / "run" / "model-merged.pt.tmp").mkdir()
    for model, target in ((tmp_path / "run", "run-merged/model.pt"), (tmp_path / "run" / "model.pt", "run/model-merged.pt")):
        with pytest.raises(UserError, match=f"cannot write .*{target} "):
            say(capsys, model, merge=True)
    assert sorted(os.listdir(tmp_path)) == ["run", "run-merged"] and sorted(os.listdir(tmp_path / "run")) == ["model-merged.pt.tmp", "model.pt"]


def test_bad_input_is_one_sentence_each(folder, tmp_path, monkeypatch):
    def refused(match, **kw):
        with pytest.raises(UserError, match=match) as e:
            sample.main(str(folder), sample.Settings(**{**dict(device="cpu", decode="structured"), **kw}))
        assert "\n" not in str(e.value)

    def file(text, name="f.txt"):
        path = tmp_path / name
        path.write_bytes(text)
        return str(path)

    refused("has 64 tokens, the model's context holds 64: shorten it to 63", prompt="x" * 64)
    refused("in line 2 of .* has 70 tokens", prompts=file(b"ok\n" + b"y" * 70))
    refused("in line 1 of .* is empty", prompts=file(b"\nok\n"))
    refused("is empty", prompt_file=file(b""))
    refused("holds no prompts", prompts=file(b""))
    refused("not UTF-8", prompt_file=file(b"\xff\xfe"))
    refused("not UTF-8", prompt="\udcff")
    refused("line 1 of .* is not JSON", prompts=file(b"{]\n", "f.jsonl"))
    refused("no field \"prompt\"", prompts=file(b'{"text": "x"}\n', "f.jsonl"))
    for line in (b'{"prompt": "a", "id": "\\ud800"}', b'{"prompt": "a", "id": NaN}', b'{"prompt": "a", "id": 1e999}', b"[" * 100_000, b'{"prompt": "\\udcff"}'):
        refused("line 2 of .* is not JSON in UTF-8", prompts=file(b'{"prompt": "a"}\n' + line, "f.jsonl"))
    monkeypatch.setattr(decode, "free_bytes", lambda device: 2**28 + 2**25)
    refused("a batch of 2000 sequences .* largest that fits is", prompts=file(b"x\n"), n_samples=2000, batch_size=4000)
    for bad in (["--top_p=0"], ["--top_p=1.5"], ["--prompt="], ["--prompt=a", "--prompts=b"], ["--decode=fast"]):
        with pytest.raises(UserError):
            sample.read_settings([str(folder), *bad])


def test_models_of_another_version_and_status(folder, tmp_path):
    saved = torch.load(folder / "model.pt", weights_only=True)
    saved["config"]["heads_of_tomorrow"] = 3
    torch.save(saved, tmp_path / "model.pt")
    answer = command(tmp_path)
    assert answer.returncode == 2 and "heads_of_tomorrow" in answer.stderr and answer.stderr.count("\n") == 1
    answer = command(folder, "--top_p=2")
    assert answer.returncode == 2 and answer.stderr == "error: top_p=2.0 must be above 0 and at most 1.\n"


# ----------------------------------------------------------------------------------------------------------------------
# The benchmarks

SMALL = ["--n_layer=2", "--n_embd=32", "--n_head=2", "--block_size=64", "--vocab_size=64", "--ffn=lowrank", "--rank=8", "--repeats=1", "--device=cpu"]


def test_bench_decode_counts_and_agrees_with_itself(cli, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert cli("bench.py", "decode", *SMALL, "--batches=1,3", "--new_tokens=20", f"--json={out}", f"--plot={tmp_path / 'd.png'}")[0] == 0
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["kind"], r["batch"]) for r in rows] == [(k, b) for k in ("dense", "structured", "merged", "auto") for b in (1, 3)]
    for r in rows:
        assert r["tokens_per_s"] == pytest.approx(r["batch"] * 20e3 / (r["first_ms"] + 19 * r["ms"]), rel=0.02)
        assert r["kv_mb"] == pytest.approx(r["batch"] * 2 * 2 * 32 * 4 * 11 / 1e6)
    assert rows[2]["weights_mb"] < rows[4]["weights_mb"] == rows[0]["weights_mb"]
    status, text, _ = cli("bench.py", "decode", *SMALL, "--max_batch=True", "--new_tokens=4", "--kinds=structured")
    assert status == 0 and "most: " in text
    assert cli("bench.py", "decode", *SMALL, "--kinds=fast")[0] == 2


def test_bench_crossover_shows_what_auto_chose(cli, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert cli("bench.py", "crossover", *SMALL, f"--json={out}", f"--plot={tmp_path / 'c.png'}")[0] == 0
    for r in map(json.loads, out.read_text().splitlines()):
        chosen = r["factors_ms" if r["auto"] == "factors" else "merged_ms"]
        assert r["slower_by"] == pytest.approx(chosen / min(r["factors_ms"], r["merged_ms"]) - 1)
        assert (r["launch"], r["of"]) == ("eager", "linear")
    assert (tmp_path / "c.png").exists()


def test_bench_crossover_shows_the_times_of_the_step_that_few_sequences_take(cli, tmp_path, monkeypatch):
    """Where that step is one kernel, auto goes by it, though each linear by itself says otherwise."""
    def measure(pairs, sizes=()):
        return {mode: {pair.shape: {str(t): [1.0, 2.0] for t in sizes or merge.TOKENS} for pair in pairs} for mode in ("eager", "graph")}

    monkeypatch.setattr(merge, "measure", measure)
    monkeypatch.setattr(merge, "measure_few", lambda model, pairs, sizes=merge.FEW: {str(few): {pair.shape: [0.4, 0.3] for pair in pairs if model.blocks[1].ffn.fc1 in pairs} for few in sizes})
    out = tmp_path / "rows.jsonl"
    assert cli("bench.py", "crossover", *SMALL, f"--json={out}")[0] == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    of_step = [r for r in rows if r["of"] == "step"]
    assert [r["tokens"] for r in of_step] == 2 * [1, 2, 3, 4]
    assert all((r["launch"], r["factors_ms"], r["merged_ms"], r["auto"]) == ("graph", 0.4, 0.3, "merged") for r in of_step)
    assert all((r["factors_ms"], r["auto"]) == (1.0, "factors") for r in rows if r["of"] == "linear") and len(rows) > 40
