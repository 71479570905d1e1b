"""The FFN kernels against float64, on a Hopper card in bf16 and anywhere in Triton's interpreter (TRITON_INTERPRET=1) in fp16."""
import copy
import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import structured
import config
from config import Config
from model import build, rotary_table, rotate

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if importlib.util.find_spec("triton") is None or not (HOPPER or INTERPRET):
    pytest.skip("needs triton, with a Hopper card or TRITON_INTERPRET=1", allow_module_level=True)
import ops  # noqa: E402
from ops import fallback, ffn, pointwise  # noqa: E402

DEVICE, DTYPE = ("cpu", torch.float16) if INTERPRET else ("cuda", torch.bfloat16)
LAYERS = {  # ffn, width, hidden, rank, nblocks
    "lowrank": ("lowrank", 128, 512, 64, 0),
    "blockdense": ("blockdense", 128, 512, 128, 2),
    "blockdense, rank 96 a block": ("blockdense", 128, 512, 192, 2),
    "blockshuffle": ("blockshuffle", 128, 512, 0, 2),
    "blockshuffle, chunks of 48": ("blockshuffle", 768, 3072, 0, 4),
}


@pytest.fixture(autouse=True)
def small_sizes_reach_the_kernels(monkeypatch):
    monkeypatch.setattr(ffn, "MIN_TOKENS", 128)
    monkeypatch.setattr(ffn, "MIN_WORK", 0)


def pair(ffn, width, hidden, rank, nblocks, bias=True):
    torch.manual_seed(0)
    fc1 = structured.linear(ffn, width, hidden, rank, nblocks, bias)
    fc2 = structured.linear(ffn, hidden, width, rank, nblocks, bias)
    for p in (*fc1.parameters(), *fc2.parameters()):  # weights that DTYPE holds exactly, so that only the arithmetic differs
        p.data = (torch.randn_like(p) * (p.size(-1) ** -0.5 if p.dim() > 1 else 0.3)).to(DTYPE).float()
    return fc1.to(DEVICE), fc2.to(DEVICE)


def plain(x, fc1, fc2, act):
    h = fc1(x)
    return fc2(F.gelu(h, approximate="tanh") if act == "gelu" else F.relu(h).square())


def fused(x, fc1, fc2, act, recompute=False):
    with torch.autocast(DEVICE, DTYPE):
        return ffn.fused_ffn(x, fc1, fc2, act, recompute)


def error(out, ref):
    return ((out.double() - ref).norm() / ref.norm()).item()


def poison():
    """Leaves NaN in the memory that the next outputs get."""
    for n in (1 << 16, 1 << 20, 1 << 24):
        torch.full((n,), float("nan"), device=DEVICE)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("act", ["gelu", "relu2"])
@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients(name, act, recompute):
    if INTERPRET and LAYERS[name][1] > 128 and (recompute or act == "relu2"):
        pytest.skip("slow in the interpreter")
    fc1, fc2 = pair(*LAYERS[name])
    x = torch.randn(2, 67, LAYERS[name][1], device=DEVICE).to(DTYPE).float().requires_grad_()  # 134 tokens: a ragged tile
    grad = torch.randn_like(x).to(DTYPE)
    ref1, ref2, ref_x = copy.deepcopy(fc1).double(), copy.deepcopy(fc2).double(), x.detach().double().requires_grad_()
    with torch.autocast(DEVICE, DTYPE):
        assert ffn.can_ffn(x, fc1, fc2, act)
    poison()
    y, ref = fused(x, fc1, fc2, act, recompute), plain(ref_x, ref1, ref2, act)
    y.backward(grad), ref.backward(grad.double())
    assert y.dtype is DTYPE and y.shape == x.shape
    assert error(y, ref) < 1e-2 and error(x.grad, ref_x.grad) < 1e-2
    for (name, p), q in zip([*fc1.named_parameters(), *fc2.named_parameters()], [*ref1.parameters(), *ref2.parameters()]):
        assert error(p.grad, q.grad) < 1e-2, name


