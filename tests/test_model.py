"""model: a second plain implementation, the paper's cells, FLOPs against torch's counter, the chunked loss, files."""
import collections
import dataclasses
import json
import math
import os

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_module_simplified, make_boxed_func, min_cut_rematerialization_partition
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import config
import device
import model as model_file
import checkpoint
import train
from config import UserError
from conftest import ROOT, STRUCTURES, dense_oracle
from model import GPT, Cache, LMLoss, build, flops_per_token, load
from structured import Dense

PRESETS = sorted((ROOT / "config").glob("[a-z]*.py"))
CPU = torch.device("cpu")


def configure(*argv):
    cfg, = config.load([str(a) for a in argv])
    return dataclasses.replace(cfg, vocab_size=cfg.vocab_size or 61)


def tiny(*argv):
    return configure("--n_layer=3", "--n_embd=32", "--n_head=4", "--block_size=16", *argv)


# ----------------------------------------------------------------------------------------------------------------------
# The forward pass, written a second time

def reference_logits(cfg, params, tokens, dense=None):
    """Logits (B, T, vocab_size) from a dict of parameters, head by head; dense(prefix) is an FFN linear's (M, N) matrix."""
    dense = dense or (lambda prefix: params[prefix + "weight"])

    def linear(x, prefix, weight=None):
        y = x @ (params[prefix + "weight"] if weight is None else weight).T
        return y + params[prefix + "bias"] if cfg.bias else y

    def norm(x, prefix):
        if cfg.norm == "rmsnorm":
            return x / (x.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * params[prefix + "weight"]
        x = x - x.mean(-1, keepdim=True)
        y = x / (x.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * params[prefix + "weight"]
        return y + params[prefix + "bias"] if cfg.bias else y

    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def rotated(x):  # (B, T, head size): features (i, i + half) turn as complex numbers by t / theta^(2 i / head size)
        T, half = x.size(1), x.size(2) // 2
        speed = [cfg.rope_theta ** (-2 * i / (2 * half)) for i in range(half)]
        turn = torch.tensor([[t * s for s in speed] for t in range(T)], dtype=torch.float64)
        z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(turn), turn)
        return torch.cat((z.real, z.imag), -1)

    def attention(x, prefix):
        size, T = cfg.attn_dim // cfg.n_head, x.size(1)
        qkv = linear(x, prefix + "qkv.")
        head = [qkv[..., i * size:(i + 1) * size] for i in range(cfg.n_head + 2 * cfg.n_kv_head)]
        q, k, v = head[:cfg.n_head], head[cfg.n_head:cfg.n_head + cfg.n_kv_head], head[cfg.n_head + cfg.n_kv_head:]
        if cfg.qk_norm:
            q, k = [rms(x) * cfg.qk_norm for x in q], [rms(x) * cfg.qk_norm for x in k]
        if prefix + "values.weight" in params:
            gate = 3 / (1 + torch.exp(-x[..., :16] @ params[prefix + "gate.weight"].T))
            added = params[prefix + "values.weight"][tokens]
            v = [a + gate[..., i:i + 1] * added[..., i * size:(i + 1) * size] for i, a in enumerate(v)]
        future = torch.ones(T, T).triu(1).bool()
        out = []
        for h in range(cfg.n_head):
            shared = h // (cfg.n_head // cfg.n_kv_head)
            a, b = (rotated(q[h]), rotated(k[shared])) if cfg.pos == "rope" else (q[h], k[shared])
            scores = (a @ b.transpose(1, 2) / math.sqrt(size)).masked_fill(future, -math.inf)
            out.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ v[shared])
        return linear(torch.cat(out, -1), prefix + "proj.")

    def ffn(x, prefix):
        h = linear(x, prefix + "fc1.", dense(prefix + "fc1."))
        if cfg.act == "gelu":
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        elif cfg.act == "relu2":
            h = h * h * (h > 0)
        else:
            gate, value = h[..., :cfg.ffn_dim], h[..., cfg.ffn_dim:]
            h = gate / (1 + torch.exp(-gate)) * value
        return linear(h, prefix + "fc2.", dense(prefix + "fc2."))

    x = params["wte.weight"][tokens]
    if cfg.embed_norm:
        x = rms(x)
    if cfg.smear:
        share = params["smear.scale"] / (1 + torch.exp(-x[..., :16] @ params["smear.gate.weight"].T))
        x = torch.cat((x[:, :1], x[:, 1:] + share[:, 1:] * x[:, :-1]), 1)
    if cfg.pos == "absolute":
        x = x + params["wpe.weight"][:tokens.size(1)]
    x0 = x
    for i in range(cfg.n_layer):
        if cfg.embed_skip:
            x = params[f"blocks.{i}.a"] * x + params[f"blocks.{i}.b"] * x0
        a = attention(norm(x, f"blocks.{i}.norm1."), f"blocks.{i}.attn.")
        x = x + (norm(a, f"blocks.{i}.post_norm1.") if cfg.post_norm else a)
        b = ffn(norm(x, f"blocks.{i}.norm2."), f"blocks.{i}.ffn.")
        x = x + (norm(b, f"blocks.{i}.post_norm2.") if cfg.post_norm else b)
    logits = norm(x, "norm.") @ params["wte.weight" if cfg.tie_embeddings else "head.weight"].T
    return cfg.logit_softcap * torch.tanh(logits / cfg.logit_softcap) if cfg.logit_softcap else logits


