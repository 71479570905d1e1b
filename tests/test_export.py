"""export: architectures and weights out and in, against transformers."""
import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import config
import export
from config import Config, UserError
from conftest import LOWRANK, ROOT, STRUCTURES, assert_one_sentence, train_run
from corpora import LINES, byte_level
from merge import replace_structured
from model import build, load
from prepare import TokenFile
from checkpoint import save_beside
from runs import stopped

CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------------------------------------------
# Models that go out

LLAMA, SWIGLU, NO_BIAS, UNTIED = "--norm=rmsnorm", "--act=swiglu", "--bias=False", "--tie_embeddings=False"
BLOCKS, SHUFFLE, RELU2, LEARNED = STRUCTURES["blockdense"], STRUCTURES["blockshuffle"], "--act=relu2", "--pos=absolute"
CAP = ["--logit_softcap=15"]
GEMMA = [LLAMA, SWIGLU, NO_BIAS, UNTIED, "--qk_norm=1.2", "--post_norm=0.3", *CAP]
ROWS = {
    "llama": [LLAMA, SWIGLU, NO_BIAS, UNTIED, "--n_kv_head=2", "--ffn_dim=40", *LOWRANK],
    "llama, bias, wide attention": [LLAMA, SWIGLU, "--attn_dim=48", "--rope_theta=500", "--norm_eps=1e-3", *SHUFFLE],
    "qwen3": [LLAMA, SWIGLU, NO_BIAS, UNTIED, "--n_kv_head=2", "--qk_norm=1.2", "--rope_theta=500", *LOWRANK],
    "qwen3, queries and keys of low rank": [LLAMA, SWIGLU, NO_BIAS, UNTIED, "--n_kv_head=2", "--qk_norm=1.2",
                                            "--qk_rank=8", *LOWRANK],
    "qwen3, tied": [LLAMA, SWIGLU, NO_BIAS, "--qk_norm=0.7", "--attn_dim=48", *SHUFFLE],
    "gemma3_text": [LLAMA, SWIGLU, NO_BIAS, UNTIED, "--n_kv_head=2", "--qk_norm=1.2", "--post_norm=0.3",
                    "--logit_softcap=3", "--rope_theta=500", *LOWRANK],
    "gemma3_text, tied": [LLAMA, SWIGLU, NO_BIAS, "--qk_norm=0.7", "--post_norm=1", "--attn_dim=48", "--qk_rank=8",
                          *SHUFFLE],
    "mistral": [LLAMA, SWIGLU, NO_BIAS, "--n_embd=34", "--attn_dim=32", *LOWRANK],
    "starcoder2": ["--n_kv_head=2", *LOWRANK],
    "starcoder2, no bias, wide attention": [RELU2, NO_BIAS, UNTIED, "--attn_dim=48", "--rope_theta=500",
                                            "--norm_eps=1e-3", *SHUFFLE],
    "starcoder2, odd width": ["--n_embd=36", "--n_head=8", "--attn_dim=32", "--ffn_dim=40"],
    "arcee": [RELU2, LLAMA, "--n_kv_head=1", *BLOCKS],
    "arcee, gelu": [LLAMA, NO_BIAS, UNTIED, "--attn_dim=16"],
    "stablelm": [SWIGLU, NO_BIAS, "--n_kv_head=2", "--norm_eps=1e-3", *BLOCKS],
    "stablelm, narrow attention": [SWIGLU, NO_BIAS, UNTIED, "--n_kv_head=2", "--attn_dim=16"],
    "stablelm, narrow, no groups": [SWIGLU, NO_BIAS, "--n_head=2", "--n_kv_head=1", "--attn_dim=12", "--n_embd=18"],
    "gpt2": [LEARNED, *LOWRANK],
    "gpt2, groups": [LEARNED, RELU2, NO_BIAS, UNTIED, "--n_kv_head=2", "--norm_eps=1e-3"],
    "gpt2, narrow attention": [LEARNED, "--attn_dim=16", "--n_kv_head=2", "--ffn_dim=56"],
    "gpt_bigcode": [LEARNED, "--n_kv_head=1", "--ffn_dim=56", *SHUFFLE],
    "gpt_bigcode, no bias": [LEARNED, RELU2, NO_BIAS, UNTIED, "--n_kv_head=1"],
}


SWITCHES = [f.name for f in dataclasses.fields(Config)]
SWITCHES = SWITCHES[:SWITCHES.index("dropout")]  # what the model computes, but for its FFNs' structure


def tiny(*argv):
    return config.load(["--n_layer=2", "--n_embd=32", "--n_head=4", "--block_size=48", "--vocab_size=260", *argv])[0]


