"""Where a run takes place: device, precision, ranks and their process group, peak FLOP/s, memory that does not suffice."""
import contextlib
import os
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from config import UserError, short


@dataclass
class Ranks:
    """This process: its rank of `world`, its device and the dtype of its matmuls."""
    rank: int
    world: int
    device: object
    dtype: object
    compile: bool

    @property
    def master(self):
        return self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sum_over_ranks(self, values):
        """Sum over the ranks of a 1-D tensor."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    @contextlib.contextmanager
    def agree(self):
        """What one rank refuses in here all refuse, in its words; and none goes on before the others."""
        refusal = ""
        try:
            yield
        except UserError as e:
            refusal = str(e)
        if self.sum_over_ranks(torch.tensor([float(len(refusal))], device=self.device)).item():
            refusals = [refusal] * self.world
            if self.world > 1:
                dist.all_gather_object(refusals, refusal)
            raise UserError(next(filter(None, refusals)))

    def __enter__(self):
        return self

    def __exit__(self, kind, e, _):
        """Out of the process group, where all ranks end; where one fails, the others may never come."""
        if self.world > 1 and (kind in (None, SystemExit) or kind is UserError and not e.alone):
            time.sleep(0.1)  # gloo's thread needs Python's lock once more for the last all_reduce; without, one exit in ten aborts
            dist.destroy_process_group()


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


def set_up(cfg) -> Ranks:
    """Device, precision and, under torchrun, the process group (nccl on CUDA, gloo on CPU)."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if cfg.batch_size % (cfg.micro_batch_size * world):
        raise UserError(f"batch_size={cfg.batch_size} does not divide among {world} processes x micro_batch_size={cfg.micro_batch_size} "
                        f"= {cfg.micro_batch_size * world} sequences: change one of them.")
    device = pick_device(cfg.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index if device.index is not None and world == 1 else local)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    on_cuda = device.type == "cuda"
    dtype = {"auto": torch.bfloat16 if on_cuda else torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}[cfg.dtype]
    return Ranks(rank, world, device, dtype, on_cuda if cfg.compile == "auto" else cfg.compile)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H20": 148e12, "GH200": 989e12, "B200": 2250e12,
              "A100": 312e12, "A800": 312e12, "A40": 150e12, "A10G": 70e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
              "RTX 6000 Ada": 364e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12}


def peak_flops(device):
    """Data-sheet dense bf16 FLOP/s of a card (fp16 for the V100), None where it is not known."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ")
    return next((PEAK_FLOPS[name] for name in sorted(PEAK_FLOPS, key=len, reverse=True) if f" {name} " in f" {words} "), None)


def out_of_memory(error) -> bool:
    """torch has RuntimeErrors of several kinds for it, and a failed recording of a graph hides them behind its own."""
    return error is not None and (isinstance(error, MemoryError) or any(words in str(error) for words in ("out of memory", "can't allocate memory"))
                                  or out_of_memory(error.__context__))


@contextlib.contextmanager
def in_memory(cfg, device, params):
    """What did not fit, where memory does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        raise UserError(f"the memory of {device} does not hold this model of {short(params)} parameters with micro-batches of {cfg.micro_batch_size} x "
                        f"{cfg.block_size} tokens: lower --micro_batch_size, give --recompute=wide, or choose a smaller model.", alone=True) from None


def record_graph(run, pool=None):
    """run() as a CUDA graph, whose replay() repeats its kernels. run() runs once before: nothing may compile meanwhile."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph
