"""The FFN kernels against float64, on a Hopper card in bf16 and anywhere in Triton's interpreter (TRITON_INTERPRET=1)
in fp16."""
import copy
import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import structured
import config
from config import Config
from model import Cache, build, rotary_table, rotate

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if importlib.util.find_spec("triton") is None or not (HOPPER or INTERPRET):
    pytest.skip("needs triton, with a Hopper card or TRITON_INTERPRET=1", allow_module_level=True)
import ops  # noqa: E402
from ops import decode, fallback, ffn, pointwise  # noqa: E402

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
    for p in (*fc1.parameters(), *fc2.parameters()):  # DTYPE holds them exactly, so that only the arithmetic differs
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
    x = torch.randn(2, 67, LAYERS[name][1], device=DEVICE).to(DTYPE).float().requires_grad_()  # a ragged tile
    grad = torch.randn_like(x).to(DTYPE)
    ref1, ref2, ref_x = copy.deepcopy(fc1).double(), copy.deepcopy(fc2).double(), x.detach().double().requires_grad_()
    with torch.autocast(DEVICE, DTYPE):
        assert ffn.can_ffn(x, fc1, fc2, act)
    poison()
    y, ref = fused(x, fc1, fc2, act, recompute), plain(ref_x, ref1, ref2, act)
    y.backward(grad), ref.backward(grad.double())
    assert y.dtype is DTYPE and y.shape == x.shape
    assert error(y, ref) < 1e-2 and error(x.grad, ref_x.grad) < 1e-2
    named = [*fc1.named_parameters(), *fc2.named_parameters()]
    for (name, p), q in zip(named, [*ref1.parameters(), *ref2.parameters()]):
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
    """Forward keeps gelu's slope as a byte, which backward multiplies by: to 1/400 of gelu's slope, 0 and 1 exactly,
    without a bias."""
    a = torch.linspace(-6, 6, 640, device=DEVICE).to(DTYPE)
    x = F.one_hot(torch.zeros(640, 1, dtype=torch.long, device=DEVICE), 32).to(DTYPE)  # (T, 1, K)
    w, bias = x[:64].transpose(0, 1).contiguous(), torch.zeros(64, device=DEVICE, dtype=DTYPE)  # (1, N, K)
    hidden, slope, _ = ffn._launch(x * a[:, None, None], w, 64, 64, ffn.NARROW, "forward", "gelu", bias, save=True)
    grad = ffn._launch(x, w, 64, 64, ffn.SLIM, "backward", "gelu", slope=slope)[0].double()  # 1 x the slope
    exact = a.double().requires_grad_()
    gelu = F.gelu(exact, approximate="tanh")
    (wanted,) = torch.autograd.grad(gelu.sum(), exact)
    assert error(hidden, gelu[:, None].expand(-1, 64)) < 4e-3
    off = grad - wanted[:, None]
    assert off.abs().max() < 1 / 400 + (1e-3 if INTERPRET else 5e-3)  # and DTYPE's own rounding
    assert off.mean().abs() < 5e-4  # cut off instead of rounded: 2.5e-3
    assert (grad[a < -5.5] == 0).all() and (grad[a > 5.5] == 1).all()


@pytest.mark.parametrize("name", ["lowrank", "blockshuffle"])
def test_one_graph_under_compile(name):
    fc1, fc2 = pair(*LAYERS[name])
    grads = []
    for f in (fused, torch.compile(fused, fullgraph=True, backend="aot_eager")):
        x = torch.randn(128, 128, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        y = f(x, fc1, fc2, "gelu")
        parameters = [x, *fc1.parameters(), *fc2.parameters()]
        grads.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), parameters)])
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


@pytest.mark.parametrize("gain", [0.0, 1.2])
@pytest.mark.parametrize("n_head, n_kv_head, size", [(4, 4, 32), (6, 2, 64), (3, 1, 128)])
def test_split_rotated_is_rotate_on_slices(n_head, n_kv_head, size, gain):
    torch.manual_seed(0)
    cos, sin = (t.to(DEVICE) for t in rotary_table(9, size))
    qkv = torch.randn(2, 9, n_head + 2 * n_kv_head, size, device=DEVICE).to(DTYPE).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    assert pointwise.can_rotate(qkv, cos)
    poison()
    ours = pointwise.split_rotated(qkv, cos, sin, n_head, n_kv_head, gain)[:3]
    q, k, v = exact.split((n_head, n_kv_head, n_kv_head), dim=2)
    if gain:
        q, k = (gain * t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt() for t in (q, k))
    theirs = rotate(q, cos.double(), sin.double()), rotate(k, cos.double(), sin.double()), v
    shapes = [(2, t.size(2), 9, size) for t in theirs]
    # Strided as attention leaves them
    grads = [torch.randn(shape, device=DEVICE).to(DTYPE).transpose(1, 2) for shape in shapes]
    torch.autograd.backward(ours, grads), torch.autograd.backward(theirs, [g.double() for g in grads])
    for a, b in zip((*ours, qkv.grad), (*theirs, exact.grad)):
        assert error(a, b) < 4e-3


