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
    """A cluster of `split` thread blocks of `warps` warps computes 16 `tiles` rows."""
    tiles: int
    split: int
    warps: int


def shared_bytes(stage, tiles, tokens):
    """As sizeof(Shared) in chain.cu, about."""
    pairs = tiles.tiles * tokens // 8
    area = max(-(-stage.K // (32 * tiles.split * tiles.warps)) * tiles.tiles * 2, pairs)
    return 512 * (tiles.warps * area + (pairs + 8 if tiles.split > 1 else 0)) + 128 * tiles.tiles + 8 * tokens + 16


def possible(stage, tiles, tokens):
    """Whether chain.cu can compute a stage so: whole tiles, and sums that fit into the registers."""
    return (stage.rows % 16 == 0 and stage.K % (32 * tiles.split) == 0 and tiles.tiles <= stage.rows // 16
            and tiles.tiles * tokens <= 256 and tiles.tiles <= 2 * tiles.warps
            and shared_bytes(stage, tiles, tokens) <= SHARED)


def plan(stage, tokens, multiprocessors):
    """The `Tiles` of a stage, or None: about a thread block for each multiprocessor."""
    rows = stage.blocks * stage.rows // 16
    for split in (1, 2, 4, 8):
        tiles = max(1, -(-rows * split // multiprocessors))
        warps = min(8, max(1, stage.K // (32 * split)))
        if (tiles > 1 or rows * split >= multiprocessors // 3) and possible(stage, Tiles(tiles, split, warps), tokens):
            return Tiles(tiles, split, warps)
    small = (Tiles(1, split, min(8, max(1, stage.K // (32 * split)))) for split in (1, 2, 4, 8))
    return next((t for t in small if possible(stage, t, tokens) and shared_bytes(stage, t, tokens) <= SHARED // 3), None)


class Kernel(NamedTuple):
    defines: str
    name: str
    grid: int
    cluster: int
    threads: int


def define(**values):
    return "".join(f"#define {name} {value}\n" for name, value in values.items())


def linear_kernel(stage, tiles, tokens, norm="NO_NORM", act="NONE", bias=False, residual=False):
    values = dict(LINEAR=1, TOKENS=tokens, ROWS=stage.rows, K=stage.K, BLOCKS=stage.blocks, SPREAD=stage.spread,
                  TILES=tiles.tiles, SPLIT=tiles.split, WARPS=tiles.warps, NORM=norm, ACT=act, BIAS=int(bias),
                  RESIDUAL=int(residual))
    grid = stage.blocks * -(-stage.rows // (16 * tiles.tiles)) * tiles.split
    return Kernel(define(**values), "linear", grid, tiles.split, 32 * tiles.warps)


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
    _fields_ = [(name, ctypes.c_void_p) for name in "x w bias gain residual of_norm moments y scaled new_moments".split()]
    _fields_ += [("eps", ctypes.c_float)]


class Attention(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in "qkv cos sin position k v y".split()]


class Embed(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in "token position wte wpe gain x scaled moments".split()]


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


def of_norm(stage, norm, bias):
    """(2, all rows) in float32, by place: W gain, and W shift + bias."""
    shift = getattr(norm, "bias", None)
    vectors = torch.stack([norm.weight, torch.zeros_like(norm.weight) if shift is None else shift]).double()
    vectors = vectors.view(2, stage.blocks, stage.K).permute(1, 2, 0)                              # (blocks, K, 2)
    rows = stage.weights.view(stage.blocks, stage.rows, stage.K).split(1024, dim=1)                # in parts: less memory
    products = torch.cat([w.double() @ vectors for w in rows], dim=1)                              # (blocks, rows, 2)
    both = products.view(-1, stage.spread, 2).transpose(0, 1).reshape(-1, 2).T.contiguous()
    if bias is not None:
        both[1] += bias
    return both.float()


class Step:
    """model.step for one token of each of 5 to 64 sequences: step(tokens (B, 1), cache) -> logits (B, vocab_size)."""

    def __init__(self, model, cache, multiprocessors=0, plans=plan, launch=launch, own_head=True):
        cfg, weight = model.cfg, model.head.weight
        self.model, self.cache, self.device, self.launch = model, cache, weight.device, launch
        self.batch = len(cache.position)
        self.tokens = tokens = -(-self.batch // 8) * 8
        self.sms = multiprocessors or torch.cuda.get_device_properties(self.device).multi_processor_count
        self.plans, self.kernels, self.vectors = plans, [], []
        self.norm = "LAYER_NORM" if cfg.norm == "layernorm" else "RMS_NORM"
        layers = linears(model, self.batch)

        def buffer(width, dtype=weight.dtype):
            return torch.zeros(tokens, width, device=self.device, dtype=dtype)

        rank = max([16] + [s.blocks * s.rows for layer in layers for m in layer for s in stages(m)[:-1]])
        self.x, self.scaled, self.qkv = *(buffer(cfg.n_embd) for _ in range(2)), buffer(layers[0][0].out_features)
        self.attended, self.hidden, self.rank = buffer(cfg.attn_dim), buffer(cfg.ffn_dim), buffer(rank)
        self.moments, self.logits = buffer(cfg.n_embd // 8, torch.float32), buffer(cfg.vocab_size)
        self.first = embed_kernel(cfg, self.batch, tokens)
        pairs = self.batch * cfg.n_kv_head
        split = max(s for s in (1, 2, 4, 8) if s == 1 or s * pairs <= self.sms)
        group = cfg.n_head // cfg.n_kv_head
        attention = attention_kernel(cfg, self.batch, cache.length, split, passes=8 if group <= 2 else 4)
        norms = [n for block in model.blocks for n in (block.norm1, block.norm2)] + [model.norm]
        for i, (block, (k, v), (qkv, proj, fc1, fc2)) in enumerate(zip(model.blocks, cache.layers, layers)):
            self.add(qkv, self.scaled, self.qkv, block.norm1)
            self.kernels.append((attention, pointers(Attention, self.qkv, model.cos, model.sin, cache.position, k, v,
                                                     self.attended)))
            self.add(proj, self.attended, self.x, following=block.norm2)
            self.add(fc1, self.scaled, self.hidden, block.norm2, act=cfg.act)
            self.add(fc2, self.hidden, self.x, following=norms[2 * i + 2])
        if own_head:
            self.add(model.head, self.scaled, self.logits, norm=model.norm)
        self.own_head = own_head

    def add(self, linear, x, y, norm=None, act="", following=None):
        """The kernels of y = act(linear(norm(x))), or with the norm that follows y += linear(x)."""
        parts = stages(linear)
        for i, stage in enumerate(parts):
            last, kind = i == len(parts) - 1, self.norm if norm is not None and i == 0 else "NO_NORM"
            bias, add = linear.bias if last else None, following is not None and last
            kernel = linear_kernel(stage, self.plans(stage, self.tokens, self.sms), self.tokens, kind,
                                   act.upper() or "NONE" if last else "NONE", bias is not None, add)
            vectors = of_norm(stage, norm, bias) if kind != "NO_NORM" else None
            self.vectors.append(vectors)
            to = y if last else self.rank
            self.kernels.append((kernel, pointers(
                Linear, x, stage.weights, bias, following.weight if add else None, y if add else None, vectors,
                self.moments, to, self.scaled, self.moments, eps=self.model.norm.eps)))
            x = to

    def __call__(self, tokens, cache):
        assert cache is self.cache and tokens.is_contiguous()
        model = self.model
        wpe = None if model.wpe is None else model.wpe.weight
        self.launch(self.first, pointers(Embed, tokens, cache.position, model.wte.weight, wpe,
                                         model.blocks[0].norm1.weight, self.x, self.scaled, self.moments), self.device)
        for kernel, arguments in self.kernels:
            self.launch(kernel, arguments, self.device)
        cache.advance(1)
        if self.own_head:
            return self.logits[:self.batch]
        from ops.decode import add_norm
        return model.head(add_norm(self.x[:self.batch], None, model.norm)[1])
