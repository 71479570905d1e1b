"""decode: cached against full forwards, equal texts over forms and batches, ends, sampling, draws, memory."""
import copy
import dataclasses
import json
import os
from types import SimpleNamespace

import pytest
import torch

import bench
import config
import decode
import merge
import sample
from config import Config, UserError
from decode import Decoder, Row, row_key, sample_token
from merge import prepare_model
from model import Cache, build

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))
DEVICES = ["cpu", CUDA]
KERNELS = pytest.mark.skipif(not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
                             reason="needs CUDA or TRITON_INTERPRET=1")
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
    """Greedy, 20 tokens, unless kw says otherwise."""
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
        model = prepare_model(make(device, **MODELS[name]), kind, torch.float32)
        for graphs in {False, device == "cuda"}:
            assert texts(model, prompts, settings(), 3, graphs=graphs) == expected, (kind, graphs)


def test_prompts_in_slices_and_a_half_full_batch(monkeypatch):
    model = prepare_model(make(ffn="lowrank", rank=16), "structured", torch.float32)
    prompts = prompts_of([9, 3, 12, 5, 20])
    one_by_one = [texts(model, [p], settings(), 1)[0] for p in prompts]
    monkeypatch.setattr(decode, "PREFILL", 25)
    assert texts(model, prompts, settings(), 3) == one_by_one


def test_a_step_looks_at_few_places_and_at_all_that_count():
    model = prepare_model(make(block_size=1024, n_layer=1), "structured", torch.float32)
    decoder = Decoder(model, settings(), 1, 1024)
    seen = []
    for tokens in range(1, 1025):
        decoder.set_seen(tokens)
        assert tokens <= decoder.cache.seen <= tokens + 128
        seen.append(decoder.cache.seen)
    assert len(set(seen)) <= 8


