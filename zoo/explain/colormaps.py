"""Colour maps as tables of 256 colours, so that drawing a heat map needs no matplotlib.

The tables are those of matplotlib 3.11: turbo is of Anton Mikhailov (Google, 2019, Apache-2.0), inferno and viridis of
Nathaniel Smith, Stéfan van der Walt and Eric Firing (2015, CC0), jet and gray of matplotlib itself (BSD-compatible).
"""

from __future__ import annotations

import base64
import zlib
from functools import cache

import torch
from torch import Tensor

# The differences along each of red, green and blue, modulo 256, of which zlib makes a third of the colours themselves.
_PACKED = {
    "turbo": (
        "eNplkkESwyAIRRVN7Lon6b73v1UiBT6ojR+ESSbBh/jJmbIrIUhKGlOyFWJxqKupd8/ybNJv7H+pSUSFiqmWqu4qCGImUvdgpm6L"
        "tIhWAmICm1OxLTPmFFy2Jp4h3ghm6kOX+jsgRqKA2tEWM84HLogD2I+VcKwTP69HOhro/ISPiAaQ9yaGOha+muJ1SB07xLhU3/Zq"
        "rZ1qouM8TLUeGFrx7r0twIN34g0q7H/j5f85X54nruMJTcLN0ZH6AcUFHHeQseuiMezZUGe/CyjoRTkuyy4p/QNGXWiQ"
    ),
    "jet": (
        "eNq1UgEKgCAMtG69u4d7VyGhGNGMzJ23HRsbYxjCKJsBA06X6YhWefq8yM6YEFlQyWa39Rl+uKRIKr9reF96mL0uVnCTPTeXlChW"
        "dISf3Yb90gNLoLKA"
    ),
    "inferno": (
        "eNqNUtEWhSAIA/H+/x9bB8YIfLo4RqYuwEREHeoIW/DFsW5v6PT3iwo5vsBvhzOXSkzgQkLijvBpDzzAARJBvSG/MEu50lUoagpR"
        "TXi6bdOL7jDnWq1mx3t1o+714WrnuBBQhfHU7dvmYLPVQtNizZKMZFzBSSSF5Kv9d/Mf8nNdAMmRlNzsjHgGnR5q4oJ5pfm7rirD"
        "S7Bws43h9ts02y8Lhmuf"
    ),
    "viridis": (
        "eNqNUgkOxCAIxPq1fUL//xTpgoMD1mSXOUATqaZ8RJrTxSSiTFMqk4FUVuRU7FWC62O4QDMYEZfRYXRFdKpXHJnNz7TV2kEeVZ35"
        "j5Af631DDqXQl0FBWEHYiXc8uz58uwi7p4acmn10XoscupecsDo7CjO6piHG8mGEfRE2asIB1Xm5+O8PghSICQ=="
    ),
    "gray": ("eNpjYCQAGJjwYwhBAY3Moj+fYdT/I9r/AH50Av4="),
}
COLORMAPS = tuple(_PACKED)


@cache
def colormap(name: str) -> Tensor:
    """uint8 [256, 3] of one of :data:`COLORMAPS`; not to be written to."""
    steps = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(_PACKED[name]))), dtype=torch.uint8)
    return steps.view(3, 256).cumsum(1, dtype=torch.uint8).T.contiguous()
