"""Where a program runs: on which device and in which precision, beside which other processes, with how much memory.

Also what ends it early (signals, processes that die or stand still), and what keeps the host from waiting for the
device.
"""
import collections
import contextlib
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from config import UserError, place_among_processes, reason, short


# ----------------------------------------------------------------------------------------------------------------------
# Device and precision

def pick_device(name):
    """torch.device of Config's `device`; UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    there = {"cpu": True, "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
             "mps": torch.backends.mps.is_available()}[device.type]
    if not there:
        raise UserError(f"device={name} is not available here: use --device=cpu or leave it out.")
    return device


def pick_dtype(name, device):
    """torch.dtype of a setting `dtype`: auto is bfloat16 on CUDA and float32 elsewhere."""
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def device_name(device):
    """The card's name, as NVIDIA H200; elsewhere the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H20": 148e12, "GH200": 989e12,
              "B200": 2250e12, "A100": 312e12, "A800": 312e12, "A40": 150e12, "A10G": 70e12, "L40S": 362e12,
              "L40": 181e12, "L4": 121e12, "RTX 6000 Ada": 364e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
              "V100": 125e12}


def peak_flops(device):
    """Data-sheet dense bf16 FLOP/s of a card (fp16 for the V100), None where it is not known."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ")
    longest_first = sorted(PEAK_FLOPS, key=len, reverse=True)
    return next((PEAK_FLOPS[name] for name in longest_first if f" {name} " in f" {words} "), None)


# ----------------------------------------------------------------------------------------------------------------------
# Ranks and their process group

@dataclass
class Ranks:
    """This process: its rank of `world`, its device and the dtype of its matmuls."""
    rank: int
    world: int
    device: object
    dtype: object
    compile: bool
    patient: object = None               # the group of waits that have no limit, on the host
    now: tuple = (0, "the start", 0.0)   # what this process does: a count, words, since when
    ending: bool = False                 # a Watch is about to end the process

    @property
    def master(self):
        return self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def note(self, words, patient=False):
        """Says what this process does next, for a `Watch`. All ranks note the same; `patient` may take for ever."""
        self.now = self.now[0] + 1, words, math.inf if patient else time.monotonic()

    def sum_over_ranks(self, values, group=None):
        """Sum over the ranks of a 1-D tensor."""
        if self.world > 1:
            dist.all_reduce(values, group=group)
        return values

    def any(self, flag, patient=False) -> bool:
        """Whether the flag of any rank is set."""
        if self.world == 1:
            return bool(flag)
        flags = torch.tensor([float(bool(flag))], device="cpu" if patient else self.device)
        return bool(self.sum_over_ranks(flags, self.patient if patient else None).item())

    @contextlib.contextmanager
    def agree(self, patient=False):
        """If a rank raises a UserError inside, all ranks raise it at the end of the block.

        patient: the ranks may wait for one of them for hours, as for rank 0 that prepares the data.
        """
        refusal = ""
        if patient:
            self.note("a wait for rank 0", patient)
        try:
            yield
        except UserError as e:
            refusal = str(e)
        if self.any(refusal, patient):
            refusals = [refusal] * self.world
            if self.world > 1:
                dist.all_gather_object(refusals, refusal)
            raise UserError(next(filter(None, refusals)))

    def __enter__(self):
        return self

    def __exit__(self, kind, e, _):
        """Leaves the process group where all ranks end together: after the failure of one it would wait forever."""
        if self.world > 1 and (kind in (None, SystemExit) or kind is UserError and not e.alone):
            # gloo's thread needs Python's lock for the last all_reduce: without a pause one exit in ten aborts
            time.sleep(0.1)
            dist.destroy_process_group()


def set_up(cfg) -> Ranks:
    """Device, precision and, under torchrun, the process group (nccl on CUDA, gloo on CPU)."""
    rank, world, local = place_among_processes()
    if cfg.batch_size % (cfg.micro_batch_size * world):
        raise UserError(f"batch_size={cfg.batch_size} does not divide among {world} processes x "
                        f"micro_batch_size={cfg.micro_batch_size} = {cfg.micro_batch_size * world} sequences: "
                        "change one of them.")
    device = pick_device(cfg.device)
    if device.type == "cuda":
        index = local if world > 1 or device.index is None else device.index  # of several processes each has its card
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    patient = join(rank, world, device, cfg.timeout) if world > 1 else None
    compile = device.type == "cuda" if cfg.compile == "auto" else cfg.compile
    return Ranks(rank, world, device, pick_dtype(cfg.dtype, device), compile, patient)


def join(rank, world, device, minutes):
    """The process group, and one whose waits have no limit; UserError where the others do not come in time."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # in here Python's handler of Ctrl-C would wait too
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=minutes)))
        # torchrun keeps its store when it starts processes again: there the addresses of dead ones must not be read
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # a Watch ends a run before the group's own limit does: it knows who is missing
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world, timeout=timedelta(minutes=minutes + 1))
        return dist.new_group(backend="gloo", timeout=timedelta(days=7))
    except RuntimeError as e:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"rank {rank} of {world} has not met the others at {where} within {minutes:g} minutes "
                        f"({reason(e)}): start all of them, or raise --timeout.",
                        alone=True) from None
    finally:
        signal.signal(signal.SIGINT, before)


