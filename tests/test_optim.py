"""optim: clipping, AdamW on fp32 masters against AdamW in float64, sums over micro-batches; the fused update in Triton's interpreter or on CUDA."""
import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import config
import model as model_file
import optim
from conftest import STRUCTURES
from optim import AdamW, MixedAdamW, total_norm

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
KERNELS = pytest.mark.skipif(not (CUDA or os.environ.get("TRITON_INTERPRET") == "1") or importlib.util.find_spec("triton") is None,
                             reason="needs CUDA or TRITON_INTERPRET=1")
FUSED = pytest.param(True, marks=KERNELS)
SETTINGS = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


class Small(nn.Module):
    """Sizes that fill no whole chunk, or, even, sizes that 16 divides."""

    def __init__(self, even):
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Parameter(torch.randn(3, 4112 if even else 4097))
        self.blocks = nn.Parameter(torch.randn(2, 8, 16) if even else torch.randn(2, 5, 7))
        self.bias = nn.Parameter(torch.randn(48 if even else 33))
        self.sometimes = nn.Parameter(torch.randn(4, 4))


def draw_grads(params, step):
    g = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=g).to(torch.bfloat16) for p in params]


@pytest.mark.parametrize("fused", [False, FUSED])
@pytest.mark.parametrize("clip, even", [(0.0, False), (0.5, False), (0.5, True)])
def test_masters_follow_adamw_in_float64(fused, clip, even, monkeypatch):
    if not fused:
        monkeypatch.setattr("optim.ops.ON", False)
    small = Small(even).to(DEVICE)
    exact = [nn.Parameter(p.detach().double().cpu()) for p in small.parameters()]
    ours, theirs = MixedAdamW(small.parameters(), **SETTINGS), torch.optim.AdamW(exact, **SETTINGS)
    for step in range(4):
        params = list(small.parameters())
        for p, q, grad in zip(params, exact, draw_grads(exact, step)):
            skipped = p is small.sometimes and step % 2
            p.grad = None if skipped else grad.to(p)
            q.grad = None if skipped else grad.double()
        norm = torch.nn.utils.clip_grad_norm_(exact, clip or float("inf"))
        theirs.step()
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"]
        assert ours.step(clip).item() == pytest.approx(norm.item(), rel=1e-5)
        theirs.param_groups[0]["lr"] *= 0.9
        ours.param_groups[0]["lr"] *= 0.9
    for p, q in zip(small.parameters(), exact):
        torch.testing.assert_close(ours.master(p).detach().cpu().double(), q.detach(), rtol=1e-5, atol=1e-6)
        if p.dim() > 1:
            ulp = 2**-7 if fused and not CUDA else 0  # the interpreter truncates where a card rounds
            torch.testing.assert_close(p.detach(), ours.master(p).to(torch.bfloat16), rtol=ulp, atol=0)
        assert ours.state[p]["step"] == (2 if p is small.sometimes else 4)
    assert small.bias.dtype is torch.float32 and ours.master(small.bias) is small.bias
    assert sum(map(len, ours.tables.values())) == (2 if fused else 0)  # not one more for every set of skipped guides


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("fused", [False, FUSED])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_gradient_that_is_not_finite_changes_no_weight_and_no_moment(mixed, fused, bad, monkeypatch):
    """One entry of one gradient is bad: of all tensors none moves, and the step after it is one of finite numbers."""
    if not fused:
        monkeypatch.setattr("optim.ops.ON", False)
    small = Small(even=True).to(DEVICE)
    ours = MixedAdamW(small.parameters(), **SETTINGS, mixed=mixed)

    def everything():
        return [t.clone() for p in small.parameters()
                for t in (p.detach(), *(v for k, v in ours.state[p].items() if k != "step"))]
    for step in range(4):
        before = everything()
        for p, grad in zip(small.parameters(), draw_grads(small.parameters(), step)):
            p.grad = grad.to(p)
        if step == 2:
            small.blocks.grad[1, 2, 3] = bad
        norm = ours.step(0.5)
        assert norm.isfinite().item() == (step != 2)
        same = [torch.equal(a, b) for a, b in zip(before, everything())]
        assert all(same) if step == 2 else not any(same)
        assert all(t.isfinite().all() for t in everything())


