"""The language model: causality, positions, sampling, sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from zoo.tasks import LanguageModel
from zoo.tasks.curves import activation_curve
from zoo.tasks.lm import SquaredReLU, rotate

SMALL = {"dim": 16, "depth": 2, "num_heads": 2, "context": 12}


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_logits_depend_on_the_past_alone(position: str) -> None:
    model = LanguageModel(**SMALL, position=position).eval()
    tokens = torch.randint(256, (2, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])
    assert before.shape == (2, 12, 256)


def test_order_of_tokens_matters() -> None:
    for position in ("learned", "rotary"):
        model = LanguageModel(**SMALL, position=position, init_std=0.5).eval()
        tokens = torch.tensor([[1, 2, 3, 4]])
        swapped = torch.tensor([[2, 1, 3, 4]])
        assert not torch.allclose(model(tokens)[0, -1], model(swapped)[0, -1])


def test_rotation_keeps_lengths_and_sees_distances_only() -> None:
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    turned_q, turned_k = rotate(q.expand(9, 8)), rotate(k.expand(9, 8))
    assert torch.allclose(turned_q.norm(dim=-1), q.norm().expand(9), atol=1e-6)
    scores = turned_q @ turned_k.T
    for distance in range(-4, 5):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-5)


def test_size_is_the_recipes() -> None:
    plain = LanguageModel()
    assert sum(p.numel() for p in plain.parameters()) == pytest.approx(390_000, rel=3e-3)
    gated = LanguageModel(act="torch.nn.SiLU", gated=True)
    assert gated.blocks[0].ffn.hidden == 256
    assert plain.blocks[0].ffn.hidden == 384


def test_generation_is_repeatable_and_leaves_the_global_stream_and_mode_alone() -> None:
    model = LanguageModel(**SMALL, drop=0.5)
    prompt = torch.tensor([100, 101])
    before = torch.get_rng_state()
    first = model.generate(prompt, 20, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert torch.equal(first, model.generate(prompt, 20, seed=3))
    assert not torch.equal(first, model.generate(prompt, 20, seed=4))
    assert torch.equal(first[:2], prompt)
    assert first.shape == (22,)  # longer than the context: the window slides


def test_greedy_generation_takes_the_most_likely_token() -> None:
    model = LanguageModel(**SMALL)
    tokens = model.generate(torch.tensor([5]), 3, temperature=0)
    for i in range(1, 4):
        assert tokens[i] == model(tokens[None, :i])[0, -1].argmax()


def test_a_few_steps_learn_a_short_text() -> None:
    model = LanguageModel(**SMALL, init_std=0.1)
    tokens = torch.tensor([list(b"the cat sat on the")])[:, :13]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4
    assert losses[-1] < 0.5


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="reads at most context = 12 tokens, got 13"):
        LanguageModel(**SMALL)(torch.zeros(1, 13, dtype=torch.long))


def test_report_draws_and_writes(tmp_path: Path) -> None:
    model = LanguageModel(**SMALL, sample_tokens=6, prompt="ab")
    facts = model.write_report(tmp_path)
    assert facts["sample"].startswith("ab")
    assert (tmp_path / "activations.png").stat().st_size > 5000
    assert (tmp_path / "sample.txt").read_text() == facts["sample"] + "\n"


def test_activation_curve_is_the_function() -> None:
    x, y = activation_curve(SquaredReLU())
    assert torch.equal(y, x.relu().square())
    assert x.std() == pytest.approx(1.0, abs=0.01)
