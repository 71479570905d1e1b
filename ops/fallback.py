"""A fused kernel that fails here is replaced by plain torch, with one line in the log."""
import logging

import torch

from config import reason

_logged, _tried = set(), {}


@torch.compiler.assume_constant_result
def log_once(message):
    if message not in _logged:
        _logged.add(message)
        logging.getLogger("ops").warning("%s", message)


@torch.compiler.assume_constant_result
def works(op, trial, *variant) -> bool:
    """Whether `trial`, which launches the kernels of `op` on small inputs, succeeds: it runs once for each variant.

    A newer torch or Triton, a missing C compiler or an unknown card end here and not in the middle of a training step.
    """
    if (op, *variant) not in _tried:
        try:
            trial()
            _tried[op, *variant] = True
        except Exception as e:  # compilers raise errors of many types, which share no base
            _tried[op, *variant] = False
            log_once(f"{op}: plain torch instead of a fused kernel, which fails here: {reason(e)}")
    return _tried[op, *variant]
