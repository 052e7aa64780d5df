"""What the zoo holds, as data: one row per component, one per paper. Imports nothing but the standard library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["activation", "layer", "norm", "loss", "regularizer", "adapter", "renderer", "explainer", "metric"]

# Names a signature completes to in an editor; a test compares them with the rows.
ActivationName = Literal["polycom", "polynorm", "polyprelu", "polyrelu", "polyrelunorm"]
ExplainerName = Literal["grad_cam", "grad_cam_pp", "smooth_grad_cam_pp"]
LayerName = Literal["poly_ffn", "polynorm_glu"]
LossName = Literal[
    "adv_comp_sum",
    "alpha_loss",
    "comp_sum",
    "gce",
    "l1_dssim",
    "linear_comp_sum",
    "logistic",
    "mae",
    "pgd_at",
    "predictor_rejector",
    "psal",
    "smooth_adv_comp_sum",
    "ssim",
    "sum_exponential",
    "trades",
]
MetricName = Literal[
    "average_drop",
    "deletion_auc",
    "energy_pointing_game",
    "grid_pointing_game",
    "increase_in_confidence",
    "insertion_auc",
    "instance_recall",
    "pointing_game",
    "road",
    "stability",
]
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
RendererName = Literal["convex_splat"]


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

    def cited(self, equations: str = "") -> str:
        """Authors and year, linked where there is an address, and the place: in Markdown, for tables."""
        name = f"{self.authors} {self.year}"
        linked = f"[{name}]({self.url})" if self.url else f"{name}, {self.venue}"
        return f"{linked}, {equations}" if equations else linked


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
    "comp_sum": Paper(
        title="Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
        authors="Mao et al.",
        venue="ICML",
        year=2023,
        arxiv="2304.07288",
    ),
    "psal": Paper(
        title="Theoretically Grounded Loss Functions and Algorithms for Adversarial Robustness",
        authors="Awasthi et al.",
        venue="AISTATS",
        year=2023,
    ),
    "gce": Paper(
        title="Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
        authors="Zhang and Sabuncu",
        venue="NeurIPS",
        year=2018,
        arxiv="1805.07836",
    ),
    "alpha_loss": Paper(
        title="A Tunable Loss Function for Robust Classification: Calibration, Landscape, and Generalization",
        authors="Sypherd et al.",
        venue="IEEE Transactions on Information Theory",
        year=2022,
        arxiv="1906.02314",
    ),
    "mae": Paper(
        title="Robust Loss Functions under Label Noise for Deep Neural Networks",
        authors="Ghosh et al.",
        venue="AAAI",
        year=2017,
        arxiv="1712.09482",
    ),
    "predictor_rejector": Paper(
        title="Predictor-Rejector Multi-Class Abstention: Theoretical Analysis and Algorithms",
        authors="Mao et al.",
        venue="ALT",
        year=2024,
        arxiv="2310.14772",
    ),
    "trades": Paper(
        title="Theoretically Principled Trade-off between Robustness and Accuracy",
        authors="Zhang et al.",
        venue="ICML",
        year=2019,
        arxiv="1901.08573",
    ),
    "pgd_at": Paper(
        title="Towards Deep Learning Models Resistant to Adversarial Attacks",
        authors="Madry et al.",
        venue="ICLR",
        year=2018,
        arxiv="1706.06083",
    ),
    "convex_splat": Paper(
        title="3D Convex Splatting: Radiance Field Rendering with 3D Smooth Convexes",
        authors="Held et al.",
        venue="CVPR",
        year=2025,
        arxiv="2411.14974",
    ),
    "ssim": Paper(
        title="Image Quality Assessment: From Error Visibility to Structural Similarity",
        authors="Wang et al.",
        venue="IEEE Transactions on Image Processing",
        year=2004,
    ),
    "grad_cam": Paper(
        title="Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
        authors="Selvaraju et al.",
        venue="ICCV",
        year=2017,
        arxiv="1610.02391",
    ),
    "grad_cam_pp": Paper(
        title="Grad-CAM++: Generalized Gradient-based Visual Explanations for Deep Convolutional Networks",
        authors="Chattopadhay et al.",
        venue="WACV",
        year=2018,
        arxiv="1710.11063",
    ),
    "smooth_grad_cam_pp": Paper(
        title="Smooth Grad-CAM++: An Enhanced Inference Level Visualization Technique for Deep Convolutional Neural"
        " Network Models",
        authors="Omeiza et al.",
        venue="arXiv",
        year=2019,
        arxiv="1908.01224",
    ),
    "rise": Paper(
        title="RISE: Randomized Input Sampling for Explanation of Black-box Models",
        authors="Petsiuk et al.",
        venue="BMVC",
        year=2018,
        arxiv="1806.07421",
    ),
    "excitation_backprop": Paper(
        title="Top-down Neural Attention by Excitation Backprop",
        authors="Zhang et al.",
        venue="ECCV",
        year=2016,
        arxiv="1608.00507",
    ),
    "score_cam": Paper(
        title="Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks",
        authors="Wang et al.",
        venue="CVPR Workshops",
        year=2020,
        arxiv="1910.01279",
    ),
    "coda_net": Paper(
        title="Convolutional Dynamic Alignment Networks for Interpretable Classifications",
        authors="Boehle et al.",
        venue="CVPR",
        year=2021,
        arxiv="2104.00032",
    ),
    "road": Paper(
        title="A Consistent and Efficient Evaluation Strategy for Attribution Methods",
        authors="Rong et al.",
        venue="ICML",
        year=2022,
        arxiv="2202.00449",
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


def _comp_sum(name: str, cls: str, summary: str, paper: str = "comp_sum", equations: str = "") -> Component:
    return Component(
        name=name,
        kind="loss",
        target=f"zoo.losses.comp_sum:{cls}",
        summary=summary,
        paper=paper,
        equations=equations,
        tags=_LANGUAGE,
        dtypes=_ALL_FLOATS,
        grad_order=2,
        backends=_KERNELS,
    )


def _adversarial(name: str, cls: str, summary: str, paper: str, equations: str = "") -> Component:
    return Component(
        name=name,
        kind="loss",
        target=f"zoo.losses.adversarial:{cls}",
        summary=summary,
        paper=paper,
        equations=equations,
        tags=frozenset({"vision", "adversarial"}),
        grad_order=2,
    )


def _photometric(name: str, cls: str, summary: str, paper: str, equations: str = "") -> Component:
    return Component(
        name=name,
        kind="loss",
        target=f"zoo.losses:{cls}",
        summary=summary,
        paper=paper,
        equations=equations,
        tags=frozenset({"vision", "splatting"}),
        dtypes=_ALL_FLOATS,
        grad_order=2,
    )


def _explainer(name: str, cls: str, summary: str, equations: str = "") -> Component:
    return Component(
        name=name,
        kind="explainer",
        target=f"zoo.explain:{cls}",
        summary=summary,
        paper=name,
        equations=equations,
        tags=frozenset({"vision"}),
        dtypes=("float64", "float32", "bfloat16"),
        grad_order=0,
    )


def _metric(name: str, cls: str, summary: str, paper: str | None = None, equations: str = "") -> Component:
    return Component(
        name=name,
        kind="metric",
        target=f"zoo.metrics:{cls}",
        summary=summary,
        paper=paper,
        equations=equations,
        tags=frozenset({"vision"}),
        dtypes=("float64", "float32"),
        grad_order=0,
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
    _comp_sum("comp_sum", "CompSumLoss", "((1/p)^(1 - tau) - 1) / (1 - tau): the family, by tau"),
    _comp_sum("linear_comp_sum", "LinearCompSumLoss", "a linear layer and its loss, without all scores at once"),
    _comp_sum("sum_exponential", "SumExponentialLoss", "1/p - 1, tau = 0"),
    _comp_sum("logistic", "LogisticLoss", "-log p, cross-entropy, tau = 1"),
    _comp_sum("gce", "GeneralizedCrossEntropyLoss", "(1 - p^q) / q, tau = 1 + q", "gce", "eq. 6"),
    _comp_sum("alpha_loss", "AlphaLoss", "alpha / (alpha - 1) (1 - p^(1 - 1/alpha)), tau = 2 - 1/alpha", "alpha_loss"),
    _comp_sum("mae", "MeanAbsoluteErrorLoss", "1 - p, tau = 2", "mae"),
    Component(
        name="predictor_rejector",
        kind="loss",
        target="zoo.losses:PredictorRejectorLoss",
        summary="(1 - p) exp(r) + c exp(-r): a predictor, and a rejector that learns when not to answer",
        paper="predictor_rejector",
        tags=_LANGUAGE,
        dtypes=_ALL_FLOATS,
        grad_order=2,
    ),
    _adversarial(
        "smooth_adv_comp_sum",
        "SmoothAdversarialCompSumLoss",
        "comp-sum loss plus nu times how far an attack moves the score differences",
        "comp_sum",
    ),
    _adversarial("adv_comp_sum", "AdvCompSumLoss", "the same with the squared norm: ADV-COMP-SUM", "comp_sum"),
    _adversarial("psal", "PSALLoss", "sum of log2(1 + exp(-difference / rho)) plus the squared norm", "psal"),
    _adversarial("trades", "TradesLoss", "cross-entropy plus beta KL(clean, attacked)", "trades"),
    _adversarial("pgd_at", "PGDATLoss", "cross-entropy of attacked inputs", "pgd_at", "eq. 2.1"),
    _photometric("ssim", "SSIMLoss", "1 - SSIM of two pictures", "ssim", "eq. 13"),
    _photometric("l1_dssim", "L1DSSIMLoss", "0.8 L1 + 0.2 (1 - SSIM), what splats are fitted by", "convex_splat"),
    Component(
        name="convex_splat",
        kind="renderer",
        target="zoo.splat:ConvexModel",
        summary="scenes of smooth convexes, projected, sorted and composited, with gradients to all they are made of",
        paper="convex_splat",
        equations="sec. 3",
        tags=frozenset({"vision", "splatting"}),
        dtypes=("float64", "float32"),
        grad_order=1,
        backends=("torch", "cpu"),
    ),
    _explainer("grad_cam", "GradCAM", "where a score comes from: maps weighted by their mean gradient", "eq. 1, 2"),
    _explainer("grad_cam_pp", "GradCAMpp", "the same, weighted by derivatives of the exponential score", "eq. 19"),
    _explainer("smooth_grad_cam_pp", "SmoothGradCAMpp", "the same, with derivatives averaged over noisy copies"),
    _metric(
        "average_drop",
        "AverageDrop",
        "percent of the confidence lost when only the heated part is left",
        "grad_cam_pp",
        "sec. 4.1",
    ),
    _metric(
        "increase_in_confidence",
        "IncreaseInConfidence",
        "percent of images the model is surer of when only the heated part is left",
        "grad_cam_pp",
        "sec. 4.1",
    ),
    _metric("insertion_auc", "InsertionAUC", "confidence as the hottest pixels come into an image", "rise", "sec. 4.1"),
    _metric("deletion_auc", "DeletionAUC", "confidence as the hottest pixels leave an image", "rise", "sec. 4.1"),
    _metric("road", "Road", "confidence without the least minus without the most relevant pixels", "road"),
    _metric(
        "pointing_game",
        "PointingGame",
        "share of images whose hottest pixel is on an object",
        "excitation_backprop",
        "sec. 4.1",
    ),
    _metric("energy_pointing_game", "EnergyPointingGame", "share of the heat on objects", "score_cam", "sec. 4.3"),
    _metric(
        "grid_pointing_game", "GridPointingGame", "share of a mosaic's heat in the right cell", "coda_net", "sec. 4.2"
    ),
    _metric("instance_recall", "InstanceRecall", "share of an image's objects that hold heat"),
    _metric("stability", "Stability", "1 - the correlation of maps of two seeds"),
)