def random_model(cfg):
    """Every parameter random, so that none could be left out unseen."""
    model = build(cfg, CPU, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return model.eval()


def keep_model(path, model):
    saved = {"identity": "byte", "blob": torch.zeros(1, dtype=torch.uint8)}
    save_beside({"config": config.to_dict(model.cfg), "model": model.state_dict(), "tokenizer": saved, "step": 0,
                 "val_loss": None}, str(path / "model.pt"))
    return path


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


def theirs(transformers, folder, **how):
    """The model in a folder; no weight may be missing or left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def assert_same(ours, model):
    """Logits, and the greedy continuation."""
    tokens = torch.randint(257, (3, 40), generator=torch.Generator().manual_seed(1))
    expected = ours(tokens)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    text = tokens[:1, :8]
    greedy = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=30, do_sample=False,
                            eos_token_id=None, pad_token_id=0)
    for _ in range(30):
        text = torch.cat((text, ours(text)[:, -1].argmax(1, keepdim=True)), 1)
    assert torch.equal(greedy, text)


@pytest.mark.parametrize("name", ROWS)
def test_the_architecture_computes_the_same_and_comes_back_equal(name, transformers, cli, tmp_path):
    ours = random_model(tiny(*ROWS[name]))
    keep_model(tmp_path / "run", ours)
    status, out, err = cli("export.py", tmp_path / "run", f"--to={tmp_path}/hf")
    assert status == 0 and f"architecture {name.split(',')[0]}, " in out and not err
    model = theirs(transformers, tmp_path / "hf")
    assert model.config.model_type == name.split(",")[0]
    assert_same(ours, model)

    assert cli("export.py", tmp_path / "hf", f"--out_dir={tmp_path}/back")[0] == 0
    back, cfg, _ = load(str(tmp_path / "back"), CPU)
    replace_structured(ours)
    if (cfg.n_head, cfg.n_kv_head) == (ours.cfg.n_head, ours.cfg.n_kv_head):
        assert back.state_dict().keys() == ours.state_dict().keys()
        rounding = 3e-7 if ours.cfg.post_norm else 0  # Gemma's norms hold their weights less 1, its table is scaled
        for key, t in back.state_dict().items():
            torch.testing.assert_close(t, ours.state_dict()[key], rtol=rounding, atol=rounding)
        changed = ["qk_rank"] * (ours.cfg.qk_rank > 0) + ["post_norm"] * (ours.cfg.post_norm not in (0, 1))
        assert [n for n in SWITCHES if getattr(cfg, n) != getattr(ours.cfg, n)] == changed
    assert_same(back, model)


@pytest.mark.parametrize("name, structure", [
    ("llama", "lowrank"), ("llama", "blockshuffle"), ("qwen3", "blockdense"), ("mistral", "lowrank"),
    ("qwen3, queries and keys of low rank", "lowrank"), ("gemma3_text", "blockshuffle"),
    ("gpt2", "lowrank"), ("starcoder2, no bias, wide attention", "blockshuffle"), ("arcee", "blockdense"),
    ("stablelm", "blockdense"), ("gpt2, groups", "blockshuffle"), ("gpt_bigcode", "lowrank")])
def test_the_factors_stay_behind_a_modeling_file(name, structure, transformers, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    dense = [arg for arg in ROWS[name] if not arg.startswith(("--ffn=", "--rank=", "--nblocks="))]
    ours = random_model(tiny(*dense, *STRUCTURES[structure]))
    keep_model(tmp_path / "run", ours)
    assert cli("export.py", tmp_path / "run", f"--to={tmp_path}/hf", "--factors=True")[0] == 0
    model = theirs(transformers, tmp_path / "hf", trust_remote_code=True)
    assert_same(ours, model)
    assert any(key.endswith("mlp.fc1.V") for key in model.state_dict())
    status, out, err = cli("export.py", tmp_path / "hf", f"--out_dir={tmp_path}/back")
    assert_one_sentence(status, out, err)
    assert "factors were kept by --factors=True" in err


@pytest.mark.parametrize("structure", STRUCTURES)
def test_after_guided_training_transformers_says_what_sample_says(structure, transformers, cli, data, tmp_path):
    run = train_run(tmp_path / "run", data, *STRUCTURES[structure], "--guide=fixedstep", "--n_dense_layers=0")
    assert cli("export.py", run, f"--to={tmp_path}/hf")[0] == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = theirs(transformers, tmp_path / "hf")
    said = cli("sample.py", run, "--prompt=the", "--temperature=0", "--max_new_tokens=9")[1]
    ids = model.generate(**tokenizer("the", return_tensors="pt"), max_new_tokens=9, do_sample=False)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) + "\n" == said
    card = (tmp_path / "hf" / "README.md").read_text()
    for words in ("license", f"{structure} ", "fixedstep, 4 of 8 steps", "1.02k tokens", "FLOPs"):
        assert words in card
    loss = load(str(run), CPU)[2]["val_loss"]
    assert f"validation loss: {loss:.4f}" in card


def test_large_models_are_written_in_shards_and_in_bfloat16(transformers, tmp_path, monkeypatch):
    ours = random_model(tiny(LLAMA, SWIGLU, NO_BIAS, UNTIED))
    keep_model(tmp_path / "run", ours)
    monkeypatch.setattr("export.SHARD", 20_000)
    path, s = export.read_settings([str(tmp_path / "run"), f"--to={tmp_path}/hf", "--dtype=bfloat16"])
    export.main(path, s)
    files = sorted(f.name for f in (tmp_path / "hf").glob("*.safetensors"))
    n = len(files)
    assert n > 2 and files == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    from safetensors.torch import load_file
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 20_000 for f in (tmp_path / "hf").glob("*.safetensors"))
    assert theirs(transformers, tmp_path / "hf", dtype="auto").dtype == torch.bfloat16
    assert export.main(*export.read_settings([str(tmp_path / "hf"), f"--out_dir={tmp_path}/back"])) is None
    replace_structured(ours)
    for key, t in load(str(tmp_path / "back"), CPU)[0].state_dict().items():
        assert torch.equal(t, ours.state_dict()[key].bfloat16().float())


NARROW = ["--n_head=3", "--n_kv_head=3", "--attn_dim=24"]


@pytest.mark.parametrize("argv, target, kind, expected", [
    ([], "gguf", "gpt2", dict(bias=True)), ([NO_BIAS], "gguf", "gpt2", dict(bias=True)),
    ([NO_BIAS], "vllm", "byte", dict(bias=False)), (NARROW, "gguf", "gpt2", dict(n_head=4, n_kv_head=4)),
    (["--n_head=2", "--n_kv_head=1", "--attn_dim=16"], "vllm", "spm", dict(n_head=4, n_kv_head=2)),
    (NARROW, "transformers", "spm", dict(n_head=3, n_kv_head=3)),
    (["--n_head=3", "--n_kv_head=1", "--attn_dim=24"], "vllm", "spm", dict(n_head=4, n_kv_head=4)),
    ([LEARNED, "--n_kv_head=1"], "vllm", "spm", dict(n_head=4, n_kv_head=4))])
def test_a_target_gets_the_heads_and_biases_it_needs(argv, target, kind, expected, transformers):
    ours = random_model(tiny(*argv))
    name = export.find_architecture(ours.cfg, target, kind)
    wide = export.widened(ours.cfg, name, target)
    assert {key: getattr(wide, key) for key in expected} == expected
    values = export.hf_config(wide, name, 256, "float32")
    tensors = export.to_hf(export.widen_heads(ours.state_dict(), ours.cfg, wide), wide, name)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values))
    left = model.load_state_dict(tensors, strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    assert_same(ours, model.eval())


@pytest.mark.parametrize("argv, target, kind, words", [
    ([LEARNED, LLAMA], "transformers", "spm", ["pos=absolute", "norm=rmsnorm"]),
    ([LEARNED, SWIGLU], "transformers", "spm", ["act=swiglu"]),
    ([SWIGLU], "transformers", "spm", ["stablelm", "bias=True"]),
    ([SWIGLU, LLAMA, "--n_embd=34", "--attn_dim=32"], "vllm", "spm", ["mistral", "bias=True"]),
    ([LLAMA, "--n_embd=34", "--attn_dim=32"], "transformers", "spm", ["arcee", "n_head"]),
    ([LEARNED, "--attn_dim=64"], "transformers", "spm", ["gpt2", "attn_dim"]),
    (["--attn_dim=64"], "vllm", "spm", ["starcoder2", "attn_dim"]),
    ([RELU2], "gguf", "gpt2", ["starcoder2", "act=relu2"]), ([LLAMA], "gguf", "gpt2", ["arcee", "act=gelu"]),
    ([LLAMA], "vllm", "gpt2", ["arcee", "act=gelu"]), ([], "gguf", "spm", ["starcoder2", "tokenizer gpt2"]),
    ([LLAMA, RELU2], "gguf", "gpt2", ["arcee", "bias=True"]),
    ([SWIGLU, NO_BIAS], "gguf", "gpt2", ["stablelm", "tie_embeddings=True"]),
    ([LEARNED, "--ffn_dim=64"], "gguf", "gpt2", ["gpt2", "ffn_dim"]),
    ([LLAMA, SWIGLU, *CAP], "transformers", "spm", ["llama caps no logits, logit_softcap", "post_norm=0"]),
    ([*GEMMA, "--post_norm=0"], "transformers", "spm", ["qwen3 caps no logits, logit_softcap",
                                                        "gemma3_text norms after attention and FFN too, post_norm=0"]),
    ([*GEMMA, "--qk_norm=0"], "transformers", "spm", ["llama norms before attention and FFN only, post_norm",
                                                      "gemma3_text norms queries and keys, qk_norm=0"]),
    ([*GEMMA, "--bias=True"], "transformers", "spm", ["gemma3_text has no biases, bias=True"]),
    ([*GEMMA, "--norm_eps=1e-6"], "transformers", "spm", ["gemma3_text has one epsilon for all norms"]),
    ([*GEMMA, "--n_embd=34", "--attn_dim=32"], "vllm", "spm", ["gemma3_text needs n_embd"]),
    ([*GEMMA, "--tie_embeddings=True", "--embed_norm=True"], "vllm", "spm", ["gemma3_text norms no embeddings"]),
    ([*GEMMA, "--act=relu2", "--qk_norm=0"], "transformers", "spm", ["arcee norms before attention", "post_norm"]),
    (GEMMA, "gguf", "spm", ["gemma3_text computes gelu there, act=swiglu"]),
    ([LLAMA, SWIGLU], "gguf", "byte", ["llama", "byte"]), ([LEARNED, RELU2], "gguf", "gpt2", ["gpt2", "act=relu2"])])
def test_what_none_expresses_or_its_reader_gets_wrong_is_refused(argv, target, kind, words):
    with pytest.raises(UserError) as e:
        export.find_architecture(tiny(*argv), target, kind)
    assert all(word in str(e.value) for word in words) and len(str(e.value)) < 400


@pytest.mark.parametrize("preset, name", [("qwen3", "qwen3"), ("gemma3", "gemma3_text")])
def test_the_presets_on_top_of_the_recipe_have_their_architectures(preset, name):
    presets = [str(ROOT / "config" / f"{name}.py") for name in ("s", "recipe", preset)]
    for target in ("transformers", "vllm"):
        assert export.find_architecture(config.load(presets)[0], target, "spm") == name
    with pytest.raises(UserError, match="expresses smear=True"):
        export.find_architecture(config.load(presets[:2])[0], "transformers", "spm")


def test_every_switch_of_the_model_is_known_here():
    """A new one changes what the model computes: export.py has to express or refuse it before it is added there."""
    without_home = {"smear", "embed_skip", "value_embeddings"}
    assert set(SWITCHES) == export.KNOWN | without_home


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
@torch.no_grad()
def test_normed_embeddings_are_written_normed(name, transformers, cli, tmp_path):
    ours = random_model(tiny(*ROWS[name], "--embed_norm=True"))
    keep_model(tmp_path / "run", ours)
    assert cli("export.py", tmp_path / "run", f"--to={tmp_path}/hf")[0] == 0
    assert_same(ours, theirs(transformers, tmp_path / "hf"))


def test_a_qwen3_with_another_epsilon_or_weights_of_its_own_is_refused(transformers, cli, tmp_path):
    from safetensors.torch import load_file, save_file
    keep_model(tmp_path / "run", random_model(tiny(*ROWS["qwen3"])))
    assert cli("export.py", tmp_path / "run", f"--to={tmp_path}/hf")[0] == 0
    path, weights = tmp_path / "hf" / "config.json", tmp_path / "hf" / "model.safetensors"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "rms_norm_eps": 1e-6}))
    status, out, err = cli("export.py", tmp_path / "hf", f"--out_dir={tmp_path}/back")
    assert_one_sentence(status, out, err)
    assert "rms_norm_eps=1e-06" in err
    path.write_text(json.dumps(data))
    tensors = load_file(weights)
    tensors["model.layers.1.self_attn.k_norm.weight"][3] = 0.5
    save_file(tensors, weights, metadata={"format": "pt"})
    status, out, err = cli("export.py", tmp_path / "hf", f"--out_dir={tmp_path}/back")
    assert_one_sentence(status, out, err)
    assert "2 different weights" in err


def test_a_switch_that_is_not_known_is_refused_where_it_is_used():
    fields = [(f.name, f.type, f.default) for f in dataclasses.fields(Config)]
    at = SWITCHES.index("norm")
    wider = dataclasses.make_dataclass("Wider", [*fields[:at], ("q_norm", float, 0.0), *fields[at:]])
    cfg = wider(**vars(tiny(LLAMA, SWIGLU)))
    assert export.find_architecture(cfg, "transformers", "spm") == "llama"
    cfg.q_norm = 1.2
    with pytest.raises(UserError, match="expresses q_norm=1.2"):
        export.find_architecture(cfg, "transformers", "spm")


def test_nothing_at_the_root_hides_a_package_that_they_look_for(tmp_path):
    """transformers and lm-eval ask whether a package is there; no file or folder of ours may answer."""
    ours = {path.stem for path in ROOT.iterdir()
            if path.suffix == ".py" or path.is_dir() and not path.name.startswith((".", "_"))}
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x']\n" + "".join(
        f"import {name}\n" for name in ("torch.distributed", "torch._dynamo", "safetensors.torch", "tokenizers")
        if importlib.util.find_spec(name.split(".")[0]))
    if importlib.util.find_spec("transformers"):
        asked = set()
        for path in Path(importlib.util.find_spec("transformers").origin).parent.glob("utils/*.py"):
            asked |= set(re.findall(r"(?:_is_package_available|find_spec|is_package_available)\(\s*[\"'](\w+)",
                                    path.read_text()))
        assert len(asked) > 30 and not ours & asked
        code += "import transformers\ntransformers.LlamaForCausalLM, transformers.AutoTokenizer\n"
    if importlib.util.find_spec("lm_eval"):
        code += "import lm_eval.models.huggingface, lm_eval.tasks\n"
    code += f"bad = [m for m in sys.modules.values() if str(getattr(m, '__file__', '')).startswith('{ROOT}/')]\n"
    code += "assert not bad, bad"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Models that come in

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=56,
             vocab_size=410, max_position_embeddings=64)
HEADS = dict(head_dim=12, query_pre_attn_scalar=12, hidden_activation="silu", rms_norm_eps=1e-5)
FOREIGN = {
    "llama": ("LlamaConfig", dict(SHAPE, rms_norm_eps=1e-3, head_dim=12, attention_bias=True)),
    "mistral": ("MistralConfig", dict(SHAPE, sliding_window=4096)),
    "qwen2": ("Qwen2Config", dict(SHAPE, tie_word_embeddings=True)),
    "gemma3_text": ("Gemma3TextConfig", dict(SHAPE, **HEADS, layer_types=["full_attention"] * 2, sliding_window=32,
                                             rope_theta=500.0, final_logit_softcapping=3.0)),
    "gemma3_text, windows, untied": ("Gemma3TextConfig", dict(
        SHAPE, **HEADS, layer_types=["sliding_attention", "full_attention"], sliding_window=64, rope_theta=500.0,
        rope_local_base_freq=500.0, tie_word_embeddings=False)),
    "starcoder2": ("Starcoder2Config", dict(SHAPE, use_bias=False, sliding_window=None)),
    "arcee": ("ArceeConfig", dict(SHAPE, hidden_act="relu2")),
    "stablelm": ("StableLmConfig", dict(SHAPE, partial_rotary_factor=1.0, use_qkv_bias=True)),
    "gpt2": ("GPT2Config", dict(n_embd=32, n_layer=2, n_head=4, vocab_size=410, n_positions=64,
                                layer_norm_epsilon=1e-3)),
    "gpt2, untied": ("GPT2Config", dict(n_embd=32, n_layer=2, n_head=4, n_inner=40, vocab_size=410, n_positions=64,
                                        tie_word_embeddings=False)),
    "gpt_bigcode": ("GPTBigCodeConfig", dict(n_embd=32, n_layer=2, n_head=4, vocab_size=410, n_positions=64)),
}


def foreign(transformers, name, folder, **changes):
    """A folder with a random model of transformers' own and a byte-level tokenizer."""
    kind, values = FOREIGN[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**values, **changes}))
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.add_(0.2 if key.endswith(("q_norm.weight", "k_norm.weight")) else 0.15 * torch.randn_like(p))
    byte_level(folder)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", FOREIGN)
