"""ops/megakernel: one kernel is model.step. Without CUDA the kernel itself runs on the CPU (emulate.h): its threads,
barriers and copies in random order."""
import copy
import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from conftest import ROOT
from decode import Decoder, Row
from merge import prepare_model
from model import Cache
from ops import fallback
from ops import megakernel as kernels
from test_decode import MODELS, make, prompts_of, settings

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.skipif(not ON_GPU and not shutil.which("g++"), reason="needs CUDA or g++")
SHAPES = {
    **MODELS,
    "odd sizes": dict(n_embd=96, n_head=3, ffn_dim=160, ffn="lowrank", rank=24),
    "odd shuffle": dict(n_embd=96, n_head=3, ffn_dim=192, ffn="blockshuffle", nblocks=3, norm="rmsnorm", bias=False),
    "long": dict(n_head=2, n_kv_head=1, block_size=640),
    "blockshuffle swiglu": dict(act="swiglu", ffn="blockshuffle", nblocks=4),
    "blockdense swiglu": dict(act="swiglu", ffn="blockdense", rank=32, nblocks=2),
}

ENTRIES = """
void enter() { decode_step(*arguments_of_step); current->done = true; }
extern "C" void to_bf16(const float* from, bf16* to, int n) { for (int i = 0; i < n; i++) narrow(from[i], to[i]); }
"""


@functools.cache
def emulated(defines):
    folder = tempfile.mkdtemp()
    with open(f"{folder}/step.cpp", "w") as f:
        f.write(f'#include "emulate.h"\n{kernels.source(defines)}\n{ENTRIES}')
    flags = "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{ROOT}/tests"
    subprocess.run(["g++", *flags, "-o", f"{folder}/step.so", f"{folder}/step.cpp"], check=True)
    return ctypes.CDLL(f"{folder}/step.so")


def make_step(model, cache, grid=6, warps=2, seed=1, shared=100_000):
    """On CUDA as it is used; on a CPU with few thread blocks and warps, in a random order."""
    def launch(defines, grid, threads, arguments, device):
        consumers = threads - 32 * kernels.PRODUCER_WARPS
        emulated(defines).launch(grid, threads, shared, consumers, seed, ctypes.byref(arguments))

    if ON_GPU:  # every thread block has rows of qkv
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        return kernels.Step(model, cache, min(multiprocessors, model.blocks[0].attn.qkv.out_features))
    return kernels.Step(model, cache, grid, warps, launch=launch)


def pair(dtype, batch=1, **shape):
    """(model in float32, the same with its parameters in dtype, a cache for each)"""
    model = make(DEVICE, **{"n_layer": 2, **shape})
    for block in model.blocks:
        block.attn.qkv.weight *= 8 if dtype == torch.float32 else 1  # sharp attention: parts weigh unequally
    for p in model.parameters():
        p.copy_(p.to(dtype))
    low = copy.deepcopy(model).to(dtype)
    low.cos, low.sin = model.cos, model.sin
    length = model.cfg.block_size
    return model, low, *(Cache(model.cfg, batch, length, DEVICE, m.head.weight.dtype) for m in (model, low))


def compare(dtype, prompts, shape, steps=2, batch=1, shorter=37, **how):
    """Rows of different lengths, each by `shorter` tokens (negative: the last is the longest), or empty -> the step."""
    model, low, expected, cache = pair(dtype, batch, **shape)
    assert kernels.fits(low.cfg, kernels.all_matrices(low, batch), dtype, how.get("grid", 6), batch)
    step = make_step(low, cache, **how)
    tokens = torch.randint(257, (batch, model.cfg.block_size), device=DEVICE)
    for prompt in prompts:
        rows = torch.arange(batch, device=DEVICE)
        lengths = (prompt - abs(shorter) * (rows if shorter >= 0 else rows.flip(0))).clamp(min=min(prompt, 1))
        for m, c in ((model, expected), (low, cache)):
            c.position.zero_()
            if prompt:
                m.step(tokens[:, :prompt], c, lengths)
        for i in range(prompt, min(prompt + steps, tokens.size(1))):
            reference = model.step(tokens[:, i:i + 1], expected)
            near = (1e-4, 1e-4) if dtype == torch.float32 else (0.01 * reference.abs().max().item(), 0)
            ours = step(tokens[:, i:i + 1].contiguous(), cache).float()
            torch.testing.assert_close(ours, reference, atol=near[0], rtol=near[1])
            torch.testing.assert_close(cache.position, expected.position)
    return step


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_is_the_step(name):
    length = SHAPES[name].get("block_size", 64)
    compare(torch.float32, (0, length - 20), SHAPES[name])


