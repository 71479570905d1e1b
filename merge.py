"""Factors or dense equivalent: merging structured linears, and the table of speeds that decode=auto uses.

`prepare_model` makes a loaded model ready for decoding. Weights are cast once. Each structured linear becomes its
factors, its dense equivalent (the paper's pre-merge), or both, with a table measured on this card of which is faster.
"""
import hashlib
import importlib.util
import math
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn

from config import UserError, read_json
from device import record_graph
from model import Cache, ops
from run import save_json
from structured import Dense, FactoredQKV, FactorsOrMerged, Structured


# ----------------------------------------------------------------------------------------------------------------------
# Merging

@torch.no_grad()
def merge(linear) -> Dense:
    """The dense equivalent of a structured linear, formed in the precision of its factors."""
    dense = Dense(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    dense.weight = nn.Parameter(linear.dense_weight(), requires_grad=False)
    dense.bias = linear.bias
    return dense


def merge_attention(model):
    """One dense matrix for queries, keys and values, which is what all kernels of decoding read."""
    for block in model.blocks:
        if isinstance(block.attn.qkv, FactoredQKV):
            block.attn.qkv = merge(block.attn.qkv)


def replace_structured(model, replacement=merge):
    """Replaces every structured linear of the FFNs by replacement(linear); attention's are merged."""
    merge_attention(model)
    for block in model.blocks:
        for name, linear in list(block.ffn.named_children()):
            if isinstance(linear, Structured):
                setattr(block.ffn, name, replacement(linear))


@contextmanager
def exact_matmuls():
    """fp32 products in fp32, not TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@torch.no_grad()
def cast_and_merge(model, decode, dtype) -> list:
    """Gives a model in fp32 the form `decode` and the precision dtype, in place.

    Returns its FactorsOrMerged modules (of decode=auto); their table of speeds is still to come.
    """
    for block in model.blocks:
        block.ffn.kernels = False  # the fused FFN of training: for many tokens, and for factors alone
    with exact_matmuls():  # merged before the cast: the product is rounded once
        merge_attention(model)
        if decode == "merged":
            replace_structured(model)
        elif decode == "auto":
            replace_structured(model, lambda linear: FactorsOrMerged(linear, merge(linear).to(dtype)))
    cos, sin = model.cos, model.sin
    model.to(dtype).requires_grad_(False).eval()
    model.cos, model.sin = cos, sin  # positions stay exact: bf16 has 8 bits for an angle
    return [module for module in model.modules() if isinstance(module, FactorsOrMerged)]


@torch.no_grad()
def prepare_model(model, decode, dtype, table=None):
    """Makes a model in fp32 ready for decoding, in place, and returns it.

    decode: structured | merged | auto; table: the file that keeps auto's speeds.
    """
    pairs = cast_and_merge(model, decode, dtype)
    model.speeds = SpeedTable(load_or_measure(model, pairs, table) if pairs else {})
    for pair in pairs:
        pair.speeds = model.speeds
    drop_unused(model)
    return model


def drop_unused(model):
    """Where one of factors and dense equivalent is faster for every number of tokens, only that one stays in memory."""
    for block in model.blocks:
        for name, pair in list(block.ffn.named_children()):
            if isinstance(pair, FactorsOrMerged):
                times = [ms for rows in model.speeds.times.values() for ms in rows[pair.shape].values()]
                wins = [merged < factors for factors, merged in times]
                if not any(wins) or all(wins):
                    setattr(block.ffn, name, pair.merged if any(wins) else pair.factors)


def step_weights(model, tokens, launch) -> int:
    """Bytes of weights that a step on `tokens` tokens reads, each once. An embedding's few rows are not counted."""
    tables = model.wte, model.wpe, *(block.attn.values for block in model.blocks)
    unread = {id(table.weight) for table in tables if table is not None} - {id(model.head.weight)}
    with model.speeds.launched(launch):
        for pair in (module for module in model.modules() if isinstance(module, FactorsOrMerged)):
            merged = model.speeds.merged(pair.shape, tokens)
            unread |= {id(pair.factors.V), id(pair.factors.U)} if merged else {id(pair.merged.weight)}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in unread)


