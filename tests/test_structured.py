"""structured: the three maps against matrices built entry by entry, gradients, initialisation, guides, compilation."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import structured
from conftest import dense_oracle
from structured import BlockDense, BlockShuffle, Dense, LowRank

MAPS = {"lowrank": LowRank, "blockshuffle": BlockShuffle, "blockdense": BlockDense}
SIZES = [  # kind, in, out, rest: wide, tall, square, q not a multiple of the blocks, one block, one block a row
    ("lowrank", 12, 20, (5,)), ("lowrank", 20, 12, (12,)), ("lowrank", 7, 7, (1,)),
    ("blockshuffle", 12, 24, (3,)), ("blockshuffle", 24, 12, (3,)), ("blockshuffle", 20, 20, (4,)),
    ("blockshuffle", 12, 20, (4,)), ("blockshuffle", 12, 6, (1,)), ("blockshuffle", 6, 18, (6,)),
    ("blockdense", 12, 20, (6, 3)), ("blockdense", 20, 12, (8, 4)), ("blockdense", 8, 8, (2, 1)),
    ("blockdense", 6, 10, (6, 6))]
ONE_EACH = [SIZES[0], SIZES[6], SIZES[9]]
sizes = pytest.mark.parametrize("kind, n, m, rest", SIZES)
one_each = pytest.mark.parametrize("kind, n, m, rest", ONE_EACH, ids=[s[0] for s in ONE_EACH])
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make(kind, n, m, rest, bias=True, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layer = MAPS[kind](n, m, *rest, bias=bias).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) / p.size(-1) ** 0.5)
    return layer


def oracle(kind, layer):
    return torch.from_numpy(dense_oracle(kind, layer.V.detach().double().cpu(), layer.U.detach().double().cpu()))


# ----------------------------------------------------------------------------------------------------------------------
# The maps

@sizes
def test_map_and_dense_weight_equal_the_papers_definition(kind, n, m, rest):
    layer = make(kind, n, m, rest)
    W, x = oracle(kind, layer), torch.randn(2, 3, n, dtype=torch.float64)
    assert W.shape == (m, n) and W.abs().max() > 0.05
    torch.testing.assert_close(layer.dense_weight(), W, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x), x @ W.T + layer.bias, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x[0, 0]), x[0, 0] @ W.T + layer.bias, rtol=0, atol=1e-12)
    strided = torch.randn(n, 5, dtype=torch.float64).T
    torch.testing.assert_close(layer(strided), strided @ W.T + layer.bias, rtol=0, atol=1e-12)
    layer.bias = None
    torch.testing.assert_close(layer(x), x @ W.T, rtol=0, atol=1e-12)


@sizes
def test_parameters_are_the_papers_count(kind, n, m, rest):
    layer, B = make(kind, n, m, rest, bias=False), rest[-1]
    expected = {"lowrank": B * (n + m), "blockshuffle": min(n, m) * (n + m) // B,
                "blockdense": rest[0] * (m * B + n) // B}[kind]
    assert sum(p.numel() for p in layer.parameters()) == expected == layer.V.numel() + layer.U.numel()


@sizes
def test_gradients(kind, n, m, rest):
    layer = make(kind, n, m, rest)
    x = torch.randn(3, n, dtype=torch.float64, requires_grad=True)

    def forward(x, V, U, bias):
        return torch.func.functional_call(layer, {"V": V, "U": U, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(forward, (x, layer.V, layer.U, layer.bias))
    factors = SimpleNamespace  # dense_weight reads V and U alone
    assert torch.autograd.gradcheck(lambda V, U: type(layer).dense_weight(factors(V=V, U=U)), (layer.V, layer.U))


def test_gradients_where_only_one_side_asks():
    """A first layer's input and a frozen factor need no gradient; the others' must not change."""
    layer, x = make("blockdense", 12, 20, (6, 3)), torch.randn(3, 12, dtype=torch.float64)
    grad = torch.autograd.grad(layer(x).square().sum(), layer.V)[0]
    whole = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), (layer.V, x))
    assert torch.equal(grad, whole[0])
    layer.V.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(layer(x).square().sum(), x)[0], whole[1])


def test_block_linear_is_a_well_formed_operator():
    x, w = torch.randn(5, 3, 4, requires_grad=True), torch.randn(3, 2, 4, requires_grad=True)
    torch.testing.assert_close(structured.block_linear(x, w), torch.einsum("tbp,bqp->tbq", x, w))
    torch.library.opcheck(structured.block_linear, (x, w),
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@one_each
def test_bf16_autocast_is_near(kind, n, m, rest):
    layer = make(kind, 16 * n, 16 * m, rest, dtype=torch.float32)
    x = torch.randn(40, 16 * n)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    exact = x.double() @ oracle(kind, layer).T + layer.bias.double()
    assert y.dtype == torch.bfloat16 and ((y - exact).norm() / exact.norm()).item() < 1e-2


@pytest.mark.parametrize("kind, n, m, rest, words", [
    ("lowrank", 12, 20, (0,), "0 12 20"), ("lowrank", 12, 20, (13,), "13 12 20"), ("lowrank", 12, 20, (-1,), "-1 12"),
    ("blockshuffle", 12, 20, (3,), "3 12 20"), ("blockshuffle", 10, 20, (4,), "4 10 20"),
    ("blockshuffle", 12, 20, (0,), "0 12 20"),
    ("blockdense", 12, 20, (6, 5), "5 12 6"), ("blockdense", 12, 20, (7, 3), "3 12 7"),
    ("blockdense", 12, 20, (0, 3), "0 12"), ("blockdense", 12, 20, (6, 0), "0 12")])
def test_sizes_that_do_not_divide_are_named(kind, n, m, rest, words):
    with pytest.raises(ValueError) as e:
        MAPS[kind](n, m, *rest)
    assert set(words.split()) <= set(str(e.value).replace(",", "").split()), e.value


def test_repr_is_one_line_with_shapes():
    layer = MAPS["blockshuffle"](12, 20, 4)
    assert repr(layer) == "BlockShuffle(12 -> 20, V (4, 3, 3), U (4, 5, 3), bias=True)"
    layer.start_guide()
    assert "W (20, 12)" in repr(layer) and "\n" not in repr(layer)
    assert repr(LowRank(12, 20, 5, bias=False)) == "LowRank(12 -> 20, V (5, 12), U (20, 5), bias=False)"


@pytest.mark.parametrize("kind, cls", [*MAPS.items(), ("dense", Dense)])
def test_linear_builds_what_ffn_names(kind, cls):
    layer = structured.linear(kind, 12, 20, rank=6, nblocks=2, bias=False)
    assert type(layer) is cls and layer.bias is None and (layer.in_features, layer.out_features) == (12, 20)
    assert layer.dense_weight().shape == (20, 12)


# ----------------------------------------------------------------------------------------------------------------------
# Initialisation

@pytest.mark.parametrize("n, m, rank, std", [(24, 40, 7, 0.02), (40, 24, 24, 0.02), (16, 16, 5, 0.5)])
def test_spectral_init_is_the_truncated_svd_of_a_normal_matrix(n, m, rank, std):
    layer = LowRank(n, m, rank)
    torch.manual_seed(3)
    layer.reset_parameters(std)
    torch.manual_seed(3)
    A = (torch.randn(max(n, m), min(n, m)) * std).double()
    P, S, Qh = torch.linalg.svd(A if m >= n else A.T, full_matrices=False)
    best = P[:, :rank] * S[:rank] @ Qh[:rank]
    assert (layer.dense_weight().double() - best).abs().max() < 1e-5 * std
    for gram in (layer.U.T @ layer.U, layer.V @ layer.V.T):  # sqrt(S) to each side
        values = gram.detach().double().diagonal()
        torch.testing.assert_close(values.sort().values, S[:rank].flip(0), rtol=1e-5, atol=0)
        torch.testing.assert_close(gram.detach().double(), values.diag(), rtol=0, atol=1e-5 * std)
    assert not layer.bias.any()


def test_spectral_init_keeps_float64_exact():
    torch.manual_seed(3)
    layer = LowRank(10, 10, 10, bias=False).double()
    torch.manual_seed(4)
    layer.reset_parameters()
    torch.manual_seed(4)
    expected = torch.randn(10, 10, dtype=torch.float64) * 0.02
    torch.testing.assert_close(layer.dense_weight().detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind, n, m, rest", [s for s in SIZES if s[0] != "lowrank"])
def test_block_init_is_orthonormal(kind, n, m, rest):
    torch.manual_seed(0)
    layer = MAPS[kind](n, m, *rest)
    for matrix in (*layer.V, *(layer.U if layer.U.dim() == 3 else [layer.U])):
        gram = matrix @ matrix.T if len(matrix) <= matrix.size(1) else matrix.T @ matrix
        torch.testing.assert_close(gram.detach(), torch.eye(len(gram)), atol=1e-5, rtol=0)
    assert layer.V.shape[0] == 1 or not torch.equal(layer.V[0], layer.V[1])  # blocks of their own
    assert not layer.bias.any()


def test_a_meta_layer_waits_for_its_weights():
    with torch.device("meta"):
        layer = LowRank(12, 20, 5)
    assert layer.V.is_meta and layer(torch.empty(3, 12, device="meta")).shape == (3, 20)


# ----------------------------------------------------------------------------------------------------------------------
# Guides

@one_each
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_merged_forward_equals_the_two_branches(kind, n, m, rest, alpha):
    """The paper's self-guided layer: o = alpha W x + (1 - alpha) U V x, output and all gradients."""
    layer = make(kind, n, m, rest)
    layer.start_guide()
    with torch.no_grad():
        layer.W.copy_(torch.randn(m, n))
    x, g = torch.randn(4, 3, n, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, m, dtype=torch.float64)
    wanted = [x, layer.V, layer.U, layer.W, layer.bias]
    y = layer(x, torch.tensor(alpha))
    two = alpha * F.linear(x, layer.W) + (1 - alpha) * (layer(x) - layer.bias) + layer.bias
    blended = alpha * layer.W + (1 - alpha) * oracle(kind, layer)
    torch.testing.assert_close(two, x @ blended.T + layer.bias, rtol=0, atol=1e-12)
    tolerance = dict(rtol=0, atol=1e-6 if alpha == 0.3 else 1e-12)  # alpha itself is a float32
    torch.testing.assert_close(y, two, **tolerance)
    for name, a, b in zip("xVUWb", torch.autograd.grad(y, wanted, g), torch.autograd.grad(two, wanted, g)):
        torch.testing.assert_close(a, b, msg=lambda text: f"{name}: {text}", **tolerance)
    exact = layer(x, torch.tensor(alpha, dtype=torch.float64))
    torch.testing.assert_close(exact, two, rtol=0, atol=1e-12)


