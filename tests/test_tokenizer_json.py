"""tokenizer.json in and out: ids and bytes of every kind of tokenizer, against tokenizers and transformers."""
import argparse
import io
import json
import random
from pathlib import Path

import pytest
import torch

from config import UserError
from conftest import train_run
from corpora import LINES, byte_fallback, byte_level
from model import load
from tokenizer import byte_characters, load_tokenizer, pinned, tokenizer_from_blob, train_sentencepiece
from tokenizer_json import bytes_json, last_merge, tokenizer_files

CPU = torch.device("cpu")
TEXTS = ["def main():\n    return 1", "naïve Œuvre 中文 🙂 ﷺ", "  two  spaces\t\ttabs\r\n\n\n", "</s><|endoftext|><unk>",
         "a▁b ▁ ▁▁c", "", " ", "\x00\x7f\u200b", "I'll 123456 we're 'tis",
         "x" * 300]


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers that come in

@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_a_tokenizer_json_gives_its_ids_and_every_byte_back(make, tmp_path):
    bpe = make(tmp_path / "small")
    tokenizer = load_tokenizer(str(tmp_path / "small" / "tokenizer.json"))
    assert tokenizer.identity.startswith("hf:small@") and tokenizer.vocab_size == bpe.get_vocab_size()
    again = tokenizer_from_blob(tokenizer.identity, tokenizer.blob)
    bpe.encode_special_tokens = True
    start = " " if make is byte_fallback else ""  # LLaMA's puts a space before a text
    for text in (*TEXTS, *LINES):
        ids = tokenizer.encode(text)
        assert ids == bpe.encode(text, add_special_tokens=False).ids == again.encode(text) and tokenizer.eos not in ids
        if "▁" not in text or make is byte_level:  # sentencepiece's spaces are underlines
            assert tokenizer.decode_bytes(ids) == (start + text if text else "").encode()
    assert tokenizer.decode_bytes([tokenizer.eos]) == b""
    assert tokenizer.eos == bpe.token_to_id({byte_level: "<|endoftext|>", byte_fallback: "</s>"}[make])


def test_the_end_of_a_document_is_named_by_one_of_the_folders_files(tmp_path):
    byte_level(tmp_path / "small")
    path = tmp_path / "small" / "tokenizer.json"
    expected = load_tokenizer(str(path))
    (path.parent / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="names its end-of-sequence token"):
        load_tokenizer(str(path))
    (path.parent / "config.json").write_text(json.dumps({"eos_token_id": [expected.eos, 3]}))
    assert load_tokenizer(str(path)).identity == expected.identity
    (path.parent / "config.json").write_text(json.dumps({"eos_token_id": 0}))  # StarCoder's is the first token
    assert load_tokenizer(str(path)).eos == 0
    path.write_text("{}")
    with pytest.raises(UserError, match="are not Hugging Face's tokenizer"):
        load_tokenizer(str(path))


def test_a_text_is_prepared_trained_on_and_sampled_with_a_tokenizer_json(cli, tmp_path):
    byte_level(tmp_path / "small")
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    argv = ["--dataset=text", f"--input={tmp_path}/text.txt", f"--tokenizer={tmp_path}/small/tokenizer.json",
            f"--data_dir={tmp_path}/data"]
    for _ in range(2):  # the second time it is there already
        assert cli("prepare.py", *argv, "--workers=1")[0] == 0
    out = train_run(tmp_path / "run", tmp_path / "data", "--max_tokens=128")
    identity = load(str(out), CPU)[2]["tokenizer"]["identity"]
    assert identity.startswith("hf:small@")
    status, text, _ = cli("sample.py", out, "--prompt=naïve 中 </s>", "--max_new_tokens=4")
    assert status == 0 and text.startswith("naïve 中 </s>")


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers that go out

def foreign_model():
    """A sentencepiece model of LLaMA's kind."""
    import sentencepiece
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=out, model_type="bpe", vocab_size=420, byte_fallback=True,
        minloglevel=3, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True)
    return out.getvalue()


def gpt2_blob(folder):
    """Ranks of a small byte-level BPE, in GPT-2's form."""
    byte_level(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    of_character = {c: i for i, c in enumerate(byte_characters())}
    ranked = sorted((i, token) for token, i in vocabulary.items() if token != "<|endoftext|>")
    return "\n".join(bytes(of_character[c] for c in token).hex() for _, token in ranked).encode()


def tokenizer_of(kind, folder):
    if kind == "hf":
        byte_fallback(folder)
        return load_tokenizer(str(folder / "tokenizer.json"))
    blob = {"byte": lambda: b"", "gpt2": lambda: gpt2_blob(folder), "spm": lambda: train_sentencepiece(420, LINES),
            "model": foreign_model}[kind]()
    name = {"spm": "spm:420", "model": "llama.model"}.get(kind)
    return tokenizer_from_blob(pinned(name, blob) if name else kind, blob)


def source_lines(n=1000):
    """Lines of the standard library, with their ends."""
    return Path(argparse.__file__).read_text(encoding="utf-8").splitlines(keepends=True)[:n]


def odd_texts(n=300):
    rng = random.Random(0)
    kinds = ((32, 127), (0, 0x250), (0x250, 0xD800), (0xE000, 0x1FFFF))
    return ["".join(chr(rng.randrange(*rng.choice(kinds))) for _ in range(rng.randrange(1, 30))) for _ in range(n)]


def write_files(folder, files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("kind", ["byte", "gpt2", "spm", "model", "hf"])
def test_transformers_reads_every_tokenizer_with_the_same_ids_and_bytes(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_of(kind, tmp_path / "small")
    folder = write_files(tmp_path / "out", tokenizer_files(tokenizer, 64, "transformers"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == tokenizer.eos and len(theirs) == tokenizer.vocab_size
    lines = source_lines()
    assert len(lines) == 1000 and theirs(lines)["input_ids"] == [tokenizer.encode(line) for line in lines]
    for text in (*TEXTS, *LINES, *odd_texts()):
        if kind == "hf" and "</s>" in text:  # their special tokens stay theirs
            continue
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == tokenizer.decode(ids).removeprefix(" " if kind in ("model", "hf") else "")


def test_gpt2s_merges_are_those_it_was_trained_with(tmp_path):
    blob = gpt2_blob(tmp_path / "small")
    merges = json.loads((tmp_path / "small" / "tokenizer.json").read_text())["model"]["merges"]
    written = bytes_json(tokenizer_from_blob("gpt2", blob).table, True)
    assert len(merges) > 100 and written["model"]["merges"] == merges
    ranks = {token: i for i, token in enumerate((b"a", b"b", b"c", b"bc", b"abc", b"cab"))}
    assert last_merge(b"abc", ranks) == [b"a", b"bc"]
    assert last_merge(b"cab", ranks) is None  # neither ca nor ab is a token


def test_a_tokenizer_that_normalises_is_refused():
    import sentencepiece
    for settings in (dict(model_type="bpe"), dict(model_type="unigram", normalization_rule_name="identity")):
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=out, vocab_size=370,
                                                 byte_fallback=True, minloglevel=3, **settings)
        tokenizer = tokenizer_from_blob(pinned("other.model", out.getvalue()), out.getvalue())
        with pytest.raises(UserError, match="other.model@.* cannot be written"):
            tokenizer_files(tokenizer, 64, "transformers")


def test_a_sentencepiece_model_goes_to_llama_cpp_too():
    blob = train_sentencepiece(420, LINES)
    files = tokenizer_files(tokenizer_from_blob(pinned("spm:420", blob), blob), 64, "gguf")
    assert files["tokenizer.model"] == blob
