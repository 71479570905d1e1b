"""What a step is: pure functions of (config, step), the same on every rank and after every resume.

How many steps there are and which have a guide, their learning rates, skip draws and FLOPs; then the data order.
"""
import collections
import itertools
import math
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

import config
import prepare
from config import UserError
from device import on_meta
from model import GPT, ffn_params, flops_per_token


# ----------------------------------------------------------------------------------------------------------------------
# The plan: everything about a step that is known before it runs

@dataclass
class Plan:
    """Steps of a run: `unique` on new data, the first `guided` with the guide, the last `steps - unique` a replay."""
    steps: int
    unique: int
    guided: int
    guide_ratio: float


def make_plan(cfg) -> Plan:
    """The paper's self-guided training: fixedstep guides a part of the steps.

    fixedflop adds as many steps without guide, on the data of the guided ones. `replay` is its control: no guide.
    """
    unique = cfg.max_tokens // (cfg.batch_size * cfg.block_size)
    if unique < 1:
        raise UserError(f"max_tokens={cfg.max_tokens} is less than one step of batch_size {cfg.batch_size} x "
                        f"block_size {cfg.block_size} = {cfg.batch_size * cfg.block_size} tokens.")
    if unique > 2e6:
        raise UserError(f"max_tokens={cfg.max_tokens:.3g} are {unique:.3g} steps, more than 2e+06: "
                        "lower max_tokens, or raise batch_size.")
    ratio = cfg.guide_ratio
    if cfg.guide == "off":
        ratio = 0.0
    elif ratio == "auto" and cfg.guide == "fixedstep":
        ratio = 0.5
    elif ratio == "auto":  # g F_added + N F_factors = N F_dense; a guided forward is one dense matmul per linear
        dense, factors = flops_per_token(cfg, "dense"), flops_per_token(cfg)
        added = factors if cfg.guide == "replay" else (dense + factors) / 2 if cfg.guide_skip else dense
        ratio = min(1.0, (dense - factors) / added)
        if ratio < 0:
            raise UserError("guide_ratio=auto means the training FLOPs of the dense model, but these factors alone "
                            f"cost {factors / dense:.2f} x as much: lower rank, or give a guide_ratio.")
    count = round(ratio * unique)
    return Plan(steps=unique + (count if cfg.guide in ("fixedflop", "replay") else 0), unique=unique,
                guided=0 if cfg.guide == "replay" else count, guide_ratio=ratio)


def fallen(cfg, plan, step) -> float:
    """How much of its fall the learning rate has done at step 0, 1, ...: 0 until the last decay_ratio of the steps,
    then rising linearly to 1."""
    start = max(warmup_steps(cfg, plan), plan.steps - round(cfg.decay_ratio * plan.steps))
    return max(0, step - start) / max(1, plan.steps - start)


def warmup_steps(cfg, plan) -> int:
    return min(cfg.warmup_steps, plan.steps) or round(cfg.warmup_ratio * plan.steps)


def lr_at(cfg, plan, step) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, constant, then a cosine or a line to min_lr_ratio x lr."""
    warmup, t = warmup_steps(cfg, plan), fallen(cfg, plan, step)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    left = 1 - t if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * t))
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * left)


def muon_at(cfg, plan, step) -> tuple:
    """(momentum, weight decay) of Muon. The momentum is lower while gradients turn quickly and while the rate falls.
    The decay falls to 0 as a cosine, since late in a run weights have no time to grow back."""
    momentum = 0.85 + 0.12 * min(1, step / 400) - 0.07 * fallen(cfg, plan, step)
    return momentum, cfg.weight_decay * 0.5 * (1 + math.cos(math.pi * step / plan.steps))


def alpha_at(cfg, plan, step) -> float:
    """Weight of the guide: 1 at step 0, 0 from step `guided` on."""
    if step >= plan.guided:
        return 0.0
    t = step / plan.guided
    return 1 - t if cfg.guide_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * t))


def guided_layers(cfg, plan, step) -> tuple:
    """The layers whose FFN uses its guide in this step; with guide_skip each with probability alpha.

    The draw depends on (seed, step, layer) alone, so all ranks and every continuation make the same one.
    """
    if step >= plan.guided:
        return ()
    alpha = alpha_at(cfg, plan, step)
    return tuple(layer for layer in range(cfg.n_dense_layers, cfg.n_layer)
                 if not cfg.guide_skip or random.Random(f"{cfg.seed} {step} {layer}").random() < alpha)


def step_flops(cfg, plan):
    """Training FLOPs of every step (steps,), a teacher's too; with guide_skip alpha dense + (1 - alpha) factors."""
    dense, factors = flops_per_token(cfg, "dense"), flops_per_token(cfg)
    guided = np.array([alpha_at(cfg, plan, s) if cfg.guide_skip else 1.0 for s in range(plan.guided)])
    per_token = np.full(plan.steps, factors, dtype=float)
    per_token[:plan.guided] += guided * (dense - factors)
    return cfg.batch_size * cfg.block_size * (3 * per_token + cfg.teacher_flops)


def train_flops(cfg, plan) -> dict:
    """Training FLOPs by phase, and those of the teacher's forwards."""
    teacher = cfg.batch_size * cfg.block_size * cfg.teacher_flops
    flops = step_flops(cfg, plan) - teacher
    return {"guided": float(flops[:plan.guided].sum()), "plain": float(flops[plan.guided:plan.unique].sum()),
            "replay": float(flops[plan.unique:].sum()), "teacher": plan.steps * teacher}


