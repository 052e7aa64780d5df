"""What can go wrong between a network and a map: one class a mistake, each message with what to do."""

from ..errors import ZooError


class CAMError(ZooError, ValueError):
    """Base of every mistake of a class activation map."""


class UnknownLayer(CAMError):
    """The model has no layer of that name, or the module is not inside it."""


class LayerNotReached(CAMError):
    """The forward pass does not run that layer."""


class LayerCalledTwice(CAMError):
    """The forward pass runs that layer more than once, and which call is meant was not said."""


class NotSpatial(CAMError):
    """What the layer returns has no height and width, or none of a map's."""


class ReshapeNeeded(CAMError):
    """What the layer returns has a layout that cannot be told from the outside."""


class DisconnectedTarget(CAMError):
    """The score does not depend on the layer."""


class ZeroGradient(CAMError):
    """The score does not change with the layer's map."""


class TargetOutOfRange(CAMError):
    """A class the model does not have."""


class TargetCount(CAMError):
    """Targets that are not one an image."""


class TargetNotScalar(CAMError):
    """A target that is not one number an image."""


class EmptySelection(CAMError):
    """A selection without a feature map or neuron, or outside the layer."""


class ExactTooLarge(CAMError):
    """Exact derivatives of a layer with too many neurons."""


class InferenceParameters(CAMError):
    """A model that was made in inference mode."""


class NonFinite(CAMError):
    """NaN or infinity where scores or gradients were expected."""


class ShardedModel(CAMError):
    """A model whose parameters are spread over processes."""


class CAMWarning(UserWarning):
    """A map that says less than it seems to; each kind once an explainer."""