@pytest.mark.parametrize("name", ["lowrank swiglu", "blockshuffle, one key head", "odd sizes", "long"])
@torch.no_grad()
def test_is_near_in_bf16(name):
    compare(torch.bfloat16, (0, SHAPES[name].get("block_size", 64) - 20), SHAPES[name])


@pytest.mark.parametrize("name, batch", [
    ("lowrank swiglu", 2), ("blockshuffle, one key head", 3), ("odd sizes", 4), ("odd shuffle", 4),
    ("long", 2), ("dense", 3), ("blockdense swiglu", 4)])
@torch.no_grad()
def test_several_sequences(name, batch):
    compare(torch.float32, (0, SHAPES[name].get("block_size", 64) - 20), SHAPES[name], batch=batch)


@pytest.mark.parametrize("dtype, batch, grid, prompts, shorter", [
    (torch.float32, 2, 16, (600, 200), 350), (torch.float32, 2, 8, (450,), 0),
    (torch.float32, 2, 16, (600,), -350), (torch.float32, 3, 24, (620, 300), 160),
    (torch.bfloat16, 2, 16, (500,), 250)])
@torch.no_grad()
def test_several_sequences_whose_heads_are_split(dtype, batch, grid, prompts, shorter):
    """Every sequence has a number of splits of its own, as 4 and 2 or 3, 2 and 2, and fewer after a prompt that is
    shorter than the one before."""
    step = compare(dtype, prompts, dict(SHAPES["long"], n_layer=1), batch=batch, shorter=shorter, grid=grid)
    assert int(re.search("#define SPLITS (\\d+)", step.defines)[1]) >= 2


@torch.no_grad()
def test_several_sequences_in_bf16():
    compare(torch.bfloat16, (0, 44), SHAPES["lowrank swiglu"], batch=3)


