"""Trains a model:  python train.py config/quickstart.py --ffn=lowrank --rank=64
                 torchrun --nproc_per_node=8 train.py config/xl.py --ffn=lowrank --rank=512
Continues a run: python train.py --resume=auto --out_dir=out/xl

A run is a folder: config.json, metrics.jsonl, ckpt.pt (all that an exact continuation needs), model.pt (the result).
Which tokens a step sees, its learning rate and its guide are pure functions of (config, step). So a run can stop
anywhere and continue elsewhere, on another number of processes too.

The chapters: model and optimizer, one step, the loop, the command. schedule.py has the plan and the data order, run.py
the folder and the log, checkpoint.py what is saved.
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
    config.place_among_processes()  # refuses a wrong one before torch loads
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        cfg.resume = "auto"  # torchrun --max-restarts starts the same command again
    continued = os.path.exists(os.path.join(cfg.out_dir, "config.json"))
    for name in () if continued else ("init_from", "distill"):
        if (path := getattr(cfg, name)) and not os.path.exists(path):
            raise UserError(f"{name}={path} does not exist: give a run folder or a model.pt.")
    return cfg, settings


if __name__ == "__main__":
    SETTINGS = config.run(read_settings)  # before torch loads; config says why

import contextlib
import json
import math
import signal
import sys

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import prepare
import run
from config import reason, short
from device import (SAVED, Stop, Watch, device_name, full, in_memory, lost_process, out_of_memory, peak_flops,
                    record_graph, set_up, share_of, split)
from model import build, check_weights, load, load_weights
from optim import AdamW, MixedAdamW, Muon
from project import check_tokenizer, load_init, load_teacher, read_teacher
from run import perplexity
from schedule import (alpha_at, batches, check_ids, count_windows, dropout_keys, guided_layers, lr_at, make_plan,
                      muon_at, read_windows, step_flops, summary, train_flops)
from tokenizer import nominal_vocabulary


# ----------------------------------------------------------------------------------------------------------------------
# Model and optimizer: new, continued, and after the guide

def make_optimizer(cfg, model, ranks):
    """AdamW or Muon; for bf16 on CUDA the model's matrices become bf16, cast once per step, not in every forward."""
    half = ranks.device.type == "cuda" and ranks.dtype is torch.bfloat16
    fsdp = is_split(cfg, ranks)  # its shares are the masters
    settings = dict(lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay)
    if cfg.optimizer == "muon":
        return Muon(model, cfg, half and not fsdp, ranks.compile, torch.bfloat16 if half else torch.float32)
    if half or fsdp:
        return MixedAdamW(model.parameters(), mixed=not fsdp, **settings)
    return AdamW(model.parameters(), **settings)


def full_weights(model, optimizer) -> dict:
    """The state dict, with the optimizer's fp32 masters instead of bf16 weights."""
    masters = {name: optimizer.master(p).detach() for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: masters.get(name, t) for name, t in model.state_dict().items()}


def moments(model, optimizer) -> dict:
    """{parameter's name: what the optimizer keeps of it}, without the masters, which are among the full weights."""
    names = {p: n for n, p in model.named_parameters()}
    return {names[p]: {k: v for k, v in state.items() if k != "master"} for p, state in optimizer.state.items()}


def sizes_on_disk(model, optimizer):
    """Bytes of model.pt and of a checkpoint; torch's AdamW has its two moments from the first step on."""
    weights, states = checkpoint.size_of(full_weights(model, optimizer)), moments(model, optimizer)
    return weights, weights + sum(checkpoint.size_of(states[n]) if n in states else 2 * p.numel() * p.element_size()
                                  for n, p in model.named_parameters())


def start_or_continue(cfg, plan, ranks, state, data):
    """A new model, or the checkpoint's in the phase of its step -> (model, optimizer, finished steps)."""
    saved, path = None, os.path.join(cfg.out_dir, "ckpt.pt")
    if state == "continue":
        with ranks.agree():  # rank 0 first: it may move a damaged checkpoint away
            saved = checkpoint.read_newest(cfg.out_dir) if ranks.master else None
        saved = saved or checkpoint.read_checkpoint(path, "ckpt.pt")
        check_same_data(cfg, saved["data"], data.train)
        checkpoint.check_continues(cfg, saved, plan.steps, data.tokenizer.identity, path)
    return assemble(cfg, plan, ranks, saved, data)


