"""AdamW and Muon with gradient clipping and one interface: step(max_norm), accumulate(last), master(p).

Where the gradients' norm is not finite a step changes no weight and no moment. That is decided on the device: the host
waits for nothing.

`AdamW` is torch's. `MixedAdamW` is for bf16 training: the model's matrices are bf16, cast once per optimizer step, and
the fp32 masters live here. A step reads each gradient once, as bf16, and writes new bf16 weights beside the masters.
`Muon` is MixedAdamW on embeddings, head and vectors; the matrices of the blocks move by the orthogonalised momentum.
"""
import collections
import math

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from device import Upload, full, local, share_of
from model import ops


def total_norm(grads):
    """The norm of all gradients together, 0-d float32; each dtype is reduced in one launch."""
    parts = []
    for dtype in dict.fromkeys(g.dtype for g in grads):  # not a set: its order differs between ranks
        exact = torch.promote_types(dtype, torch.float32)
        parts += torch._foreach_norm([g for g in grads if g.dtype is dtype], dtype=exact)
    return torch.linalg.vector_norm(torch.stack(parts)) if parts else torch.zeros(())


class Optimizer:
    """Groups of parameters and the state of each. torch's own class imports its compiler, which takes a second.

    before_update() is called where weights are about to change.
    """

    def __init__(self, params, lr, betas, weight_decay, eps=1e-8):
        """params: tensors, or groups {"params": tensors, name: what differs from the other arguments}."""
        params, defaults = list(params), dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)
        groups = params if isinstance(params[0], dict) else [{"params": params}]
        self.param_groups = [{**defaults, **group, "params": list(group["params"])} for group in groups]
        self.state = collections.defaultdict(dict)
        self.before_update = lambda: None

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def drop(self, params):
        """Forgets parameters that leave the model."""
        for p in params:
            self.state.pop(p, None)
        gone = {id(p) for p in params}
        for group in self.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]


class AdamW(Optimizer):
    """torch's fused AdamW whose step clips the global gradient norm to max_norm (0: no clipping) and returns it."""

    def accumulate(self, last):
        """Nothing to do between micro-batches: fp32 gradients add up in place."""

    @torch.no_grad()
    def step(self, max_norm):
        norm = torch.nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], max_norm or math.inf)
        bad = (~norm.isfinite()).float()  # where it is 1, torch's fused update leaves all as it is
        self.before_update()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p not in self.state:
                    self.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                     "exp_avg_sq": torch.zeros_like(p)}
            if params:
                first, second, steps = ([self.state[p][k] for p in params] for k in ("exp_avg", "exp_avg_sq", "step"))
                adamw(params, [p.grad for p in params], first, second, [], steps, fused=True, found_inf=bad,
                      amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                      weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)
        return norm

    def master(self, p):
        return p


