"""train.RecordedStep: the step as a CUDA graph is train_step, to the bit."""
import os
import signal
import subprocess
import sys

import pytest
import torch

import device
import model as model_file
import train
from conftest import ROOT, train_run
from device import Ranks, Upload
from model import GPT, build
from runs import ALONE, RUNS, assert_same_run, metrics, tiny

POISON = 255  # a batch of this token alone has a loss of inf
CUDA = torch.cuda.is_available()
MUON = ["--optimizer=muon", "--lr=0.02", "--embed_lr=0.3", "--head_lr=0.008", "--vector_lr=0.005", "--skip_lr=0.5",
        "--norm=rmsnorm", "--bias=False", "--act=relu2", "--tie_embeddings=False", "--qk_norm=1.2", "--embed_norm=True",
        "--embed_skip=True", "--value_embeddings=True", "--smear=True", "--logit_softcap=15", "--init=zero"]
GUIDED = ["--ffn=blockshuffle", "--nblocks=4", "--guide=fixedstep", "--guide_ratio=0.5"]


class Replay:
    """Stands for a CUDA graph: recording leaves all numbers as they were, a replay leaves its gradients where the first
    one did."""

    def __init__(self, run, model, optimizer):
        self.run, self.params, self.grads, self.replays = run, list(model.parameters()), {}, 0
        states = [t for state in optimizer.state.values() for k, t in state.items() if k != "step"]
        tensors = [t.data for t in (*self.params, *states)]
        before = [t.clone() for t in tensors]
        self.replay()
        for t, old in zip(tensors, before, strict=True):
            t.copy_(old)
        self.replays = 0

    def replay(self):
        assert all(p.grad is self.grads.get(p) for p in self.params) or not self.replays, "a gradient has moved"
        for p in self.params:
            p.grad = None  # a graph overwrites
        self.run()
        for p in self.params:
            if p.grad is not None:
                p.grad = self.grads[p] = self.grads[p].copy_(p.grad) if p in self.grads else p.grad
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch):
    """Steps on the CPU are recorded by stand-ins, which are listed here. MixedAdamW stands for torch's AdamW."""
    made, last, real = [], [], train.make_optimizer

    def make_optimizer(cfg, model, ranks):
        last[:] = model, real(cfg, model, ranks)
        return last[1]

    def record(run, warm):
        assert not warm
        made.append(Replay(run, *last))
        return made[-1]

    monkeypatch.setattr(model_file.ops, "ON", False)  # the stand-in's gradients are not where AdamW's kernel reads
    monkeypatch.setattr(train, "AdamW", lambda *args, **kwargs: train.MixedAdamW(*args, mixed=False, **kwargs))
    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    monkeypatch.setattr(train, "record_graph", record)
    monkeypatch.setattr(train.RecordedStep, "is_possible", lambda self, *_: not self.failed)
    return made


def steps(cfg, ranks, call, n=15, switch=6):
    """n steps, of which the first `switch` are guided -> (losses, norms, weights, the graphs)."""
    model = build(cfg, ranks.device, 1)
    guided = tuple(range(cfg.n_dense_layers, cfg.n_layer)) if cfg.guide != "off" else ()
    for _, module in model.structured_linears() if guided else ():
        module.start_guide()
    if ranks.compile:
        model.compile_parts()
    optimizer, alpha = train.make_optimizer(cfg, model, ranks), torch.ones((), device=ranks.device)
    recorded = train.RecordedStep()
    generator, losses, norms = torch.Generator().manual_seed(0), [], []
    for step in range(n):
        if step == switch and guided:
            recorded.forget(optimizer)
            model, optimizer = train.end_guide(cfg, None, ranks, model, optimizer)
        batch = torch.randint(cfg.vocab_size, (2, 2, cfg.block_size + 1), generator=generator).to(ranks.device)
        if cfg.optimizer == "muon":
            optimizer.momentum, optimizer.decay = 0.8 + 0.01 * step, 0.1 + 0.01 * step
        keys = train.dropout_keys(cfg, step, ranks).to(ranks.device) if cfg.dropout else None
        alpha.fill_(1 - step / n)
        loss, norm = (recorded if call == "recorded" else train.train_step)(
            model, optimizer, batch, cfg, ranks, 1e-3 * (step + 1), alpha, guided if step < switch else (), keys)
        losses.append(loss)
        norms.append(norm)
    graph = recorded.graph
    recorded.forget(optimizer)
    counts = [int(s["step"]) for s in optimizer.state.values() if "step" in s]
    return torch.stack(losses), torch.stack(norms), {n: p.detach() for n, p in model.named_parameters()}, counts, graph


def assert_equal(a, b):
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[3] == b[3]
    assert a[2].keys() == b[2].keys() and all(torch.equal(t, b[2][name]) for name, t in a[2].items())


@pytest.mark.parametrize("flags", [MUON, [*GUIDED, "--dropout=0.1"], [*MUON, *GUIDED]], ids=["muon", "guided", "both"])
def test_what_a_graph_repeats_is_the_step(flags, graphs):
    """On the CPU; a stand-in for the graph repeats the recorded function."""
    cfg = tiny(*flags, "--batch_size=4", "--micro_batch_size=2")
    plain, graph = steps(cfg, ALONE, "plain"), steps(cfg, ALONE, "recorded")
    assert graph[4] is graphs[-1] and [g.replays for g in graphs] == ([3, 3] if cfg.guide != "off" else [12])
    assert_equal(graph, plain)


@pytest.mark.parametrize("stop", [0, 9, 19], ids=["whole", "stopped while guided", "stopped after"])
@pytest.mark.parametrize("name", ["always", "guided", "muon"])
def test_a_run_of_graphs_is_the_run(name, stop, graphs, data, tmp_path, monkeypatch):
    """36 steps; a checkpoint every 4, a validation every 5, dropout, a step that is not finite: to the bit."""
    flags = [*RUNS[name], "--max_tokens=3072", "--dropout=0.1", "--save_interval=4", "--eval_interval=5",
             "--resume=auto"]
    real, loss_of, out = train.batches, GPT.forward, tmp_path / "run"

    def batches(cfg, plan, token_file, n_windows, steps, ranks):
        for step, batch in zip(steps, real(cfg, plan, token_file, n_windows, steps, ranks)):
            if step == stop - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch if step not in (8, 22) else torch.full_like(batch, POISON)

    def forward(self, tokens, *rest, **kw):
        return loss_of(self, tokens, *rest, **kw) + torch.where((tokens == POISON).all(), torch.inf, 0.0)

    monkeypatch.setattr(train, "batches", batches)
    monkeypatch.setattr(GPT, "forward", forward)
    if stop:
        with pytest.raises(SystemExit):
            train_run(out, data, *flags)
        assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == stop
        stop = 0  # no signal any more
    train_run(out, data, *flags)
    assert sum(g.replays for g in graphs) > 5
    monkeypatch.setattr(train.RecordedStep, "is_possible", lambda *_: False)
    assert_same_run(out, train_run(tmp_path / "plain", data, *flags))
    assert [row["step"] for row in metrics(out) if "skipped" in row] == [9, 23]


def test_when_a_step_is_recorded(monkeypatch):
    """The fourth of a kind; another set of guided layers begins anew; what fails is said once and trains on."""
    seen, lines = [], []
    monkeypatch.setattr(train, "train_step", lambda *args: seen.append(args[7]) or (0, 0))
    monkeypatch.setattr(train, "record_graph", lambda run, warm: 1 / 0 if warm else fail())

    def fail():
        raise RuntimeError  # without a message
    recorded = train.RecordedStep(lines.append)
    monkeypatch.setattr(train.RecordedStep, "is_possible", lambda self, *_: not self.failed)
    cfg = tiny()
    model = build(cfg, torch.device("cpu"), 1)
    optimizer, batch = train.MixedAdamW(model.parameters(), 1e-3, (0.9, 0.95), 0.1), torch.zeros(1, 2, 17).long()
    for guided in ((1,), (1,), (1,), (), (), ()):
        recorded(model, optimizer, batch, cfg, ALONE, 1e-3, None, guided)
    assert not lines and recorded.calls == 3
    for _ in range(25):
        recorded(model, optimizer, batch, cfg, ALONE, 1e-3)
    assert lines == ["training without a CUDA graph, whose recording failed: RuntimeError"]
    assert len(seen) == 31


