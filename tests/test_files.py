"""Files of strangers: each kind is refused in one sentence, before it costs memory or time; fuzz.py does more."""
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch

import config
import corpus
import export
import merge
import prepare
import checkpoint
import run
import tokenizer
import train
from config import UserError
from conftest import ROOT, TINY, assert_one_sentence, train_run
from model import load
from runs import CPU, GUIDED, stopped


def test_a_short_fuzz_finds_no_fault():
    """Three files for each reader, in a process of its own, which forks."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "fuzz.py", "--files=72", "--seed=9"], capture_output=True,
                          text=True)
    total = re.search(r"^all +(\d+) +(\d+) +(\d+) ", done.stdout, re.M)
    assert done.returncode == 0 and total, done.stdout + done.stderr
    refused, read, faults = map(int, total.groups())
    assert refused + read == 72 and refused > 36 and not faults


# ----------------------------------------------------------------------------------------------------------------------
# Sentences

def test_a_sentence_is_printable_and_has_400_characters_at_most():
    assert str(UserError("short\n\x1b[31m é")) == "short??[31m é"
    assert str(UserError("a " + "x" * 500 + " end.")) == f"a {'x' * 60}... end."
    many = str(UserError("begins " + "word " * 200 + "and says what to do."))
    assert len(many) < 400 and many.startswith("begins") and many.endswith("and says what to do.")


def test_endless_values_are_shown_in_short():
    laughs = [1]
    for _ in range(22):
        laughs = [laughs, laughs]
    assert len(config.shown(laughs)) < 1000 and config.shown("a") == "'a'"
    assert config.shown(16 ** 9000) == "a number of thousands of digits"
    with pytest.raises(UserError, match="^n_layer=.* does not fit: expected a whole number.$"):
        config.from_dict({"n_layer": laughs})


# ----------------------------------------------------------------------------------------------------------------------
# Settings

@pytest.mark.parametrize("line", ["-" * 5000 + "1", "(" * 5000, "+".join("1" * 20000), "0x" + "f" * 9000, "{[]: 1}",
                                  "3  # " + "x" * 70_000])
def test_deep_and_large_presets(line, tmp_path):
    (tmp_path / "p.py").write_text(f"n_layer = {line}\n")
    with pytest.raises(UserError, match="p.py|n_layer=a number of thousands of digits"):
        config.read_preset(str(tmp_path / "p.py"))


@pytest.mark.parametrize("name, value", [("n_layer", 1001), ("n_embd", 1 << 25), ("vocab_size", 1 << 25),
                                         ("block_size", 10**12), ("batch_size", 10**12), ("rank", 10**9)])
def test_sizes_beyond_any_model(name, value):
    with pytest.raises(UserError, match=f"{name}={value} must be at most"):
        config.load([f"--{name}={value}"])


def test_a_setting_that_no_literal_can_be(without_torch):
    status, out, err = without_torch("train.py", "--n_layer={[]:1}")
    assert_one_sentence(status, out, err)
    assert "n_layer={[]:1} does not fit" in err


def test_json_of_settings_is_bounded(tmp_path):
    (tmp_path / "config.json").write_text("[" + "{}," * 400_000 + "{}]")
    with pytest.raises(UserError, match="longer than 1048576 bytes"):
        config.read_json(str(tmp_path / "config.json"))


# ----------------------------------------------------------------------------------------------------------------------
# model.pt

@pytest.fixture
def model_file(finished, tmp_path):
    """model_file(change, **parts) writes a model.pt that change(its entries) has altered -> its path."""
    def write(change=lambda saved: None):
        saved = torch.load(finished / "model.pt", weights_only=True)
        change(saved)
        torch.save(saved, tmp_path / "model.pt")
        return str(tmp_path / "model.pt")
    return write


def weight(name, make):
    return lambda saved: saved["model"].update({name: make(saved["model"][name])})


def expand(t):
    return torch.zeros(1, dtype=t.dtype).expand(1 << 32)


MODELS = {
    "layers": (lambda s: s["config"].update(n_layer=10**9), "n_layer=1000000000 must be at most"),
    "vocabulary": (lambda s: s["config"].update(vocab_size=1 << 24), "the shape of head.weight is .*expected .1677721"),
    "positions": (lambda s: s["config"].update(block_size=1 << 24), "block_size=16777216, whose rotary positions"),
    "stride": (lambda s: s["tokenizer"].update(blob=expand(s["tokenizer"]["blob"])), "tensors are larger than"),
    "one memory": (lambda s: s["model"].update({f"x{n}": s["model"]["wte.weight"] for n in range(99)}), "larger than"),
    "NaN": (weight("norm.weight", lambda t: t * torch.nan), "not finite, norm.weight"),
    "inf": (weight("blocks.1.ffn.fc1.V", lambda t: t - torch.inf), "not finite, blocks.1.ffn.fc1.V"),
    "whole numbers": (weight("norm.bias", lambda t: t.long()), "norm.bias is torch.int64"),
    "float8": (weight("wte.weight", lambda t: t.to(torch.float8_e4m3fn)), "wte.weight is torch.float8"),
    "sparse": (weight("norm.bias", lambda t: t.to_sparse()), "'norm.bias' is not the name of a plain tensor"),
    "meta": (weight("norm.bias", lambda t: t.to("meta")), "plain tensor"),
    "gradient": (weight("norm.bias", lambda t: t.clone().requires_grad_()), "plain tensor"),
    "number": (weight("norm.bias", lambda t: 3), "plain tensor"),
    "name": (lambda s: s["model"].update({7: s["model"].pop("norm.bias")}), "7 is not the name of a plain tensor"),
    "blob": (lambda s: s["tokenizer"].update(blob=torch.zeros(9, dtype=torch.bfloat16)), "lacks identity or blob"),
    "negated": (weight("norm.bias", torch._neg_view), "plain tensor"),
    "identity": (lambda s: s["tokenizer"].update(identity=None), "lacks identity or blob"),
    "val_loss": (lambda s: s.update(val_loss="3"), "step or val_loss"),
    "step": (lambda s: s.update(step=-1), "step or val_loss"),
    "teacher": (lambda s: s.update(teacher=torch.zeros(2)), "teacher, step or val_loss"),
    "true": (lambda s: s.update(step=True), "lacks step")}


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_strangers(kind, model_file):
    change, words = MODELS[kind]
    path = model_file(change)
    with pytest.raises(UserError, match=words) as e:
        load(path, CPU)
    assert path in str(e.value)


def test_models_in_other_precisions_and_strides_are_read(model_file):
    def change(saved):
        saved["model"]["norm.weight"] = torch.ones(1).expand(32)
        saved["model"]["norm.bias"] = saved["model"]["norm.bias"].bfloat16()

    model, _, _ = load(model_file(change), CPU)
    assert model.norm.weight.tolist() == [1.0] * 32 and model.norm.bias.dtype is torch.float32


def test_a_tokenizer_larger_than_the_model(finished):
    saved = torch.load(finished / "model.pt", weights_only=True)
    assert tokenizer.saved_tokenizer(saved["tokenizer"], 257).vocab_size == 257
    with pytest.raises(UserError, match="byte has 257 tokens, the model has embeddings for 256"):
        tokenizer.saved_tokenizer(saved["tokenizer"], 256)


def archive(source, target, compression=zipfile.ZIP_STORED, **more):
    """A copy of a checkpoint's archive; compressed, or with other parts."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for part in old.infolist():
            new.writestr(part.filename, more.get(part.filename.partition("/")[2], old.read(part)), compression)


