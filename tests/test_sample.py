"""sample: filters on hand-made logits, where text ends, seeds, prompts, a bare model.pt, mistakes."""
import io
import shutil
import sys

import pytest
import torch

from conftest import LOWRANK, assert_one_sentence, train_run
from model import GPT, load
from decode import Decoder, Row, row_key, sample_token
from merge import prepare_model
from sample import Settings

P = torch.tensor([0.03, 0.5, 0.07, 0.25, 0.15])  # of five tokens


def drawn(n=40_000, **settings):
    """Frequencies of the five tokens in n draws."""
    tokens = sample_token(P.log().repeat(n, 1), Settings(**settings), torch.rand(n, generator=torch.Generator().manual_seed(0)))
    assert tokens.shape == (n,)
    return torch.bincount(tokens, minlength=5) / n


# ----------------------------------------------------------------------------------------------------------------------
# One draw

@pytest.mark.parametrize("settings, kept", [
    (dict(), [0, 1, 2, 3, 4]), (dict(top_k=2), [1, 3]), (dict(top_k=1), [1]), (dict(top_k=5), [0, 1, 2, 3, 4]),
    (dict(top_k=9), [0, 1, 2, 3, 4]), (dict(top_p=0.4), [1]), (dict(top_p=0.6), [1, 3]), (dict(top_p=0.76), [1, 3, 4]),
    (dict(top_p=1e-6), [1]), (dict(min_p=0.25), [1, 3, 4]), (dict(min_p=0.6), [1]), (dict(min_p=1.0), [1]),
    (dict(top_k=3, top_p=0.8), [1, 3]), (dict(top_k=4, min_p=0.2), [1, 3, 4])])
def test_filters_keep_what_they_say_in_proportion(settings, kept):
    """top_p comes after top_k: of the three likeliest 0.5 + 0.25 of 0.9 exceed 0.8."""
    expected = torch.zeros(5)
    expected[kept] = P[kept] / P[kept].sum()
    frequency = drawn(temperature=1.0, **settings)
    assert not frequency[expected == 0].any()
    torch.testing.assert_close(frequency, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_a_power_of_the_probabilities(temperature):
    expected = P ** (1 / temperature)
    torch.testing.assert_close(drawn(temperature=temperature), expected / expected.sum(), rtol=0, atol=0.01)


def test_temperature_0_takes_the_likeliest_and_rows_are_drawn_apart():
    logits = torch.randn(50, 30)
    assert torch.equal(sample_token(logits, Settings(temperature=0), None), logits.argmax(1))
    kept = logits.clone()
    assert torch.equal(sample_token(logits, Settings(top_k=1), torch.rand(50)), logits.argmax(1))
    sample_token(logits, Settings(temperature=1.0, top_k=2), torch.rand(50))
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-300])
@pytest.mark.parametrize("filters", [{}, dict(top_k=3), dict(top_p=0.9, min_p=0.1)])
def test_a_tiny_temperature_takes_the_likeliest_too(temperature, filters):
    logits = 30 * torch.randn(50, 30)
    assert torch.equal(sample_token(logits, Settings(temperature=temperature, **filters), torch.rand(50)), logits.argmax(1))


# ----------------------------------------------------------------------------------------------------------------------
# One text

