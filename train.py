"""Trains a model:  python train.py config/quickstart.py --ffn=lowrank --rank=64
                 torchrun --nproc_per_node=8 train.py config/xl.py --ffn=lowrank --rank=512
Continues a run: python train.py --resume=auto --out_dir=out/xl

A run is a folder: config.json, metrics.jsonl, ckpt.pt (all that an exact continuation needs), model.pt (the result).
Which tokens a step sees, its learning rate and its guide are pure functions of (config, step). So a run can stop
anywhere and continue elsewhere, on another number of processes too.

The chapters: the plan, data order, one step, the loop, the command. run.py has the folder, the log and the checkpoints.
"""
import os
from dataclasses import dataclass

import config
from config import UserError


@dataclass
class Settings:
    dry_run: bool = False                # print sizes, steps and FLOPs as one JSON line, and stop


def read_settings(argv):
    """Command line -> (Config, Settings)."""
    cfg, settings = config.load(argv, Settings, usage=__doc__)
    continued = os.path.exists(os.path.join(cfg.out_dir, "config.json"))
    for name in () if continued else ("init_from", "distill"):
        if (path := getattr(cfg, name)) and not os.path.exists(path):
            raise UserError(f"{name}={path} does not exist: give a run folder or a model.pt.")
    return cfg, settings


if __name__ == "__main__":
    SETTINGS = config.run(read_settings)  # before torch loads; config says why

import collections
import contextlib
import itertools
import json
import math
import random
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import prepare
import run
from config import short
from device import device_name, in_memory, on_meta, peak_flops, set_up
from model import GPT, build, ffn_params, flops_per_token, load, load_weights
from optim import AdamW, MixedAdamW, Muon
from project import load_init, load_teacher, teacher_flops
from run import perplexity
from tokenizer import nominal_vocabulary


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
    """How far the learning rate has fallen at step 0, 1, ...: 0 until the last decay_ratio of the steps, then to 1."""
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
    """(momentum, weight decay) of Muon: the momentum is low while gradients turn quickly and again as the rate falls;
    the decay goes to 0 as a cosine, since late in a run weights have no time to grow back."""
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


def dropout_seed(cfg, step, rank) -> int:
    """Dropout is a function of step and rank, so that a continuation needs no state of a generator."""
    return int(random.Random(f"dropout {cfg.seed} {step} {rank}").getrandbits(63))


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


# ----------------------------------------------------------------------------------------------------------------------
# One step: model, optimiser, forward and backward

def make_optimizer(cfg, model, ranks):
    """AdamW or Muon; for bf16 on CUDA the model's matrices become bf16, cast once per step, not in every forward."""
    mixed = ranks.device.type == "cuda" and ranks.dtype is torch.bfloat16
    settings = dict(lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay)
    if cfg.optimizer == "muon":
        return Muon(model, cfg, mixed, ranks.compile)
    if mixed:
        return MixedAdamW(model.parameters(), **settings)
    return AdamW(model.parameters(), fused=ranks.device.type in ("cpu", "cuda"), **settings)


def full_weights(model, optimizer) -> dict:
    """The state dict, with the optimiser's fp32 masters instead of bf16 weights."""
    masters = {name: optimizer.master(p).detach() for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: masters.get(name, t) for name, t in model.state_dict().items()}


def moments(model, optimizer) -> dict:
    """{parameter's name: what the optimiser keeps of it}, without the masters, which are among the full weights."""
    names = {p: n for n, p in model.named_parameters()}
    return {names[p]: {k: v for k, v in state.items() if k != "master"} for p, state in optimizer.state.items()}


def start_or_continue(cfg, plan, ranks, state, data):
    """A new model, or the checkpoint's in the phase of its step -> (model, optimizer, finished steps)."""
    saved, path = None, os.path.join(cfg.out_dir, "ckpt.pt")
    if state == "continue":
        saved = run.read_checkpoint(path, "ckpt.pt")
        check_same_data(cfg, saved["data"], data.train)
        run.check_continues(cfg, saved, plan.steps, data.tokenizer.identity, path)
    step = saved["step"] if saved else 0
    model = build(cfg, ranks.device, None if saved else cfg.seed)
    originals = load_init(cfg, model, data, ranks) if cfg.init_from and not saved else {}
    if step < plan.guided:
        for _, module in model.structured_linears():
            module.start_guide(originals.get(module))
    if saved:
        load_weights(model, saved["model"], path)
    if cfg.distill:
        model.teacher = load_teacher(cfg, data.tokenizer, ranks)
    optimizer = make_optimizer(cfg, model, ranks)
    if saved:
        run.check_moments(saved, optimizer, model, path)
        for name, p in model.named_parameters():
            state = optimizer.state[p]
            for k, v in saved["optimizer"].get(name, {}).items():
                # torch's fused AdamW counts steps on the device, ours on the host
                state[k] = v.to(state[k].device if k in state else ranks.device, copy=True)
    return model, optimizer, step