def test_models_of_transformers_come_in(name, transformers, cli, tmp_path):
    model = foreign(transformers, name, tmp_path / "hf")
    status, out, err = cli("export.py", tmp_path / "hf", f"--out_dir={tmp_path}/in")
    assert status == 0 and "tokenizer hf:hf@" in out, err
    assert_same(load(str(tmp_path / "in"), CPU)[0], model)
    assert cli("sample.py", tmp_path / "in", "--prompt=naïve", "--max_new_tokens=4")[0] == 0


def test_train_scores_a_model_that_came_in_on_text_of_its_tokenizer(transformers, cli, tmp_path):
    model = foreign(transformers, "llama", tmp_path / "hf")
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    (tmp_path / "val.txt").write_text("\n".join(LINES[::-1]))
    assert cli("export.py", tmp_path / "hf", f"--out_dir={tmp_path}/in")[0] == 0
    argv = ["--dataset=text", f"--input={tmp_path}/text.txt", f"--val_input={tmp_path}/val.txt",
            f"--tokenizer={tmp_path}/hf/tokenizer.json"]
    assert cli("prepare.py", *argv, f"--data_dir={tmp_path}/data", "--workers=1")[0] == 0
    status, out, err = cli("train.py", *argv, f"--data_dir={tmp_path}/data", f"--out_dir={tmp_path}/in",
                           "--eval_only=True", "--device=cpu", "--batch_size=16")
    assert status == 0, err
    val = TokenFile(str(tmp_path / "data" / "val.bin")).tokens
    n = (len(val) - 1) // 64
    windows = torch.from_numpy(val[:n * 64 + 1].astype("int64")).unfold(0, 65, 64)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(windows[:, :-1]).logits.flatten(0, 1), windows[:, 1:].flatten())
    assert n and f"loss {loss.item():.4f}" in out


