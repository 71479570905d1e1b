"""AdamW with gradient clipping, in two forms with one face.

`AdamW` is torch's. `MixedAdamW` is for bf16 training: the model's matrices are bf16, cast once per optimiser step, and the fp32
masters live here. A step reads each gradient once, as bf16, and writes the new bf16 weights beside the masters.
"""
import math

import torch

from model import ops


def total_norm(grads):
    """The norm of all gradients together, 0-d float32; each dtype is reduced in one launch."""
    parts = [norm for dtype in {g.dtype for g in grads}
             for norm in torch._foreach_norm([g for g in grads if g.dtype is dtype], dtype=torch.promote_types(dtype, torch.float32))]
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

    state[p]: step, exp_avg, exp_avg_sq as in torch's AdamW, and for matrices `master`. A parameter without gradient is left alone.
    """

    def __init__(self, params, lr, betas, weight_decay, eps=1e-8):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps))
        self.sums, self.tables = {}, {}                         # tables: of the fused update, for vectors and for matrices
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            if p.dim() > 1:
                state["master"] = p.data
                p.data = p.data.to(torch.bfloat16)

    def master(self, p):
        """The fp32 tensor behind a parameter."""
        return self.state[p].get("master", p)

    @torch.no_grad()
    def accumulate(self, last):
        """Before a further micro-batch's backward: bf16 gradients so far are summed in fp32, and handed back for the last one.

        So a sum over many micro-batches is rounded once, and DDP reduces it with the last gradient.
        """
        for p in self.state:
            if p.dtype is torch.bfloat16 and p.grad is not None:
                self.sums[p] = self.sums[p].add_(p.grad) if p in self.sums else p.grad.float()
                p.grad = self.sums.pop(p).to(p.dtype) if last else None

    @torch.no_grad()
    def step(self, max_norm):
        """One update with gradients scaled so that their global norm is at most max_norm (0: no clipping); returns the norm before."""
        group = self.param_groups[0]
        params = [p for p in group["params"] if p.grad is not None]
        norm = total_norm([p.grad for p in params])
        scale = (max_norm / (norm + 1e-6)).clamp(max=1) if max_norm else torch.ones_like(norm)
        for p in params:
            self.state[p]["step"] += 1
        if ops.ON and ops.can_adamw(norm):
            for mixed in (False, True):
                self.update_fused([p for p in group["params"] if ("master" in self.state[p]) is mixed], mixed, scale, group)
        else:
            self.update(params, scale, group)
        return norm

    def corrections(self, p, group):
        """(lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)) of a parameter's own step count t."""
        t = self.state[p]["step"].item()
        return group["lr"] / (1 - group["betas"][0] ** t), (1 - group["betas"][1] ** t) ** -0.5

    def update_fused(self, params, mixed, scale, group):
        """All of them in one launch; those without gradient (guides that a step skips) stand in the same tables."""
        if not any(p.grad is not None for p in params):
            return
        key = tuple(map(id, params))
        if self.tables.get(mixed, (None,))[0] != key:  # at the start, and when the guides have left
            states = [self.state[p] for p in params]
            self.tables[mixed] = key, ops.adamw_tables([self.master(p).data for p in params], [p.data for p in params] if mixed else None,
                                                           [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states])
        corrections = [(0.0, 1.0) if p.grad is None else self.corrections(p, group) for p in params]
        ops.adamw(self.tables[mixed][1], [p.grad for p in params], corrections, scale, group["lr"] * group["weight_decay"], group["betas"], group["eps"])

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
