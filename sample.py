"""Generates text from a trained model:  python sample.py out/quickstart --prompt='def main():' --n_samples=3

Takes a run folder or a bare model.pt. One prompt comes from --prompt, from a file (--prompt_file=PATH), or from standard input
(--prompt_file=-); without one the text begins where a document begins. Many prompts come from --prompts=FILE, one a line, or JSON
lines with a field "prompt"; they are decoded in batches and answered as JSON lines, in the order of the file. --merge=True
writes the model with every structured linear merged to one dense matrix and stops.
"""
import codecs
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
    out: str = ""                        # write JSON lines to this file; empty: text for one prompt, JSON on standard output for many
    n_samples: int = 1                   # continuations of each prompt
    max_new_tokens: int = 256            # tokens to add at most; the context ends at the model's block_size
    temperature: float = 0.8             # 0: always the likeliest token
    top_k: int = 0                       # keep the k likeliest tokens; 0: all
    top_p: float = 1.0                   # keep the likeliest tokens that make up this probability
    min_p: float = 0.0                   # keep tokens at least this share as likely as the likeliest
    seed: int = 1005                     # a sample's draws depend on seed, prompt, its number and the position only
    batch_size: int = 0                  # sequences decoded at a time; 0: up to 64, as memory allows
    decode: Literal["auto", "structured", "merged"] = "auto"  # structured FFNs by factors, by dense equivalents, or as measured
    merge: bool = False                  # write <run folder>-merged/model.pt, a plain dense model, and stop
    graphs: bool | Literal["auto"] = "auto"  # one CUDA graph per step; auto: on CUDA
    device: str = "auto"                 # auto | cpu | cuda | cuda:N | mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights; auto: bfloat16 on CUDA


def read_settings(argv):
    """Command line -> (path of the model, Settings)."""
    words, values = config.parse(argv, Settings, usage=__doc__)
    if len(words) != 1:
        raise UserError(f"give one run folder or model.pt to sample from, such as out/quickstart; {len(words)} were given.")
    s = Settings(**values)
    for name, ok, expected in (("n_samples", 1 <= s.n_samples <= 100_000, "between 1 and 100000"), ("max_new_tokens", s.max_new_tokens >= 1, "at least 1"),
                               ("temperature", s.temperature >= 0, "at least 0"), ("top_k", s.top_k >= 0, "at least 0"),
                               ("top_p", 0 < s.top_p <= 1, "above 0 and at most 1"), ("min_p", 0 <= s.min_p <= 1, "between 0 and 1"),
                               ("batch_size", s.batch_size >= 0, "at least 0")):
        if not ok:
            raise UserError(f"{name}={getattr(s, name)} must be {expected}.")
    given = [f"--{name}" for name in ("prompt", "prompt_file", "prompts") if getattr(s, name)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other: give one of them.")
    if not os.path.isdir(os.path.dirname(s.out) or "."):
        raise UserError(f"the folder of {s.out} does not exist: make it, or write elsewhere.")
    if values.get("prompt") == "":
        raise UserError("the prompt is empty: leave --prompt out to begin where a document begins.")
    return words[0], s


if __name__ == "__main__":
    SETTINGS = config.run(read_settings)  # a wrong setting is told before torch loads

import torch

from config import short
from decode import Decoder, Row, largest_batch, padded, row_key
from device import out_of_memory, pick_device
from merge import exact_matmuls, prepare_model, replace_structured
from model import load
from run import save_beside
from tokenizer import tokenizer_from_blob


# ----------------------------------------------------------------------------------------------------------------------
# Prompts

def read_text(path) -> str:
    try:
        if path == "-":
            return sys.stdin.read()
        with open(path, encoding="utf-8") as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read the prompt from {path}: {getattr(e, 'strerror', None) or 'it is not UTF-8 text'}.") from None


def read_prompts(s) -> list:
    """[{"prompt": text, ...}]: the prompts with what else their JSON lines hold; one empty one where no prompt is asked for."""
    if not s.prompts:
        text = read_text(s.prompt_file) if s.prompt_file else s.prompt
        if s.prompt_file and not text:
            raise UserError(f"{s.prompt_file} is empty: leave --prompt_file out to begin where a document begins.")
        return [{"prompt": text}]
    lines = read_text(s.prompts).split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    found = []
    for number, line in enumerate(lines, 1):
        record = {"prompt": line.removesuffix("\r")}
        if s.prompts.endswith((".jsonl", ".json")):
            try:
                record = json.loads(line)
                json.dumps(record, ensure_ascii=False, allow_nan=False).encode()  # NaN and half a surrogate pair could not be written again
            except (ValueError, RecursionError):
                raise UserError(f"line {number} of {s.prompts} is not JSON in UTF-8: write one object a line, such as {{\"prompt\": \"text\"}}.") from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise UserError(f"line {number} of {s.prompts} has no field \"prompt\" that holds text.")
        if not record["prompt"]:
            raise UserError(f"the prompt in line {number} of {s.prompts} is empty: give each line some text.")
        found.append(record)
    if not found:
        raise UserError(f"{s.prompts} holds no prompts: write one a line.")
    return found


def encode(text, tokenizer, cfg, where="") -> list:
    """Token ids of a prompt, checked; no text is the end of the document before."""
    if not text:
        return [tokenizer.eos]
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"the prompt{where} holds bytes that are not UTF-8 text.") from None
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