@pytest.mark.parametrize("length", [200, 640])
@torch.no_grad()
def test_every_step_reads_all_keys_beyond_one_unit_of_places(length):
    """Logits at every position against one full forward of the finished text: a hidden newest key changes them."""
    model = prepare_model(make(block_size=length, n_layer=2, ffn="lowrank", rank=16), "structured", torch.float32)
    decoder = Decoder(model, settings(max_new_tokens=100), 3, length)
    logits, seen, chosen = [], set(), decoder.sample

    def sample_and_note(new):
        logits.append(new.clone())
        seen.add(decoder.cache.seen)
        chosen(new)

    decoder.sample = sample_and_note
    rows = [Row(p) for p in prompts_of([60, 1, 95])]
    for _ in decoder.run(rows):
        pass
    assert len(logits) == 100 and len(seen) > 1
    for b, row in enumerate(rows):
        full = model(torch.tensor([row.prompt + row.new]))[0, len(row.prompt) - 1:-1]
        torch.testing.assert_close(torch.stack(logits)[:, b], full, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_graphs_beyond_one_unit_of_places_give_the_greedy_text(monkeypatch):
    """In kernels, whose attention reads what a row holds, and in plain torch, with a graph for each unit."""
    for fused in (True, False):
        monkeypatch.setattr(decode.ops, "ON", fused)
        model = prepare_model(make("cuda", block_size=200, ffn="blockshuffle", nblocks=4), "structured", torch.float32)
        s, prompts = settings(max_new_tokens=75), prompts_of([60, 3])
        assert texts(model, prompts, s, 2, 200) == [plain_greedy(model, p, 75) for p in prompts]


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
        ours, theirs = kernels.step(model, token, caches[1]), model.step(token, caches[0])
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@KERNELS
@pytest.mark.parametrize("name", ["dense", "lowrank swiglu", "blockshuffle, one key head"])
@torch.no_grad()
def test_fused_step_in_half_precision_is_near(name):
    kernels = pytest.importorskip("ops.decode")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exact = make(device, **{**MODELS[name], "n_layer": 2})
    model = prepare_model(copy.deepcopy(exact), "structured", torch.float16)
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
@pytest.mark.parametrize("given", [dict(temperature=0.0), dict(temperature=0.8), dict(temperature=1e-3),
                                   dict(temperature=1.3, min_p=0.05), dict(temperature=2.0, min_p=1.0)])
@torch.no_grad()
def test_fused_choice_is_the_choice(given):
    """Against float64; where a draw falls within 1e-5 of an edge between two tokens either is right."""
    kernels = pytest.importorskip("ops.decode")
    device, V = ("cuda", 9000) if torch.cuda.is_available() else ("cpu", 300)
    s, B = settings(**given), 40
    logits = (2 * torch.randn(B, V + 60, device=device))[:, :V]  # a padded vocabulary
    logits[:, 17] = logits[:, 5] = logits.max() + 0.1
    key, position = torch.randint(-2**62, 2**62, (B,), device=device), torch.arange(B, device=device) * 37
    token, new = (torch.zeros(B, n, dtype=torch.long, device=device) for n in (1, 9))
    count = torch.arange(B, device=device)[:, None] % 8
    before = count.clone()
    kernels.sample(logits, s, key, position, token, new, count)
    draw = decode.uniform(key, position)
    torch.testing.assert_close(count, before + 1)
    torch.testing.assert_close(new.gather(1, before), token)
    assert new.count_nonzero() == token.count_nonzero()
    if not s.temperature:
        return torch.testing.assert_close(token, torch.full_like(token, 5))
    p = (logits.double() / s.temperature).softmax(-1)
    p = p.where(p >= s.min_p * p.amax(-1, keepdim=True), 0.0)
    cdf = p.cumsum(-1) / p.sum(-1, keepdim=True)
    above, below = cdf.gather(1, token)[:, 0], (cdf - p / p.sum(-1, keepdim=True)).gather(1, token)[:, 0]
    assert (p.gather(1, token) > 0).all() and (below - 1e-5 <= draw).all() and (draw <= above + 1e-5).all()
    near = (cdf - draw[:, None]).abs().amin(1) < 1e-5
    torch.testing.assert_close(token[~near, 0], sample_token(logits, s, draw)[~near])


def test_the_fused_sampler_takes_only_the_filters_it_knows(monkeypatch):
    kernels = pytest.importorskip("ops.decode")
    monkeypatch.setattr(kernels, "works", lambda *args: True, raising=False)  # whether it runs is not the question here
    on_cuda = SimpleNamespace(is_cuda=True)
    for given in (dict(temperature=0.0), dict(temperature=0.8), dict(temperature=0.8, min_p=0.1),
                  dict(temperature=0.0, top_p=0.9, top_k=2)):
        assert kernels.can_sample(on_cuda, settings(**given)), given
    for given in (dict(top_p=0.9), dict(top_k=40), dict(top_p=0.9, min_p=0.1)):
        assert not kernels.can_sample(on_cuda, settings(temperature=0.8, **given)), given


def test_which_kernels_take_the_steps_of_a_batch(monkeypatch):
    import ops
    single = SimpleNamespace(BATCHES=(1, 2, 4), step_for=lambda model, cache: "one kernel")
    chain = SimpleNamespace(step_for=lambda model, cache: "chain" if len(cache.position) <= 64 else None)
    monkeypatch.setattr(ops, "megakernel", single, raising=False)
    monkeypatch.setattr(ops, "chain", chain, raising=False)
    monkeypatch.setattr(ops, "can_step", lambda model, cache: False, raising=False)
    found = [ops.fused_step(None, SimpleNamespace(position=torch.zeros(batch))) for batch in (1, 4, 5, 64, 65)]
    assert found == ["one kernel", "one kernel", "chain", "chain", None]


@torch.no_grad()
def test_the_decoder_asks_whether_the_fused_sampler_knows_its_filters(monkeypatch):
    stub = SimpleNamespace(ON=True, fused_step=lambda model, cache: None, sample="fused",
                           can_sample=lambda token, s: s.top_p == 1)
    monkeypatch.setattr(decode, "ops", stub)
    model = prepare_model(make(), "structured", torch.float32)
    for top_p, graphs, expected in ((1.0, True, "fused"), (0.9, True, None), (1.0, False, None)):
        assert Decoder(model, settings(top_p=top_p), 1, 64, graphs=graphs).fused_sample == expected


# ----------------------------------------------------------------------------------------------------------------------
# Ends

def test_finish_reasons():
    model = prepare_model(make(), "structured", torch.float32)
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
    for expected, kw in (([], dict(eos=rows[0].new[0])), (rows[0].new[:1], {})):  # the first token is the prefill's
        row = Row(rows[0].prompt)
        assert list(Decoder(model, settings(max_new_tokens=1), 1, 64, **kw).run([row])) == [[(row, expected)]]
        assert row.new == expected and row.finish == ("eos" if kw else "length")


def test_padded_vocabulary_is_never_chosen():
    model = prepare_model(make(), "structured", torch.float32)
    new = texts(model, prompts_of([5] * 8), settings(temperature=5.0), 8, n_tokens=40)
    assert max(max(row) for row in new) < 40


# ----------------------------------------------------------------------------------------------------------------------
# Sampling a token

P = torch.tensor([0.03, 0.5, 0.07, 0.25, 0.15])  # of five tokens


def shares(n=20_000, **kw):
    """The five tokens' shares of n evenly spaced draws."""
    tokens = sample_token(P.log().repeat(n, 1), sample.Settings(**kw), torch.arange(n) / n)
    assert tokens.shape == (n,)
    return torch.bincount(tokens, minlength=5) / n

@pytest.mark.parametrize("filters, kept", [
    (dict(), [0, 1, 2, 3, 4]), (dict(top_k=2), [1, 3]), (dict(top_k=1), [1]), (dict(top_k=5), [0, 1, 2, 3, 4]),
    (dict(top_k=9), [0, 1, 2, 3, 4]), (dict(top_p=0.4), [1]), (dict(top_p=0.6), [1, 3]), (dict(top_p=0.76), [1, 3, 4]),
    (dict(top_p=1e-6), [1]), (dict(min_p=0.25), [1, 3, 4]), (dict(min_p=0.6), [1]), (dict(min_p=1.0), [1]),
    (dict(top_k=3, top_p=0.8), [1, 3]), (dict(top_k=4, min_p=0.2), [1, 3, 4])])
def test_filters_keep_what_they_say_in_proportion(filters, kept):
    """top_p comes after top_k: of the three likeliest 0.5 + 0.25 of 0.9 exceed 0.8."""
    expected = torch.zeros(5)
    expected[kept] = P[kept] / P[kept].sum()
    found = shares(temperature=1.0, **filters)
    assert not found[expected == 0].any()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("temperature", [0.5, 0.7, 2.0])
def test_temperature_is_a_power_of_the_probabilities(temperature):
    expected = P ** (1 / temperature)
    torch.testing.assert_close(shares(temperature=temperature), expected / expected.sum(), rtol=0, atol=2e-4)


def test_temperature_0_takes_the_likeliest_and_rows_are_drawn_apart():
    logits = torch.randn(50, 30)
    assert torch.equal(sample_token(logits, settings(), None), logits.argmax(1))
    kept = logits.clone()
    assert torch.equal(sample_token(logits, settings(temperature=0.8, top_k=1), torch.rand(50)), logits.argmax(1))
    sample_token(logits, settings(temperature=1.0, top_k=2), torch.rand(50))
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-300])
@pytest.mark.parametrize("filters", [{}, dict(top_k=3), dict(top_p=0.9, min_p=0.1)])
def test_a_tiny_temperature_takes_the_likeliest_too(temperature, filters):
    logits = 30 * torch.randn(50, 30)
    s = settings(temperature=temperature, **filters)
    assert torch.equal(sample_token(logits, s, torch.rand(50)), logits.argmax(1))


