"""Lightning data modules. Each works without a download."""

from .shapes import Shapes
from .text import ByteText

__all__ = ["ByteText", "Shapes"]