def test_torchs_adamw_goes_on_as_if_the_bad_step_had_not_been():
    small, clean = Small(even=True), Small(even=True)
    ours, theirs = AdamW(small.parameters(), **SETTINGS), AdamW(clean.parameters(), **SETTINGS)
    for step in range(4):
        for model, optimizer in ((small, ours), (clean, theirs)):
            if step == 2 and model is clean:
                continue
            for p, grad in zip(model.parameters(), draw_grads(model.parameters(), step)):
                p.grad = grad.to(p) * (float("inf") if step == 2 else 1)
            optimizer.step(0.5)
    for p, q in zip(small.parameters(), clean.parameters()):
        assert torch.equal(p, q) and ours.state[p]["step"] == theirs.state[q]["step"] == 3


def test_sums_over_micro_batches_are_rounded_once():
    p = nn.Parameter(torch.zeros(1, 1))
    optimizer = MixedAdamW([p], **SETTINGS)
    n = 300  # bf16 alone would stop at 256
    for i in range(n):
        if i:
            optimizer.accumulate(i == n - 1)
        p.sum().backward()
    assert p.grad.dtype is torch.bfloat16 and p.grad.item() == 300 and not optimizer.sums


def test_total_norm_is_exact_over_dtypes():
    grads = [torch.full((1000,), 3.0, dtype=torch.bfloat16), torch.full((16,), 4.0)]
    assert total_norm(grads).item() == pytest.approx((9000 + 256) ** 0.5, rel=1e-6)
    assert total_norm(grads).dtype is torch.float32


def test_the_plain_form_clips_and_returns_the_norm_before():
    p = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = AdamW([p], **SETTINGS)
    p.grad = torch.tensor([[3.0, 4.0]])
    assert optimizer.step(1.0).item() == 5 and torch.allclose(p.grad, torch.tensor([[0.6, 0.8]]))
    assert optimizer.master(p) is p


def test_the_loss_keeps_float32_sums_for_a_bf16_head(monkeypatch):
    """1024 chunks whose gradients bf16 could not add up."""
    monkeypatch.setattr(model_file.LMLoss, "CHUNK", 1)
    torch.manual_seed(0)
    h, targets = torch.randn(1024, 8), torch.randint(16, (1024,))
    w = torch.randn(16, 8).to(torch.bfloat16)
    reference = w.double().requires_grad_()
    torch.nn.functional.cross_entropy(h.double() @ reference.T, targets).backward()
    weight = w.clone().requires_grad_()
    model_file.LMLoss.apply(h.to(torch.bfloat16), weight, targets, model_file.token_loss, 0.0).backward()
    assert weight.grad.dtype is torch.bfloat16
    assert ((weight.grad.double() - reference.grad).norm() / reference.grad.norm()).item() < 1e-2


# ----------------------------------------------------------------------------------------------------------------------
# Muon

EXACT = ((2.0, -1.5, 0.5),) * 30  # converges to 1 from any singular value in (0, 1]


def svd_polar(x):
    U, _, Vh = torch.linalg.svd(x, full_matrices=False)
    return U @ Vh


def muon_model(*argv):
    cfg, = config.load(["--n_layer=2", "--n_embd=32", "--n_head=4", "--n_kv_head=2", "--block_size=16",
                        "--vocab_size=61", "--norm=rmsnorm", "--tie_embeddings=False", "--optimizer=muon", "--lr=0.01",
                        "--weight_decay=0.5", *argv])
    return cfg, model_file.build(cfg, torch.device("cpu"), seed=0)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 24, 8), (2, 8, 24)])
def test_polar_is_the_orthogonal_factor(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(optim.polar(x, EXACT), svd_polar(x), rtol=0, atol=1e-6)
    near = torch.linalg.svdvals(optim.polar(x))
    assert 0.8 < near.min() and near.max() < 1.2
    assert torch.linalg.svdvals(optim.polar(x.bfloat16()).double()).max() < 1.25
    assert not optim.polar(torch.zeros(shape)).any()


def test_every_matrix_of_a_batch_is_orthogonalised_by_its_own_size():
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both = optim.polar(torch.stack((x, 1e-4 * x)))
    torch.testing.assert_close(both[1], both[0], rtol=0, atol=1e-2)


def test_a_clipped_gradient_enters_the_momentum_scaled():
    g, momenta = torch.randn(2, 4, 3), [torch.ones(2, 4, 3), torch.ones(2, 4, 3)]
    clipped = optim.nesterov(g, momenta[0], torch.tensor(0.25), 0.9, torch.float32)
    torch.testing.assert_close(clipped, optim.nesterov(0.25 * g, momenta[1], torch.ones(()), 0.9, torch.float32))
    torch.testing.assert_close(*momenta)


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_momentum_and_polar_are_torchs_muon(shape):
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(shape))
    theirs = torch.optim.Muon([p], lr=1.0, weight_decay=0.0, momentum=0.95, nesterov=True, adjust_lr_fn="original")
    momentum, newton_schulz = torch.zeros(1, *shape), ((3.4445, -4.775, 2.0315),) * 5
    for _ in range(3):
        before, p.grad = p.detach().clone(), torch.randn(shape)
        ahead = optim.nesterov(p.grad[None].clone(), momentum, torch.ones(()), 0.95, torch.bfloat16)
        step = optim.polar(ahead, newton_schulz, margin=1.0)
        theirs.step()
        change = before - p.detach()
        assert ((max(1, shape[0] / shape[1]) ** 0.5 * step[0].float() - change).norm() / change.norm()).item() < 2e-2


