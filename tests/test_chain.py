"""ops/chain: its kernels, one after the other, are model.step. Without CUDA they run on the CPU (emulate.h)."""
import copy
import ctypes
import re
import shutil
import struct
import subprocess

import pytest
import torch

import config
import ops
from config import Config
from conftest import ROOT
from decode import Decoder, Row
from device import record_graph
from merge import prepare_model
from model import GPT, Cache
from ops import megakernel
from ops.megakernel import Stage
from test_decode import MODELS, make, prompts_of, settings

chain = pytest.importorskip("ops.chain")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ON_HOPPER = ON_GPU and torch.cuda.get_device_capability()[0] == 9 and megakernel.bindings()
HOPPER = pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper card and cuda-bindings")
pytestmark = pytest.mark.skipif(not ON_HOPPER if ON_GPU else not shutil.which("g++"),
                                reason="needs a Hopper card and cuda-bindings, or none and g++")
BF16 = torch.bfloat16

KERNEL = """
namespace n{i} {{
#define {kernel.name} kernel_{i}
#define needed_bytes needed_{i}
{source}
#undef {kernel.name}
#undef needed_bytes
{undefined}
void run() {{ kernel_{i}(*(Arguments*)arguments_of_step); }}
const int needed = {needed};
}}
"""
ENTRIES = """
static int number;
void (*const kernels[])() = {{{runs}}};
extern "C" const int needed[] = {{{needed}}};
void enter() {{ kernels[number](); current->done = true; }}
extern "C" void start(int i, int grid, int threads, int cluster, int consumers, void* arguments) {{
    number = i, cluster_size = cluster;
    launch(grid, threads, needed[i], consumers, 1, arguments);
}}
"""
emulated = {}  # {kernel: (a library, its number there)}


def build(kernels, folder):
    """Compiles kernels for the CPU, all in one file: most of the time goes to the headers."""
    kernels = [kernel for kernel in kernels if kernel not in emulated]
    parts = ['#include "emulate.h"\n']
    for i, kernel in enumerate(kernels):
        undefined = "\n".join(f"#undef {name}" for name in re.findall(r"#define (\w+)", kernel.defines))
        parts.append(KERNEL.format(i=i, kernel=kernel, source=megakernel.source(kernel.defines, "chain.cu"),
                                   undefined=undefined, needed=0 if kernel.name == "embed" else f"needed_{i}"))
    parts.append(ENTRIES.format(runs=", ".join(f"n{i}::run" for i in range(len(kernels))),
                                needed=", ".join(f"n{i}::needed" for i in range(len(kernels)))))
    (folder / "kernels.cpp").write_text("".join(parts))
    flags = "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{ROOT}/tests"
    subprocess.run(["g++", *flags, "-o", folder / "kernels.so", folder / "kernels.cpp"], check=True)
    library = ctypes.CDLL(folder / "kernels.so")
    emulated.update({kernel: (library, i) for i, kernel in enumerate(kernels)})


def launch(kernel, arguments, device):
    if ON_GPU:
        return chain.launch(kernel, arguments, device)
    library, i = emulated[kernel]
    consumers = kernel.threads - 64 * ("WIDE" in kernel.defines) - 32 * ("RING" in kernel.defines)
    library.start(i, kernel.grid, kernel.threads, kernel.cluster, consumers, ctypes.byref(arguments))


