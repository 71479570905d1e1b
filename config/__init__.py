"""Settings: one dataclass, one loader.

A preset (config/*.py) is a file of plain assignments; it is parsed, never executed. Defaults < presets < command line.
Every script reads the same Config with the same loader. What one script alone needs is a dataclass beside its main.
The comment after a field is its help text: `python train.py --help` prints them.

Importing torch takes seconds, and a misspelt setting should not wait for it. So a script has two main blocks: one above
`import torch` that reads the settings, and one at the end that runs with them.

    if __name__ == "__main__":
        SETTINGS = config.run(read_settings)
    import torch
    ...
    if __name__ == "__main__":
        config.run(lambda argv: main(*SETTINGS))
"""
import ast
import contextlib
import dataclasses
import difflib
import inspect
import json
import operator
import os
import re
import reprlib
import signal
import sys
import textwrap
import time
import types
import typing
from dataclasses import dataclass
from typing import Literal


class UserError(Exception):
    """A user's mistake, or a failure of the machine, in one sentence; scripts print it and exit with status 2.

    Under torchrun rank 0 prints for all. With `alone` the rank that raised it prints too, since the others may not
    raise it. Names in files may be long, or hold what a terminal obeys: a sentence has at most 400 characters, all
    printable. Words of more than 80 are cut first, then the middle, since the end says what to do.
    """

    def __init__(self, sentence, alone=False):
        text = "".join(c if c.isprintable() else "?" for c in sentence)
        text = re.sub(r"\S{80,}", lambda word: f"{word[0][:60]}...", text) if len(text) > 400 else text
        super().__init__(text if len(text) <= 400 else f"{text[:280]} ... {text[-110:]}")
        self.alone = alone


