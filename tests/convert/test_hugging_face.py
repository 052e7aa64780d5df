"""Real Hugging Face models with random weights; skipped where transformers is not installed."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from tests.convert.hosts import DIM, HIDDEN, check_trains, gelu_tanh
from zoo import convert_activation
from zoo.convert.known import activation_kind

HF_SIZES = {"vocab_size": 64, "hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 2}
HF_TOKENS = dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"], 0)


def test_hf_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**HF_SIZES, intermediate_size=HIDDEN)
    tokens = torch.randint(0, 64, (2, 5))
    kept, dropped = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    assert [row.path for row in convert_activation(kept)] == [f"model.layers.{i}.mlp.act_fn" for i in (0, 1)]
    check_trains(kept, tokens, sites=2, pick=lambda out: out.logits)
    report = convert_activation(dropped, glu="drop")
    assert not report.kept
    assert dropped.model.layers[1].mlp.up_proj.out_features == 96
    check_trains(dropped, tokens, sites=2, pick=lambda out: out.logits)


@pytest.mark.parametrize("family", ["GPT2", "Bert", "OPT", "Phi3", "T5", "ModernBert"])
def test_hf_families(family):
    transformers = pytest.importorskip("transformers")
    config, path, glu = {
        "GPT2": (
            transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=DIM, n_layer=2, n_head=2),
            "h.0.mlp.act",
            "keep",
        ),
        "Bert": (
            transformers.BertConfig(**HF_SIZES, intermediate_size=HIDDEN),
            "encoder.layer.0.intermediate.intermediate_act_fn",
            "keep",
        ),
        "OPT": (
            transformers.OPTConfig(**HF_SIZES, ffn_dim=HIDDEN, word_embed_proj_dim=DIM),
            "decoder.layers.0.activation_fn",
            "keep",
        ),
        "Phi3": (transformers.Phi3Config(**HF_SIZES, intermediate_size=HIDDEN, pad_token_id=0), "layers.0.mlp", "drop"),
        "ModernBert": (
            transformers.ModernBertConfig(**HF_SIZES, **HF_TOKENS, intermediate_size=HIDDEN),
            "layers.0.mlp",
            "drop",
        ),
        "T5": (
            transformers.T5Config(
                vocab_size=64,
                d_model=DIM,
                d_kv=8,
                d_ff=HIDDEN,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
            ),
            "encoder.block.0.layer.1.DenseReluDense",
            "drop",
        ),
    }[family]
    model = getattr(transformers, f"{family}EncoderModel" if family == "T5" else f"{family}Model")(config)
    report = convert_activation(model, glu=glu)
    assert report.replaced[0].path == path
    assert len(report) == 2
    # BERT's pooler is the only activation that stays
    assert [row.path for row in report.kept] == (["pooler.activation"] if family == "Bert" else [])
    check_trains(model, torch.randint(0, 64, (2, 5)), sites=2, pick=lambda out: out.last_hidden_state * torch.rand(DIM))


def test_hf_mixture_shares_an_activation_between_its_experts():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        **HF_SIZES, intermediate_size=HIDDEN, num_local_experts=2, num_key_value_heads=2
    )
    model = transformers.MixtralModel(config)
    report = convert_activation(model)
    assert len(report) == 2
    assert {row.note for row in report} <= {"one for all experts", "on the gate"}  # newer and older transformers
    check_trains(model, torch.randint(0, 64, (2, 5)), sites=2, pick=lambda out: out.last_hidden_state * torch.rand(DIM))


def test_hf_activations_are_known():
    activations = pytest.importorskip("transformers.activations")
    kinds = {name: activation_kind(activations.ACT2FN[name]) for name in activations.ACT2CLS}
    assert {name for name, kind in kinds.items() if kind != "hidden"} == {"linear", "sigmoid", "tanh"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_timm_and_torch_activations_are_known():
    create = timm.layers.create_act
    names = {**create._ACT_LAYER_DEFAULT, **create._ACT_LAYER_ME}
    functions = {**create._ACT_FN_DEFAULT, **create._ACT_FN_ME}
    bounded = {"sigmoid", "tanh", "hard_sigmoid", "hardsigmoid"}
    for table in (names, functions):
        table.pop("identity", None)  # timm lists it among them; it activates nothing
    for name, make in names.items():
        assert activation_kind(make()) == ("bounded" if name in bounded else "hidden"), name
    for name, function in functions.items():
        assert activation_kind(function) == ("bounded" if name in bounded else "hidden"), name
    for function in (F.relu, torch.relu, F.relu_, F.leaky_relu, F.hardswish, F.softplus, gelu_tanh):
        assert activation_kind(function) == "hidden"
    assert activation_kind(type("Clipped", (nn.ReLU,), {})()) == "hidden"
    assert activation_kind(type("NormReLU", (nn.LayerNorm,), {})(4)) is None
    for other in (
        F.dropout,
        F.softmax,
        nn.Softmax(-1),
        nn.GLU(),
        nn.Identity(),
        nn.GELU,
        nn.Linear(2, 2),
        "relu",
        None,
    ):
        assert activation_kind(other) is None
