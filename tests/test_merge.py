"""merge: dense equivalents against float64 matrices, what stays exact in bf16, the table behind decode=auto."""
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import merge
import structured
from config import UserError
from conftest import dense_oracle
from merge import prepare_model
from structured import Dense, FactorsOrMerged
from test_decode import MODELS, make

KINDS = {name: MODELS[name] for name in ("lowrank swiglu", "blockshuffle, one key head", "blockdense")}


# ----------------------------------------------------------------------------------------------------------------------
# Merging

@pytest.mark.parametrize("name", KINDS)
def test_merged_weights_are_rounded_once(name):
    """bf16 after the product, as in float64: of factors that were cast before, most entries come out differently."""
    model = make(**KINDS[name])
    original = copy.deepcopy(model)
    merged = prepare_model(model, "merged", torch.bfloat16)
    for before, after in zip(original.blocks[1:], merged.blocks[1:]):
        for linear, dense in ((before.ffn.fc1, after.ffn.fc1), (before.ffn.fc2, after.ffn.fc2)):
            V, U = (w.detach().double() for w in (linear.V, linear.U))
            exact = torch.from_numpy(dense_oracle(type(linear).__name__.lower(), V, U))
            assert isinstance(dense, Dense) and dense.weight.dtype == torch.bfloat16
            assert (dense.weight == exact.bfloat16()).double().mean() > 0.995
            assert (linear.bias is None and dense.bias is None) or torch.equal(dense.bias, linear.bias.bfloat16())


@pytest.mark.parametrize("decode", ["structured", "merged", "auto"])
def test_queries_and_keys_are_merged_in_every_form(decode):
    """Whatever the FFNs are: the kernels of decoding read one matrix. It is rounded once."""
    model = make(ffn="lowrank", rank=16, qk_rank=8)
    qkv = copy.deepcopy(model.blocks[1].attn.qkv)
    merge.cast_and_merge(model, decode, torch.bfloat16)
    dense = model.blocks[1].attn.qkv
    exact = [torch.from_numpy(dense_oracle("lowrank", part.V.detach().double(), part.U.detach().double()))
             for part in (qkv.q, qkv.k)]
    assert isinstance(dense, Dense)
    assert (dense.weight == torch.cat((*exact, qkv.v.weight)).bfloat16()).double().mean() > 0.995
    assert torch.equal(dense.bias, torch.cat((qkv.q.bias, qkv.k.bias, qkv.v.bias)).bfloat16())


def test_auto_holds_the_factors_and_their_exact_product():
    model = make(**KINDS["blockdense"])
    original = copy.deepcopy(model)
    pairs = merge.cast_and_merge(model, "auto", torch.bfloat16)
    assert len(pairs) == 4
    for pair, (_, linear) in zip(pairs, original.structured_linears()):
        assert torch.equal(pair.factors.V, linear.V.bfloat16()) and torch.equal(pair.factors.U, linear.U.bfloat16())
        exact = torch.from_numpy(dense_oracle("blockdense", linear.V.detach(), linear.U.detach()))
        assert (pair.merged.weight == exact.bfloat16()).double().mean() > 0.995


@pytest.mark.parametrize("decode", ["structured", "merged"])
def test_positions_stay_exact_in_bf16(decode):
    model = prepare_model(make(block_size=4096, ffn="lowrank", rank=16, n_layer=2), decode, torch.bfloat16)
    assert model.wte.weight.dtype == model.head.weight.dtype == torch.bfloat16
    angle = np.arange(4096)[:, None] / 10_000 ** (np.arange(16) / 16)                  # head size 32
    for table, exact in ((model.cos[:, 0, :16], np.cos(angle)), (model.sin[:, 0, 16:], np.sin(angle))):
        assert np.abs(table.double().numpy() - exact).max() < 1e-7


def test_merging_uses_no_tf32(monkeypatch):
    precisions = []
    formed = structured.LowRank.dense_weight
    monkeypatch.setattr(structured.LowRank, "dense_weight",
                        lambda self: (precisions.append(torch.get_float32_matmul_precision()), formed(self))[1])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        prepare_model(make(ffn="lowrank", rank=16), "merged", torch.float32)
        assert set(precisions) == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("faster", ["factors", "merged"])
