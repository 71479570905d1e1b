"""The host's side of chain.cu, a decoding step of 5 to 64 sequences: its plan and its launches."""
import ctypes
import functools
from typing import NamedTuple

import torch
import torch.nn as nn

from ops import megakernel
from ops.fallback import works
from ops.megakernel import checked, linears
from structured import BlockShuffle, Structured

BATCHES = range(5, 65)
SHARED = 227 * 1024     # bytes of shared memory that a thread block may have
REGISTERS = 128         # of a thread, for its columns of x
WARPS = 8               # of a linear, about


class Stage(NamedTuple):
    """Blocks of rows x K: block b maps columns b K to (b + 1) K. Row j's output goes to place j % spread * (all rows /
    spread) + j // spread."""
    weights: torch.Tensor
    rows: int
    K: int
    blocks: int
    spread: int


def stages(linear):
    """The one or two `Stage`s of a linear."""
    if not isinstance(linear, Structured):
        return [Stage(linear.weight, *linear.weight.shape, 1, len(linear.weight))]
    V, U = linear.V, linear.U
    blocks, q, p = V.shape if V.dim() == 3 else (1, *V.shape)
    if isinstance(linear, BlockShuffle):
        _, s, r = U.shape
        return [Stage(V, q, p, blocks, blocks), Stage(U, s, r, blocks, s)]
    return [Stage(V, q, p, blocks, blocks * q), Stage(U, *U.shape, 1, len(U))]


class Tiles(NamedTuple):
    """A cluster of `split` thread blocks computes 16 `tiles` rows; of each kw x rw warps, kw share columns."""
    tiles: int
    split: int
    kw: int
    rw: int