def random_model(cfg, scale=0.15):
    """Every parameter random, so that none could be left out unseen."""
    torch.manual_seed(0)
    gpt = build(cfg, CPU, seed=0).double()
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(scale * torch.randn_like(p))
    return gpt


RECIPE = ["--norm=rmsnorm", "--act=relu2", "--bias=False", "--tie_embeddings=False", "--qk_norm=1.2",
          "--embed_norm=True", "--smear=True", "--embed_skip=True", "--value_embeddings=True", "--logit_softcap=3",
          "--rope_theta=100000", "--init=zero"]
SWITCHES = {
    "gpt": [],
    "llama": ["--norm=rmsnorm", "--act=swiglu", "--bias=False", "--n_kv_head=2", "--tie_embeddings=False", "--ffn_dim=40"],
    "narrow attention": ["--attn_dim=16", "--n_kv_head=1", "--ffn_dim=56", *STRUCTURES["lowrank"]],
    "absolute relu2": ["--pos=absolute", "--act=relu2", "--norm=rmsnorm", *STRUCTURES["blockshuffle"]],
    "swiglu blocks": ["--act=swiglu", "--n_dense_layers=0", "--tie_embeddings=False", *STRUCTURES["blockdense"]],
    "theta and eps": ["--rope_theta=300", "--norm_eps=0.3", "--norm=rmsnorm"],
    "layer norm's eps": ["--norm_eps=0.3", "--pos=absolute"],
    "recipe": RECIPE,
    "recipe in parts": ["--qk_norm=0.7", "--value_embeddings=True", "--n_kv_head=2", "--attn_dim=16",
                        "--rope_theta=500"],
    "post norms": ["--post_norm=0.3", "--tie_embeddings=False", *STRUCTURES["blockdense"]],
    "gemma": [*RECIPE, "--post_norm=0.3", "--act=swiglu", "--n_kv_head=2", "--smear=False", *STRUCTURES["lowrank"]],
    "absolute recipe": [*RECIPE, "--pos=absolute", *STRUCTURES["lowrank"]],
    "swiglu shuffle": ["--act=swiglu", "--n_dense_layers=2", "--norm=layernorm", "--bias=False", *STRUCTURES["blockshuffle"]],
}


@pytest.mark.parametrize("name", SWITCHES)
def test_the_model_equals_a_second_implementation(name):
    cfg = tiny(*SWITCHES[name])
    gpt = random_model(cfg)
    params = {k: v.detach() for k, v in gpt.state_dict().items()}

    def dense(prefix):
        if prefix + "U" not in params:
            return params[prefix + "weight"]
        return torch.from_numpy(dense_oracle(cfg.ffn, params[prefix + "V"], params[prefix + "U"]))

    tokens = torch.randint(61, (2, 13))
    expected = reference_logits(cfg, params, tokens, dense)
    torch.testing.assert_close(gpt(tokens), expected, rtol=0, atol=2e-5)  # the rotary table is float32
    targets = torch.randint(61, (2, 13))
    targets[0, 3] = -1
    torch.testing.assert_close(gpt(tokens, targets).double(),
                               F.cross_entropy(expected.flatten(0, 1), targets.flatten(), ignore_index=-1), rtol=1e-5, atol=0)
    assert expected.std() > 0.3


def test_the_first_layers_ffn_stays_dense():
    for n_dense in (0, 1, 2):
        gpt = GPT(tiny(*STRUCTURES["lowrank"], f"--n_dense_layers={n_dense}"))
        kinds = [isinstance(block.ffn.fc1, Dense) and isinstance(block.ffn.fc2, Dense) for block in gpt.blocks]
        assert kinds == [layer < n_dense for layer in range(3)]
        assert [layer for layer, _ in gpt.structured_linears()] == [i for i in range(n_dense, 3) for _ in range(2)]
        assert all(type(m) is Dense for block in gpt.blocks for m in (block.attn.qkv, block.attn.proj))