def test_archives_that_torch_would_trust(finished, tmp_path):
    source, path = finished / "model.pt", tmp_path / "model.pt"
    shutil.copy(finished / "config.json", tmp_path)
    archive(source, path)
    load(str(path), CPU)                                      # the same parts, by another writer
    for how, words in ((dict(compression=zipfile.ZIP_DEFLATED), "its parts are compressed"),
                       ({"data.pkl": bytes(3 << 20)}, "table of contents is too large"),
                       ({"data/5": b"xyz"}, "its tensors are larger than the file"),
                       ({"data.pkl": b"cos\nsystem\n(S'touch canary'\ntR."}, "UnpicklingError")):
        archive(source, path, **how)
        with pytest.raises(UserError, match=words):
            load(str(path), CPU)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.pt"] and not os.path.exists("canary")


def test_parts_that_claim_more_than_the_file_holds(finished, tmp_path):
    path = tmp_path / "model.pt"
    data = bytearray((finished / "model.pt").read_bytes())
    at = data.index(b"PK\x01\x02")                            # of the archive's list: sizes are 20 bytes further
    data[at + 20:at + 28] = (1 << 30).to_bytes(4, "little") * 2
    path.write_bytes(data)
    with pytest.raises(UserError, match="its parts are larger than the file"):
        checkpoint.read_checkpoint(str(path), "model.pt")