@one_each
def test_the_blend_is_in_float32_and_cast_once(kind, n, m, rest):
    """bf16 factors and a guide that nearly cancel: in bf16, or with alpha in bf16, no digit would be right."""
    layer = make(kind, 16 * n, 16 * m, rest, dtype=torch.bfloat16)
    with torch.no_grad():
        D = layer.dense_weight()
        layer.bias.zero_()
        layer.W = torch.nn.Parameter(-D)
    alpha = torch.tensor(0.501)  # 0.5 in bf16
    exact = alpha.double() * layer.W.double() + (1 - alpha.double()) * D.double()      # -0.002 D
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.eye(16 * n), alpha)                                            # the blended matrix, transposed
    assert y.dtype == torch.bfloat16 and exact.abs().max() > 1e-4
    assert (y.T == exact.bfloat16()).double().mean() > 0.99


@sizes
def test_the_guide_begins_as_the_dense_equivalent_and_leaves_no_trace(kind, n, m, rest):
    layer = make(kind, n, m, rest, dtype=torch.float32)
    plain = set(layer.state_dict())
    layer.start_guide()
    torch.testing.assert_close(layer.W.detach(), oracle(kind, layer).float(), rtol=1e-6, atol=1e-7)
    double = make(kind, n, m, rest)
    double.start_guide()
    assert torch.equal(double.W, double.dense_weight())
    assert "W" in dict(layer.named_parameters()) and "W" in layer.state_dict() and layer.W.requires_grad
    x = torch.randn(5, n)
    torch.testing.assert_close(layer(x, torch.tensor(0.7)), layer(x), rtol=1e-5, atol=1e-5)
    layer.end_guide()
    assert layer.W is None and set(layer.state_dict()) == plain == {"V", "U", "bias"}
    assert {name for name, _ in layer.named_parameters()} == plain


