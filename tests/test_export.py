"""export: tokenizers, architectures and weights out and in, against transformers; projections against other ways to the optimum."""
import json

import pytest
import torch

from config import UserError
from conftest import ROOT, assert_one_sentence, train_run
from model import load
from tokenizer import load_tokenizer, tokenizer_from_blob

CPU = torch.device("cpu")
TEXTS = ["def main():\n    return 1", "naïve Œuvre 中文 🙂 ﷺ", "  two  spaces\t\ttabs\r\n\n\n", "</s><|endoftext|><unk>", "a▁b ▁ ▁▁c", "", " ", "\x00\x7f\u200b", "I'll 123456 we're 'tis",
         "x" * 300]
CORPUS = [f"{a} {b} the quick brown fox's {i * 37 % 991} jumps, naïve — over\n\tthe lazy dog()" for i, (a, b) in
          enumerate(zip("alpha beta gamma delta".split() * 25, "one two three four five".split() * 20))]


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers that come in

def byte_level(folder, eos="<|endoftext|>", size=400):
    """A folder with the tokenizer.json of a BPE over bytes, as GPT-2's, SmolLM's or LLaMA 3's."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=[eos], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
                                             show_progress=False)
    bpe.train_from_iterator(CORPUS, trainer)
    return keep(bpe, folder, eos)


def byte_fallback(folder, eos="</s>", size=500):
    """The same with sentencepiece's spaces and bytes for what has no piece, as LLaMA 2's."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    D = tokenizers.decoders
    bpe.decoder = D.Sequence([D.Replace("▁", " "), D.ByteFallback(), D.Fuse(), D.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", eos]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False)
    bpe.train_from_iterator(CORPUS, trainer)
    data = json.loads(bpe.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] in special]  # bytes are ordinary pieces
    return keep(tokenizers.Tokenizer.from_str(json.dumps(data)), folder, eos)


def keep(bpe, folder, eos):
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": eos, "lstrip": False}}))
    return bpe


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_a_tokenizer_json_gives_its_ids_and_every_byte_back(make, tmp_path):
    bpe = make(tmp_path / "small")
    tokenizer = load_tokenizer(str(tmp_path / "small" / "tokenizer.json"))
    assert tokenizer.identity.startswith("hf:small@") and tokenizer.vocab_size == bpe.get_vocab_size()
    again = tokenizer_from_blob(tokenizer.identity, tokenizer.blob)
    bpe.encode_special_tokens = True
    start = " " if make is byte_fallback else ""  # LLaMA's puts a space before a text
    for text in (*TEXTS, *CORPUS):
        ids = tokenizer.encode(text)
        assert ids == bpe.encode(text, add_special_tokens=False).ids == again.encode(text) and tokenizer.eos not in ids
        if "▁" not in text or make is byte_level:  # sentencepiece's spaces are underlines
            assert tokenizer.decode_bytes(ids) == (start + text if text else "").encode()
    assert tokenizer.decode_bytes([tokenizer.eos]) == b"" and bpe.token_to_id({byte_level: "<|endoftext|>", byte_fallback: "</s>"}[make]) == tokenizer.eos


def test_the_end_of_a_document_is_named_by_one_of_the_folders_files(tmp_path):
    byte_level(tmp_path / "small")
    path = tmp_path / "small" / "tokenizer.json"
    expected = load_tokenizer(str(path))
    (path.parent / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="names its end-of-sequence token"):
        load_tokenizer(str(path))
    (path.parent / "config.json").write_text(json.dumps({"eos_token_id": [expected.eos, 3]}))
    assert load_tokenizer(str(path)).identity == expected.identity
    path.write_text("{}")
    with pytest.raises(UserError, match="are not a tokenizer"):
        load_tokenizer(str(path))


def test_a_text_is_prepared_trained_on_and_sampled_with_a_tokenizer_json(cli, tmp_path):
    byte_level(tmp_path / "small")
    (tmp_path / "text.txt").write_text("\n".join(CORPUS))
    argv = ["--dataset=text", f"--input={tmp_path}/text.txt", f"--tokenizer={tmp_path}/small/tokenizer.json", f"--data_dir={tmp_path}/data"]
    for _ in range(2):  # the second time it is there already
        assert cli("prepare.py", *argv, "--workers=1")[0] == 0
    out = train_run(tmp_path / "run", tmp_path / "data", "--max_tokens=128")
    identity = load(str(out), CPU)[2]["tokenizer"]["identity"]
    assert identity.startswith("hf:small@")
    status, text, _ = cli("sample.py", out, "--prompt=naïve 中 </s>", "--max_new_tokens=4")
    assert status == 0 and text.startswith("naïve 中 </s>")