def wrap_ddp(model, cfg, plan, step, ranks):
    """The model as the step calls it: under DDP where there are several processes."""
    if ranks.world == 1:
        return model
    unused = cfg.guide_skip and step < plan.guided  # a skipped layer's guide gets no gradient
    return DistributedDataParallel(model, device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
                                   gradient_as_bucket_view=True, find_unused_parameters=unused)


def end_guide(model, optimizer):
    """The switch: W leaves the model and the optimiser."""
    for _, module in model.structured_linears():
        optimizer.state.pop(module.W, None)
        module.end_guide()
    kept = {id(p) for p in model.parameters()}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in kept]


def train_step(wrapped, optimizer, micro_batches, cfg, ranks, lr, alpha=None, guided=()):
    """One optimiser step over (n_micro, micro_batch, T + 1) tokens -> (this rank's mean loss, gradient norm), both 0-d.

    They stay on the device. Nothing in here waits for it: the next launches are queued while it computes.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("ratio", 1)
    n, total = len(micro_batches), 0.0
    for i, batch in enumerate(micro_batches):
        last = i == n - 1
        if i:
            optimizer.accumulate(last)
        # the ranks' gradients are averaged once a step, with the last micro-batch's backward
        with contextlib.nullcontext() if last or ranks.world == 1 else wrapped.no_sync():
            with ranks.autocast():
                loss = wrapped(batch[:, :-1], batch[:, 1:], alpha, guided) / n
            loss.backward()
        total = total + loss.detach()
    norm = optimizer.step(cfg.grad_clip)
    optimizer.zero_grad(set_to_none=True)
    return total, norm


@torch.no_grad()
def evaluate(model, token_file, n_windows, cfg, ranks, alpha=None, guided=(), show=None) -> float:
    """Mean loss on the first n_windows windows of a token file, shared among the ranks; show(fraction) follows it."""
    model.eval()
    mine, losses, sizes = np.arange(ranks.rank, n_windows, ranks.world), [], []
    with ranks.agree():
        for i in range(0, len(mine), cfg.micro_batch_size):
            windows = read_windows(token_file, mine[i:i + cfg.micro_batch_size], cfg.block_size)
            check_ids(windows, cfg.vocab_size, token_file.path)
            batch = torch.full((cfg.micro_batch_size, cfg.block_size + 1), -1)  # always one shape: one compilation
            batch[:len(windows)] = torch.from_numpy(windows)
            batch = batch.to(ranks.device)
            with ranks.autocast():
                losses.append(model(batch[:, :-1].clamp(min=0), batch[:, 1:], alpha, guided))
            sizes.append(len(windows))
            if show:
                show(i / len(mine))
    model.train()
    # summed on the host in double precision: not every device has that
    total = math.fsum(loss * size for loss, size in zip(torch.stack(losses).tolist(), sizes)) if losses else 0.0
    if ranks.world > 1:
        total = ranks.sum_over_ranks(torch.tensor([total], dtype=torch.float64, device=ranks.device)).item()
    return total / n_windows


# ----------------------------------------------------------------------------------------------------------------------
# The loop

class Stop:
    """The first Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 lets the run finish its step and save; a second ends it at once."""

    SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]

    def __init__(self):
        self.signal, self.before, self.immediate = 0, None, False

    def __enter__(self):
        self.handlers = {s: signal.getsignal(s) for s in self.SIGNALS}
        for s in self.SIGNALS:
            if s == signal.SIGINT or self.handlers[s] is not signal.SIG_IGN:  # nohup makes a process ignore SIGHUP
                signal.signal(s, self.catch)
        return self

    def __exit__(self, *_):
        for s, handler in self.handlers.items():
            signal.signal(s, handler)

    def catch(self, number, frame):
        again, self.signal = self.signal, self.signal or number
        if again or self.immediate:
            raise KeyboardInterrupt(number)

    @contextlib.contextmanager
    def at_once(self):
        """Inside, a signal ends the run at once, since nothing is left to save; an earlier one does so on entry."""
        self.immediate = True
        if self.signal:
            raise KeyboardInterrupt(self.signal)
        yield
        self.immediate = False

    def agreed(self, ranks) -> int:
        """The signal that any rank has received, 0 without one. With several ranks all call it after every step.

        They learn what was known one step before. This step's maximum over the ranks is ready only when the device has
        finished the step, and waiting for it would delay the next launches; the one before is ready already.
        """
        if ranks.world == 1:
            return self.signal
        signals = torch.full((1,), float(self.signal), device=ranks.device)
        dist.all_reduce(signals, op=dist.ReduceOp.MAX)
        on_cuda = ranks.device.type == "cuda"
        new = torch.empty(1, pin_memory=on_cuda).copy_(signals, non_blocking=on_cuda)
        before, self.before = self.before, (new, torch.cuda.current_stream().record_event() if on_cuda else None)
        if before is None:
            return 0
        if on_cuda:
            before[1].synchronize()
        return int(before[0].item())


def start_card(cfg, plan, ranks, data) -> str:
    facts, peak, tokens = summary(cfg), peak_flops(ranks.device), cfg.block_size
    ffn = {"dense": "dense", "lowrank": f"lowrank rank {cfg.rank}",
           "blockshuffle": f"blockshuffle {cfg.nblocks} blocks",
           "blockdense": f"blockdense rank {cfg.rank}, {cfg.nblocks} blocks"}[cfg.ffn]
    replayed = f" + {plan.steps - plan.unique} steps replayed" if plan.steps > plan.unique else ""
    lines = [f"model    {cfg.n_layer} layers x {cfg.n_embd}, FFN {cfg.ffn_dim} {ffn}; "
             f"{short(facts['params'])} parameters, {short(facts['params_ffn'])} in FFNs"]
    if plan.guided:
        lines += [f"guide    {cfg.guide}, the first {plan.guided} steps of {plan.steps}, {cfg.guide_schedule}"
                  f"{', skip' if cfg.guide_skip else ''}; +{short(facts['params_guide'])} parameters until then"]
    if cfg.init_from:
        lines += [f"weights  {cfg.init_from}"]
    if cfg.distill:
        lines += [f"teacher  {cfg.distill}; loss = {cfg.distill_share:g} KL + {1 - cfg.distill_share:g} cross-entropy"]
    lines += [f"data     {config.data_dir(cfg)}: {short(data.train.count)} tokens, vocabulary {data.train.vocab_size}; "
              f"validation on {short(data.n_val * tokens)}, at the end {short(data.n_final * tokens)}",
              f"training {plan.steps} steps x {cfg.batch_size} x {cfg.block_size} = {short(facts['tokens'])} tokens, "
              f"{plan.unique * cfg.batch_size / data.n_windows:.2f} epochs{replayed}, {facts['train_flops']:.2e} FLOPs",
              f"device   {ranks.world} x {device_name(ranks.device)}, {str(ranks.dtype)[6:]}, "
              f"peak {short(peak) + 'FLOP/s' if peak else 'n/a'}, {'compiled' if ranks.compile else 'not compiled'}",
              f"folder   {cfg.out_dir}"]
    return "\n".join(lines)


def train(cfg, ranks, state, data):
    """The run, from its first or its checkpoint's step to model.pt."""
    plan = make_plan(cfg)
    with ranks.agree():
        model, optimizer, step = start_or_continue(cfg, plan, ranks, state, data)
    if ranks.compile:
        model.compile_parts()
    wrapped = wrap_ddp(model, cfg, plan, step, ranks)
    with ranks.agree():
        log = run.Log(cfg, ranks, step, step_flops(cfg, plan))
    log.show(start_card(cfg, plan, ranks, data))
    # Checksums of large files take minutes: a thread checks them during the first steps. Damage found ends the run
    # before the next checkpoint.
    raise_damage = prepare.verify_in_background(*(data.train, data.val) if ranks.master else ())
    if step:
        log.say(f"continuing after step {step} of {plan.steps}")
    alpha = torch.ones((), device=ranks.device)  # a tensor, so that a new value compiles nothing

    with Stop() as stop:
        for batch in batches(cfg, plan, data.train, data.n_windows, range(step, plan.steps), ranks):
            # one step
            lr, a, guided = lr_at(cfg, plan, step), alpha_at(cfg, plan, step), guided_layers(cfg, plan, step)
            if cfg.dropout:
                torch.manual_seed(dropout_seed(cfg, step, ranks.rank))
            if cfg.optimizer == "muon":
                optimizer.momentum, optimizer.decay = muon_at(cfg, plan, step)
            batch = batch.to(ranks.device, non_blocking=True)
            loss, norm = train_step(wrapped, optimizer, batch, cfg, ranks, lr, alpha.fill_(a), guided)
            step += 1
            if step == plan.guided:
                end_guide(model, optimizer)
                wrapped = wrap_ddp(model, cfg, plan, step, ranks)  # DDP's buckets still hold the guides

            # log
            if step % cfg.log_interval == 0 or step in (1, plan.steps):
                with ranks.agree():
                    log.step(step, loss, lr, norm, a)

            # validate and save
            if log.lost:
                stop.signal = stop.signal or signal.SIGTERM
            stopping = stop.agreed(ranks)
            saving = stopping or cfg.save_interval and step % cfg.save_interval == 0 or step == plan.steps
            validating = cfg.eval_interval and step % cfg.eval_interval == 0 and step < plan.steps
            if saving:
                log.check(step, "gradient norm", norm.item())
            if saving or validating:
                with log.pause(), ranks.agree():
                    if validating:
                        validate(cfg, plan, ranks, model, data, log, step, alpha)
                    raise_damage()
                    if saving and ranks.master:
                        run.save_checkpoint(cfg, full_weights(model, optimizer), step, data.tokenizer,
                                            data.train.checksum, moments(model, optimizer))
            if stopping:
                end_early(log, step, stopping)
        with ranks.agree():
            raise_damage(wait=True)
        finish(cfg, plan, ranks, model, optimizer, data, log, stop)