# ----------------------------------------------------------------------------------------------------------------------
# ckpt.pt

@pytest.fixture(scope="module")
def interrupted(data, tmp_path_factory):
    """The folders of a run with guides, by AdamW, and of one by Muon, both after 3 of 12 steps."""
    folder = tmp_path_factory.mktemp("interrupted")
    muon = ["--optimizer=muon", "--lr=0.01", "--weight_decay=auto"]
    with pytest.MonkeyPatch.context() as patch:
        for name, argv in (("adamw", []), ("muon", muon)):
            with pytest.raises(SystemExit):
                stopped(folder / name, data, 3, patch, *GUIDED, *argv)
    return folder


def state(name, **changes):
    def change(saved):
        tensors = saved["optimizer"][name]
        tensors.update({k: make(tensors[k]) for k, make in changes.items()})
    return change


P, MATRIX = "blocks.1.norm1.bias", "blocks.1.ffn.fc1.V"
CHECKPOINTS = {
    "shape": (state(P, exp_avg=lambda t: t[:1].clone()), f"exp_avg of {P}"),
    "dtype": (state(P, exp_avg=lambda t: t.double()), f"exp_avg of {P}"),
    "inf": (state(P, exp_avg=lambda t: t + torch.inf), f"exp_avg of {P}"),
    "NaN": (state(P, exp_avg_sq=lambda t: t * torch.nan), f"exp_avg_sq of {P}"),
    "negative": (state(P, exp_avg_sq=lambda t: -t - 1), f"exp_avg_sq of {P}"),
    "early step": (state(P, step=lambda t: t * 0 - 1), f"step of {P}"),
    "late step": (state(P, step=lambda t: t + 1), f"step of {P} is not what the optimizer keeps after step 3"),
    "no state": (lambda s: s["optimizer"].pop(P), f"state of {P} is not exp_avg, exp_avg_sq, step"),
    "part of a state": (lambda s: s["optimizer"][P].pop("exp_avg"), f"state of {P} is not"),
    "number": (state(P, step=lambda t: 3), "plain tensor"),
    "no dict": (lambda s: s["optimizer"].update({P: 3}), "does not hold a few tensors"),
    "steps": (lambda s: s.update(step=10**9), "is of another run: step 1000000000 of 12"),
    "seed": (lambda s: s["config"].update(seed=7), "is of another run: it has seed=7"),
    "tokenizer": (lambda s: s["tokenizer"].update(identity="gpt2"), "another run: .*tokenizer gpt2, here byte"),
    "config": (lambda s: s.pop("config"), "lacks config"),
    "weights": (lambda s: s["model"].update({P: s["model"][P][:1]}), rf"shape of {P} is \(1,\), expected \(32,\)"),
    "momentum": (state(MATRIX, momentum=lambda t: t[..., :1].clone()), f"momentum of {MATRIX}")}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_that_do_not_belong_to_the_run(kind, interrupted, data, tmp_path):
    change, words = CHECKPOINTS[kind]
    optimizer = "muon" if kind == "momentum" else "adamw"
    folder = shutil.copytree(interrupted / optimizer, tmp_path / "run")
    saved = torch.load(folder / "ckpt.pt", weights_only=True)
    change(saved)
    torch.save(saved, folder / "ckpt.pt")
    before = {p: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}
    argv = [*TINY, *GUIDED, *(["--optimizer=muon", "--lr=0.01", "--weight_decay=auto"] if optimizer == "muon" else [])]
    settings = config.load([*argv, f"--out_dir={folder}", f"--data_dir={data}", "--resume=auto"], train.Settings)
    with pytest.raises(UserError, match=words):
        train.main(*settings)
    assert {p: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"} == before


# ----------------------------------------------------------------------------------------------------------------------
# Token files

def header(path, **changes):
    """Changes fields of a token file's header, with the checksum that belongs to them."""
    data = path.read_bytes()
    fields = json.loads(data[21:4096]) | changes
    body = json.dumps({k: v for k, v in fields.items() if v is not ...}).encode().ljust(4096 - 21)
    path.write_bytes(b"tokenfile 1 %08x " % zlib.crc32(body) + body + data[4096:])


@pytest.mark.parametrize("changes", [{"count": "4001"}, {"count": True}, {"count": ...}, {"dtype": "float64"},
                                     {"dtype": ["uint16"]}, {"vocab_size": 0}, {"vocab_size": 1 << 40}, {"more": 1},
                                     {"checksum": None}, {"source": 7}])
def test_headers_with_wrong_fields_and_a_right_checksum(changes, data, tmp_path):
    shutil.copy(data / "train.bin", tmp_path)
    header(tmp_path / "train.bin", **changes)
    with pytest.raises(UserError, match="train.bin has a header whose fields"):
        prepare.TokenFile(str(tmp_path / "train.bin"))


def test_headers_that_are_no_json(tmp_path):
    for body in (b"[" * 4075, b"\xff" * 4075, b"7".ljust(4075)):
        (tmp_path / "x.bin").write_bytes(b"tokenfile 1 %08x " % zlib.crc32(body) + body)
        with pytest.raises(UserError, match="x.bin has a header whose fields"):
            prepare.TokenFile(str(tmp_path / "x.bin"))


def test_the_vocabularies_of_a_folder_agree(data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    for name in ("val.bin", "train.bin"):
        header(folder / name, vocab_size=258)
        with pytest.raises(UserError, match="its tokenizer has 257 tokens, train.bin is for 25"):
            prepare._open_folder(str(folder))


def test_a_file_truncated_while_it_is_open(data, tmp_path):
    """A mapping would end the process with SIGBUS."""
    shutil.copy(data / "train.bin", tmp_path)
    file = prepare.TokenFile(str(tmp_path / "train.bin"))
    whole = train.read_windows(file, np.array([0, 100]), 16)
    assert whole.dtype == np.int64 and whole[1].tolist() == file.tokens[1600:1617].tolist()
    os.truncate(tmp_path / "train.bin", 4096 + 2 * 1610)
    assert train.read_windows(file, np.array([0]), 16).tolist() == whole[:1].tolist()
    with pytest.raises(UserError, match="is truncated: its 4001 tokens take 12098 bytes, the file has 7316"):
        train.read_windows(file, np.array([0, 100]), 16)


def test_training_on_a_file_that_is_truncated_meanwhile(data, tmp_path, monkeypatch):
    folder, real = shutil.copytree(data, tmp_path / "data"), train.train_step

    def step(*args):
        os.truncate(folder / "train.bin", 5000)
        return real(*args)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(UserError, match="train.bin is truncated: .* prepare it again"):
        train_run(tmp_path / "run", folder)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers, tables, text

def test_vocabularies_of_strangers():
    hexes = [f"{byte:02x}" for byte in range(256)]
    assert tokenizer.tokenizer_from_blob("gpt2", "\n".join(hexes).encode()).vocab_size == 257
    for lines in (hexes[1:], [*hexes, hexes[5]], [*hexes, "zz"]):
        with pytest.raises(UserError, match="the vocabulary of gpt2 is damaged"):
            tokenizer.tokenizer_from_blob("gpt2", "\n".join(lines).encode())
    for blob in (b"{", b"[" * 100_000, b"[]", b'{"model": 3}'):
        with pytest.raises(UserError, match="the vocabulary of hf:x is damaged"):
            tokenizer.tokenizer_from_blob(tokenizer.pinned("x.json", blob), blob)


def bytes_tokenizer(**more):
    """The blob of a tokenizer.json over bytes."""
    vocabulary = {c: i for i, c in enumerate(tokenizer.byte_characters())} | {"<eos>": 256}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": level, "decoder": level,
            "post_processor": None, "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
            "eos_token": "<eos>", **more}


def test_a_tokenizer_json_neither_cuts_nor_fills_texts():
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "!"}
    blob = json.dumps(bytes_tokenizer(truncation=cut, padding=fill)).encode()
    assert len(tokenizer.tokenizer_from_blob(tokenizer.pinned("x.json", blob), blob).encode("abcde")) == 5