class MixedAdamW(Optimizer):
    """AdamW on fp32 masters of a model whose matrices it turns into bf16; vectors (norms, biases) stay fp32.

    state[p]: step, exp_avg, exp_avg_sq as in torch's AdamW, and for matrices `master`. A parameter without gradient is
    left alone; `step`, on the host, counts updates that were skipped too. Without `mixed` all parameters keep their
    precision.
    """

    def __init__(self, params, lr, betas, weight_decay, eps=1e-8, mixed=True):
        super().__init__(params, lr, betas, weight_decay, eps)
        self.mixed = mixed
        self.sums = {}    # {p: fp32 sum of its gradients} between the micro-batches of a step
        # of the fused updates: {a group's number: [(parameters, their AdamWTables)]}, {a shape: Muon's table}
        self.tables = {}
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].update(self.first_state(p, group))
                if mixed and p.dim() > 1:
                    self.state[p]["master"] = p.data
                    p.data = p.data.to(torch.bfloat16)

    def first_state(self, p, group):
        return dict(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))

    def master(self, p):
        """The fp32 tensor of a parameter."""
        return self.state[p].get("master", p)

    def drop(self, params):
        super().drop(params)
        self.tables.clear()  # they hold addresses

    @torch.no_grad()
    def accumulate(self, last):
        """Before a further micro-batch's backward: bf16 gradients are summed in fp32, and handed back for the last one.

        So however many micro-batches there are, their sum is rounded to bf16 twice, and DDP reduces it with the last
        gradient.
        """
        for p in self.state:
            if p.dtype is torch.bfloat16 and p.grad is not None:
                self.sums[p] = self.sums[p].add_(p.grad) if p in self.sums else p.grad.float()
                p.grad = self.sums.pop(p).to(p.dtype) if last else None

    def step(self, max_norm):
        """One update with gradients clipped to the global norm max_norm (0: no clipping); returns the norm before."""
        self.advance()
        return self.move(max_norm)

    def advance(self):
        """The host's part of a step: counts it, and uploads the numbers that are new in every step."""
        self.before_update()
        for number, group in enumerate(self.param_groups):
            self.advance_group(number, group)

    @torch.no_grad()
    def move(self, max_norm):
        """The device's part, the same launches in every step: so a CUDA graph can repeat it."""
        norm = self.norm([p.grad for group in self.param_groups for p in group["params"] if p.grad is not None])
        scale = (max_norm / (norm + 1e-6)).clamp(max=1) if max_norm else torch.ones_like(norm)
        scale = torch.where(norm.isfinite(), scale, -1.0)  # negative: nothing changes
        for number, group in enumerate(self.param_groups):
            self.move_group(number, group, scale)
        return norm

    def norm(self, grads):
        """total_norm; under fsdp of all ranks' shares, after the gradients of what is whole are averaged."""
        shares, whole = ([g for g in grads if hasattr(g, "to_local") is split] for split in (True, False))
        if not shares:
            return total_norm(grads)
        square = total_norm([local(g) for g in shares]).square().reshape(1)
        dist.all_reduce(square)
        if whole:
            values = torch.stack(whole)  # scalars
            dist.all_reduce(values)
            torch._foreach_copy_(whole, (values / dist.get_world_size()).unbind())
            square += total_norm(whole).square()
        return square.sqrt()[0]

    def is_fused(self):
        return ops.ON and ops.can_adamw(local(self.param_groups[0]["params"][0]))

    def fused_parts(self, number, group):
        """[(parameters, AdamWTables)]: the vectors of a group, then its matrices, where one of them has a gradient.

        Those without (guides that a step skips) stand in the same table.
        """
        if number not in self.tables:
            kinds = ([p for p in group["params"] if ("master" in self.state[p]) is mixed] for mixed in (False, True))
            self.tables[number] = [(params, self.make_table(params)) for params in kinds if params]
        return [(params, table) for params, table in self.tables[number] if any(p.grad is not None for p in params)]

    def advance_group(self, number, group):
        for p in group["params"]:
            self.state[p]["step"] += p.grad is not None
        if self.is_fused():
            for params, table in self.fused_parts(number, group):
                grads = [None if p.grad is None else local(p.grad) for p in params]
                numbers = [(0.0, 1.0, 0.0) if p.grad is None else
                           (*self.corrections(p, group), group["lr"] * group["weight_decay"]) for p in params]
                table.upload(grads, numbers)

    def make_table(self, params):
        """All that the fused update reads of params, which are all matrices with masters or all without."""
        states = [self.state[p] for p in params]
        first, second = ([local(s[moment]) for s in states] for moment in ("exp_avg", "exp_avg_sq"))
        weights = [local(self.master(p).data) for p in params]
        return ops.AdamWTables(weights, [p.data for p in params] if "master" in states[0] else None, first, second)

    def corrections(self, p, group):
        """(lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)) of a parameter's own step count t."""
        t = self.state[p]["step"].item()
        return group["lr"] / (1 - group["betas"][0] ** t), (1 - group["betas"][1] ** t) ** -0.5

    def move_group(self, number, group, scale):
        if self.is_fused():
            for _, table in self.fused_parts(number, group):
                ops.adamw(table, scale, group["betas"], group["eps"])
        else:
            self.update([p for p in group["params"] if p.grad is not None], scale, group)

    def update(self, params, scale, group):
        """AdamW in plain torch, where the fused kernel does not run."""
        beta1, beta2 = group["betas"]
        for p in params:
            weight, grad = local(self.master(p)), local(p.grad).float() * scale
            first, second = (local(self.state[p][name]) for name in ("exp_avg", "exp_avg_sq"))
            rate, root = self.corrections(p, group)
            m, v = first.lerp(grad, 1 - beta1), second.lerp(grad * grad, 1 - beta2)
            moved = weight * (1 - group["lr"] * group["weight_decay"]) - rate * m / (v.sqrt() * root + group["eps"])
            for tensor, new in ((first, m), (second, v), (weight, moved)):
                tensor.copy_(torch.where(scale >= 0, new, tensor))
            if "master" in self.state[p]:
                p.copy_(weight)


# ----------------------------------------------------------------------------------------------------------------------
# Muon

# Polar Express (arXiv 2505.16932): odd polynomials a x + b x^3 + c x^5, which one after the other bring singular values
# between 0.001 and 1 close to 1
POLAR_EXPRESS = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
                 (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def unit(x, margin):
    """x (K, m, n) with no singular value above 1 / margin."""
    return x / (x.norm(dim=(-2, -1), keepdim=True) * margin + 1e-7)


def polar(x, polynomials=POLAR_EXPRESS, margin=1.02, unit=unit):
    """x (K, m, n) = U S V^T -> about U V^T, matrix by matrix, in x's precision; the margin covers bf16's rounding."""
    x = unit(x, margin)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in polynomials:
        gram = x.mT @ x if tall else x @ x.mT  # of the smaller side
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, poly, beta=a) if tall else torch.baddbmm(x, poly, x, beta=a)
    return x


