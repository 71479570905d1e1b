"""ops/megakernel: one kernel is model.step. Without CUDA the kernel itself runs on the CPU (emulate.h): its threads, barriers and copies in random order."""
import copy
import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from types import SimpleNamespace

import pytest
import torch

from ops import megakernel as kernels
from conftest import ROOT
from model import Cache
from ops.decode import can_step
from test_decode import MODELS, make

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


@functools.cache
def emulated(defines):
    folder = tempfile.mkdtemp()
    with open(f"{folder}/step.cpp", "w") as f:
        f.write(f'#include "emulate.h"\n{kernels.source(defines)}\nvoid enter() {{ decode_step(*arguments_of_step); current->done = true; }}\n')
    subprocess.run(["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{ROOT}/tests", "-o", f"{folder}/step.so", f"{folder}/step.cpp"], check=True)
    return ctypes.CDLL(f"{folder}/step.so")


def make_step(model, cache, programs=6, warps=2, seed=1, shared=100_000):
    """On CUDA as it is used; on a CPU with few programs and warps, which a generator of random numbers mixes."""
    def launch(defines, programs, threads, arguments, device):
        emulated(defines).launch(programs, threads, shared, threads - 32 * kernels.FETCHERS, seed, ctypes.byref(arguments))

    if ON_GPU:  # every program has rows of qkv
        return kernels.Step(model, cache, min(torch.cuda.get_device_properties(0).multi_processor_count, model.blocks[0].attn.qkv.out_features))
    return kernels.Step(model, cache, programs, warps, launch=launch)


def pair(dtype, batch=1, **shape):
    """(model in float32, the same with its parameters in dtype, a cache for each)"""
    model = make(DEVICE, **{"n_layer": 2, **shape})
    for block in model.blocks:
        block.attn.qkv.weight *= 8 if dtype == torch.float32 else 1  # sharp attention, so that the parts of the cache weigh unequally
    for p in model.parameters():
        p.copy_(p.to(dtype))
    low = copy.deepcopy(model).to(dtype)
    low.cos, low.sin = model.cos, model.sin
    return model, low, *(Cache(model.cfg, batch, model.cfg.block_size, DEVICE, m.head.weight.dtype) for m in (model, low))


def compare(dtype, prompts, shape, steps=2, batch=1, **how):
    """Rows of different lengths, the first the longest, each a prompt or nothing at all."""
    model, low, expected, cache = pair(dtype, batch, **shape)
    assert kernels.fits(low.cfg, kernels.all_matrices(low, batch), dtype, how.get("programs", 6), batch)
    step = make_step(low, cache, **how)
    tokens = torch.randint(257, (batch, model.cfg.block_size), device=DEVICE)
    for prompt in prompts:
        lengths = (prompt - 37 * torch.arange(batch, device=DEVICE)).clamp(min=min(prompt, 1))
        for m, c in ((model, expected), (low, cache)):
            c.position.zero_()
            if prompt:
                m.step(tokens[:, :prompt], c, lengths)
        for i in range(prompt, min(prompt + steps, tokens.size(1))):
            reference = model.step(tokens[:, i:i + 1], expected)
            near = (1e-4, 1e-4) if dtype == torch.float32 else (0.01 * reference.abs().max().item(), 0)
            torch.testing.assert_close(step(tokens[:, i:i + 1].contiguous(), cache).float(), reference, atol=near[0], rtol=near[1])
            torch.testing.assert_close(cache.position, expected.position)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_is_the_step(name):
    length = SHAPES[name].get("block_size", 64)
    compare(torch.float32, (0, length - 20), SHAPES[name])


@pytest.mark.parametrize("name", ["lowrank swiglu", "blockshuffle, one key head", "odd sizes", "long"])
@torch.no_grad()
def test_is_near_in_bf16(name):
    compare(torch.bfloat16, (0, SHAPES[name].get("block_size", 64) - 20), SHAPES[name])


@pytest.mark.parametrize("name, batch", [("lowrank swiglu", 2), ("blockshuffle, one key head", 3), ("odd sizes", 4), ("odd shuffle", 4), ("long", 2), ("dense", 3), ("blockdense swiglu", 4)])
@torch.no_grad()
def test_several_sequences(name, batch):
    compare(torch.float32, (0, SHAPES[name].get("block_size", 64) - 20), SHAPES[name], batch=batch)


@torch.no_grad()
def test_several_sequences_in_bf16():
    compare(torch.bfloat16, (0, 44), SHAPES["lowrank swiglu"], batch=3)


