"""AdamW and Muon with gradient clipping and one interface: step(max_norm), accumulate(last), master(p).

`AdamW` is torch's. `MixedAdamW` is for bf16 training: the model's matrices are bf16, cast once per optimiser step, and
the fp32 masters live here. A step reads each gradient once, as bf16, and writes new bf16 weights beside the masters.
`Muon` is MixedAdamW on embeddings, head and vectors; the matrices of the blocks move by the orthogonalised momentum.
"""
import math

import torch
import torch.distributed as dist

from model import ops


def total_norm(grads):
    """The norm of all gradients together, 0-d float32; each dtype is reduced in one launch."""
    parts = []
    for dtype in dict.fromkeys(g.dtype for g in grads):  # not a set: its order differs between ranks
        exact = torch.promote_types(dtype, torch.float32)
        parts += torch._foreach_norm([g for g in grads if g.dtype is dtype], dtype=exact)
    return torch.linalg.vector_norm(torch.stack(parts)) if parts else torch.zeros(())


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW whose step clips the global gradient norm to max_norm (0: no clipping) and returns it."""

    def accumulate(self, last):
        """Nothing to do between micro-batches: fp32 gradients add up in place."""

    def step(self, max_norm):
        norm = torch.nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], max_norm or math.inf)
        super().step()
        return norm

    def master(self, p):
        return p


class MixedAdamW(torch.optim.Optimizer):
    """AdamW on fp32 masters of a model whose matrices it turns into bf16; vectors (norms, biases) stay fp32.

    state[p]: step, exp_avg, exp_avg_sq as in torch's AdamW, and for matrices `master`. A parameter without gradient is
    left alone. Without `mixed` all parameters keep their precision.
    """

    def __init__(self, params, lr, betas, weight_decay, eps=1e-8, mixed=True):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps))
        self.sums, self.tables = {}, {}  # tables: of the fused update, of each group's vectors and of its matrices
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

    @torch.no_grad()
    def step(self, max_norm):
        """One update with gradients clipped to the global norm max_norm (0: no clipping); returns the norm before."""
        norm = total_norm([p.grad for group in self.param_groups for p in group["params"] if p.grad is not None])
        scale = (max_norm / (norm + 1e-6)).clamp(max=1) if max_norm else torch.ones_like(norm)
        for number, group in enumerate(self.param_groups):
            self.update_group(number, group, scale)
        return norm

    def update_group(self, number, group, scale):
        for p in group["params"]:
            self.state[p]["step"] += p.grad is not None
        if ops.ON and ops.can_adamw(scale):
            for mixed in (False, True):
                params = [p for p in group["params"] if ("master" in self.state[p]) is mixed]
                self.update_fused(params, (number, mixed), scale, group)
        else:
            self.update([p for p in group["params"] if p.grad is not None], scale, group)

    def corrections(self, p, group):
        """(lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)) of a parameter's own step count t."""
        t = self.state[p]["step"].item()
        return group["lr"] / (1 - group["betas"][0] ** t), (1 - group["betas"][1] ** t) ** -0.5

    def update_fused(self, params, table, scale, group):
        """All of them in one launch; those without gradient (guides that a step skips) stand in the same tables."""
        if not any(p.grad is not None for p in params):
            return
        key = tuple(map(id, params))
        if self.tables.get(table, (None,))[0] != key:  # at the start, and after the guides are dropped
            states = [self.state[p] for p in params]
            copies = [p.data for p in params] if table[1] else None
            first, second = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
            self.tables[table] = key, ops.adamw_tables([self.master(p).data for p in params], copies, first, second)
        corrections = [(0.0, 1.0) if p.grad is None else self.corrections(p, group) for p in params]
        ops.adamw(self.tables[table][1], [p.grad for p in params], corrections, scale,
                  group["lr"] * group["weight_decay"], group["betas"], group["eps"])

    def update(self, params, scale, group):
        """The same in plain torch."""
        beta1, beta2 = group["betas"]
        for p in params:
            state, weight, grad = self.state[p], self.master(p), p.grad.float() * scale
            rate, root = self.corrections(p, group)
            m, v = state["exp_avg"].lerp_(grad, 1 - beta1), state["exp_avg_sq"].lerp_(grad * grad, 1 - beta2)
            weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(rate * m / (v.sqrt() * root + group["eps"]))
            if weight is not p:
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


