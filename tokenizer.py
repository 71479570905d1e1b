"""Tokenizers: a function text -> ids, and the bytes of every id.

GPT-2's and LLaMA's vocabularies are downloaded once. Sentencepiece models are read from a file or trained on the
corpus, a tokenizer.json is read from a Hugging Face folder. Data folders and models keep a tokenizer's identity
and blob, which rebuild it without network.
"""
import functools
import hashlib
import importlib
import io
import itertools
import json
import os
import re
import threading

from config import UserError, reading, reason


class Tokenizer:
    """identity pins the exact vocabulary, blob rebuilds it (tokenizer_from_blob), eos ends every document.

    encode(str) -> ids without EOS; text that looks like a special token is ordinary text. decode_bytes(ids) is the
    exact concatenation of the ids' bytes, which may end inside a UTF-8 sequence. decode(ids) is the same as str. EOS is
    empty. unknown is the id that stands for characters outside the vocabulary, -1 where every character has ids.
    """

    def __init__(self, identity, blob, encode, table, eos, piece=1 << 16, unknown=-1):
        self.identity, self.blob, self.encode, self.table, self.eos = identity, blob, encode, table, eos
        self.unknown, self.vocab_size = unknown, len(table)
        self.piece = piece  # bytes of text per call of encode: BPE takes 100 bytes of memory a byte and slows down

    def decode_bytes(self, ids) -> bytes:
        return b"".join(self.table[i] for i in ids)

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def load_tokenizer(name) -> Tokenizer:
    """gpt2 | llama | byte | a sentencepiece .model | a tokenizer.json. Raises UserError."""
    if name == "byte":
        return tokenizer_from_blob("byte", b"")
    if name == "gpt2":
        instead = "--tokenizer=spm:16384, trained on the corpus"
        tiktoken = package("tiktoken", "tokenizer=gpt2", instead)
        gpt2 = remote(lambda: tiktoken.get_encoding("gpt2"), "GPT-2's vocabulary", instead)
        tokens = (gpt2.decode_single_token_bytes(i) for i in range(gpt2.eot_token))
        return tokenizer_from_blob("gpt2", "\n".join(map(bytes.hex, tokens)).encode())
    path = _llama_model() if name == "llama" else name
    with reading(f"the tokenizer {path}", "give the path of a .model or a tokenizer.json"), open(path, "rb") as f:
        blob = f.read()
    blob = with_eos(blob, path) if path.endswith(".json") else blob
    return tokenizer_from_blob(pinned(name, blob), blob)


def label(name):
    """The identity without its hash of the tokenizer that a setting names; a tokenizer.json goes by its folder."""
    if not name.endswith(".json"):
        return os.path.basename(name)
    folder, file = os.path.split(os.path.abspath(name))
    return f"hf:{os.path.basename(folder) if file == 'tokenizer.json' else file.removesuffix('.json')}"


def pinned(name, blob):
    """The identity of a tokenizer that was trained or read from a file: its name and its hash."""
    return f"{label(name)}@{short_hash(blob)}"


def name_of(identity):
    """The name in an identity; a file's name may hold @ itself."""
    return identity.rpartition("@")[0] or identity


def nominal_vocabulary(tokenizer) -> int:
    """The vocabulary that a tokenizer's name promises."""
    known = {"byte": 257, "gpt2": 50257, "llama": 32000}
    size = known.get(tokenizer) or tokenizer.removeprefix("spm:")
    if not str(size).isdigit():
        raise UserError(f"the vocabulary of tokenizer={tokenizer} is not known without its file: "
                        "give --vocab_size for a dry run.")
    return int(size)


def tokenizer_from_blob(identity, blob) -> Tokenizer:
    """Rebuilds a tokenizer from what a data folder or a model.pt keeps of it, without network. Raises UserError."""
    name = name_of(identity)
    if name != identity and identity != pinned(name, blob):
        raise UserError(f"the vocabulary stored for {identity} is damaged: it hashes to {short_hash(blob)}; "
                        "prepare the data again.")
    if name == "byte":
        return Tokenizer("byte", b"", lambda text: list(text.encode()), [bytes([i]) for i in range(256)] + [b""], 256)
    try:
        if name.startswith("hf:"):
            return _huggingface(identity, blob)
        return _gpt2(blob) if name == "gpt2" else _sentencepiece(identity, blob)
    except UserError:
        raise
    except Exception as e:  # the parts may be anything, and the libraries raise what they like
        raise UserError(f"the vocabulary of {name} is damaged ({reason(e)}): give another tokenizer.") from e