def candidates(stage, tokens):
    """All `Tiles` that chain.cu can compute a stage with, with what each costs a thread block: (Tiles, bytes of
    weights, bytes of x, registers for x)."""
    for split in (1, 2, 4, 8):
        columns = stage.K // split
        if stage.K % (32 * split):
            continue
        for kw in range(1, 17):
            slice = columns // kw
            registers = slice // 32 * tokens // 2
            if columns % (32 * kw) or slice < 2 * tokens or registers > REGISTERS:
                continue
            rw = max(1, WARPS // kw)
            for tiles in range(1, 65):
                weights = 16 * tiles * (2 * columns + 64)
                if stage.rows % (16 * tiles) == 0 and weights + 4 * columns < SHARED - 2048:
                    yield Tiles(tiles, split, kw, min(rw, tiles)), weights, 2 * tokens * columns, registers


def plan(stage, tokens, multiprocessors):
    """The `Tiles` of a stage, or None: one wave of thread blocks, or many small ones."""
    def cost(candidate):  # about the bytes that pass in the time
        tiles, weights, x, registers = candidate
        blocks = stage.blocks * stage.rows // (16 * tiles.tiles) * tiles.split
        threads = 32 * tiles.kw * tiles.rw
        resident = max(1, min(SHARED // (weights + 4096), 2**16 // (threads * (registers + 64)), 4))
        waves = -(-blocks // multiprocessors)
        if waves > 1:
            waves = max(blocks / multiprocessors * (1.0 if resident > 2 else 1.15 if resident > 1 else 1.5), resident)
        cluster = 20_000 + 3000 * tiles.split if tiles.split > 1 else 0
        return waves * (weights + x * tiles.rw) + cluster + 100 * max(0, registers - 64), abs(threads - 32 * WARPS)
    return min(candidates(stage, tokens), key=cost, default=(None,))[0]


class Kernel(NamedTuple):
    defines: str
    name: str
    grid: int
    cluster: int
    threads: int


def define(**values):
    return "".join(f"#define {name} {value}\n" for name, value in values.items())


def linear_kernel(stage, tiles, tokens, norm="NO_NORM", act="NONE", bias=False, residual=False, moments=False):
    values = dict(LINEAR=1, TOKENS=tokens, ROWS=stage.rows, K=stage.K, BLOCKS=stage.blocks, SPREAD=stage.spread,
                  TILES=tiles.tiles, SPLIT=tiles.split, KW=tiles.kw, RW=tiles.rw, NORM=norm, ACT=act, BIAS=int(bias),
                  RESIDUAL=int(residual), MOMENTS=int(moments))
    grid = stage.blocks * stage.rows // (16 * tiles.tiles) * tiles.split
    return Kernel(define(**values), "linear", grid, tiles.split, 32 * tiles.kw * tiles.rw)


def attention_kernel(cfg, batch, length, split, warps=8, passes=8):
    values = dict(ATTENTION=1, BATCH=batch, HEADS=cfg.n_head, KV=cfg.n_kv_head, D=cfg.attn_dim // cfg.n_head,
                  LENGTH=length, WARPS=warps, PASS=passes, SPLIT=split, ROPE=int(cfg.pos == "rope"),
                  SCALE=f"{(cfg.attn_dim // cfg.n_head) ** -0.5!r}f")
    return Kernel(define(**values), "attention", batch * cfg.n_kv_head * split, split, 32 * warps)


def embed_kernel(cfg, batch, tokens):
    values = dict(EMBED=1, BATCH=batch, WIDTH=cfg.n_embd, THREADS=256, WPE=int(cfg.pos == "absolute"))
    return Kernel(define(**values), "embed", tokens, 1, 256)


class Linear(ctypes.Structure):
    """As Arguments of `linear` in chain.cu."""
    _fields_ = [(name, ctypes.c_void_p) for name in "x w bias gain shift residual moments y new_moments".split()]
    _fields_ += [("eps", ctypes.c_float)]


class Attention(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in "qkv cos sin position k v y".split()]


class Embed(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in "token position wte wpe x moments".split()]


def pointers(kind, *tensors, **others):
    return kind(*(None if t is None else t.data_ptr() for t in tensors), **others)


@functools.cache
def compiled(kernel, device):
    """(the function, its bytes of shared memory)"""
    from cuda.bindings import driver
    code = megakernel.binary(kernel.defines, torch.cuda.get_device_capability(device), "chain.cu")
    module = checked(driver.cuModuleLoadData(code))
    function = checked(driver.cuModuleGetFunction(module, kernel.name.encode()))
    shared = 0
    if kernel.name != "embed":
        value = ctypes.c_int()
        address, _ = checked(driver.cuModuleGetGlobal(module, b"needed_bytes"))
        checked(driver.cuMemcpyDtoH(ctypes.addressof(value), address, 4))
        shared = value.value
        attribute = driver.CUfunction_attribute
        checked(driver.cuFuncSetAttribute(function, attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared))
    # one division of every multiprocessor's memory: else kernels could not overlap
    carveout = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    checked(driver.cuFuncSetAttribute(function, carveout, 100))
    return function, shared


PDL = True


def launch(kernel, arguments, device):
    from cuda.bindings import driver
    function, shared = compiled(kernel, device)
    config, kinds, attributes = driver.CUlaunchConfig(), driver.CUlaunchAttributeID, []
    config.gridDimX, config.gridDimY, config.gridDimZ = kernel.grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
    config.sharedMemBytes, config.hStream = shared, torch.cuda.current_stream(device).cuda_stream
    if kernel.cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dims = attribute.value.clusterDim
        dims.x, dims.y, dims.z = kernel.cluster, 1, 1
        attributes.append(attribute)
    if PDL:
        attribute = driver.CUlaunchAttribute()
        attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    config.attrs, config.numAttrs = attributes, len(attributes)
    address = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(address), 0))


class Step:
    """model.step for one token of each of 5 to 64 sequences: step(tokens (B, 1), cache) -> logits (B, vocab_size)."""

    def __init__(self, model, cache, multiprocessors=0, plans=plan, launch=launch, own_head=True):
        cfg, weight = model.cfg, model.head.weight
        self.model, self.cache, self.device, self.launch = model, cache, weight.device, launch
        self.batch = len(cache.position)
        self.tokens = tokens = -(-self.batch // 8) * 8
        self.sms = multiprocessors or torch.cuda.get_device_properties(self.device).multi_processor_count
        self.plans, self.kernels = plans, []
        self.norm = "LAYER_NORM" if cfg.norm == "layernorm" else "RMS_NORM"
        layers = linears(model, self.batch)

        def buffer(width, dtype=weight.dtype):
            return torch.zeros(tokens, width, device=self.device, dtype=dtype)

        rank = max([16] + [s.blocks * s.rows for layer in layers for m in layer for s in stages(m)[:-1]])
        self.x, self.qkv = buffer(cfg.n_embd), buffer(model.blocks[0].attn.qkv.out_features)
        self.attended, self.hidden, self.rank = buffer(cfg.attn_dim), buffer(cfg.ffn_dim), buffer(rank)
        self.moments, self.logits = buffer(cfg.n_embd // 8, torch.float32), buffer(cfg.vocab_size)
        self.first = embed_kernel(cfg, self.batch, tokens)
        pairs = self.batch * cfg.n_kv_head
        split = max(s for s in (1, 2, 4, 8) if s == 1 or s * pairs <= self.sms)
        group = cfg.n_head // cfg.n_kv_head
        attention = attention_kernel(cfg, self.batch, cache.length, split, passes=8 if group <= 2 else 4)
        for block, (k, v), (qkv, proj, fc1, fc2) in zip(model.blocks, cache.layers, layers):
            self.add(qkv, self.x, self.qkv, norm=block.norm1)
            self.kernels.append((attention, pointers(Attention, self.qkv, model.cos, model.sin, cache.position, k, v,
                                                     self.attended)))
            self.add(proj, self.attended, self.x, residual=True)
            self.add(fc1, self.x, self.hidden, norm=block.norm2, act=cfg.act)
            self.add(fc2, self.hidden, self.x, residual=True)
        if own_head:
            self.add(model.head, self.x, self.logits, norm=model.norm)
        self.own_head = own_head

    def add(self, linear, x, y, norm=None, act="", residual=False):
        parts = stages(linear)
        for i, stage in enumerate(parts):
            last, kind = i == len(parts) - 1, self.norm if norm is not None and i == 0 else "NO_NORM"
            bias, add = linear.bias if last else None, residual and last
            kernel = linear_kernel(stage, self.plans(stage, self.tokens, self.sms), self.tokens, kind,
                                   act.upper() or "NONE" if last else "NONE", bias is not None, add, add)
            gain, shift = (norm.weight, getattr(norm, "bias", None)) if kind != "NO_NORM" else (None, None)
            to = y if last else self.rank
            self.kernels.append((kernel, pointers(Linear, x, stage.weights, bias, gain, shift, y if add else None,
                                                  self.moments, to, self.moments, eps=self.model.norm.eps)))
            x = to

    def __call__(self, tokens, cache):
        assert cache is self.cache and tokens.is_contiguous()
        model = self.model
        wpe = None if model.wpe is None else model.wpe.weight
        self.launch(self.first, pointers(Embed, tokens, cache.position, model.wte.weight, wpe, self.x, self.moments),
                    self.device)
        for kernel, arguments in self.kernels:
            self.launch(kernel, arguments, self.device)
        cache.advance(1)
        if self.own_head:
            return self.logits[:self.batch]
        from ops.decode import add_norm
        return model.head(add_norm(self.x[:self.batch], None, model.norm)[1])
