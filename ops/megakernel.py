"""The host's side of megakernel.cu, a decoding step of a few sequences as one kernel: its plan, compilation, launch."""
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from config import UserError
from ops.fallback import log_once, works
from run import atomic_write
from structured import BlockShuffle, Structured, active_linear

BATCHES = 1, 2, 4    # sequences that a step is compiled for

WARPS = 8            # consumer warps of a thread block
PRODUCER_WARPS = 4   # one thread of them produces; registers are handed over by four warps at a time
SLOT = 2**14         # bytes of a slot of the ring at least; it holds a row of every matrix
LARGEST_SLOT = 2**16
WIDEST = 2**13       # inputs, of all sequences, above which thread blocks share the columns of a factor
MAX_SPLITS = 8       # thread blocks that share a head, a power of two
COPIES = 8           # of a tagged float that all thread blocks read
MAX_INPUTS = 2**15   # of a matrix, for all sequences: more would not fit into the registers
ACTIVATIONS = {"gelu": "GELU", "relu2": "RELU2", "swiglu": "SWIGLU"}


# ----------------------------------------------------------------------------------------------------------------------
# What the kernel is made for

class Stage(NamedTuple):
    """Blocks of rows x K. Row j's output goes to place j % spread * (all rows / spread) + j // spread.

    summed: the blocks lie side by side, as they do in one long row, and their outputs are to be added.
    """
    weights: torch.Tensor
    rows: int
    K: int
    blocks: int
    spread: int
    summed: bool = False

    def by_block(self):
        """(blocks, rows, K)"""
        if self.summed:
            return self.weights.view(self.rows, self.blocks, self.K).transpose(0, 1)
        return self.weights.view(self.blocks, self.rows, self.K)

    def times(self, *vectors):
        """The products with n input vectors, in float64: (all rows, n), by the place of a row's output."""
        x = torch.stack([v.double() for v in vectors]).view(-1, self.blocks, self.K).permute(1, 2, 0)  # (blocks, K, n)
        rows = self.by_block().split(1024, dim=1)                                           # in parts: less memory
        products = torch.cat([w.double() @ x for w in rows], dim=1)                         # (blocks, rows, n)
        return products.reshape(-1, self.spread, len(vectors)).transpose(0, 1).flatten(0, 1)