def assemble(cfg, plan, ranks, saved=None, data=None, teacher=None):
    """A new model, or one of the entries `saved` of a checkpoint, on the device -> (model, optimizer, its step)."""
    step, path = saved["step"] if saved else 0, os.path.join(cfg.out_dir, "ckpt.pt")
    model = build(cfg, ranks.device, None if saved else cfg.seed)
    originals = load_init(cfg, model, data, ranks) if cfg.init_from and not saved else {}
    if step < plan.guided:
        for _, module in model.structured_linears():
            module.start_guide(originals.get(module))
    if saved:
        check_weights(model, saved["model"], path)
        load_weights(model, saved["model"], path)
    if cfg.distill:
        model.teacher = teacher or load_teacher(cfg, data.tokenizer, ranks, saved)
    if ranks.compile:
        model.compile_parts()
    if is_split(cfg, ranks):
        split(model, ranks)
    optimizer = make_optimizer(cfg, model, ranks)
    if saved:
        checkpoint.check_moments(saved, optimizer, model, path)
        load_moments(model, optimizer, saved["optimizer"], ranks)
    return model, optimizer, step


def load_moments(model, optimizer, saved, ranks):
    """The optimizer's state from that of a checkpoint, as `moments` has it."""
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        for k, v in saved.get(name, {}).items():
            if v.dim():
                state[k] = share_of(v, p)
            else:  # torch's fused AdamW counts steps on the device, ours on the host
                state[k] = v.to(state[k].device if k in state else ranks.device, copy=True)


def is_split(cfg, ranks):
    """Whether each rank has a share of every parameter (fsdp) instead of the whole."""
    return cfg.parallel == "fsdp" and ranks.world > 1


def wrap_ddp(model, cfg, ranks):
    """The model as the step calls it: under DDP where there are several processes that each have all of it."""
    if ranks.world == 1 or is_split(cfg, ranks):
        return model
    return DistributedDataParallel(model, device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
                                   gradient_as_bucket_view=True)


def end_guide(cfg, plan, ranks, model, optimizer):
    """The switch: W leaves the model and the optimizer -> (model, optimizer).

    Under fsdp, where a parameter cannot leave its group, they are put together anew, as after a resume.
    """
    if is_split(cfg, ranks):
        weights, states = ({name: value for name, value in tree.items() if not name.endswith(".W")}
                           for tree in (full_weights(model, optimizer), moments(model, optimizer)))
        saved = {"step": plan.guided, "model": {name: full(t).cpu() for name, t in weights.items()},
                 "optimizer": {name: {k: full(v).cpu() for k, v in state.items()} for name, state in states.items()}}
        model, fresh, _ = assemble(cfg, plan, ranks, saved, teacher=model.teacher)
        fresh.before_update = optimizer.before_update
        return model, fresh
    guided = [module for _, module in model.structured_linears()]
    optimizer.drop([module.W for module in guided])
    for module in guided:
        module.end_guide()
    return model, optimizer


# ----------------------------------------------------------------------------------------------------------------------
# One step

def train_step(wrapped, optimizer, micro_batches, cfg, ranks, lr, alpha=None, guided=(), keys=None):
    """One optimizer step over (n_micro, micro_batch, T + 1) tokens -> (this rank's mean loss, gradient norm), both 0-d.

    keys: those of schedule.dropout_keys, with dropout. The results stay on the device. Nothing in here waits for it:
    the next launches are queued while it computes.
    """
    set_rates(optimizer, lr)
    loss = form_gradients(wrapped, optimizer, micro_batches, cfg, ranks, alpha, guided, keys)
    norm = optimizer.step(cfg.grad_clip)
    optimizer.zero_grad()
    return loss, norm