def nesterov(grads, momentum, scale, mu, dtype):
    """momentum <- mu momentum + (1 - mu) grads, in place; returns the step that looks one ahead. All (K, m, n).

    With a negative scale the momentum stays, and the step is of gradients 0.
    """
    grads = torch.where(scale >= 0, grads.float() * scale, 0)  # not a product alone: NaN times 0 is NaN
    momentum.add_(torch.where(scale >= 0, (1 - mu) * (grads - momentum), 0))
    return (grads + mu * (momentum - grads)).to(dtype)


def descend(weights, step, rate, decay, scale):
    """weights -= rate step + decay weights, in place, all (K, m, n); no decay where the step leads away from 0.

    The m rows of a tall step, or the n columns of a wide one, get one norm, which an orthogonal step has in the mean:
    so every hidden unit moves alike. With a negative scale nothing changes.
    """
    step = normed(step)
    weights.sub_(torch.where(scale >= 0, rate * step + decay * weights * (step * weights > 0), 0))


def normed(step):
    """The rows of a tall step, or the columns of a wide one, brought to one norm; (K, m, n) in float32."""
    step = step.float()
    rows = step.size(-2) >= step.size(-1)
    share = min(step.shape[1:]) / max(step.shape[1:])
    return step * (share ** 0.5 / step.norm(dim=-1 if rows else -2, keepdim=True).clamp_min(1e-7))