def summary(cfg) -> dict:
    """What --dry_run prints: sizes by building the model without memory, the rest by the paper's rules."""
    plan = make_plan(cfg)
    flops = train_flops(cfg, plan)
    with on_meta():
        model = GPT(cfg)
    tokens = cfg.batch_size * cfg.block_size
    guide = sum(m.in_features * m.out_features for _, m in model.structured_linears()) if plan.guided else 0
    return {"params": sum(p.numel() for p in model.parameters()), "params_ffn": ffn_params(cfg), "params_guide": guide,
            "steps": plan.steps, "unique_steps": plan.unique, "guided_steps": plan.guided,
            "guide_ratio": round(plan.guide_ratio, 4), "tokens": plan.steps * tokens,
            "unique_tokens": plan.unique * tokens, "train_flops": float(f"{sum(flops.values()):.6g}"),
            "train_flops_by_phase": {k: float(f"{v:.6g}") for k, v in flops.items() if v},
            "flops_per_token": flops_per_token(cfg), "vocab_size": cfg.vocab_size,
            "rates": {name: getattr(cfg, name) for name in config.RATES if getattr(cfg, name) != "auto"}}


# ----------------------------------------------------------------------------------------------------------------------
# Data order: step -> windows of the token file

def mix(x):
    """A 64-bit hash of uint64 arrays (the splitmix64 finaliser)."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index, n, key):
    """A keyed bijection of 0..n-1, so that a shuffled epoch needs no array in memory and no state in a checkpoint.

    Four rounds of a Feistel network permute 0..2^(2 half)-1, which may be more than n. An image that is n or more is
    permuted again, along its cycle, until it is below n. The cycle began below n and comes back, so this ends; and no
    two indices meet, for each cycle keeps its order. At least a quarter of the images are below n, so it ends soon.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    x = np.asarray(index, dtype=np.uint64).copy()
    todo = np.ones(len(x), dtype=bool)
    while todo.any():
        left, right = x[todo] >> half, x[todo] & mask
        for r in range(4):
            left, right = right, left ^ (mix(right ^ mix(np.uint64(key) + np.uint64(r))) & mask)
        x[todo] = (left << half) | right
        todo = x >= n  # these walk on along their cycles
    return x.astype(np.int64)


@np.errstate(over="ignore")
def windows_of(cfg, data_step, n_windows):
    """The windows (batch_size,) of a step's sequences: every epoch is a new permutation of all windows."""
    sequence = data_step * cfg.batch_size + np.arange(cfg.batch_size)
    windows = np.empty(cfg.batch_size, dtype=np.int64)
    for epoch in np.unique(sequence // n_windows):
        mine = sequence // n_windows == epoch
        key = mix(mix(np.uint64([cfg.seed])) ^ np.uint64(epoch))[0]
        windows[mine] = permute(sequence[mine] % n_windows, n_windows, key)
    return windows


@np.errstate(over="ignore")
def dropout_keys(cfg, step, ranks):
    """The keys of a step's dropout (n_micro, 1 + 2 n_layer, micro_batch_size) int64, for this rank's sequences.

    A key is a hash of (seed, step, sequence of the step, place in the model). So a continuation needs no state, and
    neither the number of processes nor the size of a micro-batch changes what is drawn.
    """
    sequences = np.arange(cfg.batch_size, dtype=np.uint64).reshape(-1, ranks.world, 1, cfg.micro_batch_size)
    places = np.arange(1 + 2 * cfg.n_layer, dtype=np.uint64)[:, None]
    key = mix(mix(np.uint64([cfg.seed]) ^ np.uint64(0x64726F70)) ^ np.uint64(step))
    keys = mix(mix(key ^ sequences[:, ranks.rank]) ^ places) >> np.uint64(2)     # 62 bits: a positive int64
    return torch.from_numpy(keys.astype(np.int64))


def read_windows(token_file, windows, block_size):
    """windows (n,) -> (n, block_size + 1) int64: inputs and, one further, targets; without overlap."""
    return token_file.read(windows * block_size, block_size + 1)


def count_windows(token_file, block_size) -> int:
    return max(0, (token_file.count - 1) // block_size)


def check_ids(ids, vocab_size, path):
    """UserError for a damaged token file, before an id indexes beyond the model's embeddings."""
    if ids.max() >= vocab_size:
        raise UserError(f"{path} holds the token id {ids.max()}, outside the vocabulary of {vocab_size}: "
                        f"{prepare.AGAIN}.")


def batches(cfg, plan, token_file, n_windows, steps, ranks):
    """Yields for each step this rank's (n_micro, micro_batch_size, block_size + 1) tokens, prefetched by a thread.

    Micro-batch m of rank r holds the sequences (m world + r) micro_batch_size ... of the step. So the ranks together
    see the step's sequences once, whatever their number.
    """

    def make(step):
        windows = windows_of(cfg, step if step < plan.unique else step - plan.unique, n_windows)
        whole = read_windows(token_file, windows, cfg.block_size)  # of all ranks, so that all raise the same error
        check_ids(whole, cfg.vocab_size, os.path.join(config.data_dir(cfg), "train.bin"))
        mine = whole.reshape(-1, ranks.world, cfg.micro_batch_size, cfg.block_size + 1)[:, ranks.rank]
        batch = torch.from_numpy(np.ascontiguousarray(mine))
        return batch.pin_memory() if ranks.device.type == "cuda" else batch

    steps = iter(steps)
    with ThreadPoolExecutor(1) as pool:
        ahead = collections.deque(pool.submit(make, step) for step in itertools.islice(steps, 4))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(pool.submit(make, step) for step in itertools.islice(steps, 1))
            yield batch