def test_without_bias_and_without_gradients():
    fc1, fc2 = pair(*LAYERS["blockshuffle"], bias=False)
    x = torch.randn(130, 128, device=DEVICE)
    with torch.no_grad():
        assert error(fused(x, fc1, fc2, "gelu"), plain(x.double(), fc1.double(), fc2.double(), "gelu")) < 1e-2


def test_flops():
    fc1, fc2 = pair(*LAYERS["blockshuffle"])
    x = torch.randn(128, 128, device=DEVICE).requires_grad_()
    with FlopCounterMode(display=False) as count:
        fused(x, fc1, fc2, "gelu").float().sum().backward()
    assert count.get_total_flops() == 3 * 2 * 128 * sum(w.numel() for w in (fc1.V, fc1.U, fc2.V, fc2.U))


def test_slope_byte():
    """A byte holds gelu's slope to 1/400, 0 and 1 exactly."""
    a = torch.linspace(-8, 8, 4001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.gelu(a, approximate="tanh").sum(), a)
    assert slope.min() * 200 + 26 > -0.5 and slope.max() * 200 + 26 < 255.5
    byte = torch.round(slope * 200 + 26)
    assert ((byte - 26) / 200 - slope).abs().max() <= 1 / 400


@pytest.mark.parametrize("name", ["lowrank", "blockshuffle"])
def test_one_graph_under_compile(name):
    fc1, fc2 = pair(*LAYERS[name])
    grads = []
    for f in (fused, torch.compile(fused, fullgraph=True, backend="aot_eager")):
        x = torch.randn(128, 128, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        y = f(x, fc1, fc2, "gelu")
        grads.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *fc1.parameters(), *fc2.parameters()])])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * b.abs().max().item())


def test_one_log_line_and_no_graph_break_when_it_does_not_fit(caplog):
    fc1, fc2 = pair("lowrank", 128, 512, 40, 0)
    x = torch.randn(128, 128, device=DEVICE, dtype=DTYPE)

    def forward(x):
        return ffn.can_ffn(x, fc1, fc2, "gelu"), x + 1

    fallback._logged.clear()
    for f in (forward, forward, torch.compile(forward, fullgraph=True, backend="eager")):
        assert not f(x)[0]
    assert len([r for r in caplog.records if r.name == "ops"]) == 1


@pytest.mark.parametrize("n_head, n_kv_head, size", [(4, 4, 32), (6, 2, 64), (3, 1, 128)])
def test_split_rotated_is_rotate_on_slices(n_head, n_kv_head, size):
    torch.manual_seed(0)
    cos, sin = (t.to(DEVICE) for t in rotary_table(9, size))
    qkv = torch.randn(2, 9, n_head + 2 * n_kv_head, size, device=DEVICE).to(DTYPE).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    assert pointwise.can_rotate(qkv, cos)
    poison()
    ours = pointwise.split_rotated(qkv, cos, sin, n_head, n_kv_head)
    q, k, v = exact.split((n_head, n_kv_head, n_kv_head), dim=2)
    theirs = rotate(q, cos.double(), sin.double()), rotate(k, cos.double(), sin.double()), v
    grads = [torch.randn(2, t.size(2), 9, size, device=DEVICE).to(DTYPE).transpose(1, 2) for t in theirs]  # as attention leaves them
    torch.autograd.backward(ours, grads), torch.autograd.backward(theirs, [g.double() for g in grads])
    for a, b in zip((*ours, qkv.grad), (*theirs, exact.grad)):
        assert error(a, b) < 4e-3