@dataclass
class Config:
    # --- the model
    n_layer: int = 12                    # transformer blocks
    n_embd: int = 768                    # width of the residual stream
    n_head: int = 12                     # query heads
    n_kv_head: int = 0                   # key/value heads, shared by groups of query heads; 0: n_head
    attn_dim: int = 0                    # n_head x head size; 0: n_embd
    qk_rank: int = 0                     # queries and keys each of two factors of this rank, never guided; 0: dense
    ffn_dim: int = 0                     # hidden width of the FFN; 0: 4 x n_embd
    block_size: int = 1024               # context length, tokens
    vocab_size: int = 0                  # tokens; 0: the data's, larger is padding
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"      # normalisation before attention, FFN and head
    act: Literal["gelu", "swiglu", "relu2"] = "gelu"         # activation; gelu is the tanh form, relu2 is max(x, 0)^2
    pos: Literal["rope", "absolute"] = "rope"                # positions: rotary, or a learned table
    bias: bool = True                    # biases in linears and layer norms (the LM head never has one)
    tie_embeddings: bool = True          # LM head = token embedding
    qk_norm: float = 0.0                 # RMS norm of every head's queries and keys, times this; 0: none
    post_norm: float = 0.0               # norms after attention and FFN too, whose weights start at this; 0: none
    embed_norm: bool = False             # RMS norm of the token embeddings
    smear: bool = False                  # a token's embedding adds a gated share of the one before it
    embed_skip: bool = False             # before every block x <- a x + b (token embeddings), a and b learned
    value_embeddings: bool = False       # every other layer adds a gated embedding of the token to its values
    logit_softcap: float = 0.0           # logits <- c tanh(logits / c), so that none exceeds c; 0: none
    rope_theta: float = 10_000.0         # base of the rotary positions
    norm_eps: float = 1e-5               # added to the variance or mean square in every norm
    init: Literal["paper", "zero"] = "paper"                 # paper: N(0, 0.02^2); zero: branches 0, rest by width
    dropout: float = 0.0                 # probability, on embeddings and residual branches
    # --- the FFN's linears
    ffn: Literal["dense", "lowrank", "blockshuffle", "blockdense"] = "dense"  # parametrization of fc1 and fc2
    rank: int = 0                        # R of lowrank and blockdense
    nblocks: int = 0                     # B of blockshuffle and blockdense
    n_dense_layers: int = 1              # the first layers whose FFN stays dense
    # --- self-guided training
    guide: Literal["off", "fixedstep", "fixedflop", "replay"] = "off"  # dense W in the first steps; replay: without W
    guide_ratio: float | Literal["auto"] = "auto"            # guided steps / steps; auto: 0.5, or FLOPs as dense
    guide_schedule: Literal["cosine", "linear"] = "cosine"   # how alpha falls from 1 to 0 over the guided steps
    guide_skip: bool = False             # use the guide with probability alpha only
    # --- data
    dataset: str = "stdlib"              # stdlib | text | refinedweb | a Hugging Face dataset's name
    input: str = ""                      # text: files or globs, separated by commas
    val_input: str = ""                  # text: the same for validation; empty: about 1 % of the documents
    tokenizer: str = "spm:4096"          # gpt2 | llama | byte | spm:VOCAB (trained here) | a .model | a tokenizer.json
    data_dir: str = ""                   # folder of train.bin and val.bin; empty: data/<dataset>-<tokenizer>
    max_tokens: int = 100_000_000        # training tokens; more than the data has means epochs
    batch_size: int = 512                # sequences per optimizer step
    micro_batch_size: int = 16           # sequences per forward, per process
    # --- the optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"            # muon: on the matrices of the blocks, AdamW on the rest
    lr: float | Literal["auto"] = 6e-4   # peak learning rate; muon: of matrices, auto is the rule of muon_rates
    embed_lr: float | Literal["auto"] = "auto"               # muon: of embeddings
    head_lr: float | Literal["auto"] = "auto"                # muon: of the LM head
    vector_lr: float | Literal["auto"] = "auto"              # muon: of norms, biases, gates and the a of embed_skip
    skip_lr: float | Literal["auto"] = "auto"                # muon: of smear and the b of embed_skip
    schedule: Literal["cosine", "linear"] = "cosine"         # how the learning rate falls
    decay_ratio: float = 1.0             # share of the steps, the last, over which it falls; 1: all after the warm-up
    min_lr_ratio: float = 0.1            # final / peak learning rate
    warmup_ratio: float = 0.1            # share of the steps with linear warm-up
    warmup_steps: int = 0                # steps of warm-up; 0: by warmup_ratio
    weight_decay: float | Literal["auto"] = 0.1              # decoupled; adamw: on all; muon: on matrices, or auto
    betas: tuple[float, float] = (0.9, 0.999)                # of AdamW
    grad_clip: float = 1.0               # largest global gradient norm; 0: no clipping
    seed: int = 1005                     # of initialisation, data order, skip draws
    # --- the run
    eval_interval: int = 500             # steps between validations; 0: only at the end
    eval_tokens: int = 1024 * 1024       # tokens of one validation during the run
    final_eval_tokens: int = 512_000 * 1024                  # tokens of the final validation, or all there are
    eval_only: bool = False              # score out_dir's model on data_dir, then stop
    log_interval: int = 10               # steps between log lines
    save_interval: int = 1000            # steps between checkpoints, more on a slow disk; 0: only at the end
    keep_checkpoints: int = 2            # checkpoints that stay: the newest, and those before it for when it is damaged
    max_bad_steps: int = 10              # end after so many steps in a row whose loss or gradient is not finite
    out_dir: str = ""                    # the run's folder; empty: out/<preset name>, or out/run
    resume: Literal["off", "auto"] = "off"                   # auto: continue the run in out_dir if there is one
    init_from: str = ""                  # first weights, a run folder or model.pt; a dense one is made to fit
    calibrate_tokens: int = 65536        # init_from: training tokens that weigh how a dense one is made to fit; 0: none
    distill: str = ""                    # learn the predictions of this run folder or model.pt on the same batches
    distill_share: float = 1.0           # of them in the loss, the rest is cross-entropy with the text
    teacher_flops: float = 0.0           # per token, of the forward of distill's model; filled in from it
    wandb: bool = False                  # log to Weights & Biases too
    wandb_project: str = "structured-ffn"                    # its project
    device: str = "auto"                 # auto | cpu | cuda | cuda:N | mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"   # of matmuls; weights stay float32; auto: bfloat16 on CUDA
    compile: bool | Literal["auto"] = "auto"                 # torch.compile; auto: on CUDA
    recompute: Literal["off", "cheap", "wide"] = "cheap"     # compiled; cheap: all but matmuls; wide: those of FFNs too
    parallel: Literal["ddp", "fsdp"] = "ddp"                 # each process has all of the weights, or a share of them
    timeout: float = 10.0                # minutes that a process waits for the others before the run ends
    kernels: bool = True                 # Triton kernels for structured FFNs where they fit (Hopper, bf16, gelu, relu2)

    @property
    def extras(self) -> list:
        """Names of the parts that the paper's model lacks: the decoding kernels know none of them."""
        return [name for name in ("qk_norm", "post_norm", "embed_norm", "smear", "embed_skip", "value_embeddings",
                                  "logit_softcap") if getattr(self, name)]

    @property
    def n_hidden(self) -> int:
        """Rows of fc1: SwiGLU's gate and value are one matrix."""
        return 2 * self.ffn_dim if self.act == "swiglu" else self.ffn_dim


