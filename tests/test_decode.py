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
from decode import Decoder, Prompts, Row, row_key, sample_token
from merge import prepare_model
from model import Cache, build, ops

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

# The kernels of decoding have none of these parts
WITH_EXTRAS = {**MODELS, "recipe": dict(
    norm="rmsnorm", act="relu2", bias=False, tie_embeddings=False, qk_norm=1.2, rope_theta=100_000.0, embed_norm=True,
    smear=True, embed_skip=True, value_embeddings=True, logit_softcap=5.0, ffn="lowrank", rank=16, n_kv_head=2),
    "post norms": dict(norm="rmsnorm", act="swiglu", bias=False, qk_norm=1.2, post_norm=0.3, logit_softcap=5.0,
                       ffn="blockshuffle", nblocks=4, n_kv_head=2)}


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


def serve(model, prompts, s, batch, length=64, chunk=3, **kw):
    """(the decoder, the rows): where one ends, the next begins."""
    decoder = Decoder(model, s, batch, length, **kw)
    rows = [Row(p, row_key(s.seed, p)) for p in prompts]
    for _ in decoder.run(rows, chunk):
        assert (decoder.count == decoder.filled).all() and decoder.filled <= len(decoder.new)  # beyond it nothing is
    return decoder, rows


def plain_attention(q, k, v, ends, longest):
    """ops.attend_prompts, text by text; NaN where that is undefined."""
    out, ends = torch.full_like(q, torch.nan), ends.tolist()
    assert len(ends) > 2  # one text alone takes what torch has for it
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
    for a, b in zip(ends, ends[1:]):
        assert 0 <= b - a <= longest
        score = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * q.size(-1) ** -0.5
        hidden = torch.ones_like(score, dtype=torch.bool).triu(1)
        out[a:b] = torch.einsum("hqk,khd->qhd", score.masked_fill(hidden, -torch.inf).softmax(-1), v[a:b])
    return out


def plain_store(k, v, k_cache, v_cache, row, place):
    for i, (r, p) in enumerate(zip(row.tolist(), place.tolist())):
        if r >= 0:
            k_cache[r, :, p], v_cache[r, :, p] = k[i], v[i]


@pytest.fixture
def fake_graphs(monkeypatch):
    """CUDA graphs on any device: a warm-up runs the function, and so does a replay. Prompts have graphs too.

    -> [(the recorded function, the pool that it got)]
    """
    recorded = []

    def record(run, pool=None, warm=True):
        if warm:
            run()
        recorded.append((run, pool))
        return SimpleNamespace(replay=run, pool=lambda: "pool")

    monkeypatch.setattr(decode, "record_graph", record)
    stub = dict(can_store=lambda k: True, store=plain_store, can_attend_prompts=lambda *_: True,
                attend_prompts=plain_attention)
    if not ops.ON:
        stub |= dict(ON=True, fused_step=lambda *_: None, can_sample=lambda *_: False)
    monkeypatch.setattr(decode, "ops", SimpleNamespace(**{**vars(ops), **stub}))
    return recorded