@one_each
def test_the_unused_guide_gets_no_gradient(kind, n, m, rest):
    layer = make(kind, n, m, rest)
    layer.start_guide()
    layer(torch.randn(3, n, dtype=torch.float64)).sum().backward()
    assert layer.W.grad is None and layer.V.grad is not None


# ----------------------------------------------------------------------------------------------------------------------
# Compilation and CUDA

@one_each
def test_compiled_without_breaks_equals_eager(kind, n, m, rest):
    layer = make(kind, n, m, rest)
    layer.start_guide()
    with torch.no_grad():
        layer.W.mul_(2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, n, dtype=torch.float64, requires_grad=True)
    for alpha in (None, torch.tensor(0.25)):
        wanted = [x, layer.V, layer.U, layer.bias] + ([layer.W] if alpha is not None else [])
        results = [(y, *torch.autograd.grad(y.square().sum(), wanted)) for y in (layer(x, alpha), compiled(x, alpha))]
        for eager, other in zip(*results):
            torch.testing.assert_close(other, eager, rtol=1e-12, atol=1e-12)


@cuda
@one_each
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_cuda_bf16_autocast_is_near_forward_and_backward(kind, n, m, rest, compiled, alpha):
    torch._dynamo.reset()  # other tests have compiled the same forward almost as often as it allows
    layer = make(kind, 16 * n, 16 * m, rest, dtype=torch.float32).cuda()
    x = torch.randn(128, 16 * n, device="cuda", requires_grad=True)
    g = torch.randn(128, 16 * m, device="cuda")
    if alpha is not None:
        layer.start_guide()
        with torch.no_grad():
            layer.W.mul_(0.5)
    names = ["V", "U", "bias"] + (["W"] if alpha is not None else [])
    weight = None if alpha is None else torch.tensor(alpha, device="cuda")
    run = torch.compile(layer, fullgraph=True) if compiled else layer
    with torch.autocast("cuda", torch.bfloat16):
        y = run(x, weight)
    grads = torch.autograd.grad(y, [x, *(getattr(layer, k) for k in names)], g.to(y.dtype))

    exact = make(kind, 16 * n, 16 * m, rest, dtype=torch.float32).double()
    if alpha is not None:
        exact.start_guide()
        with torch.no_grad():
            exact.W.mul_(0.5)
    x64 = x.detach().double().cpu().requires_grad_()
    y64 = exact(x64, None if alpha is None else torch.tensor(alpha, dtype=torch.float64))
    W = (1 - (alpha or 0) / 2) * oracle(kind, exact)
    torch.testing.assert_close(y64.detach(), x64.detach() @ W.T + exact.bias.detach())
    grads64 = torch.autograd.grad(y64, [x64, *(getattr(exact, k) for k in names)], g.double().cpu())
    for name, a, b in zip(["y", "x", *names], (y, *grads), (y64, *grads64)):
        error = ((a.double().cpu() - b).norm() / b.norm()).item()
        assert error < 1e-2, (name, error)


