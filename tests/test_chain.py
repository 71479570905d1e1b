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


def make_step(model, cache, multiprocessors=8, seed=1, **kw):
    def launch(kernel, arguments, device):
        emulated(kernel).start(kernel.grid, kernel.threads, kernel.cluster, seed, ctypes.byref(arguments))

    if ON_GPU:
        return chain.Step(model, cache, **kw)
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