@torch.no_grad()
def plain_greedy(model, prompt, n):
    """The oracle: a full forward per token."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(model(torch.tensor([tokens], device=model.head.weight.device))[0, -1].argmax().item())
    return tokens[len(prompt):]


# ----------------------------------------------------------------------------------------------------------------------
# The cache

@pytest.mark.parametrize("dtype, size", [(torch.bfloat16, 32), (torch.bfloat16, 6), (torch.bfloat16, 5),
                                         (torch.float32, 4), (torch.float32, 3)])
@pytest.mark.parametrize("device", DEVICES)
def test_the_first_tokens_of_a_row_move_to_another(device, dtype, size):
    """Heads whose bytes are no multiple of 8, too. All other rows and places stay as they are."""
    cfg = SimpleNamespace(n_layer=3, n_head=4, n_kv_head=2, attn_dim=4 * size)
    cache = Cache(cfg, 3, 8, torch.device(device), dtype, spare=2)
    cache.every.copy_(torch.randn(cache.every.shape))
    expected = cache.every.clone()
    for layer in expected.unbind():
        for part in layer.unbind():
            part[1, :, :5] = part[4, :, :5]
    cache.move(4, 1, 5)
    assert torch.equal(cache.every, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", WITH_EXTRAS)
@torch.no_grad()
def test_cached_logits_are_those_of_the_full_forward(name, device):
    model = make(device, **WITH_EXTRAS[name])
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
@pytest.mark.parametrize("name", WITH_EXTRAS)
def test_factors_merged_auto_and_graphs_give_the_same_greedy_text(name, device, request):
    if device == "cpu":
        request.getfixturevalue("fake_graphs")
    prompts = prompts_of([7, 1, 30])
    expected = [plain_greedy(make(device, **WITH_EXTRAS[name]), p, 20) for p in prompts]
    for kind in ("structured", "merged", "auto"):
        model = prepare_model(make(device, **WITH_EXTRAS[name]), kind, torch.float32)
        if device == "cpu":
            model.speeds.times["graph"] = model.speeds.times.get("eager")  # auto has measured no graphs there
        for graphs in (False, True):
            assert texts(model, prompts, settings(), 3, graphs=graphs) == expected, (kind, graphs)


def test_prompts_in_slices_and_a_half_full_batch(monkeypatch):
    model = prepare_model(make(ffn="lowrank", rank=16), "structured", torch.float32)
    prompts = prompts_of([9, 3, 12, 5, 20, 2])
    one_by_one = [texts(model, [p], settings(), 1)[0] for p in prompts]
    monkeypatch.setattr(decode, "PREFILL", 25)
    assert texts(model, prompts, settings(), 3) == one_by_one
    assert texts(model, prompts[-1:], settings(), 3) == one_by_one[-1:]  # one token to store, which is no decode step


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
    rows = [Row(p) for p in prompts_of([95, 60, 1])]  # in the order of their places
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
    token, new = torch.zeros(B, 1, dtype=torch.long, device=device), torch.zeros(9, B, dtype=torch.long, device=device)
    count = torch.arange(B, device=device)[:, None] % 8
    before = count.clone()
    kernels.sample(logits, s, key, position, token, new, count)
    draw = decode.uniform(key, position)
    torch.testing.assert_close(count, before + 1)
    torch.testing.assert_close(new.T.gather(1, before), token)
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
    ops = pytest.importorskip("ops")
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
                           can_sample=lambda token, s: s.top_p == 1, can_store=lambda k: False)
    monkeypatch.setattr(decode, "ops", stub)
    model = prepare_model(make(), "structured", torch.float32)
    for top_p, graphs, expected in ((1.0, True, "fused"), (0.9, True, None), (1.0, False, None)):
        assert Decoder(model, settings(top_p=top_p), 1, 64, graphs=graphs).fused_sample == expected


# ----------------------------------------------------------------------------------------------------------------------
# Prompts

@pytest.mark.parametrize("name", ["dense", "absolute, grouped", "recipe"])
@torch.no_grad()
def test_a_graph_of_prompts_serves_every_place(name, fake_graphs):
    """Tokens at both sides of a size's end; the first prompts of a size run without a graph. No text sees another."""
    model = prepare_model(make(block_size=140, **WITH_EXTRAS[name]), "structured", torch.float32)
    decoder = Decoder(model, settings(), 6, 140, graphs=True)
    for places, lengths in (((0, 1, 2), (33, 30, 2)), ((5, 3, 4), (9, 33, 20)), ((1, 5, 0), (12, 25, 33)),
                            ((2, 0), (34, 65)), ((3, 4), (64, 35)), ((4,), (33,)), ((2,), (2,)), ((5,), (31,))):
        prompts = prompts_of(lengths, seed=places[0])
        decoder.prefill({i: Row(p) for i, p in zip(places, prompts)})
        decoder.count.zero_()
        decoder.advance(max(lengths))
        assert [decoder.token[i].tolist() for i in places] == [plain_greedy(model, p, 1) for p in prompts]
    assert {shape: bool(graph) for shape, graph in decoder.prefills.items()} == {
        (64, 64): True, (96, 64): False, (128, 64): True, (32, 1): True}
    assert len(fake_graphs) == 3 + len(decoder.recorded)  # each once
    assert [pool for _, pool in fake_graphs] == [None] + ["pool"] * (len(fake_graphs) - 1)


