"""Trains a model:  python train.py config/quickstart.py --ffn=lowrank --rank=64
                 torchrun --nproc_per_node=8 train.py config/xl.py --ffn=lowrank --rank=512

A run is a folder: config.json, metrics.jsonl, ckpt.pt (everything an exact continuation needs), model.pt (the result). Which
tokens a step sees, its learning rate and its guide are pure functions of (config, step), so a run can stop anywhere and go on
elsewhere, on another number of processes too.
"""
from dataclasses import dataclass

import config


@dataclass
class Settings:
    dry_run: bool = False                # print sizes, steps and FLOPs as one JSON line, and stop


if __name__ == "__main__":
    SETTINGS = config.run(lambda argv: config.load(argv, Settings, usage=__doc__))  # a wrong setting is told before torch loads

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import prepare
from config import Config, UserError, short
from device import device_name, in_memory, peak_flops, pick_device, set_up
from model import GPT, build, ffn_params, flops_per_token, load, load_weights
from optim import AdamW, MixedAdamW, Muon
from run import atomic_write, read_checkpoint, read_json, read_metrics, save_beside, writing


# ----------------------------------------------------------------------------------------------------------------------
# The plan: everything about a step that is known before it runs

@dataclass
class Plan:
    """Steps of a run: `unique` on new data, the first `guided` of all with the guide, the last steps - unique a replay."""
    steps: int
    unique: int
    guided: int
    guide_ratio: float


def make_plan(cfg) -> Plan:
    """The paper's self-guided training: fixedstep guides a part of the steps; fixedflop adds as many structured-only steps on the same data.

    `replay` is fixedflop's control: its additional steps, never a guide.
    """
    unique = cfg.max_tokens // (cfg.batch_size * cfg.block_size)
    if unique < 1:
        raise UserError(f"max_tokens={cfg.max_tokens} is less than one step of batch_size {cfg.batch_size} x block_size {cfg.block_size} "
                        f"= {cfg.batch_size * cfg.block_size} tokens.")
    if unique > 1e8:
        raise UserError(f"max_tokens={cfg.max_tokens:.3g} are {unique:.3g} steps, more than 1e+08: lower max_tokens, or raise batch_size.")
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
            raise UserError(f"guide_ratio=auto looks for the training FLOPs of the dense model, but these factors alone cost {factors / dense:.2f} x as much: "
                            "lower rank, or give a guide_ratio.")
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
    """The layers whose FFN uses its guide in this step; with guide_skip each with probability alpha, drawn from (seed, step, layer)."""
    if step >= plan.guided:
        return ()
    alpha = alpha_at(cfg, plan, step)
    return tuple(layer for layer in range(cfg.n_dense_layers, cfg.n_layer)
                 if not cfg.guide_skip or random.Random(f"{cfg.seed} {step} {layer}").random() < alpha)


def step_flops(cfg, plan):
    """Training FLOPs of every step (steps,). With guide_skip the expected number: a guided layer-step costs alpha dense + (1 - alpha) factors."""
    dense, factors = flops_per_token(cfg, "dense"), flops_per_token(cfg)
    guided = np.array([alpha_at(cfg, plan, s) if cfg.guide_skip else 1.0 for s in range(plan.guided)])
    per_token = np.full(plan.steps, factors, dtype=float)
    per_token[:plan.guided] += guided * (dense - factors)
    return 3 * cfg.batch_size * cfg.block_size * per_token


def train_flops(cfg, plan) -> dict:
    """Training FLOPs by phase."""
    flops = step_flops(cfg, plan)
    return {"guided": float(flops[:plan.guided].sum()), "plain": float(flops[plan.guided:plan.unique].sum()), "replay": float(flops[plan.unique:].sum())}


