"""Hugging Face out and in:  python export.py out/quickstart --to=hf/quickstart
                          python export.py hf/SmolLM2-135M --out_dir=out/smollm2

The source is a run folder, a model.pt, or a Hugging Face folder (config.json, safetensors, tokenizer).
--to=FOLDER writes it for Hugging Face's transformers and what reads their format: every structured linear merged, as
the stock architecture that computes the same. --out_dir=FOLDER writes a model.pt, which sample.py, train.py and this
script read. --ffn=lowrank --rank=256 projects the FFNs of a dense source onto factors on the way: the nearest in the
weights or, with --calibrate=FILE, in the outputs on that text's activations. --ffn_dim=1024 leaves out hidden units,
--qk_rank=192 projects queries and keys.
"""
import os
from dataclasses import dataclass
from typing import Literal

import config
from config import UserError


@dataclass
class Settings:
    to: str = ""                         # write a folder for Hugging Face's transformers
    target: Literal["transformers", "vllm", "gguf"] = "transformers"  # reader, also --for=; gguf: llama.cpp's converter
    dtype: Literal["float32", "bfloat16"] = "float32"        # of the weights written by --to
    factors: bool = False                # keep the factors: a small modeling file for trust_remote_code goes with them
    out_dir: str = ""                    # write a model.pt into this folder
    block_size: int = 0                  # context of a model that comes from Hugging Face, tokens; 0: its own
    ffn: Literal["dense", "lowrank", "blockshuffle", "blockdense"] = "dense"  # project the FFNs of a dense source
    rank: int = 0                        # R of lowrank and blockdense
    nblocks: int = 0                     # B of blockshuffle and blockdense
    n_dense_layers: int = 1              # the first layers whose FFN stays dense
    ffn_dim: int = 0                     # hidden units to leave in every FFN, those that add most; 0: all
    qk_rank: int = 0                     # project queries and keys of every layer onto factors of this rank; 0: as is
    calibrate: str = ""                  # a text file: weigh projection or pruning by its activations, print its loss
    calibrate_tokens: int = 16384        # tokens of the text that the activations come from
    weighted: bool = True                # False: the plain projection, the text for its losses only
    device: str = "auto"                 # of the projection, which is in float64: auto | cpu | cuda | cuda:N


def read_settings(argv):
    """Command line -> (path of the source, Settings)."""
    argv = [arg.replace("--for=", "--target=", 1) if arg.startswith("--for=") else arg for arg in argv]  # a keyword
    words, values = config.parse(argv, Settings, usage=__doc__)
    if len(words) != 1:
        raise UserError("give one source, a run folder, model.pt or Hugging Face folder; "
                        f"{len(words)} were given.")
    s = Settings(**values)
    if bool(s.to) == bool(s.out_dir):
        raise UserError("give one destination: --to=FOLDER for Hugging Face's transformers, or --out_dir=FOLDER "
                        "for a model.pt.")
    projection = s.ffn != "dense" or s.ffn_dim or s.qk_rank
    checks = ((("target", "dtype", "factors"), s.to, "--to=FOLDER"),
              (("block_size",), is_hf(words[0]), "a Hugging Face folder as source"),
              (("rank", "nblocks", "n_dense_layers"), s.ffn != "dense", "a projection, as --ffn=lowrank"),
              (("calibrate",), projection, "a projection, as --ffn=lowrank, --ffn_dim=1024 or --qk_rank=192"),
              (("calibrate_tokens", "weighted"), s.calibrate, "--calibrate=FILE"))
    for names, there, needed in checks:
        if unused := [name for name in names if name in values and not there]:
            raise UserError(f"{unused[0]}={values[unused[0]]} needs {needed}: give that too, or leave {unused[0]} out.")
    if s.factors and s.target != "transformers":
        raise UserError(f"factors=True is read by transformers only, not by {s.target}: leave one of them out.")
    config.check_device(s.device)
    if s.device == "mps":
        raise UserError("device=mps has no float64, which a projection needs: use --device=cpu or leave it out.")
    for name, least in (("block_size", 0), ("ffn_dim", 0), ("qk_rank", 0), ("calibrate_tokens", 1)):
        if getattr(s, name) < least:
            raise UserError(f"{name}={getattr(s, name)} must be at least {least}.")
    if os.path.exists(target := s.to or os.path.join(s.out_dir, "model.pt")):
        raise UserError(f"{target} exists: move it away, or write elsewhere.")
    if s.out_dir and any(os.path.exists(os.path.join(s.out_dir, name)) for name in ("config.json", "ckpt.pt")):
        raise UserError(f"{s.out_dir} holds a run that a model.pt would end: write elsewhere.")
    if s.calibrate and not os.path.isfile(s.calibrate):
        raise UserError(f"calibrate={s.calibrate} does not exist: give a text file.")
    return words[0], s


def is_hf(path) -> bool:
    """Whether a source is a Hugging Face folder; a run has a config.json too."""
    there, *of_a_run = (os.path.exists(os.path.join(path, n)) for n in ("config.json", "model.pt", "metrics.jsonl"))
    return there and not any(of_a_run)


