"""Factors or dense equivalent: merging structured linears, and the table of speeds behind decode=auto.

`ready` makes a loaded model fit for decoding: weights cast once, and each structured linear as its factors, merged to its dense
equivalent (the paper's pre-merge), or both with a table, measured on this card, of which is faster for how many tokens.
"""
import hashlib
import importlib.util
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn

from config import UserError
from model import Cache, ops
from run import atomic_write
from structured import Dense, FactorsOrMerged, Structured


@torch.no_grad()
def merge(linear) -> Dense:
    """The dense linear that a structured one is, formed in the precision of its factors."""
    dense = Dense(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    dense.weight = nn.Parameter(linear.dense_weight(), requires_grad=False)
    dense.bias = linear.bias
    return dense


def merge_model(model, instead=merge):
    """Puts dense equivalents, or what instead(linear) gives, in the place of all structured linears."""
    for block in model.blocks:
        for name, linear in list(block.ffn.named_children()):
            if isinstance(linear, Structured):
                setattr(block.ffn, name, instead(linear))


@contextmanager
def exact_matmuls():
    """fp32 products in fp32, not TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def modes(device) -> tuple:
    """How a linear may be launched there."""
    return ("eager", "graph") if device.type == "cuda" else ("eager",)


FEW = 1, 2, 4  # sequences whose step may be a single kernel
TOKENS = [*FEW, 8, 16, 32, 64, *(n << i for i in range(6) for n in (96, 128))]  # that are timed: a matmul's time may jump between them


class SpeedTable:
    """For each kind of linear the milliseconds of factors and merged over the number of tokens, launched one by one or as a graph.

    times {"graph" | "eager": {shape: {tokens: [factors, merged]}}}. The next larger number of tokens decides for those between, as
    matmuls pad to tiles; the largest for all beyond.
    """

    def __init__(self, times):
        self.times, self.mode, self.known = times, "eager", {}

    def merged(self, shape, tokens) -> bool:
        key = self.mode, shape, tokens
        if key not in self.known:
            row = {int(size): ms for size, ms in self.times[self.mode][shape].items()}
            factors, merged = row[min((size for size in row if size >= tokens), default=max(row))]
            self.known[key] = merged < factors
        return self.known[key]

    @contextmanager
    def under(self, mode):
        before, self.mode = self.mode, mode
        yield
        self.mode = before


def timed_linears(linears, x, graph) -> float:
    """Milliseconds of one linear on x, the mean over all of them: they take turns, so that weights come from memory as in a model.

    graph: as the decoding step runs it.
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
    return timed_on_gpu(once, graph) / len(linears)


def timed_on_gpu(once, graph) -> float:
    """Milliseconds of once(), launched from Python or as a graph: the least of five, since whatever disturbs only adds."""
    once()
    torch.cuda.synchronize()
    run = once
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            once()
        run = captured.replay
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
    """SpeedTable.times of a model's FactorsOrMerged modules, as they stand on their device, for TOKENS or other `sizes`; some seconds."""
    device, dtype = pairs[0].factors.V.device, pairs[0].factors.V.dtype
    times = {mode: {} for mode in modes(device)}
    for shape in sorted({pair.shape for pair in pairs}):
        group = [pair for pair in pairs if pair.shape == shape]
        for mode in times:
            row = times[mode][shape] = {}
            for tokens in sizes or TOKENS:
                x = torch.randn(tokens, group[0].factors.in_features, device=device, dtype=dtype)
                rounds = [[timed_linears([getattr(pair, kind) for pair in group], x, mode == "graph") for kind in ("factors", "merged")]
                          for _ in range(2)]
                row[str(tokens)] = [min(ms) for ms in zip(*rounds)]
                if device.type != "cuda" and tokens >= 64 and max(row[str(tokens)]) * len(group) > 250:
                    break  # long calls keep the order of these
    return times


def let_all(pairs, merged):
    """All factors answer from now on, or all dense equivalents, as in a graph."""
    choice = SpeedTable({"graph": {pair.shape: {"1": [1 + merged, 2 - merged]} for pair in pairs}})
    choice.mode = "graph"
    for pair in pairs:
        pair.choice = choice


@torch.no_grad()
def measure_few(model, pairs, sizes=FEW) -> dict:
    """{batch: {shape: [factors, merged]}} where the step is a single kernel: milliseconds of the whole step, each linear's equal share."""
    device, few = model.head.weight.device, {}
    if not ops.ON or device.type != "cuda":
        return few
    single = ops.megakernel
    caches = {batch: Cache(model.cfg, batch, min(256, model.cfg.block_size), device, model.head.weight.dtype) for batch in sizes}

    def steps(make):
        made = {}
        for merged in (0, 1):
            let_all(pairs, merged)
            made |= {(batch, merged): make(model, cache) for batch, cache in caches.items()}
        return made

    single.compile_ahead(steps(single.planned).values())
    found = steps(ops.fused_step)
    for batch, cache in caches.items():
        if any(isinstance(found[batch, merged], single.Step) for merged in (0, 1)):
            token, times = torch.zeros(batch, 1, dtype=torch.long, device=device), ([], [])
            for merged in (0, 1, 0, 1):
                let_all(pairs, merged)
                cache.position.zero_()
                times[merged].append(timed_on_gpu(lambda: [found[batch, merged](token, cache) for _ in range(10)], True) / 10 / len(pairs))
            few[str(batch)] = {pair.shape: [min(ms) for ms in times] for pair in pairs}
    return few


def table_key(device, dtype) -> str:
    """Card, versions, our own kernels' too, and precision: what a table of times holds for."""
    parts = [torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} x{torch.get_num_threads()}", f"torch {torch.__version__}"]
    if device.type == "cuda":
        if importlib.util.find_spec("triton"):
            import triton
            parts.append(f"triton {triton.__version__}")
        sources = b"".join(Path(__file__).with_name("ops").joinpath(name).read_bytes() for name in ("decode.py", "megakernel.cu")) if ops.ON else b""
        parts.append(f"kernels {hashlib.sha256(sources).hexdigest()[:8]}")
    return ", ".join(parts + [str(dtype).removeprefix("torch.")])


def shapes_of(times) -> set:
    """The shapes that SpeedTable.times holds; what is no such table raises ValueError, TypeError or AttributeError."""
    for rows in times.values():
        for row in rows.values():
            if not row or not all(int(tokens) > 0 and 0 < factors < math.inf and 0 < merged < math.inf for tokens, (factors, merged) in row.items()):
                raise ValueError
    return set.intersection(*map(set, times.values()))


def load_or_measure(model, pairs, path=None) -> dict:
    """SpeedTable.times of a model's FactorsOrMerged modules: from the file at path if it holds them for this card, these versions and shapes, else
    measured and kept there."""
    weight = pairs[0].factors.V
    key, tables, known = table_key(weight.device, weight.dtype), {}, set()
    if path and os.path.isfile(path):
        try:
            with open(path) as f:
                tables = json.load(f)
            known = shapes_of({mode: tables[key].get(mode, {}) for mode in modes(weight.device)}) if key in tables.keys() else known
        except OSError as e:
            raise UserError(f"cannot read {path} ({e.strerror}): delete it, and the speeds in it are measured again.") from None
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path} is damaged: delete it, and the speeds of factors and dense equivalents are measured again.") from None
    if not {pair.shape for pair in pairs} <= known:
        new = measure(pairs)
        for batch, rows in measure_few(model, pairs).items():
            for shape, ms in rows.items():
                new["graph"][shape][batch] = ms
        kept = tables.setdefault(key, {})
        for mode, rows in new.items():
            kept.setdefault(mode, {}).update(rows)
        if path:
            try:
                with atomic_write(path) as temp, open(temp, "w") as f:
                    json.dump(tables, f, indent=1)
            except UserError as e:
                print(f"the table of speeds is not kept: {e}", file=sys.stderr)
    return tables[key]