def test_guided_layers_use_their_guide_and_only_they():
    cfg = tiny(*STRUCTURES["blockshuffle"])
    gpt = random_model(cfg)
    assert gpt.layers_with_guide() == ()
    for _, m in gpt.structured_linears():
        m.start_guide()
    assert gpt.layers_with_guide() == (1, 2)
    tokens, alpha = torch.randint(61, (2, 9)), torch.tensor(0.5, dtype=torch.float64)
    plain = gpt(tokens)
    torch.testing.assert_close(gpt(tokens, alpha=alpha, guided=(1, 2)), plain, rtol=0, atol=1e-9)  # W_0 = D
    with torch.no_grad():
        for layer, m in gpt.structured_linears():
            m.W.copy_(torch.randn_like(m.W) if layer == 1 else m.W)
    torch.testing.assert_close(gpt(tokens, alpha=alpha, guided=(2,)), plain, rtol=0, atol=1e-9)
    assert (gpt(tokens, alpha=alpha, guided=(1,)) - plain).abs().max() > 0.1
    assert torch.equal(gpt(tokens, alpha=alpha), plain)


def test_tied_and_untied_heads():
    tied, untied = GPT(tiny()), GPT(tiny("--tie_embeddings=False"))
    assert tied.head.weight is tied.wte.weight and untied.head.weight is not untied.wte.weight
    built = build(tiny(), CPU, seed=0)
    assert built.head.weight is built.wte.weight
    built.load_state_dict(build(tiny(), CPU, seed=1).state_dict())
    assert built.head.weight is built.wte.weight
    count = [sum(p.numel() for p in m.parameters()) for m in (tied, untied)]
    assert count[1] - count[0] == 61 * 32


