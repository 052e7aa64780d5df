"""A decoder-only language model whose feed-forward takes any activation by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric

from ..activations.polycom import PolyFFN
from ..errors import DataError
from ..spec import ActivationSpec
from .curves import draw_activations
from .optim import configure


class LanguageModel(L.LightningModule):
    """Pre-RMSNorm transformer decoder trained on next-token cross-entropy.

    No biases, embeddings untied from the output. At equal `dim`, `depth` and `act` family a plain feed-forward of width
    4 dim and a gated one of width 8/3 dim have the same number of parameters, so activations compare fairly.

    Args:
        vocab_size: size of the vocabulary; 256 for bytes.
        dim: width of the model.
        depth: number of blocks.
        num_heads: attention heads; must divide `dim`.
        context: longest sequence, in tokens.
        act: activation of the feed-forward, by registry name, dotted path or mapping.
        gated: use act(gate(x)) * up(x), e.g. SwiGLU with `act: torch.nn.SiLU`.
        hidden: width of the feed-forward; by default 4 dim, or 8/3 dim when gated.
        position: learned position embeddings, or rotary ones (Su et al., RoFormer, 2021, arXiv:2104.09864).
        drop: dropout after attention and feed-forward.
        init_std: standard deviation of matrices and embeddings at the start.
        prompt: text the samples of the report begin with.
        sample_tokens: length of that sample; 0 for none.
        temperature: sampling temperature.
        optimizer: optimizer, given parameter groups; see :func:`zoo.tasks.optim.decay_groups`.
        lr_scheduler: schedule, given the optimizer.

    Shape:
        [B, T] token ids -> [B, T, vocab_size] logits, T <= context.

    Raises:
        ValueError: if `num_heads` does not divide `dim`, or a size is not positive.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        dim: int = 96,
        depth: int = 3,
        num_heads: int = 4,
        context: int = 96,
        act: ActivationSpec = "polynorm",
        gated: bool = False,
        hidden: int | None = None,
        position: Literal["learned", "rotary"] = "learned",
        drop: float = 0.0,
        init_std: float = 0.02,
        prompt: str = "def ",
        sample_tokens: int = 400,
        temperature: float = 0.8,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(vocab_size=vocab_size, dim=dim, depth=depth, num_heads=num_heads, context=context)
        if dim % num_heads or (position == "rotary" and (dim // num_heads) % 2):
            raise ValueError(f"num_heads must divide dim into heads of even width, got dim {dim} and {num_heads} heads")
        self.save_hyperparameters(ignore=("optimizer", "lr_scheduler"))
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.context, self.prompt, self.sample_tokens, self.temperature = context, prompt, sample_tokens, temperature

        self.embed = nn.Embedding(vocab_size, dim)
        self.positions = nn.Parameter(torch.empty(context, dim)) if position == "learned" else None
        rotary = position == "rotary"
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, act, gated=gated, hidden=hidden, drop=drop, rotary=rotary) for _ in range(depth)
        )
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self._initialise(init_std)
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        for name, most in (("context", self.context), ("vocab_size", self.embed.num_embeddings)):
            found = getattr(data, name, most)
            if found > most:
                raise DataError(
                    f"the data has {name} {found}, the model at most {most}; give model.{name} and data.{name} the same"
                    " value"
                )

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[-1]
        if length > self.context:
            raise ValueError(f"LanguageModel reads at most context = {self.context} tokens, got {length}")
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions[:length]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_loss)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_loss)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Most likely next token at every position, [B, T]."""
        return self(batch[0]).argmax(-1)

    def configure_optimizers(self) -> Any:
        return configure(self, self.optimizer, self.lr_scheduler)

    @torch.no_grad()
    def generate(self, tokens: Tensor, length: int, *, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """Sample a continuation, with a generator of its own so that training draws are not moved.

        Args:
            tokens: [T] prompt, T >= 1.
            length: tokens to add.
            temperature: divides the logits; 0 takes the most likely token.
            seed: seed of the draws.

        Returns:
            [T + length] prompt and continuation.
        """
        generator = torch.Generator().manual_seed(seed)
        was_training = self.training
        self.eval()
        tokens = tokens.to(self.device)
        for _ in range(length):
            logits = self(tokens[None, -self.context :])[0, -1].float().cpu()
            if temperature == 0:
                drawn = logits.argmax()[None]
            else:
                drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, drawn.to(tokens.device)])
        self.train(was_training)
        return tokens

    def write_report(self, folder: Path) -> dict[str, Any]:
        """A sample of generated text, and the feed-forward's activation in every block."""
        draw_activations(
            [block.ffn.act for block in self.blocks if isinstance(block, Block)], folder / "activations.png"
        )
        if not self.sample_tokens or self.embed.num_embeddings != 256:
            return {}
        prompt = torch.tensor(list(self.prompt.encode() or b"\n"))
        sample = self.generate(prompt, self.sample_tokens, temperature=self.temperature)
        text = bytes(sample.tolist()).decode(errors="replace")
        (folder / "sample.txt").write_text(text + "\n")
        return {"sample": text}

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, following = batch
        return F.cross_entropy(self(tokens).flatten(0, 1), following.flatten())

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, mean: MeanMetric) -> None:
        mean.update(self._loss(batch), batch[0].numel())  # weighted: the last batch may be smaller
        self.log(f"{stage}/loss", mean, on_step=False, on_epoch=True, prog_bar=True)

    def _initialise(self, std: float) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
        if self.positions is not None:
            nn.init.normal_(self.positions, std=std)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)).

    Args:
        dim: width.
        num_heads: attention heads.
        act: activation of the feed-forward.
        gated, hidden: form and width of the feed-forward; see :class:`zoo.PolyFFN`.
        drop: dropout of both branches.
        rotary: rotate queries and keys by their position.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        act: ActivationSpec,
        *,
        gated: bool = False,
        hidden: int | None = None,
        drop: float = 0.0,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.rotary = num_heads, rotary
        self.attention_norm = nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.ffn_norm = nn.RMSNorm(dim)
        self.ffn = PolyFFN(dim, hidden, act, gated=gated)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self._attend(self.attention_norm(x)))
        return x + self.drop(self.ffn(self.ffn_norm(x)))

    def _attend(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # [B, heads, T, D]
        if self.rotary:
            q, k = rotate(q), rotate(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, dim))


class SquaredReLU(nn.Module):
    """relu(x)^2, a baseline of the PolyCom paper.

    Source:
        So et al., Primer: Searching for Efficient Transformers, 2021, arXiv:2109.08668.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


def rotate(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotate feature pairs (i, i + D/2) by position * base^(-2i/D).

    Args:
        x: [..., T, D] queries or keys, D even.
        base: longest wavelength over 2 pi.

    Source:
        Su et al., RoFormer, 2021, arXiv:2104.09864, eq. 34, with the pairs laid out as halves.
    """
    length, width = x.shape[-2:]
    frequency = base ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    angle = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * frequency  # [T, D/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"LanguageModel: {name} must be at least 1, got {value}")
