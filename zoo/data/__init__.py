"""Lightning data modules. `ByteText`, `Shapes`, `ProceduralScene` and `PlanarPicture` work without a download, `Digits`
with scikit-learn."""

from .digits import Digits
from .folder import ImageFolder
from .scenes import PlanarPicture, ProceduralScene
from .shapes import Shapes
from .text import ByteText
from .tokens import TokenFiles

__all__ = ["ByteText", "Digits", "ImageFolder", "PlanarPicture", "ProceduralScene", "Shapes", "TokenFiles"]
