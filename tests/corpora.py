"""Helpers of the tests of data: small corpora, data folders made of them, and their texts."""
import json
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest

import prepare
from config import Config
from prepare import Settings


def words(seed, n):
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("aeioubdkmnrst", k=rng.randrange(2, 9))) for _ in range(n))


def some_documents(n=300, seed=0):
    return [f"{words(seed + i, 12)}.\n{words(seed - i, 9)} é 中 {i}\n" for i in range(n)]


def write_corpus(path, documents):
    path.write_text("".join(d + "<|endoftext|>\n" for d in documents), encoding="utf-8", newline="")
    return path


def make(tmp_path, folder="data", **values):
    """Prepares with the given Config and Settings fields; the folder's (train, val, tokenizer)."""
    settings = {f: values.pop(f) for f in list(values) if hasattr(Settings(), f)}
    cfg = Config(**{"dataset": "text", "tokenizer": "byte", "data_dir": str(tmp_path / folder), **values})
    prepare.prepare(cfg, Settings(**{"workers": 2, **settings}))
    return prepare.open_data(cfg)


def command(*args, **kwargs):
    return subprocess.run([sys.executable, str(ROOT / "prepare.py"), *map(str, args)], capture_output=True, text=True,
                          timeout=60, **kwargs)


def documents_of(tokens, tokenizer):
    """Splits at EOS and decodes: the oracle for what a token file holds."""
    ids = tokens.tolist()
    ends = [i for i, t in enumerate(ids) if t == tokenizer.eos]
    return [tokenizer.decode(ids[a + 1:b]) for a, b in zip([-1] + ends, ends)]


# ----------------------------------------------------------------------------------------------------------------------
# Folders with a tokenizer.json

LINES = [f"{a} {b} the quick brown fox's {i * 37 % 991} jumps, naïve — over\n\tthe lazy dog()" for i, (a, b) in
          enumerate(zip("alpha beta gamma delta".split() * 25, "one two three four five".split() * 20))]


def byte_level(folder, eos="<|endoftext|>", size=400):
    """A folder with the tokenizer.json of a BPE over bytes, as GPT-2's, SmolLM's or LLaMA 3's."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=[eos],
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
                                             show_progress=False)
    bpe.train_from_iterator(LINES, trainer)
    return keep(bpe, folder, eos)


def byte_fallback(folder, eos="</s>", size=500):
    """The same with sentencepiece's spaces and bytes for what has no piece, as LLaMA 2's."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"),
                                                      tokenizers.normalizers.Replace(" ", "▁")])
    D = tokenizers.decoders
    bpe.decoder = D.Sequence([D.Replace("▁", " "), D.ByteFallback(), D.Fuse(), D.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", eos]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size,
                                             special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
                                             show_progress=False)
    bpe.train_from_iterator(LINES, trainer)
    data = json.loads(bpe.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] in special]  # bytes are ordinary pieces
    return keep(tokenizers.Tokenizer.from_str(json.dumps(data)), folder, eos)


def keep(bpe, folder, eos):
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": eos, "lstrip": False}}))
    return bpe