@KERNELS
@pytest.mark.parametrize("kv, size", [(1, 32), (3, 24), (4, 128)])
@torch.no_grad()
def test_prompts_are_stored_in_their_rows_and_nowhere_else(kv, size):
    """v is a part of a larger tensor, as without rotary positions. Row -1: nowhere."""
    kernels, device = pytest.importorskip("ops.decode"), "cuda" if torch.cuda.is_available() else "cpu"
    heads = torch.randn(8, 2 * kv, size, device=device)
    row, place = torch.tensor([[4, 4, 4, 0, 2, 2, -1, -1], [0, 1, 2, 0, 0, 1, 0, 3]], device=device)
    k, v = heads[:, :kv].contiguous(), heads[:, kv:]
    caches, expected = ([torch.zeros(5, kv, 16, size, device=device) for _ in range(2)] for _ in range(2))
    assert kernels.can_store(heads)
    kernels.store(k, v, *caches, row, place)
    plain_store(k, v, *expected, row, place)
    assert all(map(torch.equal, caches, expected))


def in_a_row(tokens, cache, index):
    """Prompts tokens (B, T) to rows `index` of a cache: the arguments of GPT.store."""
    B, T = tokens.shape
    row, at = index.repeat_interleave(T), torch.arange(T, device=tokens.device).repeat(B)
    ends = torch.arange(0, B * T + 1, T, device=tokens.device, dtype=torch.int32)
    return tokens.reshape(1, -1), Prompts(cache, row, at, ends, T)


@pytest.mark.parametrize("name", WITH_EXTRAS)
@torch.no_grad()
def test_prompts_in_a_row_are_stored_as_each_alone(name):
    model, rows, tokens = make(**WITH_EXTRAS[name]), [3, 0, 2], torch.randint(257, (20,))
    together, alone = (Cache(model.cfg, 4, 64, "cpu", torch.float32) for _ in range(2))
    bounds = [0, 7, 8, 20]
    row, at = torch.tensor([[3] * 7 + [0] + [2] * 12, [*range(7), 0, *range(12)]])
    model.store(tokens[None], Prompts(together, row, at, torch.tensor(bounds), 12))
    for r, a, b in zip(rows, bounds, bounds[1:]):
        one = Cache(model.cfg, 1, 64, "cpu", torch.float32)
        model.store(tokens[None, a:b], one)
        alone.every[:, :, r] = one.every[:, :, 0]
    assert alone.every.abs().amax((0, 1, 3, 5)).count_nonzero(1).tolist() == [1, 0, 12, 7]
    torch.testing.assert_close(together.every, alone.every, atol=1e-5, rtol=1e-5)


@KERNELS
@pytest.mark.parametrize("name", ["dense", "recipe"])
@torch.no_grad()
def test_prompts_in_half_precision_take_the_kernels_of_training(name, monkeypatch):
    """A kernel rotates q and k of a layer, one stores. Keys and values are near those of float32, and no other row is
    written."""
    ops, device = pytest.importorskip("ops"), "cuda" if torch.cuda.is_available() else "cpu"
    exact = make(device, **{**WITH_EXTRAS[name], "n_layer": 2})
    model, calls = prepare_model(copy.deepcopy(exact), "structured", torch.float16), []
    for kernel in ("split_rotated", "store"):
        monkeypatch.setattr(ops, kernel, lambda *given, name=kernel, call=getattr(ops, kernel):
                            (calls.append(name), call(*given))[1])
    tokens, index = torch.randint(257, (2, 30), device=device), torch.tensor([3, 1], device=device)
    fresh, old = (Cache(model.cfg, 5, 64, device, dtype) for dtype in (torch.float16, torch.float32))
    model.store(*in_a_row(tokens, fresh, index))
    assert calls == ["split_rotated", "store"] * 2
    exact.store(*in_a_row(tokens, old, index))
    for a, b in zip(sum(fresh.layers, ()), sum(old.layers, ())):
        assert (a.float() - b).norm() < 1e-2 * b.norm() and b[index, :, :30].all() and not a[[0, 2, 4]].any()


