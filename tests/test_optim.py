"""optim: clipping, AdamW on fp32 masters against AdamW in float64, sums over micro-batches; the fused update in Triton's interpreter or on CUDA."""
import importlib.util
import os

import pytest
import torch
import torch.nn as nn

import model as model_file
from optim import AdamW, MixedAdamW, total_norm

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FUSED = pytest.param(True, marks=pytest.mark.skipif(not (CUDA or os.environ.get("TRITON_INTERPRET") == "1") or importlib.util.find_spec("triton") is None,
                                                    reason="needs CUDA or TRITON_INTERPRET=1"))
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
    assert len(ours.tables) == (2 if fused else 0)  # not one more for every set of skipped guides


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
    model_file.LMLoss.apply(h.to(torch.bfloat16), weight, targets, model_file.token_loss).backward()
    assert weight.grad.dtype is torch.bfloat16
    assert ((weight.grad.double() - reference.grad).norm() / reference.grad.norm()).item() < 1e-2