def set_rates(optimizer, lr):
    """The learning rate of every group; `ratio`, Muon's alone, is a group's rate over that of the matrices."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("ratio", 1)


def form_gradients(wrapped, optimizer, micro_batches, cfg, ranks, alpha, guided, keys):
    """Forward and backward of all micro-batches -> this rank's mean loss."""
    n, total = len(micro_batches), 0.0
    skipped = skipped_guides(wrapped.module, guided) if isinstance(wrapped, DistributedDataParallel) else []
    for i, batch in enumerate(micro_batches):
        last = i == n - 1
        if i:
            optimizer.accumulate(last)
        # DDP averages the ranks' gradients once a step, with the last micro-batch's backward
        with contextlib.nullcontext() if last or ranks.world == 1 or is_split(cfg, ranks) else wrapped.no_sync():
            with ranks.autocast():
                drawn = None if keys is None else keys[i]
                loss = wrapped(batch[:, :-1], batch[:, 1:], alpha, guided, drawn) / n
            # a loss that is not finite makes all gradients so, on all ranks: then no rank updates its weights
            roots = [loss * (1 + 0 * loss.detach()), *(skipped if last else ())]
            torch.autograd.backward(roots, [None, *(W.new_zeros(()).expand_as(W) for W in roots[1:])])
        total = total + loss.detach()
    for W in skipped:
        W.grad = None
    return total


def skipped_guides(model, guided):
    """The guides that a step does not use. DDP waits for a gradient of each: zeros, which the optimizer never sees.

    Its find_unused_parameters would search the graph of every step for them, and warn where it finds none.
    """
    return [m.W for layer, m in model.structured_linears() if m.W is not None and layer not in guided]