@pytest.mark.parametrize("width, rms, bias, add", [
    (96, False, True, True), (256, True, False, True), (768, False, True, False), (64, False, False, True)])
def test_add_norm_is_an_addition_and_a_norm(width, rms, bias, add):
    torch.manual_seed(0)
    norm = torch.nn.RMSNorm(width, eps=1e-5) if rms else torch.nn.LayerNorm(width, bias=bias)
    for p in norm.parameters():
        torch.nn.init.normal_(p, mean=0.5)
    norm, exact = norm.to(DEVICE), copy.deepcopy(norm).to(DEVICE).double()
    x, y = ((torch.randn(3, 41, width, device=DEVICE) + 0.5).to(DTYPE).requires_grad_() for _ in range(2))
    ref_x, ref_y = (t.detach().double().requires_grad_() for t in (x, y))
    poison()
    ours = pointwise.add_norm(x, y if add else None, norm)
    total = ref_x + ref_y if add else ref_x
    theirs = total, exact(total)
    grads = [torch.randn_like(x) for _ in range(2)]
    torch.autograd.backward(ours, grads), torch.autograd.backward(theirs, [g.double() for g in grads])
    pairs = [*zip(ours, theirs), (x.grad, ref_x.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(norm.parameters(), exact.parameters())]
    for a, b in pairs + [(y.grad, ref_y.grad)] * add:
        assert error(a, b) < 1e-2
    # The loss reads the norm alone, not the sum
    (gradient,) = torch.autograd.grad(pointwise.add_norm(x, y, norm)[1].float().square().sum(), y)
    (expected,) = torch.autograd.grad(exact(ref_x + ref_y).square().sum(), ref_y)
    assert error(gradient, expected) < 2e-2


@pytest.mark.parametrize("width, rms, bias", [(96, False, True), (256, True, False), (768, False, False)])
def test_skip_norm_adds_the_embeddings_and_their_gradients(width, rms, bias):
    """Three blocks hand x0 on, whose gradient is the sum of theirs and of what else reads it."""
    torch.manual_seed(0)
    norms = [torch.nn.RMSNorm(width, eps=1e-5) if rms else torch.nn.LayerNorm(width, bias=bias) for _ in range(3)]
    for p in (p for norm in norms for p in norm.parameters()):
        torch.nn.init.normal_(p, mean=0.5)
    norms, exact = torch.nn.ModuleList(norms).to(DEVICE), copy.deepcopy(torch.nn.ModuleList(norms)).to(DEVICE).double()
    inputs = [torch.randn(3, 41, width, device=DEVICE).to(DTYPE).requires_grad_() for _ in range(5)]
    factors = [torch.tensor(v, device=DEVICE, requires_grad=True) for v in (1.15, 0.2, -0.7, 0.4, 0.9, -0.3)]
    refs, ref_factors = ([t.detach().double().requires_grad_() for t in ts] for ts in (inputs, factors))
    poison()
    (x, x0, *added), (ref, ref0, *ref_added), pairs = inputs, refs, []
    for i, (norm, plain) in enumerate(zip(norms, exact)):
        x, h, x0 = pointwise.skip_norm(x, added[i], x0, factors[2 * i], factors[2 * i + 1], norm)
        ref = ref_factors[2 * i] * (ref + ref_added[i]) + ref_factors[2 * i + 1] * ref0
        pairs += [(h, plain(ref))]
    pairs += [(x, ref), (x0, ref0)]
    grads = [torch.randn_like(inputs[0]) for _ in pairs]
    torch.autograd.backward([a for a, _ in pairs], grads)
    torch.autograd.backward([b for _, b in pairs], [g.double() for g in grads])
    pairs += [(p.grad, q.grad) for p, q in zip((*inputs, *factors, *norms.parameters()),
                                               (*refs, *ref_factors, *exact.parameters()))]
    for a, b in pairs:  # a and b of a block: a sum of x.numel() products, each near 1
        assert error(a, b) < 1e-2 if a.dim() else abs(a.item() - b.item()) < 5e-3 * x.numel() ** 0.5


@pytest.mark.parametrize("vocab, cap", [(61, 0.0), (61, 4.0), (1024, 0.0), (2500, 0.0), (2500, 4.0),
                                        (61, 100.0), (2500, 100.0), (17000, 0.0), (17000, 4.0)])
def test_token_loss_is_cross_entropy(vocab, cap):
    torch.manual_seed(0)
    logits = (torch.randn(13, vocab, device=DEVICE) * 5).to(DTYPE)
    logits[3] -= 300  # far below the others, and below what exp can do
    targets = torch.randint(vocab, (13,), device=DEVICE)
    targets[[0, 7]] = -1
    exact, scale = logits.double().requires_grad_(), torch.tensor(0.3, device=DEVICE)
    capped = cap * torch.tanh(exact / cap) if cap else exact
    expected = torch.nn.functional.cross_entropy(capped, targets, ignore_index=-1, reduction="none")
    (wanted,) = torch.autograd.grad(expected.sum() * 0.3, exact)
    kept = logits.clone()
    losses, nothing = pointwise.token_loss(kept, targets, scale, gradient=False, cap=cap)
    assert nothing is None and torch.equal(kept, logits)
    again, grad = pointwise.token_loss(logits, targets, scale, cap=cap)
    for loss in (losses, again):
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert error(grad, wanted) < 4e-3 and not grad[[0, 7]].any()


@pytest.mark.parametrize("norm, recompute, skip", [("layernorm", "cheap", False), ("rmsnorm", "off", True),
                                                   ("rmsnorm", "cheap", True), ("layernorm", "wide", False)])
def test_a_compiled_model_with_kernels_is_the_model(norm, recompute, skip, monkeypatch):
    """Loss and all gradients, block by block compiled, against the plain model in float32."""
    if INTERPRET and recompute == "wide":
        pytest.skip("slow in the interpreter")
    cfg = Config(n_layer=2, n_embd=128, n_head=4, n_kv_head=2, block_size=128, vocab_size=61, ffn="lowrank", rank=64,
                 norm=norm, recompute=recompute, embed_skip=skip)
    config.check(cfg)
    torch._dynamo.reset()
    ours = build(cfg, torch.device(DEVICE), seed=1)
    theirs = copy.deepcopy(ours)
    tokens = torch.randint(61, (1, 129), device=DEVICE)
    for module in (pointwise, ffn):  # no trials, which would count as calls
        monkeypatch.setattr(module, "works", lambda *trial: True)
    calls = []
    # What every fused op calls when it runs
    used = {"_row_warps": pointwise, "_launch_rotate": pointwise, "_launch": ffn, "token_loss": ops}
    for op, module in used.items():
        real = getattr(module, op)
        monkeypatch.setattr(module, op, lambda *a, _real=real, _op=op, **k: calls.append(_op) or _real(*a, **k))
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


# ----------------------------------------------------------------------------------------------------------------------
# Decoding

@pytest.mark.parametrize("rope", [True, False])
@torch.no_grad()
def test_attention_of_one_token(rope):
    """Rows of 0 to 150 tokens: a row attends to its own places and no more, a query head to its group's keys; only the
    new place is written."""
    torch.manual_seed(0)
    position, heads, kv, D, length = torch.tensor([0, 1, 63, 64, 65, 150], device=DEVICE), 6, 2, 32, 160
    B = len(position)
    cos, sin = (t.to(DEVICE) for t in rotary_table(length, D))
    stub = SimpleNamespace(cfg=SimpleNamespace(n_head=heads, pos="rope" if rope else "absolute"), cos=cos, sin=sin)
    qkv = torch.randn(B, (heads + 2 * kv) * D, device=DEVICE).to(DTYPE)
    caches = [torch.randn(B, kv, length, D, device=DEVICE).to(DTYPE) for _ in range(2)]
    before = [c.clone() for c in caches]
    poison()
    y = decode.attention(qkv, stub, *caches, position).view(B, heads, D)
    for b, n in enumerate(position.tolist()):
        q, k, v = qkv[b].double().view(-1, D).split([heads, kv, kv])
        if rope:
            q, k = (rotate(t[None], cos[n:n + 1].double(), sin[n:n + 1].double())[0] for t in (q, k))
        for cache, old, new in zip(caches, before, (k, v)):
            assert error(cache[b, :, n], new) < 1e-2
            assert torch.equal(cache[b, :, :n], old[b, :, :n]) and torch.equal(cache[b, :, n + 1:], old[b, :, n + 1:])
        for h in range(heads):
            g = h // 3
            keys, values = (torch.cat((old[b, g, :n].double(), new[g, None])) for old, new in zip(before, (k, v)))
            assert error(y[b, h], (keys @ q[h] / D**0.5).softmax(0) @ values) < (1e-2 if INTERPRET else 2e-2), (n, h)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("blocks, M, K, shuffled, act, norm", [
    (1, 70, 96, False, "gelu", "layernorm"), (1, 9, 2300, False, "relu2", ""),
    (1, 2051, 16, False, "", "rmsnorm"), (1, 4099, 16, False, "", ""),
    (4, 10, 48, False, "gelu", ""), (4, 10, 48, True, "relu2", "layernorm"), (3, 8, 16, True, "", "rmsnorm")])
@torch.no_grad()
def test_linear_on_few_tokens(blocks, M, K, shuffled, act, norm, tokens):
    """Against a float64 matmul per block; shuffled, block g reads entries g, g + blocks, ... and writes places g, g +
    blocks, ..."""
    if INTERPRET and M > 2000 and tokens == (3 if M < 4000 else 1):
        pytest.skip("slow in the interpreter")
    torch.manual_seed(0)
    x = torch.randn(tokens, blocks * K, device=DEVICE).to(DTYPE)
    w = (torch.randn(blocks, M, K, device=DEVICE) / K**0.5).to(DTYPE)
    bias, residual = (torch.randn(*shape, blocks * M, device=DEVICE).to(DTYPE) for shape in ((), (tokens,)))
    n = blocks * K
    module = {"layernorm": torch.nn.LayerNorm(n), "rmsnorm": torch.nn.RMSNorm(n, eps=1e-5), "": None}[norm]
    if module:
        module = module.to(DEVICE)
        for p in module.parameters():
            torch.nn.init.normal_(p, mean=0.5)
    poison()
    y = decode.linear(x, w if blocks > 1 else w[0], bias, module, act, residual, shuffled)
    h = copy.deepcopy(module).double()(x.double()) if module else x.double()
    parts = h.view(tokens, K, blocks).transpose(1, 2) if shuffled else h.view(tokens, blocks, K)
    out = torch.einsum("tgk,gmk->tgm", parts, w.double())
    out = (out.transpose(1, 2) if shuffled else out).reshape(tokens, -1) + bias.double()
    out = F.gelu(out, approximate="tanh") if act == "gelu" else out.relu().square() if act == "relu2" else out
    assert error(y, out + residual.double()) < 1e-2


@pytest.mark.parametrize("batch, shape", [
    (1, dict(ffn="lowrank", rank=16, n_kv_head=1)),
    (1, dict(ffn="blockshuffle", nblocks=2, act="relu2", norm="rmsnorm", n_layer=1)),
    (1, dict(ffn="blockdense", rank=16, nblocks=2, act="swiglu", bias=False, n_layer=1)),
    (3, dict(pos="absolute", n_kv_head=1)), (3, dict(norm="rmsnorm"))])
@torch.no_grad()
def test_a_decoding_step_in_kernels(batch, shape):
    """Two steps after 3 to 131 tokens, against the plain step in float32."""
    small = dict(n_layer=2, n_embd=32, n_head=2, attn_dim=64, block_size=160, vocab_size=31, n_dense_layers=0)
    cfg = Config(**{**small, **shape})
    config.check(cfg)
    exact = build(cfg, torch.device(DEVICE), seed=1).eval()
    for p in exact.parameters():
        p.copy_((0.2 * torch.randn_like(p)).to(DTYPE))
    model = copy.deepcopy(exact).to(DTYPE)
    model.cos, model.sin = exact.cos, exact.sin
    lengths, tokens = torch.tensor([131, 64, 3], device=DEVICE)[:batch], torch.randint(31, (batch, 140), device=DEVICE)
    ours, theirs = (Cache(cfg, batch, 160, DEVICE, m.head.weight.dtype) for m in (model, exact))
    assert ops.can_step(model, ours)
    exact.step(tokens[:, :131], theirs, lengths)
    for low, full in zip(ours.layers, theirs.layers):
        low[0].copy_(full[0]), low[1].copy_(full[1])
    ours.position.copy_(theirs.position)
    for i in range(2):
        token = tokens[torch.arange(batch), lengths + i][:, None]
        y, ref = decode.step(model, token, ours), exact.step(token, theirs)
        assert error(y, ref.double()) < (2e-2 if INTERPRET else 6e-2)
        torch.testing.assert_close(ours.position, theirs.position)