def test_a_tokenizer_json_with_ids_far_apart():
    data = bytes_tokenizer()
    data["model"]["vocab"]["<eos>"] = 4_000_000_000
    blob = json.dumps(data).encode()
    with pytest.raises(UserError, match="ids are far larger than their number"):
        tokenizer.tokenizer_from_blob(tokenizer.pinned("x.json", blob), blob)


def test_an_end_of_sequence_that_is_no_token(tmp_path):
    for eos in ({"x": 1}, [], [[]], {"content": []}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(bytes_tokenizer()))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        with pytest.raises(UserError, match="not Hugging Face's tokenizer"):
            tokenizer.load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_table_of_speeds_with_foreign_modes(tmp_path):
    shape, row = "lowrank 8 -> 8, V 2x8, U 8x2", {"1": [1.0, 2.0]}
    table = {"k": {"eager": {shape: row}, "warp": {"other": row}, "x": 3}}
    (tmp_path / "decode.json").write_text(json.dumps(table))
    tables, shapes = merge.read_table(str(tmp_path / "decode.json"), "k", ("eager",))
    assert tables["k"] == {"eager": {shape: row}} and shapes == {shape}
    for bad in ([], {"k": {"eager": 3}}, {"k": []}, {"k": {"eager": {shape: {"1": [1]}}}}):
        (tmp_path / "decode.json").write_text(json.dumps(bad))
        with pytest.raises(UserError, match="delete it, and the speeds"):
            merge.read_table(str(tmp_path / "decode.json"), "k", ("eager",))


