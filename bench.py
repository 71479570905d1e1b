"""Measures efficiency:  python bench.py kernel|ffn|train|prefill|decode|crossover [preset.py] [--name=value ...]
                      python bench.py curves out/RUN ...
                      python bench.py plot ROWS.jsonl ... --plot=PICTURE.png

    kernel     one structured linear: einsum, bmm, ours, and the dense matmul that it replaces
    ffn        one FFN, dense and structured, over widths and over numbers of tokens
    train      whole optimizer steps, dense and structured, plain and guided: tokens/s, MFU, memory, where the time goes
    prefill    forward of whole prompts
    decode     generation, token by token, over batch sizes; --max_batch=True: the highest tokens/s
               --refill=256: prompts and texts of mixed length in a batch that stays full
    crossover  factors against dense equivalents over the number of tokens: the table of speeds that decode=auto uses
    curves     training runs side by side: final losses, their difference to dense, fits of loss against FLOPs
    plot       the picture of rows that --json wrote; --kinds, --launches, --widths and --tokens select among them

Speeds are measured on random data. --json=PATH appends one JSON line per row, --plot=PATH.png draws the rows.
kernel, ffn, train and prefill compare the FFNs of --cases. Without it they compare dense and the FFN of the command
line, or, if that one is dense, the paper's structures. decode and crossover take the command line's structure.
"""
import dataclasses
import importlib.util
import json
import os
import re
import statistics
from dataclasses import dataclass

import config
from config import Config, UserError

COMMANDS = ("kernel", "ffn", "train", "prefill", "decode", "crossover", "curves", "plot")
PICTURES = (".png", ".pdf", ".svg")
CASES = ("dense", *(ffn + share for ffn in ("lowrank", "blockshuffle", "blockdense") for share in ("63", "32")))
KINDS = ("dense", "structured", "merged", "auto")


@dataclass
class Settings:
    json: str = ""                       # append one JSON line per row to this file
    plot: str = ""                       # write a picture of the rows to this file: .png, .pdf or .svg
    cases: str = ""                      # FFNs to compare, as in dense,lowrank32 (the paper's, at 32 or 63 %), or all
    widths: str = ""                     # kernel, ffn: widths, as in 768,2048; empty: the preset's, or a sweep
    tokens: str = ""                     # kernel, ffn: tokens in a call; prefill: lengths of prompts; empty: a sweep
    batches: str = ""                    # prefill, decode: batch sizes; empty: 1,16, in decode 1,16,256
    kinds: str = ",".join(KINDS)         # decode: forms of the FFN
    launches: str = "eager,graph"        # decode: how a step is launched; graph needs CUDA
    prompt_tokens: int = 1               # decode: length of the prompts; 1 is no prompt
    refill: int = 0                      # decode: this many prompts of mixed length; where a text ends, the next begins
    new_tokens: int = 256                # decode: tokens to generate
    plain: bool = False                  # train: beside each case the same model in plain torch
    max_batch: bool = False              # decode: double the batch while tokens/s rise and memory suffices
    repeats: int = 0                     # timed repetitions; rows hold their median; 0: 20 on a GPU, 5 on a CPU
    warmup: int = 0                      # repetitions before, compilation included; 0: 5 on a GPU, 1 on a CPU


def names(settings, name, known) -> list:
    """The words of a setting such as --kinds=dense,auto."""
    words = getattr(settings, name).replace(" ", "").split(",")
    if not set(words) <= set(known):
        raise UserError(f"{name}={getattr(settings, name)} does not fit: expected some of {', '.join(known)}, "
                        "separated by commas.")
    return words


def split_lists(settings):
    """Makes lists of the settings that are texts such as 768,2048."""
    for name in ("widths", "tokens", "batches"):
        text = getattr(settings, name)
        items = text.replace(" ", "").split(",") if text else []
        if not all(re.fullmatch(r"0*[1-9]\d{0,7}", item, re.ASCII) for item in items):
            raise UserError(f"{name}={text} does not fit: expected whole numbers from 1 to 99999999, "
                            "separated by commas.")
        setattr(settings, name, [int(item) for item in items])
    settings.kinds = names(settings, "kinds", KINDS)
    settings.launches = names(settings, "launches", ("eager", "graph"))


