"""tokenizer.py: round trips, sentencepiece as trained here and as given, GPT-2's merges, identities."""
import hashlib
import io
import json
import random
import threading
from pathlib import Path

import pytest

from corpora import make, some_documents, write_corpus

import prepare
from config import UserError
from tokenizer import remote, train_sentencepiece


ODD = ["", " ", "  a  ", "\n\n \n", "\ta\t\tb", "\r\n", "a\x00b", "▁ a▁▁b", "▅x", "😀é\u0301",
       "<unk></s><s><0x0A><|endoftext|>",
       "\ufeffa\u200b\u2028", "\ufffd\uffff", "x" * 1000 + "▁" + "y " * 50, "中文 テキスト",
       "self.x  =  {1234567: 'a'}\n        return\n"]


@pytest.fixture(scope="module")
def source():
    """Some of the standard library's files."""
    return [path.read_text() for path in sorted(Path(json.__file__).parent.parent.glob("[a-d]*.py"))]


@pytest.fixture(scope="module")
def spm(source):
    blob = train_sentencepiece(2048, [text[i:i + 1000] for text in source for i in range(0, len(text), 1000)])
    return prepare.tokenizer_from_blob(prepare.pinned("spm:2048", blob), blob)


@pytest.mark.parametrize("text", ODD)
def test_every_text_round_trips(spm, text):
    for tokenizer in (spm, prepare.load_tokenizer("byte")):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eos not in ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()
        assert tokenizer.decode(ids + [tokenizer.eos]) == text


def test_spm_encodes_word_by_word_what_sentencepiece_encodes_whole(spm, source):
    import sentencepiece
    whole = sentencepiece.SentencePieceProcessor(model_proto=spm.blob)
    rng = random.Random(0)
    parts = ["a", " ", "  ", "\n", "\t", "the", "    ", "self", ":", "é", "1", "😀", "\x00", "\r\n", "x" * 40, "<0x0A>",
             "</s>"]
    for text in ["".join(rng.choices(parts, k=rng.randrange(40))) for _ in range(500)] + [t[:20_000] for t in source]:
        assert spm.encode(text) == whole.encode(text)


def test_spm_learns_line_ends_and_indentation(spm):
    assert {b"\n", b" " * 4, b" " * 8} <= set(spm.table)
    assert any(b"\n" in piece and len(piece) > 1 for piece in spm.table)


def test_blobs_rebuild_tokenizers(spm, tmp_path):
    tokenizer = spm
    again = prepare.tokenizer_from_blob(tokenizer.identity, tokenizer.blob)
    assert (again.encode(ODD[-1]), again.eos, again.table) == (tokenizer.encode(ODD[-1]), tokenizer.eos,
                                                               tokenizer.table)
    with pytest.raises(UserError, match="damaged"):
        prepare.tokenizer_from_blob(tokenizer.identity, tokenizer.blob[:-1] + b"?")
    (tmp_path / "my.model").write_bytes(tokenizer.blob)
    by_path = prepare.load_tokenizer(str(tmp_path / "my.model"))
    assert by_path.identity == "my.model@" + hashlib.sha256(tokenizer.blob).hexdigest()[:12]
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="bad.model is not a sentencepiece model"):
        prepare.load_tokenizer(str(tmp_path / "bad.model"))


def test_gpt2_from_ranks_merges_by_rank():
    table = [bytes([i]) for i in range(256)] + [b"th", b" t", b"the", b" the"]
    tokenizer = prepare.tokenizer_from_blob("gpt2", "\n".join(t.hex() for t in table).encode())
    assert (tokenizer.vocab_size, tokenizer.eos) == (261, 260)
    # th before " t"; a word is taken with its space
    assert tokenizer.encode("the then tho") == [258, 259, 110, 32, 256, 111]
    assert tokenizer.encode("<|endoftext|>") == list(b"<|endoftext|>")
    for text in ODD:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_foreign_sentencepiece_model_is_taken_as_it_is():
    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(some_documents()), model_writer=model,
                                             vocab_size=600, model_type="bpe", byte_fallback=True,
                                             minloglevel=3)  # a dummy prefix and a BOS, as LLaMA's has
    tokenizer = prepare.tokenizer_from_blob("llama", model.getvalue())
    whole = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert tokenizer.encode("bad <s> mood") == whole.encode("bad <s> mood") and tokenizer.eos == whole.eos_id()
    assert tokenizer.decode(tokenizer.encode("bad\nmood 中")) == " " + whole.decode(whole.encode("bad\nmood 中"))