# ----------------------------------------------------------------------------------------------------------------------
# fsdp: parameters that are split among the ranks

def split(model, ranks):
    """fsdp: every rank keeps a share of each block's parameters, and of the rest (FSDP2, `fully_shard`).

    They are gathered for a block's forward and again for its backward, in bf16 where the matmuls are, and the gradients
    are averaged in float32, with each micro-batch. Scalars stay whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    policy = MixedPrecisionPolicy(None if ranks.dtype is torch.float32 else ranks.dtype, torch.float32,
                                  cast_forward_inputs=False)
    mesh, scalars = init_device_mesh(ranks.device.type, (ranks.world,)), {p for p in model.parameters() if not p.dim()}
    tables = [block.attn.values for block in model.blocks if block.attn.values is not None]  # the model calls them
    for module in (*tables, *model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=scalars, reshard_after_forward=True)


def full(t):
    """The whole of a tensor that fsdp has split among the ranks, which all call this; another tensor as it is."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def local(t):
    """This rank's share of such a tensor, in the same memory."""
    return t.detach().to_local() if hasattr(t, "to_local") else t


def share_of(whole, t):
    """A tensor like t, split or not, of the values `whole` that every rank has."""
    whole = whole.to(t.device, copy=True)
    if not hasattr(t, "to_local"):
        return whole
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(whole, t.device_mesh, t.placements, src_data_rank=None)


# ----------------------------------------------------------------------------------------------------------------------
# The end of a run: signals, processes that die, processes that stand still

SAVED = 75  # exit status of a run that a signal ended after it was saved: EX_TEMPFAIL, the same command goes on


class Stop:
    """The first signal lets a run finish its step and save; another one, a second or more later, ends it at once.

    Launchers signal a process group and then every process of it: what comes within a second is one request. A limit on
    CPU time sends SIGXCPU every second, which is one too.
    """
    SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
               if hasattr(signal, name)]

    def __init__(self, ranks):
        self.ranks, self.signal, self.first = ranks, 0, 0.0
        self.delayed, self.ended = DelayedRead(ranks.device, 1), threading.Event()

    def __enter__(self):
        self.handlers = {s: signal.getsignal(s) for s in self.SIGNALS}
        for s in self.SIGNALS:
            if s == signal.SIGINT or self.handlers[s] is not signal.SIG_IGN:  # nohup makes a process ignore SIGHUP
                signal.signal(s, self.catch)
        self.received, self.wake = socket.socketpair()
        self.wake.setblocking(False)
        self.wakeup = signal.set_wakeup_fd(self.wake.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self.watch, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        signal.set_wakeup_fd(self.wakeup)
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        self.wake.close()  # ends the thread

    def catch(self, number, frame):
        if not self.signal:
            self.signal, self.first = number, time.monotonic()
        elif self.ends(number, self.first):
            raise KeyboardInterrupt(number)

    @staticmethod
    def ends(number, first) -> bool:
        """Whether a signal that comes now, after the one at `first`, ends the run at once."""
        return time.monotonic() - first >= 1 and number != getattr(signal, "SIGXCPU", 0)

    def watch(self):
        """A thread, since Python runs `catch` only when the main thread is back from C++.

        There it may compute a step, or wait for another rank, for minutes: then a second signal ends the process from
        here.
        """
        first = None
        while received := self.received.recv(1):
            if received[0] not in self.SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
                if not self.ended.wait(2) and self.ranks.master:
                    print("stopping after this step; another signal ends it at once.", file=sys.stderr, flush=True)
            elif self.ends(received[0], first) and not self.ended.wait(1):
                print("interrupted while the main thread was waiting.", file=sys.stderr, flush=True)
                os._exit(128 + received[0])
        self.received.close()

    def agreed(self) -> int:
        """The signal that any rank has received, 0 without one. With several ranks all call it after every step.

        They learn what was known one call before.
        """
        if self.ranks.world == 1:
            return self.signal
        signals = torch.full((1,), float(self.signal), device=self.ranks.device)
        dist.all_reduce(signals, op=dist.ReduceOp.MAX)
        return int(self.delayed(signals[0]) or 0)


@contextlib.contextmanager
def lost_process(ranks):
    """Turns a collective that fails, since another process has died, into one sentence."""
    try:
        yield
    except RuntimeError as e:
        words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "ProcessGroup")
        if ranks.world == 1 or not (isinstance(e, dist.DistError) or any(word in str(e) for word in words)):
            raise
        if ranks.ending:
            time.sleep(60)  # its sentence says more
        word = next((word for word in words if word in str(e)), type(e).__name__)
        raise UserError(f"rank {ranks.rank} of {ranks.world} has lost another process during {ranks.now[1]} "
                        f"({word}): look for its error; the same command with --resume=auto continues from the last "
                        "checkpoint.", alone=True) from None


