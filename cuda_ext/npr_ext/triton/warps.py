"""How wide a program is."""

import triton


def warps_of_row(width: int) -> int:
    """Warps of a program that goes through a row of `width` numbers at once: 512 numbers a warp, 4 to 16 warps."""
    return max(4, min(16, triton.next_power_of_2(width) // 512))