@pytest.mark.parametrize("changes, words", [
    (dict(layer_types=None), ["layer_types=None", "full_attention"]), (dict(layer_types=["chunked"]), ["chunked"]),
    (dict(layer_types=[[1]]), ["[[1]]"]), (dict(layer_types=[]), ["layer_types=[]"]),
    (dict(rope_parameters=7), ["rotary settings 7"]),
    (dict(rope_parameters={"full_attention": [1]}), ["rotary settings", "[1]"]),
    (dict(rope_parameters={"full_attention": {"rope_type": "linear", "factor": 2.0}}), ["linear"]),
    (dict(rope_parameters=None, rope_scaling={"rope_type": "linear", "factor": 2.0}), ["linear"]),
    (dict(final_logit_softcapping="much"), ["logit_softcap='much'"]),
    (dict(hidden_activation=7), ["hidden_activation=7"])])
def test_settings_of_a_gemma_that_cannot_be_read_are_one_sentence(changes, words, tmp_path):
    path, cfg = tmp_path / "config.json", tiny(*GEMMA)
    path.write_text(json.dumps(export.hf_config(cfg, "gemma3_text", 0, "float32") | changes))
    with pytest.raises(UserError) as e:
        export.read_hf_config(str(path))
    assert all(word in str(e.value) for word in words), e.value