def summary(cfg) -> dict:
    """What --dry_run prints: sizes by building the model without memory, the rest by the paper's rules."""
    plan = make_plan(cfg)
    flops = train_flops(cfg, plan)
    with torch.device("meta"):
        model = GPT(cfg)
    tokens = cfg.batch_size * cfg.block_size
    guide = sum(m.in_features * m.out_features for _, m in model.structured_linears()) if plan.guided else 0
    return {"params": sum(p.numel() for p in model.parameters()), "params_ffn": ffn_params(cfg), "params_guide": guide,
            "steps": plan.steps, "unique_steps": plan.unique, "guided_steps": plan.guided, "guide_ratio": round(plan.guide_ratio, 4),
            "tokens": plan.steps * tokens, "unique_tokens": plan.unique * tokens, "train_flops": float(f"{sum(flops.values()):.6g}"),
            "train_flops_by_phase": {k: float(f"{v:.6g}") for k, v in flops.items() if v}, "flops_per_token": flops_per_token(cfg),
            "vocab_size": cfg.vocab_size,
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
    """A keyed bijection of 0..n-1: a four-round Feistel network on the next even number of bits, walked until it is back below n."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    x = np.asarray(index, dtype=np.uint64).copy()
    todo = np.ones(len(x), dtype=bool)
    while todo.any():
        left, right = x[todo] >> half, x[todo] & mask
        for r in range(4):
            left, right = right, left ^ (mix(right ^ mix(np.uint64(key) + np.uint64(r))) & mask)
        x[todo] = (left << half) | right
        todo = x >= n
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
    """Dropout too is a function of the step, so that a continuation needs no generator's state."""
    return int(random.Random(f"dropout {cfg.seed} {step} {rank}").getrandbits(63))


def read_windows(tokens, windows, block_size):
    """tokens (count,), windows (n,) -> (n, block_size + 1) int64: inputs and the targets one further. Windows do not overlap."""
    at = windows[:, None] * block_size + np.arange(block_size + 1)
    return tokens[at].astype(np.int64)


def count_windows(token_file, block_size) -> int:
    return max(0, (token_file.count - 1) // block_size)


def check_ids(ids, vocab_size, path):
    """A damaged token file is told before it indexes what the model has not."""
    if ids.max() >= vocab_size:
        raise UserError(f"{path} holds the token id {ids.max()}, outside the vocabulary of {vocab_size}: {prepare.AGAIN}.")


def batches(cfg, plan, tokens, n_windows, steps, ranks):
    """Yields for each step this rank's (n_micro, micro_batch_size, block_size + 1) tokens, read ahead by a thread.

    Micro-batch m of rank r holds the sequences (m world + r) micro_batch_size ... of the step: together the ranks see the step's
    sequences once, whatever their number.
    """

    def make(step):
        windows = windows_of(cfg, step if step < plan.unique else step - plan.unique, n_windows)
        whole = read_windows(tokens, windows, cfg.block_size)                                   # of all ranks, so that all refuse the same
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
# Model, optimiser, one step

def make_optimizer(cfg, model, ranks):
    """AdamW or Muon; for bf16 on CUDA the model's matrices become bf16, cast once per step, not in every forward."""
    mixed = ranks.device.type == "cuda" and ranks.dtype is torch.bfloat16
    settings = dict(lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay)
    if cfg.optimizer == "muon":
        return Muon(model, cfg, mixed, ranks.compile)
    if mixed:
        return MixedAdamW(model.parameters(), **settings)
    return AdamW(model.parameters(), fused=ranks.device.type in ("cpu", "cuda"), **settings)


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
    """One optimiser step over (n_micro, micro_batch, T + 1) tokens -> (mean loss of this rank, gradient norm), both 0-d on the device."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("ratio", 1)
    n, total = len(micro_batches), 0.0
    for i, batch in enumerate(micro_batches):
        last = i == n - 1
        if i:
            optimizer.accumulate(last)
        with contextlib.nullcontext() if last or ranks.world == 1 else wrapped.no_sync():
            with ranks.autocast():
                loss = wrapped(batch[:, :-1], batch[:, 1:], alpha, guided) / n
            loss.backward()
        total = total + loss.detach()
    norm = optimizer.step(cfg.grad_clip)
    optimizer.zero_grad(set_to_none=True)
    return total, norm


@torch.no_grad()
def evaluate(model, token_file, n_windows, cfg, ranks, alpha=None, guided=()) -> float:
    """Mean loss on the first n_windows windows of a token file, shared among the ranks."""
    model.eval()
    total = torch.zeros(1, dtype=torch.float64, device=ranks.device)
    mine = np.arange(ranks.rank, n_windows, ranks.world)
    with ranks.agree():
        for i in range(0, len(mine), cfg.micro_batch_size):
            windows = read_windows(token_file.tokens, mine[i:i + cfg.micro_batch_size], cfg.block_size)
            check_ids(windows, cfg.vocab_size, token_file.path)
            batch = torch.full((cfg.micro_batch_size, cfg.block_size + 1), -1)                  # always one shape: one compilation
            batch[:len(windows)] = torch.from_numpy(windows)
            batch = batch.to(ranks.device)
            with ranks.autocast():
                loss = model(batch[:, :-1].clamp(min=0), batch[:, 1:], alpha, guided)
            total += loss.double() * len(windows)
    model.train()
    return ranks.sum_over_ranks(total).item() / n_windows


# ----------------------------------------------------------------------------------------------------------------------
# The run's folder

MAY_CHANGE = {"micro_batch_size", "eval_interval", "final_eval_tokens", "log_interval", "save_interval", "out_dir", "resume", "wandb",
              "wandb_project", "device", "compile", "recompute", "kernels", "eval_only", "data_dir", "input", "val_input", "dataset", "tokenizer"}


def open_folder(cfg):
    """Decides between a new run, a continuation and a finished run: returns "new", "continue" or "finished"; vocab_size 0 becomes the run's."""
    path = os.path.join(cfg.out_dir, "config.json")
    if not os.path.exists(path):
        return "new"
    if cfg.resume == "off":
        raise UserError(f"{cfg.out_dir} already holds a run: continue it with --resume=auto, or choose another --out_dir.")
    old = config.from_dict(read_json(path), path)
    cfg.vocab_size = cfg.vocab_size or old.vocab_size
    changed = [f.name for f in dataclasses.fields(Config) if f.name not in MAY_CHANGE and getattr(old, f.name) != getattr(cfg, f.name)]
    if changed:
        name = changed[0]
        raise UserError(f"{cfg.out_dir} holds a run with {name}={getattr(old, name)}, this command says {name}={getattr(cfg, name)}: "
                        "repeat its settings, or choose another --out_dir.")
    if os.path.exists(os.path.join(cfg.out_dir, "model.pt")):
        return "finished"
    return "continue" if os.path.exists(os.path.join(cfg.out_dir, "ckpt.pt")) else "new"


def full_weights(model, optimizer) -> dict:
    """The state dict with the optimiser's fp32 weights in the place of bf16 ones."""
    masters = {name: optimizer.master(p).detach() for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: masters.get(name, t) for name, t in model.state_dict().items()}


def save_checkpoint(cfg, model, optimizer, step, data_checksum):
    """Everything an exact continuation needs; the optimiser's state by parameter name."""
    names = {p: n for n, p in model.named_parameters()}
    moments = {names[p]: {k: v for k, v in state.items() if k != "master"} for p, state in optimizer.state.items()}
    save_beside({"config": config.to_dict(cfg), "model": full_weights(model, optimizer), "step": step, "data": data_checksum,
                 "optimizer": moments}, os.path.join(cfg.out_dir, "ckpt.pt"))


def start_or_continue(cfg, plan, ranks, state, data_checksum):
    """A new model, or the checkpoint's in the phase of its step -> (model, optimizer, finished steps)."""
    saved, path = None, os.path.join(cfg.out_dir, "ckpt.pt")
    if state == "continue":
        saved = read_checkpoint(path, "ckpt.pt")
        if saved["data"] != data_checksum:
            raise UserError(f"{config.data_dir(cfg)} holds other training data than the run in {cfg.out_dir} began with: "
                            "restore it, or choose another --out_dir.")
    step = saved["step"] if saved else 0
    model = build(cfg, ranks.device, None if saved else cfg.seed)
    if step < plan.guided:
        for _, module in model.structured_linears():
            module.start_guide()
    if saved:
        load_weights(model, saved["model"], path)
    optimizer = make_optimizer(cfg, model, ranks)
    if saved:
        for name, p in model.named_parameters():
            state = optimizer.state[p]  # torch's fused AdamW counts steps on the device, ours on the host
            state.update({k: v.to(state[k].device if k in state else ranks.device, copy=True) for k, v in saved["optimizer"].get(name, {}).items()})
    return model, optimizer, step


def save_model(cfg, weights, tokenizer, step, val_loss):
    """model.pt: all that sampling and scoring need."""
    save_beside({"config": config.to_dict(cfg), "model": weights, "step": step, "val_loss": val_loss,
                 "tokenizer": {"identity": tokenizer.identity, "blob": torch.frombuffer(bytearray(tokenizer.blob) or bytearray(1), dtype=torch.uint8)}},
                os.path.join(cfg.out_dir, "model.pt"))


def start_wandb(cfg):
    try:
        import wandb
    except ImportError:
        raise UserError("wandb=True needs the wandb package: pip install wandb, or leave it out (metrics.jsonl is always written).") from None
    try:
        return wandb.init(project=cfg.wandb_project, name=os.path.basename(cfg.out_dir), config=config.to_dict(cfg), dir=cfg.out_dir, resume="allow",
                          id=os.path.basename(os.path.abspath(cfg.out_dir)))
    except Exception as e:
        raise UserError(f"wandb did not start ({str(e).splitlines()[0] if str(e) else type(e).__name__}): log in, set WANDB_MODE=offline, or use --wandb=False.") from e


# ----------------------------------------------------------------------------------------------------------------------
# What the user reads

def perplexity(loss):
    return math.exp(loss) if loss < 700 else math.inf


def clock(seconds) -> str:
    s = int(seconds)
    return f"{s // 3600}h{s % 3600 // 60:02d}m" if s >= 3600 else f"{s // 60}m{s % 60:02d}s"


def start_card(cfg, plan, ranks, train, n_windows, n_val, n_final):
    facts, peak = summary(cfg), peak_flops(ranks.device)
    ffn = {"dense": "dense", "lowrank": f"lowrank rank {cfg.rank}", "blockshuffle": f"blockshuffle {cfg.nblocks} blocks",
           "blockdense": f"blockdense rank {cfg.rank}, {cfg.nblocks} blocks"}[cfg.ffn]
    guide = "" if not plan.guided else (f"guide    {cfg.guide}, the first {plan.guided} steps of {plan.steps}, {cfg.guide_schedule}"
                                           f"{', skip' if cfg.guide_skip else ''}; +{short(facts['params_guide'])} parameters until then\n")
    print(f"model    {cfg.n_layer} layers x {cfg.n_embd}, FFN {cfg.ffn_dim} {ffn}; {short(facts['params'])} parameters, {short(facts['params_ffn'])} in FFNs\n{guide}"
          f"data     {config.data_dir(cfg)}: {short(train.count)} tokens, vocabulary {train.vocab_size}; validation on {short(n_val * cfg.block_size)}, at the end {short(n_final * cfg.block_size)}\n"
          f"training {plan.steps} steps x {cfg.batch_size} x {cfg.block_size} = {short(facts['tokens'])} tokens, "
          f"{plan.unique * cfg.batch_size / n_windows:.2f} epochs{f' + {plan.steps - plan.unique} steps replayed' if plan.steps > plan.unique else ''}, "
          f"{facts['train_flops']:.2e} FLOPs\n"
          f"device   {ranks.world} x {device_name(ranks.device)}, {str(ranks.dtype)[6:]}, peak {short(peak) + 'FLOP/s' if peak else 'n/a'}, "
          f"{'compiled' if ranks.compile else 'not compiled'}\nfolder   {cfg.out_dir}", flush=True)


class Log:
    """What a run says as it goes: metrics.jsonl (one object a line, flushed at once), wandb if asked, and progress.

    On a terminal progress is one line that is rewritten; in a log file a line for each 1 % of the run or every five minutes,
    whichever comes first. Only rank 0 speaks. Rates leave out validation and saving.
    """

    def __init__(self, cfg, plan, ranks, step):
        self.cfg, self.plan, self.ranks, self.peak = cfg, plan, ranks, peak_flops(ranks.device)
        self.tokens_per_step = cfg.batch_size * cfg.block_size
        self.tty, self.next_step, self.next_time = sys.stdout.isatty(), 0, 0.0
        self.began = self.mark = time.time()
        self.mark_step, self.rate = step, None
        self.steady_tokens, self.steady_seconds, self.steady_flops = 0, 0.0, 0.0
        self.flops = np.concatenate(([0.0], np.cumsum(step_flops(cfg, plan))))                      # until each step
        if ranks.master:
            with atomic_write(os.path.join(cfg.out_dir, "config.json")) as temp, open(temp, "w") as f:
                self.wandb = start_wandb(cfg) if cfg.wandb else None  # before anything of the run is there
                json.dump(config.to_dict(cfg), f, indent=1)
            self.file = open_metrics(cfg, step, plan.steps)

    def write(self, **values):
        with writing(self.file.name):
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()
        if self.wandb:
            self.wandb.log({k: v for k, v in values.items() if v is not None}, step=values["step"])

    def step(self, step, loss, lr, norm, alpha):
        """A log step; loss and norm are tensors and the ranks' losses are averaged, so all ranks call it."""
        loss = (self.ranks.sum_over_ranks(loss.reshape(1)) / self.ranks.world).item()
        self.check(step, "loss", loss)
        seconds, tokens = time.time() - self.mark, (step - self.mark_step) * self.tokens_per_step
        flops = self.flops[step] - self.flops[self.mark_step]
        if self.mark_step > self.cfg.log_interval or not self.ranks.compile:  # the first steps compile
            self.steady_tokens, self.steady_seconds, self.steady_flops = self.steady_tokens + tokens, self.steady_seconds + seconds, self.steady_flops + flops
        self.mark, self.mark_step, self.rate = time.time(), step, tokens / seconds
        if not self.ranks.master:
            return
        self.mfu = flops / seconds / (self.peak * self.ranks.world) if self.peak else None
        self.write(step=step, tokens=step * self.tokens_per_step, loss=loss, lr=lr, grad_norm=norm.item(), alpha=alpha,
                   tokens_per_s=round(self.rate, 1), mfu=self.mfu and round(self.mfu, 4))
        left = (self.plan.steps - step) * self.tokens_per_step / self.rate
        text = (f"step {step}/{self.plan.steps}  loss {loss:.4f}  lr {lr:.2e}  {short(self.rate)} tokens/s"
                f"{f'  MFU {self.mfu:.1%}' if self.mfu else ''}  {clock(left)} left")
        if self.tty:
            print(f"\r\033[K{text}", end="", flush=True)
        elif step >= self.next_step or time.time() >= self.next_time or step == self.plan.steps:
            print(text, flush=True)
            self.next_step, self.next_time = step + self.plan.steps / 100, time.time() + 300

    def check(self, step, name, value):
        """A run that has left the numbers ends, before a checkpoint of it takes the place of a good one."""
        if not math.isfinite(value):
            raise UserError(f"the {name} is {value} at step {step}: start again with a lower lr or grad_clip, in another --out_dir.")

    def validation(self, step, loss):
        self.check(step, "validation loss", loss)
        if self.ranks.master:
            self.write(step=step, val_loss=loss, val_ppl=perplexity(loss))
            self.say(f"step {step}/{self.plan.steps}  validation loss {loss:.4f}  PPL {perplexity(loss):.2f}")

    def say(self, text):
        if self.ranks.master:
            print(f"\r\033[K{text}" if self.tty else text, flush=True)

    @contextlib.contextmanager
    def pause(self):
        """Time inside does not count as training."""
        began = time.time()
        yield
        self.mark += time.time() - began

    def end_card(self, val_loss, n_final):
        rate = self.steady_tokens / self.steady_seconds if self.steady_seconds else self.rate       # None: no step was left to do
        mfu = self.steady_flops / self.steady_seconds / (self.peak * self.ranks.world) if self.peak and self.steady_seconds else None
        memory = f"{torch.cuda.max_memory_allocated(self.ranks.device) / 2**30:.1f} GiB" if self.ranks.device.type == "cuda" else "n/a"
        phases = ", ".join(f"{name} {flops:.2e}" for name, flops in train_flops(self.cfg, self.plan).items() if flops)
        self.say(f"done     validation loss {val_loss:.4f}, PPL {perplexity(val_loss):.2f} on {short(n_final * self.cfg.block_size)} tokens\n"
                 f"speed    {short(rate) if rate else 'n/a'} tokens/s, MFU {f'{mfu:.1%}' if mfu else 'n/a'}, peak memory {memory}, {clock(time.time() - self.began)} in all\n"
                 f"FLOPs    {phases}\nnext     python sample.py {self.cfg.out_dir}")


def open_metrics(cfg, step, last):
    """metrics.jsonl for appending, cut back to the checkpoint's step so that no step stands twice; the validation behind the `last` step comes again."""
    path = os.path.join(cfg.out_dir, "metrics.jsonl")
    rows = read_metrics(path, last) if step and os.path.exists(path) else []
    with atomic_write(path) as temp, open(temp, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows if row["step"] <= step and not (row["step"] == last and "val_loss" in row))
    return open(path, "a")


# ----------------------------------------------------------------------------------------------------------------------
# The loop

class Stop:
    """Ctrl-C or SIGTERM: the run finishes its step, saves and ends; a second signal ends it at once."""

    def __init__(self):
        self.signal, self.asked = 0, None
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.catch)

    def catch(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self, ranks) -> int:
        """The signal that any rank has received, 0 without one. With several ranks all call it after every step, and learn what was
        known one step before: so nobody waits for the device.
        """
        if ranks.world == 1:
            return self.signal
        signals = torch.full((1,), float(self.signal), device=ranks.device)
        dist.all_reduce(signals, op=dist.ReduceOp.MAX)
        on_cuda = ranks.device.type == "cuda"
        new = torch.empty(1, pin_memory=on_cuda).copy_(signals, non_blocking=on_cuda)
        before, self.asked = self.asked, (new, torch.cuda.current_stream().record_event() if on_cuda else None)
        if before is None:
            return 0
        if on_cuda:
            before[1].synchronize()
        return int(before[0].item())


def count_validation(cfg, val_file):
    n = count_windows(val_file, cfg.block_size)
    if n < 1:
        raise UserError(f"the validation data's {val_file.count} tokens do not fill one window of block_size {cfg.block_size} + 1: "
                        "give more validation text, or train with a smaller block_size.")
    return n


def check_data(cfg, train_file, val_file):
    """(windows of training, of a validation during the run, of the final one); too little of them is refused with the arithmetic."""
    n_windows, n_val = count_windows(train_file, cfg.block_size), count_validation(cfg, val_file)
    if n_windows < cfg.batch_size:
        raise UserError(f"the training data's {train_file.count} tokens are {n_windows} windows of block_size {cfg.block_size}, less than one step of "
                        f"batch_size {cfg.batch_size}: prepare more text, or lower block_size or batch_size.")
    return n_windows, min(n_val, max(1, cfg.eval_tokens // cfg.block_size)), min(n_val, max(1, cfg.final_eval_tokens // cfg.block_size))


def nominal_vocabulary(tokenizer) -> int:
    """The vocabulary a tokenizer's name promises, for a dry run."""
    known = {"byte": 257, "gpt2": 50257, "llama": 32000}
    size = known.get(tokenizer) or tokenizer.removeprefix("spm:")
    if not str(size).isdigit():
        raise UserError(f"the vocabulary of tokenizer={tokenizer} is not known without its file: give --vocab_size for a dry run.")
    return int(size)


def match_vocabulary(cfg, data_vocab):
    """vocab_size 0 becomes the data's; a larger one is padding."""
    if 0 < cfg.vocab_size < data_vocab:
        raise UserError(f"vocab_size={cfg.vocab_size} is smaller than the data's vocabulary of {data_vocab} in {config.data_dir(cfg)}: "
                        f"use at least {data_vocab}, or 0.")
    cfg.vocab_size = cfg.vocab_size or data_vocab


def train(cfg, ranks, state, train_file, val_file, tokenizer):
    """The run, from its first or its checkpoint's step to model.pt."""
    plan = make_plan(cfg)
    with ranks.agree():
        n_windows, n_val, n_final = check_data(cfg, train_file, val_file)
        model, optimizer, step = start_or_continue(cfg, plan, ranks, state, train_file.checksum)
    if ranks.compile:
        model.compile_parts()
    wrapped = wrap_ddp(model, cfg, plan, step, ranks)
    with ranks.agree():
        log, stop = Log(cfg, plan, ranks, step), Stop()
    if ranks.master:
        start_card(cfg, plan, ranks, train_file, n_windows, n_val, n_final)
    if step:
        log.say(f"continuing after step {step} of {plan.steps}")
    alpha = torch.ones((), device=ranks.device)
    every_guide = tuple(range(cfg.n_dense_layers, cfg.n_layer))

    for batch in batches(cfg, plan, train_file.tokens, n_windows, range(step, plan.steps), ranks):
        # one step
        lr, a, guided = lr_at(cfg, plan, step), alpha_at(cfg, plan, step), guided_layers(cfg, plan, step)
        if cfg.dropout:
            torch.manual_seed(dropout_seed(cfg, step, ranks.rank))
        if cfg.optimizer == "muon":
            optimizer.momentum, optimizer.decay = muon_at(cfg, plan, step)
        loss, norm = train_step(wrapped, optimizer, batch.to(ranks.device, non_blocking=True), cfg, ranks, lr, alpha.fill_(a), guided)
        step += 1
        if step == plan.guided:
            end_guide(model, optimizer)
            wrapped = wrap_ddp(model, cfg, plan, step, ranks)

        # what it says and what it keeps
        logging = step % cfg.log_interval == 0 or step in (1, plan.steps)
        if logging:
            with ranks.agree():
                log.step(step, loss, lr, norm, a)
        stopping = stop.agreed(ranks)
        saving = stopping or cfg.save_interval and step % cfg.save_interval == 0 or step == plan.steps
        validating = cfg.eval_interval and step % cfg.eval_interval == 0 and step < plan.steps
        if saving:
            log.check(step, "gradient norm", norm.item())
        if saving or validating:
            with log.pause(), ranks.agree():
                if validating:
                    guides = every_guide if step < plan.guided else ()
                    log.validation(step, evaluate(model, val_file, n_val, cfg, ranks, alpha.fill_(alpha_at(cfg, plan, step)), guides))
                if saving and ranks.master:
                    save_checkpoint(cfg, model, optimizer, step, train_file.checksum)
        if stopping and step < plan.steps:
            log.say(f"stopped after step {step} and saved; the same command with --resume=auto goes on")
            sys.exit(128 + stopping)

    val_loss = evaluate(model, val_file, n_final, cfg, ranks)
    with ranks.agree():
        log.validation(step, val_loss)
        if ranks.master:
            save_model(cfg, full_weights(model, optimizer), tokenizer, step, val_loss)
    log.end_card(val_loss, n_final)


def score(cfg):
    """eval_only: the loss of out_dir's finished model on data_dir's validation file."""
    device = pick_device(cfg.device)
    model, trained, saved = load(cfg.out_dir, device)
    _, val_file, tokenizer = prepare.open_data(cfg)
    if tokenizer.identity != saved["tokenizer"]["identity"]:
        raise UserError(f"the model in {cfg.out_dir} was trained with the tokenizer {saved['tokenizer']['identity']}, "
                        f"{config.data_dir(cfg)} holds tokens of {tokenizer.identity}: prepare the text with the model's.")
    trained.micro_batch_size = cfg.micro_batch_size
    n = min(count_validation(trained, val_file), max(1, cfg.final_eval_tokens // trained.block_size))
    ranks = set_up(dataclasses.replace(trained, device=cfg.device, dtype=cfg.dtype, compile=cfg.compile, batch_size=cfg.batch_size))
    with ranks, in_memory(trained, ranks.device, summary(trained)["params"]):
        if ranks.compile:
            model.compile_parts()
        loss = evaluate(model, val_file, n, trained, ranks)
        if not math.isfinite(loss):
            raise UserError(f"the loss of the model in {cfg.out_dir} is {loss}: its training has left the numbers, train it again with a lower lr.")
        if ranks.master:
            print(f"{cfg.out_dir} on {config.data_dir(cfg)}: loss {loss:.4f}, PPL {perplexity(loss):.2f} on {short(n * trained.block_size)} tokens")


def main(cfg, settings):
    if settings.dry_run:
        cfg.vocab_size = cfg.vocab_size or nominal_vocabulary(cfg.tokenizer)
        print(json.dumps(summary(cfg)))
        return
    make_plan(cfg)
    if cfg.eval_only:
        score(cfg)
        return
    state = open_folder(cfg)
    if state == "finished":
        print(f"{cfg.out_dir} holds a finished run; sample from it with: python sample.py {cfg.out_dir}")
        return
    ranks = set_up(cfg)
    with ranks:
        with ranks.agree():
            if ranks.master:
                prepare.ensure_data(cfg)
        with ranks.agree():
            train_file, val_file, tokenizer = prepare.open_data(cfg)
            match_vocabulary(cfg, train_file.vocab_size)
        with in_memory(cfg, ranks.device, summary(cfg)["params"]):
            train(cfg, ranks, state, train_file, val_file, tokenizer)


if __name__ == "__main__":
    config.run(lambda argv: main(*SETTINGS))