@torch.no_grad()
def convert(model, decode, dtype) -> list:
    """Turns a model in fp32 into the given form and precision, in place; returns its FactorsOrMerged modules, whose choice is still to come."""
    for block in model.blocks:
        block.ffn.kernels = False  # training's, for many tokens and factors alone
    with exact_matmuls():
        if decode != "structured":
            merge_model(model, merge if decode == "merged" else lambda linear: FactorsOrMerged(linear, merge(linear).to(dtype), None))
    cos, sin = model.cos, model.sin
    model.to(dtype).requires_grad_(False).eval()
    model.cos, model.sin = cos, sin  # positions keep their digits
    return [module for module in model.modules() if isinstance(module, FactorsOrMerged)]


@torch.no_grad()
def ready(model, decode, dtype, table=None):
    """Makes a model in fp32 fit for decoding, in place. decode: structured | merged | auto; table: auto's file. Returns the model."""
    pairs = convert(model, decode, dtype)
    model.choice = choice = SpeedTable(load_or_measure(model, pairs, table) if pairs else {})
    for pair in pairs:
        pair.choice = choice
    drop_unused(model, choice)
    return model


def drop_unused(model, choice):
    """A dense equivalent that is never the faster one need not be held, nor factors that never are."""
    for block in model.blocks:
        for name, pair in list(block.ffn.named_children()):
            if isinstance(pair, FactorsOrMerged):
                wins = [merged < factors for rows in choice.times.values() for factors, merged in rows[pair.shape].values()]
                if not any(wins) or all(wins):
                    setattr(block.ffn, name, pair.merged if any(wins) else pair.factors)


def step_weights(model, tokens, mode) -> int:
    """Bytes of weights that a step on `tokens` tokens reads, each once; of an embedding only the rows looked up, not counted."""
    unread = {id(table.weight) for table in (model.wte, model.wpe) if table is not None} - {id(model.head.weight)}
    with model.choice.under(mode):
        for pair in (module for module in model.modules() if isinstance(module, FactorsOrMerged)):
            merged = model.choice.merged(pair.shape, tokens)
            unread |= {id(pair.factors.V), id(pair.factors.U)} if merged else {id(pair.merged.weight)}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in unread)