class RecordedStep:
    """train_step; on one GPU from the fourth call on a CUDA graph of it, since small models wait for the host.

    The graph repeats train_step's kernels, so the losses are the same to the bit. All calls have one `alpha`, which is
    filled anew. say(line) reports a recording that fails; the steps are then launched one by one.
    """
    EAGER = 3            # calls without a graph: after them everything is compiled; twice as many after each recording
    MOST = 256           # micro-batches x layers of a graph: longer steps keep the device busy without one

    def __init__(self, say=print):
        self.say, self.key, self.calls, self.graph, self.failed, self.eager = say, None, 0, None, False, self.EAGER

    def __call__(self, wrapped, optimizer, batch, cfg, ranks, lr, alpha=None, guided=(), keys=None):
        if self.key != (guided, batch.shape):  # other layers are guided: other kernels
            self.forget(optimizer)
            self.key = guided, batch.shape
        self.calls += 1
        if self.graph is None and self.calls > self.eager and self.is_possible(optimizer, len(batch), cfg, ranks):
            self.record(wrapped, optimizer, batch, cfg, ranks, alpha, guided, keys)
        if self.graph is None:
            return train_step(wrapped, optimizer, batch, cfg, ranks, lr, alpha, guided, keys)
        self.batch.copy_(batch)
        if keys is not None:
            self.keys.copy_(keys)
        set_rates(optimizer, lr)
        optimizer.advance()  # the gradients stay where the graph puts them
        self.graph.replay()
        return self.loss.clone(), self.norm.clone()

    def is_possible(self, optimizer, n_micro, cfg, ranks):
        return (ranks.compile and ranks.device.type == "cuda" and ranks.world == 1 and not self.failed
                and isinstance(optimizer, MixedAdamW) and optimizer.is_fused() and n_micro * cfg.n_layer <= self.MOST)

    def record(self, wrapped, optimizer, batch, cfg, ranks, alpha, guided, keys):
        self.batch, self.keys = batch.clone(), None if keys is None else keys.clone()
        self.eager *= 2  # a recording takes the time of many steps: with guide_skip a graph may serve only a few

        def run():
            self.loss = form_gradients(wrapped, optimizer, self.batch, cfg, ranks, alpha, guided, self.keys)
            self.norm = optimizer.move(cfg.grad_clip)

        try:
            self.graph = record_graph(run, warm=False)
        except RuntimeError as e:  # memory that does not suffice is one too
            self.say(f"training without a CUDA graph, whose recording failed: {reason(e)}")
            optimizer.sums.clear()  # of micro-batches
            self.forget(optimizer)
            self.failed = True

    def beside(self, optimizer, run):
        """run(), whose memory is not the graph's. Where there is not enough for both it runs again, without a graph."""
        try:
            return run()
        except RuntimeError as e:
            if self.graph is None or not out_of_memory(e):
                raise
        self.say("training without a CUDA graph: the memory does not hold it and a validation")
        self.forget(optimizer)
        self.failed = True
        return run()

    def forget(self, optimizer):
        """Frees the graph and its memory; the next steps are launched one by one."""
        self.graph = self.batch = self.keys = self.loss = self.norm = self.key = None
        self.calls = 0
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(model, token_file, n_windows, cfg, ranks, alpha=None, guided=(), show=None, stop=None):
    """Mean loss on the first n_windows windows of a token file, shared among the ranks; show(fraction) follows it.

    None if a signal has ended it: all ranks leave after the same micro-batch.
    """
    model.eval()
    mine, losses, sizes = np.arange(ranks.rank, n_windows, ranks.world), [], []
    each = -(-n_windows // ranks.world)  # all ranks take as many micro-batches; the last of some is empty
    with ranks.agree():
        for i in range(0, each, cfg.micro_batch_size):
            ranks.note("a validation")
            if stop and stop.agreed():
                break
            windows = read_windows(token_file, mine[i:i + cfg.micro_batch_size], cfg.block_size)
            batch = torch.full((cfg.micro_batch_size, cfg.block_size + 1), -1)  # always one shape: one compilation
            if len(windows):
                check_ids(windows, cfg.vocab_size, token_file.path)
                batch[:len(windows)] = torch.from_numpy(windows)
            batch = batch.to(ranks.device)
            with ranks.autocast():
                losses.append(model(batch[:, :-1].clamp(min=0), batch[:, 1:], alpha, guided))
            sizes.append(len(windows))
            if show:
                show(i / each)
    model.train()
    if len(losses) < -(-each // cfg.micro_batch_size):
        return None
    # summed on the host in double precision: not every device has that
    total = math.fsum(loss * size for loss, size in zip(torch.stack(losses).tolist(), sizes))
    if ranks.world > 1:
        total = ranks.sum_over_ranks(torch.tensor([total], dtype=torch.float64, device=ranks.device)).item()
    return total / n_windows


# ----------------------------------------------------------------------------------------------------------------------
# The loop

class Training:
    """A run under way: what its steps, validations and checkpoints share."""

    def __init__(self, cfg, ranks, state, data):
        self.cfg, self.ranks, self.data, self.plan = cfg, ranks, data, make_plan(cfg)
        with ranks.agree():
            self.model, self.optimizer, self.step = start_or_continue(cfg, self.plan, ranks, state, data)
        self.wrapped = wrap_ddp(self.model, cfg, ranks)
        with ranks.agree():
            self.log = run.Log(cfg, ranks, self.step, step_flops(cfg, self.plan), self.plan.guided)
        self.log.show(start_card(cfg, self.plan, ranks, data, sizes_on_disk(self.model, self.optimizer)))
        # checksums of large files take minutes: a thread computes them beside the first steps
        self.raise_damage = prepare.verify_in_background(*(data.train, data.val) if ranks.master else ())
        self.alpha = torch.ones((), device=ranks.device)  # a tensor, so that a new value compiles nothing
        self.recorded = RecordedStep(self.log.say)
        self.saver, self.stop = checkpoint.Saver(ranks.device, ranks.master), Stop(ranks)
        self.optimizer.before_update = self.saver.before_update

    def loop(self):
        """From the first or the checkpoint's step to model.pt; self.step counts the finished steps."""
        cfg, plan, ranks, data, log, saver = self.cfg, self.plan, self.ranks, self.data, self.log, self.saver
        if self.step:
            log.say(f"continuing after step {self.step} of {plan.steps}")
        self.prepare_saver()
        if self.validation_is_due() and ranks.any(ranks.master and log.validated < self.step) and self.validate():
            self.end_early()  # a signal had ended this validation before the run was continued, and another one now
        for batch in batches(cfg, plan, data.train, data.n_windows, range(self.step, plan.steps), ranks):
            step = self.step
            ranks.note(f"step {step + 1}")
            lr, alpha, guided = lr_at(cfg, plan, step), alpha_at(cfg, plan, step), guided_layers(cfg, plan, step)
            keys = dropout_keys(cfg, step, ranks).to(ranks.device) if cfg.dropout else None
            if cfg.optimizer == "muon":
                self.optimizer.momentum, self.optimizer.decay = muon_at(cfg, plan, step)
            batch = batch.to(ranks.device, non_blocking=True)
            loss, norm = self.recorded(self.wrapped, self.optimizer, batch, cfg, ranks, lr, self.alpha.fill_(alpha),
                                       guided, keys)
            self.step = step = step + 1
            if step == plan.guided:
                self.recorded.forget(self.optimizer)
                self.model, self.optimizer = end_guide(cfg, plan, ranks, self.model, self.optimizer)
                self.prepare_saver()
                self.wrapped = wrap_ddp(self.model, cfg, ranks)  # DDP's buckets still hold the guides

            # log
            ranks.note(f"the end of step {step}")
            log.watch(step, norm)
            if step % cfg.log_interval == 0 or step in (1, plan.steps):
                with ranks.agree():
                    saver.raise_error()
                    log.step(step, loss, lr, norm, alpha)

            # validate and save
            self.stop.signal = self.stop.signal or (signal.SIGTERM if log.lost else 0)
            stopping = self.stop.agreed()
            if self.validation_is_due() and not stopping:
                stopping = self.validate()
            if stopping or step == plan.steps or self.may_save():
                log.settle(step)
                with log.pause():
                    self.save_checkpoint()
            if stopping:
                self.end_early()
            ranks.note(f"reading the tokens of step {step + 1}")
        self.finish()

    def prepare_saver(self):
        tree = {"model": full_weights(self.model, self.optimizer), "optimizer": moments(self.model, self.optimizer)}
        with self.ranks.agree():  # rank 0 waits for the file before, and may raise its error
            self.saver.prepare(tree)

    def validation_is_due(self):
        """Whether the run is validated after this step; the last one's validation is the final one."""
        return bool(self.cfg.eval_interval and 0 < self.step < self.plan.steps
                    and self.step % self.cfg.eval_interval == 0)

    def may_save(self):
        """Whether a checkpoint is due and no file is being written. So a slow disk delays the next checkpoint and not
        training, which waits for best.pt and the last one only."""
        interval = self.cfg.save_interval
        due = interval and self.step // interval > self.log.saved // interval
        return due and not self.ranks.any(self.saver.busy())

    def validate(self):
        """A validation during the run, of the model as the next step uses it: with the guide while there is one.

        The best of those without a guide is kept as best.pt. Returns whether a signal has ended it.
        """
        guided = self.model.layers_with_guide()
        self.alpha.fill_(alpha_at(self.cfg, self.plan, self.step))
        with self.log.pause():
            loss = self.recorded.beside(self.optimizer, lambda: evaluate(
                self.model, self.data.val, self.data.n_val, self.cfg, self.ranks, self.alpha, guided, stop=self.stop))
            if loss is None:
                return True
            with self.ranks.agree():
                lowest = self.log.validation(self.step, loss)
            if self.ranks.any(lowest and self.ranks.master):
                self.save("best.pt", val_loss=loss)
        return False

    def save_checkpoint(self):
        """ckpt.pt, with all that an exact continuation needs; none where the data have turned out to be damaged."""
        with self.ranks.agree():
            self.raise_damage()
        self.ranks.note(f"saving step {self.step}")
        self.log.saved = self.step
        teacher = {"teacher": self.model.teacher.checksum} if self.cfg.distill else {}
        self.save("ckpt.pt", self.cfg.keep_checkpoints, data=self.data.train.checksum, **teacher,
                  optimizer=moments(self.model, self.optimizer))

    def save(self, name, keep=1, **more):
        """Starts writing a file in the background: after the file before it, and after the log's rows so far.

        Rank 0 writes. Of split tensors all give their shares, so no rank may have raised an error before.
        """
        cfg = self.cfg
        tree = checkpoint.entries(cfg, full_weights(self.model, self.optimizer), self.step, self.data.tokenizer, **more)
        with self.ranks.agree():
            self.saver.wait()
        if self.ranks.master or is_split(cfg, self.ranks):
            self.saver.save(os.path.join(cfg.out_dir, name), tree, keep, os.path.join(cfg.out_dir, "metrics.jsonl"))

    def end_early(self):
        """After a signal and its checkpoint: status SAVED, on which a scheduler may give the same command again."""
        with self.ranks.agree():
            self.saver.wait()
        again = "the same command with --resume=auto continues it"
        if self.log.lost:
            raise UserError(f"the output cannot be written ({self.log.lost}): the run is saved after step {self.step}, "
                            f"{again}.")
        self.log.say(f"stopped after step {self.step} and saved; {again}")
        sys.exit(SAVED)

    def finish(self):
        """The final validation and model.pt. The last step is saved already: a signal ends the validation."""
        cfg, ranks, data, log = self.cfg, self.ranks, self.data, self.log
        with ranks.agree(patient=True):
            self.raise_damage(wait=True)
        self.recorded.forget(self.optimizer)  # no step follows, and the validation may need its memory
        val_loss = evaluate(self.model, data.val, data.n_final, cfg, ranks, show=log.final, stop=self.stop)
        ranks.note("the last checkpoint")
        with ranks.agree():
            self.saver.wait()
        if val_loss is None:
            log.say(f"stopped in the final validation; all {self.step} steps are saved, "
                    "the same command with --resume=auto repeats it")
            sys.exit(SAVED)
        with ranks.agree():
            log.validation(self.step, val_loss)
        self.save("model.pt", val_loss=val_loss)
        with ranks.agree():
            self.saver.wait()
        log.end_card(val_loss, data.n_final * cfg.block_size, train_flops(cfg, self.plan), self.saver.report())
        if log.lost:
            raise UserError(f"the output cannot be written ({log.lost}), but the run is finished: "
                            f"its model is in {cfg.out_dir}.")


def train(cfg, ranks, state, data):
    """The run, from its first or its checkpoint's step to model.pt."""
    training = Training(cfg, ranks, state, data)
    with Watch(ranks, cfg.timeout), lost_process(ranks), training.saver, training.stop:
        training.loop()


def start_card(cfg, plan, ranks, data, sizes) -> str:
    """What a run prints first; sizes: of sizes_on_disk."""
    facts, peak, tokens = summary(cfg), peak_flops(ranks.device), cfg.block_size
    ffn = {"dense": "dense", "lowrank": f"lowrank rank {cfg.rank}",
           "blockshuffle": f"blockshuffle {cfg.nblocks} blocks",
           "blockdense": f"blockdense rank {cfg.rank}, {cfg.nblocks} blocks"}[cfg.ffn]
    replayed = f" + {plan.steps - plan.unique} steps replayed" if plan.steps > plan.unique else ""
    lines = [f"model    {cfg.n_layer} layers x {cfg.n_embd}, FFN {cfg.ffn_dim} {ffn}; "
             f"{short(facts['params'])} parameters, {short(facts['params_ffn'])} in FFNs"
             f"{f'; queries and keys of rank {cfg.qk_rank}' if cfg.qk_rank else ''}"]
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
              f"folder   {cfg.out_dir}: {cfg.keep_checkpoints} checkpoints of {short(sizes[1], 'G')}B"
              f"{', best.pt' if cfg.eval_interval else ''} and model.pt of {short(sizes[0], 'G')}B"]
    return "\n".join(lines)


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
        if not os.path.exists(os.path.join(config.data_dir(cfg), "train.bin")):
            cfg.tokenizer = trained.tokenizer  # then its folder is opened, or the advice is to prepare that
        _, val_file, tokenizer = prepare.open_data(cfg)
        val_file.verify()
        check_tokenizer(cfg.out_dir, saved, cfg, tokenizer)
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
    """UserError where the model.pt of a run is none, or where the command names other data than the run's.

    No data are compared where they or the checkpoint have been deleted since.
    """
    try:
        checkpoint.read_checkpoint(os.path.join(cfg.out_dir, "model.pt"), "model.pt")
    except UserError as e:
        raise UserError(f"{str(e).rpartition(': ')[0]}, so the run is not finished: move it away, and the same command "
                        "continues from the last checkpoint.") from None
    checksum = checkpoint.data_checksum(cfg.out_dir)
    there = os.path.exists(os.path.join(config.data_dir(cfg), "train.bin"))
    if checksum is not None and (there or config.data_dir(cfg) != config.data_dir(config.read_saved(cfg.out_dir))):
        check_same_data(cfg, checksum, prepare.open_data(cfg)[0])


def main(cfg, settings):
    if settings.dry_run:
        if cfg.distill:
            read_teacher(cfg)  # for its FLOPs
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
        with ranks.agree(patient=True):
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
