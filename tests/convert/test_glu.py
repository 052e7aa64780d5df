"""Gated feed-forwards: their gate kept, or dropped at equal parameters."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from timm.layers import GluMlp, SwiGLU
from torch import nn
from torch.testing import assert_close

from tests.convert.hosts import DIM, GPT2MLP, HIDDEN, LlamaMLP, check_round_trips, check_trains, stack
from zoo import PolyNorm, convert_activation
from zoo.convert import ConversionError
from zoo.convert.glu import parity_width


def test_llama_gate_is_kept():
    model, x = stack(LlamaMLP), torch.randn(4, DIM)
    report = convert_activation(model)
    mlp = model[0]
    assert_close(mlp(x), mlp.down_proj(PolyNorm()(mlp.gate_proj(x)) * mlp.up_proj(x)))
    assert "act_fn" not in vars(mlp)
    assert "0.act_fn.weight" in model.state_dict()
    assert [(row.path, row.old) for row in report] == [("0.act_fn", "silu"), ("1.act_fn", "silu")]
    check_trains(model, x, sites=2)


def test_llama_gate_is_dropped():
    make = partial(stack, LlamaMLP)
    model, x = make(), torch.randn(4, DIM)
    with torch.no_grad():
        model[0].up_proj.weight[: HIDDEN // 2].mul_(9)  # where the gate is apart, every row makes the value
    spreads = [model[0].up_proj.weight.std().item(), model[0].down_proj.weight.std().item()]
    report = convert_activation(model, glu="drop")
    mlp = model[0]
    assert list(mlp.state_dict()) == ["up_proj.weight", "act_fn.weight", "act_fn.bias", "down_proj.weight"]
    assert mlp.up_proj.weight.shape == (96, DIM)
    fresh = [mlp.up_proj.weight.std().item(), mlp.down_proj.weight.std().item()]
    assert_close(fresh, spreads, rtol=0.1, atol=0)
    assert report.parameters == sum(row.parameters for row in report) == 8  # the coefficients
    assert_close(mlp(x), mlp.down_proj(PolyNorm()(mlp.up_proj(x))))
    check_trains(model, x, sites=2)
    check_round_trips(model, make, x, glu="drop")


def test_width_is_kept_on_request():
    model = stack(LlamaMLP)
    convert_activation(model, glu="drop", resize=None)
    assert model[0].up_proj.out_features == HIDDEN


@pytest.mark.parametrize(("gated", "plain"), [(5504, 8256), (1024, 1536), (11008, 16512), (14336, 21504)])
def test_parity_of_the_paper(gated, plain):
    assert parity_width(gated, 2048, 2048) == plain


def test_parity_of_small_widths_takes_the_largest_step_that_fits():
    assert parity_width(407, 96, 96) == 608  # exactly 610.5; 640 is 5 % off, 608 is 19 * 32


@pytest.mark.parametrize("bias", [False, True])
def test_parity_is_within_one_percent(bias):
    for inputs, outputs in ((8, 8), (96, 96), (96, 32)):
        row = inputs + bias
        for gated in range(40, 4000, 37):
            plain = parity_width(gated, row, outputs)
            assert abs(plain * (row + outputs) / (gated * (2 * row + outputs)) - 1) <= 0.01
            if plain > 50 * 64:
                assert plain % 64 == 0


def test_tied_gated_mlp_is_replaced_once_everywhere():
    mlp = LlamaMLP()
    model = nn.ModuleDict({"a": nn.Sequential(mlp), "b": nn.Sequential(mlp)})
    report = convert_activation(model, glu="drop")
    assert model["a"][0] is model["b"][0]
    assert [(row.path, row.note) for row in report] == [("a.0", "fresh weights, also b.0")]


def test_dropped_gate_keeps_dtype_and_mode():
    model = stack(LlamaMLP).to(torch.bfloat16).eval()
    convert_activation(model, glu="drop")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())


def test_fresh_projections_train_in_a_frozen_host_and_start_without_bias():
    model = nn.Sequential(SwiGLU(DIM, HIDDEN)).requires_grad_(False)
    model[0].drop1.eval()
    nn.init.zeros_(model[0].fc2.weight)
    convert_activation(model, glu="drop")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model[0].fc1.bias.any()
    assert not model[0].fc2.weight.any()  # a block that started as zero still does
    assert model[0].training
    assert not model[0].drop1.training


def test_a_gate_outside_the_match_does_not_count():
    with pytest.raises(ConversionError, match="no gated feed-forward"):
        convert_activation(nn.Sequential(GPT2MLP(), LlamaMLP()), match="0.act", glu="drop")


def test_biases_and_a_norm_count_for_parity():
    model = nn.Sequential(SwiGLU(8, 512, norm_layer=nn.LayerNorm))
    report = convert_activation(model, glu="drop")
    assert abs(report.parameters) < 0.01 * report.parameters_before


def test_ungated_blocks_are_converted_beside_dropped_gates():
    report = convert_activation(nn.Sequential(GPT2MLP(), LlamaMLP()), glu="drop")
    assert [row.path for row in report] == ["0.act", "1"]


def test_blocks_that_look_gated_are_not():
    spatial = nn.Sequential(timm.layers.GatedMlp(DIM, HIDDEN, gate_layer=nn.Identity))  # activates both halves
    assert [row.note for row in convert_activation(spatial)] == [""]
    plain = nn.Module()
    plain.Wi, plain.act, plain.Wo = nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM)
    assert [row.note for row in convert_activation(nn.Sequential(plain))] == [""]
    chain = nn.Module()  # three layers one after the other
    chain.w1, chain.act, chain.w2, chain.w3 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 12), nn.Linear(12, 4)
    assert [row.note for row in convert_activation(nn.Sequential(chain))] == [""]


def test_what_cannot_lose_its_gate():
    with pytest.raises(ConversionError, match=r"no gated feed-forward to convert in this Sequential.*: 1 GELU"):
        convert_activation(nn.Sequential(nn.Linear(4, 4), nn.GELU()), glu="drop")
    with pytest.raises(ConversionError, match="model itself is the gated LlamaMLP"):
        convert_activation(LlamaMLP(), glu="drop")
    odd = stack(LlamaMLP)
    odd[1].sparsify = nn.Softmax(-1)
    with pytest.raises(ConversionError, match=r"1.sparsify, a Softmax, has no known place"):
        convert_activation(odd, glu="drop")
    adapted = stack(LlamaMLP)
    adapted[1].up_proj = type("LoRALinear", (nn.Linear,), {})(DIM, HIDDEN, bias=False)
    with pytest.raises(ConversionError, match=r"1.up_proj is a LoRALinear"):
        convert_activation(adapted, glu="drop")
    normed = nn.Sequential(GluMlp(DIM, HIDDEN, norm_layer=nn.BatchNorm1d))
    with pytest.raises(ConversionError, match=r"0.norm, a BatchNorm1d, cannot be rebuilt"):
        convert_activation(normed, glu="drop")
    assert isinstance(odd[0], LlamaMLP)  # planned before the error, not done


class Experts(nn.Module):
    """The mixture of experts of `transformers`: one tensor for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 2 * HIDDEN, DIM))
        self.act_fn = nn.SiLU()


def test_experts_in_one_tensor_share_an_activation_and_keep_their_gate():
    with pytest.raises(ConversionError, match=r"0.act_fn serves experts"):
        convert_activation(nn.Sequential(Experts(), LlamaMLP()), glu="drop")
    assert [row.note for row in convert_activation(nn.Sequential(Experts()))] == ["one for all experts"]
