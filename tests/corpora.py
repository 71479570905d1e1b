"""Helpers of the tests of data: small corpora, data folders made of them, and their texts."""
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

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