# ----------------------------------------------------------------------------------------------------------------------
# Draws

@pytest.mark.parametrize("device", DEVICES)
def test_samples_do_not_depend_on_batch_size_and_order(device):
    model = prepare_model(make(device, ffn="lowrank", rank=16), "structured", torch.float32)
    s = settings(temperature=1.5, top_p=0.95, top_k=200, min_p=1e-4)
    prompts = prompts_of([3, 17, 8, 1, 30])
    alone = [texts(model, [p], s, 1)[0] for p in prompts]
    assert texts(model, prompts, s, 5) == alone
    assert texts(model, prompts[::-1], s, 2)[::-1] == alone
    assert texts(model, prompts, dataclasses.replace(s, seed=2), 5) != alone
    assert row_key(1, [1, 2], 0) != row_key(1, [1, 2], 1) != row_key(1, [12], 1)
    same = [{}, dict(seed=2), dict(temperature=1.5, top_k=1)]
    greedy, other, top_1 = (texts(model, prompts, settings(**kw), 5) for kw in same)
    assert greedy == other == top_1


def test_draws_are_uniform_and_independent():
    keys = torch.tensor([row_key(5, [i]) for i in range(200)])
    u = torch.stack([decode.uniform(keys, torch.full((200,), t)) for t in range(200)]).double()
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003
    assert abs(torch.corrcoef(torch.stack((u[:-1].flatten(), u[1:].flatten())))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack((u[:, :-1].flatten(), u[:, 1:].flatten())))[0, 1]) < 0.03


# ----------------------------------------------------------------------------------------------------------------------
# Memory

