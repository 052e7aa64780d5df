"""Lightning data modules. `ByteText` and `Shapes` work without a download."""

from .shapes import Shapes
from .text import ByteText
from .tokens import TokenFiles

__all__ = ["ByteText", "Shapes", "TokenFiles"]
