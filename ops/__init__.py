"""Fused kernels, optional: delete this folder, or run without a CUDA card or Triton, and everything works, slower.

    pointwise   Triton: rotary positions, residual add + norm, cross-entropy, AdamW, Muon (training)
    ffn         Triton: the structured FFN on Hopper                                      (training)
    decode      Triton: linears, attention and sampling on a few tokens                   (decoding)
    megakernel  CUDA: the whole step of up to four sequences as one kernel                (decoding)
    chain       CUDA: the step of 5 to 64 as kernels that overlap, linears on tensor cores (decoding)
    fallback    a kernel that fails here is turned off with one line in the log

Each caller asks in one place, as in `if ops.ON and ops.can_add_norm(x)`, and has plain torch beside it.
"""
import functools
import importlib.util
import os

import torch

from config import reason

# One switch for all kernels: tests and benchmarks turn it off to compare with plain torch.
ON = (importlib.util.find_spec("triton") is not None
      and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"))

if ON:
    try:
        from ops import chain, megakernel
        from ops.decode import (attend_prompts, can_attend_prompts, can_layer, can_sample, can_step, can_store, layer,
                                sample, step, store)
        from ops.ffn import can_ffn, fused_ffn
        from ops.pointwise import (AdamWTables, MuonTable, adamw, add_norm, can_adamw, can_add_norm, can_muon,
                                   can_rotate, can_token_loss, descend, nesterov, skip_norm, split_rotated, token_loss)
    except (ImportError, AttributeError, TypeError) as e:  # a version of torch or Triton that lacks what they use
        from ops.fallback import log_once
        ON = False
        log_once(f"plain torch instead of all fused kernels, which do not load here: {reason(e)}")


def fused_step(model, cache):
    """model.step in kernels, for one token a row, or None: a single kernel for few sequences, a chain of them for more,
    else one per linear. The cache is new."""
    whole = megakernel if len(cache.position) <= max(megakernel.BATCHES) else chain
    return whole.step_for(model, cache) or (functools.partial(step, model) if can_step(model, cache) else None)