def with_case(cfg, case) -> Config:
    """cfg with the FFN of a name of CASES: the paper's ranks and blocks at its widths, its ratios at others."""
    ffn, share = (case, "") if case == "dense" else (case[:-2], case[-2:])
    half, width = 2 if share == "32" else 1, cfg.n_embd
    blockdense = (2 * width // 3 // half, 2) if width in (768, 1536) else (3 * width // 4 // half, 4)
    rank, nblocks = {"dense": (0, 0), "lowrank": (width // 2 // half, 0), "blockshuffle": (0, 2 * half),
                     "blockdense": blockdense}[ffn]
    cfg = dataclasses.replace(cfg, ffn=ffn, rank=rank, nblocks=nblocks, guide=cfg.guide if share else "off")
    config.check(cfg)
    return cfg


def compared(cfg, settings, width=None) -> dict:
    """{label: config} of the FFNs to compare, dense first; with a width, of one FFN of that width."""
    if width:
        cfg = dataclasses.replace(cfg, n_embd=width, ffn_dim=width * cfg.ffn_dim // cfg.n_embd, n_head=1, n_kv_head=1,
                                  attn_dim=2, guide="off")
        config.check(cfg)
    if not settings.cases and cfg.ffn != "dense":
        return {"dense": with_case(cfg, "dense"), ffn_name(cfg): cfg}
    cases = CASES if width else [case for case in CASES if not case.endswith("63")]
    if settings.cases:
        cases = CASES if settings.cases == "all" else names(settings, "cases", CASES)
    cases = sorted(cases, key=CASES.index)
    return {case if case == "dense" else f"{case[:-2]} {case[-2:]} %": with_case(cfg, case) for case in cases}


def ffn_name(cfg) -> str:
    rank = f" R={cfg.rank}" if cfg.ffn in ("lowrank", "blockdense") else ""
    return cfg.ffn + rank + (f" B={cfg.nblocks}" if cfg.ffn.startswith("block") else "")


def read_settings(argv):
    """Command line -> (command, Config or paths, Settings)."""
    if not argv or argv[0] in ("-h", "--help"):
        config.load(["--help"], Settings, usage=__doc__)
    command = argv[0]
    if command not in COMMANDS:
        raise UserError(f"{command} is not a benchmark: choose one of {', '.join(COMMANDS)}.")
    if command in ("curves", "plot"):
        subject, values = config.parse(argv[1:], Settings, usage=__doc__)
        settings = Settings(**values)
        split_lists(settings)
        if command == "curves" and not subject:
            raise UserError("curves needs the folder of at least one run: python bench.py curves out/NAME ...")
        if command == "plot" and not (subject and settings.plot):
            raise UserError("plot draws rows that --json wrote: give their file and --plot=NAME.png.")
    else:
        # A step here is one micro-batch, so micro_batch_size sets batch_size too.
        sizes = [a for a in argv if re.fullmatch(r"(--)?micro_batch_size=[1-9].*", a)]
        alike = [a.replace("micro_batch_size", "batch_size") for a in sizes]
        subject, settings = config.load([*argv[1:], *alike], Settings, usage=__doc__)
        one_width = any(a.endswith(".py") or a.removeprefix("--").startswith(("n_embd=", "ffn=")) for a in argv)
        split_lists(settings)
        settings.widths = settings.widths or [subject.n_embd] * one_width
        check_subject(command, subject, settings)
    for name in ("repeats", "warmup", "refill"):
        if getattr(settings, name) < 0:
            raise UserError(f"{name}={getattr(settings, name)} must not be negative: leave it out.")
    check_paths(settings)
    return command, subject, settings


def check_subject(command, cfg, settings):
    """UserError for sizes and cases that the command cannot measure."""
    if command in ("kernel", "ffn"):
        for width in settings.widths or [cfg.n_embd]:
            compared(cfg, settings, width)
    elif command in ("train", "prefill"):
        compared(cfg, settings)
    if command == "crossover" and (cfg.ffn == "dense" or cfg.n_dense_layers >= cfg.n_layer):
        raise UserError("crossover compares structured FFNs with their dense equivalents, and "
                        f"ffn={cfg.ffn} with n_dense_layers={cfg.n_dense_layers} of n_layer={cfg.n_layer} has none: "
                        "give ffn=lowrank, blockshuffle or blockdense, and fewer n_dense_layers than n_layer.")
    length = settings.prompt_tokens + settings.new_tokens
    if command == "decode" and (length > cfg.block_size or settings.prompt_tokens < 1 or settings.new_tokens < 2):
        raise UserError(f"prompt_tokens={settings.prompt_tokens} and new_tokens={settings.new_tokens} must be at least "
                        f"1 and 2 and together fit into block_size={cfg.block_size}: lower --new_tokens.")


def holds_rows(path) -> bool:
    """Whether a file is empty, or its first line is a row as --json writes it."""
    with config.reading(path), open(path, "rb") as file:
        line = file.readline(1 << 20)
    try:
        return not line.strip() or "benchmark" in json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return False


def check_paths(settings):
    """UserError for a file that cannot be written."""
    for path in filter(None, (settings.json, settings.plot)):
        folder = os.path.dirname(path) or "."
        if not os.path.isdir(folder):
            raise UserError(f"the folder of {path} does not exist: make it, or write elsewhere.")
        if os.path.isdir(path) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
            raise UserError(f"{path} cannot be written: give the name of a file in a folder that can.")
    if os.path.isfile(settings.json) and not holds_rows(settings.json):
        raise UserError(f"{settings.json} holds something other than rows, which --json appends: give it a new name.")
    if settings.plot and not settings.plot.endswith(PICTURES):
        raise UserError(f"plot={settings.plot} must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}.")
    if settings.plot and not importlib.util.find_spec("matplotlib"):
        raise UserError("plot needs matplotlib: pip install matplotlib, or leave --plot out.")


if __name__ == "__main__":
    SETTINGS = config.run(read_settings)  # before torch loads, so that a mistake is reported at once

import itertools
import math
import time
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import curves
import decode
import merge
from device import enough_memory, peak_flops, pick_device, pick_dtype, record_graph, set_up
from model import FFN, build, ffn_params, flops_per_token, linear_params, ops
from report import (DRAW, Table, clocks, conditions, copies, copy_rate, draw_rows, fresh, header, laps, ratio,
                    timed, within_memory)
from schedule import dropout_keys
from structured import BlockShuffle, LowRank, linear
from train import RecordedStep, fill_vocabulary, make_optimizer, train_step

PASSES = {"forward": 1, "forward+backward": 3}  # and how many times the forward's FLOPs
SHORT = 4096  # tokens; up to this many, launching kernels can take longer than running them


# ----------------------------------------------------------------------------------------------------------------------
# What kernel and ffn share: the sweep, copies that run in turn, and one row per pass

LONG = 30720  # tokens of a call that fills the card
GPU_SWEEP = (((768, 1024, 1536, 2048, 3072, 4096, 5120), LONG),
             ((2048, 3072, 5120, 6144), (1, 4, 16, 64, 256, 1024, 4096)))
CPU_SWEEP = ((128, 256), 512), ((256,), (1, 16, 256))


def sweep(settings, device) -> list:
    """[(what varies, width, tokens)]: the command line's lists crossed, or else over widths and then over tokens."""
    (all_widths, long), (token_widths, token_counts) = GPU_SWEEP if device.type == "cuda" else CPU_SWEEP
    if settings.widths or settings.tokens:
        varies = "tokens" if len(settings.tokens) > 1 else "width"
        return [(varies, w, t) for w in settings.widths or token_widths for t in settings.tokens or [long]]
    return [("width", w, long) for w in all_widths] + [("tokens", w, t) for w in token_widths for t in token_counts]


def time_passes(call, turns, ranks, settings):
    """Yields (pass, ms, spread, eager_ms) of one call(module, x), the copies running in turn.

    On a GPU they are replayed from a CUDA graph, which leaves the host's time out. eager_ms is a short call that is not
    compiled and is launched from Python.
    """
    def forward(f):
        with torch.no_grad():
            for module, x, _ in turns:
                f(module, x)

    def both(f):
        for module, x, dy in turns:
            torch.autograd.grad(f(module, x), (x, *module.parameters()), dy)

    compiled = torch.compile(call, dynamic=False) if ranks.compile else call
    for name, run in zip(PASSES, (forward, both)):
        turn, rounds, eager_ms = partial(run, compiled), 1, None
        if ranks.device.type == "cuda":
            if len(turns[0][1]) <= SHORT:
                rounds = math.ceil(32 / len(turns))  # so that starting the graph does not count
                eager_ms = timed(partial(run, call), ranks.device, settings)[0] / len(turns)
            turn = record_graph(lambda: [run(compiled) for _ in range(rounds)]).replay
        ms, spread = timed(turn, ranks.device, settings)
        yield name, ms / len(turns) / rounds, spread / len(turns) / rounds, eager_ms


COLUMNS = {"pass": 16, "ms": 8, "spread": 8, "tflops": 7, "of_matmul": 9, "speedup": 7, "floor_ms": 8, "bytes_ms": 8,
           "over_floor": 10, "eager_ms": 8}


def measure(table, call, make, n_in, n_out, multiply_adds, ranks, settings, **case):
    """Times call(make(), x) and writes a row per pass.

    floor_ms = FLOPs / the measured matmul rate. bytes_ms = weights, input, output and their gradients, each once / the
    measured copy rate. over_floor = ms / the larger of the two. speedup = dense ms / ms.
    """
    fresh(ranks.device)
    tokens, rates = case["tokens"], table.facts
    alike = {name: case[name] for name in ("sweep", "linear", "width", "tokens") if name in case}
    with within_memory(table, **case):
        turns = copies(make, tokens, n_in, n_out, ranks)
        weights = sum(p.numel() for p in turns[0][0].parameters())
        for passed, ms, spread, eager_ms in time_passes(call, turns, ranks, settings):
            flops = 2 * tokens * multiply_adds * PASSES[passed]
            moved = weights + tokens * (n_in + n_out)
            if passed != "forward":
                moved = 3 * weights + tokens * (3 * n_in + 2 * n_out)
            floor_ms = flops / rates["matmul_tflops"] / 1e9
            bytes_ms = moved * ranks.dtype.itemsize / rates["copy_tb_per_s"] / 1e9
            table.row(**case, **{"pass": passed}, ms=ms, spread=spread, flops=flops, tflops=flops / ms / 1e9,
                      of_matmul=floor_ms / ms, speedup=table.speedup(ms, case["ffn"], **alike, **{"pass": passed}),
                      floor_ms=floor_ms, bytes_ms=bytes_ms, over_floor=ms / max(floor_ms, bytes_ms), eager_ms=eager_ms)


# ----------------------------------------------------------------------------------------------------------------------
# kernel: one linear

def by_einsum(linear, x):
    """The structured map as its formula reads: x (T, N) -> (T, M)."""
    if isinstance(linear, LowRank):
        t = torch.einsum("tn,rn->tr", x, linear.V)
    else:
        B, _, p = linear.V.shape
        t = torch.einsum("tbp,bqp->tbq", x.view(-1, B, p), linear.V).flatten(1)                 # (T, B q)
    if isinstance(linear, BlockShuffle):
        y = torch.einsum("tqb,bsq->tsb", t.view(len(t), -1, B), linear.U).flatten(1)            # (T, s B)
    else:
        y = torch.einsum("tr,mr->tm", t, linear.U)
    return y + linear.bias if linear.bias is not None else y


def by_bmm(linear, x):
    """The same with plain matmuls and bmm. bmm needs the blocks as first dimension: the copies for that count."""
    if isinstance(linear, LowRank):
        t = x @ linear.V.T
    else:
        B, _, p = linear.V.shape
        t = torch.bmm(x.view(-1, B, p).transpose(0, 1), linear.V.transpose(1, 2))               # (B, T, q)
        t = t.transpose(0, 1).flatten(1)                                                        # (T, B q)
    if not isinstance(linear, BlockShuffle):
        return F.linear(t, linear.U, linear.bias)
    y = torch.bmm(t.view(len(t), -1, B).permute(2, 0, 1), linear.U.transpose(1, 2))             # (B, T, s)
    y = y.permute(1, 2, 0).flatten(1)                                                           # (T, s B)
    return y + linear.bias if linear.bias is not None else y


def ours(module, x):
    return module(x)


def bench_kernel(cfg, settings):
    """Both directions of an FFN: fc1 up, fc2 down."""
    ranks = set_up(cfg)
    columns = {"linear": 6, "width": 5, "tokens": 6, "ffn": 15, "rank": 4, "nblocks": 7, "by": 6, **COLUMNS}
    table = Table(columns, conditions(ranks, settings, rates=True), settings)
    if not (settings.widths or settings.tokens):
        widths = (768, 1024, 1536, 2048) if ranks.device.type == "cuda" else (128, 256)
        settings = dataclasses.replace(settings, widths=widths)
    for varies, width, tokens in sweep(settings, ranks.device):
        for name in ("fc1", "fc2"):
            for label, case in compared(cfg, settings, width).items():
                n, m = (case.n_embd, case.n_hidden) if name == "fc1" else (case.ffn_dim, case.n_embd)
                shape = case.ffn, n, m, case.rank, case.nblocks
                ways = {"dense": ours} if case.ffn == "dense" else {"einsum": by_einsum, "bmm": by_bmm, "ours": ours}
                for by, call in ways.items():
                    measure(table, call, lambda: linear(*shape, case.bias), n, m, linear_params(*shape),
                            ranks, settings, benchmark="kernel", sweep=varies, linear=name, width=width,
                            tokens=tokens, ffn=label, rank=case.rank, nblocks=case.nblocks, by=by)
    return table


# ----------------------------------------------------------------------------------------------------------------------
# ffn: one FFN

def bench_ffn(cfg, settings):
    """model.FFN with its activation and biases, over widths at many tokens and over tokens."""
    ranks = set_up(cfg)
    columns = {"width": 5, "tokens": 6, "ffn": 15, "rank": 4, "nblocks": 7, **COLUMNS}
    table = Table(columns, conditions(ranks, settings, rates=True), settings)
    for varies, width, tokens in sweep(settings, ranks.device):
        for label, case in compared(cfg, settings, width).items():
            multiply_adds = ffn_params(dataclasses.replace(case, n_layer=1, n_dense_layers=0))
            measure(table, ours, lambda: FFN(case, case.ffn), width, width, multiply_adds, ranks, settings,
                    benchmark="ffn", sweep=varies, width=width, tokens=tokens, ffn=label, rank=case.rank,
                    nblocks=case.nblocks, act=case.act)
    return table


# ----------------------------------------------------------------------------------------------------------------------
# train: whole optimizer steps

def bench_train(cfg, settings):
    """One micro-batch per step; the step is train.py's own. With a guide in cfg every structure also runs guided."""
    fill_vocabulary(cfg)
    cfg.batch_size = cfg.micro_batch_size
    ranks = set_up(cfg)
    columns = {"ffn": 24, "guided": 6, "ms": 8, "spread": 7, "tokens_per_s": 12, "speedup": 7, "mfu": 7, "gib": 6,
               "forward_ms": 10, "backward_ms": 11, "optimizer_ms": 12, "clock": 9}
    table = Table(columns, conditions(ranks, settings), settings)
    for label, case in compared(cfg, settings).items():
        guided = case.guide in ("fixedstep", "fixedflop")
        for kind in ("ours", *["guided"] * guided, *["plain"] * settings.plain):
            plain, row = kind == "plain", {"benchmark": "train", "ffn": label, "guided": kind == "guided"}
            row["ffn"] += ", plain" * plain
            before, ops.ON = ops.ON, ops.ON and not plain
            try:
                with within_memory(table, **row):
                    train_row(row, case, plain, ranks, table, settings)
            finally:
                ops.ON = before
    return table


def plain_torch(model, cfg, ranks):
    """The model as one would write it in plain torch: fp32 weights under autocast, all logits at once, torch's AdamW.

    torch.compile takes the whole model at once. -> (a model for train_step, its optimizer); ops.ON must be False.
    """
    def loss(tokens, targets, alpha=None, guided=(), keys=None):
        return F.cross_entropy(model(tokens, keys=keys).flatten(0, 1).float(), targets.flatten())
    optimizer = make_optimizer(cfg, model, dataclasses.replace(ranks, dtype=torch.float32))
    return torch.compile(loss) if ranks.compile else loss, optimizer


def train_row(row, cfg, plain, ranks, table, settings):
    """row: the names that go into the table's row."""
    fresh(ranks.device)
    guided = row["guided"]
    cfg = dataclasses.replace(cfg, kernels=False, recompute="off") if plain else cfg
    model = build(cfg, ranks.device, cfg.seed)
    if guided:
        for _, module in model.structured_linears():
            module.start_guide()
    wrapped, optimizer = plain_torch(model, cfg, ranks) if plain else (model, make_optimizer(cfg, model, ranks))
    if ranks.compile and not plain:
        model.compile_parts()
    size, device = (8, 1, cfg.micro_batch_size, cfg.block_size + 1), ranks.device
    batches = itertools.cycle(torch.randint(cfg.vocab_size, size, device=device))
    alpha = torch.full((), 0.5, device=device)
    keys = dropout_keys(cfg, 0, ranks).to(device) if cfg.dropout else None
    given, recorded = (cfg, ranks, 1e-4, alpha, model.layers_with_guide(), keys), RecordedStep()

    def step():
        recorded(wrapped, optimizer, next(batches), *given)

    for _ in range(RecordedStep.EAGER + 1):
        step()
    ms, spread = timed(step, ranks.device, settings)
    gib = clock = None
    if ranks.device.type == "cuda":
        gib = torch.cuda.max_memory_allocated() / 2**30
        for _ in range(5):
            step()
        clock = clocks(ranks.device, "clocks.sm")  # read while those steps run: under load the clock falls
    recorded.forget(optimizer)
    # a graph has no marks: the shares are those of steps launched one by one, and add up to ms
    times = laps(marked_step(wrapped, optimizer, batches, given), ranks.device, settings)        # (repeats, 3)
    forward_ms, backward_ms, optimizer_ms = (times.sum(0) * ms / times.sum()).tolist()
    rate = cfg.micro_batch_size * cfg.block_size / ms * 1e3
    flops = 3 * flops_per_token(cfg, "dense" if guided else None)
    table.row(**row, ms=ms, spread=spread, tokens_per_s=round(rate), speedup=table.speedup(ms, row["ffn"]),
              flops_per_token=flops, mfu=ratio(flops * rate, peak_flops(ranks.device)), gib=gib, forward_ms=forward_ms,
              backward_ms=backward_ms, optimizer_ms=optimizer_ms, clock=clock, config=config.to_dict(cfg))


def marked_step(model, optimizer, batches, given):
    """train.train_step as step(mark), which marks the ends of forward and backward."""
    update = optimizer.step

    def step(mark):
        def forward(*inputs):
            loss = model(*inputs)
            mark()
            return loss

        def marked_update(clip):
            mark()
            return update(clip)

        optimizer.step = marked_update
        train_step(forward, optimizer, next(batches), *given)
    return step


# ----------------------------------------------------------------------------------------------------------------------
# prefill: whole prompts

@torch.no_grad()
def bench_prefill(cfg, settings):
    """Prompts -> the logits of the next token of each, without a KV cache; weights in the matmuls' precision."""
    lengths = settings.tokens or sorted({min(n, cfg.block_size) for n in (128, 512, cfg.block_size)})
    fill_vocabulary(cfg)
    cfg.block_size = max(lengths)
    ranks = set_up(cfg)
    columns = {"ffn": 20, "batch": 5, "prompt": 6, "ms": 8, "spread": 7, "tokens_per_s": 12, "speedup": 7, "tflops": 7,
               "mfu": 7, "gib": 6}
    table = Table(columns, conditions(ranks, settings), settings)
    for label, case in compared(cfg, settings).items():
        with within_memory(table, benchmark="prefill", ffn=label):
            model = build(case, ranks.device).eval()
            for p in model.parameters():
                p.data = torch.randn_like(p, dtype=ranks.dtype) * (p.shape[-1] if p.dim() else 1) ** -0.5
            if ranks.compile:
                model.compile_parts()
            for batch, length in itertools.product(settings.batches or (1, 16), lengths):
                with within_memory(table, benchmark="prefill", ffn=label, batch=batch, prompt=length):
                    prefill_row(label, case, model, batch, length, ranks, table, settings)
    return table


def prefill_row(label, cfg, model, batch, length, ranks, table, settings):
    fresh(ranks.device)  # every length is compiled anew
    prompts = itertools.cycle(torch.randint(cfg.vocab_size, (4, batch, length), device=ranks.device))
    ms, spread = timed(lambda: model.head(model.hidden(next(prompts))[:, -1]), ranks.device, settings)
    head = 2 * cfg.vocab_size * cfg.n_embd  # of the last token only
    flops = batch * (length * (flops_per_token(dataclasses.replace(cfg, block_size=length)) - head) + head)
    gib = torch.cuda.max_memory_allocated() / 2**30 if ranks.device.type == "cuda" else None
    table.row(benchmark="prefill", ffn=label, batch=batch, prompt=length, ms=ms, spread=spread,
              tokens_per_s=round(batch * length / ms * 1e3),
              speedup=table.speedup(ms, label, batch=batch, prompt=length), flops=flops, tflops=flops / ms / 1e9,
              mfu=ratio(flops / ms * 1e3, peak_flops(ranks.device)), gib=gib, config=config.to_dict(cfg))


# ----------------------------------------------------------------------------------------------------------------------
# decode: the decoding loop of sample.py, on random weights

@torch.no_grad()
def random_model(cfg, device):
    """Random weights, none of them zero. Faster than the true initialization of large factors."""
    model = build(cfg, device)
    torch.manual_seed(cfg.seed)
    for name, p in model.named_parameters():
        p.fill_(1.0) if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")) else p.normal_(std=0.02)
    return model


def generation(decoder, prompts, settings):
    """One run of the loop, from host to host -> seconds to the first tokens and per further one."""
    if decoder.key.is_cuda:
        torch.cuda.synchronize()
    marks = [time.perf_counter()]
    for _ in decoder.run([decode.Row(prompt) for prompt in prompts]):
        marks.append(time.perf_counter())
    return marks[1] - marks[0], (marks[-1] - marks[1]) / max(settings.new_tokens - 1, 1)


def decode_row(model, cfg, kind, launch, batch, ceiling, table, settings):
    """Times one case; returns its tokens/s."""
    fresh(model.head.weight.device)
    length = settings.prompt_tokens + settings.new_tokens
    greedy = SimpleNamespace(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, max_new_tokens=settings.new_tokens)
    decoder = decode.Decoder(model, greedy, batch, length, graphs=launch == "graph")
    prompts = torch.randint(cfg.vocab_size, (batch, settings.prompt_tokens)).tolist()
    for _ in range(min(2, settings.prompt_tokens)):  # the second prompt of a length records its graph
        generation(decoder, prompts, settings)
    runs = [generation(decoder, prompts, settings) for _ in range(settings.repeats or 3)]
    first, each = (statistics.median(column) for column in zip(*runs))
    weights = merge.step_weights(model, batch, launch)
    kv = batch * decode.token_bytes(cfg, model.head.weight.dtype) * (settings.prompt_tokens + settings.new_tokens / 2)
    rate = batch * settings.new_tokens / (first + each * (settings.new_tokens - 1))
    gbs = (weights + kv) / each / 1e9
    table.row(ffn=ffn_name(model.cfg), kind=kind, launch=launch, batch=batch, per_user=rate / batch,
              tokens_per_s=round(rate), first_ms=first * 1e3, ms=each * 1e3, gb_s=gbs, share=gbs / ceiling,
              weights_mb=weights / 1e6, kv_mb=kv / 1e6, benchmark="decode", prompt_tokens=settings.prompt_tokens,
              new_tokens=settings.new_tokens, config=config.to_dict(cfg))
    return rate


def all_texts(decoder, cfg, prompts, at_once):
    """(tokens/s, rows) of all prompts, of which `at_once` are given to the loop at a time."""
    rows = [decode.Row(prompt, decode.row_key(cfg.seed, prompt)) for prompt in prompts]
    began = time.perf_counter()
    for i in range(0, len(rows), at_once):
        for _ in decoder.run(rows[i:i + at_once]):
            pass
    return sum(len(row.new) for row in rows) / (time.perf_counter() - began), rows


def serve_row(model, cfg, kind, launch, batch, table, settings):
    """Times prompts of 16 to 512 tokens, refilled and in static batches; returns the tokens/s of the former.

    Each new token is drawn evenly from 256, of which one ends the text. cold: the very first run, which records
    graphs. steady: tokens/s of a full batch that no text leaves, after its prompts. Its rows are of one length, and
    hold `cached` tokens on average, as a text does at its steps. So of_steady counts as losses: prompts, steps past an
    end, steps that wait for the longest row, and empty places, most of which are those of the last texts.
    """
    fresh(model.head.weight.device)
    torch.manual_seed(cfg.seed)  # the same prompts for all rows
    longest = min(512, cfg.block_size - settings.new_tokens)
    lengths = torch.randint(min(16, longest), longest + 1, (settings.refill,)).tolist()
    prompts = [torch.randint(cfg.vocab_size, (length,)).tolist() for length in lengths]
    even = SimpleNamespace(temperature=1e6, top_k=0, top_p=1.0, min_p=0.0, max_new_tokens=settings.new_tokens)
    decoder = decode.Decoder(model, even, batch, longest + settings.new_tokens, 0, min(256, cfg.vocab_size),
                             launch == "graph")
    runs = range(2 + (settings.repeats or 3))  # the second still records graphs
    refilled, static = ([all_texts(decoder, cfg, prompts, n) for _ in runs] for n in (len(prompts), batch))
    (cold, rows), rate = refilled[0], statistics.median(rate for rate, _ in refilled[2:])
    tokens, decoder.eos = sum(len(row.new) for row in rows), -1
    cached = sum(len(row.new) * (len(row.prompt) + len(row.new) / 2) for row in rows) / max(tokens, 1)
    full = torch.randint(cfg.vocab_size, (batch, max(1, round(cached - settings.new_tokens / 2)))).tolist()
    steady = batch / statistics.median(generation(decoder, full, settings)[1] for _ in runs[2:])
    table.row(ffn=ffn_name(model.cfg), kind=kind, launch=launch, batch=batch, prompts=len(prompts),
              prompt_tokens=sum(lengths), new_tokens=tokens, cached=round(cached), cold=round(cold),
              static=round(statistics.median(rate for rate, _ in static[2:])), tokens_per_s=round(rate),
              steady=round(steady), of_steady=rate / steady, benchmark="serve", config=config.to_dict(cfg))
    return rate


def bench_decode(cfg, settings):
    """Prints per case: ms to the first token and per token after it, GB/s, and their share of the copy rate.

    GB/s counts the bytes that a step has to read: the weights and, on average, half of the final cache.
    """
    fill_vocabulary(cfg)
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    if device.type != "cuda" and settings.launches != ["eager"]:
        print(f"device {device.type} has no CUDA graphs: every step runs eager.", flush=True)
        settings.launches = ["eager"]
    ceiling = copy_rate(device, settings)
    length = decode.padded(settings.prompt_tokens + settings.new_tokens, cfg.block_size)
    columns = {"ffn": 18, "kind": 10, "launch": 6, "batch": 6, "per_user": 8, "tokens_per_s": 12, "first_ms": 8,
               "ms": 8, "gb_s": 7, "share": 7, "weights_mb": 10, "kv_mb": 8}
    time_row = partial(decode_row, ceiling=ceiling)
    if settings.refill:
        columns = {"ffn": 18, "kind": 10, "launch": 6, "batch": 6, "prompts": 7, "prompt_tokens": 13, "new_tokens": 10,
                   "cached": 6, "cold": 8, "static": 8, "tokens_per_s": 12, "steady": 8, "of_steady": 9}
        time_row, length = serve_row, decode.padded(512 + settings.new_tokens, cfg.block_size)
    facts = {**header(device), "copy": f"{ceiling:.0f} GB/s", "dtype": str(dtype).removeprefix("torch.")}
    table = Table(columns, facts, settings)

    def largest():
        fresh(device)
        return decode.rows_that_fit(cfg, length, device, dtype)

    for kind in settings.kinds if cfg.ffn != "dense" else ["dense"]:
        model = random_model(dataclasses.replace(cfg, ffn="dense") if kind == "dense" else cfg, device)
        merge.prepare_model(model, "structured" if kind == "dense" else kind, dtype)
        for launch in settings.launches[-1:] if settings.max_batch else settings.launches:
            row = partial(time_row, model, cfg, kind, launch, table=table, settings=settings)
            if settings.max_batch:
                highest_rate(row, largest, device)
            else:
                for batch in settings.batches or (1, 16, 256):
                    row(batch)
        del model, row
    return table


def highest_rate(rate_of, largest, device):
    """Doubles the batch while that brings 1 % or more, then prints the best of what fits."""
    fits = largest()
    if not fits:
        raise UserError("not a single sequence fits beside the weights: give fewer new_tokens, or a smaller model.")
    batch, rates = min(256 if device.type == "cuda" else 1, fits), {}
    while batch <= fits and (len(rates) < 2 or rates[batch // 2] > 1.01 * rates[batch // 4]):
        rates[batch] = rate_of(batch)
        batch *= 2
    if batch > fits and fits not in rates:
        fits = largest() or fits  # earlier batches may have fragmented the memory
        rates[fits] = rate_of(fits)
    best = max(rates, key=rates.get)
    print(f"most: {rates[best]:.0f} tokens/s at batch {best}; the largest batch that fits is {fits}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# crossover: the table of speeds that decode=auto uses

def bench_crossover(cfg, settings):
    """Milliseconds of one linear. slower_by: the time of auto's form over that of the better one - 1, timed anew.

    of: a linear by itself, or the step. For few sequences the captured step is a single kernel or a chain of kernels.
    Then auto compares whole steps, and a linear's time is its equal share.
    """
    cfg.vocab_size = 1024
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    model = random_model(cfg, device)
    pairs = merge.cast_and_merge(model, "auto", dtype)
    facts, began = header(device), time.perf_counter()
    speeds = merge.SpeedTable(merge.load_or_measure(model, pairs))
    facts["measured_in"] = f"{time.perf_counter() - began:.1f} s"
    between = ((a + b) // 2 for a, b in itertools.pairwise(merge.TOKENS))
    sizes = sorted({*merge.TOKENS, *between})
    again = merge.measure(pairs, sizes)
    of_step = merge.measure_steps(model, pairs, [tokens for tokens in sizes if tokens <= max(merge.STEP_BATCHES)])
    for tokens, rows in of_step.items():
        for shape, ms in rows.items():
            again["graph"][shape][tokens] = ms
    columns = {"linear": 60, "launch": 6, "tokens": 6, "of": 6, "factors_ms": 10, "merged_ms": 10, "speedup": 8,
               "auto": 8, "slower_by": 9}
    table = Table(columns, facts, settings)
    for mode, shapes in again.items():
        speeds.mode = mode
        for shape, row in shapes.items():
            for tokens, (factors, merged) in row.items():
                auto = "merged" if speeds.merged(shape, int(tokens)) else "factors"
                slower_by = {"merged": merged, "factors": factors}[auto] / min(factors, merged) - 1
                of = "step" if mode == "graph" and tokens in of_step else "linear"
                table.row(linear=shape, launch=mode, tokens=int(tokens), of=of, factors_ms=factors, merged_ms=merged,
                          speedup=merged / factors, auto=auto, slower_by=slower_by, benchmark="crossover")
    return table


BENCHMARKS = {"kernel": bench_kernel, "ffn": bench_ffn, "train": bench_train, "prefill": bench_prefill,
              "decode": bench_decode, "crossover": bench_crossover, "curves": curves.compare, "plot": draw_rows}


def main(command, subject, settings):
    with enough_memory(f"the memory does not hold what {command} needs here: give a smaller model, batch or number "
                       "of tokens."):
        table = BENCHMARKS[command](subject, settings)
    if table and settings.plot and table.rows:
        DRAW[command](settings.plot, table.rows)


if __name__ == "__main__":
    config.run(lambda argv: main(*SETTINGS))
