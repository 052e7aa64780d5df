"""Class activation maps: Grad-CAM, Grad-CAM++ and Smooth Grad-CAM++, for any network."""

from .cam import GradCAM, GradCAMpp, SmoothGradCAMpp, smooth_grad_cam_pp
from .errors import CAMError, CAMWarning
from .explainer import FeatureMap
from .overlay import colorize, denormalize, grid, overlay
from .reshape import NHWCReshape, TokenReshape
from .result import CAMResult
from .select import FeatureMaps, Neurons, Select
from .targets import ContrastTarget, DetectionTarget, SegmentationTarget, TopK

__all__ = [
    "CAMError",
    "CAMResult",
    "CAMWarning",
    "ContrastTarget",
    "DetectionTarget",
    "FeatureMap",
    "FeatureMaps",
    "GradCAM",
    "GradCAMpp",
    "NHWCReshape",
    "Neurons",
    "SegmentationTarget",
    "Select",
    "SmoothGradCAMpp",
    "TokenReshape",
    "TopK",
    "colorize",
    "denormalize",
    "grid",
    "overlay",
    "smooth_grad_cam_pp",
]