class Muon(MixedAdamW):
    """Muon (Jordan et al. 2024) on the matrices of the blocks, AdamW on everything else, every group with its own rate.

        M <- mu M + (1 - mu) G        W <- W - lr sqrt(max(1, rows / columns)) polar(mu M + (1 - mu) G) - lr decay W

    The rows of polar's result, of a wide one the columns, get one norm; decay acts only where the step leads towards 0.
    Queries, keys and values are matrices of their own, and so is every block of a 3-D factor. Equal shapes are
    orthogonalised in one batch; of several ranks each takes its share of the batch, and all get all of it. state[p]
    of a matrix: momentum, and with `mixed` master. dtype: of the orthogonalisation; by default bf16 with `mixed`.
    """

    def __init__(self, model, cfg, mixed, compile=False, dtype=None):
        heads = cfg.n_head, cfg.n_kv_head, cfg.n_kv_head
        self.rows = {block.attn.qkv.weight: [n * block.attn.head_size for n in heads] for block in model.blocks
                     if not cfg.qk_rank}
        self.dtype = dtype or (torch.bfloat16 if mixed else torch.float32)
        self.nesterov, self.unit, self.descend = (torch.compile(f, dynamic=False) if compile else f
                                                  for f in (nesterov, unit, descend))
        self.momentum, self.decay, self.rates = 0.95, cfg.weight_decay, None  # train moves the first two
        super().__init__(muon_groups(model, cfg), cfg.lr, cfg.betas, 0.0, eps=1e-10, mixed=mixed)

    def first_state(self, p, group):
        return dict(momentum=torch.zeros_like(p)) if group.get("muon") else super().first_state(p, group)

    def matrices(self, p, t):
        """t, of the shape of parameter p, cut into the matrices that are each orthogonalised by themselves."""
        return t.unbind() if t.dim() == 3 else t.split(self.rows[p]) if p in self.rows else (t,)

    def advance_group(self, number, group):
        if not group.get("muon"):
            return super().advance_group(number, group)
        if self.rates is None:
            self.rates = Upload(torch.zeros(3, device=group["params"][0].device))
        self.rates([group["lr"], self.momentum, group["lr"] * self.decay])
        for key, matrices in self.equal_matrices(group).items() if self.is_in_place(group) else ():
            if key not in self.tables:
                self.tables[key] = ops.MuonTable(matrices)
            self.tables[key].upload(matrices)

    def move_group(self, number, group, scale):
        if not group.get("muon"):
            return super().move_group(number, group, scale)
        if any(hasattr(p, "to_local") for p in group["params"]):
            return self.update_split(group, scale)
        for key, matrices in self.equal_matrices(group).items():
            if self.is_in_place(group):
                table, rates = self.tables[key], self.rates.tensor
                ops.descend(table, self.shared_polar(ops.nesterov(table, rates, scale, self.dtype)), rates, scale)
            else:
                self.update_equal(matrices, scale)

    def is_in_place(self, group):
        """Whether kernels read and write the matrices where they lie. Under fsdp they are shares of matrices."""
        p = group["params"][0]
        return ops.ON and not hasattr(p, "to_local") and ops.can_muon(p)

    def equal_matrices(self, group):
        """{(rows, columns, count): [(gradient, momentum, fp32 weight, weight)]} of the matrices with a gradient."""
        shapes = {}
        for p in group["params"]:
            if p.grad is not None:
                tensors = p.grad, self.state[p]["momentum"], self.master(p), p
                for pieces in zip(*(self.matrices(p, t.detach()) for t in tensors)):
                    shapes.setdefault(pieces[0].shape, []).append(pieces)
        return {(*shape, len(matrices)): matrices for shape, matrices in shapes.items()}

    def update_equal(self, matrices, scale):
        """One step of equal matrices in plain torch, where the kernels do not run."""
        lr, mu, decay = self.rates.tensor.unbind()  # tensors: a new number would be a new compilation
        grads, momenta, weights, copies = (list(tensors) for tensors in zip(*matrices))
        momentum, weight = torch.stack(momenta), torch.stack(weights)
        _, rows, columns = weight.shape
        step = self.shared_polar(self.nesterov(torch.stack(grads), momentum, scale, mu, self.dtype))
        self.descend(weight, step, lr * max(1, rows / columns) ** 0.5, decay, scale)
        torch._foreach_copy_(momenta, momentum.unbind())
        torch._foreach_copy_(weights, weight.unbind())
        if self.mixed:
            torch._foreach_copy_(copies, weight.unbind())

    def update_split(self, group, scale):
        """The same under fsdp: momenta and weights are shares; a step is gathered, and each rank applies its share."""
        shapes, steps = {}, {}
        for p in group["params"]:
            if p.grad is not None:
                mine = torch.empty_like(p, dtype=self.dtype)
                grad, momentum = local(p.grad)[None], local(self.state[p]["momentum"])[None]
                local(mine).copy_(nesterov(grad, momentum, scale, self.momentum, self.dtype)[0])
                steps[p] = full(mine).float()
                for piece in self.matrices(p, steps[p]):
                    shapes.setdefault(piece.shape, []).append(piece)
        for (rows, columns), pieces in shapes.items():
            rate = group["lr"] * max(1, rows / columns) ** 0.5
            found = rate * normed(self.shared_polar(torch.stack(pieces).to(self.dtype)))
            torch._foreach_copy_(pieces, found.unbind())
        for p, step in steps.items():
            weight, step = local(p), local(share_of(step, p))
            decayed = group["lr"] * self.decay * weight * (step * weight > 0)
            weight.sub_(torch.where(scale >= 0, step + decayed, 0))

    def shared_polar(self, x):
        """polar(x) (K, m, n), of which every rank computes K / world matrices."""
        if not dist.is_initialized():
            return polar(x, unit=self.unit)
        each = -(-len(x) // dist.get_world_size())
        mine = x[dist.get_rank() * each:][:each]
        part, whole = x.new_zeros(each, *x.shape[1:]), x.new_empty(each * dist.get_world_size(), *x.shape[1:])
        part[:len(mine)] = polar(mine, unit=self.unit)
        dist.all_gather_into_tensor(whole, part)
        return whole[:len(x)]


def kind_of(name, p) -> str:
    """Which of Muon's groups a parameter belongs to. A head that is the embedding counts as one."""
    if name.startswith(("wte.", "wpe.")):
        return "embed"
    if name.startswith("head."):
        return "head"
    if ".values." in name:
        return "values"
    if name.endswith(".b") or name.startswith("smear."):  # b of embed_skip
        return "skip"
    return "matrix" if p.dim() > 1 and ".gate." not in name else "vector"


def muon_groups(model, cfg):
    """Groups of a model's parameters. The schedule moves cfg.lr; `ratio` x that is the rate of a group.

    The embeddings' second moments are long, since most rows of a table have a gradient now and then only.
    """
    kinds = {}
    for name, p in model.named_parameters():
        kinds.setdefault(kind_of(name, p), []).append(p)
    of_adamw = {  # learning rate, betas, weight decay
        "embed": (cfg.embed_lr, (0.8, 0.995), 0.0),
        "values": (0.5 * cfg.embed_lr, (0.8, 0.995), 0.01),
        "head": (cfg.head_lr, (0.8, 0.96), 0.0),
        "vector": (cfg.vector_lr, (0.8, 0.95), 0.0),
        "skip": (cfg.skip_lr, (0.96, 0.95), 0.0)}
    groups = [dict(params=kinds[kind], ratio=lr / cfg.lr, betas=betas, weight_decay=decay)
              for kind, (lr, betas, decay) in of_adamw.items() if kind in kinds]
    return [dict(params=kinds["matrix"], ratio=1.0, muon=True), *groups]
