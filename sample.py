"""Generates text from a trained model:  python sample.py out/quickstart --prompt='def main():' --n_samples=3

Takes a run folder or a bare model.pt. The prompt comes from --prompt, from a file (--prompt_file=PATH), or from standard input
(--prompt_file=-); without one the text begins where a document begins.
"""
import codecs
import random
import sys
from dataclasses import dataclass
from typing import Literal

import config
from config import UserError


@dataclass
class Settings:
    prompt: str = ""                     # text to continue
    prompt_file: str = ""                # read the prompt from this file; - is standard input
    n_samples: int = 1                   # continuations to write
    max_new_tokens: int = 256            # tokens to add at most; the context ends at the model's block_size
    temperature: float = 0.8             # 0: always the likeliest token
    top_k: int = 0                       # keep the k likeliest tokens; 0: all
    top_p: float = 1.0                   # keep the likeliest tokens that make up this probability
    min_p: float = 0.0                   # keep tokens at least this share as likely as the likeliest
    seed: int = 1005                     # a sample's draws depend on seed, prompt and its number only
    device: str = "auto"                 # auto | cpu | cuda | cuda:N | mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA


def read_settings(argv):
    """Command line -> (path of the model, Settings)."""
    words, values = config.parse(argv, Settings, usage=__doc__)
    if len(words) != 1:
        raise UserError(f"give one run folder or model.pt to sample from, such as out/quickstart; {len(words)} were given.")
    s = Settings(**values)
    for name, ok, expected in (("n_samples", s.n_samples >= 1, "at least 1"), ("max_new_tokens", s.max_new_tokens >= 1, "at least 1"),
                               ("temperature", s.temperature >= 0, "at least 0"), ("top_k", s.top_k >= 0, "at least 0"),
                               ("top_p", 0 < s.top_p <= 1, "above 0 and at most 1"), ("min_p", 0 <= s.min_p <= 1, "between 0 and 1")):
        if not ok:
            raise UserError(f"{name}={getattr(s, name)} must be {expected}.")
    if s.prompt and s.prompt_file:
        raise UserError("--prompt and --prompt_file exclude each other: give one of them.")
    return words[0], s


if __name__ == "__main__":
    SETTINGS = config.run(read_settings)  # a wrong setting is told before torch loads

import torch

import prepare
from model import load
from train import pick_device


def read_prompt(s) -> str:
    try:
        if s.prompt_file == "-":
            return sys.stdin.read()
        if s.prompt_file:
            with open(s.prompt_file, encoding="utf-8") as f:
                return f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read the prompt from {s.prompt_file}: {getattr(e, 'strerror', None) or 'it is not UTF-8 text'}.") from None
    return s.prompt


def pick(logits, s, generator):
    """logits (B, V) -> the next tokens (B,): temperature, then top-k, top-p and min-p, then one draw."""
    if s.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / s.temperature
    if 0 < s.top_k < logits.size(-1):
        logits[logits < logits.topk(s.top_k).values[:, -1:]] = -torch.inf
    p = logits.softmax(dim=-1)
    if s.top_p < 1:
        ordered, index = p.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= s.top_p  # the token that crosses the line stays
        p = p.masked_fill(beyond.scatter(-1, index, beyond), 0)
    if s.min_p:
        p = p.masked_fill(p < s.min_p * p.amax(dim=-1, keepdim=True), 0)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate(model, prompt, s, eos, generator, next_logits=None):
    """Yields the tokens that follow `prompt` (a list of ids): up to max_new_tokens, to EOS, or to the end of the context.

    next_logits(tokens (1, T)) -> (1, V) is the one thing it asks of the model; by default a full forward.
    """
    next_logits = next_logits or model.next_logits
    tokens = torch.tensor([prompt], device=model.wte.weight.device)                             # (1, T)
    for _ in range(min(s.max_new_tokens, model.cfg.block_size - len(prompt))):
        token = pick(next_logits(tokens), s, generator)
        if token.item() == eos:
            return
        yield token.item()
        tokens = torch.cat((tokens, token[:, None]), dim=1)


def main(path, s):
    device = pick_device(s.device)
    model, cfg, saved = load(path, device)
    tokenizer = prepare.tokenizer_from_blob(saved["tokenizer"]["identity"], saved["tokenizer"]["blob"].numpy().tobytes())
    text = read_prompt(s)
    prompt = tokenizer.encode(text) if text else [tokenizer.eos]
    if len(prompt) >= cfg.block_size:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model's context holds {cfg.block_size}: shorten it to {cfg.block_size - 1} or fewer.")

    def next_logits(tokens):
        return model.next_logits(tokens)[:, :tokenizer.vocab_size]  # what pads the vocabulary is no token

    bf16 = s.dtype == "bfloat16" or s.dtype == "auto" and device.type == "cuda"
    for n in range(s.n_samples):
        seed = random.Random(f"{s.seed} {n} {text}").getrandbits(63)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens
        if s.n_samples > 1:
            print(f"--- sample {n + 1}", flush=True)
        print(text, end="", flush=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            for token in generate(model, prompt, s, tokenizer.eos, torch.Generator(device).manual_seed(seed), next_logits):
                print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)
        print(decoder.decode(b"", final=True), flush=True)


if __name__ == "__main__":
    config.run(lambda argv: main(*SETTINGS))