def test_batch_beyond_memory_names_the_largest(monkeypatch):
    model = prepare_model(make(), "structured", torch.float32)
    monkeypatch.setattr(decode, "free_bytes", lambda device: 2**29)
    fits = decode.largest_batch(model.cfg, 64, torch.device("cpu"), torch.float32)
    assert fits > 10
    cache = Cache(model.cfg, 3, 64, "cpu", torch.float32)
    stored = sum(t.nbytes for layer in cache.layers for t in layer)
    assert decode.token_bytes(model.cfg, torch.float32) == stored / (3 * 64)
    Decoder(model, settings(), fits, 64)
    with pytest.raises(UserError, match=f"largest that fits is {fits}"):
        Decoder(model, settings(), fits + 1, 64)


# ----------------------------------------------------------------------------------------------------------------------
# The benchmarks

SMALL = ["--n_layer=2", "--n_embd=32", "--n_head=2", "--block_size=64", "--vocab_size=64", "--ffn=lowrank", "--rank=8",
         "--repeats=1", "--device=cpu"]


def test_bench_decode_counts_and_agrees_with_itself(cli, tmp_path):
    out = tmp_path / "rows.jsonl"
    given = ["--batches=1,3", "--new_tokens=20", f"--json={out}", f"--plot={tmp_path / 'd.png'}"]
    assert cli("bench.py", "decode", *SMALL, *given)[0] == 0
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    kinds = "dense", "structured", "merged", "auto"
    assert [(r["kind"], r["batch"]) for r in rows] == [(kind, batch) for kind in kinds for batch in (1, 3)]
    for r in rows:
        assert r["tokens_per_s"] == pytest.approx(r["batch"] * 20e3 / (r["first_ms"] + 19 * r["ms"]), rel=0.02)
        assert r["kv_mb"] == pytest.approx(r["batch"] * 2 * 2 * 32 * 4 * 11 / 1e6)
    assert rows[2]["weights_mb"] < rows[4]["weights_mb"] == rows[0]["weights_mb"]
    status, text, _ = cli("bench.py", "decode", *SMALL, "--max_batch=True", "--new_tokens=4", "--kinds=structured")
    assert status == 0 and "most: " in text
    assert cli("bench.py", "decode", *SMALL, "--kinds=fast")[0] == 2


def test_the_time_of_a_further_token_is_that_after_the_first(monkeypatch):
    clock = iter([1.0, 3.0, 6.0, 12.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    decoder = SimpleNamespace(key=torch.zeros(1), run=lambda rows: iter(range(3)))
    given = bench.Settings(prompt_tokens=2, new_tokens=10)
    assert bench.generation(decoder, Config(vocab_size=8), 4, given) == (2.0, 1.0)


def test_bench_crossover_shows_what_auto_chose(cli, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert cli("bench.py", "crossover", *SMALL, f"--json={out}", f"--plot={tmp_path / 'c.png'}")[0] == 0
    for r in map(json.loads, out.read_text().splitlines()):
        chosen = r["factors_ms" if r["auto"] == "factors" else "merged_ms"]
        assert r["slower_by"] == pytest.approx(chosen / min(r["factors_ms"], r["merged_ms"]) - 1)
        assert r["speedup"] == r["merged_ms"] / r["factors_ms"]
        assert (r["launch"], r["of"]) == ("eager", "linear")
    assert (tmp_path / "c.png").exists()


def test_bench_crossover_shows_the_times_of_the_step_that_few_sequences_take(cli, tmp_path, monkeypatch):
    """Where that step is kernels of its own, auto goes by it, though each linear by itself says otherwise."""
    def measure(pairs, sizes=()):
        row = {str(tokens): [1.0, 2.0] for tokens in sizes or merge.TOKENS}
        return {mode: {pair.shape: dict(row) for pair in pairs} for mode in ("eager", "graph")}

    monkeypatch.setattr(merge, "measure", measure)
    monkeypatch.setattr(merge, "measure_few", lambda model, pairs, sizes=merge.FEW: {
        str(few): {pair.shape: [0.4, 0.3] for pair in pairs if model.blocks[1].ffn.fc1 in pairs} for few in sizes})
    out = tmp_path / "rows.jsonl"
    assert cli("bench.py", "crossover", *SMALL, f"--json={out}")[0] == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    of_step = [r for r in rows if r["of"] == "step"]
    assert [r["tokens"] for r in of_step] == 2 * [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    found = {(r["launch"], r["factors_ms"], r["merged_ms"], r["auto"]) for r in of_step}
    assert found == {("graph", 0.4, 0.3, "merged")}
    assert all((r["factors_ms"], r["auto"]) == (1.0, "factors") for r in rows if r["of"] == "linear") and len(rows) > 40
