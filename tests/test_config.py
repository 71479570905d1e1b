"""config: precedence, types, presets that are parsed and not run, mistakes reported in one sentence, without torch."""
import dataclasses
import os
import random
import signal
import subprocess
import sys

import pytest

import config
from config import Config, UserError
from conftest import ROOT, TINY, assert_one_sentence, assert_stream_sentence, start

PRESETS = sorted((ROOT / "config").glob("[a-z]*.py"))
SMALL = ["--n_layer=2", "--n_embd=32", "--n_head=2"]


def preset(tmp_path, text, name="mine.py"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def refusal(argv):
    with pytest.raises(UserError) as e:
        config.load([str(a) for a in argv])
    return str(e.value)


# ----------------------------------------------------------------------------------------------------------------------
# Values

def test_defaults_then_preset_then_command_line(tmp_path):
    path = preset(tmp_path, "n_layer = 3\nlr = 1e-4\n")
    cfg, = config.load([path, "--lr=2e-4"])
    assert (cfg.n_layer, cfg.lr, cfg.n_embd) == (3, 2e-4, Config.n_embd)
    assert config.load(["--lr=2e-4", path])[0] == cfg  # wherever the preset stands
    assert cfg.out_dir == "out/mine" and config.load([])[0].out_dir == "out/run"


def test_sizes_left_out_follow_from_the_others():
    cfg, = config.load(["--n_embd=96", "--n_head=6", "--act=swiglu"])
    assert (cfg.n_kv_head, cfg.attn_dim, cfg.ffn_dim, cfg.n_hidden) == (6, 96, 384, 768)
    cfg, = config.load(["--n_embd=96", "--n_head=6", "--attn_dim=48"])
    assert (cfg.attn_dim, cfg.ffn_dim, cfg.n_hidden) == (48, 384, 384)


@pytest.mark.parametrize("word, value", [
    ("--n_layer=7", 7), ("n_layer=7", 7), ("--max_tokens=6.7e9", 6_700_000_000), ("--lr=1", 1.0),
    ("--betas=(0.9, 0.95)", (0.9, 0.95)), ("--betas=0.8,0.9", (0.8, 0.9)), ("--bias=False", False), ("--bias=false",
                                                                                                     False),
    ("--compile=auto", "auto"), ("--compile=True", True), ("--guide_ratio=auto", "auto"), ("--guide_ratio=0.4", 0.4),
    ("--tokenizer=123", "123"), ("--input=[a]", "[a]"), ("--input='x'", "'x'"), ("--dataset=None", "None"),
    ("--out_dir=a=b", "a=b")])
def test_a_value_takes_its_fields_type(word, value):
    cfg, = config.load(["--ffn=lowrank", "--rank=8", "--guide=fixedstep", word])
    got = getattr(cfg, word.removeprefix("--").partition("=")[0])
    assert got == value and type(got) is type(value)


def test_settings_of_a_script_are_read_beside_config():
    @dataclasses.dataclass
    class Mine:
        repeats: int = 3
    cfg, mine = config.load(["--repeats=5", "--n_layer=2"], Mine)
    assert (cfg.n_layer, mine.repeats) == (2, 5)


def test_round_trip_through_plain_types():
    cfg, = config.load(["--betas=(0.8,0.9)", "--timeout=0.25", "--compile=True"])
    values = config.to_dict(cfg)
    assert config.from_dict(values) == cfg and values["betas"] == [0.8, 0.9]
    assert "n_layers" in str(pytest.raises(UserError, config.from_dict, {"n_layers": 3}).value)
    assert "n_layer" in str(pytest.raises(UserError, config.from_dict, {"n_layer": "three"}).value)


@pytest.mark.parametrize("cfg, folder", [
    (Config(), "data/stdlib-spm-4096"), (Config(dataset="org/Set", tokenizer="m/x.model"), "data/org-Set-m-x.model"),
    (Config(data_dir="d"), "d")])
def test_data_dir_is_a_file_name(cfg, folder):
    assert config.data_dir(cfg) == folder


def test_settings_that_are_no_names_with_values_are_refused_by_their_path():
    for values in ([], [1], 3, None, "text", {"n_layer": []}, {"betas": {}}, {"lr": None}):
        assert str(pytest.raises(UserError, config.from_dict, values,
                                 "out/x/config.json").value).startswith("out/x/config.json: ")


# ----------------------------------------------------------------------------------------------------------------------
# Presets

@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_loads(path):
    cfg, = config.load([str(path)])
    assert cfg.out_dir == f"out/{path.stem}" and cfg.batch_size % cfg.micro_batch_size == 0


def test_a_later_preset_has_the_last_word(tmp_path):
    size = preset(tmp_path, "n_layer = 3\nlr = 1e-4\n", "size.py")
    recipe = preset(tmp_path, "lr = 2e-4\ndropout = 0.1\n", "how.py")
    cfg, = config.load([size, recipe, "--dropout=0.2"])
    assert (cfg.n_layer, cfg.lr, cfg.dropout, cfg.out_dir) == (3, 2e-4, 0.2, os.path.join("out", "size-how"))


def test_an_lr_after_another_presets_optimizer_is_known_to_be_for_it(tmp_path):
    """Where that preset names the optimizer too, or the command line has the lr."""
    recipe = preset(tmp_path, "optimizer = 'muon'\nlr = 'auto'\n", "recipe.py")
    both = preset(tmp_path, "optimizer = 'muon'\nlr = 0.03\n", "both.py")
    other = preset(tmp_path, "lr = 6e-4\n", "size.py")
    assert config.load([other, recipe, both])[0].lr == 0.03
    assert config.load([recipe, other, "--lr=0.01"])[0].lr == 0.01
    assert config.load([other, recipe, preset(tmp_path, "act = 'swiglu'\n", "more.py")])[0].lr > 0.01
    assert "size.py comes after optimizer=muon" in refusal([other, recipe, other])


def test_rates_of_muon_follow_the_rule_or_the_user():
    base = ["--optimizer=muon", "--n_embd=3072", "--batch_size=16", "--max_tokens=16384000"]  # 1000 x 2^14 tokens
    cfg, = config.load([*base, "--lr=auto", "--weight_decay=auto", "--head_lr=0.5"])
    assert cfg.lr == pytest.approx(0.01) and cfg.weight_decay == pytest.approx(1.4)
    assert cfg.embed_lr == pytest.approx(0.3 / 4) and cfg.head_lr == 0.5 and cfg.skip_lr == pytest.approx(0.25)
    assert config.load([*base, "--lr=0.02", "--weight_decay=auto"])[0].weight_decay == pytest.approx(0.7)
    structured, = config.load([*base, "--lr=auto", "--weight_decay=auto", "--ffn=lowrank", "--rank=64"])
    assert (structured.lr, structured.weight_decay) == (pytest.approx(0.007), pytest.approx(2.0))
    assert structured.embed_lr == cfg.embed_lr
    assert "optimizer=muon" in refusal(["--embed_lr=0.1"]) and "optimizer=muon" in refusal(["--lr=auto"])
    assert config.load(["config/m.py"])[0].embed_lr == "auto"


def test_arithmetic_in_a_preset(tmp_path):
    text = '"""Text."""\nn_embd = 2 * 3 * 16\nmax_tokens = 2**20 + 10 // 3 - 1\nlr = 6 / 10**4  # why\nn_head = 3'
    cfg, = config.load([preset(tmp_path, text)])
    assert (cfg.n_embd, cfg.max_tokens, cfg.lr) == (96, 2**20 + 2, 6e-4)


@pytest.mark.parametrize("line", [
    "import os", "n_layer = open('{flag}', 'w').write('x')", "n_layer = __import__('os').getpid()", "n_layer: int = 3",
    "n_layer = n_head = 4", "n_layer += 1", "if True:\n    n_layer = 3", "n_layer = 3 if True else 4",
    "open('{flag}', 'w')",
    "lr = [x for x in (1,)][0]", "n_layer = -(-8) ** 0.5", "n_layer = 10**400", "lr = 1 / 0", "n_layer = '3'",
    "bias = 1",
    "n_layer = 3 ==", "n_layer = 'x' * 3", "max_tokens = 2**100", "lr = 10**50 * 10**50", "n_layer = \0"])
def test_a_preset_is_parsed_and_not_executed(tmp_path, line):
    flag = tmp_path / "flag"
    path = preset(tmp_path, line.format(flag=flag))
    assert "mine.py" in (text := refusal([path])) or "n_layer" in text or "bias" in text, text
    assert not flag.exists()


def test_a_refused_preset_line_is_named(tmp_path):
    assert "line 2" in refusal([preset(tmp_path, "n_layer = 3\nimport os\n")])
    text = refusal([preset(tmp_path, "n_layer = 3\n\nn_embed = 64\n")])
    assert "line 3" in text and "did you mean n_embd?" in text


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes

MISTAKES = {
    "unknown flag": (["--n_layr=3"], "n_layr", "did you mean n_layer?"),
    "unknown flag, nothing near": (["--qqqq=3"], "qqqq", "--help"),
    "no value": (["--n_layer"], "n_layer", "whole number"),
    "wrong type": (["--n_layer=three"], "n_layer=three", "whole number"),
    "fraction": (["--n_layer=2.5"], "n_layer=2.5", "whole number"),
    "truth for a number": (["--n_layer=True"], "n_layer=True", "whole number"),
    "number for truth": (["--bias=1"], "bias=1", "True or False"),
    "not finite": (["--lr=1e999"], "lr=1e999", "number"),
    "too large for a float": (["--lr=1" + 400 * "0"], "lr=1", "number"),
    "choice": (["--ffn=lowrnk"], "ffn=lowrnk", "dense | lowrank | blockshuffle | blockdense"),
    "pair": (["--betas=0.9"], "betas=0.9", "2 numbers"),
    "rank 0": (["--ffn=lowrank"], "rank=0", "at least 1"),
    "rank too large": (["--ffn=lowrank", "--rank=769"], "rank=769", "768"),
    "rank of the keys": (["--n_kv_head=6", "--qk_rank=385"], "qk_rank=385", "384"),
    "rank of the keys below 0": (["--qk_rank=-1"], "qk_rank=-1", "negative"),
    "rank of blockdense": (["--ffn=blockdense", "--nblocks=2"], "rank=0", "at least 1"),
    "no blocks": (["--ffn=blockshuffle"], "nblocks=0", "at least one"),
    "heads": (["--n_head=7"], "n_head=7", "768"),
    "key heads": (["--n_head=12", "--n_kv_head=5"], "n_head=12", "n_kv_head=5"),
    "odd head": (["--n_embd=36", "--n_head=12"], "3", "odd"),
    "blocks": (["--ffn=blockshuffle", "--nblocks=5"], "nblocks=5", "768"),
    "blocks of the rank": (["--ffn=blockdense", "--rank=9", "--nblocks=2"], "nblocks=2", "9"),
    "guide with dense": (["--guide=fixedstep"], "guide=fixedstep", "lowrank"),
    "guide without a structured layer": (["--guide=fixedstep", "--ffn=lowrank", "--rank=4", "--n_dense_layers=12"],
                                         "n_dense_layers=12", "12"),
    "guide ratio": (["--guide=fixedstep", "--ffn=lowrank", "--rank=4", "--guide_ratio=1.5"], "guide_ratio=1.5",
                    "(0, 1]"),
    "batch": (["--batch_size=10", "--micro_batch_size=4"], "batch_size=10", "4"),
    "negative": (["--weight_decay=-1"], "weight_decay=-1", "negative"),
    "dropout": (["--dropout=1"], "dropout=1", "below 1"),
    "learning rate": (["--lr=0"], "lr=0", "positive"),
    "rotary base": (["--rope_theta=0"], "rope_theta=0", "positive"),
    "epsilon": (["--norm_eps=-1e-6"], "norm_eps=-1e-06", "positive"),
    "betas": (["--betas=(0.9,1.0)"], "1.0", "[0, 1)"),
    "device": (["--device=gpu"], "device=gpu", "cuda"),
    "device of a number that torch wraps": (["--device=cuda:200"], "device=cuda:200", "below 100"),
    "device of a long number": (["--device=cuda:99999999999999999999"], "cuda:99999999999999999999", "below 100"),
    "rank of dense": (["--rank=64"], "rank=64", "--ffn=lowrank"),
    "rank of blockshuffle": (["--ffn=blockshuffle", "--nblocks=4", "--rank=64"], "rank=64", "--ffn=blockdense"),
    "blocks of lowrank": (["--ffn=lowrank", "--rank=64", "--nblocks=4"], "nblocks=4", "--ffn=blockshuffle"),
    "ratio without guide": (["--guide_ratio=0.4"], "guide_ratio=0.4", "--guide=fixedstep"),
    "skip without guide": (["--guide_skip=True"], "guide_skip=True", "--guide=fixedstep"),
    "schedule without guide": (["--guide_schedule=linear"], "guide_schedule=linear", "--guide=fixedstep"),
    "share without teacher": (["--distill_share=0.5"], "distill_share=0.5", "--distill=MODEL"),
    "calibration without weights": (["--calibrate_tokens=0"], "calibrate_tokens=0", "--init_from=MODEL"),
    "no run to continue": (["--resume=auto", "--out_dir=out/nothing"], "out/nothing", "preset"),
    "seed": (["--seed=2e19"], "seed=2", "2^64"),
    "folder that is not UTF-8": (["--out_dir=" + os.fsdecode(b"a\xff")], "out_dir=a?", "UTF-8"),
    "no layers": (["--n_layer=0"], "n_layer=0", "at least 1"),
    "gate of smear": (["--n_embd=8", "--n_head=1", "--smear=True"], "n_embd=8", "smear"),
    "gate of values": (["--n_embd=12", "--n_head=1", "--value_embeddings=True"], "n_embd=12", "value_embeddings"),
    "missing preset": (["config/quickstar.py"], "quickstar.py", "config/quickstart.py"),
    "a word": (["m"], "m", "preset"),
    "size after recipe": (["config/recipe.py", "config/s.py"], "lr=0.0006 of config/s.py", "the size first"),
}


def test_what_has_no_effect_is_refused_on_the_command_line_alone(tmp_path):
    structured = preset(tmp_path, 'ffn = "lowrank"\nrank = 16\nguide = "fixedstep"\nguide_ratio = 0.4\n')
    cfg, = config.load([structured, "--ffn=dense", "--guide=off", "--rank=16", "--rank=0", "--nblocks=0"])
    assert (cfg.rank, cfg.guide_ratio) == (0, 0.4)
    assert config.load([structured, "--guide_ratio=0.3", "--rank=8"])[0].rank == 8
    assert config.load(["--ffn=blockdense", "--rank=8", "--nblocks=2", "--distill=a", "--distill_share=0.5"])
    assert config.load(["--init_from=a", "--calibrate_tokens=0"])[0].calibrate_tokens == 0
    assert "rank=8" in refusal([structured, "--ffn=dense", "--guide=off", "--rank=8"])


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_names_the_value_and_what_would_do(name):
    argv, value, accepted = MISTAKES[name]
    text = refusal(argv)
    assert value in text and accepted in text, text
    assert "\n" not in text and text.endswith((".", "?")) and len(text) <= 400, text


@pytest.mark.parametrize("script, argv", [
    ("train.py", ["--n_layr=3"]), ("train.py", ["--ffn=lowrank", "--dry_run=True"]), ("train.py", ["--n_head=7"]),
    ("train.py", ["--guide=fixedstep"]), ("train.py", ["--lr=fast"]), ("sample.py", ["out/x", "--temperature=-1"]),
    ("sample.py", ["out/x", "--temprature=1"]), ("sample.py", []), ("sample.py", ["out/x", "--device=tpu"]),
    ("export.py", ["out/x", "--out_dir=hf/x", "--device=meta"]), ("sample.py", ["out/x", "--device=cpu:7"]),
    ("prepare.py", ["--tokenizer=nonsense"]),
    ("bench.py", ["train", "--ffn=blockshuffle", "--nblocks=5"]), ("train.py", ["nowhere/x.py"])],
    ids=lambda v: " ".join(v) if type(v) is list else v)
def test_a_mistake_ends_with_status_2_before_torch_loads(without_torch, script, argv):
    assert_one_sentence(*without_torch(script, *argv))


def test_a_misspelt_preset_key_ends_with_status_2_before_torch_loads(without_torch, tmp_path):
    status, out, err = without_torch("train.py", preset(tmp_path, "n_layers = 3\n"))
    assert_one_sentence(status, out, err)
    assert "did you mean n_layer?" in err


@pytest.mark.parametrize("rank, alone, waited", [("0", False, []), ("1", False, [10.0]), ("1", True, [])])
def test_under_torchrun_rank_0_speaks_for_all(monkeypatch, capsys, rank, alone, waited):
    """Other ranks leave it time to, silently, and speak if it has not ended them by then."""
    def main(argv):
        raise UserError("no.", alone)
    waits = []
    monkeypatch.setattr(config.time, "sleep", lambda seconds: waits.append((seconds, capsys.readouterr().err)))
    monkeypatch.setenv("RANK", rank)
    assert pytest.raises(SystemExit, config.run, main).value.code == 2 and capsys.readouterr().err == "error: no.\n"
    assert waits == [(seconds, "") for seconds in waited]


def test_help_lists_every_field_with_default_and_unit(without_torch):
    status, out, err = without_torch("train.py", "--help")
    assert status == 0 and not err
    lines = {line.strip().partition("=")[0]: line for line in out.splitlines() if line.startswith("  --")}
    for field in dataclasses.fields(Config):
        head, _, comment = lines[f"--{field.name}"].strip().partition(" ")
        assert head == f"--{field.name}={field.default}".partition(" ")[0] and len(comment.strip()) > 5, field.name
    assert "--dry_run" in lines and "rank of" not in lines and "dense | lowrank" in lines["--ffn"]


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_random_command_lines_are_accepted_or_refused_in_a_sentence(tmp_path):
    rng = random.Random(0)
    names = [f.name for f in dataclasses.fields(Config)] + ["n_layr", "", "-", "__class__", "é", "a b"]
    values = ["0", "1", "-1", "2", "3", "8", "64", "1e400", "nan", "1" + "0" * 500, "9" * 5000, "2**3", "True", "false",
              "auto",
              "None", "", "=", "(", "()", "(1,2)", "(0.9,0.99)", "[1]", "{}", "'a'", "lowrank", "blockshuffle",
              "blockdense",
              "fixedstep", "fixedflop", "cuda:1", "swiglu", "rmsnorm", "1or 2", "'\\d'", "\0", "1_000", "0x10", "b'x'",
              "1j",
              "...", "(" * 300, "é", "-" * 50, "0.5"]
    accepted = refused = 0
    for _ in range(1000):
        argv = ["".join(map(rng.choice, (["--", "--", "", "-"], names, ["=", "=", "=", ""], values)))
                for _ in range(rng.randrange(1, 4))]
        try:
            cfg, = config.load(argv)
            assert config.from_dict(config.to_dict(cfg)) == cfg
            accepted += 1
        except UserError as e:
            assert str(e).strip() and "\n" not in str(e) and len(str(e)) <= 400, (argv, str(e))
            refused += 1
    assert accepted > 20 and refused > 500
    for _ in range(300):
        text = "\n".join(rng.choice(names) + rng.choice([" = ", "=", " "]) + rng.choice(values) for _ in range(2))
        try:
            config.load([preset(tmp_path, text)])
        except UserError as e:
            assert "\n" not in str(e), text


# ----------------------------------------------------------------------------------------------------------------------
# Paths, and text files

def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch, tmp_path):
    """A shell leaves it alone after `=`, and a preset knows none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {"data_dir": "~/d", "out_dir": "~/o", "input": "~/a.txt,x/b.txt,~/c*.txt", "val_input": "~/v.txt",
             "tokenizer": "~/t.model",
             "dataset": "~/set", "init_from": "~/m.pt"}
    expected = {name: text.replace("~", str(tmp_path)) for name, text in paths.items()}
    from_command, = config.load([f"--{name}={text}" for name, text in paths.items()])
    from_preset, = config.load([preset(tmp_path, "".join(f"{name} = {text!r}\n" for name, text in paths.items()))])
    from_home, = config.load(["~/mine.py"])
    for cfg in (from_command, from_preset, from_home):
        assert {name: getattr(cfg, name) for name in paths} == expected
    assert config.load(["--wandb_project=~x", "--data_dir=a~b"])[0].wandb_project == "~x"


def test_every_script_expands_its_paths():
    """Each text setting whose help speaks of a file or a folder."""
    import bench
    import prepare
    import sample
    import train
    texts = {}
    for cls in (Config, train.Settings, prepare.Settings, sample.Settings, bench.Settings):
        for line in config._help([cls], "").splitlines()[1:]:
            name, _, comment = line.strip().removeprefix("--").partition("=")
            texts[name] = comment
    fields = {f.name: f.type for cls in (Config, sample.Settings, bench.Settings, prepare.Settings)
              for f in dataclasses.fields(cls)}
    speak = {name for name, comment in texts.items() if fields.get(name) is str
             and ("file" in comment or "folder" in comment)}
    assert {"data_dir", "out_dir", "input", "prompt_file", "prompts", "out", "json", "plot"} <= speak
    assert speak <= config.PATHS


def test_a_preset_is_read_as_all_text_is(tmp_path):
    (tmp_path / "mine.py").write_bytes(b"\xef\xbb\xbfn_layer = 3\r\nn_head = 3\r\n")
    cfg, = config.load([str(tmp_path / "mine.py")])
    assert (cfg.n_layer, cfg.n_head) == (3, 3)
    (tmp_path / "latin.py").write_bytes(b"n_layer = 3  # caf\xe9")
    assert "latin.py is not UTF-8 text (byte 18)" in refusal([tmp_path / "latin.py"])


def test_the_hint_at_a_preset_is_a_path_that_works_from_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = refusal(["config/quickstart.py"])
    hint = text.partition("did you mean ")[2].removesuffix("?")
    assert hint != "config/quickstart.py" and config.load([hint])[0].ffn == "lowrank"
    assert "config/zzzzzz.py, no such .py file: settings are --name=value" in refusal(["config/zzzzzz.py"])
    (tmp_path / "zzz.txt").write_text("n_layer = 2\n")
    assert "zzz.txt, no such .py file" in refusal(["zzz.txt"])
    assert refusal(["quickstart"]).endswith(f"did you mean {hint}?")  # its name alone


def test_numbers_in_short():
    assert [config.short(n) for n in (0, 999, 1234567, 1.06e9, 2.2e13)] == ["0", "999", "1.23M", "1.06B", "22T"]
    assert [config.short(n, "G") + "B" for n in (353e6, 1.06e9)] == ["353MB", "1.06GB"]


# ----------------------------------------------------------------------------------------------------------------------
# Streams and statuses

def test_an_interrupted_script_ends_with_the_signals_status(capsys):
    for args, status in (((), 130), ((signal.SIGTERM,), 143)):
        def main(argv):
            raise KeyboardInterrupt(*args)
        assert pytest.raises(SystemExit, config.run, main).value.code == status
        assert capsys.readouterr().err == "interrupted.\n"


@pytest.mark.parametrize("script, argv", [("train.py", ["--vocab_size=257", "--dry_run=True"]), ("bench.py", ["train"]),
                                          ("sample.py", ["out/x"]), ("export.py", ["out/x", "--to=hf/x"])])
@pytest.mark.parametrize("indent", ["", "class Name:\n def __set_name__(self, *_):\n  "], ids=["module", "class"])
def test_ctrl_c_while_torch_loads_is_one_line(script, argv, indent, tmp_path):
    """Python 3.11 makes a RuntimeError of one that comes while a class is made."""
    (tmp_path / "torch.py").write_text(f"import os, signal, time\n{indent}os.kill(os.getpid(), signal.SIGINT);"
                                       "time.sleep(9)\nclass Made: name = Name()\n")
    done = subprocess.run([sys.executable, str(ROOT / script), *argv], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)},  # a suite in the background ignores Ctrl-C
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert done.returncode in (-signal.SIGINT, 130) and (done.stdout, done.stderr) == ("", "interrupted.\n")


FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")


@FULL
@pytest.mark.parametrize("argv, unbuffered", [
    (["train.py", "--help"], ""), (["train.py", *TINY, "--vocab_size=257", "--dry_run=True"], ""),
    (["train.py", "--help"], "1"), (["bench.py", "--help"], ""), (["sample.py", "--help"], "1"),
    (["prepare.py", "--help"], "")], ids=lambda v: f"{v[0]} {v[-1]}" if v and v != "1" else v)
def test_a_full_output_is_one_sentence_in_every_script(argv, unbuffered):
    """The failure comes with the print, or when the buffer is flushed at the end."""
    with open("/dev/full", "w") as full:
        process = start(*argv, stdout=full, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
        assert_stream_sentence(process.wait(60), process.stderr.read(), "the output cannot be written (No space left")
        process.stderr.close()


def closed_pipe():
    """The end to write of a pipe whose reader has ended."""
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("script", ["train.py", "bench.py", "prepare.py", "sample.py", "export.py"])
def test_a_closed_pipe_ends_every_script_quietly(script, unbuffered):
    """As in `--help | head -1`: the failure comes with the print, or when the buffer is flushed at the end."""
    with closed_pipe() as pipe:
        process = start(script, "--help", stdout=pipe, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 141)


@pytest.mark.parametrize("call, status, err", [
    ("sys.exit(75)", 75, ""), ("sys.exit(0)", 141, ""),
    ("(_ for _ in ()).throw(config.UserError('no.'))", 2, "error: no.\n")])
def test_after_a_closed_pipe_a_mistake_and_a_saved_run_keep_their_status(call, status, err):
    code = f"import config, sys; config.run(lambda argv: (print('text'), {call}))"
    with closed_pipe() as pipe:
        done = subprocess.run([sys.executable, "-c", code], stdout=pipe, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                              env={**os.environ, "PYTHONUNBUFFERED": ""})
    assert (done.returncode, done.stderr) == (status, err)


def test_a_closed_output_is_one_sentence():
    command = f"exec {sys.executable} {ROOT / 'train.py'} --dry_run=True --vocab_size=9 >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True)
    assert_stream_sentence(done.returncode, done.stderr, "standard output is closed")


def test_an_output_without_the_letters_is_one_sentence():
    code = "import config; config.run(lambda argv: print('caf\\xe9'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert_stream_sentence(done.returncode, done.stderr,
                           "cannot show '\\xe9' in its encoding ascii: set PYTHONIOENCODING=utf-8")


@pytest.mark.parametrize("error, words", [
    (MemoryError(), "MemoryError"), (RuntimeError("\n at 12:4:\n  no\n"), "RuntimeError: at 12:4: no"),
    (ValueError("a " * 100), "ValueError: " + "a " * 52 + "...")])
def test_the_reason_of_a_librarys_error_is_one_short_line(error, words):
    assert config.reason(error) == words and len(words) <= 120


def test_an_error_of_ours_stays_a_traceback():
    for code in ("open('/nowhere')", "'\\xe9'.encode('ascii')", "1 / 0",
                 "(_ for _ in ()).throw(BrokenPipeError(32, 'of a library'))"):
        done = subprocess.run([sys.executable, "-c", f"import config; config.run(lambda argv: {code})"],
                              capture_output=True, text=True,
                              cwd=ROOT)
        assert done.returncode == 1 and "Traceback" in done.stderr