def test_the_form_that_is_always_faster_is_the_one_that_stays(faster, monkeypatch):
    times = [1.0, 2.0] if faster == "factors" else [2.0, 1.0]
    monkeypatch.setattr(merge, "measure", lambda pairs: {"eager": {p.shape: {"1": times, "16": times} for p in pairs}})
    monkeypatch.setattr(merge, "measure_steps", lambda model, pairs: {})
    original = make(ffn="lowrank", rank=16)
    model = prepare_model(copy.deepcopy(original), "auto", torch.float32)
    assert not any(isinstance(m, FactorsOrMerged) for m in model.modules())
    for before, after in zip(original.blocks[1:], model.blocks[1:]):
        linear, kept = before.ffn.fc1, after.ffn.fc1
        if faster == "factors":
            assert isinstance(kept, structured.LowRank) and torch.equal(kept.V, linear.V)
        else:
            assert isinstance(kept, Dense)
            torch.testing.assert_close(kept.weight, linear.U @ linear.V, atol=1e-6, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# The table of speeds

def test_auto_keeps_its_table_and_follows_it(tmp_path, monkeypatch):
    path = str(tmp_path / "decode.json")
    monkeypatch.setattr(merge, "TOKENS", [1, 4, 16])
    prepare_model(make(ffn="lowrank", rank=16), "auto", torch.float32, path)
    tables = json.loads(Path(path).read_text())
    (key, modes), = tables.items()
    assert torch.__version__ in key and "float32" in key and len(modes["eager"]) == 2

    for shape in modes["eager"]:
        modes["eager"][shape] = {"1": [2.0, 1.0], "4": [2.0, 1.0], "16": [1.0, 2.0]}
    Path(path).write_text(json.dumps(tables))
    monkeypatch.setattr(merge, "measure", lambda pairs: pytest.fail("measured again"))
    model = prepare_model(make(ffn="lowrank", rank=16), "auto", torch.float32, path)
    pair = model.blocks[1].ffn.fc1
    assert [model.speeds.merged(pair.shape, t) for t in (1, 3, 4, 5, 16, 4096)] == 3 * [True] + 3 * [False]
    x = torch.randn(1, 128)
    torch.testing.assert_close(pair(x), pair.factors(x), atol=1e-4, rtol=1e-4)
    few, many = merge.step_weights(model, 1, "eager"), merge.step_weights(model, 16, "eager")
    assert few - many == 4 * sum(m.merged.weight.numel() - m.factors.V.numel() - m.factors.U.numel()
                                 for m in model.modules() if isinstance(m, FactorsOrMerged))

    for shape in modes["eager"]:
        modes["eager"][shape] = {"1": [1.0, 2.0], "16": [1.0, 2.0]}
    Path(path).write_text(json.dumps(tables))
    model = prepare_model(make(ffn="lowrank", rank=16), "auto", torch.float32, path)
    assert not any(isinstance(m, FactorsOrMerged) for m in model.modules())


def test_a_linear_of_two_forms_uses_the_one_that_the_table_says():
    """Told apart by their outputs, as the merged form here is another matrix."""
    factors, merged = structured.linear("lowrank", 8, 6, rank=2), Dense(8, 6)
    times = {structured.shape_of(factors): {"1": [2.0, 1.0], "8": [1.0, 2.0]}}
    pair = FactorsOrMerged(factors, merged, merge.SpeedTable({"eager": times}))
    for shape, used in (((1, 8), merged), ((2, 4, 8), factors), ((30, 8), factors)):
        x = torch.randn(shape)
        assert torch.equal(pair(x), used(x)) and not torch.allclose(factors(x), merged(x))
        assert structured.active_linear(pair, x.numel() // 8) is used
    assert structured.active_linear(merged, 1) is merged


def test_eager_and_graph_have_answers_of_their_own():
    speeds = merge.SpeedTable({"eager": {"a": {"1": [2.0, 1.0]}}, "graph": {"a": {"1": [1.0, 2.0]}}})
    assert speeds.merged("a", 1)
    with speeds.launched("graph"):
        assert not speeds.merged("a", 1)
    assert speeds.merged("a", 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_times_the_step_that_few_sequences_take(dtype):
    """As a graph, all linears of a model go the way in which the whole step was faster: that of up to four sequences,
    on Hopper and in bf16 of up to 64."""
    model = prepare_model(make("cuda", **MODELS["blockshuffle, one key head"]), "auto", dtype)
    rows = model.speeds.times["graph"]
    chain = dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] == 9
    few = [str(tokens) for tokens in merge.STEP_BATCHES if tokens <= (64 if chain else 4)]
    for tokens in few:
        assert len({tuple(row[tokens]) for row in rows.values()}) == 1
    above = "96" if chain else "8"
    assert len({tuple(row[above]) for row in rows.values()}) == len(rows) == 2
    with model.speeds.launched("graph"):
        assert all(len({model.speeds.merged(shape, int(tokens)) for shape in rows}) == 1 for tokens in few)
    assert merge.measure_steps(model.cpu(), []) == {}


def test_table_of_another_card_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "decode.json"
    path.write_text(json.dumps({"another card": {"eager": {}}}))
    monkeypatch.setattr(merge, "TOKENS", [1])
    prepare_model(make(ffn="blockshuffle", nblocks=2), "auto", torch.float32, str(path))
    assert len(json.loads(path.read_text())) == 2


def test_a_damaged_table_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "decode.json"
    monkeypatch.setattr(merge, "TOKENS", [1])
    key = merge.table_key(torch.device("cpu"), torch.float32)
    shape = structured.shape_of(make(ffn="blockshuffle", nblocks=2).blocks[1].ffn.fc1)
    rows = {}, {"one": [1, 2]}, {"1": [1, "2"]}, {"1": [1]}, {"1": [0, 1]}
    tables = [{key: value} for value in (3, [], {"eager": 3}, *({"eager": {shape: row}} for row in rows))]
    for text in ("{", "[]", "[" * 100_000, *map(json.dumps, tables)):
        path.write_text(text)
        with pytest.raises(UserError, match="decode.json is damaged or cannot be read: delete it"):
            prepare_model(make(ffn="blockshuffle", nblocks=2), "auto", torch.float32, str(path))
        assert path.read_text() == text
