"""Decoding: sampling a token, the memory of a batch, and the loop: prompts through a KV cache, then one step per token.

model.GPT.step is the reference of what a step computes. On CUDA `ops` may have the same step as fused kernels, and the
Decoder replays it as one CUDA graph together with sampling, so that the host only reads the finished tokens.
"""
import hashlib
import time
from dataclasses import dataclass, field

import torch

from config import UserError
from device import record_graph
from model import Cache, ops


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

PREFILL = 16384  # most prompt tokens in one forward, padding included: enough to fill a large GPU


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


def largest_batch(cfg, length, device, dtype) -> int:
    """Rows of `length` tokens that fit into the memory that the weights leave; call it when the weights are loaded."""
    free = free_bytes(device)
    if free is None:
        return 2**20
    prompts = min(PREFILL, 64 * length) * (8 * cfg.n_embd + 2 * cfg.n_hidden + 4 * cfg.attn_dim) * dtype.itemsize
    return max(0, int((0.95 * free - prompts - 2**28) // row_bytes(cfg, length, dtype)))


def padded(length, block_size) -> int:
    """Size of a buffer for `length` tokens: a multiple of 64, which attention kernels like, or the whole context."""
    return min(-(-length // 64) * 64, block_size)


# ----------------------------------------------------------------------------------------------------------------------
# The loop

@dataclass
class Row:
    """One sequence: its prompt (token ids), the key of its draws, and its result."""
    prompt: list
    key: int = 0
    new: list = field(default_factory=list)
    finish: str = ""                     # eos | length (max_new_tokens) | context (block_size)
    seconds: float = 0.0                 # from the start of its batch to its end


class Decoder:
    """Continues up to `batch` prompts at a time in static buffers of `length` tokens a row.

    s: temperature, top_k, top_p, min_p, max_new_tokens. eos: the token that ends a row (-1: none does). n_tokens: the
    first n_tokens ids may be sampled, the rest is padding of the vocabulary. graphs: replay each step as a CUDA graph.
    """

    def __init__(self, model, s, batch, length, eos=-1, n_tokens=0, graphs=None):
        cfg, weight = model.cfg, model.head.weight
        device, length = weight.device, padded(length, model.cfg.block_size)
        fits = largest_batch(cfg, length, device, weight.dtype)
        if batch > fits:
            needed, free = batch * row_bytes(cfg, length, weight.dtype) / 2**30, (free_bytes(device) or 0) / 2**30
            raise UserError(f"a batch of {batch} sequences of {length} tokens needs {needed:.1f} GiB, {free:.1f} are "
                            f"free: the largest that fits is {fits}.")
        self.model, self.s, self.eos, self.n_tokens = model, s, eos, n_tokens or cfg.vocab_size
        self.graphs = device.type == "cuda" if graphs is None else graphs
        self.cache = Cache(cfg, batch, length, device, weight.dtype)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)                 # the newest of every row
        self.key = torch.zeros(batch, dtype=torch.long, device=device)
        self.new = torch.zeros(batch, length + 1, dtype=torch.long, device=device)          # all new ones of every row
        self.count = torch.zeros(batch, 1, dtype=torch.long, device=device)                 # how many of `new` are set
        self.recorded, self.pool = {}, None                                                 # {cache.seen: CUDA graph}
        with model.speeds.launched("graph"):
            self.forward = self.graphs and ops.ON and ops.fused_step(model, self.cache) or model.step
        self.exact_length = self.forward != model.step  # fused attention reads the stored keys only, without cache.seen
        self.fused_sample = ops.sample if self.graphs and ops.ON and ops.can_sample(self.token, s) else None

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
        self.new.scatter_(1, self.count, self.token)
        self.count += 1

    def prefill(self, rows):
        """Stores the prompts and samples every row's first new token; a batch that is not full repeats its last row."""
        rows = rows + rows[-1:] * (len(self.key) - len(rows))
        device, width = self.key.device, max(len(row.prompt) for row in rows)
        prompts = torch.tensor([row.prompt + [0] * (width - len(row.prompt)) for row in rows]).to(device)
        lengths = torch.tensor([len(row.prompt) for row in rows]).to(device)
        self.key.copy_(torch.tensor([row.key for row in rows]))
        self.cache.position.zero_()
        self.count.zero_()
        if width == 1:
            self.token.copy_(prompts)
            return self.advance(1)
        n = max(1, PREFILL // width)
        parts = [slice(i, i + n) for i in range(0, len(rows), n)]
        logits = [self.model.step(prompts[p], self.cache.rows(p.start, p.stop), lengths[p]) for p in parts]
        self.sample(torch.cat(logits))

    def set_seen(self, tokens):
        """Attention reads at least the first `tokens` places of the cache. Few sizes, since each has its own graph."""
        unit = self.cache.length if self.exact_length else max(64, -(-self.cache.length // 512) * 64)
        self.cache.seen = min(-(-tokens // unit) * unit, self.cache.length)

    def advance(self, tokens):
        """One step for every row; `tokens`: the most that a row holds after it."""
        self.set_seen(tokens)
        if not self.graphs:
            return self.step()
        if self.cache.seen not in self.recorded:
            self.recorded[self.cache.seen] = self.record()
        self.recorded[self.cache.seen].replay()

    def record(self):
        """The step as a CUDA graph.

        The warm-up takes a real step. Its token and counters are restored; the keys it stores are written again before
        they are read.
        """
        state = self.token, self.count, self.cache.position, self.cache.newest
        saved = [t.clone() for t in state]
        with self.model.speeds.launched("graph"):
            graph = record_graph(self.step, self.pool)
        for t, value in zip(state, saved):
            t.copy_(value)
        self.pool = self.pool or graph.pool()
        return graph

    @torch.no_grad()
    def run(self, rows, chunk=32):
        """Continues up to `batch` rows. Yields [(row, its latest tokens)] after the first and then every `chunk` steps.

        The host waits for the device once per chunk. Rows that have ended run along until the last one ends.
        """
        began, done, longest = time.perf_counter(), 0, max(len(row.prompt) for row in rows)
        limits = [min(self.s.max_new_tokens, self.model.cfg.block_size - len(row.prompt)) for row in rows]
        self.prefill(rows)
        while True:
            wanted = min(1 if done == 0 else done + chunk, max(limits))
            for i in range(max(done, 1), wanted):
                self.advance(longest + i)
            tokens = self.new[:len(rows), done:wanted].tolist()
            fresh = [(row, self.append(row, new, limit, time.perf_counter() - began))
                     for row, new, limit in zip(rows, tokens, limits) if not row.finish]
            done = wanted
            yield fresh
            if all(row.finish for row in rows):
                return

    def append(self, row, tokens, limit, seconds):
        """Appends the tokens to a row, up to its end; returns those."""
        tokens = tokens[:limit - len(row.new)]
        if self.eos in tokens:
            tokens, row.finish = tokens[:tokens.index(self.eos)], "eos"
        row.new += tokens
        row.seconds = seconds
        if not row.finish and len(row.new) == limit:
            row.finish = "length" if limit == self.s.max_new_tokens else "context"
        return tokens