@pytest.fixture(scope="module")
def finished(finished, tmp_path_factory):
    """A copy, since decode=auto leaves its table beside the model."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("sampled") / "finished")


@pytest.fixture(scope="module")
def gpt(finished):
    return prepare_model(load(str(finished), torch.device("cpu"))[0], "structured", torch.float32)


def script(monkeypatch, *ids):
    """Makes a model say these tokens."""
    def step(self, tokens, cache, lengths=None):
        cache.advance(1 if lengths is None else lengths)
        said = cache.position.tolist()
        return torch.nn.functional.one_hot(torch.tensor([ids[min(n, len(ids)) - 1] for n in said]), 257).float() * 100
    monkeypatch.setattr(GPT, "step", step)


def text(gpt, prompt, eos=256, seed=0, **settings):
    row = Row(prompt, row_key(seed, prompt))
    for _ in Decoder(gpt, Settings(**settings), 1, gpt.cfg.block_size, eos).run([row]):
        pass
    return row.new


def test_greedy_is_the_argmax_of_the_full_forward(gpt):
    got = text(gpt, [101, 116], temperature=0, max_new_tokens=8)
    tokens = [101, 116]
    for _ in range(8):
        tokens.append(gpt(torch.tensor([tokens]))[0, -1].argmax().item())
    assert got == tokens[2:] and got == text(gpt, [101, 116], temperature=0, max_new_tokens=8, seed=9)
    assert got == text(gpt, [101, 116], top_k=1, max_new_tokens=8)


def test_seeds_repeat_and_differ(gpt):
    texts = [text(gpt, [101], seed=seed, temperature=1.0, max_new_tokens=15) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 15


def test_a_text_ends_at_eos_at_the_limit_and_at_the_context(gpt, monkeypatch):
    assert len(text(gpt, [101] * 3, eos=-1)) == 13  # block_size 16
    script(monkeypatch, 5, 6, 256, 7)
    assert text(gpt, [1]) == [5, 6]
    assert text(gpt, [1], max_new_tokens=1) == [5]
    script(monkeypatch, *range(15))
    assert text(gpt, [1]) == list(range(15))
    assert text(gpt, list(range(15))) == [14]


# ----------------------------------------------------------------------------------------------------------------------
# The command

def test_the_command_streams_prompt_and_text(cli, finished, gpt):
    status, out, err = cli("sample.py", finished, "--prompt=the", "--temperature=0", "--max_new_tokens=6")
    assert status == 0 and not err
    assert out == "the" + bytes(text(gpt, list(b"the"), temperature=0, max_new_tokens=6)).decode(errors="replace") + "\n"


def test_the_end_of_the_context_is_told(cli, finished, monkeypatch):
    script(monkeypatch, *range(97, 113))
    status, _, err = cli("sample.py", finished, "--prompt=the")
    assert status == 0 and err == "the text ends here: it fills the model's context of 16 tokens.\n"
    assert not cli("sample.py", finished, "--prompt=the", "--max_new_tokens=3")[2]


def test_samples_differ_and_each_depends_on_seed_and_number_only(cli, finished):
    def samples(*argv):
        out = cli("sample.py", finished, "--prompt=the", "--temperature=1", *argv)[1]
        return [part.split("\n", 1)[1] for part in out.split("--- sample ")[1:]]
    three, two, other = samples("--n_samples=3"), samples("--n_samples=2"), samples("--n_samples=2", "--seed=7")
    assert len(three) == 3 and len(set(three)) == 3 and three[:2] == two and not set(two) & set(other)


def test_a_bare_model_file_is_enough(cli, finished, tmp_path, monkeypatch):
    expected = cli("sample.py", finished, "--prompt=a")
    shutil.copy(finished / "model.pt", tmp_path / "moved.pt")
    monkeypatch.chdir(tmp_path)
    assert cli("sample.py", "moved.pt", "--prompt=a") == expected and expected[0] == 0


def test_prompts_from_file_and_standard_input(cli, finished, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("née 中")
    expected = cli("sample.py", finished, "--prompt=née 中")
    assert expected[0] == 0 and expected[1].startswith("née 中")
    assert cli("sample.py", finished, f"--prompt_file={tmp_path / 'prompt.txt'}") == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("née 中"))
    assert cli("sample.py", finished, "--prompt_file=-") == expected


@pytest.mark.parametrize("prompt", ['"""A."""', "'x'", "None", "1e3", "[1, 2]", "a=b", "é中✓", "--x", " y\t"])
def test_a_prompt_is_taken_as_it_is(cli, finished, prompt):
    status, out, _ = cli("sample.py", finished, f"--prompt={prompt}", "--max_new_tokens=1")
    assert status == 0 and out.startswith(prompt)


def test_without_a_prompt_a_document_begins(cli, finished, gpt):
    out = cli("sample.py", finished, "--temperature=0", "--max_new_tokens=5")[1]
    assert out == bytes(text(gpt, [256], temperature=0, max_new_tokens=5)).decode(errors="replace") + "\n"


def test_a_character_that_spans_tokens_is_written_whole(cli, finished, monkeypatch):
    ids = list("é中".encode()) + [0xE4]
    script(monkeypatch, *ids, 256)
    assert cli("sample.py", finished, "--prompt=a", "--temperature=0")[1] == "aé中\ufffd\n"


def test_padding_of_the_vocabulary_is_never_sampled(cli, data, tmp_path):
    out = train_run(tmp_path / "padded", data, *LOWRANK, "--vocab_size=2000", "--max_tokens=128")
    assert load(str(out), torch.device("cpu"))[0].wte.weight.shape[0] == 2000
    for seed in range(3):
        assert cli("sample.py", out, "--temperature=100", f"--seed={seed}", "--prompt=a")[0] == 0


@pytest.mark.parametrize("argv, word", [
    (["--prompt=" + "a" * 16], "16 tokens"), (["--prompt_file=nowhere.txt"], "nowhere.txt"),
    (["--prompt=a", "--prompt_file=b"], "exclude"), (["--temperature=-1"], "temperature=-1"),
    (["--temperature=hot"], "temperature=hot"), (["--top_p=0"], "top_p=0"), (["--top_k=-1"], "top_k=-1"),
    (["--min_p=2"], "min_p=2"),
    (["--out=/no/such/folder/x.jsonl"], "/no/such/folder/x.jsonl"), (["--n_samples=0"], "n_samples=0"), (["--temprature=1"], "did you mean temperature?"), (["out/second"], "2 were given"),
    (["--device=cuda:99"], "cuda:99")])
def test_mistakes_are_one_sentence_and_status_2(cli, finished, argv, word):
    status, out, err = cli("sample.py", finished, *argv)
    assert_one_sentence(status, out, err)
    assert word in err


def test_mistakes_about_the_model_and_the_prompts_bytes(cli, finished, tmp_path):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    for argv, word in (([tmp_path / "none"], "does not exist"), ([tmp_path], "does not exist"),
                       ([finished / "ckpt.pt"], "tokenizer"), ([finished / "metrics.jsonl"], "damaged"),
                       ([finished, f"--prompt_file={tmp_path / 'latin1.txt'}"], "UTF-8"),
                       ([finished, f"--prompt_file={tmp_path}"], "cannot read")):
        status, out, err = cli("sample.py", *argv)
        assert_one_sentence(status, out, err)
        assert word in err
