"""The compiled operators: importing this registers torch.ops.npr and chooses the instruction set that they use.

It is the best that the processor has, up to the one that NPR_MAX_CPU_ISA names (as ONEDNN_MAX_CPU_ISA caps oneDNN's).
"""

import os
from collections.abc import Mapping, Sequence

import torch

from npr_ext.errors import UserError

CAP = "NPR_MAX_CPU_ISA"
ISAS = ("AVX2", "AVX512", "AVX512_BF16")  # on x86-64, each with all that those before it have
NEEDED = ("avx2", "bmi", "bmi2", "f16c", "fma3", "lzcnt")  # of x86-64-v3, by torch's names


def check_processor(capabilities: Mapping[str, object]) -> None:
    """UserError where the operators would be killed by an instruction that the processor does not have.

    Args:
        capabilities: what torch.cpu.get_capabilities gives.
    """
    missing = [name for name in NEEDED if not capabilities[name]] if "avx2" in capabilities else []
    if missing:
        raise UserError(
            f"this processor ({capabilities.get('cpu_name', 'of unknown name')}) has no {', '.join(missing)}: "
            "the operators need x86-64-v3, as all of Intel's since Haswell (2013) and AMD's since Excavator (2015) have"
        )


def allowed_isas(available: Sequence[str], cap: str) -> list[str]:
    """Those of the processor's instruction sets that are not above the cap ("": all); the first one always is
    allowed."""
    if not cap:
        return list(available)
    if cap.upper() not in ISAS:
        raise UserError(f"{CAP} is {cap!r}: it must be one of {', '.join(ISAS)}, or unset")
    below = ISAS[: ISAS.index(cap.upper()) + 1]
    return [available[0], *(name for name in available[1:] if name in below)]


def cpu_isa() -> str:
    """The instruction set that the CPU's operators use: one of ISAS on x86-64, GENERIC elsewhere."""
    return str(torch.ops.npr.cpu_isa())


def cpu_isas() -> list[str]:
    """Those that this process may use, from the least to the best."""
    return allowed_isas(torch.ops.npr.cpu_isas(), os.environ.get(CAP, ""))


check_processor(torch.cpu.get_capabilities())
from npr_ext import _operators  # noqa: E402, F401  (registers torch.ops.npr; not before the check)

torch.ops.npr.use_cpu_isa(cpu_isas()[-1])
