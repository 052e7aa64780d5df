"""Put the zoo's layers into models that exist: timm, torchvision, transformers or your own."""

from .activation import convert_activation
from .norm_act import convert_norm_act
from .report import ConversionError, ConversionReport, Kept, Replacement

__all__ = ["ConversionError", "ConversionReport", "Kept", "Replacement", "convert_activation", "convert_norm_act"]