@cuda
def test_cuda_guide_begins_exact_in_spite_of_tf32():
    torch.set_float32_matmul_precision("high")
    layer = LowRank(256, 256, 64).cuda()
    layer.start_guide()
    exact = (layer.U.double() @ layer.V.double()).float()
    torch.testing.assert_close(layer.W, exact, rtol=1e-6, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# gelu in a linear's last product

LINEARS = {"dense": lambda **kw: Dense(12, 20, **kw), "lowrank": lambda **kw: LowRank(12, 20, 5, **kw),
           "blockdense": lambda **kw: BlockDense(12, 20, 6, 3, **kw),
           "blockshuffle": lambda **kw: BlockShuffle(12, 20, 4, **kw)}


@pytest.mark.parametrize("name", LINEARS)
def test_gelu_is_applied_by_the_last_product_where_it_can(name, monkeypatch):
    """As on CUDA in bf16. There the product's gelu is the form with tanh, on a CPU it is not."""
    calls = []

    def product(bias, x, weight, use_gelu=False):
        calls.append((x.dim(), use_gelu))
        return F.gelu(torch.addmm(bias, x, weight), approximate="tanh")

    monkeypatch.setattr(torch, "_addmm_activation", product)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with torch.no_grad():
        layer, x = LINEARS[name]().bfloat16(), torch.randn(2, 3, 12).bfloat16()
        torch.nn.init.normal_(layer.bias)
        expected = F.gelu(layer(x), approximate="tanh")
        assert torch.equal(structured.linear_gelu(layer, x), expected)
        assert calls == ([] if name == "blockshuffle" else [(2, True)])
        if name != "dense":
            both = structured.FactorsOrMerged(layer, None, SimpleNamespace(merged=lambda shape, tokens: tokens != 6))
            assert torch.equal(structured.linear_gelu(both, x), expected)
            layer.start_guide(torch.randn(20, 12))
            alpha = torch.tensor(0.5)
            with torch.autocast("cpu", torch.bfloat16):
                guided = F.gelu(layer(x, alpha), approximate="tanh")
                assert torch.equal(structured.linear_gelu(layer, x, alpha), guided)
        structured.linear_gelu(LINEARS[name](bias=False).bfloat16(), x)
        structured.linear_gelu(LINEARS[name](), x.float())  # other texts would be greedy then
    assert structured.linear_gelu(layer, x).requires_grad and len(calls) <= 2


@cuda
@pytest.mark.parametrize("name", LINEARS)
@torch.no_grad()
def test_cuda_gelu_in_the_product_is_nearer_to_float32_than_a_pass_of_its_own(name):
    torch.manual_seed(0)
    maps = {"dense": Dense(256, 512), "lowrank": LowRank(256, 512, 64), "blockdense": BlockDense(256, 512, 64, 2),
            "blockshuffle": BlockShuffle(256, 512, 4)}
    layer = maps[name].cuda().bfloat16()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=p.size(-1) ** -0.5 if p.dim() > 1 else 1.0)
    x = torch.randn(3, 70, 256, device="cuda").bfloat16()
    fused, apart = structured.linear_gelu(layer, x).float(), F.gelu(layer(x), approximate="tanh").float()
    exact = F.gelu(layer.double()(x.double()), approximate="tanh")
    assert structured.can_fuse_gelu(x, layer.bfloat16()) == (name != "blockshuffle")
    assert (fused - exact).norm() < 1.05 * (apart - exact).norm() < 0.01 * exact.norm()
