"""Decoding: batches of prompts through a KV cache, one small step per token, as one CUDA graph where there is CUDA.

`ready` makes a loaded model fit for it: weights cast once, and each structured linear as its factors, merged to its dense
equivalent (the paper's pre-merge), or both with a table, measured on this card, that says which is faster for how many tokens.
`Decoder` holds the static buffers and the step: model, choice of the token, bookkeeping, all on the device.
"""
import functools
import hashlib
import importlib.util
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn

from config import UserError
from model import Cache, written
from structured import Dense, Structured


# ----------------------------------------------------------------------------------------------------------------------
# The choice of a token: draws depend on (seed, prompt, number of the sample, position) and nothing else

def signed(x) -> int:
    """The int64 with the same bits as x modulo 2^64."""
    return (x + 2**63) % 2**64 - 2**63


GOLDEN, MIX1, MIX2 = signed(0x9E3779B97F4A7C15), signed(0xBF58476D1CE4E5B9), signed(0x94D049BB133111EB)  # of splitmix64


def row_key(seed, prompt, number=0) -> int:
    """What the draws of the number-th sample of a prompt (token ids) start from."""
    return signed(int.from_bytes(hashlib.sha256(f"{seed} {number} {prompt}".encode()).digest()[:8], "little"))


def uniform(key, position):
    """One draw in [0, 1) per row from int64 key and position (B,): splitmix64, whose products wrap and whose shifts are logical."""
    x = key + position * GOLDEN
    x = (x ^ (x >> 30) & 2**34 - 1) * MIX1
    x = (x ^ (x >> 27) & 2**37 - 1) * MIX2
    return (x >> 40 & 2**24 - 1).float() * 2.0**-24