def test_gemmas_settings_are_read_in_both_spellings(tmp_path):
    """transformers 4 has rotary bases side by side, 5 one set for each type of layer."""
    path, first, second = tmp_path / "config.json", "full_attention", "sliding_attention"
    values = export.hf_config(tiny(*GEMMA), "gemma3_text", 0, "float32")
    for changes, theta in (
            (dict(rope_parameters=None, rope_theta=300.0), 300), (dict(rope_parameters=None, rope_theta=None), 1e6),
            (dict(rope_parameters={first: {"rope_theta": 200.0}}, rope_theta=300.0), 200),
            (dict(rope_parameters={second: {"rope_theta": 200.0}}, layer_types=[second] * 2, sliding_window=48), 200),
            (dict(rope_parameters=None, layer_types=[second] * 2, rope_local_base_freq=100.0), 100)):
        path.write_text(json.dumps({key: v for key, v in (values | changes).items() if v is not None}))
        name, cfg = export.read_hf_config(str(path))
        assert (name, cfg.rope_theta, cfg.logit_softcap, cfg.post_norm) == ("gemma3_text", theta, 15, 1)
    long = values | dict(max_position_embeddings=5000, layer_types=[second] * 2)
    for key, words in (("head_dim", "query_pre_attn_scalar=8: only head_dim=256"), ("sliding_window", "window=4096"),
                       ("query_pre_attn_scalar", "query_pre_attn_scalar=256: only head_dim=8"),
                       ("hidden_activation", "gelu_pytorch_tanh")):  # what transformers takes where they are left out
        path.write_text(json.dumps({k: v for k, v in long.items() if k != key}))
        with pytest.raises(UserError, match=words):
            export.read_hf_config(str(path))