def test_initialisation():
    cfg = configure("--n_layer=2", "--n_embd=128", "--n_head=4", "--block_size=16", "--pos=absolute", "--vocab_size=500",
                    "--tie_embeddings=False", *STRUCTURES["lowrank"])
    gpt = build(cfg, CPU, seed=5)
    for name, p in gpt.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif "ffn.fc" not in name or ".0." in name:
            assert abs(p.std().item() - 0.02) < 0.001 and abs(p.mean().item()) < 0.001, name
    best = gpt.blocks[1].ffn.fc1.dense_weight()
    assert torch.linalg.matrix_rank(best) == 8
    assert 0.3 < torch.linalg.matrix_norm(best, 2) < 0.8  # 0.02 (sqrt(128) + sqrt(512)) = 0.68
    again, other = build(cfg, CPU, seed=5), build(cfg, CPU, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(gpt.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(gpt.wte.weight, other.wte.weight)
    direct = GPT(cfg)
    assert torch.equal(direct.cos, gpt.cos) and torch.equal(direct.sin, gpt.sin) and gpt.cos.shape[0] == 16


@pytest.mark.parametrize("kind", ["dense", *STRUCTURES])
def test_blocks_of_init_zero_add_nothing_at_first_and_then_learn(kind):
    cfg = configure("--n_layer=3", "--n_embd=128", "--n_head=4", "--block_size=16", "--vocab_size=500", *RECIPE,
                    *STRUCTURES.get(kind, []))
    gpt, tokens = build(cfg, CPU, seed=5), torch.randint(500, (2, 9))
    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    x = x0 = rms(gpt.wte.weight[tokens])
    for a, b in ((1.15, 0.2), (1.1, 0.125), (1.05, 0.05)):
        x = a * x + b * x0
    torch.testing.assert_close(gpt.hidden(tokens), rms(x), rtol=0, atol=1e-5)
    assert abs(gpt.blocks[0].attn.qkv.weight.std().item() * 128 ** 0.5 - 1) < 0.02
    assert abs(gpt.wte.weight.std().item() - 1) < 0.02 and abs(gpt.head.weight.std().item() - 0.001) < 1e-4
    hidden = gpt.blocks[1].ffn.fc1(torch.randn(4096, 128)).std().item()
    assert 0.1 < hidden < 0.6  # dense 0.4, of rank 8 less, orthonormal blocks 0.5
    gpt(tokens, torch.randint(500, (2, 9))).backward()
    for name, p in gpt.named_parameters():  # beneath a zero matrix there is no gradient yet
        above = "proj.weight", "fc2.weight", "fc2.U", "wte.weight", "head.weight", ".a", ".b", "norm.weight"
        last = name.endswith(above)
        assert p.grad is not None and bool(p.grad.any()) >= last, name


@pytest.mark.parametrize("kind", ["dense", *STRUCTURES])
def test_blocks_with_post_norms_add_vectors_of_that_size_at_first(kind):
    shape = ["--n_layer=3", "--n_embd=128", "--n_head=4", "--block_size=16", "--vocab_size=500", *RECIPE,
             "--embed_skip=False", "--smear=False", "--norm_eps=1e-9", *STRUCTURES.get(kind, [])]
    gpt, tokens = build(configure(*shape, "--post_norm=0.3"), CPU, seed=5), torch.randint(500, (2, 9))
    before = None
    for x, pending in streams(gpt, tokens):
        for added in () if before is None else (x - before, pending):
            size = added.square().mean(-1).sqrt()
            torch.testing.assert_close(size, torch.full_like(size, 0.3), rtol=0.01, atol=0)
        before = x if pending is None else x + pending
    for block in gpt.blocks:  # as wide as the others, whatever the structure; fc1 is narrower
        assert abs(block.attn.proj.weight.std() * 128**0.5 - 1) < 0.02
        if kind in ("dense", "lowrank"):
            fc1, fc2 = (torch.linalg.matrix_norm(fc.dense_weight(), 2).item() for fc in (block.ffn.fc1, block.ffn.fc2))
            assert abs(fc2 / fc1 - 2.5) < 0.3  # both 3 sigma, sigma 0.4 and 1 times 1 / sqrt(128)
    gpt(tokens, torch.randint(500, (2, 9))).backward()
    lacking = [name for name, p in gpt.named_parameters() if not p.grad.any()]
    assert all(name.endswith(".values.weight") for name in lacking), lacking  # their gates begin at 0: see init_zero
    count, of_plain = (sum(p.numel() for p in m.parameters()) for m in (gpt, GPT(configure(*shape))))
    assert count - of_plain == 3 * 2 * 128


@torch.no_grad()
def streams(gpt, tokens):
    """x and pending before the first block and after every block."""
    (x, values), pending, T = gpt.embed(tokens), None, tokens.size(1)
    found = [(x, pending)]
    for block, value in zip(gpt.blocks, values):
        x, pending, _ = block(x, pending, gpt.cos[:T], gpt.sin[:T], values=value)
        found.append((x, pending))
    return found


@pytest.mark.parametrize("name", ["recipe", "recipe in parts", "absolute recipe", "post norms", "gemma"])
def test_decoding_step_by_step_equals_the_forward(name):
    gpt = random_model(tiny(*SWITCHES[name])).eval()
    tokens = torch.randint(61, (2, 9))
    cache = Cache(gpt.cfg, 2, 16, CPU, torch.float64)
    steps = [gpt.step(tokens[:, :5], cache, torch.tensor([5, 5]))]
    steps += [gpt.step(tokens[:, i:i + 1], cache) for i in range(5, 9)]
    torch.testing.assert_close(torch.stack(steps, 1), gpt(tokens)[:, 4:], rtol=0, atol=1e-9)
    assert gpt.cfg.extras  # the decoding kernels have none of these parts


def test_dropout_works_in_training_only():
    gpt, tokens = build(tiny("--dropout=0.5"), CPU, seed=0), torch.randint(61, (2, 9))
    keys = torch.randint(2**62, (2, 1 + 2 * gpt.cfg.n_layer, 2))
    assert torch.equal(gpt(tokens, keys=keys[0]), gpt(tokens, keys=keys[0]))
    assert not torch.equal(gpt(tokens, keys=keys[0]), gpt(tokens, keys=keys[1]))
    gpt.eval()
    assert torch.equal(gpt(tokens), gpt(tokens))
    same = build(tiny(), CPU, seed=0)
    assert torch.equal(gpt(tokens), same(tokens))


def test_bf16_autocast_is_near():
    gpt, tokens = build(tiny(*STRUCTURES["blockdense"]), CPU, seed=0), torch.randint(61, (4, 17))
    exact = gpt(tokens[:, :-1], tokens[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        assert gpt.hidden(tokens[:, :-1]).dtype == torch.bfloat16
        near = gpt(tokens[:, :-1], tokens[:, 1:])
    assert near.dtype == torch.float32 and 0 < abs(near - exact) < 0.01 * exact


# ----------------------------------------------------------------------------------------------------------------------
# The loss in chunks

@pytest.mark.parametrize("chunk", [4, 13, 100])
@pytest.mark.parametrize("ignored", [(), (0, 5, 6), range(4, 8)], ids=["none", "some", "a chunk"])
@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_the_chunked_loss_equals_cross_entropy(monkeypatch, chunk, ignored, cap):
    monkeypatch.setattr(LMLoss, "CHUNK", chunk)
    torch.manual_seed(0)
    h, w = torch.randn(13, 8, requires_grad=True), torch.randn(29, 8, requires_grad=True)
    targets = torch.randint(29, (13,))
    targets[list(ignored)] = -1
    loss = LMLoss.apply(h, w, targets, model_file.token_loss, cap)
    logits = h @ w.T
    expected = F.cross_entropy(cap * (logits / cap).tanh() if cap else logits, targets, ignore_index=-1)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for scale in (1.0, 0.37):
        grads, wanted = (torch.autograd.grad(y * scale, (h, w), retain_graph=True) for y in (loss, expected))
        for a, b in zip(grads, wanted):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_loss_without_any_target_is_zero():
    h, w = torch.randn(5, 8, requires_grad=True), torch.randn(29, 8, requires_grad=True)
    loss = LMLoss.apply(h, w, torch.full((5,), -1), model_file.token_loss, 0.0)
    loss.backward()
    assert loss == 0 and not h.grad.any() and not w.grad.any()


def test_the_loss_in_bf16_is_near():
    torch.manual_seed(0)
    h, w = torch.randn(300, 32).requires_grad_(), (torch.randn(500, 32) * 0.2).requires_grad_()
    targets = torch.randint(500, (300,))
    low = h.detach().bfloat16().requires_grad_()
    loss, expected = LMLoss.apply(low, w, targets, model_file.token_loss, 0.0), F.cross_entropy(h @ w.T, targets)
    assert loss.dtype == torch.float32 and abs(loss - expected) < 3e-3 * expected
    for a, b in zip(torch.autograd.grad(loss, (low, w)), torch.autograd.grad(expected, (h, w))):
        assert (a - b).norm() < 2e-2 * b.norm()


@pytest.mark.parametrize("chunk, share, cap, their_cap", [(4, 0.0, 0, 0), (4, 0.4, 3.0, 2.0), (100, 0.4, 0, 2.0),
                                                           (4, 1.0, 0, 0)])
def test_the_loss_with_a_teacher_is_torchs_divergence_and_cross_entropy(monkeypatch, chunk, share, cap, their_cap):
    monkeypatch.setattr(LMLoss, "CHUNK", chunk)
    torch.manual_seed(0)
    h, w, their_h, their_w = (torch.randn(n, d, dtype=torch.float64) for n, d in ((13, 8), (29, 8), (13, 6), (29, 6)))
    targets = torch.randint(29, (13,))
    targets[[0, 5, 6, 7, 8]] = -1

    def ours(h, w):
        return LMLoss.apply(h, w, targets, model_file.token_mixture, cap, (their_h, their_w, their_cap, share))

    h.requires_grad_(), w.requires_grad_()
    kept = targets >= 0
    logits, theirs = (c * (x / c).tanh() if c else x for x, c in ((h @ w.T, cap), (their_h @ their_w.T, their_cap)))
    q, p = logits[kept].log_softmax(1), theirs[kept].log_softmax(1)
    expected = share * F.kl_div(q, p, log_target=True, reduction="batchmean")
    expected = expected + (1 - share) * F.cross_entropy(logits, targets, ignore_index=-1)
    torch.testing.assert_close(ours(h, w), expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y * 0.37, (h, w)) for y in (ours(h, w), expected))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(ours, (h, w))


@pytest.mark.parametrize("taught", [False, True])
def test_no_tensor_of_all_tokens_logits_lives(monkeypatch, taught):
    """A step of the whole model: the largest tensor holds a chunk of the logits, the teacher's likewise."""
    from torch.utils._python_dispatch import TorchDispatchMode
    monkeypatch.setattr(LMLoss, "CHUNK", 8)
    cfg = tiny("--n_layer=1", "--vocab_size=4000")
    gpt, largest = build(cfg, torch.device("cpu"), seed=0), []
    if taught:
        gpt.teacher = model_file.Teacher(build(cfg, torch.device("cpu"), seed=1).requires_grad_(False), 0.5)

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.append(max((t.numel() for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t)),
                               default=0))
            return out

    tokens = torch.randint(4000, (16, cfg.block_size + 1))
    with Listen():
        gpt(tokens[:, :-1], tokens[:, 1:]).backward()
    assert max(largest) < 16 * cfg.block_size * 4000 / 4 and max(largest) == max(8 * 4000, gpt.wte.weight.numel())
    assert not taught or all(p.grad is None for p in gpt.teacher.model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Counting

CELLS = [  # the paper's tables: preset and flags, parameters and FFN parameters in millions, training FLOPs; None is not printed
    ("s", 110, 56.6, 1.70e18), ("m", 335, 201.3, 1.55e19), ("l", 729, 453.0, 7.03e19), ("xl", 1274, 805, 2.10e20),
    ("s --ffn=lowrank --rank=384", 90, None, 1.44e18), ("s --ffn=lowrank --rank=192", 74, None, 1.22e18),
    ("s --ffn=blockshuffle --nblocks=2", 90, None, 1.44e18), ("s --ffn=blockshuffle --nblocks=4", 74, None, 1.22e18),
    ("s --ffn=blockdense --rank=512 --nblocks=2", 90, None, 1.44e18),
    ("s --ffn=blockdense --rank=256 --nblocks=2", 74, None, 1.22e18),
    ("m --ffn=lowrank --rank=512", 263, None, 1.26e19), ("m --ffn=lowrank --rank=256", 202, None, 1.01e19),
    ("l --ffn=lowrank --rank=768", 566, None, 5.61e19), ("l --ffn=lowrank --rank=384", 431, None, 4.42e19),
    ("xl --ffn=lowrank --rank=1024", 985, 516, 1.66e20), ("xl --ffn=lowrank --rank=512", 744, 275, 1.29e20),
    ("xl --ffn=blockdense --rank=1536 --nblocks=4", 955, 486, 1.61e20),
    ("xl --ffn=blockdense --rank=768 --nblocks=4", 728, 260, 1.27e20),
    ("xl --ffn=blockshuffle --nblocks=2", 985, 516, 1.66e20), ("xl --ffn=blockshuffle --nblocks=4", 744, 275, 1.29e20),
    ("gqa_m", 335, None, None), ("wide_m", 219, None, None), ("gqa_l", 729, None, None), ("wide_l", 464, None, None)]


@pytest.mark.parametrize("line, params, params_ffn, flops", CELLS, ids=[c[0] for c in CELLS])
def test_the_papers_cells(line, params, params_ffn, flops):
    preset, *flags = line.split()
    facts = train.summary(configure(ROOT / "config" / f"{preset}.py", *flags))
    for value, printed in ((facts["params"] / 1e6, params), (facts["params_ffn"] / 1e6, params_ffn),
                           (facts["train_flops"], flops)):
        assert printed is None or abs(value / printed - 1) < 0.005, (value, printed)


def test_tokens_and_learning_rates_of_the_baselines():
    for name, tokens, lr in (("s", 2.2e9, 6e-4), ("m", 6.7e9, 3e-4), ("l", 14.58e9, 2.5e-4), ("xl", 25.5e9, 2e-4),
                             ("gqa_m", 6.7e9, 3e-4), ("wide_m", 10.58e9, 3e-4), ("gqa_l", 14.58e9, 2.5e-4),
                             ("wide_l", 23.36e9, 2.5e-4)):
        cfg = configure(ROOT / "config" / f"{name}.py")
        assert abs(train.summary(cfg)["tokens"] / tokens - 1) < 0.001 and cfg.lr == lr
        assert (cfg.batch_size, cfg.block_size, cfg.vocab_size, cfg.dropout, cfg.seed) == (512, 1024, 32000, 0.0, 1005)
        assert (cfg.betas, cfg.weight_decay, cfg.grad_clip) == ((0.9, 0.999), 0.1, 1.0)
        assert (cfg.warmup_ratio, cfg.min_lr_ratio) == (0.1, 0.1)
        assert (cfg.norm, cfg.act, cfg.pos, cfg.bias, cfg.tie_embeddings) == ("layernorm", "gelu", "rope", True, True)
        assert (cfg.tokenizer, cfg.dataset) == ("llama", "refinedweb")


@pytest.mark.parametrize("ffn", ["dense", *STRUCTURES])
@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_flops_equal_torchs_count(path, ffn):
    """Three layers of each preset with each FFN, on meta tensors; of attention only the math kernel is counted."""
    flags = {"dense": [], "lowrank": ["--rank=64"], "blockshuffle": ["--nblocks=4"],
             "blockdense": ["--rank=64", "--nblocks=4"]}[ffn]
    cfg = dataclasses.replace(configure(path, f"--ffn={ffn}", *flags), n_layer=3)
    with torch.device("meta"):
        gpt, tokens = GPT(cfg), torch.zeros(2, cfg.block_size, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        gpt(tokens)
    assert counter.get_total_flops() == 2 * cfg.block_size * flops_per_token(cfg)


@pytest.mark.parametrize("flags", [[], ["--norm=rmsnorm", "--bias=False", "--qk_norm=1.2", "--n_kv_head=2"],
                                   [*STRUCTURES["lowrank"], "--guide=fixedstep"]], ids=str)
def test_queries_and_keys_of_low_rank(flags):
    """The model is one whose qkv has the factors' product, formed entry by entry; FLOPs by torch's counter."""
    cfg = tiny(*flags, "--qk_rank=6")
    gpt = build(cfg, CPU, seed=1).double()
    dense = build(dataclasses.replace(cfg, qk_rank=0), CPU, seed=1).double()
    weights = gpt.state_dict()
    for i in range(cfg.n_layer):
        name = f"blocks.{i}.attn.qkv."
        parts = {"v": weights.pop(name + "v.weight")}
        for part in "qk":
            V, U = (weights.pop(f"{name}{part}.{factor}") for factor in "VU")
            assert V.shape == (6, cfg.n_embd) and 0.5 < V.norm() / U.norm() < 2
            parts[part] = torch.from_numpy(dense_oracle("lowrank", V, U))
        weights[name + "weight"] = torch.cat([parts[part] for part in "qkv"])
        if cfg.bias:  # normal_ changes those of gpt
            weights[name + "bias"] = torch.cat([weights.pop(f"{name}{part}.bias").normal_() for part in "qkv"])
    dense.load_state_dict(weights)
    tokens = torch.randint(cfg.vocab_size, (2, cfg.block_size))
    torch.testing.assert_close(gpt(tokens), dense(tokens))
    assert len(gpt.structured_linears()) == (2 * (cfg.n_layer - 1) if cfg.ffn != "dense" else 0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        gpt(tokens)
    assert counter.get_total_flops() == 2 * cfg.block_size * flops_per_token(cfg)


def test_queries_and_keys_of_low_rank_begin_as_dense_ones_would():
    """Of the whole rank the factors' product has a dense matrix's size; only FFNs begin smaller."""
    gpt = build(tiny("--n_embd=64", "--init=zero", "--qk_rank=64", "--ffn=lowrank", "--rank=64"), CPU, seed=1)
    for linear, std in ((gpt.blocks[1].attn.qkv.q, 1 / 8), (gpt.blocks[1].attn.qkv.k, 1 / 8),
                        (gpt.blocks[1].ffn.fc1, 0.4 / 8)):
        assert linear.dense_weight().std().item() == pytest.approx(std, rel=0.05)


def test_params_ffn_counts_the_matrices_of_a_real_model():
    for flags in ([], *STRUCTURES.values()):
        for act in ("gelu", "swiglu"):
            cfg = tiny(f"--act={act}", *flags)
            counted = sum(p.numel() for n, p in GPT(cfg).named_parameters() if ".fc" in n and not n.endswith("bias"))
            assert train.summary(cfg)["params_ffn"] == counted == model_file.ffn_params(cfg)


def test_params_guide_counts_the_guides_of_a_real_model():
    cfg = tiny(*STRUCTURES["blockdense"], "--guide=fixedstep")
    gpt = GPT(cfg)
    for _, m in gpt.structured_linears():
        m.start_guide()
    facts = train.summary(cfg)
    assert facts["params_guide"] == sum(p.numel() for n, p in gpt.named_parameters() if n.endswith(".W")) == 2 * 2 * 32 * 128
    assert facts["params"] == sum(p.numel() for n, p in gpt.named_parameters() if not n.endswith(".W"))
    assert train.summary(tiny(*STRUCTURES["blockdense"]))["params_guide"] == 0


def test_dry_run_prints_the_summary_as_one_json_line(cli):
    argv = [ROOT / "config" / "xl.py", "--ffn=lowrank", "--rank=512", "--guide=fixedflop"]
    status, out, err = cli("train.py", *argv, "--dry_run=True")
    facts = json.loads(out)
    assert status == 0 and out.count("\n") == 1 and facts == train.summary(configure(*argv))
    assert {"params", "params_ffn", "params_guide", "steps", "guided_steps", "guide_ratio", "tokens", "unique_tokens",
            "train_flops", "flops_per_token"} <= facts.keys()
    assert facts["tokens"] == facts["steps"] * 512 * 1024
    assert facts["unique_tokens"] == (facts["steps"] - facts["guided_steps"]) * 512 * 1024
    assert abs(facts["train_flops"] / 2.10e20 - 1) < 0.005  # fixedflop: the dense model's


def test_dry_run_without_data_takes_the_vocabulary_from_the_tokenizers_name(cli):
    for tokenizer, size in (("byte", 257), ("gpt2", 50257), ("llama", 32000), ("spm:8192", 8192)):
        assert json.loads(cli("train.py", f"--tokenizer={tokenizer}", "--dry_run=True")[1])["vocab_size"] == size


@pytest.mark.parametrize("card, flops", [
    ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA A10G", 70e12), ("NVIDIA L40S", 362e12), ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA A1000", None),
    ("NVIDIA GeForce GTX 1080", None)])
def test_peak_flops_of_known_cards_only(monkeypatch, card, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert device.peak_flops(torch.device("cuda")) == flops
    assert device.peak_flops(CPU) is None


# ----------------------------------------------------------------------------------------------------------------------
# Files

def saved(tmp_path, **changes):
    cfg = tiny(*STRUCTURES["lowrank"])
    content = {"config": config.to_dict(cfg), "model": random_model(cfg).float().state_dict(), "step": 3,
               "tokenizer": {"identity": "byte", "blob": torch.zeros(1, dtype=torch.uint8)}}
    for name, value in changes.items():
        content[name] = value(content[name])
    path = str(tmp_path / "model.pt")
    checkpoint.save_beside({k: v for k, v in content.items() if v is not None}, path)
    assert os.listdir(tmp_path) == ["model.pt"]
    return path, cfg, content


def test_load_gives_back_what_was_saved(tmp_path):
    path, cfg, content = saved(tmp_path)
    for given in (path, str(tmp_path)):
        gpt, got, rest = load(given, CPU)
        assert got == cfg and rest["step"] == 3 and not gpt.training
        assert all(torch.equal(v, content["model"][k]) for k, v in gpt.state_dict().items())
        assert gpt.head.weight is gpt.wte.weight and torch.equal(gpt.cos, model_file.rotary_table(16, 8)[0])


@pytest.mark.parametrize("changes, words", [
    (dict(model=lambda m: None), "lacks"), (dict(tokenizer=lambda t: None), "lacks"),
    (dict(model=lambda m: [1]), "lacks model"), (dict(model=lambda m: {1: 2}), "plain tensor"), (dict(config=lambda c: {3: 4}), "names with values"),
    (dict(tokenizer=lambda t: {"identity": 3}), "tokenizer lacks"),
    (dict(config=lambda c: c | {"n_layers": 3}), "did you mean n_layer"), (dict(config=lambda c: c | {"n_embd": "x"}), "n_embd"),
    (dict(config=lambda c: c | {"n_layer": 2}), "do not match"), (dict(config=lambda c: c | {"rank": 9}), "do not match"),
    (dict(model=lambda m: {k: v for k, v in m.items() if k != "wte.weight"}), "wte.weight")],
    ids=["no model", "no tokenizer", "no weights", "numbered weights", "numbered settings", "another tokenizer", "unknown setting", "wrong type", "too many weights", "wrong shape", "weight missing"])
def test_a_foreign_model_is_refused_in_a_sentence(tmp_path, changes, words):
    path, _, _ = saved(tmp_path, **changes)
    with pytest.raises(UserError) as e:
        load(path, CPU)
    assert words in str(e.value) and "\n" not in str(e.value), e.value


def test_a_missing_or_damaged_model_is_refused_in_a_sentence(tmp_path):
    path, _, _ = saved(tmp_path)
    whole = open(path, "rb").read()
    for name, data in (("half.pt", whole[:len(whole) // 2]), ("text.pt", b"hello"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError) as e:
            load(str(tmp_path / name), CPU)
        assert name in str(e.value) and "damaged" in str(e.value) and "\n" not in str(e.value)
    at = whole.index(torch.load(path)["model"]["wte.weight"].numpy().tobytes()) + 10
    (tmp_path / "flipped.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1:])
    with pytest.raises(UserError, match="flipped.pt is damaged or .* .the checksum of its part .*/data/"):
        load(str(tmp_path / "flipped.pt"), CPU)
    torch.save([1, 2], tmp_path / "list.pt")
    for name, words in (("list.pt", "lacks"), ("nowhere", "does not exist"), ("nowhere/model.pt", "does not exist")):
        with pytest.raises(UserError) as e:
            load(str(tmp_path / name), CPU)
        assert words in str(e.value)
    (tmp_path / "folder").mkdir()
    assert "does not exist" in str(pytest.raises(UserError, load, str(tmp_path / "folder"), CPU).value)


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "flag"),)
    torch.save({"config": Evil(), "model": {}, "tokenizer": {}}, tmp_path / "model.pt")
    assert "damaged" in str(pytest.raises(UserError, load, str(tmp_path), CPU).value) and not (tmp_path / "flag").exists()


# ----------------------------------------------------------------------------------------------------------------------
# What a compiled block keeps for backward

def graphs_of_a_block(*argv):
    """(counts of operations forward, backward; bytes kept) of a compiled block on the CPU, under bf16 autocast."""
    graphs = []

    def keep(module, inputs):
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    def backend(module, inputs):
        return aot_module_simplified(module, inputs, fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)

    torch._dynamo.reset()
    gpt = GPT(configure("--n_layer=2", "--n_embd=64", "--n_head=2", "--block_size=32", *argv))
    x = torch.randn(4, 32, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.compile(gpt.blocks[1], backend=backend, fullgraph=True)(x.to(torch.bfloat16), None, gpt.cos, gpt.sin)
    (y[0] + y[1]).float().sum().backward()
    counts = [collections.Counter(n.target._schema.name.partition("::")[2] for n in g.nodes if hasattr(n.target, "_schema")) for g in graphs]
    kept = [a.meta["val"] for a in graphs[0].output_node().args[0][1:] if hasattr(a, "meta") and not a.name.startswith("primals")]
    return *counts, sum(t.numel() * t.element_size() for t in kept)


MATMULS = "mm", "addmm", "bmm", "block_linear"


@pytest.mark.parametrize("ffn", [[], *STRUCTURES.values()])
def test_backward_repeats_no_matmul_and_no_attention(ffn):
    forward, backward, cheap = graphs_of_a_block("--recompute=cheap", *ffn)
    assert sum(backward[name] for name in MATMULS) == 2 * sum(forward[name] for name in MATMULS) > 0
    assert not any("attention" in name and "backward" not in name for name in backward)
    _, without, off = graphs_of_a_block("--recompute=off", *ffn)
    assert cheap < 0.9 * off and backward["native_layer_norm"] == 1 and without["native_layer_norm"] == 0


def test_wide_repeats_the_wide_matmul_only():
    forward, backward, wide = graphs_of_a_block("--recompute=wide", *STRUCTURES["lowrank"])
    assert sum(backward[name] for name in MATMULS) == 2 * sum(forward[name] for name in MATMULS) + 1
    _, _, cheap = graphs_of_a_block("--recompute=cheap", *STRUCTURES["lowrank"])
    assert cheap - wide == 2 * 4 * 32 * 256  # the hidden units before the activation, in bf16