def saved_tokenizer(entry, vocab_size) -> Tokenizer:
    """The tokenizer in a model.pt: entry {identity, blob}, the blob a uint8 tensor; vocab_size: the model's."""
    tokenizer = tokenizer_from_blob(entry["identity"], entry["blob"].numpy().tobytes())
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"the model's tokenizer {tokenizer.identity} has {tokenizer.vocab_size} tokens, the model has "
                        f"embeddings for {vocab_size}: its file is damaged or put together wrongly.")
    return tokenizer


def short_hash(data):
    return hashlib.sha256(data).hexdigest()[:12]


GPT2_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # of the GPT-2 release


def _gpt2(blob):
    """blob: one token a line, in hex, in the order of rank."""
    tiktoken = package("tiktoken", "tokenizer=gpt2")
    table = [bytes.fromhex(line) for line in blob.decode().split()]
    ranks = {t: i for i, t in enumerate(table)}
    if len(ranks) < len(table) or not {bytes([byte]) for byte in range(256)} <= ranks.keys():
        raise ValueError("it lacks a byte, or has a token twice")
    encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens={})
    return Tokenizer("gpt2", blob, encoding.encode_ordinary, table + [b""], len(table))


def _sentencepiece(identity, blob):
    """A model trained here adds nothing and gives every byte back. A given model is taken as it is.

    LLaMA's puts a space before every text, which decode shows; in token files before every 256 kB of a longer document.
    """
    sp = package("sentencepiece", f"tokenizer={identity}").SentencePieceProcessor()
    try:
        sp.LoadFromSerializedProto(blob)
    except RuntimeError:
        raise UserError(f"{name_of(identity)} is not a sentencepiece model: give a .model of sentencepiece.") from None
    if sp.eos_id() < 0:
        raise UserError(f"{name_of(identity)} has no end-of-sequence piece, which ends a document: train it with one.")
    table = []
    for i in range(sp.get_piece_size()):
        text = "" if sp.is_control(i) else "\ufffd" if sp.is_unknown(i) else sp.id_to_piece(i)  # a byte reads <0x0A>
        table.append(bytes.fromhex(text[3:5]) if sp.is_byte(i) else text.replace("▁", " ").encode())
    if not re.fullmatch(r"spm:\d+", name_of(identity)):
        has_bytes = any(map(sp.is_byte, range(sp.get_piece_size())))
        return Tokenizer(identity, blob, sp.encode, table, sp.eos_id(), 1 << 18, -1 if has_bytes else sp.unk_id())
    underline = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]

    def encode_word(word):  # sentencepiece writes a space as ▁, so a ▁ of the text is encoded as bytes
        first, *rest = word.split("▁")
        return sp.encode(first) + [i for part in rest for i in underline + sp.encode(part)]

    remembered = functools.lru_cache(1 << 15)(encode_word)

    def encode(text):  # no piece has a space after another character, so words are independent; most were seen before
        words = re.findall(" *[^ ]+| +", text)
        return list(itertools.chain.from_iterable(remembered(w) if len(w) <= 32 else encode_word(w) for w in words))

    return Tokenizer(identity, blob, encode, table, sp.eos_id())


def with_eos(blob, path):
    """The blob of a tokenizer.json: itself and one more key, the end-of-sequence token, which files beside it name."""
    files, named = {"tokenizer_config": "eos_token", "config": "eos_token_id", "generation_config": "eos_token_id"}, []
    try:
        data = json.loads(blob)
        for file, key in files.items():
            beside = os.path.join(os.path.dirname(path), f"{file}.json")
            if os.path.exists(beside):
                with open(beside, encoding="utf-8") as f:
                    named.append(json.load(f).get(key))
        special = {t["id"]: t["content"] for t in data["added_tokens"]}
        tokens = {i: t for t, i in data["model"]["vocab"].items()} | special
        for name in named:
            name = name[0] if isinstance(name, list) else name["content"] if isinstance(name, dict) else name
            if name in tokens.values() or name in tokens:
                return json.dumps({**data, "eos_token": tokens.get(name, name)}, ensure_ascii=False).encode()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} and the files beside it are not Hugging Face's tokenizer ({reason(e)}).") from None
    raise UserError(f"no file beside {path} names its end-of-sequence token: give tokenizer_config.json an eos_token.")


