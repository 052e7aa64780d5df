"""Lightning data modules. `ByteText` and `Shapes` work without a download, `Digits` with scikit-learn."""

from .digits import Digits
from .folder import ImageFolder
from .shapes import Shapes
from .text import ByteText
from .tokens import TokenFiles

__all__ = ["ByteText", "Digits", "ImageFolder", "Shapes", "TokenFiles"]