@pytest.mark.parametrize("width, rms, bias, add", [(96, False, True, True), (256, True, False, True), (768, False, True, False), (64, False, False, True)])
def test_add_norm_is_an_addition_and_a_norm(width, rms, bias, add):
    torch.manual_seed(0)
    norm = torch.nn.RMSNorm(width, eps=1e-5) if rms else torch.nn.LayerNorm(width, bias=bias)
    for p in norm.parameters():
        torch.nn.init.normal_(p, mean=0.5)
    norm, exact = norm.to(DEVICE), copy.deepcopy(norm).to(DEVICE).double()
    x, y = (torch.randn(3, 41, width, device=DEVICE).to(DTYPE).requires_grad_() for _ in range(2))
    ref_x, ref_y = (t.detach().double().requires_grad_() for t in (x, y))
    poison()
    ours = pointwise.add_norm(x, y if add else None, norm)
    total = ref_x + ref_y if add else ref_x
    theirs = total, exact(total)
    grads = [torch.randn_like(x) for _ in range(2)]
    torch.autograd.backward(ours, grads), torch.autograd.backward(theirs, [g.double() for g in grads])
    pairs = [*zip(ours, theirs), (x.grad, ref_x.grad), *((p.grad, q.grad) for p, q in zip(norm.parameters(), exact.parameters()))]
    for a, b in pairs + [(y.grad, ref_y.grad)] * add:
        assert error(a, b) < 1e-2
    (gradient,) = torch.autograd.grad(pointwise.add_norm(x, y, norm)[1].float().square().sum(), y)  # the sum itself in nobody's loss
    (expected,) = torch.autograd.grad(exact(ref_x + ref_y).square().sum(), ref_y)
    assert error(gradient, expected) < 2e-2


@pytest.mark.parametrize("vocab", [61, 1024, 2500])
def test_token_loss_is_cross_entropy(vocab):
    torch.manual_seed(0)
    logits = (torch.randn(13, vocab, device=DEVICE) * 5).to(DTYPE)
    targets = torch.randint(vocab, (13,), device=DEVICE)
    targets[[0, 7]] = -1
    exact, scale = logits.double().requires_grad_(), torch.tensor(0.3, device=DEVICE)
    expected = torch.nn.functional.cross_entropy(exact, targets, ignore_index=-1, reduction="none")
    (wanted,) = torch.autograd.grad(expected.sum() * 0.3, exact)
    kept = logits.clone()
    losses, nothing = pointwise.token_loss(kept, targets, scale, gradient=False)
    assert nothing is None and torch.equal(kept, logits)
    again, grad = pointwise.token_loss(logits, targets, scale)
    for loss in (losses, again):
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert error(grad, wanted) < 4e-3 and not grad[[0, 7]].any()


@pytest.mark.parametrize("norm, recompute", [("layernorm", "cheap"), ("rmsnorm", "off"), ("layernorm", "wide")])
def test_a_compiled_model_with_kernels_is_the_model(norm, recompute, monkeypatch):
    """Loss and all gradients, block by block compiled, against the plain model in float32."""
    if INTERPRET and recompute == "wide":
        pytest.skip("slow in the interpreter")
    cfg = Config(n_layer=2, n_embd=128, n_head=4, n_kv_head=2, block_size=128, vocab_size=61, ffn="lowrank", rank=64, norm=norm, recompute=recompute)
    config.check(cfg)
    torch._dynamo.reset()
    ours = build(cfg, torch.device(DEVICE), seed=1)
    theirs = copy.deepcopy(ours)
    tokens = torch.randint(61, (1, 129), device=DEVICE)
    calls = []
    used = {"_row_warps": pointwise, "_launch_rotate": pointwise, "_launch": ffn, "token_loss": ops}  # what every fused op calls when it runs
    for op, module in used.items():
        monkeypatch.setattr(module, op, lambda *a, _real=getattr(module, op), _op=op, **k: calls.append(_op) or _real(*a, **k))
    for block in ours.blocks:
        block.compile(fullgraph=True, backend="aot_eager" if INTERPRET else "inductor")
    with torch.autocast(DEVICE, DTYPE):
        loss = ours(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert set(calls) == set(used)
    monkeypatch.setattr(ops, "ON", False)
    reference = theirs(tokens[:, :-1], tokens[:, 1:])
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=2e-3)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert error(p.grad, q.grad.double()) < 3e-2, name