def validate(cfg, plan, ranks, model, data, log, step, alpha):
    """A validation during the run, of the model as the next step uses it: with the guide while there is one."""
    guided = tuple(range(cfg.n_dense_layers, cfg.n_layer)) if step < plan.guided else ()
    alpha.fill_(alpha_at(cfg, plan, step))
    log.validation(step, evaluate(model, data.val, data.n_val, cfg, ranks, alpha, guided))


def end_early(log, step, number):
    """After a signal and its checkpoint."""
    again = "the same command with --resume=auto continues it"
    if log.lost:
        raise UserError(f"the output cannot be written ({log.lost}): the run is saved after step {step}, {again}.")
    log.say(f"stopped after step {step} and saved; {again}")
    sys.exit(128 + number)


def finish(cfg, plan, ranks, model, optimizer, data, log, stop):
    """The final validation and model.pt. The last step is saved already, so a signal may end the validation at once."""
    try:
        with stop.at_once():
            val_loss = evaluate(model, data.val, data.n_final, cfg, ranks, show=log.final)
    except KeyboardInterrupt:
        log.say(f"stopped in the final validation; all {plan.steps} steps are saved, "
                "the same command with --resume=auto repeats it")
        raise
    with ranks.agree():
        log.validation(plan.steps, val_loss)
        if ranks.master:
            run.save_model(cfg, full_weights(model, optimizer), plan.steps, data.tokenizer, val_loss)
    log.end_card(val_loss, data.n_final * cfg.block_size, train_flops(cfg, plan))
    if log.lost:
        raise UserError(f"the output cannot be written ({log.lost}), but the run is finished: "
                        f"its model is in {cfg.out_dir}.")


