"""tokenizer.json: a Tokenizer of tokenizer.py as the files that Hugging Face's readers want.

Byte-level vocabularies, spm:VOCAB and LLaMA's kind of sentencepiece model become a BPE with the same ids.
"""
import json

from config import UserError
from tokenizer import byte_characters, name_of, package

EOS = "<|endoftext|>"


def kind_of(identity) -> str:
    """byte | gpt2 | spm | model | hf"""
    name = name_of(identity)
    return name if name in ("byte", "gpt2") else name.partition(":")[0] if name.startswith(("spm:", "hf:")) else "model"


def last_merge(token, ranks):
    """The two parts that byte-pair merges of lower rank make of a token (bytes); None where they leave more."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank >= ranks[token]:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def bytes_json(table, regex) -> dict:
    """tokenizer.json of a vocabulary over bytes; table: the bytes of every id, the last one ends documents."""
    characters, ranks = byte_characters(), {token: i for i, token in enumerate(table[:-1])}

    def spelled(token):
        return "".join(characters[byte] for byte in token)

    merges = [parts for token in ranks if len(token) > 1 and (parts := last_merge(token, ranks))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}
    model = {"vocab": {spelled(token): i for token, i in ranks.items()} | {EOS: len(table) - 1},
             "merges": [[spelled(a), spelled(b)] for a, b in merges]}
    return {"pre_tokenizer": level, "decoder": level, "model": model}


def pieces_json(blob, spaces) -> dict:
    """tokenizer.json of a sentencepiece BPE. spaces: its ▁ are spaces and none is put before a text, as in spm:VOCAB.

    A merge makes a piece of two others; the piece's score is its rank.
    """
    sp = package("sentencepiece", "the tokenizer").SentencePieceProcessor()
    sp.LoadFromSerializedProto(blob)
    names = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    tests = (sp.is_control, sp.is_unknown, sp.is_byte, sp.is_unused)
    ids = {piece: i for i, piece in enumerate(names) if not any(test(i) for test in tests)}
    pairs = [(piece[:n], piece[n:]) for piece in ids for n in range(1, len(piece))]
    pairs = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
    pairs.sort(key=lambda pair: (-sp.get_score(ids[pair[0] + pair[1]]), ids[pair[0]], ids[pair[1]]))

    def spelled(piece):
        return piece.replace("▁", " ") if spaces else piece

    model = {"vocab": {spelled(piece): i for i, piece in enumerate(names)}, "unk_token": names[sp.unk_id()],
             "merges": [list(map(spelled, pair)) for pair in pairs], "fuse_unk": True, "byte_fallback": True}
    bytes_back = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if spaces:
        words = {"type": "Split", "pattern": {"Regex": " *[^ ]+| +"}, "behavior": "Isolated", "invert": False}
        return {"pre_tokenizer": words, "decoder": {"type": "Sequence", "decoders": bytes_back}, "model": model}
    to_line, to_space = ({"type": "Replace", "pattern": {"String": a}, "content": b} for a, b in (" ▁", "▁ "))
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, to_line]},
            "decoder": {"type": "Sequence", "decoders": [to_space, *bytes_back, strip]}, "model": model}


def whole_json(data, eos) -> dict:
    """A complete tokenizer.json: eos (an id) and the unknown token are special, what `data` leaves out is off."""
    vocabulary, unknown = data["model"]["vocab"], data["model"].get("unk_token")
    special = sorted({token for token, i in vocabulary.items() if i == eos or token == unknown}, key=vocabulary.get)
    added = [{"id": vocabulary[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for token in special]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             **data["model"]}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": None, "post_processor": None, "decoder": None, **data, "model": model}


PROBES = ("", " ", "a", "def f(x):\n\treturn  x ** 2 ", "  two  spaces\r\n\n", "naïve Œuvre ﬁ ① Ａ 中文 🙂 e\u0301",
          "I'll 123456 we're", "\x00\x7f\u200b\u3000 ", "<s></s><unk>" + EOS)


def tokenizer_files(tokenizer, block_size, target) -> dict:
    """{file name: bytes} of a Tokenizer; UserError if Hugging Face's gives PROBES other ids."""
    kind = kind_of(tokenizer.identity)
    if kind == "hf":
        data = json.loads(tokenizer.blob)
        eos = data.pop("eos_token")
    else:
        data = (bytes_json(tokenizer.table, kind == "gpt2") if kind in ("byte", "gpt2") else
                pieces_json(tokenizer.blob, kind == "spm"))
        data = whole_json(data, tokenizer.eos)
        eos = next(token for token, i in data["model"]["vocab"].items() if i == tokenizer.eos)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast",  # version 5 builds any other class anew, with other ids
                "split_special_tokens": kind != "hf",          # text of ours never ends a document
                "model_input_names": ["input_ids", "attention_mask"], "model_max_length": block_size,
                "clean_up_tokenization_spaces": False, "add_bos_token": False, "add_eos_token": False,
                "add_prefix_space": False, "bos_token": eos, "eos_token": eos}
    if data["model"].get("unk_token"):
        settings["unk_token"] = data["model"]["unk_token"]
    files = {"tokenizer.json": json.dumps(data, ensure_ascii=False).encode(),
             "tokenizer_config.json": json.dumps(settings, indent=2).encode()}
    theirs = package("tokenizers", "export.py").Tokenizer.from_str(files["tokenizer.json"].decode())
    theirs.encode_special_tokens = True
    for text in PROBES:
        if theirs.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            raise UserError(f"the tokenizer {tokenizer.identity} cannot be written for Hugging Face: it normalises "
                            f"text or is not a BPE with byte fallback, so that {text!r:.40} would become other ids.")
    return files | ({"tokenizer.model": tokenizer.blob} if target == "gguf" and kind in ("spm", "model") else {})