def stream(decoder, text, rows, tokenizer):
    """One sample after the other on the terminal, as it comes."""
    for n, row in enumerate(rows, 1):
        characters = codecs.getincrementaldecoder("utf-8")(errors="replace")  # one may span tokens
        if len(rows) > 1:
            print(f"--- sample {n}", flush=True)
        print(text, end="", flush=True)
        for fresh in decoder.run([row], chunk=8):
            for _, tokens in fresh:
                print(characters.decode(tokenizer.decode_bytes(tokens)), end="", flush=True)
        print(characters.decode(b"", final=True), flush=True)
        if row.finish == "context":
            print(f"the text ends here: it fills the model's context of {decoder.model.cfg.block_size} tokens.", file=sys.stderr)


def write_json(decoder, records, rows, tokenizer, s, batch_size):
    """All rows, batch_size at a time, one JSON object each: the prompt's own fields, then what was generated."""
    began = time.perf_counter()
    try:
        out = open(s.out, "w", encoding="utf-8") if s.out else sys.stdout
    except OSError as e:
        raise UserError(f"cannot write {s.out}: {e.strerror}.") from None
    try:
        for i in range(0, len(rows), batch_size):
            for _ in decoder.run(rows[i:i + batch_size]):
                pass
            for n, row in enumerate(rows[i:i + batch_size], i):
                values = {**records[n // s.n_samples], "text": tokenizer.decode(row.new), "sample": n % s.n_samples,
                          "prompt_tokens": len(row.prompt), "new_tokens": len(row.new), "finish": row.finish,
                          "tokens_per_s": round(max(len(row.new), 1) / row.seconds, 1)}
                print(json.dumps(values, ensure_ascii=False), file=out, flush=True)
    finally:
        if s.out:
            out.close()
    seconds, tokens = time.perf_counter() - began, sum(len(row.new) for row in rows)
    print(f"{len(rows)} samples, {short(tokens)} new tokens in {seconds:.1f} s: {short(tokens / seconds)} tokens/s", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# A dense model.pt

@torch.no_grad()
def write_merged(path, model, cfg, saved, prompt):
    """The model with dense equivalents for its structured linears, as <run folder>-merged/model.pt or <name>-merged.pt."""
    if cfg.ffn == "dense":
        raise UserError(f"{path} is dense already: there is nothing to merge.")
    target = os.path.join(os.path.normpath(path) + "-merged", "model.pt") if os.path.isdir(path) else path.removesuffix(".pt") + "-merged.pt"
    if os.path.exists(target):
        raise UserError(f"{target} exists: move it away first.")
    tokens = torch.tensor([prompt], device=model.head.weight.device)
    wanted = cfg.block_size - len(prompt)
    if wanted > 0:  # any tokens behind the prompt: a short text alone would say little
        draws = torch.randint(cfg.vocab_size, (1, wanted), generator=torch.Generator().manual_seed(0)).to(tokens.device)
        tokens = torch.cat((tokens, draws), dim=1)
    with exact_matmuls():
        before = model(tokens)
        replace_structured(model)
        after = model(tokens)
    cfg.ffn, cfg.rank, cfg.nblocks, cfg.guide = "dense", 0, 0, "off"
    save_beside({**saved, "config": config.to_dict(cfg), "model": model.state_dict()}, target)
    print(f"{target}: dense, {short(sum(p.numel() for p in model.parameters()))} parameters; largest logit difference "
          f"{(before - after).abs().max():.1e} over {tokens.size(1)} tokens (logits up to {before.abs().max():.1f})")


# ----------------------------------------------------------------------------------------------------------------------

def fit_batch(cfg, s, n_rows, length, device, dtype) -> int:
    """Rows at a time: what was asked for, else up to 64 as memory allows."""
    if s.batch_size:
        return min(s.batch_size, n_rows)
    fits = largest_batch(cfg, padded(length, cfg.block_size), device, dtype)
    return max(1, min(64, n_rows, fits))


def main(path, s):
    device = pick_device(s.device)
    model, cfg, saved = load(path, device)
    tokenizer = tokenizer_from_blob(saved["tokenizer"]["identity"], saved["tokenizer"]["blob"].numpy().tobytes())
    records = read_prompts(s)
    prompts = [encode(record["prompt"], tokenizer, cfg, f" in line {n} of {s.prompts}" if s.prompts else "") for n, record in enumerate(records, 1)]
    if s.merge:
        return write_merged(path, model, cfg, saved, prompts[0])
    rows = [Row(prompt, row_key(s.seed, prompt, n)) for prompt in prompts for n in range(s.n_samples)]
    dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}[s.dtype]
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    prepare_model(model, s.decode, dtype, os.path.join(folder, "decode.json"))
    in_json = bool(s.prompts or s.out)
    length = min(cfg.block_size, max(map(len, prompts)) + s.max_new_tokens)
    batch_size = fit_batch(cfg, s, len(rows), length, device, dtype) if in_json else 1
    decoder = Decoder(model, s, batch_size, length, tokenizer.eos, tokenizer.vocab_size, device.type == "cuda" and s.graphs is not False)
    try:
        if in_json:
            write_json(decoder, records, rows, tokenizer, s, batch_size)
        else:
            stream(decoder, records[0]["prompt"], rows, tokenizer)
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        raise UserError(f"the memory of {device} does not hold a batch of {batch_size} sequences of {length} tokens: give a smaller --batch_size.") from None


if __name__ == "__main__":
    config.run(lambda argv: main(*SETTINGS))