# ----------------------------------------------------------------------------------------------------------------------
# Values: every one is checked against its field's type

UNIONS = (types.UnionType, typing.Union)


def _describe(kind) -> str:
    if typing.get_origin(kind) in UNIONS:
        return " or ".join(_describe(k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return " | ".join(str(v) for v in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"{len(typing.get_args(kind))} numbers, as in (0.9, 0.95)"
    return {int: "a whole number", float: "a number", bool: "True or False", str: "text"}[kind]


def _fits(kind, value):
    """value as the field's type, or None where it does not fit."""
    if typing.get_origin(kind) in UNIONS:
        return next((v for k in typing.get_args(kind) if (v := _fits(k, value)) is not None), None)
    if typing.get_origin(kind) is Literal:
        return value if value in typing.get_args(kind) and not isinstance(value, bool) else None
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, (tuple, list)) or len(value) != len(kinds):
            return None
        items = tuple(_fits(k, v) for k, v in zip(kinds, value))
        return None if None in items else items
    if kind in (bool, str):
        return value if isinstance(value, kind) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:  # NaN too
        return None
    if kind is int:
        return int(value) if value == int(value) else None  # 6.7e9 is a fine number of tokens
    return float(value)


PATHS = {"init_from", "distill", "data_dir", "out_dir", "dataset", "input", "val_input", "tokenizer",  # of Config
         "prompt_file", "prompts", "out", "json", "plot"}                                     # of the scripts


def _typed(field, value, text=None):
    """value as the field's type, or UserError. In paths ~ becomes the home folder: shells leave it alone after `=`."""
    result = _fits(field.type, value)
    if result is None and text is not None:
        result = _fits(field.type, text)  # a name that happens to read as a number: --tokenizer=123
    if result is None:
        raise UserError(f"{field.name}={shown(value) if text is None else text} does not fit: "
                        f"expected {_describe(field.type)}.")
    if field.name in PATHS:
        result = ",".join(map(os.path.expanduser, result.split(",")))
    return result


def shown(value) -> str:
    """Some characters of a value that a file holds; all of it may be endless, as of lists that hold one list twice."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python prints no number of more than 4300 digits
        return "a number of thousands of digits"


def reason(e) -> str:
    """The kind and the words of an exception of a library, of which some have none, on one line."""
    return textwrap.shorten(f"{type(e).__name__}: {e}", 120, placeholder=" ...").rstrip(":")


def _unknown(name, known, where):
    near = difflib.get_close_matches(name[:80], known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "--help lists all settings."
    raise UserError(f"{where} has no setting named {name}: {hint}")


def short(n, billion="B") -> str:
    """1234567 -> 1.23M; of bytes a billion is a G"""
    for size, unit in ((1e12, "T"), (1e9, billion), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


# ----------------------------------------------------------------------------------------------------------------------
# Text files: one reader for presets, prompts and corpora

@contextlib.contextmanager
def reading(what, advice="give the path of a UTF-8 text file"):
    """Turns a file that is missing or cannot be read into one sentence."""
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot read {what} ({e.strerror}): {advice}.") from None


def as_text(data: bytes, where) -> str:
    """UTF-8 text of the bytes of a file that errors call `where`. A byte order mark is dropped, line ends stay."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{where} is not UTF-8 text (byte {e.start}): convert it, as with iconv -t utf-8.") from None


def read_text(path, most=None) -> str:
    """The UTF-8 text in the file at path, or of standard input for "-", as `as_text` reads it.

    UserError above `most` bytes, where that is given.
    """
    _require(path != "-" or sys.stdin, "standard input is closed: give it some text, or the path of a UTF-8 text file.")
    with reading(path), contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as f:
        data = f.read(most and most + 1)
    if most and len(data) > most:
        raise UserError(f"{path} is longer than {most} bytes, so it is not a file of its kind: give another one.")
    return as_text(data, "standard input" if path == "-" else path)


def read_json(path, most=1 << 20):
    """The value in a JSON file of at most `most` bytes: in Python's memory it may take thirty times as many."""
    try:
        return json.loads(read_text(path, most))
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is not JSON.") from None


def text_lines(file, where, longest=1 << 20, skip=None):
    """Yields (number, line) of a binary file: the line as UTF-8 bytes with its end, \\n or \\r\\n.

    A lone \\r ends no line. A byte order mark at the start is dropped. A line over `longest` bytes comes in parts, cut
    between characters, under one number. A line that is not UTF-8 raises UserError, or is left out and reported to
    skip(number) where that is given. Readers of JSON lines skip blank ones (`not line.strip()`), which count as lines.
    """
    number, offset, rest = 1, 0, b""
    while data := rest + file.readline(longest - len(rest)):
        line, rest = data if offset else data.removeprefix(b"\xef\xbb\xbf"), b""
        try:
            line.decode()
        except UnicodeDecodeError as e:
            if e.reason == "unexpected end of data" and len(data) == longest:
                line, rest = line[:e.start], line[e.start:]
            elif skip:
                skip(number)
                line = b""
            else:
                at = offset + len(data) - len(line) + e.start
                raise UserError(f"{where} line {number} is not UTF-8 text ({e.reason} at byte {at} of the file): "
                                "convert it, as with iconv -t utf-8.") from None
        if line:
            yield number, line
        number, offset = number + data.endswith(b"\n"), offset + len(data) - len(rest)


# ----------------------------------------------------------------------------------------------------------------------
# The command line and presets

def parse(argv, *classes, usage=""):
    """Splits a command line into positional words and typed settings {name: value} of the given dataclasses."""
    fields = {f.name: f for c in classes for f in dataclasses.fields(c)}
    words, values = [], {}
    for arg in argv:
        if arg in ("-h", "--help"):
            print(_help(classes, usage))
            sys.exit(0)
        name, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("-") and not (equals and name.isidentifier()):
            words.append(os.path.expanduser(arg))
            continue
        if name not in fields:
            _unknown(name, fields, "the command line")
        _require(equals, f"{arg} has no value: write --{name}=VALUE ({_describe(fields[name].type)}).")
        try:
            value = text if fields[name].type is str else ast.literal_eval(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            value = {"true": True, "false": False}.get(text, text)
        values[name] = _typed(fields[name], value, text)
    return words, values


def _help(classes, usage) -> str:
    lines = [usage.strip(), "", "Settings (--name=value), with their defaults:"]
    for cls in classes:
        comments = dict(re.findall(r"^    (\w+): [^#\n]*# (.*)$", inspect.getsource(cls), re.M))
        for f in dataclasses.fields(cls):
            choice = f" [{_describe(f.type)}]" if "Literal" in str(f.type) else ""
            lines.append(f"  --{f.name}={f.default}".ljust(36) + f" {comments.get(f.name, '')}{choice}")
    return "\n".join(lines).strip()


ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow}


def _literal(node):
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = _literal(node.left), _literal(node.right)
        if not all(isinstance(v, (int, float)) and abs(v) < 1e15 for v in (left, right)):
            raise ValueError
        if isinstance(node.op, ast.Pow) and abs(right) > 64:
            raise ValueError
        return ARITHMETIC[type(node.op)](left, right)
    return ast.literal_eval(node)


def read_preset(path) -> dict:
    """{name: typed value} of a preset file: plain assignments of literals, arithmetic on numbers allowed."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    if not (path.endswith(".py") and os.path.isfile(path)):
        here = os.path.dirname(os.path.abspath(__file__))
        near = difflib.get_close_matches(os.path.basename(path), sorted(os.listdir(here)), n=1)
        hint = f"did you mean {os.path.relpath(os.path.join(here, near[0]))}?" if near else "settings are --name=value."
        raise UserError(f"cannot read the preset {path}, no such .py file: {hint}")
    try:
        body = ast.parse(read_text(path, 1 << 16)).body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise UserError(f"{path} is not a preset: {getattr(e, 'msg', str(e)) or 'it is nested too deeply'}; "
                        "write plain assignments such as n_layer = 12.") from None
    values = {}
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            continue  # a docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise UserError(f"{path} line {node.lineno} is not a plain assignment: "
                            "a preset holds lines such as n_layer = 12.")
        name = node.targets[0].id
        if name not in fields:
            _unknown(name, fields, f"{path} line {node.lineno}:")
        try:
            value = _literal(node.value)
        except (ValueError, TypeError, ArithmeticError, MemoryError, RecursionError):
            raise UserError(f"{path} line {node.lineno}: the value of {name} is not a literal; "
                            f"expected {_describe(fields[name].type)}.") from None
        values[name] = _typed(fields[name], value)
    return values


def load(argv, *settings, usage=""):
    """Reads `[preset.py ...] name=value ...` into a complete, checked Config and one of each settings dataclass.

    Of several presets a later one has the last word. `--resume=auto --out_dir=FOLDER` without a preset takes the
    settings of the run in the folder, which must be there where nothing else is given. Returns (config, *instances).
    """
    words, values = parse(argv, Config, *settings, usage=usage)
    folder = values.get("out_dir") if values.get("resume") == "auto" else None
    if not words and folder and os.path.exists(os.path.join(folder, "config.json")):
        cfg = read_saved(folder)
    else:
        _require(words or not folder or values.keys() > {"resume", "out_dir"}, f"{folder} holds no run to continue: "
                 "give the folder of one, or a preset too, as in config/quickstart.py, to start one there.")
        presets = {}
        for word in words:
            later = read_preset(word)
            if "lr" in later.keys() - values and "optimizer" in presets.keys() - later:
                raise UserError(f"lr={later['lr']} of {word} comes after optimizer={presets['optimizer']} of another "
                                "preset: give the size first, as in config/s.py config/recipe.py, or --lr too.")
            presets |= later
        cfg = Config(**presets)
    extra = [cls() for cls in settings]
    for name, value in values.items():
        setattr(next(obj for obj in (cfg, *extra) if hasattr(obj, name)), name, value)
    stems = [os.path.basename(word).removesuffix(".py") for word in words]
    cfg.out_dir = cfg.out_dir or os.path.join("out", "-".join(stems) or "run")
    check(cfg)
    _check_used(cfg, values)
    return (cfg, *extra)


def read_saved(folder) -> Config:
    """The settings of the run in a folder, from its config.json."""
    path = os.path.join(folder, "config.json")
    _require(os.path.exists(path), f"{path} is missing: give the folder of a run.")
    return from_dict(read_json(path), path)


def data_dir(cfg) -> str:
    """The folder of the token files: data_dir, or data/<dataset>-<tokenizer> in file-name-safe form."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{cfg.dataset}-{cfg.tokenizer}").strip("-")
    return cfg.data_dir or os.path.join("data", name)