def test_theta_and_scaling_are_read_in_both_spellings(transformers, cli, tmp_path):
    model = foreign(transformers, "llama", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    values = json.loads(path.read_text())
    for n, spelling in enumerate((dict(rope_theta=300.0),
                                  dict(rope_parameters=dict(rope_type="default", rope_theta=300.0)))):
        path.write_text(json.dumps({**{k: v for k, v in values.items() if not k.startswith("rope")}, **spelling}))
        cli("export.py", tmp_path / "hf", f"--out_dir={tmp_path}/{n}")
        assert load(str(tmp_path / str(n)), CPU)[1].rope_theta == 300.0
    assert model.config.rms_norm_eps == load(str(tmp_path / "0"), CPU)[1].norm_eps == 1e-3


def test_base_models_without_prefix_and_with_buffers_come_in(transformers, cli, tmp_path):
    """As the first GPT-2 files are: no transformer. before the names, the causal mask among the weights, tied or not
    for the reader to know."""
    from safetensors.torch import load_file, save_file
    model = foreign(transformers, "gpt2", tmp_path / "hf")
    path = str(tmp_path / "hf" / "model.safetensors")
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items() if name != "lm_head.weight"}
    config_file = tmp_path / "hf" / "config.json"
    values = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({k: v for k, v in values.items() if k != "tie_word_embeddings"}))
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.ones(1)}, path)
    assert cli("export.py", tmp_path / "hf", f"--out_dir={tmp_path}/in")[0] == 0
    assert_same(load(str(tmp_path / "in"), CPU)[0], model)


