"""Generates text from a trained model:  python sample.py out/quickstart --prompt='def main():' --n_samples=3

The model is a run folder or a bare model.pt. One prompt comes from --prompt, from a file (--prompt_file=PATH), or from
standard input (--prompt_file=-). Without a prompt the text begins where a document begins.

Many prompts come from --prompts=FILE: one a line, or .jsonl with a field "prompt" in each line. Up to --batch_size are
decoded at a time; where some end, the next begin. The answers are JSON lines in the order of the file. The other
fields of a prompt's line come back as "fields".

--merge=True writes the model with every structured linear merged to one dense matrix, and stops.
"""
import codecs
import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Literal

import config
from config import UserError


@dataclass
class Settings:
    prompt: str = ""                     # text to continue
    prompt_file: str = ""                # read the prompt from this file; - is standard input
    prompts: str = ""                    # read many prompts from this file: one a line, or .jsonl with a field "prompt"
    out: str = ""                        # write JSON lines to this new file; empty: standard output, one prompt as text
    n_samples: int = 1                   # continuations of each prompt
    max_new_tokens: int = 256            # tokens to add at most; the context ends at the model's block_size
    temperature: float = 0.8             # 0: always the likeliest token
    top_k: int = 0                       # keep the k likeliest tokens; 0: all
    top_p: float = 1.0                   # keep the likeliest tokens that make up this probability
    min_p: float = 0.0                   # keep tokens at least this share as likely as the likeliest
    seed: int = 1005                     # a sample's draws depend on seed, prompt, its number and the position only
    batch_size: int = 0                  # sequences decoded at a time; 0: up to 64, as memory allows
    decode: Literal["auto", "structured", "merged"] = "auto"  # FFNs as factors, dense equivalents, or the faster one
    merge: bool = False                  # write <run folder>-merged/model.pt, a plain dense model, and stop
    graphs: bool | Literal["auto"] = "auto"  # one CUDA graph per step; auto: on CUDA
    device: str = "auto"                 # auto | cpu | cuda | cuda:N | mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights; auto: bfloat16 on CUDA