@pytest.mark.skipif(ON_GPU, reason="the card rounds as the emulator does: the source is the same")
@torch.no_grad()
def test_bf16_is_rounded_to_nearest():
    """Bit by bit as torch does it: ties, infinities, subnormal numbers and numbers at random."""
    g = torch.Generator().manual_seed(0)
    ties = torch.arange(256, dtype=torch.int32) << 15 | 0x3F800000
    drawn = torch.randint(-2**31, 2**31, (100_000,), generator=g).to(torch.int32)
    bits = torch.cat([drawn, ties, ties + 1, ties - 1, -ties,
                      torch.tensor([0, 1, 0x7F800000, 0x7F7FFFFF, 0x007FFFFF, -2**31, 0x7FC00000], dtype=torch.int32)])
    values, rounded = bits.view(torch.float32), torch.empty(len(bits), dtype=torch.bfloat16)
    _, low, _, cache = pair(torch.bfloat16)
    step = make_step(low, cache)
    emulated(step.defines).to_bf16(ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(rounded.data_ptr()), len(bits))
    torch.testing.assert_close(rounded, values.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def test_bf16_has_no_bias():
    """Truncated, logits, keys and values would be smaller by 0.3 % on average; rounded, they are neither smaller nor
    larger."""
    model, low, expected, cache = pair(torch.bfloat16, vocab_size=2000)
    step, ours, theirs = make_step(low, cache), [], []
    for token in torch.randint(257, (3, 1, 1), device=DEVICE):
        ours.append(step(token, cache).float().clone()), theirs.append(model.step(token, expected))
    pairs = [(torch.stack(ours), torch.stack(theirs))]
    pairs += [(a.float(), b) for layer in zip(cache.layers, expected.layers) for a, b in zip(*layer)]
    for a, b in pairs:
        assert (a.abs().sum() / b.abs().sum() - 1).abs() < 1e-3


@pytest.mark.parametrize("batch, shape", [
    (1, dict(ffn_dim=256)), (2, dict(ffn_dim=192)), (3, dict(act="swiglu", ffn_dim=160))])
@torch.no_grad()
def test_thread_blocks_share_the_columns_of_long_rows(batch, shape, monkeypatch):
    monkeypatch.setattr(kernels, "WIDEST", 64)
    shape = dict(ffn="lowrank", rank=20, **shape)
    assert kernels.matrices(make(DEVICE, **shape).blocks[-1].ffn.fc2, batch)[0].blocks == (4 if batch < 3 else 2)
    compare(torch.float32, (0, 44), shape, batch=batch)


@pytest.mark.parametrize("steps", [1, 2, 3])
@torch.no_grad()
def test_splits_come_and_go(steps):
    """One thread block a head or several, in turn: values of earlier launches are never taken for new ones."""
    compare(torch.float32, (300, 0, 130, 70, 500, 3, 200), dict(SHAPES["long"], n_layer=1), steps, grid=8)


@torch.no_grad()
def test_the_count_of_stages_overflows():
    model, low, expected, cache = pair(torch.float32)
    step = make_step(low, cache)
    stages = int(re.search("#define STAGES (\\d+)", step.defines)[1]) * step.grid
    launches = 2 * (2**32 // stages // 2)  # it overflows in the first or the second step
    step.counter.copy_(torch.tensor([launches * step.grid, launches * stages % 2**32]))
    for token in torch.randint(257, (3, 1, 1), device=DEVICE):
        torch.testing.assert_close(step(token, cache), model.step(token, expected), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_full_cache_stays_full():
    compare(torch.float32, (62,), MODELS["dense"], steps=2)


@pytest.mark.skipif(ON_GPU, reason="there the card sets the number of thread blocks")
@pytest.mark.parametrize("grid, warps, shared", [(1, 2, 60_000), (2, 4, 100_000), (4, 8, 100_000), (90, 1, 45_000)])
@torch.no_grad()
def test_any_number_of_thread_blocks(grid, warps, shared):
    """One; so few that each sums its rows in several rounds; so many that most have none. A ring of 2 or 3 slots."""
    shape = dict(MODELS["blockshuffle, one key head"], nblocks=1) if grid == 1 else MODELS["blockshuffle, one key head"]
    shape = dict(shape, nblocks=2) if grid == 2 else shape
    compare(torch.float32, (44,), dict(shape, n_layer=1), steps=1, grid=grid, warps=warps, shared=shared)


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_threads_to_spare(batch):
    """Fewer pieces in a row than threads, and more than half as many: none counts twice in a norm."""
    compare(torch.float32, (0, 44), dict(n_embd=576 if ON_GPU else 288, n_head=9), batch=batch, warps=4)


@pytest.mark.skipif(ON_GPU, reason="there nothing sets the order")
@torch.no_grad()
def test_the_order_of_threads_does_not_matter():
    _, model, _, cache = pair(torch.float32, **MODELS["blockdense"])
    token, seen = torch.tensor([[7]]), []
    for seed in range(6):
        cache.position.zero_()
        step = make_step(model, cache, seed=seed)
        seen.append(torch.stack([step(token, cache).clone() for _ in range(2)]))
    assert all(torch.equal(logits, seen[0]) for logits in seen)


def test_a_compiled_kernel_is_kept(tmp_path, monkeypatch):
    """Until the source or the compiler changes; a damaged file is replaced, and without a place to keep it, it is
    compiled."""
    compiled = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "compiler", lambda: "a compiler")
    monkeypatch.setattr(kernels, "compile_source",
                        lambda text, architecture: compiled.append(text) or f"{architecture} {len(compiled)}".encode())

    def binary(defines="#define A 1\n", capability=(9, 0)):
        kernels.binary.cache_clear()
        return kernels.binary(defines, capability)

    assert binary() == b"sm_90a 1" == binary()
    assert binary(capability=(10, 0)) == b"sm_100 2" and binary("#define A 2\n") == b"sm_90a 3"
    assert compiled[0] == "#define A 1\n" + compiled[2].removeprefix("#define A 2\n")
    files = sorted(tmp_path.rglob("*"))
    assert len(files) == 4 and [f.suffix for f in files[1:]] == [".cubin"] * 3
    for f in files[1:]:
        f.write_bytes(f.read_bytes()[:-1] + b"?")
    assert binary() == b"sm_90a 4" == binary()
    monkeypatch.setattr(kernels, "compiler", lambda: "another")
    assert binary() == b"sm_90a 5"
    monkeypatch.setenv("XDG_CACHE_HOME", str(files[1]))
    assert binary() == b"sm_90a 6" and binary() == b"sm_90a 7"
    kernels.binary.cache_clear()


@pytest.mark.parametrize("part", [dict(qk_norm=1.2), dict(post_norm=0.3), dict(embed_norm=True),
                                  dict(logit_softcap=15.0), dict(smear=True), dict(embed_skip=True),
                                  dict(value_embeddings=True)], ids=str)
def test_parts_that_no_decoding_kernel_has_are_left_to_plain_torch(part, caplog, monkeypatch):
    can_step = pytest.importorskip("ops.decode").can_step
    model, weight = make(n_layer=2, **part), SimpleNamespace(device=SimpleNamespace(type="cuda"))
    monkeypatch.setattr(fallback, "_logged", set())
    monkeypatch.setattr("ops.decode.works", lambda *_: True)
    assert not kernels.usable(SimpleNamespace(cfg=model.cfg, head=SimpleNamespace(weight=weight)), 1)
    assert f"no {next(iter(part))}" in caplog.text
    plain = make(n_layer=2)
    cache = Cache(plain.cfg, 2, 16, torch.device("cpu"), torch.float32)
    cache.position = MagicMock(is_cuda=True)
    cache.position.__len__.return_value = 2
    assert [can_step(m, cache) for m in (model, plain)] == [False, True]


@pytest.mark.parametrize("shape, dtype, fits", [
    (dict(ffn="lowrank", rank=20), torch.bfloat16, False), (dict(ffn="lowrank", rank=20), torch.float32, True),
    (dict(n_head=16), torch.bfloat16, False), (dict(n_head=8), torch.bfloat16, True),
    (dict(ffn_dim=2**14 + 8), torch.float32, False),
    (dict(ffn="blockdense", rank=32, nblocks=8), torch.float32, False), (dict(n_head=8), torch.float16, False)])
def test_what_fits(shape, dtype, fits):
    model = make(**{"n_layer": 2, **shape}).to(dtype)
    assert kernels.fits(model.cfg, kernels.all_matrices(model), dtype, 6) is fits


def test_rows_that_end_are_replaced():
    """The kernel takes rows whose positions jump, and rows that are empty."""
    model = prepare_model(make(DEVICE, n_layer=2, ffn="lowrank", rank=16), "structured", torch.float32)
    prompts, found = prompts_of([5, 1, 60, 9]), []
    for kernel in (False, True):
        decoder = Decoder(model, settings(max_new_tokens=6), 2 if kernel else 1, 64, graphs=False)
        if kernel:
            decoder.forward, decoder.ignores_seen = make_step(model, decoder.cache), True
        rows = [Row(prompt) for prompt in prompts]
        assert len(list(decoder.run(rows))) > 3
        found.append([row.new for row in rows])
    assert found[0] == found[1] and [len(new) for new in found[1]] == [6, 6, 4, 6]


@pytest.mark.skipif(not ON_GPU, reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2, 4])
@torch.no_grad()
def test_repeats_itself(batch, dtype):
    shape = dict(n_embd=1024, n_head=8, ffn="lowrank", rank=256, n_layer=4, vocab_size=5000, block_size=256)
    model = make("cuda", **shape).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.03)
    cache = Cache(model.cfg, batch, 256, "cuda", dtype)
    step = kernels.Step(model, cache)
    tokens = torch.randint(5000, (batch, 100), device="cuda")
    model.step(tokens, cache, torch.full((batch,), 100, device="cuda"))
    token = tokens[:, :1].contiguous()
    first = step(token, cache).clone()
    for _ in range(2000):
        cache.position.fill_(100)
        assert torch.equal(step(token, cache), first)