def test_prompts_that_precede_a_graph_run_the_kernels_that_it_records(fake_graphs, monkeypatch):
    """With decode=auto factors may be faster in a graph and slower from Python. Larger prompts have no graph."""
    monkeypatch.setattr(decode, "SIZES", (8,))
    model, modes = prepare_model(make(ffn="lowrank", rank=16), "structured", torch.float32), []
    monkeypatch.setattr(model, "store", lambda tokens, to: modes.append((tokens.size(1), model.speeds.mode)))
    decoder = Decoder(model, settings(), 2, 64, graphs=True)
    for n in (3, 9):
        decoder.store([([1] * n, 0)])
    assert modes == [(8, "graph"), (9, "eager")] and model.speeds.mode == "eager"


def test_the_sizes_of_prefills(fake_graphs, monkeypatch):
    """A forward holds PREFILL tokens and TOGETHER prompts, or a longer one. Up to the largest size it is filled up."""
    monkeypatch.setattr(decode, "SIZES", (8, 16))
    monkeypatch.setattr(decode, "PREFILL", 30)
    monkeypatch.setattr(decode, "TOGETHER", 6)
    model = prepare_model(make(ffn="lowrank", rank=16), "structured", torch.float32)
    seen, store = [], model.store
    monkeypatch.setattr(model, "store", lambda tokens, to: (
        seen.append((tokens.size(1), len(to.ends) - 1, (to.row >= 0).sum().item())), store(tokens, to)))
    monkeypatch.setattr(model, "step", None)
    for lengths, expected in (([18, 14], [(30, 2, 30)]), ([18, 15], [(17, 1, 17), (16, 1, 14)]), ([1], []),
                              ([3, 2, 9], [(16, 6, 11)]), ([2], [(8, 1, 1)]), ([2] * 7, [(8, 6, 6), (8, 1, 1)]),
                              ([9], [(8, 1, 8)]), ([60, 2], [(59, 1, 59), (8, 1, 1)]), ([17], [(16, 1, 16)])):
        seen.clear()
        decoder = Decoder(model, settings(), len(lengths), 64, graphs=True)
        decoder.prefill({i: Row(p) for i, p in enumerate(prompts_of(lengths))})
        assert seen == expected and not fake_graphs
        assert decoder.cache.position.tolist() == [n - 1 for n in lengths]
    monkeypatch.setattr(decode, "SIZES", (128,))
    monkeypatch.setattr(decode, "PREFILL", 128)
    decoder = Decoder(model, settings(), 3, 64, graphs=True)
    decoder.prefill({i: Row(p) for i, p in enumerate(prompts_of([64, 64, 3]))})
    assert seen[1:] == [(128, 6, 128)]  # the most that a forward can hold beside the ends of its prompts


# ----------------------------------------------------------------------------------------------------------------------
# Batches that stay full

MIXED = [5, 1, 40, 17, 2, 60, 33, 3, 25, 9, 62, 11, 30]
# settings and eos with which some texts end by themselves and some do not
ENDS = {"greedy": ({}, dict(eos=173)), "sampled": (dict(temperature=1.5, min_p=1e-3), dict(eos=3, n_tokens=12))}