# ----------------------------------------------------------------------------------------------------------------------
# The command

@dataclass
class Data:
    """The token files, their tokenizer, and the windows of block_size that a run uses of them."""
    train: prepare.TokenFile
    val: prepare.TokenFile
    tokenizer: object
    n_windows: int                       # of training
    n_val: int                           # of a validation during the run
    n_final: int                         # of the final validation


def count_validation(cfg, val_file, tokens):
    """Windows of a validation on at most `tokens` tokens."""
    n = count_windows(val_file, cfg.block_size)
    if n < 1:
        raise UserError(f"the validation data's {val_file.count} tokens do not fill one window of block_size "
                        f"{cfg.block_size} + 1: give more validation text, or train with a smaller block_size.")
    return min(n, max(1, tokens // cfg.block_size))


def open_data(cfg) -> Data:
    """The data, enough of it for one step. A vocab_size of 0 becomes that of the data, a larger one is padding."""
    train_file, val_file, tokenizer = prepare.open_data(cfg)
    vocabulary, n_windows = train_file.vocab_size, count_windows(train_file, cfg.block_size)
    if 0 < cfg.vocab_size < vocabulary:
        raise UserError(f"vocab_size={cfg.vocab_size} is smaller than the data's vocabulary of {vocabulary} in "
                        f"{config.data_dir(cfg)}: use at least {vocabulary}, or 0.")
    cfg.vocab_size = cfg.vocab_size or vocabulary
    n_val, n_final = (count_validation(cfg, val_file, tokens) for tokens in (cfg.eval_tokens, cfg.final_eval_tokens))
    if n_windows < cfg.batch_size:
        raise UserError(f"the training data's {train_file.count} tokens are {n_windows} windows of block_size "
                        f"{cfg.block_size}, less than one step of batch_size {cfg.batch_size}: "
                        "prepare more text, or lower block_size or batch_size.")
    return Data(train_file, val_file, tokenizer, n_windows, n_val, n_final)


def check_same_data(cfg, checksum, train_file):
    """UserError unless the run in out_dir began with this training data."""
    if checksum != train_file.checksum:
        raise UserError(f"{config.data_dir(cfg)} holds other training data than the run in {cfg.out_dir} began with: "
                        "restore it, or choose another --out_dir.")


def fill_vocabulary(cfg):
    """A vocab_size of 0 becomes that of the data where it is prepared, else what the tokenizer's name promises."""
    path = os.path.join(config.data_dir(cfg), "train.bin")
    if not cfg.vocab_size:
        there = os.path.exists(path)
        cfg.vocab_size = prepare.TokenFile(path).vocab_size if there else nominal_vocabulary(cfg.tokenizer)


def score(cfg):
    """eval_only: the loss of the model in out_dir on data_dir's validation file."""
    ranks = set_up(cfg)  # first: it chooses each rank's device
    with ranks, contextlib.ExitStack() as memory:
        model, trained, saved = load(cfg.out_dir, ranks.device)
        for block in model.blocks:
            block.ffn.kernels = cfg.kernels
        _, val_file, tokenizer = prepare.open_data(cfg)
        val_file.verify()
        if tokenizer.identity != saved["tokenizer"]["identity"]:
            raise UserError(f"the model in {cfg.out_dir} was trained with the tokenizer "
                            f"{saved['tokenizer']['identity']}, {config.data_dir(cfg)} holds tokens of "
                            f"{tokenizer.identity}: prepare the text with the model's.")
        trained.micro_batch_size = cfg.micro_batch_size
        n = count_validation(trained, val_file, cfg.final_eval_tokens)
        memory.enter_context(in_memory(trained, ranks, summary(trained)["params"]))
        if ranks.compile:
            model.compile_parts()
        loss = evaluate(model, val_file, n, trained, ranks)
        if not math.isfinite(loss):
            raise UserError(f"the loss of the model in {cfg.out_dir} is {loss}, its training has diverged: "
                            "train again with a lower lr.")
        if ranks.master:
            print(f"{cfg.out_dir} on {config.data_dir(cfg)}: loss {loss:.4f}, PPL {perplexity(loss):.2f} on "
                  f"{short(n * trained.block_size)} tokens")


def check_finished(cfg):
    """UserError where a command that finds a finished run names other data than the run's.

    Nothing is compared where the data or the checkpoint has been deleted since.
    """
    checksum = run.data_checksum(cfg.out_dir)
    there = os.path.exists(os.path.join(config.data_dir(cfg), "train.bin"))
    if checksum is not None and (there or config.data_dir(cfg) != config.data_dir(config.read_saved(cfg.out_dir))):
        check_same_data(cfg, checksum, prepare.open_data(cfg)[0])


def main(cfg, settings):
    if cfg.distill and not cfg.eval_only:
        cfg.teacher_flops = teacher_flops(cfg)
    if settings.dry_run:
        fill_vocabulary(cfg)
        print(json.dumps(summary(cfg)))
        return
    make_plan(cfg)
    if cfg.eval_only:
        score(cfg)
        return
    ranks = set_up(cfg)
    with ranks, contextlib.ExitStack() as mine:
        with ranks.agree():
            if ranks.master:
                run.check_free(cfg.out_dir)
        with ranks.agree():
            state = run.open_folder(cfg)
            if state == "finished":
                check_finished(cfg)
        if state == "finished":
            if ranks.master:
                print(f"{cfg.out_dir} holds a finished run; sample from it with: python sample.py {cfg.out_dir}")
            return
        with ranks.agree():
            if ranks.master:
                prepare.ensure_data(cfg)
        with ranks.agree():
            data = open_data(cfg)
        with ranks.agree():
            if ranks.master:
                mine.enter_context(run.owned(cfg.out_dir))  # only now: a command that is refused makes no folder
        with ranks.agree():
            if run.open_folder(cfg) != state:
                raise UserError(f"another process has trained in {cfg.out_dir} meanwhile: give the command again.")
        with in_memory(cfg, ranks, summary(cfg)["params"]):
            train(cfg, ranks, state, data)


if __name__ == "__main__":
    config.run(lambda argv: main(*SETTINGS))