def read_settings(argv):
    """Command line -> (path of the model, Settings, prompts as of read_prompts)."""
    words, values = config.parse(argv, Settings, usage=__doc__)
    if len(words) != 1:
        raise UserError("give one run folder or model.pt to sample from, such as out/quickstart; "
                        f"{len(words)} were given.")
    s = Settings(**values)
    for name, ok, expected in (
            ("n_samples", 1 <= s.n_samples <= 100_000, "between 1 and 100000"),
            ("max_new_tokens", s.max_new_tokens >= 1, "at least 1"), ("batch_size", s.batch_size >= 0, "at least 0"),
            ("temperature", s.temperature >= 0, "at least 0"), ("top_k", s.top_k >= 0, "at least 0"),
            ("top_p", 0 < s.top_p <= 1, "above 0 and at most 1"), ("min_p", 0 <= s.min_p <= 1, "between 0 and 1")):
        if not ok:
            raise UserError(f"{name}={getattr(s, name)} must be {expected}.")
    config.check_device(s.device)
    given = [f"--{name}" for name in ("prompt", "prompt_file", "prompts") if getattr(s, name)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other: give one of them.")
    if not os.path.isdir(os.path.dirname(s.out) or "."):
        raise UserError(f"the folder of {s.out} does not exist: make it, or write elsewhere.")
    if os.path.isfile(s.out) or os.path.isdir(s.out):  # a pipe or a device may be there
        raise UserError(f"{s.out} exists already and is not overwritten: move it away, or give --out a new name.")
    if values.get("prompt") == "":
        raise UserError("the prompt is empty: leave --prompt out to begin where a document begins.")
    return words[0], s, read_prompts(s)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts

@dataclass
class Prompt:
    text: str                            # empty: the beginning of a document
    where: str = ""                      # for errors: " in line 3 of FILE"
    fields: dict | None = None           # the other fields of a JSON line


def read_prompts(s) -> list:
    if s.prompts:
        prompts = [read_prompt(s, number, line) for number, line in prompt_lines(s)]
        if not prompts:
            raise UserError(f"{s.prompts} holds no prompts: write one a line.")
        return prompts
    text = config.read_text(s.prompt_file) if s.prompt_file else config.as_text(os.fsencode(s.prompt), "the prompt")
    if s.prompt_file and not text:
        name = "standard input" if s.prompt_file == "-" else s.prompt_file
        raise UserError(f"{name} is empty: leave --prompt_file out to begin where a document begins.")
    return [Prompt(text)]


def is_jsonl(s) -> bool:
    return s.prompts.lower().endswith((".jsonl", ".json"))


def prompt_lines(s):
    """(number, line without its end) of --prompts. Blank lines of JSON are skipped."""
    with config.reading(s.prompts), open(0 if s.prompts == "-" else s.prompts, "rb") as file:
        for number, data in config.text_lines(file, s.prompts, longest=sys.maxsize):
            line = data.decode()
            if not is_jsonl(s) or line.strip():
                yield number, line[:-2] if line.endswith("\r\n") else line.removesuffix("\n")


def read_prompt(s, number, line) -> Prompt:
    """The prompt of one line, checked."""
    where, fields = f"line {number} of {s.prompts}", None
    if is_jsonl(s):
        try:
            fields = json.loads(line)
            json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()  # fails for NaN and half a surrogate pair
        except (ValueError, RecursionError):
            raise UserError(f"{where} is not JSON in UTF-8: write one object a line, such as "
                            '{"prompt": "text"}.') from None
        if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
            raise UserError(f'{where} has no field "prompt" that holds text.')
        line = fields.pop("prompt")
    if not line:
        raise UserError(f"the prompt in {where} is empty: give each line some text.")
    return Prompt(line, f" in {where}", fields)


if __name__ == "__main__":
    SETTINGS = config.run(read_settings)  # before torch, which takes seconds to load

import torch

from checkpoint import save_beside
from config import short
from decode import Decoder, Row, padded, row_key, rows_that_fit
from device import enough_memory, pick_device, pick_dtype
from merge import exact_matmuls, prepare_model, replace_structured
from model import load
from run import writing
from tokenizer import saved_tokenizer


def encode(prompt, tokenizer, cfg) -> list:
    """Token ids of a prompt, checked; without text the EOS token, as at the beginning of a document."""
    text, where = prompt.text, prompt.where
    if not text:
        return [tokenizer.eos]
    ids = tokenizer.encode(text)
    unknown = "\ufffd".encode()
    if "\ufffd" not in text and any(tokenizer.table[i] == unknown for i in ids):
        raise UserError(f"the prompt{where} holds characters that the tokenizer {tokenizer.identity} does not know.")
    if len(ids) >= cfg.block_size:
        raise UserError(f"the prompt{where} has {len(ids)} tokens, the model's context holds {cfg.block_size}: "
                        f"shorten it to {cfg.block_size - 1} or fewer.")
    return ids


# ----------------------------------------------------------------------------------------------------------------------
# Output

def show(text):
    """Prints at once. config.run ends quietly where the reader has ended, and has a sentence for a full disk."""
    print(text, end="", flush=True)


def stream(decoder, text, rows, tokenizer):
    """Prints one sample after the other, as it comes."""
    for n, row in enumerate(rows, 1):
        characters = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens
        if len(rows) > 1:
            show(f"--- sample {n}\n")
        show(text)
        for fresh in decoder.run([row]):
            for _, tokens in fresh:
                show(characters.decode(tokenizer.decode_bytes(tokens)))
        show(characters.decode(b"", final=True) + "\n")
        if row.finish == "context":
            context = decoder.model.cfg.block_size
            print(f"the text ends here: it fills the model's context of {context} tokens.", file=sys.stderr)


@contextlib.contextmanager
def line_writer(path):
    """Yields write(line) for standard output, or for a new file, which keeps whole lines only when something fails."""
    if not path:
        yield lambda line: show(line + "\n")
        return
    count = size = 0                                                                   # of the whole lines

    def write(line):
        nonlocal count, size
        data = line.encode() + b"\n"
        rest = data
        while rest:
            rest = rest[file.write(rest):]                                             # a nearly full disk takes a part
        count, size = count + 1, size + len(data)

    pipe = os.path.exists(path) and not os.path.isfile(path)  # or a device; a file is that of a command beside this one
    with writing(path), open(path, "wb" if pipe else "xb", buffering=0) as file:
        try:
            yield write
        except BaseException:
            if os.path.isfile(path):
                file.truncate(size)
                if count:
                    print(f"{path} keeps the {count} samples that were finished.", file=sys.stderr)
                else:
                    os.remove(path)
            raise


def write_samples(decoder, prompts, rows, tokenizer, s):
    """Decodes all rows and writes one JSON object each, in their order: a row waits for those before it."""
    began, written = time.perf_counter(), 0
    with line_writer(s.out) as write:
        for _ in decoder.run(rows):
            while written < len(rows) and rows[written].finish:
                row, prompt = rows[written], prompts[written // s.n_samples]
                values = {"prompt": prompt.text, "text": tokenizer.decode(row.new), "sample": written % s.n_samples,
                          "prompt_tokens": len(row.prompt), "new_tokens": len(row.new), "finish": row.finish,
                          "tokens_per_s": round(max(len(row.new), 1) / row.seconds, 1)}
                if prompt.fields is not None:
                    values["fields"] = prompt.fields
                write(json.dumps(values, ensure_ascii=False))
                written += 1
    seconds, tokens = time.perf_counter() - began, sum(len(row.new) for row in rows)
    print(f"{len(rows)} samples, {short(tokens)} new tokens in {seconds:.1f} s: {short(tokens / seconds)} tokens/s",
          file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# A dense model.pt

@torch.no_grad()
def write_merged(path, model, cfg, saved, prompt):
    """Writes <run folder>-merged/model.pt, or <name>-merged.pt: the model with every structured linear merged."""
    if cfg.ffn == "dense" and not cfg.qk_rank:
        raise UserError(f"{path} is dense already: there is nothing to merge.")
    folder = os.path.normpath(path)
    folder = (os.path.abspath(path) if os.path.basename(folder) in (".", "..") else folder) + "-merged"
    target = os.path.join(folder, "model.pt") if os.path.isdir(path) else path.removesuffix(".pt") + "-merged.pt"
    if os.path.exists(target):
        raise UserError(f"{target} exists: move it away first.")
    tokens = torch.tensor([prompt], device=model.head.weight.device)
    if cfg.block_size > len(prompt):  # random tokens fill the context: the logits of a short prompt would say little
        generator = torch.Generator().manual_seed(0)
        more = torch.randint(cfg.vocab_size, (1, cfg.block_size - len(prompt)), generator=generator)
        tokens = torch.cat((tokens, more.to(tokens.device)), dim=1)
    with exact_matmuls():
        before = model(tokens)
        replace_structured(model)
        after = model(tokens)
    cfg.ffn, cfg.rank, cfg.nblocks, cfg.qk_rank, cfg.guide = "dense", 0, 0, 0, "off"
    save_beside({**saved, "config": config.to_dict(cfg), "model": model.state_dict()}, target)
    print(f"{target}: dense, {short(sum(p.numel() for p in model.parameters()))} parameters; largest logit difference "
          f"{(before - after).abs().max():.1e} over {tokens.size(1)} tokens (logits up to {before.abs().max():.1f})")


# ----------------------------------------------------------------------------------------------------------------------

def main(path, s, prompts):
    device = pick_device(s.device)
    if s.graphs is True and device.type != "cuda":
        raise UserError(f"graphs=True needs a CUDA device, this is {device}: leave --graphs out.")
    model, cfg, saved = load(path, device)
    tokenizer = saved_tokenizer(saved["tokenizer"], cfg.vocab_size)
    if cfg.block_size == 1 and not s.merge:
        raise UserError(f"{path} has block_size=1, a context without room for a new token: give a model of at least 2.")
    encoded = [encode(prompt, tokenizer, cfg) for prompt in prompts]
    if s.merge:
        return write_merged(path, model, cfg, saved, encoded[0])
    rows = [Row(ids, row_key(s.seed, ids, n)) for ids in encoded for n in range(s.n_samples)]
    dtype = pick_dtype(s.dtype, device)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    prepare_model(model, s.decode, dtype, os.path.join(folder, "decode.json"))
    in_json = bool(s.prompts or s.out)
    length = min(cfg.block_size, max(map(len, encoded)) + s.max_new_tokens)
    batch_size = 1
    if in_json:
        most = s.batch_size or min(64, rows_that_fit(cfg, padded(length, cfg.block_size), device, dtype))
        batch_size = max(1, min(most, len(rows)))
    graphs = device.type == "cuda" and s.graphs is not False
    with enough_memory(f"the memory of {device} does not hold a batch of {batch_size} sequences of {length} tokens: "
                       "give a smaller --batch_size."):
        decoder = Decoder(model, s, batch_size, length, tokenizer.eos, tokenizer.vocab_size, graphs)
        if in_json:
            write_samples(decoder, prompts, rows, tokenizer, s)
        else:
            stream(decoder, prompts[0].text, rows, tokenizer)


if __name__ == "__main__":
    config.run(lambda argv: main(*SETTINGS))
