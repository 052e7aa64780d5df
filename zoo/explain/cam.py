"""GradCAM, GradCAMpp and SmoothGradCAMpp."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..kernels.ops import compute_dtype
from . import formulas
from .engine import LayerCall
from .errors import NonFinite
from .explainer import Call, Explainer, LayerMaps, MemoryFormat, Pass, Row, aligned
from .formulas import Averages, Denominator, Normalize, Numerator
from .layers import LayerSpec, unrelated
from .reshape import Reshape
from .targets import Targets

Noise = Literal["relative", "absolute"]
Weighting = Literal["auto", "exp", "uniform"]
Derivatives = Literal["closed_form", "exact"]
LinearTail = Literal["auto", "sample"]


class GradCAM(Explainer):
    """Grad-CAM: relu(sum_k w_k A_k), w_k the mean of dS/dA_k over map k.

    Args:
        model: any network; it is left as it was, bit for bit.
        layers: as for :class:`SmoothGradCAMpp`.
        options: `chunk_size`, `reshape`, `output_fn`, `normalize`, `layer_call`, `memory_format`, `autocast`, as there.

    Shape:
        x [B, C, H, W] (or [B, C, L], [B, C, D, H, W]) -> :class:`CAMResult`; heatmaps [B, H, W], or [B, T, H, W] for T
        targets an image.

    Raises:
        ValueError: if an argument is out of range.
        UnknownLayer: if a layer is not in the model.

    Source:
        Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra, "Grad-CAM", ICCV 2017, arXiv:1610.02391, eq. 1 and 2.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
        >>> model.append(torch.nn.Linear(4 * 6 * 6, 5))  # doctest: +ELLIPSIS
        Sequential(...)
        >>> zoo.explain.GradCAM(model, "1")(torch.rand(2, 3, 8, 8)).heatmap().shape
        torch.Size([2, 8, 8])
    """

    def _explain(self, call: Call) -> None:
        self._pass_all(call, [Row(i) for i in range(len(call.x))], lambda rows: call.x[[row.image for row in rows]])

    def _weights(self, call: Call, layer: str, mask: Tensor | None) -> Tensor:
        slopes, scale = torch.stack(call.layers[layer].slopes), call.layers[layer].scale()
        return formulas.grad_cam_weights(slopes if mask is None else slopes * mask) * scale.unsqueeze(-1)

    def _figures(self, call: Call) -> tuple[Tensor, Tensor]:
        scores = torch.stack(call.scores)
        return torch.ones_like(scores), torch.zeros_like(scores)


class SmoothGradCAMpp(Explainer):
    """Smooth Grad-CAM++: Grad-CAM++ with each order of derivatives averaged over noisy copies of the image.

    Hooks live inside a call, and the model is left as it was: parameters, gradients, buffers, training flags, hooks and
    the global random numbers. Only what follows the layer is recorded. Where the score is linear behind the layer noise
    changes nothing; that is noticed, and the copies are left out (`linear_tail`).

    Args:
        model: any network that returns scores, not probabilities; see `output_fn`.
        layers: names or modules, one or several; None for the deepest block with a map behind which the score is not
            linear, chosen at the first call; "last" for the deepest block with a map.
        n_samples: noisy copies an image (8: 0.9988 correlated with 64 on a trained network).
        sigma: deviation of the noise (0.15; SmoothGrad recommends 0.1 to 0.2), 0 for none.
        noise: "relative": sigma times the range of each image's values, SmoothGrad's definition; "absolute": sigma.
        noise_clip: (low, high) that noisy copies are clipped to, or None.
        sample_weighting: "exp": copies count by e^S, as Y = e^S says; "uniform"; "auto": exp for classes, uniform for
            functions, whose scale is anybody's.
        alpha_numerator: "second", or "first" as the paper prints it, with which one copy is not Grad-CAM++.
        denominator: "positive": neurons count where it is positive; "signed": everywhere.
        eps: added to the denominator, relative to e^M like the derivatives; 0 is right.
        derivatives: "closed_form": powers of the gradient, exact for piecewise linear tails and customary for all;
            "exact": by differentiating three times, for small layers.
        max_exact_elements: neurons a layer may have for "exact" (4096).
        linear_tail: "auto", or "sample" to draw all copies whatever the tail.
        chunk_size: rows of a pass, images and copies together; "auto" for 8, on CUDA 32. Halved where memory does not
            suffice. Results do not depend on it.
        reshape: "auto", :class:`TokenReshape`, :class:`NHWCReshape`, or a function from the layer's output to
            [B, K, h, w] that only moves entries or leaves some out.
        output_fn: finds the scores in what the model returns; None for a tensor, `.logits`, ["logits"], ["out"] or the
            first of a tuple.
        normalize: of heatmaps: "max", over the largest value; "minmax"; "none".
        layer_call: which call counts of a layer that runs more than once: "first", "last"; "only" refuses that.
        seed: of the noise; an int for the same in every call, None for other noise each time, or a generator.
        memory_format: "channels_last" for inputs [B, C, H, W] where that is faster: with enough pixels in a pass for
            the model's kernels; "preserve".
        autocast: dtype of an autocast around the model; None for none.

    Shape:
        x [B, C, H, W] (or [B, C, L], [B, C, D, H, W]) -> :class:`CAMResult`; heatmaps [B, H, W], or [B, T, H, W] for T
        targets an image.

    Raises:
        ValueError: if an argument is out of range.
        UnknownLayer: if a layer is not in the model.

    Source:
        Omeiza, Speakman, Cintas, Weldemariam, "Smooth Grad-CAM++", arXiv:1908.01224; Chattopadhay, Sarkar, Howlader,
        Balasubramanian, "Grad-CAM++", WACV 2018, arXiv:1710.11063; Smilkov, Thorat, Kim, Viegas, Wattenberg,
        "SmoothGrad", arXiv:1706.03825. Copies are weighted by e^S and the clean image's activations taken, as the
        definitions say; the numerator of alpha is the second derivative, without which one copy is not Grad-CAM++.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
        >>> model.append(torch.nn.Linear(4 * 6 * 6, 5))  # doctest: +ELLIPSIS
        Sequential(...)
        >>> cam = zoo.explain.SmoothGradCAMpp(model, "0", sigma=0.1)
        >>> cam(torch.rand(2, 3, 8, 8), targets=[0, 3]).heatmap().shape
        torch.Size([2, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        layers: LayerSpec = None,
        *,
        n_samples: int = 8,
        sigma: float = 0.15,
        noise: Noise = "relative",
        noise_clip: tuple[float, float] | None = None,
        sample_weighting: Weighting = "auto",
        alpha_numerator: Numerator = "second",
        denominator: Denominator = "positive",
        eps: float = 0.0,
        derivatives: Derivatives = "closed_form",
        max_exact_elements: int = 4096,
        linear_tail: LinearTail = "auto",
        seed: int | torch.Generator | None = 0,
        chunk_size: int | Literal["auto"] = "auto",
        reshape: Literal["auto"] | Reshape = "auto",
        output_fn: Callable[[Any], Any] | None = None,
        normalize: Normalize = "max",
        layer_call: LayerCall = "only",
        memory_format: MemoryFormat = "channels_last",
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            model,
            layers,
            chunk_size=chunk_size,
            reshape=reshape,
            output_fn=output_fn,
            normalize=normalize,
            layer_call=layer_call,
            memory_format=memory_format,
            autocast=autocast,
        )
        if n_samples < 1:
            raise ValueError(f"{self.name}: n_samples must be at least 1, got {n_samples}")
        for argument, value in {"sigma": sigma, "eps": eps}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{self.name}: {argument} must be finite and not negative, got {value}")
        if noise_clip is not None and not (len(noise_clip) == 2 and noise_clip[0] < noise_clip[1]):
            raise ValueError(f"{self.name}: noise_clip must be (low, high) or None, got {noise_clip}")
        for argument, value, kind in (
            ("noise", noise, Noise),
            ("sample_weighting", sample_weighting, Weighting),
            ("alpha_numerator", alpha_numerator, Numerator),
            ("denominator", denominator, Denominator),
            ("derivatives", derivatives, Derivatives),
            ("linear_tail", linear_tail, LinearTail),
        ):
            self._check_choice(argument, value, get_args(kind))
        self.n_samples, self.sigma, self.noise, self.noise_clip = n_samples, sigma, noise, noise_clip
        self.sample_weighting, self.alpha_numerator, self.denominator = sample_weighting, alpha_numerator, denominator
        self.eps, self.derivatives, self.max_exact_elements = eps, derivatives, max_exact_elements
        self.linear_tail, self.seed = linear_tail, seed
        self._most_exact = max_exact_elements if derivatives == "exact" else None
        self._linear: set[tuple[str, int]] = set()  # layers and classes whose score was found to be linear behind them

    def close(self) -> None:
        super().close()
        self._linear.clear()

    # The passes

    def _explain(self, call: Call) -> None:
        names, images = self.layers or [], [Row(i) for i in range(len(call.x))]
        # what is known is known of classes, whichever those are, and of the model without further arguments
        cached = self.linear_tail == "auto" and call.scorer.functions is None and not call.kwargs
        noisy = _Noise(call.x, self.sigma, self.noise, self.noise_clip, self.seed)
        first = [Row(image, 1) for image, _ in images]
        if self.sigma == 0 or (cached and self._linear):
            self._pass_all(call, images, noisy)
            known = {name: cached and self._known(call, name) for name in names}
            if self.sigma == 0 or all(known.values()):
                self._without_noise(call)
                call.linear = {name: True for name in names if known[name]}
                return
            self._pass_all(call, first, noisy)
        else:
            # an image and its first copy side by side: what is compared lies in one pass
            self._pass_all(call, [row for pair in zip(images, first, strict=True) for row in pair], noisy)
        if self.linear_tail == "auto":
            call.linear = self._tails(call)
            if cached:
                self._linear |= {(name, c) for name in names if call.linear[name] for c in self._classes(call)}
            if all(call.linear.values()):
                self._without_noise(call)
                self._tell(call)
                return
        self._pass_all(call, [Row(i, copy) for copy in range(2, self.n_samples + 1) for i, _ in images], noisy)
        assert call.averages is not None
        if bool((call.averages.effective < self.n_samples / 4).any()):
            self._warn(
                "effective",
                f"{self.name}: of {self.n_samples} noisy copies less than a quarter counts, so far apart are their"
                " scores; lower sigma, or say sample_weighting='uniform'",
            )

    def _took(self, call: Call, row: Row, index: int, score: Tensor, found: Pass) -> None:
        if row.copy == 0:
            for name, layer in call.layers.items():
                layer.bends.append(self._bends_of(layer, name, index, found, row.image))
            return
        if call.averages is None:
            call.averages = self._averages(call)
        orders = {}
        for name, layer in call.layers.items():
            slope = self.slope(layer, name, found, index) / aligned(layer.scales[row.image], layer.slopes[0])
            if row.copy == 1:
                layer.same = layer.same and torch.equal(slope, layer.slopes[row.image])
            orders[name] = _orders(slope, self._bends_of(layer, name, index, found, row.image))
        call.averages.add(row.image, score, orders)

    def _bends_of(
        self, layer: LayerMaps, name: str, index: int, found: Pass, image: int
    ) -> tuple[Tensor, Tensor] | None:
        """Second and third derivatives of a row, [T, K, ...], in units of the image's scale; None in closed form."""
        if name not in found.bends:
            return None
        scale = aligned(layer.scales[image], layer.slopes[0])
        second, third = (
            torch.stack([self.read(layer, of_target[order], index) for of_target in found.bends[name]])
            for order in (0, 1)
        )
        return second / scale**2, third / scale**3

    def _averages(self, call: Call) -> Averages:
        weighted = self.sample_weighting == "exp"
        if self.sample_weighting == "auto":
            weighted = call.scorer.functions is None
        shapes = {name: tuple(layer.activations[0].shape) for name, layer in call.layers.items()}
        one = next(iter(call.layers.values())).activations[0]
        return Averages(shapes, len(call.x), call.scorer.k, weighted, one.dtype, one.device)

    def _without_noise(self, call: Call) -> None:
        """Each image itself for its only copy: where noise changes nothing, or there is none."""
        call.averages = self._averages(call)
        for image, score in enumerate(call.scores):
            orders = {name: _orders(layer.slopes[image], layer.bends[image]) for name, layer in call.layers.items()}
            call.averages.add(image, score, orders)

    def _tails(self, call: Call) -> dict[str, bool]:
        """By layer, whether the score is linear behind it: neither noise nor another input change the gradient."""
        alike = {name: layer.same and any(bool(s.any()) for s in layer.slopes) for name, layer in call.layers.items()}
        if not any(alike.values()):
            return alike
        images = call.scorer.distinct
        try:
            for at in range(0, len(images), 8):
                part = images[at : at + 8]
                found = self._pass(call, unrelated(call.x[part]), part, [False] * len(part))
                for row, image in enumerate(part):
                    for name, layer in call.layers.items():
                        slope = self.slope(layer, name, found, row) / aligned(layer.scales[image], layer.slopes[0])
                        alike[name] = alike[name] and torch.equal(slope, layer.slopes[image])
        except NonFinite:  # the model cannot take such an input: nothing is known
            return dict.fromkeys(alike, False)
        return alike

    def _classes(self, call: Call) -> list[int]:
        return [] if call.scorer.classes is None else call.scorer.classes.flatten().tolist()

    def _known(self, call: Call, name: str) -> bool:
        return all((name, c) in self._linear for c in self._classes(call))

    def _tell(self, call: Call) -> None:
        if self.n_samples == 1 or self._asked is None or self._asked == "last":
            return
        # not which layer: that would take as long as the call itself
        self._warn(
            "linear",
            f"{self.name}: the score is linear behind {', '.join(call.layers)}, so that noise changes nothing and the"
            " copies are left out: this is Grad-CAM++; leave layers out to have one chosen behind which it is not, or"
            " say linear_tail='sample'",
        )

    # The formulas

    def _weights(self, call: Call, layer: str, mask: Tensor | None) -> Tensor:
        assert call.averages is not None
        first, second, third = call.averages.means(layer)
        scale = call.layers[layer].scale()
        total = call.layers[layer].activation().flatten(2).sum(2).unsqueeze(1) * scale.unsqueeze(-1)
        eps = aligned(self.eps / scale.square(), first)
        alpha = formulas.pixel_weights(first, second, third, total, self.alpha_numerator, self.denominator, eps)
        weights = formulas.map_weights(alpha, first, mask)
        # of alpha with the first derivative above, the unit of the gradient cancels
        return weights * scale.unsqueeze(-1) if self.alpha_numerator == "second" else weights

    def _figures(self, call: Call) -> tuple[Tensor, Tensor]:
        assert call.averages is not None
        return call.averages.effective, call.averages.top


class GradCAMpp(SmoothGradCAMpp):
    """Grad-CAM++: :class:`SmoothGradCAMpp` of the image alone.

    Args:
        model: any network that returns scores.
        layers: names or modules; None for an automatic choice.
        alpha_numerator: as for :class:`SmoothGradCAMpp`, and so are all others.
        denominator: "positive" or "signed".
        eps: added to the denominator.
        derivatives: "closed_form" or "exact".
        max_exact_elements: neurons a layer may have for "exact".
        chunk_size: images of a pass.
        reshape: "auto" or a function to [B, K, h, w].
        output_fn: finds the scores in what the model returns.
        normalize: of heatmaps.
        layer_call: which call counts of a layer that runs more than once.
        memory_format: of the inputs.
        autocast: dtype of an autocast around the model.

    Shape:
        x [B, C, H, W] (or [B, C, L], [B, C, D, H, W]) -> :class:`CAMResult`; heatmaps [B, H, W], or [B, T, H, W] for T
        targets an image.

    Raises:
        ValueError: if an argument is out of range.
        UnknownLayer: if a layer is not in the model.

    Source:
        Chattopadhay, Sarkar, Howlader, Balasubramanian, "Grad-CAM++", WACV 2018, arXiv:1710.11063, eq. 19 to 21.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
        >>> model.append(torch.nn.Linear(4 * 6 * 6, 5))  # doctest: +ELLIPSIS
        Sequential(...)
        >>> zoo.explain.GradCAMpp(model, "1")(torch.rand(1, 3, 8, 8), targets=2).n_forwards
        1
    """

    def __init__(
        self,
        model: nn.Module,
        layers: LayerSpec = None,
        *,
        alpha_numerator: Numerator = "second",
        denominator: Denominator = "positive",
        eps: float = 0.0,
        derivatives: Derivatives = "closed_form",
        max_exact_elements: int = 4096,
        chunk_size: int | Literal["auto"] = "auto",
        reshape: Literal["auto"] | Reshape = "auto",
        output_fn: Callable[[Any], Any] | None = None,
        normalize: Normalize = "max",
        layer_call: LayerCall = "only",
        memory_format: MemoryFormat = "channels_last",
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            model,
            layers,
            n_samples=1,
            sigma=0.0,
            alpha_numerator=alpha_numerator,
            denominator=denominator,
            eps=eps,
            derivatives=derivatives,
            max_exact_elements=max_exact_elements,
            chunk_size=chunk_size,
            reshape=reshape,
            output_fn=output_fn,
            normalize=normalize,
            layer_call=layer_call,
            memory_format=memory_format,
            autocast=autocast,
        )


class _Noise:
    """Rows of images and of their noisy copies.

    A field is drawn once a copy and shared by all images: what an image gets depends neither on the passes nor on the
    images beside it.
    """

    def __init__(
        self,
        x: Tensor,
        sigma: float,
        noise: Noise,
        clip: tuple[float, float] | None,
        seed: int | torch.Generator | None,
    ) -> None:
        self.x, self.clip = x, clip
        flat = x.flatten(1)
        spread = flat.amax(1) - flat.amin(1) if noise == "relative" else torch.ones_like(flat[:, 0])
        self.deviation = aligned(sigma * spread, x)
        self.generator = seed if isinstance(seed, torch.Generator) else torch.Generator()
        if isinstance(seed, int):
            self.generator.manual_seed(seed)
        elif seed is None:
            self.generator.seed()
        self.fields: dict[int, Tensor] = {}
        self.drawn = 0

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        """Inputs of a pass."""
        oldest = min((row.copy for row in rows if row.copy), default=0)
        for copy in [copy for copy in self.fields if copy < oldest]:
            del self.fields[copy]
        x = self.x[[row.image for row in rows]]
        for i, (image, copy) in enumerate(rows):
            if copy:
                x[i] += self.deviation[image] * self._field(copy)
                if self.clip is not None:
                    x[i].clamp_(*self.clip)
        return x

    def _field(self, copy: int) -> Tensor:
        while self.drawn < copy:
            self.drawn += 1
            dtype = compute_dtype(self.x.dtype)
            shape, device = self.x.shape[1:], self.generator.device
            drawn = torch.randn(shape, generator=self.generator, dtype=dtype, device=device)
            self.fields[self.drawn] = drawn.to(self.x)
        return self.fields[copy]


def _orders(slope: Tensor, bends: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """D_1, D_2 and D_3 of Y = e^S over e^S, from the derivatives of S."""
    square = slope.square()
    if bends is None:
        return slope, square, square * slope
    second, third = bends
    return slope, square + second, square * slope + 3 * slope * second + third


def smooth_grad_cam_pp(
    model: nn.Module, x: Tensor, layers: LayerSpec = None, targets: Targets = None, **options: Any
) -> Tensor:
    """Heatmaps [B, H, W] in [0, 1], or [B, T, H, W] for T targets an image, of :class:`SmoothGradCAMpp`.

    Args:
        model: any network that returns scores.
        x: [B, C, H, W] as the model takes it.
        layers: one layer, by name or as a module; None for an automatic choice.
        targets: as for a call of the class.
        options: of the class.

    Raises:
        CAMError: one of :mod:`zoo.explain.errors`.

    Source:
        As :class:`SmoothGradCAMpp`.
    """
    return SmoothGradCAMpp(model, layers, **options).heatmap(x, targets)