if __name__ == "__main__":
    SETTINGS = config.run(read_settings)  # a wrong setting is reported before torch loads

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint import save_beside, tokenizer_entry
from config import Config, short
from device import pick_device
from merge import exact_matmuls, merge_attention, replace_structured
from model import PRECISIONS, build, load, rms_norm
from project import make_smaller
from run import perplexity, temp_name, writing
from schedule import summary
from tokenizer import load_tokenizer, package, saved_tokenizer
from tokenizer_json import kind_of, tokenizer_files


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face architectures that compute what ours does

class Family(NamedTuple):
    """What several architectures share: positions, whether linears need biases, names of settings and of modules."""
    pos: str
    needs_bias: bool
    sizes: tuple                         # n_layer, n_embd, n_head, block_size, ffn_dim, act
    root: str
    wte: str
    blocks: str
    norm1: str
    norm2: str
    qkv: tuple
    proj: str
    norm: str
    post_norms: tuple = ()               # of attention, of FFN


class Architecture(NamedTuple):
    """The switches that an architecture stands for, and the names it gives to modules and settings."""
    classname: str
    family: Family
    norm: str
    acts: dict                           # our act -> theirs
    ffn: tuple                           # fc1 (of swiglu: gate and value), fc2
    eps: str                             # their name of norm_eps
    default_eps: float = 1e-5
    tied: bool = False                   # what a config.json without tie_word_embeddings means


LLAMA = Family("rope", False, ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings",
                               "intermediate_size", "hidden_act"),
               "model.", "embed_tokens", "layers", "input_layernorm", "post_attention_layernorm",
               ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj", "norm")
GEMMA = LLAMA._replace(sizes=(*LLAMA.sizes[:-1], "hidden_activation"), norm2="pre_feedforward_layernorm",
                       post_norms=("post_attention_layernorm", "post_feedforward_layernorm"))
GPT = Family("absolute", True, ("n_layer", "n_embd", "n_head", "n_positions", "n_inner", "activation_function"),
             "transformer.", "wte", "h", "ln_1", "ln_2", ("attn.c_attn",), "attn.c_proj", "ln_f")
GATED, PLAIN = {"swiglu": "silu"}, {"gelu": "gelu_pytorch_tanh", "relu2": "relu2"}
GATE_UP, UP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), ("mlp.up_proj", "mlp.down_proj")
FC = ("mlp.c_fc", "mlp.c_proj")
ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", LLAMA, "rmsnorm", GATED, GATE_UP, "rms_norm_eps", 1e-6),
    "mistral": Architecture("MistralForCausalLM", LLAMA, "rmsnorm", GATED, GATE_UP, "rms_norm_eps", 1e-6),
    "qwen2": Architecture("Qwen2ForCausalLM", LLAMA, "rmsnorm", GATED, GATE_UP, "rms_norm_eps", 1e-6),
    "qwen3": Architecture("Qwen3ForCausalLM", LLAMA, "rmsnorm", GATED, GATE_UP, "rms_norm_eps", 1e-6),
    "gemma3_text": Architecture("Gemma3ForCausalLM", GEMMA, "rmsnorm", GATED, GATE_UP, "rms_norm_eps", 1e-6, tied=True),
    "starcoder2": Architecture("Starcoder2ForCausalLM", LLAMA, "layernorm", PLAIN, FC, "norm_epsilon", tied=True),
    "arcee": Architecture("ArceeForCausalLM", LLAMA, "rmsnorm", PLAIN, UP, "rms_norm_eps"),
    "stablelm": Architecture("StableLmForCausalLM", LLAMA, "layernorm", GATED, GATE_UP, "layer_norm_eps"),
    "gpt_bigcode": Architecture("GPTBigCodeForCausalLM", GPT, "layernorm", PLAIN, FC, "layer_norm_epsilon", tied=True),
    "gpt2": Architecture("GPT2LMHeadModel", GPT, "layernorm", {**PLAIN, "gelu": "gelu_new"}, FC, "layer_norm_epsilon",
                         tied=True),
}


def head_size(cfg):
    return cfg.attn_dim // cfg.n_head


def can_add_heads(cfg):
    """Whether heads of zeros make attention as wide as the model."""
    return cfg.attn_dim <= cfg.n_embd and cfg.n_embd % head_size(cfg) == 0


