"""ops: kernels that do not load, compile or run leave plain torch, the same numbers, and one line in the log."""
import copy
import importlib.util
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import config
from config import Config
from conftest import ROOT
from decode import Prompts
from model import Cache, build
from ops import chain, fallback, megakernel
from optim import MixedAdamW, Muon

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
DTYPE = torch.float16 if INTERPRET else torch.bfloat16
TRITON = importlib.util.find_spec("triton") is not None
RUNS = TRITON and (INTERPRET or DEVICE == "cuda")
KERNELS = pytest.mark.skipif(not RUNS, reason="needs CUDA or TRITON_INTERPRET=1")
FAILS = "plain torch instead of a fused kernel, which fails here: RuntimeError: PassManager::run failed"


@pytest.fixture(autouse=True)
def nothing_was_tried(monkeypatch):
    monkeypatch.setattr(fallback, "_tried", {})
    monkeypatch.setattr(fallback, "_logged", set())


@pytest.fixture
def lines(caplog):
    """What ops logged so far."""
    caplog.set_level(logging.WARNING, logger="ops")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "ops"]


def test_a_trial_runs_once_and_its_failure_is_one_line(lines):
    calls = []

    def trial():
        calls.append(1)
        raise RuntimeError("\n  PassManager::run failed  \nat line 3" + 50 * " !")

    assert not fallback.works("op", trial) and not fallback.works("op", trial) and len(calls) == 1
    assert fallback.works("op", lambda: None, 64) and not fallback.works("op", trial, 128)
    line, = lines()
    assert line.startswith(f"op: {FAILS} at line 3 ! !") and line.endswith("! ...") and len(line) < 200


@pytest.mark.skipif(not TRITON, reason="needs triton")
@pytest.mark.parametrize("lacking", ["sys.modules['triton.tools.tensor_descriptor'] = None", "del triton.knobs"])
def test_a_triton_that_lacks_what_the_kernels_use(lacking):
    code = f"""import sys, torch._dynamo, triton
{lacking}
import ops, model
assert ops.ON is False
print(model.add_norm(torch.ones(2, 4), None, torch.nn.LayerNorm(4))[1].sum().item())"""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (0, "0.0\n"), done.stderr
    assert done.stderr.startswith("plain torch instead of all fused kernels, which do not load here: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_megakernel_that_does_not_compile(monkeypatch, lines):
    def fail(defines, device):
        raise RuntimeError("megakernel.cu(7): error: expected a ';'")

    monkeypatch.setattr(megakernel, "planned", lambda model, cache: SimpleNamespace(defines="", device=None))
    monkeypatch.setattr(megakernel, "compiled", fail)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    assert megakernel.step_for(None, None) is None and megakernel.step_for(None, None) is None
    assert lines() == ["decoding step of a few sequences: plain torch instead of a fused kernel, which fails here: "
                       "RuntimeError: megakernel.cu(7): error: expected a ';'"]
    monkeypatch.setattr(megakernel, "compiled", lambda defines, device: None)
    monkeypatch.setattr(fallback, "_tried", {})
    assert megakernel.step_for(None, None).defines == ""


def test_a_chain_that_does_not_compile(monkeypatch, lines):
    def fail(kernel, device):
        raise RuntimeError("chain.cu(7): error: expected a ';'")

    step = SimpleNamespace(first="embed", kernels=[("linear", None)], device=None)
    cache = SimpleNamespace(position=[0] * 8)
    monkeypatch.setattr(chain, "usable", lambda model, batch: batch == 8)
    monkeypatch.setattr(chain, "Step", lambda model, cache: step)
    monkeypatch.setattr(chain, "compiled_ahead", fail)
    assert chain.step_for(None, cache) is None and chain.step_for(None, cache) is None
    assert lines() == ["decoding step of 5 to 64 sequences: plain torch instead of a fused kernel, which fails here: "
                       "RuntimeError: chain.cu(7): error: expected a ';'"]
    assert chain.step_for(None, SimpleNamespace(position=[0] * 9)) is None


# ----------------------------------------------------------------------------------------------------------------------
# One kernel fails

class Broken:
    """A kernel whose launch fails, as that of a Triton which cannot compile it."""

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **kwargs):
        raise RuntimeError("PassManager::run failed")


def train_step(model, tokens):
    """(loss, gradients, how far the weights moved) of one step of a copy of the model."""
    model, before = copy.deepcopy(model), model.parameters()
    optimizer = MixedAdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    with torch.autocast(DEVICE, DTYPE):
        loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    optimizer.step(1.0)
    moved = [(optimizer.master(p).detach() - q).abs().max().item() for p, q in zip(model.parameters(), before)]
    return loss.item(), [p.grad.double() for p in model.parameters()], moved


def small():
    cfg = Config(n_layer=1, n_embd=64, n_head=2, block_size=16, vocab_size=61, ffn="lowrank", rank=32, n_dense_layers=0)
    config.check(cfg)
    return build(cfg, torch.device(DEVICE), seed=1)