def matrices(linear, batch):
    """The `Stage`s of a linear, one or two.

    Where a linear narrows, its first factor has few long rows: thread blocks share the columns, so that none reads all
    of a long input.
    """
    if not isinstance(linear, Structured):
        return [Stage(linear.weight, *linear.weight.shape, 1, len(linear.weight))]
    V, U = linear.V, linear.U
    blocks, q, p = V.shape if V.dim() == 3 else (1, *V.shape)
    if isinstance(linear, BlockShuffle):
        _, s, r = U.shape
        return [Stage(V, q, p, blocks, blocks), Stage(U, s, r, blocks, s)]
    parts, narrows = 1, blocks == 1 and linear.in_features > linear.out_features
    while narrows and batch * p // parts > WIDEST and p % (32 * parts) == 0:
        parts *= 2
    return [Stage(V, q, p // parts, blocks * parts, blocks * parts * q, parts > 1), Stage(U, *U.shape, 1, len(U))]


def linears(model, batch):
    """[(qkv, proj, fc1, fc2)] of the layers, as active for `batch` tokens."""
    return [(b.attn.qkv, b.attn.proj, active_linear(b.ffn.fc1, batch), active_linear(b.ffn.fc2, batch))
            for b in model.blocks]


def all_matrices(model, batch=1):
    of_layers = [m for layer in linears(model, batch) for linear in layer for m in matrices(linear, batch)]
    return of_layers + matrices(model.head, batch)


def usable(model, batch) -> bool:
    """Whether `Step` can compute this model's steps for `batch` sequences."""
    weight = model.head.weight
    if weight.device.type != "cuda" or torch.version.hip is not None:
        return False
    if model.cfg.extras:
        log_once(f"decoding of few sequences: plain torch, since the kernels have no {', '.join(model.cfg.extras)}")
        return False
    card = torch.cuda.get_device_properties(weight.device)
    parts, grid = all_matrices(model, batch), card.multi_processor_count
    return card.major >= 9 and fits(model.cfg, parts, weight.dtype, grid, batch) and bindings()


def fits(cfg, parts, dtype, grid, batch=1) -> bool:
    """Whether `grid` thread blocks can compute a step: rows of whole 16-byte pieces, none longer than a slot, rows of
    qkv for each thread block, a thread block for each block of a matrix, inputs that registers hold."""
    size, D = dtype.itemsize, cfg.attn_dim // cfg.n_head
    return (dtype in (torch.bfloat16, torch.float32) and D * size in (32, 64, 128, 256, 512) and parts[0].rows >= grid
            and all(p.K * size % 16 == 0 and p.K * size <= LARGEST_SLOT and p.blocks <= grid for p in parts)
            and (batch == 1 or batch <= max(BATCHES) and batch * max(p.K for p in parts) <= MAX_INPUTS))


@functools.cache
def bindings() -> bool:
    """Whether NVIDIA's Python bindings are there; torch 2.10 and newer installs them with CUDA."""
    found = all(importlib.util.find_spec(name) for name in ("cuda", "cuda.bindings"))
    if not found:
        log_once("decoding of a few sequences is slower than it could be: the package cuda-bindings is not installed")
    return found


def planned(model, cache):
    """A `Step` for the sequences of a cache, not yet compiled, or None where it is not usable."""
    return Step(model, cache) if usable(model, len(cache.position)) else None


def step_for(model, cache):
    """A compiled `Step` for the sequences of a cache, or None where it is not usable or does not compile."""
    step = planned(model, cache)

    def trial():
        with torch.cuda.device(step.device):
            compiled(step.defines, step.device)

    return step if step and works("decoding step of a few sequences", trial, step.defines) else None


def constants(model, batch, grid, warps, slot):
    """The macros of megakernel.cu."""
    cfg = model.cfg

    def matrix(m):
        return f"Matrix<{m.rows}, {m.K}, {m.blocks}, {m.spread}, {int(m.summed)}>"

    def linear(module):
        parts = [matrix(m) for m in matrices(module, batch)]
        return f"{'Dense' if len(parts) == 1 else 'Factors'}<{', '.join(parts)}>"

    kinds = [f"{linear(fc1)}, {linear(fc2)}" for _, _, fc1, fc2 in linears(model, batch)]
    starts = [i for i in range(cfg.n_layer) if i == 0 or kinds[i] != kinds[i - 1]]
    runs = [f"layers<{kinds[i]}>(producer, {i}, {j});" for i, j in zip(starts, starts[1:] + [cfg.n_layer])]
    qkv, proj = model.blocks[0].attn.qkv, model.blocks[0].attn.proj
    values = dict(
        BATCH=batch, Weight="bf16" if model.head.weight.dtype == torch.bfloat16 else "float", GRID=grid, WARPS=warps,
        SLOT=slot, N=cfg.n_embd, HEADS=cfg.n_head, KV=cfg.n_kv_head, D=cfg.attn_dim // cfg.n_head, LAYERS=cfg.n_layer,
        SPLITS=min(MAX_SPLITS, 1 << max(grid // (batch * cfg.n_head), 1).bit_length() - 1), COPIES=COPIES,
        ROPE=int(cfg.pos == "rope"), RMS=int(cfg.norm == "rmsnorm"), ACT=ACTIVATIONS[cfg.act],
        QKV=matrix(matrices(qkv, batch)[0]), PROJ=matrix(matrices(proj, batch)[0]),
        HEAD=matrix(matrices(model.head, batch)[0]),
        STAGES=2 + sum(1 + sum(len(matrices(m, batch)) for m in layer) for layer in linears(model, batch)))
    lines = [f"#define {name} {value}\n" for name, value in values.items()]
    return "".join(lines) + f"#define LAYERS_OF(producer) {' '.join(runs)}\n"


def source(defines, file="megakernel.cu") -> str:
    """The text of a CUDA source after its constants and what all sources share."""
    parts = (f'#line 1 "{name}"\n{Path(__file__).with_name(name).read_text()}' for name in ("barriers.cuh", file))
    return defines + "".join(parts)


# ----------------------------------------------------------------------------------------------------------------------
# Compilation and launch, through NVIDIA's own Python bindings

def checked(result):
    """What a function of the bindings returns, without its error code."""
    error, *values = result
    if int(error):
        raise RuntimeError(f"{error!r} in the decoding kernel")
    return values[0] if len(values) == 1 else values


def compiler() -> str:
    from cuda.bindings import nvrtc
    return "nvrtc {}.{}".format(*checked(nvrtc.nvrtcVersion()))


def compile_source(text, architecture) -> bytes:
    from cuda.bindings import nvrtc
    program = checked(nvrtc.nvrtcCreateProgram(text.encode(), b"megakernel.cu", 0, None, None))
    options = [b"--std=c++17", f"--gpu-architecture={architecture}".encode()]
    if int(nvrtc.nvrtcCompileProgram(program, len(options), options)[0]):
        log = bytearray(checked(nvrtc.nvrtcGetProgramLogSize(program)))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(log.decode())
    code = bytearray(checked(nvrtc.nvrtcGetCUBINSize(program)))
    checked(nvrtc.nvrtcGetCUBIN(program, code))
    return bytes(code)


@functools.cache
def binary(defines, capability, file="megakernel.cu") -> bytes:
    """A kernel of a file for cards of a capability such as (9, 0). Compiling takes seconds, so the user's cache keeps
    it."""
    text, architecture = source(defines, file), "sm_{}{}".format(*capability)
    if capability == (9, 0):
        architecture += "a"  # for setmaxnreg
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    key = hashlib.sha256(f"{compiler()} {architecture} {text}".encode()).hexdigest()[:32]
    path = os.path.join(cache, "structured-ffn", f"{key}.cubin")
    with contextlib.suppress(OSError), open(path, "rb") as f:
        checksum, code = f.read(32), f.read()
        if checksum == hashlib.sha256(code).digest():
            return code
    code = compile_source(text, architecture)
    # Without a place for the file the next run compiles again
    with contextlib.suppress(UserError), atomic_write(path) as temp, open(temp, "wb") as f:
        f.write(hashlib.sha256(code).digest() + code)
    return code


def compile_ahead(steps):
    """Compiles the kernels of planned steps in parallel; step_for reports what fails."""
    with ThreadPoolExecutor() as pool:
        for step in filter(None, steps):
            pool.submit(binary, step.defines, torch.cuda.get_device_capability(step.device))


@functools.cache
def compiled(defines, device):
    """(the kernel, the bytes of shared memory that it may have)"""
    from cuda.bindings import driver
    module = checked(driver.cuModuleLoadData(binary(defines, torch.cuda.get_device_capability(device))))
    kernel = checked(driver.cuModuleGetFunction(module, b"decode_step"))
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    largest = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuFuncSetAttribute(kernel, largest, shared))
    return kernel, shared


class Arguments(ctypes.Structure):
    """As in megakernel.cu."""
    _fields_ = [(name, ctypes.c_void_p) for name in ("token position wte wpe head cos sin table head_norm "
                                                     "x y qkv part lse rank1 rank2 hidden logits counter").split()]
    _fields_ += [("length", ctypes.c_longlong), ("eps", ctypes.c_float)]


def launch(defines, grid, threads, arguments, device):
    """A cooperative launch: thread blocks that cannot all run at once are an error, not a deadlock."""
    from cuda.bindings import driver
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    with torch.cuda.device(device):
        kernel, shared = compiled(defines, device)
        stream = torch.cuda.current_stream().cuda_stream
        checked(driver.cuLaunchCooperativeKernel(kernel, grid, 1, 1, threads, 1, 1, shared, stream,
                                                 ctypes.addressof(pointers)))


class Step:
    """model.step for one token of a few sequences: step(tokens (B, 1), cache) -> logits (B, vocab_size), in the same
    buffer each time.

    grid: thread blocks that share the work; 0: one per multiprocessor.
    """

    def __init__(self, model, cache, grid=0, warps=WARPS, launch=launch):
        cfg, weight = model.cfg, model.head.weight
        self.device, self.model, self.cache, self.launch = weight.device, model, cache, launch
        self.grid = grid or torch.cuda.get_device_properties(self.device).multi_processor_count
        self.threads, self.batch = 32 * (warps + PRODUCER_WARPS), len(cache.position)
        longest = max(m.K * weight.element_size() for m in all_matrices(model, self.batch))
        self.layer_vectors, self.head_vectors = self.vectors()
        self.table = self.addresses()
        self.defines = constants(model, self.batch, self.grid, warps, max(SLOT, 1 << (longest - 1).bit_length()))
        parts = [matrices(m, self.batch) for layer in linears(model, self.batch) for m in layer]
        rank = max([1] + [first.rows * first.blocks for first, *second in parts if second])

        def row_of(n):  # tagged floats
            span = 512 // weight.element_size()
            return -(-n // span) * span

        attention = MAX_SPLITS * row_of(cfg.attn_dim), COPIES * MAX_SPLITS * cfg.n_head
        sizes = (*map(row_of, (cfg.n_embd, cfg.n_embd, model.blocks[0].attn.qkv.out_features)), *attention,
                 *map(row_of, (rank, rank, cfg.n_hidden)))
        # the epoch of -1 is not that of the first launch
        self.buffers = [torch.full((self.batch * n,), -1, device=self.device, dtype=torch.int32) for n in sizes]
        self.logits = torch.empty(self.batch, cfg.vocab_size, device=self.device, dtype=weight.dtype)
        self.counter = torch.zeros(2, device=self.device, dtype=torch.long)

    def vectors(self):
        """([of each layer], of the head): norms and biases in float32 for megakernel.cu; what a model lacks is zero."""
        def bias(linear):
            return torch.zeros(linear.out_features, device=self.device) if linear.bias is None else linear.bias.float()

        def normed(norm, linear):
            first, *second = matrices(linear, self.batch)
            shift = getattr(norm, "bias", None)
            of_gain, *of_shift = first.times(norm.weight, *([] if shift is None else [shift])).float().unbind(1)
            added = torch.zeros_like(of_gain) if second else bias(linear)
            return [norm.weight.float(), of_gain, sum(of_shift, added)] + [bias(linear) for _ in second]

        layers = [[*normed(block.norm1, qkv), bias(proj), *normed(block.norm2, fc1), bias(fc2)]
                  for block, (qkv, proj, fc1, fc2) in zip(self.model.blocks, linears(self.model, self.batch))]
        return [torch.cat(parts) for parts in layers], torch.cat(normed(self.model.norm, self.model.head))

    def addresses(self):
        """(n_layer, 9): qkv, proj, fc1's V and U, fc2's V and U, k, v, vectors of a layer; a single matrix stands
        twice."""
        rows = []
        layers = zip(linears(self.model, self.batch), self.cache.layers, self.layer_vectors)
        for (qkv, proj, *fcs), cache, vectors in layers:
            weights = [m[i].weights for fc in fcs for m in [matrices(fc, self.batch)] for i in (0, -1)]
            rows.append([t.data_ptr() for t in (qkv.weight, proj.weight, *weights, *cache, vectors)])
        return torch.tensor(rows).to(self.device)

    def __call__(self, tokens, cache):
        assert cache is self.cache, "the table holds the addresses of one cache"
        assert tokens.is_contiguous(), "the kernel reads one token after the other"
        model = self.model
        wpe = None if model.wpe is None else model.wpe.weight
        tensors = (tokens, cache.position, model.wte.weight, wpe, model.head.weight, model.cos, model.sin, self.table,
                   self.head_vectors, *self.buffers, self.logits, self.counter)
        arguments = Arguments(*(None if t is None else t.data_ptr() for t in tensors), cache.length, model.norm.eps)
        self.launch(self.defines, self.grid, self.threads, arguments, self.device)
        return self.logits