@pytest.mark.parametrize("batch, chunk", [(1, 5), (2, 1), (3, 4), (8, 3), (20, 16)])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("how", ENDS)
def test_rows_that_end_are_replaced_and_no_text_changes(how, graphs, batch, chunk, fake_graphs):
    model, (given, ends) = prepare_model(make(ffn="lowrank", rank=16), "structured", torch.float32), ENDS[how]
    s, prompts = settings(max_new_tokens=25, **given), prompts_of(MIXED)
    alone = [serve(model, [p], s, 1, graphs=False, **ends)[1][0] for p in prompts]
    assert {row.finish for row in alone} == {"eos", "length", "context"}
    decoder, rows = serve(model, prompts, s, batch, chunk=chunk, graphs=graphs, **ends)
    assert [(row.new, row.finish) for row in rows] == [(row.new, row.finish) for row in alone]
    assert all(0 < row.seconds < 60 for row in rows)
    if graphs:
        assert len(fake_graphs) == len(decoder.recorded) + sum(map(bool, decoder.prefills.values()))


@pytest.mark.parametrize("batch, ahead", [(2, 4), (8, 5), (8, 0), (16, 16), (1, 2)])
@pytest.mark.parametrize("graphs", [False, True])
def test_prompts_are_stored_ahead_of_free_places(batch, ahead, graphs, fake_graphs, monkeypatch):
    """Texts of different lengths leave their places one by one. None changes, whatever group its prompt is in."""
    model = prepare_model(make(n_layer=2, ffn="lowrank", rank=16), "structured", torch.float32)
    s, ends = settings(max_new_tokens=40, temperature=1.5), dict(eos=3, n_tokens=24)
    prompts = prompts_of(torch.randint(2, 50, (3 * batch + 21,), generator=torch.Generator().manual_seed(5)).tolist())
    alone = [serve(model, [p], s, 1, graphs=False, **ends)[1][0].new for p in prompts]
    monkeypatch.setattr(decode, "AHEAD", ahead)
    groups, stored, prefill, store = [], [], Decoder.prefill, Decoder.store

    def note(decoder, changes):
        groups.append(sum(row is not None and row.at < 0 for row in changes.values()))
        assert all(i < batch or row.at < 0 for i, row in changes.items())
        prefill(decoder, changes)

    monkeypatch.setattr(Decoder, "prefill", note)
    monkeypatch.setattr(Decoder, "store", lambda decoder, part: (stored.extend(part), store(decoder, part)))
    decoder, rows = serve(model, prompts, s, batch, chunk=1, graphs=graphs, **ends)
    assert [row.new for row in rows] == alone
    assert sorted(tokens for tokens, _ in stored) == sorted(prompt[:-1] for prompt in prompts)  # each once
    groups = [n for n in groups if n]
    assert groups[0] == min(batch + ahead, len(prompts)) and sum(groups) == len(prompts)
    assert all(ahead < n <= ahead + batch for n in groups[1:-1])
    assert max(i for _, i in stored) == batch + ahead - 1 and decoder.spare == ahead


def test_as_many_prompts_are_stored_ahead_as_a_forward_holds(monkeypatch):
    model, groups = prepare_model(make(n_layer=1), "structured", torch.float32), []
    monkeypatch.setattr(decode, "PREFILL", 100)
    decoder = Decoder(model, settings(max_new_tokens=2), 2, 64)
    decoder.prefill = lambda changes, prefill=decoder.prefill: (
        groups.append(sum(row is not None and row.at < 0 for row in changes.values())), prefill(changes))
    for _ in decoder.run([Row(p) for p in prompts_of([60, 60, 33, 33, 33, 25, 25, 25] + 4 * [20])]):
        pass
    assert [n for n in groups if n] == [2, 3, 4, 3]  # two places are free; of 33 tokens fit 3 prompts, of 25 4