# ----------------------------------------------------------------------------------------------------------------------
# The table of speeds

STEP_BATCHES = 1, 2, 4, 8, 16, 32, 64  # sequences whose step may be a single kernel or a chain of kernels
# Numbers of tokens that are timed; a matmul's time may jump between neighbours
TOKENS = [*STEP_BATCHES, *(n << i for i in range(6) for n in (96, 128))]


def launches(device) -> tuple:
    """The ways to launch a linear there: one by one from Python, or within a CUDA graph."""
    return ("eager", "graph") if device.type == "cuda" else ("eager",)


class SpeedTable:
    """Milliseconds of factors and merged, for each shape of linear and way to launch it, over the number of tokens.

    times {"graph" | "eager": {shape: {tokens: [factors, merged]}}}. A number of tokens that was not timed goes by the
    next larger one, as matmuls pad to tiles; beyond the largest, by the largest.
    """

    def __init__(self, times):
        self.times, self.mode, self.known = times, "eager", {}

    def merged(self, shape, tokens) -> bool:
        """Whether the dense equivalent is the faster one."""
        key = self.mode, shape, tokens
        if key not in self.known:
            row = {int(size): ms for size, ms in self.times[self.mode][shape].items()}
            factors, merged = row[min((size for size in row if size >= tokens), default=max(row))]
            self.known[key] = merged < factors
        return self.known[key]

    @contextmanager
    def launched(self, mode):
        """Inside, the answers are for linears launched this way."""
        before, self.mode = self.mode, mode
        yield
        self.mode = before


SOURCES = "decode.py", "barriers.cuh", "megakernel.cu", "chain.py", "chain.cu"  # of ops, on which measured times depend