# What an architecture cannot do, or its reader for some targets: (architectures, targets or "" for all, what must hold
# of the Config c and the kind of tokenizer t, why). The first of ARCHITECTURES without an obstacle is used.
QK_NORMED = {"qwen3", "gemma3_text"}
WHOLE = "needs n_embd to be made up of heads, attn_dim stands in the way"
LIMITS = (
    ("qwen2", "", lambda c, t: False, "is read only"),
    (" ".join(ARCHITECTURES.keys() - QK_NORMED), "", lambda c, t: not c.qk_norm,
     "norms no queries and keys, qk_norm stands in the way"),
    (" ".join(ARCHITECTURES.keys() - {"gemma3_text"}), "", lambda c, t: not c.post_norm,
     "norms before attention and FFN only, post_norm stands in the way"),
    (" ".join(ARCHITECTURES.keys() - {"gemma3_text"}), "", lambda c, t: not c.logit_softcap,
     "caps no logits, logit_softcap stands in the way"),
    ("gemma3_text", "", lambda c, t: c.post_norm, "norms after attention and FFN too, post_norm=0 stands in the way"),
    (" ".join(QK_NORMED), "", lambda c, t: c.qk_norm, "norms queries and keys, qk_norm=0 stands in the way"),
    (" ".join(QK_NORMED), "", lambda c, t: c.norm_eps == 1e-5,
     "has one epsilon for all norms, which must be norm_eps=1e-05"),
    (" ".join(ARCHITECTURES), "", lambda c, t: not (c.embed_norm and c.tie_embeddings),
     "norms no embeddings: embed_norm with tie_embeddings stands in the way"),
    ("llama arcee gemma3_text", "", lambda c, t: c.n_embd % c.n_head == 0, "needs n_embd to be a multiple of n_head"),
    ("mistral stablelm qwen3 gemma3_text", "", lambda c, t: not c.bias, "has no biases, bias=True stands in the way"),
    ("gpt_bigcode", "", lambda c, t: (c.n_kv_head, c.attn_dim) == (1, c.n_embd), "needs n_kv_head=1, attn_dim=n_embd"),
    ("gpt_bigcode", "vllm gguf", lambda c, t: False, "was not tried there"),
    ("stablelm gpt2", "", lambda c, t: can_add_heads(c), WHOLE),
    ("starcoder2", "vllm gguf", lambda c, t: can_add_heads(c), WHOLE),
    ("starcoder2 gpt2", "gguf", lambda c, t: c.act == "gelu", "computes gelu there, act=relu2 stands in the way"),
    ("arcee", "vllm gguf", lambda c, t: c.act == "relu2", "computes relu2 there, act=gelu stands in the way"),
    ("gemma3_text", "gguf", lambda c, t: False, "computes gelu there, act=swiglu stands in the way"),
    ("arcee", "gguf", lambda c, t: not c.bias, "has no biases there, bias=True stands in the way"),
    ("stablelm", "gguf", lambda c, t: not c.tie_embeddings, "is untied there, tie_embeddings=True stands in the way"),
    ("gpt2", "gguf", lambda c, t: c.ffn_dim == 4 * c.n_embd, "needs ffn_dim = 4 n_embd there"),
    ("starcoder2 stablelm gpt2", "gguf", lambda c, t: t in ("gpt2", "hf"), "needs the tokenizer gpt2 there"),
    ("llama mistral qwen3 arcee", "gguf", lambda c, t: t != "byte",
     "needs the tokenizer gpt2 or spm:VOCAB there, not byte"),
)


# The switches of Config, down to dropout, that the architectures above express or LIMITS refuses.
KNOWN = {"n_layer", "n_embd", "n_head", "n_kv_head", "attn_dim", "qk_rank", "ffn_dim", "block_size", "vocab_size",
         "norm", "act", "pos", "bias", "tie_embeddings", "rope_theta", "norm_eps", "qk_norm", "post_norm", "embed_norm",
         "logit_softcap", "init"}


def find_architecture(cfg, target, kind) -> str:
    """The first architecture that computes the same and that `target` reads as it is; kind: of the tokenizer."""
    for switch in itertools.takewhile(lambda field: field.name != "dropout", dataclasses.fields(cfg)):
        value = getattr(cfg, switch.name)
        if switch.name not in KNOWN and value != switch.default:
            raise UserError(f"no Hugging Face architecture that is known here expresses {switch.name}={value}.")
    fits = [name for name, arch in ARCHITECTURES.items()
            if (cfg.pos, cfg.norm) == (arch.family.pos, arch.norm) and cfg.act in arch.acts]
    if not fits:
        raise UserError(f"no Hugging Face architecture has pos={cfg.pos} with norm={cfg.norm} and act={cfg.act}: "
                        "with learned positions there is only norm=layernorm with act=gelu or relu2.")
    reasons = []
    for name in fits:
        obstacles = [why for names, targets, holds, why in LIMITS
                     if name in names.split() and (not targets or target in targets.split()) and not holds(cfg, kind)]
        if not obstacles:
            return name
        reasons += [f"{name} {obstacles[0]}"] if name != "qwen2" else []
    raise UserError(f"no architecture expresses this model for {target}: {'; '.join(reasons)}.")


def widened(cfg, name, target) -> Config:
    """cfg with the heads and biases that the architecture, or its reader, cannot be without."""
    n_head, n_kv_head, group = cfg.n_head, cfg.n_kv_head, cfg.n_head // cfg.n_kv_head
    if name in ("stablelm", "gpt2") or name == "starcoder2" and target != "transformers":
        n_head = cfg.n_embd // head_size(cfg)
        n_kv_head = n_head if name == "gpt2" or n_head % group else n_head // group
    bias = cfg.bias or ARCHITECTURES[name].family.needs_bias or name == "starcoder2" and target == "gguf"
    return dataclasses.replace(cfg, n_head=n_head, n_kv_head=n_kv_head, attn_dim=n_head * head_size(cfg), bias=bias)