@pytest.mark.parametrize("name, changes, argv, words", [
    ("llama", dict(rope_scaling=dict(rope_type="linear", factor=2.0)), [], ["rotary", "linear"]),
    ("mistral", dict(sliding_window=32), [], ["sliding_window=32", "--block_size=32"]),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), [], ["scale_attn_by_inverse_layer_idx=True"]),
    ("gpt2", dict(activation_function="gelu"), [], ["activation_function=gelu", "gelu_new"]),
    ("llama", dict(hidden_act="gelu"), [], ["hidden_act=gelu", "silu"]),
    ("stablelm", dict(partial_rotary_factor=0.25), [], ["partial_rotary_factor=0.25"]),
    ("gpt_bigcode", dict(multi_query=False), [], ["multi_query=False"]),
    ("gemma3_text", dict(hidden_activation="gelu_pytorch_tanh"), [], ["hidden_activation=gelu_pytorch_tanh", "silu"]),
    ("gemma3_text", dict(query_pre_attn_scalar=16), [], ["query_pre_attn_scalar=16", "head_dim=12"]),
    ("gemma3_text", dict(use_bidirectional_attention=True), [], ["use_bidirectional_attention=True"]),
    ("gemma3_text", dict(attn_logit_softcapping=50.0), [], ["attn_logit_softcapping=50.0"]),
    ("gemma3_text", dict(rms_norm_eps=1e-6), [], ["rms_norm_eps=1e-06"]),
    ("gemma3_text, windows, untied", dict(sliding_window=32), [], ["sliding_window=32", "--block_size=32"]),
    ("gemma3_text, windows, untied", dict(rope_local_base_freq=400.0), [], ["rotary settings for sliding_attention"]),
    ("gpt2", {}, ["--block_size=65"], ["block_size=65", "64"])])
def test_what_ours_does_not_compute_is_refused(name, changes, argv, words, transformers, cli, tmp_path):
    foreign(transformers, name, tmp_path / "hf", **changes)
    status, out, err = cli("export.py", tmp_path / "hf", f"--out_dir={tmp_path}/in", *argv)
    assert_one_sentence(status, out, err)
    assert all(word in err for word in words) and not (tmp_path / "in").exists()


def test_a_shorter_context_makes_windows_and_positions_fit(transformers, cli, tmp_path):
    for name, changes in (("mistral", dict(sliding_window=40)), ("gpt2", {}),
                          ("gemma3_text, windows, untied", dict(sliding_window=40))):
        model = foreign(transformers, name, tmp_path / name, **changes)
        assert cli("export.py", tmp_path / name, f"--out_dir={tmp_path}/in {name}", "--block_size=40")[0] == 0
        ours, cfg, _ = load(str(tmp_path / f"in {name}"), CPU)
        assert cfg.block_size == 40
        assert_same(ours, model)


def test_damaged_and_foreign_folders_are_one_sentence(transformers, cli, tmp_path):
    foreign(transformers, "llama", tmp_path / "hf")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}

    def refused(word, **files):
        for name, data in (kept | files).items():
            (tmp_path / "hf" / name).unlink(missing_ok=True)
            if data is not None:
                (tmp_path / "hf" / name).write_bytes(data)
        status, out, err = cli("export.py", tmp_path / "hf", f"--out_dir={tmp_path}/in")
        assert_one_sentence(status, out, err)
        assert word in err and not (tmp_path / "in").exists(), err

    values = json.loads(kept["config.json"])
    refused("model_type='mamba'", **{"config.json": json.dumps({**values, "model_type": "mamba"}).encode()})
    refused("has no hidden_size", **{"config.json": json.dumps({**values} | {"model_type": "llama"}).replace(
        '"hidden_size"', '"other"').encode()})
    refused("lack", **{"config.json": json.dumps({**values, "num_hidden_layers": 3}).encode()})
    refused("no place", **{"config.json": json.dumps({**values, "num_hidden_layers": 1}).encode()})
    refused("do not match", **{"config.json": json.dumps({**values, "hidden_size": 36}).encode()})
    refused("not JSON", **{"config.json": b"{"})
    refused("damaged", **{"model.safetensors": kept["model.safetensors"][:1000]})
    refused("is missing", **{"model.safetensors": None})
    refused("neither", **{"tokenizer.json": None})
    safetensors = pytest.importorskip("safetensors.torch")
    weights = safetensors.load(kept["model.safetensors"])
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.complex64):
        quantised = safetensors.save({**weights, "model.norm.weight": torch.ones(32).to(dtype)})
        refused(f"model.norm.weight as {dtype}", **{"model.safetensors": quantised})
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / "model.safetensors").mkdir()
    kept.pop("model.safetensors")
    refused("model.safetensors is damaged or cannot be read")


