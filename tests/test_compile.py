"""Without a card: every Triton kernel of ops/ compiles as its launcher launches it, and so does the CUDA source.

CI runs this under several versions of Triton, those that torch brings among them.
"""
import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import structured
from test_decode import make

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs triton as a compiler", allow_module_level=True)
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from ops import chain, decode, ffn, megakernel, pointwise  # noqa: E402
from model import Cache  # noqa: E402

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory that a thread block may have
BF16 = torch.bfloat16


class Driver:
    """What Triton asks about a card before it compiles."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def card(monkeypatch):
    """card(capability): kernels compile for it and are not launched -> {name: the compiled kernels' hashes}, filled
    from then on."""
    def become(capability):
        compiled, run = {}, JITFunction.run

        def compile_only(self, *args, grid, warmup, **kwargs):
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
            assert kernel.asm["cubin"] and kernel.metadata.target.arch == capability
            assert kernel.metadata.shared <= SHARED[capability], (self.__name__, kernel.metadata.shared)
            compiled.setdefault(self.__name__, set()).add(kernel.hash)

        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(capability))
        monkeypatch.setattr(JITFunction, "run", compile_only)
        monkeypatch.setattr(decode, "PDL", capability >= 90)
        for module in (pointwise, ffn):
            monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
        return compiled
    return become


# ----------------------------------------------------------------------------------------------------------------------
# What is launched

def rotate():
    qkv, table = torch.empty(2, 8, 12 + 2 * 4, 64, dtype=BF16), torch.empty(8, 1, 64)
    for gain in (0.0, 1.2):  # without and with the norm of queries and keys
        q, k, v, scale = pointwise.split_rotated(qkv, table, table, 12, 4, gain)
        pointwise.join_rotated(q, k, v, table, table, q, k, scale, gain)


def add_norm():
    for norm in (nn.LayerNorm(768), nn.LayerNorm(1600, bias=False), nn.RMSNorm(512, eps=1e-5)):
        x = torch.empty(4, *norm.normalized_shape, dtype=BF16)
        for pending in (None, x):
            pointwise.add_norm(x, pending, norm)
            rms, biased = isinstance(norm, nn.RMSNorm), getattr(norm, "bias", None) is not None
            pointwise.add_norm_backward_op(pending, x, x, norm.weight, norm.eps, rms, biased)
        a = torch.tensor(1.0)
        pointwise.skip_norm(x, x, x, a, a, norm)
        pointwise.add_norm_backward_op(x, x, x, norm.weight, norm.eps, rms, biased, x, x, a, a)


def token_loss():
    targets = torch.zeros(4, dtype=torch.long)
    for vocabulary in (16_384, 32_000):  # a row in registers, and in a loop
        logits = torch.empty(4, vocabulary, dtype=BF16)
        for gradient, cap in ((False, 0.0), (True, 0.0), (False, 15.0), (True, 15.0)):
            pointwise.token_loss(logits, targets, torch.tensor(1.0), gradient, cap)


def adamw():
    for n in (4096, 4097):  # the second fills no 16 bytes
        weight, low = torch.empty(n), torch.empty(n, dtype=BF16)
        for copies, grad in (([low], low), (None, weight)):
            tables = pointwise.AdamWTables([weight], copies, [weight], [weight])
            tables.upload([grad], [(1e-3, 1.0, 1e-4)])
            pointwise.adamw(tables, torch.tensor(1.0), (0.9, 0.95), 1e-8)


def muon():
    for m, n in ((96, 64), (64, 96), (33, 7)):  # the last fills no 16 bytes
        weight = torch.empty(m, n)
        for copy in (weight.to(BF16), weight):
            table, numbers = pointwise.MuonTable([(copy, weight, weight, copy)]), torch.zeros(3)
            table.upload([(copy, weight, weight, copy)])
            for dtype in (BF16, torch.float32):
                step = pointwise.nesterov(table, numbers, numbers[0], dtype)
                pointwise.descend(table, step, numbers, numbers[0])


def fused_ffn():
    kinds = ("lowrank", 128, 0), ("blockdense", 128, 2), ("blockshuffle", 0, 2), ("blockshuffle", 0, 4)
    for kind, rank, nblocks in kinds:
        for act in ("gelu", "relu2"):
            fc1, fc2 = (structured.linear(kind, n, m, rank, nblocks, True) for n, m in ((512, 2048), (2048, 512)))
            x = torch.empty(130, 512, dtype=BF16, requires_grad=True)
            with torch.autocast("cpu", BF16):
                ffn.fused_ffn(x, fc1, fc2, act).float().sum().backward()
    with torch.no_grad(), torch.autocast("cpu", BF16):
        ffn.fused_ffn(x, fc1, fc2, "gelu")


def decode_step():
    for kw in (dict(), dict(pos="absolute", n_kv_head=2), dict(ffn="blockshuffle", nblocks=4, act="relu2"),
               dict(act="swiglu", norm="rmsnorm", ffn="lowrank", rank=16, bias=False)):
        for dtype in (BF16, torch.float32):
            model = make(n_layer=1, **kw).to(dtype)
            decode.step(model, torch.zeros(1, 1, dtype=torch.long), Cache(model.cfg, 1, 64, "cpu", dtype))


def sample():
    zeros = torch.zeros(2, 1, dtype=torch.long)
    for temperature in (0.0, 0.8):
        s = type("Settings", (), dict(temperature=temperature, min_p=0.0))
        decode.sample(torch.empty(2, 32_000, dtype=BF16), s, zeros[:, 0], zeros[:, 0], zeros, zeros, zeros)


def store():
    for size in (64, 128):
        k, cache = torch.empty(8, 4, size, dtype=BF16), torch.empty(3, 4, 16, size, dtype=BF16)
        decode.store(k, k, cache, cache, *torch.zeros(2, 8, dtype=torch.long))


LAUNCHES = {rotate: {"_rotate"}, add_norm: {"_add_norm", "_add_norm_backward"}, token_loss: {"_token_loss"},
            adamw: {"_adamw"}, muon: {"_nesterov", "_descend"}, fused_ffn: {"_matmul"},
            decode_step: {"_linear", "_attention"}, sample: {"_sample"}, store: {"_store"}}


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_triton_kernels_compile(launch, capability, card):
    if launch is fused_ffn and capability < 90:
        pytest.skip("only Hopper runs it")
    compiled = card(capability)
    with torch.set_grad_enabled(launch is fused_ffn):
        launch()
    assert set(compiled) == LAUNCHES[launch]


def test_every_kernel_stands_above():
    sources = [Path(module.__file__).read_text() for module in (decode, ffn, pointwise)]
    launched = {name for source in sources for name in re.findall(r"^ +(_\w+)\[", source, re.M)}
    assert launched == set().union(*LAUNCHES.values())


# ----------------------------------------------------------------------------------------------------------------------
# The CUDA sources

def nvrtc_is_there():
    try:
        return bool(megakernel.compiler())
    except (ImportError, RuntimeError):
        return False


@pytest.mark.skipif(not nvrtc_is_there(), reason="needs cuda-bindings and nvidia-cuda-nvrtc")
@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100"])
@pytest.mark.parametrize("batch, shape", [
    (1, dict(ffn="lowrank", rank=16)), (4, dict(ffn="blockshuffle", nblocks=4, act="swiglu", norm="rmsnorm"))])
def test_the_megakernel_compiles(batch, shape, architecture):
    model = make(n_layer=2, **shape).to(BF16)
    defines = megakernel.constants(model, batch, 132, megakernel.WARPS, megakernel.SLOT)
    assert b"decode_step" in megakernel.compile_source(megakernel.source(defines), architecture)


@pytest.mark.skipif(not nvrtc_is_there(), reason="needs cuda-bindings and nvidia-cuda-nvrtc")
@pytest.mark.parametrize("batch, shape", [
    (5, dict(ffn="lowrank", rank=64)), (64, dict(ffn="blockshuffle", nblocks=4, act="swiglu", norm="rmsnorm")),
    (64, dict(ffn="lowrank", rank=64, n_head=16, attn_dim=1024)), (13, dict(n_head=16, attn_dim=1024))])
@torch.no_grad()
def test_the_chain_compiles(batch, shape, monkeypatch):
    monkeypatch.setattr(chain, "tensor_map", lambda matrix, rows: bytes(128))  # which needs a card
    model = make(**{"n_layer": 2, **shape}).to(BF16)
    step = chain.Step(model, Cache(model.cfg, batch, 64, "cpu", BF16), 132)
    for kernel in {step.first, *(kernel for kernel, _ in step.kernels)}:
        text = megakernel.source(kernel.defines, "chain.cu")
        assert kernel.name.encode() in megakernel.compile_source(text, "sm_90a")
