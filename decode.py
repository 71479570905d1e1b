"""Decoding: sampling a token, the memory of a batch, and the loop: prompts through a KV cache, then one step per token.

model.GPT.step is the reference of what a step computes. On CUDA `ops` may have the same step as fused kernels, and the
Decoder replays it as one CUDA graph together with sampling, so that the host only reads the finished tokens.
"""
import hashlib
import time
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, islice, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from config import UserError
from device import Upload, record_graph
from model import Cache, has_values, ops


# ----------------------------------------------------------------------------------------------------------------------
# Sampling a token. The random draws depend on (seed, prompt, number of the sample, position) and on nothing else.

def signed(x) -> int:
    """The int64 with the same bits as x modulo 2^64."""
    return (x + 2**63) % 2**64 - 2**63


# The constants of splitmix64, a counter-based generator: draw n of a key needs no state
GOLDEN, MIX1, MIX2 = map(signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def row_key(seed, prompt, number=0) -> int:
    """The key of the draws for the number-th sample of a prompt (token ids)."""
    return signed(int.from_bytes(hashlib.sha256(f"{seed} {number} {prompt}".encode()).digest()[:8], "little"))


def uniform(key, position):
    """splitmix64: one draw in [0, 1) per row from int64 key and position (B,). Products wrap, shifts are logical."""
    x = key + position * GOLDEN
    x = (x ^ (x >> 30) & 2**34 - 1) * MIX1
    x = (x ^ (x >> 27) & 2**37 - 1) * MIX2
    return (x >> 40 & 2**24 - 1).float() * 2.0**-24


def sample_token(logits, s, draw=None):
    """logits (B, V) -> the next tokens (B,).

    p = softmax(logits / temperature), filtered by top-k, then top-p, then min-p of s; the token is the first whose
    CDF exceeds draw (B,) x the probability that is left. Temperature 0: the argmax.
    """
    if s.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    # the largest logit becomes 0 before the division, so that it stays finite at any temperature
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(s.temperature, 1e-30)
    if 0 < s.top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(s.top_k).values[:, -1:], -torch.inf)
    p = logits.softmax(dim=-1)
    if s.top_p < 1:
        ordered, index = p.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= s.top_p  # the token that crosses top_p stays
        p = p.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), 0)
    if s.min_p:
        p = p.masked_fill(p < s.min_p * p.amax(dim=-1, keepdim=True), 0)
    cdf = p.cumsum(dim=-1)                                                             # (B, V)
    total = cdf[:, -1:]
    target = torch.minimum(draw[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp_(max=p.size(-1) - 1)


# ----------------------------------------------------------------------------------------------------------------------
# Memory

PREFILL = 8192  # most prompt tokens in one forward: enough to fill a large GPU


def token_bytes(cfg, dtype) -> int:
    """Bytes of keys and values per token."""
    return 2 * cfg.n_layer * cfg.n_kv_head * (cfg.attn_dim // cfg.n_head) * dtype.itemsize


def row_bytes(cfg, length, dtype) -> int:
    """Bytes of one more row of the batch: its cache, its logits with their copies in sample_token, its activations."""
    logits, activations = cfg.vocab_size * (dtype.itemsize + 20), 8 * (cfg.n_hidden + 4 * cfg.n_embd)
    return length * token_bytes(cfg, dtype) + logits + activations


def free_bytes(device):
    """Bytes that can still be allocated, or None where that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def rows_that_fit(cfg, length, device, dtype) -> int:
    """Rows of `length` tokens that fit into the memory that the weights leave; call it when the weights are loaded."""
    free = free_bytes(device)
    if free is None:
        return 2**20
    values = sum(has_values(cfg, layer) for layer in range(cfg.n_layer)) * cfg.attn_dim // cfg.n_head * cfg.n_kv_head
    token = (8 * cfg.n_embd + 2 * cfg.n_hidden + 4 * cfg.attn_dim + values) * dtype.itemsize  # activations of a token
    prompts = 2 * min(max(PREFILL, length), TOGETHER * length) * token                 # in a graph, and without one
    return max(0, int((0.95 * free - prompts - 2**28) // row_bytes(cfg, length, dtype)))


def padded(length, block_size) -> int:
    """Size of a buffer for `length` tokens: a multiple of 64, which attention kernels like, or the whole context."""
    return min(-(-length // 64) * 64, block_size)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts

SIZES = 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, PREFILL  # tokens of a CUDA graph
TOGETHER = 64  # most prompts in one forward


@dataclass
class Prompts:
    """Prompts, one after the other in one row of N tokens, on their way to empty rows of a cache.

    GPT.store takes them as it takes a Cache.

    row, at (N,): where the keys and values of each token go; row -1: nowhere, such tokens fill up a CUDA graph.
    ends (n + 1,) int32: 0 and where each prompt ends. longest: at least the tokens of the longest prompt.
    """
    cache: Cache
    row: torch.Tensor
    at: torch.Tensor
    ends: torch.Tensor
    longest: int

    def place(self, T):
        return self.at

    def before(self):
        return None

    def begins(self):
        return (self.at == 0)[None]                                                    # (1, N)

    def kept(self, T):
        return [LayerPrompts(self, k, v) for k, v in self.cache.every]

    @cached_property
    def spans(self):
        """[(begin, end)] of the prompts. One has the whole row, so that no graph has to read `ends`."""
        return [(0, len(self.row))] if len(self.ends) == 2 else list(pairwise(self.ends.tolist()))


class LayerPrompts(NamedTuple):  # k, v: one layer's of Cache.every, (rows, n_kv_head, length, head_size)
    prompts: Prompts
    k: torch.Tensor
    v: torch.Tensor

    def attend(self, q, k, v):
        """Stores k, v (1, N, n_kv_head, head_size); q (1, N, n_head, head_size) -> each prompt's attention, as q."""
        to = self.prompts
        if ops.ON and ops.can_store(k):
            ops.store(k[0], v[0], self.k, self.v, to.row, to.at)
        else:
            self.k[to.row, :, to.at], self.v[to.row, :, to.at] = k[0], v[0]
        if len(to.ends) > 2 and ops.ON and ops.can_attend_prompts(q.dtype, q.device, q.size(-1)):
            return ops.attend_prompts(q[0], k[0], v[0], to.ends, to.longest)[None]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                               # (1, heads, N, head_size)
        parts = [F.scaled_dot_product_attention(*(t[:, :, a:b] for t in (q, k, v)), is_causal=True,
                                                enable_gqa=k.size(1) < q.size(1)) for a, b in to.spans]
        return (torch.cat(parts, 2) if len(parts) > 1 else parts[0]).transpose(1, 2)   # (1, N, n_head, head_size)


# ----------------------------------------------------------------------------------------------------------------------
# The loop

CHUNK = 8  # steps between two looks at the new tokens
CHUNK_WHILE_WAITING = 2  # the same while prompts wait, since a row that has ended keeps its place until then
AHEAD = 32  # most prompts that are stored ahead of free places, in spare rows of the cache; at most two for each place


@dataclass
class Row:
    """One sequence: its prompt (token ids), the key of its draws, its result, and where it stands."""
    prompt: list
    key: int = 0
    new: list = field(default_factory=list)
    finish: str = ""                     # eos | length (max_new_tokens) | context (block_size)
    seconds: float = 0.0                 # from when it takes its place to its end
    began: float = 0.0
    limit: int = 0                       # new tokens at most
    steps: int = 0                       # steps launched so far; the host reads their tokens later
    at: int = -1                         # the row of the cache that holds its prompt


def that_fit(lengths) -> int:
    """How many prompts of these lengths, in this order, one forward holds: at least the first."""
    return max(1, sum(end <= PREFILL for end in accumulate(islice(lengths, TOGETHER))))


class Decoder:
    """Continues prompts, up to `batch` at a time, in static buffers of `length` tokens a row.

    s: temperature, top_k, top_p, min_p, max_new_tokens. eos: the token that ends a row (-1: none does). n_tokens: the
    first n_tokens ids may be sampled, the rest is padding of the vocabulary. graphs: replay each step as a CUDA graph.
    """

    def __init__(self, model, s, batch, length, eos=-1, n_tokens=0, graphs=None):
        cfg, weight = model.cfg, model.head.weight
        device, length = weight.device, padded(length, model.cfg.block_size)
        fits = rows_that_fit(cfg, length, device, weight.dtype)
        if batch > fits:
            needed, free = batch * row_bytes(cfg, length, weight.dtype) / 2**30, (free_bytes(device) or 0) / 2**30
            raise UserError(f"a batch of {batch} sequences of {length} tokens needs {needed:.1f} GiB, {free:.1f} are "
                            f"free: the largest that fits is {fits}.")
        self.model, self.s, self.eos, self.n_tokens = model, s, eos, n_tokens or cfg.vocab_size
        self.graphs = device.type == "cuda" if graphs is None else graphs
        self.spare = min(AHEAD, 2 * batch, fits - batch)
        self.cache = Cache(cfg, batch, length, device, weight.dtype, self.spare)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)                 # the newest of every row
        self.key = torch.zeros(batch, dtype=torch.long, device=device)
        self.new = torch.zeros(length + 1, batch, dtype=torch.long, device=device)          # those of the latest steps
        self.count, self.filled = torch.zeros(batch, 1, dtype=torch.long, device=device), 0  # its rows so far
        most = max(5 * batch, 3 * max(PREFILL, length) + TOGETHER + 1)                      # of `prefill` and `store`
        self.upload = Upload(torch.zeros(most, dtype=torch.long, device=device))
        self.recorded, self.prefills = {}, {}       # graphs: {cache.seen: of a step}, {(tokens, prompts): of prompts}
        size = cfg.attn_dim // cfg.n_head
        self.prompt_graphs = (self.graphs and ops.ON and ops.can_store(weight)
                              and ops.can_attend_prompts(weight.dtype, device, size))
        self.pool = None
        with model.speeds.launched("graph"):
            self.forward = self.graphs and ops.ON and ops.fused_step(model, self.cache) or model.step
        self.ignores_seen = self.forward != model.step  # fused attention reads the stored keys only, without cache.seen
        self.fused_sample = ops.sample if self.graphs and ops.ON and ops.can_sample(self.token, s) else None

    # A step

    def step(self):
        """One token for every row."""
        self.sample(self.forward(self.token, self.cache))

    def sample(self, logits):
        """Samples every row's next token from logits (B, vocab_size) and appends it to `new`."""
        logits = logits[:, :self.n_tokens]
        if self.fused_sample:
            return self.fused_sample(logits, self.s, self.key, self.cache.position, self.token, self.new, self.count)
        draw = None if self.s.temperature == 0 else uniform(self.key, self.cache.position)
        self.token.copy_(sample_token(logits, self.s, draw)[:, None])
        self.new.scatter_(0, self.count.T, self.token.T)
        self.count += 1

    def set_seen(self, tokens):
        """Attention reads at least the first `tokens` places of the cache. Few sizes, since each has its own graph."""
        unit = self.cache.length if self.ignores_seen else max(64, -(-self.cache.length // 512) * 64)
        self.cache.seen = min(-(-tokens // unit) * unit, self.cache.length)

    def advance(self, tokens):
        """One step for every row; `tokens`: the most that a row holds after it."""
        self.set_seen(tokens)
        if not self.graphs:
            return self.step()
        if self.cache.seen not in self.recorded:
            self.recorded[self.cache.seen] = self.record_step()
        self.recorded[self.cache.seen].replay()

    def record_step(self):
        """The step as a CUDA graph.

        The warm-up takes a real step. Its token and counters are restored; the keys it stores are written again before
        they are read.
        """
        state = self.token, self.count, self.cache.position, self.cache.newest
        saved = [t.clone() for t in state]
        graph = self.record(self.step)
        for t, value in zip(state, saved):
            t.copy_(value)
        return graph

    def record(self, run, warm=True):
        with self.model.speeds.launched("graph"):
            graph = record_graph(run, self.pool, warm)
        self.pool = self.pool or graph.pool()
        return graph

    # Prompts

    def prefill(self, changes):
        """changes {row of the cache: the Row that begins there, or None}; the rows after the places are spare.

        All tokens of a prompt but the last are stored; the next step reads the last one with those of the other rows.
        An empty place takes part in the steps as a row of one token, so that its attention costs nothing.
        """
        state, prompts = {}, []  # state: of each place token, position, newest, key
        for i, row in changes.items():
            *tokens, last = row.prompt if row else [0]
            if i < len(self.key):
                state[i] = last, len(tokens), tokens[-1] if tokens else 0, row.key if row else 0
            if row and row.at >= 0:
                self.cache.move(row.at, i, len(tokens))
            elif tokens:
                prompts.append((tokens, i))
            if row:
                row.at = i
        index, *values = self.upload([list(state), *zip(*state.values())])
        for tensor, value in zip((self.token[:, 0], self.cache.position, self.cache.newest, self.key), values):
            tensor.index_copy_(0, index, value)
        while prompts:
            n = that_fit(len(tokens) for tokens, _ in prompts)
            self.store(prompts[:n])
            prompts = prompts[n:]

    def store(self, prompts):
        """Stores prompts [(tokens, row of the cache)] in one forward, where that pays as a CUDA graph.

        A graph serves all rows, and all prompts of at most so many tokens together: what they lack is filled up. The
        first prompts of a size run without one: they are not worth a recording. All graphs share one pool of memory.
        """
        ends = [0, *accumulate(len(tokens) for tokens, _ in prompts)]
        N, n, longest = ends[-1], len(prompts), max(len(tokens) for tokens, _ in prompts)
        size = self.prompt_graphs and next((size for size in SIZES if size >= N), 0)
        if size:
            n, longest = TOGETHER if n > 1 else 1, min(size, self.cache.length)
        fill = (size or N) - N
        # always to one place in memory, where a graph reads them
        values = self.upload([
            *(token for tokens, _ in prompts for token in tokens), *[0] * fill,
            *(row for tokens, row in prompts for _ in tokens), *[-1] * fill,
            *(place for tokens, _ in prompts for place in range(len(tokens))), *[0] * fill,
            *ends, *[N] * (n + 1 - len(ends))])

        def run():
            tokens, row, place = values[:3 * (N + fill)].view(3, -1)
            self.model.store(tokens[None], Prompts(self.cache, row, place, values[-n - 1:].int(), longest))

        if not size:
            return run()
        shape = size, n
        if shape not in self.prefills:
            self.prefills[shape] = None
            with self.model.speeds.launched("graph"):  # the kernels that will be recorded
                return run()
        self.prefills[shape] = self.prefills[shape] or self.record(run, warm=False)
        self.prefills[shape].replay()

    # The loop

    @torch.no_grad()
    def run(self, rows, chunk=CHUNK):
        """Continues rows, `batch` at a time; where one ends, the next begins. Yields [(row, its latest tokens)] after
        the first step and then every `chunk` steps, or sooner. Of every max(4 x batch, 8 x spare) rows the longest
        prompts begin first.

        With CUDA graphs a chunk is launched before the tokens of the one before are read: the device does not wait for
        the host. So an EOS is seen one chunk late. Ends by length are known beforehand.
        """
        assert all(len(row.prompt) < self.model.cfg.block_size for row in rows), "a prompt leaves room for a token"
        places, stored, launched, steps, ahead = [None] * len(self.key), deque(), deque(), 1, 0
        # rows of like length share a step's attention more evenly; yet a text waits for few others
        window = max(4 * len(places), 8 * self.spare)
        waiting = deque(row for i in range(0, len(rows), window)
                        for row in sorted(rows[i:i + window], key=lambda row: -len(row.prompt)))
        while True:
            self.refill(places, stored, waiting)
            left = max((row.limit - row.steps for row in places if row), default=0)
            if not left and not launched:
                return
            if left:
                launched.append(self.launch(places, min(steps, left)))
            if not left or len(launched) > ahead:
                yield self.read(*launched.popleft())
            steps, ahead = min(chunk, CHUNK_WHILE_WAITING) if stored or waiting else chunk, int(self.graphs)

    def refill(self, places, stored, waiting):
        """Rows that have ended leave their places [Row or None] to those of `stored`, then to those of `waiting`.

        No row goes on during a forward of prompts, and a large forward takes about half as long for each token as a
        small one. So prompts are also stored in spare rows, ahead of free places, and move to a place at a copy's cost.
        """
        changes, now = {}, time.perf_counter()
        for i, row in enumerate(places):
            if row and (row.finish or row.steps == row.limit):
                places[i] = changes[i] = None
        free = [i for i, row in enumerate(places) if row is None]
        new = len(free) - len(stored)
        if new > 0 and waiting:
            new = max(new, min(new + self.spare, that_fit(len(row.prompt) for row in waiting)))
            stored.extend(waiting.popleft() for _ in range(min(new, len(waiting))))
        for i in free[:len(stored)]:
            places[i] = changes[i] = row = stored.popleft()
            row.limit = min(self.s.max_new_tokens, self.model.cfg.block_size - len(row.prompt))
            row.began = now
        changes |= {len(places) + i: row for i, row in enumerate(stored) if row.at < 0}
        if changes:
            self.prefill(changes)

    def launch(self, places, steps):
        """Steps for every row -> [(place, row)], their new tokens (steps, B) on the way to the host, the arrival."""
        running = [(i, row) for i, row in enumerate(places) if row]
        longest = max(len(row.prompt) + row.steps for _, row in running)
        if self.filled + steps > len(self.new):
            self.count.zero_()
            self.filled = 0
        first, self.filled = self.filled, self.filled + steps
        for i in range(steps):
            self.advance(longest + i)
        for _, row in running:
            row.steps = min(row.steps + steps, row.limit)
        on_cuda = self.key.is_cuda
        tokens = self.new[first:self.filled].to("cpu", non_blocking=on_cuda, copy=True)
        return running, tokens, torch.cuda.current_stream(self.key.device).record_event() if on_cuda else None

    def read(self, running, tokens, arrival):
        """Waits for the tokens of `launch` and appends them to their rows -> [(row, its tokens)]."""
        if arrival:
            arrival.synchronize()
        tokens, now = tokens.T.tolist(), time.perf_counter()
        return [(row, self.append(row, tokens[i], now - row.began)) for i, row in running if not row.finish]

    def append(self, row, tokens, seconds):
        """Appends the tokens to a row, up to its end; returns those."""
        tokens = tokens[:row.limit - len(row.new)]
        if self.eos in tokens:
            tokens, row.finish = tokens[:tokens.index(self.eos)], "eos"
        row.new += tokens
        row.seconds = seconds
        if not row.finish and len(row.new) == row.limit:
            row.finish = "length" if row.limit == self.s.max_new_tokens else "context"
        return tokens
