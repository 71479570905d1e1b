"""ops/chain: its kernels, one after the other, are model.step. Without CUDA they run on the CPU (emulate.h)."""
import copy
import ctypes
import functools
import shutil
import subprocess
import tempfile

import pytest
import torch

from conftest import ROOT
from model import Cache
from ops import chain, megakernel
from test_decode import MODELS, make

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.skipif(not ON_GPU and not shutil.which("g++"), reason="needs CUDA or g++")

ENTRIES = """
void enter() { KERNEL(*arguments_of_step); current->done = true; }
extern "C" int start(int grid, int threads, int cluster, unsigned seed, void* arguments) {
    cluster_size = cluster;
    launch(grid, threads, NEEDED, threads, seed, arguments);
    return 0;
}
"""


@functools.cache
def emulated(kernel):
    folder = tempfile.mkdtemp()
    needed = 0 if kernel.name == "embed" else "needed_bytes"
    with open(f"{folder}/kernel.cpp", "w") as f:
        f.write(f'#include "emulate.h"\n{megakernel.source(kernel.defines, "chain.cu")}\n#define KERNEL {kernel.name}\n'
                f"#define NEEDED {needed}\n{ENTRIES}")
    flags = "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{ROOT}/tests"
    subprocess.run(["g++", *flags, "-o", f"{folder}/kernel.so", f"{folder}/kernel.cpp"], check=True)
    return ctypes.CDLL(f"{folder}/kernel.so")


def launch(kernel, arguments, device):
    if ON_GPU:
        return chain.launch(kernel, arguments, device)
    emulated(kernel).start(kernel.grid, kernel.threads, kernel.cluster, 1, ctypes.byref(arguments))


def make_step(model, cache, multiprocessors=8, **kw):
    return chain.Step(model, cache, multiprocessors, launch=launch, **kw)


def pair(batch, **shape):
    """(model in float32 whose weights bf16 holds, the same in bf16, a cache for each)"""
    model = make(DEVICE, **{"n_layer": 2, **shape})
    for p in model.parameters():
        p.copy_(p.bfloat16())
    low = copy.deepcopy(model).bfloat16()
    low.cos, low.sin = model.cos, model.sin
    length = model.cfg.block_size
    return model, low, *(Cache(model.cfg, batch, length, DEVICE, m.head.weight.dtype) for m in (model, low))


LINEARS = [  # rows, K, blocks, spread, tiles, split, warps, tokens, norm, act, adds
    (96, 128, 1, 96, 3, 1, 2, 16, "LAYER_NORM", "NONE", False), (96, 128, 1, 96, 4, 2, 2, 8, "RMS_NORM", "GELU", False),
    (64, 256, 2, 2, 2, 4, 2, 24, "LAYER_NORM", "RELU2", False), (64, 96, 2, 64, 3, 1, 2, 8, "NO_NORM", "NONE", True),
    (48, 256, 2, 96, 1, 8, 1, 40, "NO_NORM", "NONE", True), (64, 128, 1, 64, 1, 2, 2, 8, "LAYER_NORM", "SWIGLU", False),
    (32, 512, 1, 32, 2, 4, 4, 64, "NO_NORM", "NONE", True)]


@pytest.mark.parametrize("rows, K, blocks, spread, tiles, split, warps, tokens, norm, act, adds", LINEARS)
@torch.no_grad()
def test_linear(rows, K, blocks, spread, tiles, split, warps, tokens, norm, act, adds):
    torch.manual_seed(1)
    x, w = (torch.randn(*n, device=DEVICE).bfloat16() for n in ((tokens, blocks * K), (blocks, rows, K)))
    bias, gain, shift, after = (1 + 0.3 * torch.randn(4, max(blocks * K, blocks * rows), device=DEVICE)).bfloat16()
    stage = chain.Stage(w, rows, K, blocks, spread)
    gain, shift = gain[:blocks * K], shift[:blocks * K]
    bias, after = bias[:blocks * rows].contiguous(), after[:blocks * rows].contiguous()
    x += 0.5
    parts = x.float().view(tokens, -1, 16)
    moments = torch.stack([parts.mean(-1), parts.var(-1, correction=0) * 16], dim=-1).contiguous()
    read, h = x, x.float()
    vectors = None
    if norm != "NO_NORM":
        layer = torch.nn.Module()
        layer.weight, layer.bias = gain, shift if norm == "LAYER_NORM" else None
        vectors = chain.of_norm(stage, layer, bias)
        read = (x.float() * gain).bfloat16()
        h = h - h.mean(-1, keepdim=True) if norm == "LAYER_NORM" else h
        h = h * (h.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain + (shift if norm == "LAYER_NORM" else 0)
    y = torch.einsum("tbk,brk->tbr", h.double().view(tokens, blocks, K), w.double()).flatten(1)
    y = y.view(tokens, -1, spread).transpose(1, 2).flatten(1) + bias
    if act == "SWIGLU":
        gate, value = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * value
    y = {"GELU": lambda a: torch.nn.functional.gelu(a, approximate="tanh"),
         "RELU2": lambda a: a.relu() ** 2}.get(act, lambda a: a)(y)
    out = torch.randn(y.shape, device=DEVICE).bfloat16()
    expected = y + out if adds else y
    scaled, new = torch.zeros_like(out), torch.zeros(tokens, y.size(1) // 16, 2, device=DEVICE)
    kernel = chain.linear_kernel(stage, chain.Tiles(tiles, split, warps), tokens, norm, act, True, adds)
    arguments = chain.pointers(chain.Linear, read, w, bias, after if adds else None, out if adds else None, vectors,
                               moments, out, scaled, new, eps=1e-5)
    launch(kernel, arguments, torch.device(DEVICE))
    scale = expected.abs().max().item()
    torch.testing.assert_close(out.double(), expected, atol=0.01 * scale, rtol=0.01)
    if adds:
        torch.testing.assert_close(scaled.float(), out.float() * after, rtol=0.01, atol=0)
        ours = out.float().view(tokens, blocks * rows)
        mean, squares = new.unbind(-1)
        full = mean.mean(-1)
        torch.testing.assert_close(full, ours.mean(-1), atol=1e-5, rtol=1e-4)
        var = (squares + 16 * (mean - full[:, None]) ** 2).sum(-1) / ours.size(1)
        torch.testing.assert_close(var, ours.var(-1, correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name, batch", [("dense", 5), ("absolute, grouped", 8), ("lowrank swiglu", 6), ("blockdense", 17)])
@torch.no_grad()
def test_is_the_step(name, batch):
    shape = dict(MODELS[name], vocab_size=256)
    if "rank" in shape:
        shape["rank"] = 64
    model, low, expected, cache = pair(batch, **shape)
    step = make_step(low, cache)
    tokens = torch.randint(256, (batch, 64), device=DEVICE)
    lengths = (44 - 3 * torch.arange(batch, device=DEVICE)).clamp(min=1)
    for m, c in ((model, expected), (low, cache)):
        m.step(tokens[:, :44], c, lengths)
    for i in range(44, 46):
        reference = model.step(tokens[:, i:i + 1], expected)
        ours = step(tokens[:, i:i + 1].contiguous(), cache).float()
        print((ours - reference).abs().max(), reference.abs().max())
        torch.testing.assert_close(ours, reference, atol=0.02 * reference.abs().max().item(), rtol=0)
        torch.testing.assert_close(cache.position, expected.position)