def table_key(device, dtype) -> str:
    """What measured times hold for: card, versions (those of our kernels too), precision."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} x{torch.get_num_threads()}"
    parts = [card, f"torch {torch.__version__}"]
    if device.type == "cuda":
        if importlib.util.find_spec("triton"):
            import triton
            parts.append(f"triton {triton.__version__}")
        folder, names = Path(__file__).with_name("ops"), SOURCES if ops.ON else ()
        sources = b"".join(folder.joinpath(name).read_bytes() for name in names)
        parts.append(f"kernels {hashlib.sha256(sources).hexdigest()[:8]}")
    return ", ".join(parts + [str(dtype).removeprefix("torch.")])


def read_table(path, key, modes) -> tuple:
    """(all tables of the file at path, the shapes that its table for `key` holds in all modes).

    The table for `key` is left with these modes alone.
    """
    try:
        tables = read_json(path, 1 << 22)
        if key not in tables.keys():
            return tables, set()
        tables[key] = {mode: tables[key].get(mode, {}) for mode in modes}
        for row in (row for shapes in tables[key].values() for row in shapes.values()):
            if not row or not all(int(tokens) > 0 and 0 < factors < math.inf and 0 < merged < math.inf
                                  for tokens, (factors, merged) in row.items()):
                raise ValueError
        return tables, set.intersection(*map(set, tables[key].values()))
    except (UserError, ValueError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged or cannot be read: delete it, and the speeds of factors and dense "
                        "equivalents are measured again.") from None


def load_or_measure(model, pairs, path=None) -> dict:
    """SpeedTable.times for a model's FactorsOrMerged modules.

    From the file at path if it has them for this card, these versions and shapes; else measured, and kept there.
    """
    weight = pairs[0].factors.V
    key, tables, known = table_key(weight.device, weight.dtype), {}, set()
    if path and os.path.isfile(path):
        tables, known = read_table(path, key, launches(weight.device))
    if {pair.shape for pair in pairs} <= known:
        return tables[key]
    new = measure(pairs)
    for batch, rows in measure_steps(model, pairs).items():
        for shape, ms in rows.items():
            new["graph"][shape][batch] = ms
    kept = tables.setdefault(key, {})
    for mode, rows in new.items():
        kept.setdefault(mode, {}).update(rows)
    if path:
        try:
            save_json(path, tables)
        except UserError as e:
            print(f"the table of speeds is not kept: {e}", file=sys.stderr)
    return kept


# ----------------------------------------------------------------------------------------------------------------------
# Measuring

def time_linears(linears, x, graph) -> float:
    """Milliseconds of one linear on x: the mean over all in turn, so that weights come from memory as in a model.

    graph: launched as the decoding step in a CUDA graph does it.
    """
    fused = graph and ops.ON and ops.can_layer(x)

    def once():
        for linear in linears:
            ops.layer(linear, x) if fused else linear(x)

    if x.device.type != "cuda":
        once()
        times = []
        while sum(times) < 0.005 and len(times) < 20:
            began = time.perf_counter()
            once()
            times.append(time.perf_counter() - began)
        return min(times) * 1e3 / len(linears)
    return time_on_gpu(once, graph) / len(linears)


def time_on_gpu(once, graph) -> float:
    """Milliseconds of once(), launched from Python or as a graph: the least of five, since disturbances only add."""
    once()
    torch.cuda.synchronize()
    run = record_graph(once).replay if graph else once
    run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return min(a.elapsed_time(b) for a, b in zip(marks, marks[1:]))


@torch.no_grad()
def measure(pairs, sizes=()) -> dict:
    """SpeedTable.times of FactorsOrMerged modules on their device, for TOKENS or other `sizes`; takes some seconds."""
    device, dtype = pairs[0].factors.V.device, pairs[0].factors.V.dtype
    times = {mode: {} for mode in launches(device)}
    for shape in sorted({pair.shape for pair in pairs}):
        group = [pair for pair in pairs if pair.shape == shape]
        linears = [pair.factors for pair in group], [pair.merged for pair in group]
        for mode in times:
            row = times[mode][shape] = {}
            for tokens in sizes or TOKENS:
                x = torch.randn(tokens, group[0].factors.in_features, device=device, dtype=dtype)
                rounds = [[time_linears(kind, x, mode == "graph") for kind in linears] for _ in range(2)]
                row[str(tokens)] = [min(ms) for ms in zip(*rounds)]
                if device.type != "cuda" and tokens >= 64 and max(row[str(tokens)]) * len(group) > 250:
                    break  # so slow that more tokens would take long and show the same order
    return times


def use_everywhere(pairs, merged):
    """From now on a CUDA graph uses all dense equivalents, or all factors."""
    speeds = SpeedTable({"graph": {pair.shape: {"1": [1 + merged, 2 - merged]} for pair in pairs}})
    speeds.mode = "graph"
    for pair in pairs:
        pair.speeds = speeds


@torch.no_grad()
def measure_steps(model, pairs, sizes=STEP_BATCHES) -> dict:
    """{batch: {shape: [factors, merged]}} where the step is a single kernel, or a chain of kernels that overlap.

    Only the whole step can be timed there; each linear gets an equal share of its milliseconds. So a model decodes with
    all its factors or with none.
    """
    device, milliseconds = model.head.weight.device, {}
    if not ops.ON or device.type != "cuda":
        return milliseconds
    single, chain, length = ops.megakernel, ops.chain, min(256, model.cfg.block_size)
    use_everywhere(pairs, 0)
    sizes = [batch for batch in sizes if batch <= max(single.BATCHES) or chain.usable(model, batch)]
    caches = {batch: Cache(model.cfg, batch, length, device, model.head.weight.dtype) for batch in sizes}

    def steps(make):
        made = {}
        for merged in (0, 1):
            use_everywhere(pairs, merged)
            made |= {(batch, merged): make(model, cache) for batch, cache in caches.items()}
        return made

    single.compile_ahead(steps(single.planned).values())
    found = steps(ops.fused_step)
    for batch, cache in caches.items():
        if any(isinstance(found[batch, merged], (single.Step, chain.Step)) for merged in (0, 1)):
            token, times = torch.zeros(batch, 1, dtype=torch.long, device=device), ([], [])
            for merged in (0, 1, 0, 1):
                use_everywhere(pairs, merged)
                cache.position.zero_()
                ten_steps = time_on_gpu(lambda: [found[batch, merged](token, cache) for _ in range(10)], True)
                times[merged].append(ten_steps / 10 / len(pairs))
            milliseconds[str(batch)] = {pair.shape: [min(ms) for ms in times] for pair in pairs}
    return milliseconds