@pytest.mark.parametrize("fused", [False, FUSED])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("structure", [[], *STRUCTURES.values(), ["--qk_rank=8"]])
def test_a_step_of_muon_matrix_by_matrix_in_float64(structure, mixed, fused, monkeypatch):
    """Queries, keys, values and every block of a factor apart, against the update written with an SVD."""
    polar = optim.polar
    monkeypatch.setattr(optim, "polar", lambda x, **_: polar(x.double(), EXACT).float())
    if not fused:
        monkeypatch.setattr("optim.ops.ON", False)
    cfg, model = muon_model(*structure)
    ours = optim.Muon(model.to(DEVICE), cfg, mixed, dtype=torch.float32)
    names = [n for n, p in model.named_parameters() if n.startswith("blocks") and p.dim() > 1]
    params = dict(model.named_parameters())
    weights, momenta = {n: ours.master(params[n]).detach().double().cpu() for n in names}, {n: 0.0 for n in names}
    for step in range(3):
        ours.momentum, ours.decay = 0.9 + 0.02 * step, 0.5 - 0.1 * step
        grads = dict(zip(params, draw_grads(params.values(), step)))
        for n, p in params.items():
            p.grad = grads[n].to(p)
        ours.param_groups[0]["lr"] = lr = 0.01 / (step + 1)
        ours.step(0.0)
        for n in names:
            g, mu = grads[n].double(), ours.momentum
            momenta[n] = mu * momenta[n] + (1 - mu) * g
            ahead = (1 - mu) * g + mu * momenta[n]
            pieces = ahead.unbind() if ahead.dim() == 3 else ahead.split((32, 16, 16) if "qkv.weight" in n else len(ahead))
            moves = []
            for x in pieces:
                o = svd_polar(x)
                m, k = o.shape
                o = o / o.norm(dim=1 if m >= k else 0, keepdim=True) * (min(m, k) / max(m, k)) ** 0.5
                moves.append(o * max(1, m / k) ** 0.5)
            move = torch.stack(moves) if ahead.dim() == 3 else torch.cat(moves)
            w = weights[n]
            weights[n] = w - lr * move - lr * ours.decay * w * (move * w > 0)
    for n in names:
        assert (ours.master(params[n]).detach().cpu().double() - weights[n]).abs().max() < 2e-4 * 0.01 + 1e-5, n
        ulp = 2**-7 if fused and not CUDA else 0  # the interpreter truncates where a card rounds
        torch.testing.assert_close(params[n].detach(), ours.master(params[n]).to(params[n].dtype), rtol=ulp, atol=0)
    assert any(len(key) == 3 for key in ours.tables) is fused


