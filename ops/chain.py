"""The host's side of chain.cu, a decoding step of 5 to 64 sequences: its plan, compilation, launches."""
import ctypes
import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from ops import megakernel
from ops.fallback import works
from ops.megakernel import checked, linears

BATCHES = range(5, 65)
MMA = 32                # tokens up to which plan's rule is one for mma; for more wgmma is faster
LONG = 512              # places of a row, from which on rows of unequal length are the usual case
SHARED = 227 * 1024     # bytes of shared memory that a thread block may have


# ----------------------------------------------------------------------------------------------------------------------
# The plan

def stages(linear):
    """The one or two `Stage`s of a linear."""
    return megakernel.matrices(linear, 0)  # for no sequence is a row too long to stay whole


class Tiles(NamedTuple):
    """A cluster of `split` thread blocks of `warps` warps computes 16 `tiles` rows."""
    tiles: int
    split: int
    warps: int


class Wide(NamedTuple):
    """The same on wgmma: a warp for each of `tiles` tiles, a multiple of 4.

    Shared memory holds `w_stages` tiles of 64 columns of the weights and `x_stages` of x.
    """
    tiles: int
    split: int
    w_stages: int
    x_stages: int


def shared_bytes(stage, how, tokens):
    """sizeof(Shared) in chain.cu."""
    wide, pairs = isinstance(how, Wide), how.tiles * tokens // 8
    received = how.split * -(-pairs // how.split) if how.split > 1 else 1
    common = up(8 + 128 * how.tiles + 8 * tokens, 16) + 512 * received
    if wide:
        stages = 2048 * how.tiles * how.w_stages + 128 * columns(tokens) * how.x_stages
        return up(common + 16 * (how.w_stages + how.x_stages), 1024) + stages
    area = max(-(-stage.K // (32 * how.split * how.warps)) * how.tiles * 2, pairs)
    return up(common, 128) + 512 * how.warps * area


def up(bytes, alignment):
    return -(-bytes // alignment) * alignment


def possible(stage, how, tokens):
    """Whether chain.cu can compute a stage so: whole tiles, sums that fit into registers, stages into shared memory."""
    if isinstance(how, Wide):
        chunks, rest = divmod(stage.K, 64 * how.split)
        tiled = (rest == 0 and stage.rows % (16 * how.tiles) == 0 and how.tiles in (4, 8, 12, 16)
                 and (chunks == 1 or min(how.w_stages, how.x_stages) > 1))
    else:
        tiled = (stage.rows % 16 == 0 and stage.K % (32 * how.split) == 0 and how.tiles <= stage.rows // 16
                 and how.tiles * tokens <= 256 and how.tiles <= 2 * how.warps)
    return tiled and shared_bytes(stage, how, tokens) <= SHARED


# (rows, K, tokens): what a step of config/xl.py on an H200 was faster with than with plan's rule, by 0.5 % and more
TUNED = {
    (6144, 2048, 8): Tiles(3, 2, 8), (8192, 512, 8): Tiles(2, 1, 8), (512, 8192, 8): Tiles(2, 8, 8),
    (2048, 8192, 8): Tiles(1, 4, 8), (2048, 8192, 16): Tiles(1, 4, 8),
    (6144, 2048, 32): Wide(8, 2, 10, 8), (2048, 2048, 32): Wide(4, 8, 4, 4), (8192, 2048, 32): Wide(4, 1, 16, 8),
    (512, 2048, 32): Wide(4, 4, 8, 8), (8192, 512, 32): Wide(4, 1, 8, 4), (512, 8192, 32): Wide(4, 8, 16, 16),
    (2048, 512, 32): Wide(4, 4, 2, 2),
    (6144, 2048, 64): Wide(4, 2, 6, 4), (2048, 2048, 64): Tiles(2, 2, 8), (8192, 2048, 64): Wide(4, 2, 6, 4),
    (2048, 8192, 64): Wide(8, 8, 8, 4), (8192, 512, 64): Wide(4, 2, 4, 4), (512, 8192, 64): Wide(4, 8, 8, 4),
    (2048, 512, 64): Tiles(1, 2, 4)}


def plan(stage, tokens, multiprocessors):
    """The `Tiles` or `Wide` of a stage for a multiple of 8 tokens, or None: what was measured, else by a rule."""
    measured = tokens if tokens <= MMA else columns(tokens)  # the same products for 40 to 64 tokens
    if stage.blocks == 1 and (stage.rows, stage.K, measured) in TUNED:
        return TUNED[stage.rows, stage.K, measured]
    return tokens > MMA and wide_plan(stage, multiprocessors) or mma_plan(stage, tokens, multiprocessors)


def mma_plan(stage, tokens, multiprocessors):
    """The `Tiles` of a stage, or None.

    A thread block for each multiprocessor, or, where rows are few, for each second one: the others load the weights of
    the next kernel meanwhile. It reads K / split columns of x and sends the sums of 16 tiles rows, and tiles grow with
    the split. Both cost the same where split^2 is about K / rows; the factor is measured.
    """
    height = stage.blocks * stage.rows // 16
    best = min(3, max(0, round(math.log2(stage.K * multiprocessors / (600 * height)) / 2))) if height else 0
    thread_blocks = multiprocessors if 2 * height > multiprocessors else multiprocessors // 2
    for split in (1 << i for i in (*range(best, 4), *reversed(range(best)))):  # K has few divisors in a narrow model
        warps = min(8, max(1, stage.K // (32 * split)))
        count = -(-height * split // thread_blocks)
        while count and not possible(stage, Tiles(count, split, warps), tokens):
            count //= 2  # several thread blocks share a multiprocessor then
        if count:
            return Tiles(count, split, warps)
    return None


def wide_plan(stage, multiprocessors):
    """The `Wide` of a stage, or None: 64 rows a cluster, and the split with which most multiprocessors have work."""
    height = stage.blocks * stage.rows // 64
    if stage.rows % 64 or stage.K % 64:
        return None
    split = max(s for s in (1, 2, 4, 8) if s == 1 or height * s <= multiprocessors and stage.K % (64 * s) == 0)
    chunks = stage.K // (64 * split)
    return Wide(4, split, min(chunks, 12), min(chunks, 6))  # at most 162 KiB of shared memory


def attention_plan(cfg, batch, multiprocessors, length):
    """(thread blocks of a cluster, warps of each, places a team loads at once, buffers of as many places).

    Where a multiprocessor has two pairs of a row and a key head, two half buffers are faster: one is loaded while the
    other is attended to. Registers hold that for one query a key. Where pairs are few, a cluster shares each. The more
    warps a cluster has, the longer it takes to start, so short rows have at most two thread blocks of four.
    """
    pairs = batch * cfg.n_kv_head
    if multiprocessors < pairs <= 2 * multiprocessors and cfg.n_head == cfg.n_kv_head:
        return 1, 8, 4, 2
    split = max(s for s in (1, 2, 4, 8) if s == 1 or s * pairs <= multiprocessors)
    warps = 4 if split > 2 or pairs > 2 * multiprocessors else 8
    if length < LONG:
        split = 2 if split > 2 else 1
    return split, warps, at_once(cfg), 1


def at_once(cfg):
    """Places that a team loads at once: registers hold the outputs of a group of query heads too."""
    return 8 if cfg.n_head // cfg.n_kv_head <= 2 else 4


def attention_for(cfg, batch, multiprocessors, length):
    """The kernel of attention, for a cache of `length` places a row.

    With rings four thread blocks a multiprocessor, where there is work for all of them. In a long cache rows differ in
    length. There two thread blocks a multiprocessor share the pairs of a row and a key head evenly, where each has more
    than one. Where each has one and two buffers, long rows come first. More than two queries a key read so little that
    this does not matter.
    """
    pairs, places = batch * cfg.n_kv_head, 4096 // (cfg.attn_dim // cfg.n_head)  # of a tile of 8 KiB
    if length >= LONG and pairs > 2 * multiprocessors and cfg.n_head <= 2 * cfg.n_kv_head:
        return ring_kernel(cfg, batch, 2 * multiprocessors, 8, 3, places, by_length=1)
    if pairs >= 4 * multiprocessors:
        return ring_kernel(cfg, batch, 4 * multiprocessors, 16 // at_once(cfg), 3, places)
    *how, depth = attention_plan(cfg, batch, multiprocessors, length)
    return attention_kernel(cfg, batch, *how, depth, by_length=int(depth > 1 and length >= LONG))


def padded(batch) -> int:
    """Tokens that a step computes: mma has 8 columns."""
    return -(-batch // 8) * 8


def fits(model, batch, multiprocessors) -> bool:
    """Whether the chain can compute this model's steps and is the faster way."""
    cfg, every = model.cfg, [linear for layer in linears(model, batch) for linear in layer]
    return (batch in BATCHES and not cfg.extras and model.head.weight.dtype == torch.bfloat16
            and cfg.attn_dim // cfg.n_head in (32, 64, 128, 256) and cfg.n_head // cfg.n_kv_head <= 8
            and all(plan(stage, padded(batch), multiprocessors) for linear in every for stage in stages(linear)))


def usable(model, batch) -> bool:
    """Whether `Step` is the way to compute this model's steps for `batch` sequences."""
    device = model.head.weight.device
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    card = torch.cuda.get_device_properties(device)  # others than Hopper were not measured
    return card.major == 9 and fits(model, batch, card.multi_processor_count) and megakernel.bindings()


def step_for(model, cache):
    """A `Step` for the sequences of a new cache, or None where it is not usable, does not compile or does not run."""
    if not usable(model, len(cache.position)):
        return None
    step = Step(model, cache)
    kernels = frozenset([step.first, *(kernel for kernel, _ in step.kernels)])

    def trial():
        with ThreadPoolExecutor() as pool:  # a second for each kernel, if none is kept from before
            list(pool.map(lambda kernel: compiled_ahead(kernel, step.device), kernels))
        compare(step, cache)

    return step if works("decoding step of 5 to 64 sequences", trial, kernels, step.device) else None


@torch.no_grad()
def compare(step, cache):
    """RuntimeError unless a step after a short prompt has the logits of plain torch, but for the rounding of bf16.

    The kernels know many shapes, of which few ran on the cards that they were written on.
    """
    model, length = step.model, min(80, cache.length - 1)
    tokens = torch.arange(step.batch * (length + 1), device=step.device) * 7919 % model.cfg.vocab_size
    tokens, found = tokens.view(step.batch, -1), []
    for run in (model.step, step):
        cache.position.zero_()
        model.step(tokens[:, :-1], cache, torch.full_like(cache.position, length))
        found.append(run(tokens[:, -1:].contiguous(), cache).float())
    for t in (cache.position, cache.newest, *(t for layer in cache.layers for t in layer)):
        t.zero_()  # as new
    error, largest = (found[1] - found[0]).abs().max().item(), found[0].abs().max().item()
    if not error <= 0.05 * largest:
        raise RuntimeError(f"its logits differ by {error:.2g} from plain torch's, which go up to {largest:.2g}")


# ----------------------------------------------------------------------------------------------------------------------
# Kernels

class Kernel(NamedTuple):
    defines: str
    name: str
    grid: int
    cluster: int
    threads: int


def define(**values):
    return "".join(f"#define {name} {value}\n" for name, value in values.items())


def linear_kernel(stage, tiles, tokens, norm="NO_NORM", act="NONE", bias=False, residual=False):
    wide = isinstance(tiles, Wide)
    warps = tiles.tiles if wide else tiles.warps
    kind = dict(WIDE=1, N=columns(tokens), W_STAGES=tiles.w_stages, X_STAGES=tiles.x_stages) if wide else dict(LINEAR=1)
    values = dict(kind, TOKENS=tokens, ROWS=stage.rows, K=stage.K, BLOCKS=stage.blocks, SPREAD=stage.spread,
                  TILES=tiles.tiles, SPLIT=tiles.split, WARPS=warps, NORM=norm, ACT=act, BIAS=int(bias),
                  RESIDUAL=int(residual))
    grid = stage.blocks * -(-stage.rows // (16 * tiles.tiles)) * tiles.split
    return Kernel(define(**values), "linear", grid, tiles.split,
                  32 * (warps + wide * (2 if norm == "NO_NORM" else 6)))


def columns(tokens):
    """Tokens of a product by wgmma: those beyond the last are zero."""
    return 32 if tokens <= 32 else 64


def tensor_map(matrix, rows):
    """The descriptor of a row-major matrix in bf16, of which tiles of `rows` rows and 64 columns are copied."""
    from cuda.bindings import driver as d
    kinds = d.CUtensorMapDataType, d.CUtensorMapInterleave, d.CUtensorMapSwizzle, d.CUtensorMapL2promotion
    height, width = matrix.shape
    made = checked(d.cuTensorMapEncodeTiled(
        kinds[0].CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, matrix.data_ptr(),
        [d.cuuint64_t(width), d.cuuint64_t(height)], [d.cuuint64_t(2 * matrix.stride(0))],
        [d.cuuint32_t(64), d.cuuint32_t(rows)], [d.cuuint32_t(1), d.cuuint32_t(1)],
        kinds[1].CU_TENSOR_MAP_INTERLEAVE_NONE, kinds[2].CU_TENSOR_MAP_SWIZZLE_128B,
        kinds[3].CU_TENSOR_MAP_L2_PROMOTION_L2_256B, d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))
    return ctypes.string_at(made.getPtr(), 128)


def maps(stage, tiles, act, x):
    """The descriptors of a stage's weights (blocks * rows, K) and input (tokens, blocks * K)."""
    rows, width = 8 if act == "SWIGLU" else 16 * tiles.tiles, stage.blocks * stage.K
    weights = stage.weights.view(stage.blocks * stage.rows, stage.K)
    x = x.view(-1)[:len(x) * width].view(-1, width)  # (tokens, blocks * K); a buffer may be wider
    return tensor_map(weights, rows), tensor_map(x, columns(len(x)))


def linear_arguments(stage, tiles, act, tensors, eps):
    """tensors: as the fields of `Linear`, x first."""
    kind = Linear
    if isinstance(tiles, Wide):
        kind = functools.partial(WideLinear, *map(DESCRIPTOR.from_buffer_copy, maps(stage, tiles, act, tensors[0])))
    return pointers(kind, *tensors, eps=eps)


def define_attention(cfg, units, warps, passes, by_length, **others):
    """The constants of both kernels of attention, for `units` pairs of a row and a key head, and others."""
    D = cfg.attn_dim // cfg.n_head
    return define(ATTENTION=1, HEADS=cfg.n_head, KV=cfg.n_kv_head, D=D, WARPS=warps, PASS=passes, UNITS=units,
                  BY_LENGTH=by_length, ROPE=int(cfg.pos == "rope"), SCALE=f"{D ** -0.5!r}f", **others)


def attention_kernel(cfg, batch, split, warps, passes, depth=1, by_length=0):
    units = batch * cfg.n_kv_head
    defines = define_attention(cfg, units, warps, passes, by_length, SPLIT=split, DEPTH=depth)
    return Kernel(defines, "attention", units * split, split, 32 * warps)


def ring_kernel(cfg, batch, grid, warps, stages, places, by_length=0):
    """At most `grid` thread blocks; rings of `stages` tiles of `places` places of keys and as many of values."""
    units = batch * cfg.n_kv_head
    grid, passes = min(grid, units), places * (cfg.attn_dim // cfg.n_head) // (256 * warps)
    defines = define_attention(cfg, units, warps, passes, by_length, RING=1, SPLIT=1, GRID=grid, STAGES=stages,
                               PLACES=places)
    return Kernel(defines, "attention", grid, 1, 32 * warps + 32)


def embed_kernel(cfg, batch):
    values = dict(EMBED=1, BATCH=batch, WIDTH=cfg.n_embd, THREADS=256, WPE=int(cfg.pos == "absolute"))
    return Kernel(define(**values), "embed", padded(batch), 1, 256)


# Arguments of each, as in chain.cu

class Linear(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x w bias gain residual of_norm moments y scaled "
                                                     "new_moments").split()]
    _fields_ += [("eps", ctypes.c_float)]


DESCRIPTOR = ctypes.c_ubyte * 128


class WideLinear(ctypes.Structure):
    _fields_ = [("of_w", DESCRIPTOR), ("of_x", DESCRIPTOR), *Linear._fields_,
                ("padding", ctypes.c_ubyte * 64)]  # descriptors are aligned to 64 bytes, and so is the size


class Attention(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in "qkv cos sin position k v y".split()]
    _fields_ += [("length", ctypes.c_longlong)]


class Embed(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in "token position wte wpe gain x scaled moments".split()]


def pointers(kind, *tensors, **others):
    return kind(*(None if t is None else t.data_ptr() for t in tensors), **others)


# ----------------------------------------------------------------------------------------------------------------------
# Compilation and launch, through NVIDIA's own Python bindings

def compiled_ahead(kernel, device) -> bytes:
    return megakernel.binary(kernel.defines, torch.cuda.get_device_capability(device), "chain.cu")


@functools.cache
def compiled(kernel, device):
    """(the function, its bytes of shared memory)"""
    from cuda.bindings import driver
    module = checked(driver.cuModuleLoadData(compiled_ahead(kernel, device)))
    function = checked(driver.cuModuleGetFunction(module, kernel.name.encode()))
    shared, attributes = ctypes.c_int(), driver.CUfunction_attribute
    if kernel.name != "embed":
        address, _ = checked(driver.cuModuleGetGlobal(module, b"needed_bytes"))
        checked(driver.cuMemcpyDtoH(ctypes.addressof(shared), address, 4))
        largest = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(function, largest, shared.value))
    # the same division of a multiprocessor's memory for all kernels: else they could not overlap
    checked(driver.cuFuncSetAttribute(function, attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100))
    return function, shared.value


def launch(kernel, arguments, device):
    """With programmatic dependent launch, and in clusters where the kernel has them."""
    from cuda.bindings import driver
    kinds = driver.CUlaunchAttributeID
    overlap = driver.CUlaunchAttribute()
    overlap.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    overlap.value.programmaticStreamSerializationAllowed = 1
    attributes = [overlap]
    if kernel.cluster > 1:
        cluster = driver.CUlaunchAttribute()
        cluster.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dims = cluster.value.clusterDim
        dims.x, dims.y, dims.z = kernel.cluster, 1, 1
        attributes.insert(0, cluster)
    with torch.cuda.device(device):
        function, shared = compiled(kernel, device)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = kernel.grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
        config.sharedMemBytes, config.hStream = shared, torch.cuda.current_stream().cuda_stream
        config.attrs, config.numAttrs = attributes, len(attributes)
        address = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(address), 0))


# ----------------------------------------------------------------------------------------------------------------------
# The step

def of_norm(stage, norm, bias):
    """(2, all rows) in float32, by place: W gain, and W shift + bias."""
    shift = getattr(norm, "bias", None)
    both = stage.times(norm.weight, torch.zeros_like(norm.weight) if shift is None else shift).T.contiguous()
    if bias is not None:
        both[1] += bias
    return both.float()


class Step:
    """model.step for one token of each of 5 to 64 sequences: step(tokens (B, 1), cache) -> logits (B, vocab_size).

    plans, launch: as `plan` and `launch` here, for tests.
    """

    def __init__(self, model, cache, multiprocessors=0, plans=plan, launch=launch):
        cfg, weight = model.cfg, model.head.weight
        self.model, self.cache, self.device, self.launch = model, cache, weight.device, launch
        self.batch, self.tokens = len(cache.position), padded(len(cache.position))
        sms = multiprocessors or torch.cuda.get_device_properties(self.device).multi_processor_count
        self.plan, self.kernels, self.vectors = functools.partial(plans, multiprocessors=sms), [], []
        self.norm = "LAYER_NORM" if cfg.norm == "layernorm" else "RMS_NORM"
        layers = linears(model, self.batch)

        def buffer(width, dtype=weight.dtype):
            return torch.zeros(self.tokens, width, device=self.device, dtype=dtype)

        rank = max([16] + [s.blocks * s.rows for layer in layers for m in layer for s in stages(m)[:-1]])
        self.x, self.scaled = buffer(cfg.n_embd), buffer(cfg.n_embd)
        self.qkv, self.attended = buffer(layers[0][0].out_features), buffer(cfg.attn_dim)
        self.hidden, self.rank = buffer(cfg.ffn_dim), buffer(rank)
        self.moments = buffer(cfg.n_embd // 8, torch.float32)
        self.first = embed_kernel(cfg, self.batch)
        attention = attention_for(cfg, self.batch, sms, cache.length)
        following = [block.norm1 for block in model.blocks[1:]] + [model.norm]
        for block, (k, v), (qkv, proj, fc1, fc2), after in zip(model.blocks, cache.layers, layers, following):
            self.add(qkv, self.scaled, self.qkv, norm=block.norm1)
            self.kernels.append((attention, pointers(Attention, self.qkv, model.cos, model.sin, cache.position, k, v,
                                                     self.attended, length=cache.length)))
            self.add(proj, self.attended, self.x, following=block.norm2)
            self.add(fc1, self.scaled, self.hidden, norm=block.norm2, act=cfg.act)
            self.add(fc2, self.hidden, self.x, following=after)

    def add(self, linear, x, y, norm=None, act="", following=None):
        """The kernels of y = act(linear(norm(x))), or with the norm that follows y += linear(x)."""
        parts = stages(linear)
        for i, stage in enumerate(parts):
            first, last = i == 0, i == len(parts) - 1
            bias = linear.bias if last else None
            add = last and following is not None
            kind = self.norm if first and norm is not None else "NO_NORM"
            tiles, fused = self.plan(stage, self.tokens), act.upper() or "NONE" if last else "NONE"
            kernel = linear_kernel(stage, tiles, self.tokens, kind, fused, bias is not None, add)
            vectors = None if kind == "NO_NORM" else of_norm(stage, norm, bias)
            self.vectors.append(vectors)
            to = y if last else self.rank
            tensors = (x, stage.weights, bias, following.weight if add else None, y if add else None, vectors,
                       self.moments, to, self.scaled, self.moments)
            self.kernels.append((kernel, linear_arguments(stage, tiles, fused, tensors, self.model.norm.eps)))
            x = to

    def __call__(self, tokens, cache):
        assert cache is self.cache, "the kernels have the addresses of one cache"
        assert tokens.is_contiguous(), "the kernel reads one token after the other"
        model = self.model
        wpe = None if model.wpe is None else model.wpe.weight
        self.launch(self.first, pointers(Embed, tokens, cache.position, model.wte.weight, wpe,
                                         model.blocks[0].norm1.weight, self.x, self.scaled, self.moments), self.device)
        for kernel, arguments in self.kernels:
            self.launch(kernel, arguments, self.device)
        cache.advance(1, tokens[:, 0])
        normed = model.norm(self.x[:self.batch]).to(self.x.dtype)
        return model.head(normed)  # cuBLAS: as fast as `linear` there