@pytest.mark.parametrize("batch, shape", [(1, dict(ffn_dim=256)), (2, dict(ffn_dim=192)), (3, dict(act="swiglu", ffn_dim=160))])
@torch.no_grad()
def test_programs_share_the_columns_of_long_rows(batch, shape, monkeypatch):
    monkeypatch.setattr(kernels, "WIDEST", 64)
    shape = dict(ffn="lowrank", rank=20, **shape)
    assert kernels.matrices(make(DEVICE, **shape).blocks[-1].ffn.fc2, batch)[0].blocks == (4 if batch < 3 else 2)
    compare(torch.float32, (0, 44), shape, batch=batch)


@pytest.mark.parametrize("steps", [1, 2, 3])
@torch.no_grad()
def test_programs_come_and_go(steps):
    """One program a head or several, in turn: whatever lay about from launches before, none takes it for new."""
    compare(torch.float32, (300, 0, 130, 70, 500, 3, 200), dict(SHAPES["long"], n_layer=1), steps, programs=8)


@torch.no_grad()
def test_the_count_of_stages_overflows():
    model, low, expected, cache = pair(torch.float32)
    step = make_step(low, cache)
    stages = int(re.search("#define STAGES (\\d+)", step.defines)[1]) * step.programs
    launches = 2 * (2**32 // stages // 2)  # it overflows in the first or the second step
    step.counter.copy_(torch.tensor([launches * step.programs, launches * stages % 2**32]))
    for token in torch.randint(257, (3, 1, 1), device=DEVICE):
        torch.testing.assert_close(step(token, cache), model.step(token, expected), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_full_cache_stays_full():
    compare(torch.float32, (62,), MODELS["dense"], steps=2)


@pytest.mark.skipif(ON_GPU, reason="there the card says how many programs there are")
@pytest.mark.parametrize("programs, warps, shared", [(1, 2, 60_000), (2, 4, 100_000), (4, 8, 100_000), (90, 1, 45_000)])
@torch.no_grad()
def test_any_number_of_programs(programs, warps, shared):
    """One, so few that a program sums its rows in several rounds, and so many that most have none; a ring of two or three slots."""
    shape = dict(MODELS["blockshuffle, one key head"], nblocks=1) if programs == 1 else MODELS["blockshuffle, one key head"]
    shape = dict(shape, nblocks=2) if programs == 2 else shape
    compare(torch.float32, (44,), dict(shape, n_layer=1), steps=1, programs=programs, warps=warps, shared=shared)


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
    """Until the source or the compiler changes; a damaged file is replaced, and without a place to keep it, it is compiled."""
    compiled = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "compiler", lambda: "a compiler")
    monkeypatch.setattr(kernels, "compile_source", lambda text, architecture: compiled.append(text) or f"{architecture} {len(compiled)}".encode())

    def binary(defines="#define A 1\n", capability=(9, 0)):
        kernels.binary.cache_clear()
        return kernels.binary(defines, capability)

    assert binary() == b"sm_90a 1" == binary() and binary(capability=(10, 0)) == b"sm_100 2" and binary("#define A 2\n") == b"sm_90a 3"
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


@pytest.mark.parametrize("part", [dict(qk_norm=1.2), dict(embed_norm=True), dict(embed_skip=True),
                                  dict(value_embeddings=True)], ids=str)
def test_parts_that_no_decoding_kernel_has_are_left_to_plain_torch(part, capsys):
    model, weight = make(n_layer=2, **part), SimpleNamespace(device=SimpleNamespace(type="cuda"))
    kernels.slower.cache_clear()
    assert not kernels.usable(SimpleNamespace(cfg=model.cfg, head=SimpleNamespace(weight=weight)), 1)
    assert f"no {next(iter(part))}" in capsys.readouterr().err
    position = SimpleNamespace(is_cuda=True)
    assert [can_step(m, SimpleNamespace(position=position)) for m in (model, make(n_layer=2))] == [False, True]


@pytest.mark.parametrize("shape, dtype, fits", [
    (dict(ffn="lowrank", rank=20), torch.bfloat16, False), (dict(ffn="lowrank", rank=20), torch.float32, True),
    (dict(n_head=16), torch.bfloat16, False), (dict(n_head=8), torch.bfloat16, True), (dict(ffn_dim=2**14 + 8), torch.float32, False),
    (dict(ffn="blockdense", rank=32, nblocks=8), torch.float32, False), (dict(n_head=8), torch.float16, False)])
def test_what_fits(shape, dtype, fits):
    model = make(**{"n_layer": 2, **shape}).to(dtype)
    assert kernels.fits(model.cfg, kernels.all_matrices(model), dtype, 6) is fits


@pytest.mark.skipif(not ON_GPU, reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2, 4])
@torch.no_grad()
def test_repeats_itself(batch, dtype):
    model = make("cuda", n_embd=1024, n_head=8, ffn="lowrank", rank=256, n_layer=4, vocab_size=5000, block_size=256).to(dtype)
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