class Watch:
    """A thread of every rank that ends its process when all ranks stand still, and names the one that is waited for.

    Each thread publishes in the process group's store what its main thread does. So a process that has stopped is one
    that says nothing new, and one that is stuck is the one that has noted the fewest steps.
    """

    def __init__(self, ranks, minutes):
        self.ranks, self.limit, self.ended = ranks, 60 * minutes, threading.Event()
        self.tick, self.beat = min(5.0, self.limit / 10), 0

    def __enter__(self):
        self.ranks.note("the start")
        if self.ranks.world > 1:
            # a connection of its own: a wait holds the other one
            self.store = dist.distributed_c10d._get_default_store().clone()
            self.store.set_timeout(timedelta(seconds=5))
            self.say()
            threading.Thread(target=self.watch, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ended.set()

    def watch(self):
        while not self.ended.is_set():
            self.wait(1)
            if not self.stands_still():
                continue
            self.ranks.ending = True
            rank, sentence = self.culprit()
            self.ranks.ending = self.stands_still() and not self.ended.is_set()
            if self.ranks.ending:
                if self.ranks.rank == (0 if rank else 1):  # one speaks for all
                    print(f"error: {sentence}, nothing has moved for {self.limit / 60:g} minutes; the same command "
                          "with --resume=auto continues from the last checkpoint.", file=sys.stderr, flush=True)
                self.wait(4)
                os._exit(2)

    def stands_still(self):
        return time.monotonic() - self.ranks.now[2] > self.limit

    def wait(self, ticks):
        """Waits, and goes on publishing what this rank does."""
        for _ in range(2 * ticks):
            self.ended.wait(self.tick / 2)
            self.say()

    def say(self):
        self.beat += 1
        mine = [self.beat, os.getpid(), socket.gethostname(), *self.ranks.now[:2]]
        with contextlib.suppress(dist.DistError):  # where the store does not answer, culprit says so
            self.store.set(f"watch {self.ranks.rank}", json.dumps(mine))

    def state(self, rank):
        """[beats, process, machine, count, words] of a rank; None where the store or the rank has said nothing."""
        try:
            return json.loads(self.store.get(f"watch {rank}"))
        except dist.DistError:
            return None

    def culprit(self):
        """(rank, words) of the one that is waited for: it has stopped, or has noted the fewest steps."""
        ranks, mine = range(self.ranks.world), self.ranks.rank
        before = [self.state(rank) for rank in ranks]
        self.wait(3)
        after = [self.state(rank) for rank in ranks]
        silent = [rank for rank in ranks if rank != mine and before[rank] == after[rank]]
        if after[mine] is None:
            return 0, "rank 0, or the torchrun that the processes share, does not answer"
        rank = silent[0] if silent else min(ranks, key=lambda rank: after[rank][3])
        name = f"rank {rank} of {len(ranks)}"
        if after[rank]:
            _, process, machine, _, words = after[rank]
            name += f" (process {process} on {machine})"
        return rank, f"{name} does not answer" if silent else f"{name} is stuck in {words}"


# ----------------------------------------------------------------------------------------------------------------------
# Memory, and models without any

def out_of_memory(error) -> bool:
    """Whether an error, or one that it was raised after, is of memory that does not suffice.

    torch has RuntimeErrors of several kinds for that, and a failed recording of a graph hides them behind its own.
    """
    if error is None:
        return False
    words = "out of memory" in str(error) or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or words or out_of_memory(error.__context__)


@contextlib.contextmanager
def enough_memory(sentence):
    """Turns out-of-memory into one sentence that says what does not fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        raise UserError(sentence, alone=True) from None


def in_memory(cfg, ranks, params):
    """The same for the training or the validation of a model."""
    recompute = "give --recompute=wide, " if ranks.compile and cfg.recompute != "wide" else ""
    return enough_memory(f"the memory of {ranks.device} does not hold this model of {short(params)} parameters with "
                         f"micro-batches of {cfg.micro_batch_size} x {cfg.block_size} tokens: "
                         f"lower --micro_batch_size, {recompute}or choose a smaller model.")


class ShapesOnly(torch.overrides.TorchFunctionMode):
    """torch.nn.init does nothing, arange runs on the CPU, empty_like is empty.

    On meta all three import parts of torch's compiler, which takes 1.5 s.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func is torch.empty_like:
            return torch.empty(args[0].shape, **{"dtype": args[0].dtype, "device": args[0].device, **kwargs})
        return func(*args, **({"device": "cpu", **kwargs} if func is torch.arange else kwargs))


@contextlib.contextmanager
def on_meta():
    """A module built in here has shapes but no memory."""
    with torch.device("meta"), ShapesOnly():
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Numbers and launches between host and device

class DelayedRead:
    """A device's value of each step on the host, `steps` steps later.

    This step's is ready only when the device has finished the step, and waiting for it would delay the next launches.
    """

    def __init__(self, device, steps):
        self.on_cuda, self.steps, self.pending = device.type == "cuda", steps, collections.deque()

    def __call__(self, value):
        """value: a 0-d tensor -> the float of `steps` calls before, None in the first ones."""
        new = torch.empty((), pin_memory=self.on_cuda).copy_(value, non_blocking=True)
        self.pending.append((new, torch.cuda.current_stream().record_event() if self.on_cuda else None))
        return self.next() if len(self.pending) > self.steps else None

    def next(self):
        """The oldest value that has not been returned, waited for."""
        value, event = self.pending.popleft()
        if event:
            event.synchronize()
        return value.item()


class Upload:
    """Upload(tensor)(values): lists of numbers to the tensor's start, which the host does not wait for -> that part.

    Copies from other than pinned memory wait for the device, and so can pinning. So a few pinned tensors take turns;
    the event of each says when its last copy is over. They also bound how many steps the host is ahead.
    """
    TURNS = 4

    def __init__(self, tensor):
        self.tensor, self.turn, on_cuda = tensor, 0, tensor.is_cuda
        self.sources = [torch.empty_like(tensor, device="cpu", pin_memory=on_cuda) for _ in range(self.TURNS)]
        self.copied = [torch.cuda.Event() for _ in range(self.TURNS)] if on_cuda else None

    def __call__(self, values):
        self.turn, values = (self.turn + 1) % self.TURNS, torch.tensor(values, dtype=self.tensor.dtype)
        source, part = (t.view(-1)[:values.numel()].view_as(values) for t in (self.sources[self.turn], self.tensor))
        if self.copied:
            self.copied[self.turn].synchronize()  # of an event that was never recorded it returns at once
        source.copy_(values)
        part.copy_(source, non_blocking=True)
        if self.copied:
            self.copied[self.turn].record()
        return part


def record_graph(run, pool=None, warm=True):
    """run() as a CUDA graph, whose replay() repeats its kernels.

    warm: run() runs once before, so that nothing is compiled while the graph is recorded.
    """
    if warm:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    # torch.cuda.graph stays on its own stream where the end of a recording fails; other threads pin their memory
    with torch.cuda.stream(here), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph
