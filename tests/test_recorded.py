"""train.RecordedStep: the step as a CUDA graph is train_step, to the bit."""
import pytest
import torch

import model as model_file
import train
from device import Ranks, Upload
from model import build
from runs import ALONE, tiny

CUDA = torch.cuda.is_available()
MUON = ["--optimizer=muon", "--lr=0.02", "--embed_lr=0.3", "--head_lr=0.008", "--vector_lr=0.005", "--skip_lr=0.5",
        "--norm=rmsnorm", "--bias=False", "--act=relu2", "--tie_embeddings=False", "--qk_norm=1.2", "--embed_norm=True",
        "--embed_skip=True", "--value_embeddings=True", "--smear=True", "--logit_softcap=15", "--init=zero"]
GUIDED = ["--ffn=blockshuffle", "--nblocks=4", "--guide=fixedstep", "--guide_ratio=0.5"]


class Replay:
    """Stands for a CUDA graph: recording leaves all numbers as they were, replaying writes gradients in place."""

    def __init__(self, run, tensors):
        before = [t.clone() for t in tensors()]
        run()
        for t, old in zip(tensors(), before, strict=True):
            t.copy_(old)
        self.run, self.replays = run, 0

    def replay(self):
        self.replays += 1
        self.run()


def steps(cfg, ranks, call, n=12, switch=6, monkeypatch=None):
    """n steps, of which the first `switch` are guided -> (losses, norms, weights, the graphs)."""
    model = build(cfg, ranks.device, 1)
    guided = tuple(range(cfg.n_dense_layers, cfg.n_layer)) if cfg.guide != "off" else ()
    for _, module in model.structured_linears() if guided else ():
        module.start_guide()
    if ranks.compile:
        model.compile_parts()
    optimizer, graphs, alpha = train.make_optimizer(cfg, model, ranks), [], torch.ones((), device=ranks.device)
    if monkeypatch:
        def record(run, warm):
            assert not warm

            def tensors():
                with torch.no_grad():
                    states = [t for s in optimizer.state.values() for k, t in s.items() if k != "step"]
                    return [p.data for p in model.parameters()] + states

            def once():
                for p in model.parameters():
                    p.grad = None  # a graph overwrites
                run()
            graphs.append(Replay(once, lambda: [t.detach() for t in tensors()]))
            return graphs[-1]
        monkeypatch.setattr(train, "record_graph", record)
        monkeypatch.setattr(train.RecordedStep, "is_possible", lambda *_: True)
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
def test_what_a_graph_repeats_is_the_step(flags, monkeypatch):
    """On the CPU; a stand-in for the graph repeats the recorded function. Its gradients move, unlike a graph's."""
    monkeypatch.setattr(model_file.ops, "ON", False)
    cfg = tiny(*flags, "--batch_size=4", "--micro_batch_size=2")
    monkeypatch.setattr(train, "AdamW", lambda *args, **kwargs: train.MixedAdamW(*args, mixed=False, **kwargs))
    plain, graph = steps(cfg, ALONE, "plain"), steps(cfg, ALONE, "recorded", monkeypatch=monkeypatch)
    assert graph[4].replays == (3 if cfg.guide != "off" else 9)
    assert_equal(graph, plain)


def test_when_a_step_is_recorded(monkeypatch):
    """The fourth of a kind; another set of guided layers begins anew; what fails is said once and trains on."""
    seen, lines = [], []
    monkeypatch.setattr(train, "train_step", lambda *args: seen.append(args[7]) or (0, 0))
    monkeypatch.setattr(train, "record_graph", lambda run, warm: 1 / 0 if warm else fail())

    def fail():
        raise RuntimeError("CUDA error: operation not permitted\nmore")
    recorded = train.RecordedStep(lines.append)
    monkeypatch.setattr(train.RecordedStep, "is_possible", lambda self, *_: not self.failed)
    cfg = tiny()
    model = build(cfg, torch.device("cpu"), 1)
    optimizer, batch = train.MixedAdamW(model.parameters(), 1e-3, (0.9, 0.95), 0.1), torch.zeros(1, 2, 17).long()
    for guided in ((1,), (1,), (1,), (), (), ()):
        recorded(model, optimizer, batch, cfg, ALONE, 1e-3, None, guided)
    assert not lines and recorded.calls == 3
    for _ in range(5):
        recorded(model, optimizer, batch, cfg, ALONE, 1e-3)
    assert lines == ["training without a CUDA graph, whose recording failed: CUDA error: operation not permitted"]
    assert len(seen) == 11


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
    upload, seen = Upload(torch.zeros(2, dtype=torch.int64, device=device)), []
    if device == "cuda":
        torch.cuda._sleep(10**8)
    for i in range(3 * Upload.TURNS):
        upload([i, 2**40 - i])
        seen.append(upload.tensor.clone())
    assert [t.tolist() for t in seen] == [[i, 2**40 - i] for i in range(3 * Upload.TURNS)]