def from_dict(values, path="") -> Config:
    """The Config saved in a config.json or model.pt, which errors name by its path. An unknown setting is refused."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    try:
        _require(isinstance(values, dict) and all(isinstance(name, str) for name in values),
                 f"the config is not names with values but {shown(values)}.")
        for name in values:
            if name not in fields:
                _unknown(name, fields, "this version")
        cfg = Config(**{name: _typed(fields[name], value) for name, value in values.items()})
        check(cfg)
    except UserError as e:
        raise UserError(f"{path}: {e}" if path else str(e)) from None
    return cfg


def to_dict(cfg) -> dict:
    """Plain JSON types; from_dict reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


# ----------------------------------------------------------------------------------------------------------------------
# Combinations

# A config may come from a file. What is far beyond any model is refused before it is built, which takes time and memory
SIZES = ("n_embd", "n_head", "n_kv_head", "attn_dim", "ffn_dim", "block_size", "vocab_size", "rank", "qk_rank",
         "nblocks", "batch_size", "micro_batch_size")
MOST = {"n_layer": 1000, **dict.fromkeys(SIZES, 1 << 24)}
GATE_WIDTH = 16  # the first entries of x: what the gates of the value embeddings and of smear read


def check(cfg):
    """Fills in the sizes left 0 and refuses impossible combinations in one sentence. Needs neither data nor torch."""
    _check_ranges(cfg)
    _check_optimizer(cfg)
    _check_attention(cfg)
    cfg.ffn_dim = cfg.ffn_dim or 4 * cfg.n_embd
    _check_ffn(cfg)
    _require(cfg.batch_size % cfg.micro_batch_size == 0,
             f"batch_size={cfg.batch_size} is not a multiple of micro_batch_size={cfg.micro_batch_size} sequences.")
    if cfg.guide != "off":
        _require(cfg.ffn != "dense",
                 f"guide={cfg.guide} needs a structured ffn (lowrank, blockshuffle, blockdense), this one is dense.")
        _require(cfg.n_dense_layers < cfg.n_layer,
                 f"guide={cfg.guide} needs a structured layer, but n_dense_layers={cfg.n_dense_layers} keeps all "
                 f"{cfg.n_layer} dense.")
        _require(cfg.guide_ratio == "auto" or 0 < cfg.guide_ratio <= 1,
                 f"guide_ratio={cfg.guide_ratio} must be auto or lie in (0, 1].")


def _check_ranges(cfg):
    """Every value by itself."""
    for name in ("n_layer", "n_embd", "n_head", "block_size", "max_tokens", "batch_size", "micro_batch_size",
                 "log_interval", "eval_tokens", "final_eval_tokens", "keep_checkpoints", "max_bad_steps"):
        _require(getattr(cfg, name) >= 1, f"{name}={getattr(cfg, name)} must be at least 1.")
    for name, most in MOST.items():
        _require(getattr(cfg, name) <= most, f"{name}={getattr(cfg, name)} must be at most {most}.")
    for name in ("n_kv_head", "attn_dim", "qk_rank", "ffn_dim", "vocab_size", "n_dense_layers", "eval_interval",
                 "save_interval", "grad_clip", "seed", "warmup_steps", "qk_norm", "post_norm", "logit_softcap",
                 "calibrate_tokens", "teacher_flops"):
        _require(getattr(cfg, name) >= 0, f"{name}={getattr(cfg, name)} must not be negative.")
    for name in ("smear", "value_embeddings"):
        _require(not getattr(cfg, name) or cfg.n_embd >= GATE_WIDTH, f"{name}=True reads {GATE_WIDTH} entries of a "
                 f"token, n_embd={cfg.n_embd} has fewer: choose a larger n_embd, or leave {name} out.")
    _require(0 <= cfg.dropout < 1, f"dropout={cfg.dropout} must lie between 0 and below 1.")
    for name in ("min_lr_ratio", "warmup_ratio", "decay_ratio", "distill_share"):
        _require(0 <= getattr(cfg, name) <= 1, f"{name}={getattr(cfg, name)} must lie between 0 and 1.")
    for name in ("rope_theta", "norm_eps", "timeout"):
        _require(getattr(cfg, name) > 0, f"{name}={getattr(cfg, name)} must be positive.")
    _require(cfg.seed < 2**64, f"seed={cfg.seed} must be below 2^64.")
    _require(all(0 <= b < 1 for b in cfg.betas), f"betas={cfg.betas} must lie in [0, 1).")
    check_device(cfg.device)
    _require(cfg.out_dir == cfg.out_dir.encode(errors="replace").decode(), f"out_dir={cfg.out_dir} is not UTF-8, and "
             "torch could not read the run's files there again: choose another name.")


def check_device(name):
    """UserError for a device that torch does not know by this name: it takes cuda:200 for cuda:-56."""
    _require(re.fullmatch(r"auto|cpu|cuda(:(\d|[1-9]\d))?|mps", name, re.ASCII),
             f"device={name} is not one of auto, cpu, cuda, cuda:N with N below 100, mps.")


def _check_attention(cfg):
    """Heads of one size, which share keys in groups of one size."""
    cfg.n_kv_head = cfg.n_kv_head or cfg.n_head
    cfg.attn_dim = cfg.attn_dim or cfg.n_embd
    _require(cfg.attn_dim % cfg.n_head == 0,
             f"attn_dim={cfg.attn_dim} does not divide into n_head={cfg.n_head} heads of one size.")
    _require(cfg.n_head % cfg.n_kv_head == 0,
             f"n_head={cfg.n_head} does not divide into groups that share n_kv_head={cfg.n_kv_head} key heads.")
    head_size = cfg.attn_dim // cfg.n_head
    _require(cfg.pos != "rope" or head_size % 2 == 0,
             f"the head size attn_dim / n_head = {head_size} is odd: rotary positions need an even one.")
    smallest = min(cfg.n_embd, cfg.n_kv_head * head_size)
    _require(cfg.qk_rank <= smallest, f"qk_rank={cfg.qk_rank} exceeds {smallest}, the smaller side of the keys' "
                                      "matrix: choose a smaller rank.")


RATES = ("lr", "embed_lr", "head_lr", "vector_lr", "skip_lr", "weight_decay")


def _check_optimizer(cfg):
    """Positive rates; with muon `auto` is filled in by the rule, adamw has one rate for all."""
    if cfg.optimizer == "muon":
        for name, value in muon_rates(cfg).items():
            if getattr(cfg, name) == "auto":
                setattr(cfg, name, value)
    for name in RATES:
        value = getattr(cfg, name)
        if cfg.optimizer == "adamw" and name not in ("lr", "weight_decay"):
            _require(value == "auto", f"{name}={value} needs optimizer=muon: adamw has one rate, lr, for all.")
            continue
        _require(value != "auto", f"{name}=auto needs optimizer=muon: give a number.")
        _require(value > 0 or value == 0 and name == "weight_decay",
                 f"{name}={value} must {'not be negative' if name == 'weight_decay' else 'be positive'}.")


def muon_rates(cfg) -> dict:
    """The scaling rule: Muon's rates from the width, the tokens of a step and the number of steps.

        b = (tokens of a step / 2^19)^(1/5)       gradients averaged over more tokens allow larger steps
        lr         0.02 b                         an update's spectral norm is lr sqrt(max(1, rows / columns))
                   0.7 x that, structured FFNs    a product of two factors moves further than one matrix
        embed_lr   0.3 b sqrt(768 / n_embd)       AdamW moves every entry alike, so a wide row by more
        head_lr    0.008 b sqrt(768 / n_embd)
        vector_lr  0.005 b,  skip_lr 0.5 b
        weight_decay  14 / (lr steps)             a weight decays by 1/e over a 14th of the run

    Initialisation follows the width too (init=zero in model.py). At 2^19 tokens a step the constants are nanochat's,
    tuned there at 12 to 26 layers. At 2^15, 8 layers x 768 and 60M tokens, b is 0.57, and the best of four multiples of
    them lie at 0.53 and 0.70 by dense's training loss. Of lr alone 0.7 is best for LowRank and BlockDense, among 0.5,
    0.7, 1 and 1.4, and with 1 for BlockShuffle (docs/experiments.md). Everything else is extrapolation.
    """
    tokens = cfg.batch_size * cfg.block_size
    b, width, steps = (tokens / 2**19) ** (1 / 5), (768 / cfg.n_embd) ** 0.5, max(1, cfg.max_tokens // tokens)
    lr = 0.02 * b * (1 if cfg.ffn == "dense" else 0.7) if cfg.lr == "auto" else cfg.lr
    rates = {"lr": lr, "embed_lr": 0.3 * b * width, "head_lr": 0.008 * b * width, "vector_lr": 0.005 * b,
             "skip_lr": 0.5 * b, "weight_decay": 14 / (max(lr, 1e-300) * steps)}
    return {name: float(f"{rate:.4g}") for name, rate in rates.items()}


def _check_ffn(cfg):
    """fc1 maps n_embd -> n_hidden, fc2 maps ffn_dim -> n_embd; the block sizes must come out whole for both."""
    linears = (("fc1", cfg.n_embd, cfg.n_hidden), ("fc2", cfg.ffn_dim, cfg.n_embd))
    if cfg.ffn in ("lowrank", "blockdense"):
        _require(cfg.rank >= 1, f"ffn={cfg.ffn} needs a rank of at least 1, not rank={cfg.rank}: give --rank=R.")
        smallest = min(cfg.n_embd, cfg.ffn_dim)
        _require(cfg.rank <= smallest, f"rank={cfg.rank} exceeds {smallest}, the smaller side of the FFN's matrices: "
                                       "choose a smaller rank.")
    if cfg.ffn in ("blockshuffle", "blockdense"):
        _require(cfg.nblocks >= 1,
                 f"ffn={cfg.ffn} needs at least one block, not nblocks={cfg.nblocks}: give --nblocks=B.")
        for name, n, m in linears:
            sizes = (n, m) if cfg.ffn == "blockshuffle" else (n, cfg.rank)
            _require(all(size % cfg.nblocks == 0 for size in sizes),
                     f"nblocks={cfg.nblocks} does not divide {name}'s sizes {sizes[0]} and {sizes[1]} "
                     f"({'in, out' if cfg.ffn == 'blockshuffle' else 'in, rank'}): choose one that does.")


def _check_used(cfg, given):
    """Refuses settings of the command line that the others leave without effect. Presets and defaults may hold such."""
    for names, used, needed in (
            (("rank",), cfg.ffn in ("lowrank", "blockdense"), "--ffn=lowrank or --ffn=blockdense"),
            (("nblocks",), cfg.ffn in ("blockshuffle", "blockdense"), "--ffn=blockshuffle or --ffn=blockdense"),
            (("guide_ratio", "guide_schedule", "guide_skip"), cfg.guide != "off", "a guide, as --guide=fixedstep"),
            (("calibrate_tokens",), cfg.init_from, "--init_from=MODEL"),
            (("distill_share",), cfg.distill, "--distill=MODEL")):
        for name in names:
            value = getattr(cfg, name)
            _require(used or name not in given or value == getattr(Config, name),
                     f"{name}={value} has no effect without {needed}: give that too, or leave {name} out.")


def _require(ok, sentence):
    if not ok:
        raise UserError(sentence)


# ----------------------------------------------------------------------------------------------------------------------
# A script as a process

def place_among_processes() -> tuple:
    """(rank, world size, rank on this machine) as torchrun gives them, (0, 1, 0) without it."""
    values = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | {k: v for k, v in os.environ.items() if v}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if not re.fullmatch("[0-9]{1,6}", values[name]):
            raise UserError(f"{name}={values[name]:.40} in the environment is not a whole number: "
                            "start with torchrun, or leave it out.", alone=True)
    rank, world, local = (int(values[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank >= max(1, world):
        raise UserError(f"RANK={rank} in the environment is not below WORLD_SIZE={world}: "
                        "ranks count from 0; start with torchrun.", alone=True)
    lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if world > 1 and name not in values]
    if lacking:
        raise UserError(f"WORLD_SIZE={world} needs {' and '.join(lacking)} in the environment, where rank 0 is found: "
                        "start with torchrun.", alone=True)
    return rank, world, local


PATIENCE = 10.0  # seconds that another rank leaves rank 0 to print an error


def run(main):
    """main(argv) as a command: a user's mistake is one sentence on standard error and status 2, ours is a traceback."""
    sys.excepthook = _report
    try:
        with _output():
            return main(sys.argv[1:])
    except UserError as e:
        with contextlib.suppress(UserError, SystemExit):
            check_output()
        if os.environ.get("RANK", "0") != "0" and not e.alone:
            time.sleep(PATIENCE)  # rank 0 prints the same and ends, then torchrun ends this process; else it prints
        with contextlib.suppress(OSError):
            print(f"error: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt as e:
        print("interrupted.", file=sys.stderr)
        sys.exit(128 + (e.args[0] if e.args else signal.SIGINT))


def _report(kind, error, traceback):
    """Of Ctrl-C while torch loads, between a script's two main blocks, one line; of all else Python's traceback.

    Before Python 3.12 a class that is being made turns it into a RuntimeError.
    """
    if KeyboardInterrupt in (kind, type(error.__cause__)):
        print("interrupted.", file=sys.stderr, flush=True)
        if kind is not KeyboardInterrupt:
            os._exit(128 + signal.SIGINT)
    else:
        sys.__excepthook__(kind, error, traceback)


CLOSED = 128 + 13  # the status where `| head` has ended, as a shell shows it for a process that SIGPIPE ends


@contextlib.contextmanager
def _output():
    """Ends a script whose standard output does not take all of it, as `check_output` does."""
    if sys.stdout is None:
        raise UserError("standard output is closed: send it somewhere, as with > log.txt or > /dev/null.")
    try:
        yield
    except SystemExit as e:
        with contextlib.suppress(SystemExit if e.code else ()):  # the status of a run that is saved stays
            check_output()
        raise
    except OSError as e:
        if e.filename is None:
            check_output("\n")  # raises where the output has failed, and not a file or a library
        raise
    except UnicodeEncodeError as e:
        if e.encoding != sys.stdout.encoding or "utf" in e.encoding:
            raise
        raise UserError(f"standard output cannot show {e.object[e.start]!a} in its encoding {e.encoding}: "
                        "set PYTHONIOENCODING=utf-8.")
    check_output()


def check_output(end=""):
    """Quietly status CLOSED where the reader of standard output has ended, UserError where else it takes no more."""
    try:
        if sys.stdout is not None:
            print(end=end, flush=True)
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
        if isinstance(e, BrokenPipeError):
            sys.exit(CLOSED)
        raise UserError(f"the output cannot be written ({e.strerror}): "
                        "send it where all of it fits, as with > log.txt.") from None