def test_prompts_that_are_stored_together_are_of_like_length():
    model, parts = prepare_model(make(n_layer=1), "structured", torch.float32), []
    decoder = Decoder(model, settings(max_new_tokens=2), 4, 64)
    decoder.store = lambda part, store=decoder.store: (parts.append([len(tokens) for tokens, _ in part]), store(part))
    for _ in decoder.run([Row(p) for p in prompts_of([2 + i * 7 % 60 for i in range(60)])]):
        pass
    assert sum(parts, []) == sorted(sum(parts, []), reverse=True) and len(parts) == 5


@pytest.mark.parametrize("graphs", [False, True])
def test_a_place_is_taken_after_the_last_step_of_its_row(graphs, fake_graphs):
    """16 places, whose texts end one after the other, by context. That is known before their tokens are read."""
    model = prepare_model(make(n_layer=1), "structured", torch.float32)
    for n, expected in ((17, [(0, 16), (1, 1)]), (19, [(0, 16), (1, 1), (3, 1), (5, 1)])):
        decoder, steps, began = Decoder(model, settings(max_new_tokens=40), 16, 64, graphs=graphs), [], []
        launch, prefill = decoder.launch, decoder.prefill
        decoder.launch = lambda places, more: (steps.append(more), launch(places, more))[1]
        decoder.prefill = lambda changes: (began.append((sum(steps), sum(i < 16 and row is not None for i, row in
                                                                         changes.items()))), prefill(changes))
        for _ in decoder.run([Row(p) for p in prompts_of(range(63, 63 - 2 * n, -2))], chunk=1):
            pass
        assert [(at, new) for at, new in began if new] == expected


def test_the_longest_of_a_window_begin_first(monkeypatch):
    monkeypatch.setattr(decode, "AHEAD", 1)
    model = prepare_model(make(n_layer=1), "structured", torch.float32)
    decoder, began = Decoder(model, settings(max_new_tokens=2), 2, 64), []
    decoder.append = lambda row, *given, call=decoder.append: (began.append(row), call(row, *given))[1]
    rows = [Row(p) for p in prompts_of([3, 5, 9, 5, 1, 2, 7, 5, 40, 50, 60])]
    for _ in decoder.run(rows):
        pass
    assert list(dict.fromkeys(map(rows.index, began))) == [2, 6, 1, 3, 7, 0, 5, 4, 10, 9, 8]


def test_ends_by_length_are_known_before_the_tokens_are_read(fake_graphs):
    """7 rows of 10 tokens, three at a time: 30 steps, though the host reads a chunk later than it launches the next."""
    model, calls = prepare_model(make(n_layer=1), "structured", torch.float32), []
    decoder = Decoder(model, settings(max_new_tokens=10), 3, 64, graphs=True)
    for name in ("launch", "read", "step"):
        def call(*given, name=name, wrapped=getattr(decoder, name)):
            calls.append(name)
            return wrapped(*given)
        setattr(decoder, name, call)
    rows = [Row(p) for p in prompts_of([4, 7, 2, 9, 3, 1, 5])]
    yields = list(decoder.run(rows, chunk=5))
    assert all(len(row.new) == 10 and row.finish == "length" for row in rows)
    assert calls.count("step") == 30 + 1  # one for the recording
    looks = [name for name in calls if name != "step"]
    assert looks[:6] == ["launch", "read", "launch", "launch", "read", "launch"] and looks[-2:] == ["read", "read"]
    assert [len(tokens) for _, tokens in yields[0]] == [1, 1, 1]  # the first tokens are not held back by a whole chunk
    assert len(yields[1][0][1]) == 2 and len(yields[-2][0][1]) == 5  # while prompts wait, and after that
    without = list(Decoder(model, settings(max_new_tokens=10), 3, 64, graphs=False).run([Row([1])], chunk=5))
    assert [len(tokens) for (_, tokens), in without] == [1, 5, 4]