def test_an_archive_that_wants_more_memory_than_there_is(tmp_path, monkeypatch):
    def much(*args):
        raise MemoryError

    (tmp_path / "x.txt.xz").write_bytes(b"")
    monkeypatch.setattr("corpus.lzma.open", much)
    with pytest.raises(UserError, match="x.txt.xz .it needs more memory than there is"):
        list(corpus.text_documents(str(tmp_path / "x.txt.xz"), "text", {}))


def test_a_long_line_of_metrics_is_left_out(tmp_path, capsys):
    row = {"step": 1, "loss": 3.0, "tokens_per_s": 9.0}
    lines = [row, {"step": 2} | {f"x{n}": n for n in range(9000)}, row | {"step": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [r["step"] for r in run.read_metrics(str(tmp_path / "metrics.jsonl"), 9)] == [1, 3]
    assert "1 of 3 rows are damaged" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face folders

@pytest.fixture(scope="module")
def hf(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "hf"
    export.main(*export.read_settings([str(finished), f"--to={folder}"]))
    return folder


@pytest.mark.parametrize("changes, words", [
    ({"sliding_window": "x"}, "sliding_window='x': expected a size"), ({"head_dim": -1}, "head_dim=-1"),
    ({"hidden_size": 2.5}, "hidden_size=2.5"), ({"vocab_size": True}, "vocab_size=True"),
    ({"max_position_embeddings": None}, "has no max_position_embeddings"),
    ({"hidden_act": ["gelu"]}, "expected a name"), ({"model_type": []}, r"model_type=\[\]"),
    ({"rope_parameters": [1]}, r"rotary settings \[1\]"), ({"num_hidden_layers": 10**9}, "must be at most"),
    ({"vocab_size": 1 << 24}, "the shape of head.weight is")])
def test_configs_of_strangers(changes, words, hf, tmp_path):
    folder = shutil.copytree(hf, tmp_path / "hf")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=words):
        export.read_hf(str(folder))


def test_an_index_names_files_of_its_folder(hf, tmp_path):
    folder = shutil.copytree(hf, tmp_path / "hf")
    for index in ([], {}, {"weight_map": 3}, {"weight_map": {}}, {"weight_map": {"a": [1]}},
                  {"weight_map": {"a": "../hf/model.safetensors"}}):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="does not name files of its folder"):
            export.read_weights(str(folder), "model.")


def test_norms_of_queries_and_keys_of_strangers():
    for tensors in ({}, {"a.q_norm.weight": torch.tensor(-1.0)}, {"a.q_norm.weight": torch.tensor([1.0, 2.0])}):
        with pytest.raises(UserError, match="different weights"):
            export.qk_gain("hf", tensors)
    assert export.qk_gain("hf", {"a.q_norm.weight": torch.tensor(1.2), "a.k_norm.weight": torch.full((4,), 1.2)}) == 1.2


def test_safetensors_of_shapes_that_cannot_be_joined(hf, tmp_path):
    from safetensors.torch import load_file, save_file
    folder = shutil.copytree(hf, tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    for name, t in (("q_proj.weight", torch.zeros(32, 31)), ("q_proj.weight", torch.zeros(())),
                    ("layernorm.weight", torch.zeros(()))):
        whole_name = next(key for key in tensors if name in key)
        save_file(tensors | {whole_name: t}, folder / "model.safetensors")
        with pytest.raises(UserError, match="do not fit each other|the weights lack"):
            export.read_hf(str(folder))