@KERNELS
@pytest.mark.parametrize("mixed", [False, True])
def test_muons_kernels_follow_gradients_that_come_go_and_move(mixed, monkeypatch):
    """Against plain torch: another layer's guides are skipped in every step, gradients lie in odd places, the guides leave."""
    def trained(fused):
        monkeypatch.setattr("optim.ops.ON", fused)
        cfg, model = muon_model("--n_layer=3", *STRUCTURES["lowrank"])
        guided = [module for _, module in model.structured_linears()]
        assert len(guided) == 4
        for module in guided:
            module.start_guide()
        ours = optim.Muon(model.to(DEVICE), cfg, mixed, dtype=torch.float32)
        for step in range(6):
            if step == 4:
                ours.drop([module.W for module in guided])
                assert not ours.tables
                for module in guided:
                    module.end_guide()
            params = list(model.parameters())
            grads = [torch.cat((g.new_zeros(1), g.flatten())).to(p)[1:].view_as(p) if step % 3 == 1 else g.to(p)
                     for p, g in zip(params, draw_grads(params, step))]
            skipped = [] if step > 3 else [module.W for module in guided[2 * (step % 2):][:2]]
            for p, grad in zip(params, grads):
                p.grad = None if any(p is W for W in skipped) else grad
            ours.step(0.5)
        assert any(len(key) == 3 for key in ours.tables) is fused
        return {(n, k): t.detach() for n, p in model.named_parameters()
                for k, t in {**ours.state[p], "weight": p, "master": ours.master(p)}.items()}

    plain, fused = trained(False), trained(True)
    assert plain.keys() == fused.keys()
    for name, t in plain.items():
        rtol = 2**-7 if t.dtype is torch.bfloat16 else 1e-4
        torch.testing.assert_close(fused[name], t, rtol=rtol, atol=1e-5, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("fused", [False, FUSED])
@pytest.mark.parametrize("mixed", [False, True])
def test_muon_skips_what_is_not_finite(mixed, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr("optim.ops.ON", False)
    cfg, = config.load(["--n_layer=2", "--n_embd=32", "--n_head=2", "--block_size=16", "--vocab_size=61",
                        "--optimizer=muon", "--ffn=blockshuffle", "--nblocks=4"])
    gpt = model_file.build(cfg, torch.device(DEVICE), seed=0)
    optimizer = optim.Muon(gpt, cfg, mixed)

    def everything():
        return [t.clone() for p in gpt.parameters()
                for t in (p.detach(), *(v for k, v in optimizer.state[p].items() if k != "step"))]
    for step in range(4):
        before, grads = everything(), draw_grads(list(gpt.parameters()), step)
        for p, grad in zip(gpt.parameters(), grads):
            p.grad = grad.to(p)
        if step == 2:
            gpt.blocks[1].ffn.fc2.V.grad[0, 0, 0] = float("nan")
        optimizer.step(1.0)
        same = [torch.equal(a, b) for a, b in zip(before, everything())]
        assert all(same) if step == 2 else sum(same) < 4  # a value below bf16's rounding may stay
        assert all(t.isfinite().all() for t in everything())


def test_every_parameter_has_one_group_and_its_rate():
    cfg, model = muon_model("--value_embeddings=True", "--embed_skip=True", "--pos=absolute", "--post_norm=0.3",
                            "--embed_lr=0.3", "--head_lr=0.008", "--vector_lr=0.005", "--skip_lr=0.5")
    groups, names = optim.muon_groups(model, cfg), {p: n for n, p in model.named_parameters()}
    rate = {names[p]: group["ratio"] * cfg.lr for group in groups for p in group["params"]}
    assert sorted(rate) == sorted(names.values()) and sum(len(g["params"]) for g in groups) == len(names)
    expected = {"wte.weight": 0.3, "wpe.weight": 0.3, "blocks.1.attn.values.weight": 0.15, "head.weight": 0.008,
                "norm.weight": 0.005, "blocks.0.post_norm2.weight": 0.005,
                "blocks.0.attn.qkv.bias": 0.005, "blocks.1.attn.gate.weight": 0.005,
                "blocks.0.a": 0.005, "blocks.0.b": 0.5, "blocks.0.attn.qkv.weight": 0.01,
                "blocks.0.ffn.fc2.weight": 0.01}
    assert {n: rate[n] for n in expected} == pytest.approx(expected)
    cfg, tied = muon_model("--tie_embeddings=True")
    assert len(optim.muon_groups(tied, cfg)) == 3  # matrices, the embedding that is the head too, vectors


def test_mixed_muon_keeps_masters_and_leaves_parameters_without_gradient_alone():
    cfg, model = muon_model()
    ours = optim.Muon(model, cfg, mixed=True)
    still = model.blocks[1].ffn.fc1.weight
    before = {p: ours.master(p).detach().clone() for p in model.parameters()}
    for p in model.parameters():
        p.grad = None if p is still else torch.ones_like(p)
    ours.step(1.0)
    for p in model.parameters():
        assert torch.equal(ours.master(p), before[p]) is (p is still)
        assert p.dtype is (torch.bfloat16 if p.dim() > 1 else torch.float32)
        torch.testing.assert_close(p.detach(), ours.master(p).to(p.dtype), rtol=2**-7, atol=0)


def share(rank, path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    x = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    torch.save(optim.Muon.shared_polar(SimpleNamespace(unit=optim.unit), x), f"{path}/{rank}")
    torch.distributed.destroy_process_group()


def test_two_ranks_share_the_orthogonalisation(tmp_path):
    torch.multiprocessing.spawn(share, (str(tmp_path),), nprocs=2)
    expected = optim.polar(torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0)))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / str(rank)), expected)