def test_a_validation_that_does_not_fit_beside_a_graph_ends_the_graph(graphs, data, tmp_path, monkeypatch, capsys):
    """Once, after step 5 of 8; the final validation is without one in any case. The run is the same to the bit."""
    kept, seen, real = [], [], train.evaluate

    class Kept(train.RecordedStep):
        def __init__(self, say):
            super().__init__(say)
            kept[:] = [self]

    def evaluate(*args, **kw):
        seen.append(kept[0].graph is not None)
        if seen[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*args, **kw)

    monkeypatch.setattr(train, "RecordedStep", Kept)
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", evaluate)
        out = train_run(tmp_path / "run", data, "--eval_interval=5")
    assert seen == [True, False, False] and [g.replays for g in graphs] == [2]
    assert capsys.readouterr().out.count("training without a CUDA graph: the memory does not hold it") == 1
    again = train_run(tmp_path / "again", data, "--eval_interval=5")
    assert len(graphs) == 2 and graphs[1].replays == 5 and kept[0].graph is None
    assert_same_run(out, again)


def test_other_errors_of_a_validation_are_raised():
    recorded, calls = train.RecordedStep(), []
    recorded.graph = object()

    def fail():
        calls.append(1)
        raise RuntimeError(words)

    for words in ("CUDA error: an illegal memory access was encountered", "CUDA out of memory."):
        with pytest.raises(RuntimeError, match=words):
            recorded.beside(None, fail)
        recorded.graph = None
    assert len(calls) == 2


def test_a_recording_whose_end_fails_leaves_the_stream_as_it_was(monkeypatch):
    """torch.cuda.graph leaves its stream only after a good end: all further steps would run there."""
    now = ["training"]

    class Context:
        def __init__(self, name, fails=False):
            self.name, self.fails = name, fails

        def __enter__(self):
            self.before, now[0] = now[0], self.name

        def __exit__(self, *_):
            if self.fails:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            now[0] = self.before

    for name, value in (("CUDAGraph", object), ("stream", Context), ("current_stream", lambda: now[0]),
                        ("graph", lambda *_, **kw: Context("recording", fails=True))):
        monkeypatch.setattr(torch.cuda, name, value)
    with pytest.raises(RuntimeError, match="previous error"):
        device.record_graph(lambda: now.append(now[0]), warm=False)
    assert now == ["training", "recording"]


@pytest.mark.skipif(not CUDA, reason="needs a CUDA card")
def test_on_a_card_a_failed_recording_leaves_the_stream_as_it_was():
    """In a process of its own: torch's allocator takes the recording for one that goes on."""
    script = """
import torch, device
here = torch.cuda.current_stream()
try:
    device.record_graph(lambda: torch.ones(3, device="cuda").sum().item(), warm=False)
except RuntimeError:
    assert torch.cuda.current_stream() == here
    assert (2 * torch.ones(3, device="cuda")).sum().item() == 6
    print("fine")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.skipif(not CUDA, reason="needs a CUDA card")
@pytest.mark.parametrize("flags", [MUON, [], [*GUIDED, "--dropout=0.1"], [*MUON, *GUIDED, "--guide_ratio=0.5"]],
                         ids=["muon", "adamw", "guided", "both"])
def test_on_a_card_the_graph_is_the_step(flags):
    cfg = tiny(*flags, "--batch_size=4", "--micro_batch_size=2", "--n_embd=128", "--n_head=2")
    ranks = Ranks(0, 1, torch.device("cuda"), torch.bfloat16, True)
    torch._dynamo.reset()
    plain, graph = steps(cfg, ranks, "plain"), steps(cfg, ranks, "recorded")
    assert isinstance(graph[4], torch.cuda.CUDAGraph)
    assert_equal(graph, plain)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="no card"))])
def test_numbers_reach_the_device_in_order(device):
    """Each before the next takes its place, also while the device is busy and the host ahead of it."""
    upload, seen = Upload(torch.zeros(3, dtype=torch.int64, device=device)), []
    if device == "cuda":
        torch.cuda._sleep(10**8)
    for i in range(3 * Upload.TURNS):
        part = upload([[i], [2**40 - i]])
        seen += [part.clone(), upload.tensor.clone()]
    assert [t.tolist() for t in seen[::2]] == [[[i], [2**40 - i]] for i in range(3 * Upload.TURNS)]
    assert [t.tolist() for t in seen[1::2]] == [[i, 2**40 - i, 0] for i in range(3 * Upload.TURNS)]