def byte_characters() -> list:
    """The characters that stand for bytes 0..255 in byte-level vocabularies: printable ones stay, others follow 255."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = itertools.count(256)
    return [chr(byte if byte in printable else next(rest)) for byte in range(256)]


def _huggingface(identity, blob):
    """A tokenizer.json: a BPE over bytes (GPT-2, LLaMA 3) or over pieces with bytes as fallback (LLaMA 2)."""
    library = package("tokenizers", f"tokenizer={identity}")
    data = json.loads(blob)
    eos, decoder = data.pop("eos_token"), json.dumps(data.get("decoder"))
    if data["model"].setdefault("type", "BPE") != "BPE" or not ("ByteLevel" in decoder or "ByteFallback" in decoder):
        raise UserError(f"{name_of(identity)} is {data['model']['type']} without bytes for every text: give a BPE over "
                        "bytes or with byte fallback.")
    inner = library.Tokenizer.from_str(json.dumps(data))
    inner.encode_special_tokens = True  # they are ordinary text
    inner.no_truncation(), inner.no_padding()
    special = {t["content"] for t in data["added_tokens"] if t["special"]} | {eos}
    added, unknown = {t["content"] for t in data["added_tokens"]}, data["model"].get("unk_token")
    of_character = {c: bytes([byte]) for byte, c in enumerate(byte_characters())}

    def bytes_of(token):
        if token in special:
            return "\ufffd".encode() if token == unknown != eos else b""
        if token in added:
            return token.encode()
        if "ByteLevel" in decoder:
            return b"".join(of_character.get(c, c.encode()) for c in token)
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()

    vocabulary = inner.get_vocab()
    if max(vocabulary.values()) > 2 * len(vocabulary) + 1000:
        raise ValueError("its ids are far larger than their number")
    table = [b""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        table[i] = bytes_of(token)

    def encode(text):
        return inner.encode(text, add_special_tokens=False).ids

    piece = 1 << 16 if "ByteLevel" in decoder else 1 << 18
    return Tokenizer(identity, blob, encode, table, vocabulary[eos], piece)


def train_sentencepiece(vocab_size, sample):
    """The blob of spm:VOCAB, trained on a list of str: BPE with byte fallback, without normalisation.

    Every space and line end is in some piece. The trainer skips a text that holds ▅, its mark for unknown characters,
    so texts are split there; ▅ itself is encoded as bytes.
    """
    sample = [part for text in sample for part in text.split("▅")]
    if not any(map(str.strip, sample)):
        raise UserError(f"there is no text to train the tokenizer spm:{vocab_size} on: give files that hold some.")
    trainer = package("sentencepiece", f"tokenizer=spm:{vocab_size}").SentencePieceTrainer
    model = io.BytesIO()
    try:
        trainer.train(
            sentence_iterator=iter(sample), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True,
            unk_id=0, eos_id=1, bos_id=-1, pad_id=-1, minloglevel=3)
    except RuntimeError as e:
        why = str(e).rpartition("] ")[2].strip(" .") or reason(e)
        raise UserError(f"sentencepiece cannot train {vocab_size} pieces on this corpus ({why}): "
                        "give another --tokenizer=spm:VOCAB, or --tokenizer=byte.") from None
    return model.getvalue()


def _llama_model():
    """The path of LLaMA's 32 000 pieces: the hub client's cached copy, or a download from a public repository."""
    instead = "--tokenizer=spm:32000, trained on the corpus, or the path of its tokenizer.model"
    hub = package("huggingface_hub", "tokenizer=llama", instead)
    file = ("hf-internal-testing/llama-tokenizer", "tokenizer.model")

    def download():
        hub.get_hf_file_metadata(hub.hf_hub_url(*file), timeout=10)  # without retries, so that it fails at once
        return hub.hf_hub_download(*file)

    cached = hub.try_to_load_from_cache(*file)
    return cached if isinstance(cached, str) else remote(download, "LLaMA's vocabulary", instead)


def package(name, user, instead=""):
    """The module `name`; where it is not installed UserError names it, and what works instead."""
    try:
        return importlib.import_module(name)
    except ImportError:
        name, instead = name.partition(".")[0], instead and f", or use {instead}"
        raise UserError(f"{user} needs the package {name}: pip install {name}{instead}.") from None


def remote(call, what, instead, seconds=40):
    """call(), which uses the network; after a failure or a timeout UserError names what works instead."""
    results = []

    def work():
        try:
            results.append((call(), None))
        except Exception as e:  # whatever a client raises goes into the error
            results.append((None, reason(e)))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    result, error = results[0] if results else (None, f"no answer in {seconds} s")
    if error:
        raise UserError(f"{what} cannot be downloaded ({error}); without network use {instead}.")
    return result