def test_an_empty_place_costs_no_attention():
    """The place of a row that ends, with no other to follow, runs along from position 0."""
    model = prepare_model(make(), "structured", torch.float32)
    decoder, rows = serve(model, prompts_of([62, 3]), settings(max_new_tokens=20), 3)
    assert [len(row.new) for row in rows] == [2, 20]
    assert decoder.cache.position.tolist() == [20 - 1 - 3, 0, 20]  # the long one left after chunks of 1 and 3 steps


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("batch, fused", [(1, True), (2, True), (4, True), (7, True), (7, False)])
@pytest.mark.parametrize("how", ENDS)
def test_on_a_card_graphs_of_steps_serve_every_row(how, batch, fused):
    shape = dict(ffn="lowrank", rank=16) if fused else WITH_EXTRAS["recipe"]
    model = prepare_model(make("cuda", block_size=200, **shape), "structured", torch.float32)
    given, ends = ENDS[how]
    s, prompts = settings(max_new_tokens=30, **given), prompts_of([*MIXED, 150, 90, 120, 100, 128, 65, 40])
    alone = [serve(model, [p], s, 1, 200, graphs=False, **ends)[1][0] for p in prompts]
    decoder, rows = serve(model, prompts, s, batch, 200, graphs=True, **ends)
    assert [(row.new, row.finish) for row in rows] == [(row.new, row.finish) for row in alone]
    assert len({row.finish for row in rows}) > 1 or how == "greedy"
    again = [Row(p, row_key(s.seed, p)) for p in prompts]
    for _ in decoder.run(again):
        pass
    assert [(row.new, row.finish) for row in again] == [(row.new, row.finish) for row in alone]
    assert all(isinstance(graph, torch.cuda.CUDAGraph) for graph in decoder.recorded.values())
    assert decoder.ignores_seen is fused and (type(decoder.forward).__name__ == "Step") == (batch <= 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", WITH_EXTRAS)
@torch.no_grad()
def test_on_a_card_a_graph_of_prompts_stores_what_float32_does(name):
    """Without a graph, while it is recorded, replayed; several prompts in a row and one. No other row is written."""
    exact = make("cuda", 200, **WITH_EXTRAS[name])
    for p in exact.parameters():
        torch.nn.init.normal_(p, std=0.05)
    model = prepare_model(copy.deepcopy(exact), "structured", torch.bfloat16)
    decoder = Decoder(model, settings(), 6, 200, graphs=True)
    assert decoder.prompt_graphs
    for turn, lengths in enumerate(([90, 2, 150], [150, 2, 80], [33, 60, 148], [101], [99], [120])):
        decoder.cache.every.zero_()
        places = [(2 * turn + 3 * i) % (6 + decoder.spare) for i in range(len(lengths))]
        prompts = prompts_of(lengths, turn)
        decoder.store([(p, i) for p, i in zip(prompts, places)])
        for p, i in zip(prompts, places):
            old = Cache(exact.cfg, 1, 200, "cuda", torch.float32)
            exact.store(torch.tensor([p], device="cuda"), old)
            ours = decoder.cache.every[:, :, i].float()
            assert (ours - old.every[:, :, 0]).norm() < 0.03 * old.every.norm()
            assert not ours[:, :, :, len(p):].any()
        others = [i for i in range(6 + decoder.spare) if i not in places]
        assert not decoder.cache.every[:, :, others].any()
    assert decoder.prefills.keys() == {(256, 64), (128, 1)}
    assert all(isinstance(graph, torch.cuda.CUDAGraph) for graph in decoder.prefills.values())


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
    fits = decode.rows_that_fit(model.cfg, 64, torch.device("cpu"), torch.float32)
    assert fits > 10
    cache = Cache(model.cfg, 3, 64, "cpu", torch.float32)
    stored = sum(t.nbytes for layer in cache.layers for t in layer)
    assert decode.token_bytes(model.cfg, torch.float32) == stored / (3 * 64)
    Decoder(model, settings(), fits, 64)
    with pytest.raises(UserError, match=f"largest that fits is {fits}"):
        Decoder(model, settings(), fits + 1, 64)
    # activations of the longest prompt, twice: they go whole, however long; value embeddings of all layers at once
    free = lambda rows, cfg, length, per_token: (rows * decode.row_bytes(cfg, length, torch.float32) + 2**28
                                                 + 2 * max(8192, length) * per_token * 4) / 0.95 + 64
    for given, per_token in ((dict(), 8 * 128 + 2 * 512 + 4 * 128), (dict(value_embeddings=True), 2560 + 2 * 64)):
        cfg = Config(n_layer=3, n_embd=128, n_head=4, n_kv_head=2, block_size=2**15, vocab_size=256, **given)
        config.check(cfg)
        for length in (1024, 2**15):
            monkeypatch.setattr(decode, "free_bytes", lambda device: free(7, cfg, length, per_token))
            assert decode.rows_that_fit(cfg, length, torch.device("cpu"), torch.float32) == 7
            monkeypatch.setattr(decode, "free_bytes", lambda device: free(7, cfg, length, per_token) - 2048)
            assert decode.rows_that_fit(cfg, length, torch.device("cpu"), torch.float32) == 6
    monkeypatch.setattr(decode, "free_bytes", lambda device: 2**29)
    # rows of prompts that are stored ahead take what is left
    assert [Decoder(model, settings(), batch, 64).spare for batch in (fits, fits - 3, 16, 1)] == [0, 3, 32, 2]


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


def test_bench_decode_with_rows_refilled(cli, tmp_path):
    """A token ends a text with probability 1 / 64, at the latest after 20: 17.1 tokens in the mean of 40 texts."""
    out = tmp_path / "rows.jsonl"
    given = ["--refill=40", "--batches=1,8", "--new_tokens=20", "--kinds=structured,merged", f"--json={out}"]
    assert cli("bench.py", "decode", *SMALL, *given)[0] == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["benchmark"], r["kind"], r["batch"], r["prompts"]) for r in rows] == [
        ("serve", kind, batch, 40) for kind in ("structured", "merged") for batch in (1, 8)]
    (tokens, prompts), = {(r["new_tokens"], r["prompt_tokens"]) for r in rows}  # whatever the batch
    assert 40 * 15 < tokens < 40 * 19 and 40 * 22 < prompts < 40 * 38
    assert all(r["of_steady"] == pytest.approx(r["tokens_per_s"] / r["steady"], rel=0.1) for r in rows)
    assert all(r["cold"] > 0 and r["static"] > 0 and r["cached"] == rows[0]["cached"] for r in rows)
    # a text of n tokens holds its prompt and n / 2 at the mean step, and longer texts have more steps
    assert prompts / 40 + tokens / 80 - 2 < rows[0]["cached"] < prompts / 40 + 10 + 2
    assert cli("bench.py", "decode", *SMALL, "--refill=-1")[0] == 2


def test_the_time_of_a_further_token_is_that_after_the_first(monkeypatch):
    clock = iter([1.0, 3.0, 6.0, 12.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    decoder = SimpleNamespace(key=torch.zeros(1), run=lambda rows: iter(range(3)))
    assert bench.generation(decoder, [[1], [2]], bench.Settings(new_tokens=10)) == (2.0, 1.0)


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
    monkeypatch.setattr(merge, "measure_steps", lambda model, pairs, sizes=merge.STEP_BATCHES: {
        str(few): {pair.shape: [0.4, 0.3] for pair in pairs if model.blocks[1].ffn.fc1 in pairs} for few in sizes})
    out = tmp_path / "rows.jsonl"
    assert cli("bench.py", "crossover", *SMALL, f"--json={out}")[0] == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    of_step = [r for r in rows if r["of"] == "step"]
    assert [r["tokens"] for r in of_step] == 2 * [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    found = {(r["launch"], r["factors_ms"], r["merged_ms"], r["auto"]) for r in of_step}
    assert found == {("graph", 0.4, 0.3, "merged")}
    assert all((r["factors_ms"], r["auto"]) == (1.0, "factors") for r in rows if r["of"] == "linear") and len(rows) > 40