@KERNELS
@pytest.mark.parametrize("op, kernels", [
    ("rotary positions", ["pointwise._rotate"]), ("residual add and norm", ["pointwise._add_norm"]),
    ("residual add and norm", ["pointwise._add_norm_backward"]),
    ("cross-entropy", ["pointwise._token_loss"]), ("AdamW", ["pointwise._adamw"]), ("structured FFN", ["ffn._matmul"]),
    ("", []),
    ("", ["pointwise._rotate", "pointwise._add_norm", "pointwise._token_loss", "pointwise._adamw", "ffn._matmul"])])
def test_training_goes_on_without_a_kernel_that_fails(op, kernels, monkeypatch, lines):
    import ops
    from ops import ffn
    monkeypatch.setattr(ffn, "MIN_TOKENS", 16)
    monkeypatch.setattr(ffn, "MIN_WORK", 0)
    model, tokens = small(), torch.randint(61, (1, 17), device=DEVICE)
    with monkeypatch.context() as plain:
        plain.setattr(ops, "ON", False)
        expected, gradients, _ = train_step(model, tokens)
    for kernel in kernels:
        monkeypatch.setattr(f"ops.{kernel}", Broken())
    for _ in range(2):
        loss, ours, moved = train_step(model, tokens)
        assert loss == pytest.approx(expected, rel=2e-3)
        assert all(((a - b).norm() / b.norm()).item() < (3e-2 if INTERPRET else 0.1) for a, b in zip(ours, gradients))
        assert moved == pytest.approx([1e-2] * len(moved), rel=1e-2)  # AdamW's first step is lr in size
    assert len(lines()) == len(kernels) and all(line.endswith(FAILS) for line in lines())
    assert all(line.startswith(op) for line in lines())
    assert len(fallback._tried) == 5 and ops.ON


@KERNELS
@pytest.mark.parametrize("kernel", ["_nesterov", "_descend"])
def test_muon_goes_on_without_a_kernel_that_fails(kernel, monkeypatch, lines):
    cfg, = config.load(["--n_layer=1", "--n_embd=64", "--n_head=2", "--vocab_size=61", "--optimizer=muon", "--lr=0.1"])
    model = build(cfg, torch.device(DEVICE), seed=1)
    optimizer, weight = Muon(model, cfg, mixed=True), model.blocks[0].attn.proj.weight
    before = optimizer.master(weight).clone()
    monkeypatch.setattr(f"ops.pointwise.{kernel}", Broken())
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(1.0)
    assert ((optimizer.master(weight) - before).norm() / 0.2).item() == pytest.approx(8, rel=1e-2)  # of 64 rows
    assert lines() == [f"Muon: {FAILS}"]


@KERNELS
@pytest.mark.parametrize("op, kernel", [
    ("attention of one token", "_attention"), ("linear on few tokens", "_linear"), ("sampling a token", "_sample")])
@torch.no_grad()
def test_decoding_goes_on_without_a_kernel_that_fails(op, kernel, monkeypatch, lines):
    import ops
    model, cache = small(), Cache(small().cfg, 1, 64, DEVICE, torch.float32)
    s = SimpleNamespace(temperature=0.8, top_k=0, top_p=1.0, min_p=0.0)
    token = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
    monkeypatch.setattr(megakernel, "step_for", lambda model, cache: None)
    assert ops.fused_step(model, cache) and ops.can_sample(token, s) and not lines()
    assert not any(t.any() for layer in cache.layers for t in layer) and not cache.position.any()
    monkeypatch.setattr(f"ops.decode.{kernel}", Broken())
    monkeypatch.setattr(fallback, "_tried", {})
    for _ in range(2):
        assert (ops.fused_step(model, cache) is None) is (kernel != "_sample")
        assert ops.can_sample(token, s) is (kernel != "_sample")
    assert lines() == [f"{op}: {FAILS}"]


@KERNELS
@torch.no_grad()
def test_prompts_are_stored_without_a_kernel_that_fails(monkeypatch, lines):
    model, tokens = small(), torch.arange(12, device=DEVICE)[None]
    expected, cache = (Cache(model.cfg, 3, 64, DEVICE, torch.float32) for _ in range(2))
    row, at = torch.tensor([[2] * 7 + [0] * 5, [*range(7), *range(5)]], device=DEVICE)
    ends = torch.tensor([0, 7, 12], dtype=torch.int32, device=DEVICE)
    model.store(tokens, Prompts(expected, row, at, ends, 7))
    monkeypatch.setattr("ops.decode._store", Broken())
    monkeypatch.setattr(fallback, "_tried", {})
    for _ in range(2):
        model.store(tokens, Prompts(cache, row, at, ends, 7))
    assert all(torch.equal(a, b) for a, b in zip(sum(cache.layers, ()), sum(expected.layers, ())))
    assert lines() == [f"storing prompts: {FAILS}"]