def test_an_at_sign_in_a_model_files_name(tmp_path):
    blob = train_sentencepiece(300, some_documents())
    (tmp_path / "my@v2@.model").write_bytes(blob)
    _, _, tokenizer = make(tmp_path, input=str(write_corpus(tmp_path / "a.txt", some_documents())),
                           tokenizer=str(tmp_path / "my@v2@.model"))
    assert tokenizer.identity == "my@v2@.model@" + hashlib.sha256(blob).hexdigest()[:12] and tokenizer.blob == blob
    with pytest.raises(UserError, match="my@v2@.model@.* is damaged"):
        prepare.tokenizer_from_blob(tokenizer.identity, blob + b"x")


def test_the_mark_of_unknown_characters_drops_no_text_from_training():
    plain = train_sentencepiece(320, [f"load {words} high" for words in some_documents(50)])
    marked = train_sentencepiece(320, [f"▅load {words} high▅" for words in some_documents(50)])
    assert marked == plain
    tokenizer = prepare.tokenizer_from_blob(prepare.pinned("spm:320", marked), marked)
    text = "load ▁▂▃▄▅▆▇█▅▅ 7\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(UserError, match="there is no text to train the tokenizer spm:320 on"):
        train_sentencepiece(320, ["▅▅\n▅"] * 100)


@pytest.mark.parametrize("message, why", [("Internal: a.cc(429) [!sentences_.empty()] ",
                                           r"RuntimeError: Internal: a.cc\(429\)"),
                                          ("Internal: a.cc(1) [x] Too high. ", "Too high"), ("", "RuntimeError")])
def test_the_reason_of_a_failed_training_is_never_empty(monkeypatch, message, why):
    import sentencepiece

    def fail(**_):
        raise RuntimeError(message)
    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", fail)
    with pytest.raises(UserError, match=rf"cannot train 300 pieces on this corpus \({why}"):
        train_sentencepiece(300, ["text"])


def test_gpt2_splits_contractions_as_its_release_does():
    pieces = [b"'s", b"'t", b"'re", b"'ve", b"'m", b"'ll", b"'d", b"re", b"ve", b"ll", b"it", b"red", b"S'", b"'S",
              b"t's", b"e's"]
    table = [bytes([i]) for i in range(256)] + pieces
    tokenizer = prepare.tokenizer_from_blob("gpt2", "\n".join(t.hex() for t in table).encode())
    split = lambda text: [tokenizer.decode([i]) for i in tokenizer.encode(text)]
    assert split("it's") == ["it", "'s"] and split("n't") == ["n", "'t"] and split("I'm") == ["I", "'m"]
    assert split("we'red") == ["w", "e", "'re", "d"]  # the contraction ends a word: red is not found
    assert split("u've") == ["u", "'ve"] and split("u'll") == ["u", "'ll"] and split("u'd") == ["u", "'d"]
    assert split("it'S") == ["it", "'", "S"]          # capitals are no contractions
    assert split("it’s") == ["it", "\ufffd", "\ufffd", "\ufffd", "s"]


def test_a_given_model_without_bytes_knows_its_unknown_id():
    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a b c d e"] * 50), model_writer=model,
                                             vocab_size=12,
                                             model_type="bpe", minloglevel=3)
    tokenizer = prepare.tokenizer_from_blob("my.model@" + hashlib.sha256(model.getvalue()).hexdigest()[:12],
                                            model.getvalue())
    assert tokenizer.unknown == 0 and tokenizer.encode("a 漢").count(0) == 1 and tokenizer.decode([0]) == "\ufffd"
    assert prepare.load_tokenizer("byte").unknown == -1


def test_no_answer_is_an_error_after_some_seconds():
    asked = threading.Event()
    with pytest.raises(UserError, match=r"GPT-2 cannot be downloaded \(no answer in 0.1 s\); without network use bytes"):
        remote(lambda: asked.wait(30), "GPT-2", "bytes", seconds=0.1)
    asked.set()
    assert remote(lambda: 7, "GPT-2", "bytes") == 7