def polar(x, polynomials=POLAR_EXPRESS, margin=1.02):
    """x (K, m, n) = U S V^T -> about U V^T, matrix by matrix, in x's precision; the margin covers bf16's rounding."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * margin + 1e-7)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in polynomials:
        gram = x.mT @ x if tall else x @ x.mT  # of the smaller side
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, poly, beta=a) if tall else torch.baddbmm(x, poly, x, beta=a)
    return x


def nesterov(grads, momentum, scale, mu, dtype):
    """momentum <- mu momentum + (1 - mu) grads, in place; returns the step that looks one ahead. All (K, m, n)."""
    grads = grads.float() * scale
    momentum.add_((1 - mu) * (grads - momentum))
    return (grads + mu * (momentum - grads)).to(dtype)


def descend(weights, step, rate, decay):
    """weights -= rate step + decay weights, in place, all (K, m, n); no decay where the step leads away from 0.

    The m rows of a tall step, or the n columns of a wide one, get one norm, which an orthogonal step has in the mean:
    so every hidden unit moves alike.
    """
    step = step.float()
    rows = step.size(-2) >= step.size(-1)
    share = min(step.shape[1:]) / max(step.shape[1:])
    step = step * (share ** 0.5 / step.norm(dim=-1 if rows else -2, keepdim=True).clamp_min(1e-7))
    weights.sub_(rate * step + decay * weights * (step * weights > 0))


class Muon(MixedAdamW):
    """Muon (Jordan et al. 2024) on the matrices of the blocks, AdamW on everything else, every group with its own rate.

        M <- mu M + (1 - mu) G        W <- W - lr sqrt(max(1, rows / columns)) polar(mu M + (1 - mu) G) - lr decay W

    Queries, keys and values are matrices of their own, and so is every block of a 3-D factor. Equal shapes are
    orthogonalised in one batch; of several ranks each takes its share of the batch, and all get all of it. state[p]
    of a matrix: momentum, and with `mixed` master.
    """

    def __init__(self, model, cfg, mixed, compile=False):
        heads = cfg.n_head, cfg.n_kv_head, cfg.n_kv_head
        self.rows = {block.attn.qkv.weight: [n * block.attn.head_size for n in heads] for block in model.blocks}
        self.dtype = torch.bfloat16 if mixed else torch.float32
        self.nesterov, self.descend = (torch.compile(f, dynamic=False) if compile else f for f in (nesterov, descend))
        self.momentum, self.decay = 0.95, cfg.weight_decay  # train moves them
        super().__init__(muon_groups(model, cfg), cfg.lr, cfg.betas, 0.0, eps=1e-10, mixed=mixed)

    def first_state(self, p, group):
        return dict(momentum=torch.zeros_like(p)) if group.get("muon") else super().first_state(p, group)

    def matrices(self, p, t):
        """t, of p's shape, as the matrices that are orthogonalised each by itself."""
        return t.unbind() if t.dim() == 3 else t.split(self.rows[p]) if p in self.rows else (t,)

    def update_group(self, number, group, scale):
        if not group.get("muon"):
            return super().update_group(number, group, scale)
        shapes = {}
        for p in group["params"]:
            if p.grad is not None:
                tensors = p.grad, self.state[p]["momentum"], self.master(p), p
                for pieces in zip(*(self.matrices(p, t.detach()) for t in tensors)):
                    shapes.setdefault(pieces[0].shape, []).append(pieces)
        # tensors, since a new number would be a new compilation
        lr, mu, decay = (torch.tensor(v) for v in (group["lr"], self.momentum, group["lr"] * self.decay))
        for (rows, columns), pieces in shapes.items():
            grads, momenta, weights, copies = (list(tensors) for tensors in zip(*pieces))
            momentum, weight = torch.stack(momenta), torch.stack(weights)
            step = self.shared_polar(self.nesterov(torch.stack(grads), momentum, scale, mu, self.dtype))
            self.descend(weight, step, lr * max(1, rows / columns) ** 0.5, decay)
            torch._foreach_copy_(momenta, momentum.unbind())
            torch._foreach_copy_(weights, weight.unbind())
            if self.dtype is torch.bfloat16:
                torch._foreach_copy_(copies, weight.unbind())

    def shared_polar(self, x):
        """polar(x) (K, m, n), of which every rank computes K / world matrices."""
        if not dist.is_initialized():
            return polar(x)
        each = -(-len(x) // dist.get_world_size())
        mine = x[dist.get_rank() * each:][:each]
        part, whole = x.new_zeros(each, *x.shape[1:]), x.new_empty(each * dist.get_world_size(), *x.shape[1:])
        part[:len(mine)] = polar(mine)
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
    """Groups of a model's parameters; ratio: of their rate to cfg.lr, which the schedule moves.

    The embeddings' second moments are long, since most rows of a table have a gradient now and then only.
    """
    kinds = {}
    for name, p in model.named_parameters():
        kinds.setdefault(kind_of(name, p), []).append(p)
    adamw = {"embed": (cfg.embed_lr, (0.8, 0.995), 0.0), "values": (0.5 * cfg.embed_lr, (0.8, 0.995), 0.01),
             "head": (cfg.head_lr, (0.8, 0.96), 0.0), "vector": (cfg.vector_lr, (0.8, 0.95), 0.0),
             "skip": (cfg.skip_lr, (0.96, 0.95), 0.0)}
    groups = [dict(params=kinds[kind], ratio=lr / cfg.lr, betas=betas, weight_decay=decay)
              for kind, (lr, betas, decay) in adamw.items() if kind in kinds]
    return [dict(params=kinds["matrix"], ratio=1.0, muon=True), *groups]