def hf_config(cfg, name, eos, dtype) -> dict:
    """config.json; versions 4 and 5 of transformers read different spellings of some settings, so both stand there."""
    arch = ARCHITECTURES[name]
    values = {"architectures": [arch.classname], "model_type": name, "vocab_size": cfg.vocab_size,
              "tie_word_embeddings": cfg.tie_embeddings, "bos_token_id": eos, "eos_token_id": eos, "dtype": dtype,
              "torch_dtype": dtype, "initializer_range": 0.02, arch.eps: cfg.norm_eps}
    sizes = cfg.n_layer, cfg.n_embd, cfg.n_head, cfg.block_size, cfg.ffn_dim, arch.acts[cfg.act]
    values |= zip(arch.family.sizes, sizes)
    if arch.family is GPT:
        values |= {"n_ctx": cfg.block_size, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        return values | ({"multi_query": True} if name == "gpt_bigcode" else {})
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    biases, every = {"attention_bias": cfg.bias, "mlp_bias": cfg.bias}, ["full_attention"] * cfg.n_layer
    own = {"llama": biases, "arcee": biases, "mistral": {"sliding_window": None},
           "qwen3": {"attention_bias": False, "use_sliding_window": False, "sliding_window": None},
           "gemma3_text": {"attention_bias": False, "query_pre_attn_scalar": head_size(cfg), "layer_types": every,
                           "final_logit_softcapping": cfg.logit_softcap or None, "pad_token_id": None,
                           "sliding_window": cfg.block_size,  # of no layer, but read
                           "rope_local_base_freq": cfg.rope_theta,
                           "rope_parameters": {"full_attention": rope, "sliding_attention": rope}},
           "starcoder2": {"use_bias": cfg.bias, "sliding_window": None, "embedding_dropout": 0.0,
                          "residual_dropout": 0.0},
           "stablelm": {"use_qkv_bias": False, "qk_layernorm": False, "use_parallel_residual": False,
                        "hidden_dropout": 0.0, "partial_rotary_factor": 1.0,
                        "rope_parameters": {**rope, "partial_rotary_factor": 1.0}}}
    return values | {"num_key_value_heads": cfg.n_kv_head, "head_dim": head_size(cfg), "attention_dropout": 0.0,
                     "rope_theta": cfg.rope_theta, "rope_parameters": rope, **own[name]}


# ----------------------------------------------------------------------------------------------------------------------
# Weights: names and shapes

def modules(cfg, name):
    """Yields (our module, their modules, the rows of each): several of theirs are one of ours, row after row."""
    arch, family = ARCHITECTURES[name], ARCHITECTURES[name].family
    yield "wte", [family.root + family.wte], None
    if cfg.pos == "absolute":
        yield "wpe", [family.root + "wpe"], None
    heads = [cfg.attn_dim, cfg.n_kv_head * head_size(cfg), cfg.n_kv_head * head_size(cfg)]
    for i in range(cfg.n_layer):
        theirs = f"{family.root}{family.blocks}.{i}."
        yield f"blocks.{i}.norm1", [theirs + family.norm1], None
        yield f"blocks.{i}.attn.qkv", [theirs + part for part in family.qkv], heads
        yield f"blocks.{i}.attn.proj", [theirs + family.proj], None
        yield f"blocks.{i}.norm2", [theirs + family.norm2], None
        yield f"blocks.{i}.ffn.fc1", [theirs + part for part in arch.ffn[:-1]], [cfg.ffn_dim] * 2
        yield f"blocks.{i}.ffn.fc2", [theirs + arch.ffn[-1]], None
        for ours, norm in zip(("post_norm1", "post_norm2"), family.post_norms):
            yield f"blocks.{i}.{ours}", [theirs + norm], None
    yield "norm", [family.root + family.norm], None
    if not cfg.tie_embeddings:
        yield "head", ["lm_head"], None


def has_bias(ours, cfg) -> bool:
    return cfg.bias and ours not in ("wte", "wpe", "head") and ("norm" not in ours or cfg.norm == "layernorm")


def is_turned(ours, name) -> bool:
    """GPT-2's linears hold their matrices transposed."""
    return name == "gpt2" and (".attn." in ours or ".ffn." in ours)


def widen_heads(weights, cfg, wide) -> dict:
    """cfg's weights with the heads of wide: key heads repeated where groups end, then heads of zeros, which add 0."""
    if (cfg.n_head, cfg.n_kv_head) == (wide.n_head, wide.n_kv_head):
        return weights
    size, group = head_size(cfg), cfg.n_head // cfg.n_kv_head
    repeats = group // (wide.n_head // wide.n_kv_head)  # 1 where groups stay, else all of them end

    def padded(t, heads):  # (fewer heads x size, ...) -> (heads x size, ...)
        return torch.cat((t, t.new_zeros(heads * size - len(t), *t.shape[1:])))

    new = dict(weights)
    for key, t in weights.items():
        if ".attn.qkv." in key:
            q, k, v = t.split([cfg.attn_dim, cfg.n_kv_head * size, cfg.n_kv_head * size])
            k, v = (x.unflatten(0, (-1, size)).repeat_interleave(repeats, 0).flatten(0, 1) for x in (k, v))
            new[key] = torch.cat((padded(q, wide.n_head), padded(k, wide.n_kv_head), padded(v, wide.n_kv_head)))
        elif key.endswith(".attn.proj.weight"):
            new[key] = padded(t.T, wide.n_head).T
    return new


def to_hf(weights, cfg, name) -> dict:
    """Our state dict -> theirs. Factors, where they were kept, stay mlp.fc1.V and so on."""
    out, family = {}, ARCHITECTURES[name].family
    if cfg.embed_norm:  # a norm without weights, whose results a table can hold
        weights = {**weights, "wte.weight": rms_norm(weights["wte.weight"])}
    if cfg.qk_norm:  # ours have one weight for all, theirs one for each entry of a head
        gain = torch.full((head_size(cfg),), cfg.qk_norm)
        out = {f"{family.root}{family.blocks}.{i}.self_attn.{part}_norm.weight": gain.clone()
               for i in range(cfg.n_layer) for part in "qk"}
    for ours, theirs, rows in modules(cfg, name):
        if f"{ours}.V" in weights:
            _, i, _, fc = ours.split(".")
            out |= {f"{family.root}{family.blocks}.{i}.mlp.{fc}.{part}": weights[f"{ours}.{part}"]
                    for part in ("V", "U", "bias") if f"{ours}.{part}" in weights}
            continue
        weight = weights[f"{ours}.weight"]
        parts = {"weight": weight, "bias": weights.get(f"{ours}.bias", weight.new_zeros(len(weight)))}
        biased = has_bias(ours, cfg) or "norm" in ours and cfg.norm == "layernorm"  # their layer norms always have one
        for kind in ("weight", "bias") if biased else ("weight",):
            for module, part in zip(theirs, parts[kind].split(rows) if len(theirs) > 1 else [parts[kind]]):
                out[f"{module}.{kind}"] = part.T if kind == "weight" and is_turned(ours, name) else part
    return as_gemma(out, cfg) if name == "gemma3_text" else out


def as_gemma(tensors, cfg, back=False) -> dict:
    """Tensors for Gemma's modules, which norm x to x (1 + weight) and multiply embeddings by sqrt(n_embd); or back.

    A tied table is divided by sqrt(n_embd) for the head too. So the last norm is multiplied by it.
    """
    scale, new = cfg.n_embd ** 0.5, {}
    for key, t in tensors.items():
        if key == GEMMA.root + GEMMA.wte + ".weight":
            t = t.float() * scale if back else t / scale
        elif key.endswith("norm.weight"):
            by = scale if cfg.tie_embeddings and key == f"{GEMMA.root}{GEMMA.norm}.weight" else 1
            t = (1 + t.float()) / by if back else t * by - 1
        new[key] = t
    return new


def from_hf(tensors, cfg, name) -> dict:
    """Their tensors -> our state dict in fp32; a bias that is missing is zero. The dict is emptied."""
    out = {}
    for ours, theirs, rows in modules(cfg, name):
        weights, biases = ([tensors.pop(f"{module}.{kind}", None) for module in theirs] for kind in ("weight", "bias"))
        if any(part is None or not part.dim() for part in weights):
            raise UserError(f"the weights lack {theirs[0]}.weight: the folder is incomplete, or not what its "
                            "config.json says.")
        weights = [part.float().T if is_turned(ours, name) else part.float() for part in weights]
        if len({part.shape[1:] for part in weights}) > 1 or any(b is not None and b.dim() != 1 for b in biases):
            raise UserError(f"the shapes of {theirs[0]} and what belongs to it do not fit each other: "
                            "the weights are damaged.")
        out[f"{ours}.weight"] = torch.cat(weights)[:cfg.block_size if ours == "wpe" else None].contiguous()
        if has_bias(ours, cfg):
            biases = [torch.zeros(len(part)) if bias is None else bias.float() for part, bias in zip(weights, biases)]
            out[f"{ours}.bias"] = torch.cat(biases)
    if cfg.tie_embeddings:
        tensors.pop("lm_head.weight", None)
        out["head.weight"] = out["wte.weight"]
    if tensors:
        raise UserError(f"{next(iter(tensors))}, one of {len(tensors)} tensors, has no place in a {name} model as "
                        "config.json describes it: a model of another kind cannot be read.")
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Out: the folder

SHARD = 5_000_000_000  # bytes in one file of weights, at most
MODELING = "modeling_factors.py"


def shards(tensors, dtype) -> list:
    """The names of the tensors, in lists of at most SHARD bytes or one tensor."""
    files, size = [[]], 0
    for name, t in tensors.items():
        if files[-1] and size + t.numel() * dtype.itemsize > SHARD:
            files, size = [*files, []], 0
        files[-1].append(name)
        size += t.numel() * dtype.itemsize
    return files


def write_json(folder, name, values):
    Path(folder, name).write_text(json.dumps(values, indent=2), encoding="utf-8")


def write_weights(folder, tensors, dtype):
    """model.safetensors, or numbered files and their index."""
    safetensors, index = package("safetensors", "export.py"), {}
    from safetensors.torch import save_file
    files = shards(tensors, dtype)
    for n, names in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{n:05d}-of-{len(files):05d}.safetensors"
        index |= dict.fromkeys(names, file)
        part = {name: tensors[name].to(dtype).contiguous() for name in names}
        try:
            save_file(part, os.path.join(folder, file), metadata={"format": "pt"})
        except safetensors.SafetensorError as e:
            raise UserError(f"cannot write {folder}/{file} ({e}): make room there, or choose another folder.") from None
    if len(files) > 1:
        size = sum(t.numel() for t in tensors.values()) * dtype.itemsize
        write_json(folder, "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})


CARD = """---
library_name: transformers
pipeline_tag: text-generation
# license: yours to choose
---

# {title}

A language model of {params} parameters: {n_layer} layers of width {n_embd}, {n_head} heads, FFN {ffn_dim}, a context of
{block_size} tokens, a vocabulary of {vocab_size}. Architecture: `{architecture}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained({where}), AutoModelForCausalLM.from_pretrained({where}{remote})
```

## Training

"""


def model_card(title, cfg, saved, name, params, factors) -> str:
    """README.md: what the model is, what it was trained on and how. The licence is for the user to fill in."""
    text = CARD.format(**vars(cfg), title=title, params=short(params), architecture=name, where=json.dumps(title),
                       remote=", trust_remote_code=True" if factors else "")
    shape = " ".join(f"{key}={getattr(cfg, key)}" for key in ("rank", "nblocks") if getattr(cfg, key))
    kept = "kept as factors" if factors else "merged to dense matrices for this folder"
    structure = f"{cfg.ffn} {shape}, dense in the first {cfg.n_dense_layers} layers; {kept}"
    facts = {"FFN": "dense" if cfg.ffn == "dense" else structure}
    if cfg.qk_rank:
        facts["queries and keys"] = f"factors of rank {cfg.qk_rank}, merged to dense matrices for this folder"
    if saved["step"]:
        plan = summary(cfg)
        guide = f"{cfg.guide}, {plan['guided_steps']} of {plan['steps']} steps"
        facts |= {"self-guided training": "none" if cfg.guide == "off" else guide,
                  "data": f"{cfg.data_dir or cfg.dataset}, {short(plan['unique_tokens'])} tokens",
                  "first weights": cfg.init_from or "random", "teacher": cfg.distill or "none",
                  "recipe": f"{cfg.optimizer}, {saved['step']} of {plan['steps']} steps of {cfg.batch_size} x "
                            f"{cfg.block_size} tokens, lr {cfg.lr:g}, weight decay {cfg.weight_decay:g}, "
                            f"seed {cfg.seed}"}
        if saved["val_loss"] is not None:  # the run is finished
            facts |= {"training FLOPs": f"{plan['train_flops']:.3g}",
                      "validation loss": f"{saved['val_loss']:.4f} (PPL {perplexity(saved['val_loss']):.2f})"}
    else:
        factored = cfg.ffn != "dense" or cfg.qk_rank
        facts["weights"] = f"from another model{', projected onto factors' if factored else ''}"
    facts["tokenizer"] = saved["tokenizer"]["identity"]
    return text + "".join(f"* {key}: {value}\n" for key, value in facts.items())


def for_factors(values, cfg) -> dict:
    """The entries that config.json needs in addition, for MODELING."""
    names = ("ffn", "rank", "nblocks", "n_dense_layers", "act", "n_embd", "ffn_dim", "bias")
    classname = values["architectures"][0] + "WithFactors"
    return values | {"structured_ffn": {name: getattr(cfg, name) for name in names}, "architectures": [classname],
                     "auto_map": {"AutoModelForCausalLM": f"{MODELING.removesuffix('.py')}.{classname}"}}


@torch.no_grad()
def write_hf(folder, model, cfg, saved, s):
    """Merges the model and writes it; the folder appears whole or not at all."""
    tokenizer = saved_tokenizer(saved["tokenizer"], cfg.vocab_size)
    name = find_architecture(cfg, s.target, kind_of(tokenizer.identity))
    files = tokenizer_files(tokenizer, cfg.block_size, s.target)
    with exact_matmuls():
        merge_attention(model) if s.factors else replace_structured(model)
    wide = widened(cfg, name, s.target)
    tensors = to_hf(widen_heads(model.state_dict(), cfg, wide), wide, name)
    params = sum(t.numel() for t in tensors.values())
    settings = hf_config(wide, name, tokenizer.eos, s.dtype)
    if s.factors:
        settings = for_factors(settings, cfg)
        files[MODELING] = Path(__file__).with_name(MODELING).read_bytes()
    folder = os.path.normpath(folder)
    temp = temp_name(folder)
    files["README.md"] = model_card(os.path.basename(folder), cfg, saved, name, params, s.factors).encode()
    try:
        with writing(folder):
            os.makedirs(temp, exist_ok=True)
            write_weights(temp, tensors, getattr(torch, s.dtype))
            write_json(temp, "config.json", settings)
            ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos)
            write_json(temp, "generation_config.json", ids)
            for file, data in files.items():
                Path(temp, file).write_bytes(data)
            os.replace(temp, folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    print(f"{folder}: architecture {name}{' with factors' if s.factors else ''}, {short(params)} parameters in "
          f"{s.dtype}, for {s.target}")


# ----------------------------------------------------------------------------------------------------------------------
# In: a Hugging Face folder

# Settings of config.json without a switch of ours: {name: the value that we compute}. Left out they mean it too.
ONLY = {"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "add_cross_attention": False,
        "multi_query": True, "use_parallel_residual": False, "qk_layernorm": False, "partial_rotary_factor": 1.0,
        "use_bidirectional_attention": False, "attn_logit_softcapping": None, "auto_map": None}
ACTS = {"silu": "swiglu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu2": "relu2"}


def check_hf_config(path, data, name, rope):
    """Refuses what our model does not compute."""
    sizes = (*LLAMA.sizes[:-1], *GPT.sizes[:-1], "vocab_size", "head_dim", "num_key_value_heads", "sliding_window")
    kinds = dict.fromkeys(sizes, int) | {"hidden_act": str, "hidden_activation": str, "activation_function": str}
    for key, kind in kinds.items():
        value = data.get(key)
        if value is not None and (type(value) is not kind or kind is int and value < 1):
            raise UserError(f"{path} has {key}={config.shown(value)}: expected a {'size' if kind is int else 'name'}.")
    if not isinstance(rope, dict):
        raise UserError(f"{path} has rotary settings {config.shown(rope)}: expected names with values.")
    if "structured_ffn" in data:
        raise UserError(f"{path} is of a model whose factors were kept by --factors=True: they are not read back, give "
                        "the model.pt that it was written from.")
    for key, value in ONLY.items():
        found = data.get(key, rope.get(key, 0.25 if (name, key) == ("stablelm", "partial_rotary_factor") else value))
        if found != value:
            raise UserError(f"{path} has {key}={found!s:.60}: only {key}={value} can be computed here.")
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise UserError(f"{path} scales its rotary positions ({scaling}): only unscaled ones can be computed here.")
    for key in ("vocab_size", *ARCHITECTURES[name].family.sizes):
        if data.get(key) is None and key not in GPT.sizes[4:]:  # these two have defaults
            raise UserError(f"{path} has no {key}: it is not the config.json of a {name} model.")


def plain_gemma(path, data) -> dict:
    """The config.json of a gemma3_text as others are: rotary settings of all layers, no window that no layer has."""
    types, rope = data.get("layer_types"), data.get("rope_parameters") or data.get("rope_scaling") or {}
    theta = {"full_attention": data.get("rope_theta", 1e6), "sliding_attention": data.get("rope_local_base_freq", 1e4)}
    if not isinstance(types, list) or not types or not all(isinstance(t, str) and t in theta for t in types):
        raise UserError(f"{path} has layer_types={config.shown(types)}: expected a list of {' and '.join(theta)}.")
    if isinstance(rope, dict) and not rope.keys() & theta.keys():  # as version 4 writes it
        rope = {"full_attention": rope}
    if not isinstance(rope, dict) or not all(isinstance(rope.get(t) or {}, dict) for t in types):
        raise UserError(f"{path} has rotary settings {config.shown(rope)}: expected names with values.")
    settings = [{"rope_theta": theta[t], **(rope.get(t) or {})} for t in types]
    if any(other != settings[0] for other in settings):
        raise UserError(f"{path} has rotary settings for sliding_attention that differ from those of full_attention: "
                        "only one for all layers can be computed here.")
    data = {"head_dim": 256, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
            "hidden_activation": "gelu_pytorch_tanh", **data, "rope_parameters": settings[0]}
    if data["query_pre_attn_scalar"] != data["head_dim"]:
        raise UserError(f"{path} has query_pre_attn_scalar={config.shown(data['query_pre_attn_scalar'])}: only "
                        f"head_dim={config.shown(data['head_dim'])} can be computed here.")
    return data if "sliding_attention" in types else data | {"sliding_window": None}


def read_hf_config(path, block_size=0):
    """config.json -> (architecture, Config). Whether linears have biases is not known here: the weights show it."""
    data = config.read_json(path)
    name = data.get("model_type") if isinstance(data, dict) else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(f"{path} has model_type={config.shown(name)}: {', '.join(ARCHITECTURES)} are read.")
    data = plain_gemma(path, data) if name == "gemma3_text" else data
    arch, rope = ARCHITECTURES[name], data.get("rope_parameters") or data.get("rope_scaling") or {}
    check_hf_config(path, data, name, rope)
    n_layer, n_embd, n_head, context, ffn_dim, act = map(data.get, arch.family.sizes)
    if act and ACTS.get(act) not in arch.acts:
        known = ", ".join(theirs for theirs, ours in ACTS.items() if ours in arch.acts)
        raise UserError(f"{path} has {arch.family.sizes[-1]}={act}: only {known} can be computed here.")
    window = data.get("sliding_window") if data.get("use_sliding_window", True) else None
    if window and window < (block_size or context):
        raise UserError(f"{path} has sliding_window={window}, less than the context of {block_size or context} tokens: "
                        f"give --block_size={window}.")
    if block_size > context and arch.family is GPT:
        raise UserError(f"block_size={block_size} exceeds the {context} learned positions of {path}: give fewer.")
    values = dict(
        n_layer=n_layer, n_embd=n_embd, n_head=n_head, attn_dim=n_head * (data.get("head_dim") or n_embd // n_head),
        n_kv_head=1 if name == "gpt_bigcode" else data.get("num_key_value_heads") or n_head,
        ffn_dim=ffn_dim or 4 * n_embd, block_size=block_size or context, vocab_size=data["vocab_size"],
        norm=arch.norm, pos=arch.family.pos, act=ACTS[act] if act else "gelu",
        norm_eps=data.get(arch.eps, arch.default_eps), tie_embeddings=data.get("tie_word_embeddings", arch.tied),
        rope_theta=rope.get("rope_theta", data.get("rope_theta", 10_000.0)))
    if name == "gemma3_text":
        values |= {"post_norm": 1.0, "logit_softcap": data.get("final_logit_softcapping") or 0.0}
    return name, config.from_dict(values, path)


def read_weights(folder, root) -> dict:
    """{name: tensor} of the folder's safetensors, buffers left out; root is put before names where all lack it."""
    safetensors, tensors = package("safetensors", "export.py"), {}
    from safetensors.torch import load_file
    index = os.path.join(folder, "model.safetensors.index.json")
    files = ["model.safetensors"]
    if os.path.exists(index):
        data = config.read_json(index, 1 << 22)
        names = data.get("weight_map") if isinstance(data, dict) else None
        files = list(names.values()) if isinstance(names, dict) else []
        if not files or not all(isinstance(file, str) and file == os.path.basename(file) for file in files):
            raise UserError(f"{index} is damaged: it does not name files of its folder.")
    for file in sorted(set(files)):
        path = os.path.join(folder, file)
        if not os.path.exists(path):
            raise UserError(f"{path} is missing: weights are read from safetensors, as transformers' save_pretrained "
                            "writes them.")
        try:
            tensors |= load_file(path)
        except (OSError, safetensors.SafetensorError) as e:
            raise UserError(f"{path} is damaged or cannot be read ({e}): fetch it again.") from None
    if not any(name.startswith(root) for name in tensors):
        tensors = {name if name.startswith("lm_head.") else root + name: t for name, t in tensors.items()}
    buffers = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
    tensors = {name: t for name, t in tensors.items() if not name.endswith(buffers)}
    for name, t in tensors.items():
        if t.dtype not in PRECISIONS:
            raise UserError(f"{folder} has {name} as {t.dtype}: only floats of 16 bits or more are read.")
    return tensors


def qk_gain(folder, tensors) -> float:
    """The one weight of all norms of queries and keys, which are taken out of tensors."""
    keys = [key for key in tensors if key.endswith((".q_norm.weight", ".k_norm.weight"))]
    gains = torch.cat([torch.empty(0), *(tensors.pop(key).float().flatten() for key in keys)]).unique().tolist()
    if len(gains) != 1 or gains[0] <= 0:
        raise UserError(f"the norms of queries and keys in {folder} have {len(gains)} different weights: "
                        "only one for all can be computed here.")
    return float(f"{gains[0]:.6g}")  # 1.2 comes back from float32 as 1.2


def read_hf(folder, block_size=0):
    """A Hugging Face folder -> (model in fp32 on the CPU, its Config, the other entries of a model.pt)."""
    name, cfg = read_hf_config(os.path.join(folder, "config.json"), block_size)
    paths = [os.path.join(folder, file) for file in ("tokenizer.json", "tokenizer.model")]
    cfg.tokenizer = next(filter(os.path.exists, paths), "")
    if not cfg.tokenizer:
        raise UserError(f"{folder} has neither tokenizer.json nor tokenizer.model: add the one of the model.")
    tokenizer, tensors = load_tokenizer(cfg.tokenizer), read_weights(folder, ARCHITECTURES[name].family.root)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(f"{cfg.tokenizer} has {tokenizer.vocab_size} tokens, the model {cfg.vocab_size}: "
                        "give the tokenizer that belongs to the model.")
    cfg.bias = any(t.any().item() for key, t in tensors.items() if key.endswith(".bias"))
    if name == "gemma3_text":
        tensors = as_gemma(tensors, cfg, back=True)
    if name in QK_NORMED:
        if cfg.norm_eps != 1e-5:
            raise UserError(f"{folder} has {ARCHITECTURES[name].eps}={cfg.norm_eps}: "
                            "here queries and keys are normed with 1e-05.")
        cfg.qk_norm = qk_gain(folder, tensors)
    model = build(cfg, torch.device("cpu"), weights=from_hf(tensors, cfg, name), path=folder)
    return model.eval(), cfg, {"step": 0, "val_loss": None, "tokenizer": tokenizer_entry(tokenizer)}


# ----------------------------------------------------------------------------------------------------------------------

def main(path, s):
    smaller = s.ffn != "dense" or s.ffn_dim or s.qk_rank
    device = pick_device(s.device if smaller else "cpu")
    model, cfg, saved = read_hf(path, s.block_size) if is_hf(path) else load(path, torch.device("cpu"))
    if s.factors and cfg.ffn == s.ffn == "dense":
        raise UserError(f"factors=True has no effect, the FFNs of {path} are dense: leave it out, or project them, as "
                        "with --ffn=lowrank.")
    if smaller:
        make_smaller(path, model.to(device), cfg, saved, s)
        model.cpu()
        saved |= {"step": 0, "val_loss": None}  # no longer the model that was trained
    if s.to:
        return write_hf(s.to, model, cfg, saved, s)
    target = os.path.join(s.out_dir, "model.pt")
    save_beside({**saved, "config": config.to_dict(cfg), "model": model.state_dict()}, target)
    print(f"{target}: {short(sum(p.numel() for p in model.parameters()))} parameters, tokenizer "
          f"{saved['tokenizer']['identity']}; sample from it with: python sample.py {s.out_dir}")


if __name__ == "__main__":
    config.run(lambda argv: main(*SETTINGS))