# ----------------------------------------------------------------------------------------------------------------------
# The command

@pytest.mark.parametrize("argv, word", [
    ([], "0 were given"), (["a", "b", "--to=c"], "2 were given"), (["a"], "--to=FOLDER"),
    (["a", "--to=b", "--out_dir=c"], "--out_dir"), (["a", "--to=b", "--for=onnx"], "onnx"),
    (["a", "--out_dir=b", "--dtype=bfloat16"], "dtype=bfloat16"), (["a", "--to=b", "--block_size=64"], "block_size=64"),
    (["a", "--to=b", "--rank=3"], "rank=3"), (["a", "--to=b", "--calibrate=export.py"], "calibrate=export.py"),
    (["a", "--to=b", "--ffn_dim=3", "--device=mps"], "device=mps"),
    (["a", "--to=b", "--ffn=lowrank", "--rank=3", "--weighted=False"], "weighted=False"),
    (["a", "--to=b", "--ffn=lowrank", "--rank=3", "--calibrate=no.txt"], "no.txt"),
    (["a", "--to=.", "--for=vllm"], ". exists"), (["a", "--to=b", "--for=vllm", "--factors=True"], "vllm")])
def test_mistakes_are_one_sentence_without_torch(without_torch, argv, word):
    status, out, err = without_torch("export.py", *argv)
    assert_one_sentence(status, out, err)
    assert word in err


@pytest.mark.parametrize("more", [[], ["--ffn_dim=64"], ["--qk_rank=4"]], ids=" ".join)
def test_a_dense_model_has_no_factors_to_keep(more, cli, tmp_path):
    keep_model(tmp_path / "run", random_model(tiny(LLAMA, SWIGLU, NO_BIAS, UNTIED)))
    argv = ["export.py", tmp_path / "run", f"--to={tmp_path}/hf", "--factors=True"]
    status, out, err = cli(*argv, *more)
    assert_one_sentence(status, out, err)
    assert f"factors=True has no effect, the FFNs of {tmp_path / 'run'} are dense" in err
    assert not (tmp_path / "hf").exists()
    assert "with factors" in cli(*argv, "--ffn=lowrank", "--rank=4")[1]  # projected on the way it has some


def test_a_missing_model_and_a_failed_export_leave_nothing(cli, tmp_path, monkeypatch):
    status, out, err = cli("export.py", tmp_path / "none", f"--to={tmp_path}/hf")
    assert_one_sentence(status, out, err)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    (tmp_path / "begun" / "metrics.jsonl").write_text("")
    status, out, err = cli("export.py", tmp_path / "begun", f"--to={tmp_path}/hf")
    assert_one_sentence(status, out, err)
    assert "model.pt does not exist" in err  # and not that it is no Hugging Face folder
    keep_model(tmp_path / "run", random_model(tiny()))
    (tmp_path / "hf.tmp").mkdir()  # somebody's, or of an export beside this one

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("export.write_weights", full)
    with pytest.raises(UserError, match="No space left"):
        export.main(*export.read_settings([str(tmp_path / "run"), f"--to={tmp_path}/hf"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["begun", "hf.tmp", "run"]


def test_of_two_exports_to_one_folder_the_first_that_is_done_stays_whole(tmp_path, monkeypatch):
    keep_model(tmp_path / "run", random_model(tiny()))
    real = export.write_weights

    def twice(*arguments):
        monkeypatch.setattr(export, "write_weights", real)
        real(*arguments)
        export.main(str(tmp_path / "run"), settings("bfloat16"))  # begins after this one, and is done before it

    def settings(dtype):
        return export.Settings(to=str(tmp_path / "hf"), dtype=dtype)

    monkeypatch.setattr(export, "write_weights", twice)
    with pytest.raises(UserError, match="Directory not empty"):
        export.main(str(tmp_path / "run"), settings("float32"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "hf" / "model.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]


def test_an_unfinished_runs_card_counts_its_steps(cli, data, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        stopped(tmp_path / "run", data, 3, monkeypatch)
    status, out, err = cli("export.py", tmp_path / "run", f"--to={tmp_path}/hf")
    assert status == 0 and "before the run was finished" in err
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "3 of 8 steps" in card and "FLOPs" not in card and "loss" not in card


def test_a_model_of_ours_is_copied_with_its_run(cli, finished, tmp_path):
    assert cli("export.py", finished, f"--out_dir={tmp_path}/copy")[0] == 0
    ours, copy = load(str(finished), CPU), load(str(tmp_path / "copy"), CPU)
    assert all(torch.equal(t, ours[0].state_dict()[key]) for key, t in copy[0].state_dict().items())
    assert ours[2]["step"] == copy[2]["step"] == 8