def pick(logits, s, draw=None):
    """logits (B, V) -> the next tokens (B,): temperature, then top-k, top-p and min-p of s, then the inverse CDF at draw (B,)."""
    if s.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(s.temperature, 1e-30)  # the largest stays 0, at the smallest temperature too
    if 0 < s.top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(s.top_k).values[:, -1:], -torch.inf)
    p = logits.softmax(dim=-1)
    if s.top_p < 1:
        ordered, index = p.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= s.top_p  # the token that crosses the line stays
        p = p.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), 0)
    if s.min_p:
        p = p.masked_fill(p < s.min_p * p.amax(dim=-1, keepdim=True), 0)
    cdf = p.cumsum(dim=-1)                                                                      # (B, V)
    total = cdf[:, -1:]
    target = torch.minimum(draw[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp_(max=p.size(-1) - 1)  # the first token whose CDF lies above


# ----------------------------------------------------------------------------------------------------------------------
# Factors or dense equivalent

class Either(nn.Module):
    """A structured linear beside its dense equivalent; `choice` says per call which one answers."""

    def __init__(self, factors, merged, choice):
        super().__init__()
        self.factors, self.merged, self.choice, self.shape = factors, merged, choice, shape_of(factors)

    def pick(self, tokens):
        return self.merged if self.choice.merged(self.shape, tokens) else self.factors

    def forward(self, x, alpha=None):
        return self.pick(x.numel() // x.size(-1))(x)


def chosen(module, tokens):
    """The linear that answers, where a structured one stands beside its dense equivalent."""
    return module.pick(tokens) if isinstance(module, Either) else module


def shape_of(linear) -> str:
    """What a timing depends on besides the card: lowrank 2048 -> 8192, V 512x2048, U 8192x512."""
    V, U = ("x".join(map(str, w.shape)) for w in (linear.V, linear.U))
    return f"{type(linear).__name__.lower()} {linear.in_features} -> {linear.out_features}, V {V}, U {U}"


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


class Choice:
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


def fused_kernels(device):
    """The module of fused kernels where they run, else None."""
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        import kernels_decode
        return kernels_decode


def timed_linears(linears, x, graph) -> float:
    """Milliseconds of one linear on x, the mean over all of them: they take turns, so that weights come from memory as in a model.

    graph: as the decoding step runs it.
    """
    kernels = fused_kernels(x.device) if graph else None
    fused = kernels and len(x) <= kernels.MAX_TOKENS

    def once():
        for linear in linears:
            kernels.layer(linear, x) if fused else linear(x)

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
    """Choice.times of a model's Either modules, as they stand on their device, for TOKENS or other `sizes`; some seconds."""
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


def fused_step(model, cache):
    """The step in kernels: a single one for few sequences, one per linear above; model.step where they do not apply."""
    if cache.position.is_cuda and len(cache.position) <= max(FEW):
        import kernels_persistent
        step = kernels_persistent.step_for(model, cache)
        if step:
            return step
    kernels = fused_kernels(cache.position.device)
    return functools.partial(kernels.step, model) if kernels and kernels.usable(model.cfg) else model.step


def let_all(pairs, merged):
    """All factors answer from now on, or all dense equivalents, as in a graph."""
    choice = Choice({"graph": {pair.shape: {"1": [1 + merged, 2 - merged]} for pair in pairs}})
    choice.mode = "graph"
    for pair in pairs:
        pair.choice = choice


@torch.no_grad()
def measure_few(model, pairs, sizes=FEW) -> dict:
    """{batch: {shape: [factors, merged]}} where the step is a single kernel: milliseconds of the whole step, each linear's equal share."""
    device, few = model.head.weight.device, {}
    if device.type != "cuda":
        return few
    import kernels_persistent as single
    caches = {batch: Cache(model.cfg, batch, min(256, model.cfg.block_size), device, model.head.weight.dtype) for batch in sizes}

    def steps(make):
        made = {}
        for merged in (0, 1):
            let_all(pairs, merged)
            made |= {(batch, merged): make(model, cache) for batch, cache in caches.items()}
        return made

    single.compile_ahead(steps(single.planned).values())
    found = steps(fused_step)
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
        sources = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("kernels_decode.py", "kernels_persistent.cu"))
        parts.append(f"kernels {hashlib.sha256(sources).hexdigest()[:8]}")
    return ", ".join(parts + [str(dtype).removeprefix("torch.")])


def shapes_of(times) -> set:
    """The shapes that Choice.times holds; what is no such table raises ValueError, TypeError or AttributeError."""
    for rows in times.values():
        for row in rows.values():
            if not row or not all(int(tokens) > 0 and 0 < factors < math.inf and 0 < merged < math.inf for tokens, (factors, merged) in row.items()):
                raise ValueError
    return set.intersection(*map(set, times.values()))


def choose(model, pairs, path=None) -> dict:
    """Choice.times of a model's Either modules: from the file at path if it holds them for this card, these versions and shapes, else
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
                with written(path) as temp, open(temp, "w") as f:
                    json.dump(tables, f, indent=1)
            except UserError as e:
                print(f"the table of speeds is not kept: {e}", file=sys.stderr)
    return tables[key]


@torch.no_grad()
def convert(model, decode, dtype) -> list:
    """Turns a model in fp32 into the given form and precision, in place; returns its Either modules, whose choice is still to come."""
    for block in model.blocks:
        block.ffn.kernels = False  # training's, for many tokens and factors alone
    with exact_matmuls():
        if decode != "structured":
            merge_model(model, merge if decode == "merged" else lambda linear: Either(linear, merge(linear).to(dtype), None))
    cos, sin = model.cos, model.sin
    model.to(dtype).requires_grad_(False).eval()
    model.cos, model.sin = cos, sin  # positions keep their digits
    return [module for module in model.modules() if isinstance(module, Either)]


@torch.no_grad()
def ready(model, decode, dtype, table=None):
    """Makes a model in fp32 fit for decoding, in place. decode: structured | merged | auto; table: auto's file. Returns the model."""
    pairs = convert(model, decode, dtype)
    model.choice = choice = Choice(choose(model, pairs, table) if pairs else {})
    for pair in pairs:
        pair.choice = choice
    drop_unused(model, choice)
    return model


def drop_unused(model, choice):
    """A dense equivalent that is never the faster one need not be held, nor factors that never are."""
    for block in model.blocks:
        for name, pair in list(block.ffn.named_children()):
            if isinstance(pair, Either):
                wins = [merged < factors for rows in choice.times.values() for factors, merged in rows[pair.shape].values()]
                if not any(wins) or all(wins):
                    setattr(block.ffn, name, pair.merged if any(wins) else pair.factors)


def step_weights(model, tokens, mode) -> int:
    """Bytes of weights that a step on `tokens` tokens reads, each once; of an embedding only the rows looked up, not counted."""
    unread = {id(table.weight) for table in (model.wte, model.wpe) if table is not None} - {id(model.head.weight)}
    with model.choice.under(mode):
        for pair in (module for module in model.modules() if isinstance(module, Either)):
            merged = model.choice.merged(pair.shape, tokens)
            unread |= {id(pair.factors.V), id(pair.factors.U)} if merged else {id(pair.merged.weight)}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in unread)


# ----------------------------------------------------------------------------------------------------------------------
# Memory

PREFILL = 16384  # prompt tokens in one forward at most, padding included: enough to fill a large GPU


def token_bytes(cfg, dtype) -> int:
    """Bytes of keys and values per token."""
    return 2 * cfg.n_layer * cfg.n_kv_head * (cfg.attn_dim // cfg.n_head) * dtype.itemsize


def row_bytes(cfg, length, dtype) -> int:
    """Bytes of one more row of the batch: its cache, its logits and their copies while a token is chosen, its activations."""
    return length * token_bytes(cfg, dtype) + cfg.vocab_size * (dtype.itemsize + 20) + 8 * (cfg.n_hidden + 4 * cfg.n_embd)


def free_bytes(device):
    """What may still be allocated, or None where that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def largest_batch(cfg, length, device, dtype) -> int:
    """Rows of `length` tokens that fit beside the weights, which are already there."""
    free = free_bytes(device)
    if free is None:
        return 2**20
    prompts = min(PREFILL, 64 * length) * (8 * cfg.n_embd + 2 * cfg.n_hidden + 4 * cfg.attn_dim) * dtype.itemsize
    return max(0, int((0.95 * free - prompts - 2**28) // row_bytes(cfg, length, dtype)))


def padded(length, block_size) -> int:
    """Places for `length` tokens in a buffer: a multiple of 64, which attention kernels like, or the whole context."""
    return min(-(-length // 64) * 64, block_size)


# ----------------------------------------------------------------------------------------------------------------------
# The loop

@dataclass
class Row:
    """One sequence: its prompt (token ids), the key of its draws, and what became of it."""
    prompt: list
    key: int = 0
    new: list = field(default_factory=list)
    finish: str = ""                     # eos | length (max_new_tokens) | context (block_size)
    seconds: float = 0.0                 # from the start of its batch to its end


class Decoder:
    """Continues up to `batch` prompts at a time in static buffers of `length` tokens a row.

    s: temperature, top_k, top_p, min_p, max_new_tokens. eos: the token that ends a row (-1: none does). n_tokens: ids that may be
    chosen, where vocab_size is padded. graphs: replay the step as a CUDA graph.
    """

    def __init__(self, model, s, batch, length, eos=-1, n_tokens=0, graphs=None):
        cfg, weight = model.cfg, model.head.weight
        device, length = weight.device, padded(length, model.cfg.block_size)
        fits = largest_batch(cfg, length, device, weight.dtype)
        if batch > fits:
            raise UserError(f"a batch of {batch} sequences of {length} tokens needs {batch * row_bytes(cfg, length, weight.dtype) / 2**30:.1f} GiB, "
                            f"{(free_bytes(device) or 0) / 2**30:.1f} are free: the largest that fits is {fits}.")
        self.model, self.s, self.eos, self.n_tokens = model, s, eos, n_tokens or cfg.vocab_size
        self.graphs = device.type == "cuda" if graphs is None else graphs
        self.cache = Cache(cfg, batch, length, device, weight.dtype)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)                     # the newest of every row
        self.key = torch.zeros(batch, dtype=torch.long, device=device)
        self.new = torch.zeros(batch, length + 1, dtype=torch.long, device=device)              # all new ones of every row
        self.turn = torch.zeros(batch, 1, dtype=torch.long, device=device)                      # how many those are
        self.captured, self.pool = {}, None
        with model.choice.under("graph"):
            self.forward = fused_step(model, self.cache) if self.graphs else model.step
        self.exact_length = self.forward != model.step  # the kernels look at what a row holds, no more
        kernels = fused_kernels(device) if self.graphs else None
        self.choose = kernels.choose if kernels and kernels.can_choose(s) else None

    def take(self, logits):
        """Chooses every row's next token from logits (B, vocab_size) and notes it."""
        logits = logits[:, :self.n_tokens]
        if self.choose:
            return self.choose(logits, self.s, self.key, self.cache.position, self.token, self.new, self.turn)
        draw = None if self.s.temperature == 0 else uniform(self.key, self.cache.position)
        self.token.copy_(pick(logits, self.s, draw)[:, None])
        self.new.scatter_(1, self.turn, self.token)
        self.turn += 1

    def step(self):
        self.take(self.forward(self.token, self.cache))

    def prefill(self, rows):
        """Stores the prompts and chooses the first new token of every row; rows that are missing repeat the last."""
        rows = rows + rows[-1:] * (len(self.key) - len(rows))
        device, width = self.key.device, max(len(row.prompt) for row in rows)
        prompts = torch.tensor([row.prompt + [0] * (width - len(row.prompt)) for row in rows]).to(device)
        lengths = torch.tensor([len(row.prompt) for row in rows]).to(device)
        self.key.copy_(torch.tensor([row.key for row in rows]))
        self.cache.position.zero_()
        self.turn.zero_()
        if width == 1:
            self.token.copy_(prompts)
            return self.advance(1)
        n = max(1, PREFILL // width)
        parts = [slice(i, i + n) for i in range(0, len(rows), n)]
        self.take(torch.cat([self.model.step(prompts[p], self.cache.rows(p.start, p.stop), lengths[p]) for p in parts]))

    def look(self, tokens):
        """Lets the steps look at the first `tokens` places of the cache at least; few sizes, since each has its own graph."""
        unit = self.cache.length if self.exact_length else max(64, -(-self.cache.length // 512) * 64)
        self.cache.seen = min(-(-tokens // unit) * unit, self.cache.length)

    def advance(self, tokens):
        """One step for every row, none of which then holds more than `tokens` tokens."""
        self.look(tokens)
        if not self.graphs:
            return self.step()
        if self.cache.seen not in self.captured:
            self.captured[self.cache.seen] = self.capture()
        self.captured[self.cache.seen].replay()

    def capture(self):
        """The step as a CUDA graph. The steps taken to warm up leave no trace: what they write is written again before it is read."""
        state = self.token, self.turn, self.cache.position
        saved = [t.clone() for t in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with self.model.choice.under("graph"):
            with torch.cuda.stream(side):
                self.step()
            torch.cuda.current_stream().wait_stream(side)
            for t, value in zip(state, saved):
                t.copy_(value)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self.step()
        self.pool = self.pool or graph.pool()
        return graph

    @torch.no_grad()
    def run(self, rows, chunk=32):
        """Continues up to `batch` rows; yields [(row, its new tokens since)] after the first token and then every `chunk` steps.

        The host waits for the device once per chunk. Rows that ended run along until the last one does.
        """
        began, done, longest = time.perf_counter(), 0, max(len(row.prompt) for row in rows)
        limits = [min(self.s.max_new_tokens, self.model.cfg.block_size - len(row.prompt)) for row in rows]
        self.prefill(rows)
        while True:
            wanted = min(1 if done == 0 else done + chunk, max(limits))
            for i in range(max(done, 1), wanted):
                self.advance(longest + i)
            tokens = self.new[:len(rows), done:wanted].tolist()
            fresh = [(row, self.note(row, new, limit, time.perf_counter() - began))
                     for row, new, limit in zip(rows, tokens, limits) if not row.finish]
            done = wanted
            yield fresh
            if all(row.finish for row in rows):
                return

    def note(self, row, tokens, limit, seconds):
        """Adds to a row those of the tokens that belong to it; returns them."""
        tokens = tokens[:limit - len(row.new)]
        if self.eos in tokens:
            tokens, row.finish = tokens[:tokens.index(self.eos)], "eos"
        row.new += tokens
        row.seconds = seconds
        if not row.finish and len(row.new) == limit:
            row.finish = "length" if limit == self.s.max_new_tokens else "context"
        return tokens