@pytest.fixture(autouse=True)
def tensor_map(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(chain, "tensor_map", lambda matrix, rows: struct.pack(
            "Pqqq96x", matrix.data_ptr(), *matrix.shape, rows))


# ----------------------------------------------------------------------------------------------------------------------
# One kernel

LINEARS = [  # rows, K, blocks, spread, tiles, split, warps, tokens, norm, act, adds
    (96, 128, 1, 96, 3, 1, 2, 16, "LAYER_NORM", "NONE", False), (96, 128, 1, 96, 4, 2, 2, 8, "RMS_NORM", "GELU", False),
    (64, 256, 2, 2, 2, 4, 2, 24, "LAYER_NORM", "RELU2", False), (64, 96, 2, 64, 3, 1, 2, 8, "NO_NORM", "NONE", True),
    (48, 256, 2, 96, 1, 8, 1, 40, "NO_NORM", "NONE", True), (64, 128, 2, 64, 1, 2, 2, 8, "LAYER_NORM", "SWIGLU", False),
    (32, 512, 1, 32, 2, 4, 4, 64, "NO_NORM", "NONE", True), (64, 128, 1, 64, 2, 2, 2, 16, "LAYER_NORM", "NONE", False)]
WIDE = [  # the same, with stages of weights and of x instead of warps
    (128, 256, 1, 128, 8, 1, (2, 3), 64, "LAYER_NORM", "NONE", False),
    (64, 512, 1, 64, 4, 4, (2, 2), 64, "NO_NORM", "NONE", True),
    (64, 512, 1, 64, 4, 8, (1, 1), 24, "NO_NORM", "NONE", True),
    (128, 384, 2, 2, 8, 2, (2, 2), 40, "LAYER_NORM", "RELU2", False),
    (64, 128, 2, 128, 4, 1, (2, 2), 32, "RMS_NORM", "GELU", False),
    (64, 256, 1, 64, 4, 2, (2, 2), 48, "LAYER_NORM", "NONE", False),
    (128, 128, 1, 128, 4, 2, (1, 1), 56, "LAYER_NORM", "SWIGLU", False)]
LINEARS += WIDE


def linear_of(rows, K, blocks, spread, tiles, split, warps, tokens, norm, act, adds, w=None):
    stage = Stage(w, rows, K, blocks, spread)
    tiles = chain.Wide(tiles, split, *warps) if isinstance(warps, tuple) else chain.Tiles(tiles, split, warps)
    return stage, tiles, chain.linear_kernel(stage, tiles, tokens, norm, act, True, adds)


@pytest.fixture(scope="module")
def linears(tmp_path_factory):
    if not ON_GPU:
        build([linear_of(*case)[2] for case in LINEARS], tmp_path_factory.mktemp("linears"))


@pytest.mark.parametrize("rows, K, blocks, spread, tiles, split, warps, tokens, norm, act, adds", LINEARS)
@torch.no_grad()
def test_linear(linears, rows, K, blocks, spread, tiles, split, warps, tokens, norm, act, adds):
    torch.manual_seed(1)
    x, w = (torch.randn(*n, device=DEVICE).bfloat16() for n in ((tokens, blocks * K), (blocks, rows, K)))
    bias, gain, shift, after = (1 + 0.3 * torch.randn(4, max(blocks * K, blocks * rows), device=DEVICE)).bfloat16()
    stage, how, kernel = linear_of(rows, K, blocks, spread, tiles, split, warps, tokens, norm, act, adds, w)
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
    tensors = read, w, bias, after if adds else None, out if adds else None, vectors, moments, out, scaled, new
    arguments = chain.linear_arguments(stage, how, act, tensors, 1e-5)
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


@pytest.mark.skipif(ON_GPU, reason="the CPU's compiler says")
@pytest.mark.parametrize("case", LINEARS)
def test_shared_memory_is_what_the_plan_counts(linears, case):
    stage, how, kernel = linear_of(*case)
    library, i = emulated[kernel]
    assert chain.shared_bytes(stage, how, case[7]) == (ctypes.c_int * len(LINEARS)).in_dll(library, "needed")[i]
    assert chain.possible(stage, how, case[7])


ATTENTIONS = [  # heads, key heads, rows, and as attention_kernel or ring_kernel takes them, by length: the last of each
    (4, 4, 40, chain.attention_kernel, (1, 1, 2, 2, 1)), (2, 1, 13, chain.attention_kernel, (2, 2, 1, 2, 1)),
    (2, 2, 5, chain.attention_kernel, (1, 2, 2, 3, 0)), (2, 2, 9, chain.attention_kernel, (2, 1, 4, 1, 0)),
    (4, 4, 40, chain.ring_kernel, (21, 2, 2, 32, 1)), (2, 1, 17, chain.ring_kernel, (7, 2, 3, 32, 0))]


def attention_of(heads, kv, rows, maker, how):
    cfg = Config(n_embd=heads * 32, n_head=heads, n_kv_head=kv, pos="absolute", vocab_size=256)
    config.check(cfg)
    return maker(cfg, rows, *how)


@pytest.fixture(scope="module")
def attentions(tmp_path_factory):
    if not ON_GPU:
        build([attention_of(*case) for case in ATTENTIONS], tmp_path_factory.mktemp("attentions"))


@pytest.mark.parametrize("heads, kv, rows, maker, how", ATTENTIONS)
@torch.no_grad()
def test_attention(attentions, heads, kv, rows, maker, how):
    """Of empty rows, of one place, of several rounds of loads, of equal length: softmax(q k^T / sqrt(D)) v, and k and v
    of the new token at their place."""
    torch.manual_seed(1)
    length, D = 96, 32
    qkv = torch.randn(rows, heads + 2 * kv, D, device=DEVICE).bfloat16()
    keys, values = torch.randn(2, rows, kv, length, D, device=DEVICE).bfloat16()
    position = torch.tensor([(33, 1, 70, 0, 1, 8, 95, 64, 17)[i * 4 % 9] for i in range(rows)], device=DEVICE)
    q, k, v = qkv.split([heads, kv, kv], dim=1)
    filled = [t.clone() for t in (keys, values)]
    for t, new in zip(filled, (k, v)):
        t[torch.arange(rows, device=DEVICE), :, position] = new
    every = [t.double().repeat_interleave(heads // kv, dim=1) for t in filled]  # (rows, heads, length, D)
    scores = torch.einsum("rhd,rhld->rhl", q.double(), every[0]) / D ** 0.5
    scores[(torch.arange(length, device=DEVICE) > position[:, None, None]).expand_as(scores)] = -torch.inf
    expected = torch.einsum("rhl,rhld->rhd", scores.softmax(-1), every[1])
    for t in (keys, values):  # what no step wrote
        t[(torch.arange(length, device=DEVICE) >= position[:, None])[:, None].expand(-1, kv, -1)] = torch.nan
    y = torch.full((rows, heads, D), torch.nan, device=DEVICE, dtype=BF16)
    arguments = chain.pointers(chain.Attention, qkv, None, None, position, keys, values, y, length=length)
    launch(attention_of(heads, kv, rows, maker, how), arguments, torch.device(DEVICE))
    torch.testing.assert_close(y.double(), expected, atol=0.01, rtol=0.01)
    for t, full in zip((keys, values), filled):
        there = (torch.arange(length, device=DEVICE) <= position[:, None])[:, None].expand(-1, kv, -1)
        assert torch.equal(t[there], full[there]) and t[~there].isnan().all()


# ----------------------------------------------------------------------------------------------------------------------
# The step

def pair(batch, length=64, **shape):
    """(model in float32 whose weights bf16 holds, the same in bf16, a cache for each)"""
    model = make(DEVICE, length, **{"n_layer": 2, **shape})
    for block in model.blocks:
        block.attn.qkv.weight *= 3  # sharp attention: parts weigh unequally
    for p in model.parameters():
        p.copy_(p.bfloat16())
    low = copy.deepcopy(model).bfloat16()
    low.cos, low.sin = model.cos, model.sin
    return model, low, *(Cache(model.cfg, batch, length, DEVICE, m.head.weight.dtype) for m in (model, low))


def make_step(model, cache, folder, monkeypatch, attention):
    """On CUDA as it is used; on a CPU with few warps, wgmma from 9 sequences on, and attention's (maker, how)."""
    if ON_GPU:
        step = ops.fused_step(model, cache)
        assert isinstance(step, chain.Step)
        return step
    maker, how = attention
    monkeypatch.setattr(chain, "attention_for", lambda cfg, batch, *_: maker(cfg, batch, *how))
    monkeypatch.setattr(chain, "MMA", 8)
    step = chain.Step(model, cache, 8, launch=launch)
    build({step.first, *(kernel for kernel, _ in step.kernels)}, folder)
    return step


def compare(step, tokens, model, expected, cache):
    reference, ours = model.step(tokens, expected), step(tokens, cache).float()
    pairs = [(ours, reference), *((low_part.float(), part) for low_layer, layer in zip(cache.layers, expected.layers)
                                  for low_part, part in zip(low_layer, layer))]
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=0.03 * b.abs().max().item(), rtol=0)
    torch.testing.assert_close(cache.position, expected.position)
    torch.testing.assert_close(cache.newest, expected.newest)


SHAPES = {**MODELS, "many heads": dict(ffn="lowrank", rank=64, n_head=16, attn_dim=512)}
EMULATED = {("lowrank swiglu", 5, 64): (chain.attention_kernel, (2, 1, 2)),
            ("lowrank swiglu", 6, 64): (chain.attention_kernel, (1, 1, 1, 2, 1)),
            ("absolute, grouped", 8, 64): (chain.ring_kernel, (5, 2, 3, 32, 0)),
            ("blockshuffle, one key head", 9, 64): (chain.ring_kernel, (5, 2, 3, 32, 1)),
            ("lowrank swiglu", 10, 64): (chain.ring_kernel, (3, 2, 3, 32, 1))}
ON_CARD = [("dense", 5, 64), ("dense", 64, 1024), ("blockdense", 17, 64), ("wide attention", 33, 256),
           ("blockdense", 64, 512), ("blockshuffle, one key head", 50, 1024), ("absolute, grouped", 24, 512),
           ("many heads", 64, 256), ("many heads", 64, 512), ("many heads", 13, 512),
           ("many heads", 13, 256), ("many heads", 9, 1024)]


@pytest.mark.parametrize("name, batch, length", [*EMULATED] + [pytest.param(*case, marks=HOPPER) for case in ON_CARD])
@torch.no_grad()
def test_is_the_step(name, batch, length, tmp_path, monkeypatch):
    """Rows of different lengths; then one that ends and whose place is taken by a copy of another, and an empty one."""
    larger = dict(rank=64, attn_dim={"wide attention": 256, "many heads": 512}.get(name, 128))
    shape = {**SHAPES[name], **{key: value for key, value in larger.items() if key in SHAPES[name]}, "vocab_size": 256}
    model, low, expected, cache = pair(batch, length, **shape)
    step = make_step(low, cache, tmp_path, monkeypatch, EMULATED.get((name, batch, length)))
    tokens = torch.randint(256, (batch, length), device=DEVICE)
    lengths = (length - 20 - 3 * torch.arange(batch, device=DEVICE)).clamp(min=1)
    for m, c in ((model, expected), (low, cache)):
        m.step(tokens[:, :length - 20], c, lengths)
    compare(step, tokens[:, :1].contiguous(), model, expected, cache)
    for c in (expected, cache):
        c.position[0], c.position[1] = 9, 0
        for k, v in c.layers:
            k[0], v[0] = k[-1], v[-1]
    compare(step, tokens[:, 1:2].contiguous(), model, expected, cache)


def meta(**shape):
    cfg = Config(**{**dict(n_layer=2, n_embd=2048, n_head=16, vocab_size=256), **shape})
    config.check(cfg)
    with torch.device("meta"):
        return GPT(cfg).to(shape.pop("dtype", BF16))


def test_what_fits():
    """The paper's sizes and structures have a plan. Parts that the kernels lack, heads and widths of other sizes, and
    float32 have none."""
    kinds = (dict(), dict(ffn="lowrank", rank=512), dict(ffn="blockshuffle", nblocks=2),
             dict(ffn="blockdense", rank=1024, nblocks=2), dict(ffn="lowrank", rank=512, n_kv_head=2, act="swiglu"))
    for shape in (dict(), dict(n_embd=1024), dict(n_embd=1536, n_head=12), dict(n_embd=1536, n_head=12, ffn_dim=7424)):
        for batch, fit in ((4, False), (5, True), (33, True), (64, True), (65, False)):
            assert all(chain.fits(meta(**{**shape, **kind}), batch, 132) is fit for kind in kinds)
    narrow = meta(n_embd=576, n_head=9, n_kv_head=3, ffn_dim=1536, ffn="lowrank", rank=224, act="swiglu")
    assert chain.fits(narrow, 8, 132)  # where the rule's split divides no K, a smaller one does
    assert not chain.fits(meta(**kinds[1]).float(), 8, 132)
    for other in (dict(qk_norm=1.2), dict(post_norm=0.3), dict(n_head=32, attn_dim=1536),
                  dict(n_embd=2056, n_head=8, attn_dim=512)):
        assert not chain.fits(meta(**other), 8, 132), other
    for (rows, K, tokens), how in chain.TUNED.items():
        assert chain.possible(Stage(None, rows, K, 1, rows), how, tokens)


@pytest.mark.parametrize("kind", [dict(), dict(rank=512, ffn="lowrank"), dict(ffn="blockshuffle", nblocks=2)])
def test_from_33_sequences_on_products_are_wide(kind):
    """By the rule; what was measured goes before it, for 33 to 64 sequences alike. Each fits into shared memory."""
    for width, heads in ((2048, 16), (1536, 12)):
        every = [s for layer in megakernel.linears(meta(n_embd=width, n_head=heads, **kind), 64)
                 for linear in layer for s in chain.stages(linear)]
        for tokens in (24, 32, 40, 64):
            for stage in every:
                how, key = chain.plan(stage, tokens, 132), (stage.rows, stage.K, 64 if tokens > 32 else tokens)
                assert chain.possible(stage, how, tokens)
                if stage.blocks == 1 and key in chain.TUNED:
                    assert how == chain.TUNED[key]
                else:
                    assert isinstance(how, chain.Wide) == (tokens > 32)


def test_attention_has_rings_where_rows_are_many():
    """Many queries a key have more warps, so that registers hold their outputs."""
    for cfg, warps in ((meta().cfg, 2), (meta(n_head=64, n_kv_head=16).cfg, 4)):
        for batch, rings in ((32, False), (33, True), (64, True)):
            kernel = chain.attention_for(cfg, batch, 132, 511)
            assert ("RING" in kernel.defines) is rings
            assert kernel.grid == (528 if rings else 16 * batch)
            assert not rings or kernel.threads == 32 * warps + 32


def constants(cfg, batch, length):
    kernel = chain.attention_for(cfg, batch, 132, length)
    return {name: int(value) for name, value in re.findall(r"#define (\w+) (\d+)\n", kernel.defines)}, kernel


def test_rows_of_a_long_cache_are_dealt_out_by_length():
    """From more pairs of a row and a head on than two a multiprocessor; not where many queries share a key."""
    for batch, rings in ((8, False), (16, False), (17, True), (64, True)):
        found, kernel = constants(meta().cfg, batch, 512)
        assert ("RING" in found) is rings and kernel.grid == (264 if rings else 16 * batch)
        assert not rings or (found["BY_LENGTH"], found["PLACES"], kernel.threads) == (1, 32, 288)
    few_keys = meta(n_head=64, n_kv_head=16).cfg
    assert chain.attention_for(few_keys, 64, 132, 512) == chain.attention_for(few_keys, 64, 132, 256)


def test_attention_has_two_buffers_where_a_multiprocessor_has_two_pairs():
    """With long rows first in a long cache; not where queries share a key, whose registers do not hold it."""
    for batch, buffers in ((5, 1), (8, 1), (9, 2), (16, 2), (17, 1), (32, 1)):
        for length in (256, 511, 512, 1024):
            found, kernel = constants(meta().cfg, batch, length)
            if "RING" not in found:
                assert (found["DEPTH"], found["PASS"]) == (buffers, 8 // buffers)
                assert found["BY_LENGTH"] == (buffers == 2 and length >= 512)
                assert found["SPLIT"] == 1 and kernel.threads == (256 if batch <= 16 else 128)
    shared = constants(meta(n_head=32, n_kv_head=16).cfg, 16, 512)[0]
    assert (shared["DEPTH"], shared["PASS"], shared["BY_LENGTH"]) == (1, 8, 0)


@pytest.mark.parametrize("kv, batch, short, long", [
    (2, 8, (2, 4), (8, 4)), (4, 8, (2, 4), (4, 4)), (4, 9, (1, 8), (2, 8)), (4, 16, (1, 8), (2, 8)),
    (4, 17, (1, 8), (1, 8)), (4, 32, (1, 8), (1, 8)), (4, 64, (1, 8), (1, 8)), (16, 8, (1, 8), (1, 8))])
def test_clusters_share_what_is_long_or_little(kv, batch, short, long):
    """(thread blocks of a cluster, warps of each) on 132 multiprocessors; 512 places are long."""
    cfg = meta(n_head=64 if kv == 16 else 16, n_kv_head=kv).cfg
    for length, (split, warps) in ((64, short), (511, short), (512, long), (1024, long)):
        found, kernel = constants(cfg, batch, length)
        assert (found["SPLIT"], found["WARPS"], kernel.cluster) == (split, warps, split)
        assert kernel.grid == split * kv * batch and kernel.threads == 32 * warps


@HOPPER
@torch.no_grad()
def test_other_precisions_take_other_kernels():
    for dtype in (torch.float32, torch.float16):
        model = prepare_model(make("cuda", **MODELS["dense"]), "structured", dtype)
        step = ops.fused_step(model, Cache(model.cfg, 8, 64, "cuda", dtype))
        assert step and not isinstance(step, chain.Step)


XL = dict(ffn="lowrank", rank=512, n_embd=2048, n_head=16)  # shapes of TUNED; at 64 rings of two rounds


@HOPPER
@pytest.mark.parametrize("batch, length, kind", [
    (5, 256, dict(ffn="lowrank", rank=256)), (16, 256, dict(ffn="blockshuffle", nblocks=2)), (32, 256, {}),
    (64, 256, dict(ffn="lowrank", rank=256, n_kv_head=2)), (32, 256, XL), (64, 256, XL), (16, 768, XL), (64, 768, XL),
    (16, 256, XL), (64, 256, dict(n_embd=2048, n_head=16))])
@torch.no_grad()
def test_repeats_itself(batch, length, kind):
    """Rows of a long cache are of unequal length."""
    shape = dict(n_embd=1024, n_head=8, n_layer=4, vocab_size=5000)
    model = prepare_model(make("cuda", length, **{**shape, **kind}), "structured", BF16)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.03)
    cache = Cache(model.cfg, batch, length, "cuda", BF16)
    places = 100 + torch.arange(batch, device="cuda") * 7 % batch * (length - 256) // batch
    step = ops.fused_step(model, cache)
    assert isinstance(step, chain.Step)
    cache.every.normal_()
    tokens = torch.randint(5000, (batch, 100), device="cuda")
    model.step(tokens, cache, torch.full((batch,), 100, device="cuda"))
    token, seen, first = tokens[:, :1].contiguous(), [], None
    graph = record_graph(lambda: seen.append(step(token, cache)))
    for i in range(1000):
        cache.position.copy_(places)
        graph.replay()
        first = seen[-1].clone() if first is None else first
        assert torch.equal(seen[-1], first)


@HOPPER
@torch.no_grad()
def test_texts_of_the_decoder_are_those_of_single_steps():
    """In a CUDA graph, with sampling between the steps."""
    model = prepare_model(make("cuda", ffn="lowrank", rank=64), "structured", BF16)
    prompts = prompts_of([1] * 6)
    decoder = Decoder(model, settings(max_new_tokens=30), 6, 64)
    assert isinstance(decoder.forward, chain.Step)
    rows = [Row(prompt) for prompt in prompts]
    for _ in decoder.run(rows):
        pass
    cache, new = Cache(model.cfg, 6, 64, "cuda", BF16), []
    step = ops.fused_step(model, cache)
    token, ids = torch.tensor(prompts, device="cuda"), torch.arange(257, device="cuda")
    for _ in range(30):
        logits = step(token, cache)
        token = ids.where(logits == logits.amax(1, keepdim=True), 257).amin(1, keepdim=True)  # the first of equal ones
        new.append(token)
    assert [row.new for row in rows] == torch.cat(new, 1).tolist()


def test_a_step_whose_logits_are_not_plain_torchs_is_refused():
    """Before a chain is used; rounding passes, and the cache is empty again."""
    model = make(DEVICE, ffn="lowrank", rank=16, n_kv_head=2)
    cache = Cache(model.cfg, 5, 64, model.head.weight.device, torch.float32)

    class Scaled:
        batch, device = 5, model.head.weight.device

        def __init__(self, factor):
            self.model, self.factor = model, factor

        def __call__(self, tokens, cache):
            return self.factor * model.step(tokens, cache)

    chain.compare(Scaled(1.001), cache)
    assert not any(t.any() for t in (cache.position, cache.newest, *(t for layer in cache.layers for t in layer)))
    for factor in (1.1, float("nan")):
        with pytest.raises(RuntimeError, match="differ"):
            chain.compare(Scaled(factor), cache)
