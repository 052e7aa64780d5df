"""What the methods have in common: options, passes over images and their noisy copies, maps out of weights.

Images and copies are rows of passes of at most `chunk_size` rows. A row of its own leaves nothing behind in the others:
the model is in evaluation. An image comes before its copies, since its scores say which class is explained.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels.ops import compute_dtype
from . import formulas
from .engine import LayerCall, Taps, diagonal, explaining, gradients, out_of_memory, rows_of, unwrapped
from .errors import CAMWarning, ExactTooLarge, NonFinite, TargetCount, UnknownLayer, ZeroGradient
from .formulas import Averages, Normalize
from .layers import LayerSpec, choose_layer, named_layers
from .reshape import Reshape, resolve_reshape
from .result import CAMResult, Fuse, Size, fused
from .select import FeatureMaps, Neurons, Select, as_select
from .targets import Scorer, Targets, default_output

MemoryFormat = Literal["channels_last", "preserve"]
Selection = Select | FeatureMaps | Neurons | None


class FeatureMap(NamedTuple):
    """What one feature map contributes.

    Args:
        index: its number.
        weight: w_k.
        contribution: abs(w_k) times the sum of its activations, by which they are ranked.
        map: w_k A_k, [h, w].
    """

    index: int
    weight: float
    contribution: float
    map: Tensor


class Row(NamedTuple):
    """A row of a pass: number of the image, and of its copy; 0 is the image itself."""

    image: int
    copy: int = 0


class LayerMaps:
    """What is known of a layer: activations of each image, [K, ...], and gradients over `scales`, [T, K, ...]."""

    def __init__(self, reshape: Reshape) -> None:
        self.reshape = reshape
        self.activations: list[Tensor] = []
        self.slopes: list[Tensor] = []
        self.scales: list[Tensor] = []  # [T], the largest gradient of the image without noise
        self.bends: list[tuple[Tensor, Tensor] | None] = []  # second and third derivatives, where wanted
        self.same = True  # whether noise has left every gradient as it was

    def activation(self) -> Tensor:
        """[B, K, ...]."""
        return torch.stack(self.activations)

    def scale(self) -> Tensor:
        """[B, T]."""
        return torch.stack(self.scales)


class Call:
    """One call of an explainer, and what it has found so far."""

    def __init__(self, x: Tensor, targets: Targets, kwargs: Mapping[str, Any]) -> None:
        self.x, self.scorer, self.kwargs = x, Scorer(targets, len(x)), kwargs
        self.layers: dict[str, LayerMaps] = {}
        self.scores: list[Tensor] = []  # [T] of each image
        self.outputs: list[Any] = []
        self.passed = 0
        self.linear: dict[str, bool] = {}
        self.averages: Averages | None = None  # of methods that average

    def arguments(self, image_of: Sequence[int]) -> dict[str, Any]:
        """Further arguments of a pass with rows of these images."""
        return rows_of(self.kwargs, len(self.x), image_of)


class Pass(NamedTuple):
    """What a pass has brought.

    Args:
        maps: by layer, as the layer returned them.
        grads: by layer, the gradient of each target.
        bends: by layer, second and third derivative of each target; empty unless they were asked for.
        scores: [rows, T].
    """

    maps: dict[str, Tensor]
    grads: dict[str, list[Tensor]]
    bends: dict[str, list[tuple[Tensor, Tensor]]]
    scores: Tensor


class Explainer:
    """Base of the methods; :class:`SmoothGradCAMpp` says what the arguments are."""

    _most_exact: int | None = None  # neurons of a layer whose second and third derivatives are wanted; None for none

    def __init__(
        self,
        model: nn.Module,
        layers: LayerSpec = None,
        *,
        chunk_size: int | Literal["auto"] = "auto",
        reshape: Literal["auto"] | Reshape = "auto",
        output_fn: Callable[[Any], Any] | None = None,
        normalize: Normalize = "max",
        layer_call: LayerCall = "only",
        memory_format: MemoryFormat = "channels_last",
        autocast: torch.dtype | None = None,
    ) -> None:
        self.name = type(self).__name__
        self._check_choice("normalize", normalize, get_args(Normalize))
        self._check_choice("layer_call", layer_call, get_args(LayerCall))
        self._check_choice("memory_format", memory_format, get_args(MemoryFormat))
        if chunk_size != "auto" and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ValueError(f"{self.name}: chunk_size must be 'auto' or at least 1, got {chunk_size!r}")
        if reshape != "auto" and not callable(reshape):
            raise ValueError(f"{self.name}: reshape must be 'auto' or a function to [B, K, h, w], got {reshape!r}")
        self.model = unwrapped(model)
        self.reshape: Literal["auto"] | Reshape = reshape
        self.chunk_size, self.normalize, self.layer_call = chunk_size, normalize, layer_call
        self.output_fn = output_fn or default_output
        self.memory_format, self.autocast = memory_format, autocast
        # Each pass copies kernels wider than a pixel into channels_last: with fewer pixels than a hundredth of their
        # entries that costs more than it saves (ResNet-18 and 50, VGG-11 on a CPU).
        kernels = (p for p in self.model.parameters() if p.ndim == 4 and p[0, 0].numel() > 1)
        self._pixels = sum(p.numel() for p in kernels) // 100
        self._asked = layers
        self.layers: list[str] | None = None  # of an automatic choice not before the first call
        if layers is not None and layers != "last":
            self.layers = list(named_layers(self.model, layers))
        self._warned: set[str] = set()

    def __call__(
        self,
        x: Tensor,
        targets: Targets = None,
        *,
        select: Selection = None,
        fuse: Fuse | None = None,
        size: Size = "input",
        forward_kwargs: Mapping[str, Any] | None = None,
    ) -> CAMResult:
        """Maps of a batch.

        Args:
            x: [B, C, H, W] as the model takes it, normalised; [B, C, L] or [B, C, D, H, W] for other networks.
            targets: None for the class of the highest score; a class; one an image, [B]; several, [B, T];
                :class:`TopK`; a function from the model's output to one number a row, or a list of such, one an image.
            select: which feature maps and neurons make the map; None for all.
            fuse: how the maps of several layers become one: "mean", "max", "product" or a function of [layers, ...].
            size: of heatmaps: "input", (H, W), or None for the layer's.
            forward_kwargs: further arguments of the model; tensors with B entries follow their images.

        Raises:
            CAMError: one of :mod:`zoo.explain.errors`, which says what to do.
            TypeError: if x is not floating point.
            ValueError: if x has no map, or fuse is unknown.
        """
        if fuse is not None and not callable(fuse):
            self._check_choice("fuse", fuse, ("mean", "max", "product"))
        selection = as_select(select)
        call = self._begun(x, targets, forward_kwargs)
        with explaining(self.model, call.x.device, self.autocast):
            self._resolve_layers(call)
            self._explain(call)
            return self._result(call, selection, fuse, size)

    def heatmap(self, x: Tensor, targets: Targets = None, *, layer: str | None = None, **options: Any) -> Tensor:
        """[B, H, W] in [0, 1], or [B, T, H, W] for T targets an image: :meth:`CAMResult.heatmap` of a call."""
        return self(x, targets, **options).heatmap(layer)

    def feature_maps(
        self, x: Tensor, targets: Targets = None, layer: str | None = None, top_k: int = 9
    ) -> list[FeatureMap]:
        """The feature maps that contribute most to the map of one image and one target, the greatest first.

        Args:
            x: [1, C, H, W].
            targets: as for a call, one.
            layer: which of several.
            top_k: how many at most.

        Raises:
            TargetCount: if there are several images or targets.
            UnknownLayer: if the layer is not explained.
        """
        call = self._begun(x, targets, None)
        if len(x) != 1 or call.scorer.k != 1:
            raise TargetCount(
                f"{self.name}.feature_maps: one image and one target at a time, got {len(x)} and {call.scorer.k}"
            )
        with explaining(self.model, call.x.device, self.autocast):
            self._resolve_layers(call)
            self._explain(call)
            name = layer or next(iter(call.layers))
            self._check_layer(call, name)
            weights, maps = self._weights(call, name, None), call.layers[name].activation()
            contributions = _contributions(weights, maps)[0, 0]
            order = contributions.topk(min(top_k, len(contributions))).indices.tolist()
            w = weights[0, 0]
            return [FeatureMap(k, float(w[k]), float(contributions[k]), w[k] * maps[0, k]) for k in order]

    def close(self) -> None:
        """Forget what was learnt about the network. Nothing is left on the network between calls anyway."""
        if self._asked is None or self._asked == "last":
            self.layers = None

    def __enter__(self) -> Explainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What a method adds

    def _explain(self, call: Call) -> None:
        """Run the passes that the method needs."""
        raise NotImplementedError

    def _took(self, call: Call, row: Row, index: int, score: Tensor, found: Pass) -> None:
        """A row has been passed, and of an image itself activations and gradients are in the call."""

    def _weights(self, call: Call, layer: str, mask: Tensor | None) -> Tensor:
        """w_k, [B, T, K], over all neurons or over those of a 0/1 mask."""
        raise NotImplementedError

    def _figures(self, call: Call) -> tuple[Tensor, Tensor]:
        """Effective number of samples and scale, [B, T] each."""
        raise NotImplementedError

    # Passes

    def _begun(self, x: Tensor, targets: Targets, kwargs: Mapping[str, Any] | None) -> Call:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{self.name}: x must be a floating-point tensor as the model takes it, got {got}")
        if not 3 <= x.ndim <= 5 or not len(x):
            raise ValueError(
                f"{self.name}: x must be [B, C, H, W] (or [B, C, L], [B, C, D, H, W]), got {list(x.shape)}"
            )
        with torch.inference_mode(False):
            x = x.clone() if x.is_inference() else x.detach()
        return Call(x, targets, dict(kwargs or {}))

    def _resolve_layers(self, call: Call) -> None:
        if self.layers is not None:
            return
        last = self._asked == "last"
        name, linear = self._chosen(call, last)
        self.layers = [name]
        if linear and not last:
            self._warn("linear", f"{self.name}: the score is linear behind every layer: smoothing changes nothing")

    def _chosen(self, call: Call, last: bool = False) -> tuple[str, bool]:
        target = call.scorer.of_first
        return choose_layer(self.model, call.x[:1], target, self.reshape, self.output_fn, call.arguments, last)

    def _pass_all(self, call: Call, rows: Sequence[Row], inputs: Callable[[Sequence[Row]], Tensor]) -> None:
        """Rows in passes as large as may be; half as large where memory does not suffice."""
        size = self.chunk_size if isinstance(self.chunk_size, int) else 32 if call.x.is_cuda else 8
        first = 0
        while first < len(rows):
            part = rows[first : first + size]
            try:
                found = self._pass(call, inputs(part), [row.image for row in part], [row.copy == 0 for row in part])
            except RuntimeError as error:
                if not out_of_memory(error) or len(part) == 1:
                    raise
                size = len(part) // 2
                continue
            self._take(call, part, found)
            first += len(part)

    def _pass(self, call: Call, x: Tensor, image_of: Sequence[int], clean: Sequence[bool]) -> Pass:
        if x.ndim == 4 and self.memory_format == "channels_last" and x[:, 0].numel() >= self._pixels:
            x = x.contiguous(memory_format=torch.channels_last)
        taps = Taps(named_layers(self.model, self.layers), self.layer_call)
        exact = self._most_exact is not None
        # of attention only the plain formula can be differentiated three times
        attention = sdpa_kernel(SDPBackend.MATH) if exact else contextlib.nullcontext()
        with torch.no_grad(), attention:  # the hooks of the taps turn gradients on
            output = taps.run(self.model, x, call.arguments(image_of))
        with torch.enable_grad():
            output = self.output_fn(output)
            scores = call.scorer(output, image_of, clean)
            grads = gradients(scores, taps.maps, graph=exact)
            bends = self._bends(taps.maps, grads) if exact else {}
        call.passed += len(image_of)
        call.outputs += [_entry(output, i) for i, is_clean in enumerate(clean) if is_clean]
        return Pass(taps.maps, grads, bends, scores.detach())

    def _bends(
        self, maps: Mapping[str, Tensor], grads: Mapping[str, list[Tensor]]
    ) -> dict[str, list[tuple[Tensor, Tensor]]]:
        for name, t in maps.items():
            if t[0].numel() > (self._most_exact or 0):
                raise ExactTooLarge(
                    f"{self.name}: layer {name!r} has {t[0].numel()} neurons, exact derivatives take a pass for each;"
                    " name a smaller layer, raise max_exact_elements, or take derivatives='closed_form'"
                )
        return {name: [diagonal(t, grad) for grad in grads[name]] for name, t in maps.items()}

    def _take(self, call: Call, rows: Sequence[Row], found: Pass) -> None:
        for name in self.layers or ():
            if name not in call.layers:
                maps, size = found.maps[name].detach(), call.x.shape[2:]
                call.layers[name] = LayerMaps(resolve_reshape(self.reshape, name, maps, self.model, size))
        scores = found.scores.to(compute_dtype(found.scores.dtype))
        for i, row in enumerate(rows):
            if row.copy == 0:
                call.scores.append(scores[i])
                for name, layer in call.layers.items():
                    activation = self.read(layer, found.maps[name], i)
                    slope = self.slope(layer, name, found, i)
                    largest = slope.flatten(1).abs().amax(1)
                    scale = torch.where(largest > 0, largest, 1)
                    layer.activations.append(activation)
                    layer.scales.append(scale)
                    layer.slopes.append(slope / aligned(scale, slope))
            self._took(call, row, i, scores[i], found)

    @staticmethod
    def read(layer: LayerMaps, t: Tensor, row: int) -> Tensor:
        """A row of what a layer returned, or of its gradient, as maps [K, ...] in the compute dtype; a copy."""
        maps = layer.reshape(t.detach()[row : row + 1])[0]
        return maps.to(compute_dtype(maps.dtype), copy=True)

    def slope(self, layer: LayerMaps, name: str, found: Pass, row: int) -> Tensor:
        """Gradients of a row, [T, K, ...].

        Raises:
            NonFinite: if one is NaN or infinite.
        """
        slope = torch.stack([self.read(layer, grad, row) for grad in found.grads[name]])
        if not bool(slope.isfinite().all()):
            raise NonFinite(f"the gradient at layer {name!r} is NaN or infinite: nothing can be explained from there")
        return slope

    # Maps

    def _result(self, call: Call, select: Select, fuse: Fuse | None, size: Size) -> CAMResult:
        if select.layer is not None:
            self._check_layer(call, select.layer)
        several = call.scorer.several

        def given(t: Tensor) -> Tensor:
            return t if several else t.squeeze(1)

        maps = {}
        valid = torch.ones(len(call.x), call.scorer.k, dtype=torch.bool, device=call.x.device)
        for name in call.layers:
            part = select if select.layer in (None, name) else Select()
            maps[name] = self._map(call, name, part)
            valid &= maps[name].flatten(2).ne(0).any(2)
        if not bool(valid.all()):
            self._warn("zero", f"{self.name}: some map is 0 everywhere, no feature map speaks for the target there")
        effective, log_scale = self._figures(call)
        logits = call.outputs
        if all(isinstance(row, Tensor) for row in logits):
            logits = torch.stack(logits)
            self._look_at(logits)
        input_size = tuple(call.x.shape[2:])
        maps = {name: given(t) for name, t in maps.items()}
        return CAMResult(
            maps=maps,
            logits=logits,
            targets=call.scorer.classes,
            scores=given(torch.stack(call.scores)),
            effective_samples=given(effective),
            log_scale=given(log_scale),
            n_forwards=math.ceil(call.passed / len(call.x)),
            linear_tail=dict(call.linear),
            valid=given(valid),
            fused=None if fuse is None else fused(maps, fuse, size, input_size),
            input_size=input_size,
            size=size,
            normalize=self.normalize,
        )

    def _map(self, call: Call, name: str, select: Select) -> Tensor:
        """[B, T, ...] after the relu, or [B, T, k, ...] of the parts."""
        layer = call.layers[name]
        activation = layer.activation()
        mask = None
        if select.neurons is not None:
            cells, size = activation.shape[2:], call.x.shape[2:]
            mask = select.neurons.among(activation.shape[1], cells, size).to(activation)
        weights = self._weights(call, name, mask if select.neuron_weights == "selected" else None)
        if not bool(weights.any()) and not any(bool(slope.any()) for slope in layer.slopes):
            raise ZeroGradient(
                f"the score does not change with the maps of layer {name!r}: it is saturated, or, as in a transformer"
                " that reads its class token, it hangs on no cell; name an earlier layer (of a ViT blocks[-1].norm1)"
            )
        contributions = _contributions(weights, activation)
        if mask is not None:
            activation = activation * mask
        chosen = None
        if select.feature_maps is not None:
            chosen = select.feature_maps.chosen(weights, contributions)
        if select.reduce == "none":
            if chosen is None:
                chosen = torch.arange(weights.shape[-1], device=weights.device).expand_as(weights)
            parts = torch.stack([activation[b][index] for b, index in enumerate(chosen)])  # [B, T, k, ...]
            return parts * aligned(weights.gather(-1, chosen), parts)
        if chosen is not None:
            weights = torch.zeros_like(weights).scatter(-1, chosen, weights.gather(-1, chosen))
        return formulas.combine(weights, activation).relu()

    # Words

    def _check_layer(self, call: Call, name: str) -> None:
        if name not in call.layers:
            raise UnknownLayer(f"{self.name}: layer {name!r} is not explained; there are {', '.join(call.layers)}")

    def _check_choice(self, argument: str, value: Any, known: Sequence[str]) -> None:
        if value not in known:
            raise ValueError(f"{self.name}: {argument} must be one of {', '.join(known)}, got {value!r}")

    def _look_at(self, logits: Tensor) -> None:
        if logits.ndim == 2 and bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-3).all()):
            self._warn(
                "softmax", f"{self.name}: the model seems to return probabilities; give the scores before softmax"
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, CAMWarning, stacklevel=5)


def _contributions(weights: Tensor, activation: Tensor) -> Tensor:
    return weights.abs() * activation.flatten(2).sum(2).unsqueeze(1)


def aligned(t: Tensor, like: Tensor) -> Tensor:
    """Aligned with the first axes of another tensor."""
    return t.view(*t.shape, *(1,) * (like.ndim - t.ndim))


def _entry(output: Any, row: int) -> Any:
    """What an output says of a row, without its graph."""
    if isinstance(output, Tensor):
        return output[row].detach()
    if isinstance(output, Mapping):
        return {key: _entry(value, row) for key, value in output.items()}
    if isinstance(output, tuple):
        return tuple(_entry(value, row) for value in output)
    return _detached(output[row]) if isinstance(output, list) else output


def _detached(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _detached(inner) for key, inner in value.items()}
    return value.detach() if isinstance(value, Tensor) else value
