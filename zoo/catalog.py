"""What the zoo holds, as data: one row per component, one per paper. Imports nothing but the standard library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["activation", "layer", "norm", "loss", "regularizer", "adapter", "renderer", "explainer"]

# Names a signature completes to in an editor; a test compares them with the rows.
ActivationName = Literal["polycom", "polynorm", "polyprelu", "polyrelu", "polyrelunorm"]
LayerName = Literal["poly_ffn", "polynorm_glu"]
NormName = Literal[
    "conditional_evonorm",
    "evonorm",
    "evonorm_b0",
    "evonorm_b1",
    "evonorm_b2",
    "evonorm_s0",
    "evonorm_s0a",
    "evonorm_s1",
    "evonorm_s1a",
    "evonorm_s2",
    "evonorm_s2a",
]


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a component comes from."""

    title: str
    authors: str
    venue: str
    year: int
    arxiv: str | None = None

    @property
    def url(self) -> str | None:
        """Address of the abstract, or None for a paper outside arXiv."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None


@dataclass(frozen=True, slots=True)
class Component:
    """Everything known about a component without importing its code.

    Args:
        name: lower case, the paper's own name.
        kind: what it is; names may repeat across kinds.
        target: where the class lives, "package.module:Class".
        summary: one line, shown by `zoo list`.
        paper: key of :data:`PAPERS`.
        equations: where in the paper.
        tags: fields it is used in, e.g. {"vision", "language"}.
        dtypes: dtypes the test battery runs it in.
        grad_order: 0 no gradient, 1 backward, 2 double backward; tested as stated.
        backends: implementations, the first one always there.
        dist: distribution that provides it.
    """

    name: str
    kind: Kind
    target: str
    summary: str
    paper: str | None = None
    equations: str = ""
    tags: frozenset[str] = frozenset()
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    grad_order: int = 1
    backends: tuple[str, ...] = ("torch",)
    dist: str = "paperzoo"


PAPERS: dict[str, Paper] = {
    "polycom": Paper(
        title="Polynomial Composition Activations: Unleashing the Dynamics of Large Language Models",
        authors="Zhuo et al.",
        venue="ICLR",
        year=2025,
        arxiv="2411.03884",
    ),
    "evonorm": Paper(
        title="Evolving Normalization-Activation Layers",
        authors="Liu et al.",
        venue="NeurIPS",
        year=2020,
        arxiv="2004.02967",
    ),
}

_ALL_FLOATS = ("float64", "float32", "bfloat16", "float16")
_LANGUAGE = frozenset({"language", "vision"})


_KERNELS = ("torch", "cpu", "cuda")


def _polycom(name: str, kind: Kind, cls: str, summary: str, equations: str) -> Component:
    return Component(
        name=name,
        kind=kind,
        target=f"zoo.activations.polycom:{cls}",
        summary=summary,
        paper="polycom",
        equations=equations,
        tags=_LANGUAGE,
        dtypes=_ALL_FLOATS,
        grad_order=2,
        backends=_KERNELS,
    )


def _evonorm(name: str, cls: str, summary: str, equations: str = "table of layers") -> Component:
    return Component(
        name=name,
        kind="norm",
        target=f"zoo.norms.evonorm:{cls}",
        summary=summary,
        paper="evonorm",
        equations=equations,
        tags=frozenset({"vision"}),
        dtypes=_ALL_FLOATS,
        grad_order=2,
        backends=_KERNELS,
    )


COMPONENTS: tuple[Component, ...] = (
    _polycom("polyrelu", "activation", "PolyReLU", "learned polynomial of relu(x)", "eq. 2"),
    _polycom("polynorm", "activation", "PolyNorm", "learned sum of separately normalised powers of x", "eq. 3"),
    _polycom("polyprelu", "activation", "PolyPReLU", "learned polynomial of PReLU(x)", "eq. 1, ablation"),
    _polycom("polyrelunorm", "activation", "PolyReLUNorm", "PolyNorm of relu(x)", "eq. 1, ablation"),
    _polycom("polycom", "activation", "PolyCom", "the general family: any rho, either order of composition", "eq. 1"),
    _polycom("polynorm_glu", "layer", "PolyNormGLU", "PolyNorm(gate) * up, with per-expert coefficients", "eq. 3"),
    _polycom("poly_ffn", "layer", "PolyFFN", "feed-forward block, plain or gated, with any activation", "sec. 2"),
    _evonorm("evonorm_b0", "EvoNorm2dB0", "x / max(batch deviation, v x + instance deviation)"),
    _evonorm("evonorm_b1", "EvoNorm2dB1", "x / max(batch deviation, (x + 1) instance RMS)"),
    _evonorm("evonorm_b2", "EvoNorm2dB2", "x / max(batch deviation, instance RMS - x)"),
    _evonorm("evonorm_s0", "EvoNorm2dS0", "x sigmoid(v x) / group deviation"),
    _evonorm("evonorm_s1", "EvoNorm2dS1", "x sigmoid(x) / group deviation"),
    _evonorm("evonorm_s2", "EvoNorm2dS2", "x sigmoid(x) / group RMS"),
    _evonorm("evonorm_s0a", "EvoNorm2dS0a", "S0 with timm's eps, normalising also without activation", "timm"),
    _evonorm("evonorm_s1a", "EvoNorm2dS1a", "S1 with timm's eps, normalising also without activation", "timm"),
    _evonorm("evonorm_s2a", "EvoNorm2dS2a", "S2 with timm's eps, normalising also without activation", "timm"),
    _evonorm("evonorm", "EvoNorm", "any of B0 to S2 on inputs of any rank"),
    _evonorm("conditional_evonorm", "ConditionalEvoNorm2d", "EvoNorm scaled and shifted by a condition", "BigGAN"),
)
