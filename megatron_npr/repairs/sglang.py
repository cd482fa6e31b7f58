"""Repairs of SGLang: what its log-probs are those of, and what it leaves behind in PyTorch.

Nothing here imports SGLang before a context is entered.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from megatron_npr.repairs.repair import Repair

_SGLANG = "sglang==0.5.20"
_SWITCH = "SGLANG_RETURN_ORIGINAL_LOGPROB"


@contextlib.contextmanager
def policy_log_probs() -> Iterator[None]:
    """An sglang.Engine that is made within this context, SGLang's first import included, gives log-probs of the policy."""
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "1"  # its processes inherit it, and read it when they import the sampler
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before


@contextlib.contextmanager
def handles_by_uuid() -> Iterator[None]:
    """Within this context tensors of a GPU are pickled as handles that name it by its UUID."""
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
    from torch.multiprocessing import reductions

    before = dict(vars(reductions))
    if "_reduce_tensor_original" in before:  # SGLang has done so itself, for good
        yield
        return
    monkey_patch_torch_reductions()
    try:
        yield
    finally:
        for name in vars(reductions).keys() - before.keys():
            delattr(reductions, name)
        for name in ("reduce_tensor", "rebuild_cuda_tensor"):
            setattr(reductions, name, before[name])
        reductions.init_reductions()  # the pickler holds the functions, too


REPAIRS = (
    Repair(
        f"environment variable {_SWITCH}",
        _SGLANG,
        "log-probs are the sampler's, after temperature and truncation, not the policy's",
        "a request can ask for the policy's",
        "`sglang.policy_log_probs`, while SGLang is imported and its engine made",
    ),
    Repair(
        "torch.multiprocessing.reductions:reduce_tensor",
        _SGLANG,
        "handles number the GPU as the sender does; SGLang's own change fixes that and stays, for CPU tensors, too",
        "torch's handles name the GPU by its UUID (pytorch/pytorch#149248)",
        "`sglang.handles_by_uuid`, while a message is pickled",
    ),
)
