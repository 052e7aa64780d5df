"""Blocks whose forward calls an activation that cannot be taken out as a module."""

from __future__ import annotations

import inspect
import pickle
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from tests.convert.norm_checks import check, refused
from zoo.convert import convert_norm_act


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class ResBlock(nn.Module):
    """Of a denoising U-Net, with the time as a shift between its halves."""

    def __init__(self, width: int = 16, groups: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, width), nn.GroupNorm(groups, width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.time = nn.Linear(4, width)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(self.act(self.norm1(x)))
        h = h + self.time(time)[:, :, None, None]
        return x + self.conv2(self.act(self.norm2(h)))


class FunctionalResBlock(ResBlock):
    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(time))[:, :, None, None]
        h = F.dropout(torch.nn.functional.silu(self.norm2(h), inplace=True), 0.5, self.training)
        return torch.add(x, self.conv2(h))


@pytest.mark.parametrize("cls", [ResBlock, FunctionalResBlock])
def test_group_norm_and_silu_of_a_denoiser(cls):
    block, x, time = cls().eval(), torch.randn(2, 16, 6, 6), torch.randn(2, 4)
    report = convert_norm_act(block)
    note = "" if cls is ResBlock else "forward of the model rewritten"
    name = "SiLU" if cls is ResBlock else "silu"
    assert [(row.old, row.new, row.note) for row in report] == [(f"GroupNorm + {name}", "EvoNorm2dS0", note)] * 2
    assert (block.norm1.groups, block.norm2.groups) == (8, 8)
    assert isinstance(block.act, nn.Identity) == (cls is ResBlock)

    def start(h: Tensor) -> Tensor:
        """S0 at its start: SiLU over the deviation of the group, nothing centred."""
        grouped = h.reshape(2, 8, -1)
        return F.silu(h) / (grouped.var(2, correction=0, keepdim=True) + 1e-5).sqrt().expand_as(grouped).reshape_as(h)

    shift = block.time(time if cls is ResBlock else F.silu(time))[:, :, None, None]
    expected = x + block.conv2(start(block.conv1(start(x)) + shift))
    assert_close(block(x, time), expected)
    assert_close(pickle.loads(pickle.dumps(block))(x, time), expected)


def test_rewritten_forward_keeps_what_depends_on_the_mode():
    block, x, time = FunctionalResBlock(), torch.randn(2, 16, 6, 6), torch.randn(2, 4)
    convert_norm_act(block)
    for copy in (block, deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert not copy.train()(x, time).equal(copy(x, time))
        assert copy.eval()(x, time).equal(copy(x, time))
        assert copy(time=time, x=x).equal(block.eval()(x, time))


def test_rewritten_class_is_derived_once_and_shows_its_source():
    blocks = nn.ModuleList(FunctionalResBlock() for _ in range(2))
    model = nn.Sequential(*(Fixed(block) for block in blocks))
    convert_norm_act(model)
    one, two = blocks
    assert type(one) is type(two) is type(deepcopy(one)) is type(pickle.loads(pickle.dumps(two)))
    assert type(one) is not FunctionalResBlock
    assert isinstance(one, FunctionalResBlock)
    assert (type(one).__name__, type(one).__module__) == ("FunctionalResBlock", __name__)
    with pytest.raises(RuntimeError) as caught:
        one.eval()(torch.randn(2, 16, 6, 6), torch.randn(2, 5))
    assert "self.time" in str(caught.getrepr(style="short"))  # the traceback shows the line


class Fixed(nn.Module):
    """A block with its time fixed."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("time", torch.ones(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.time)


def test_source_of_a_rewritten_forward_can_be_read():
    block = FunctionalResBlock()
    convert_norm_act(block)
    assert "self.norm1" in inspect.getsource(inspect.unwrap(type(block).forward))


class Plain(nn.Module):
    """Calls its activations as functions, in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.unused = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norms[0](self.convs[0](x)))
        x = self.norms[1](self.convs[1](x)).relu_()
        x = F.hardswish(self.norms[2](self.convs[2](x)))
        # behind a product, so that the norm is not next to it
        return F.leaky_relu(self.norms[3](self.convs[3](x)) * self.scale, 0.1)


def test_functions_and_methods_are_taken_out():
    model = nn.Sequential(Plain())
    keys = set(model.state_dict())
    report = convert_norm_act(model)
    assert [row.old for row in report] == [f"BatchNorm2d{act}" for act in (" + relu", " + relu_", " + hardswish", "")]
    assert {key for key in keys if "running" not in key and "tracked" not in key} <= set(model.state_dict())
    x = torch.randn(2, 8, 3, 3)
    check(model, x, acts=3, affine=1)
    part = model[0]
    y = x
    for conv, norm in zip(part.convs, part.norms, strict=True):
        y = norm(conv(y))
    assert_close(model(x), F.leaky_relu(y * part.scale, 0.1))


def test_rewritten_model_can_be_converted_again():
    model = nn.Sequential(Plain())
    convert_norm_act(model, skip="0.norms.0")
    report = convert_norm_act(model)
    assert [row.old for row in report] == ["BatchNorm2d + relu"]
    x = torch.randn(2, 8, 3, 3)
    check(model, x, acts=3, affine=1)
    assert pickle.loads(pickle.dumps(model.eval()))(x).equal(model(x))


class InPlace(nn.Module):
    """Two names for one value that an addition changes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        same = x
        x += 1
        x *= 2
        return torch.stack([same, x])


def test_what_is_done_in_place_stays_so():
    model = InPlace()
    convert_norm_act(model)
    one, two = model(torch.randn(2, 8, 3, 3))
    assert one.equal(two)


class Block(nn.Module):
    """Parts of a block; how they are put together is up to those below."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.conv = nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)

    def activated(self, x: Tensor) -> Tensor:
        return F.relu(x)


class WithStatement(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.relu(self.norm(self.conv(x)))


class LooksAtTypes(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x if isinstance(x, Tensor) else x[0])))


class Optional(Block):
    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        return F.relu(self.norm(self.conv(x if extra is None else x + extra)))


class Remembers(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.last = F.relu(self.norm(self.conv(x)))
        return self.last


class Logs(Block):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.act(self.norm(self.conv(x)))
        self.seen.append(self.last)
        return self.last


def test_traces_leave_nothing_in_the_model():
    model = nn.Sequential(Logs())
    convert_norm_act(model)
    assert not hasattr(model[0], "last")
    assert model[0].seen == []
    model(torch.randn(2, 8, 3, 3))
    assert isinstance(model[0].last, Tensor)


class Helper(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.activated(self.norm(self.conv(x)))


class MakesNoise(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))) + torch.rand(1)


class ByMode(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return x if self.training else F.silu(x)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (WithStatement, "it has a with statement"),
        (LooksAtTypes, "it calls isinstance"),
        (Optional, "it has an argument that may be left out, extra"),
        (Remembers, "it sets last"),
        (Helper, "it calls it in activated, which may be called without forward"),
        (MakesNoise, r"it cannot be traced \(makes a tensor of its own\)"),
        (ByMode, "it calls other activations in other modes"),
    ],
)
def test_forward_that_a_trace_would_change_is_refused(cls, why):
    model = nn.Sequential(cls())
    with refused(model, f"^0, a {cls.__name__}, .* cannot be rewritten: {why}.*; give it an nn.Module"):
        convert_norm_act(model)


def test_forward_replaced_on_the_instance_is_refused():
    model = nn.Sequential(Plain())
    model[0].forward = partial(Plain.forward, model[0])
    with refused(model, "it was replaced on the instance"):
        convert_norm_act(model)


def test_block_of_two_minds_is_refused():
    block = Inner()
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), block, nn.Conv2d(8, 8, 1), block)
    with refused(model, "2 is called in several places, in some of which its relu follows no norm"):
        convert_norm_act(model)


class Inner(nn.Module):
    """An activation as a module that no name tells."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


def test_activation_of_unknown_name_is_taken_out_of_its_own_forward():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), Inner())
    report = convert_norm_act(model)
    assert [row.note for row in report] == ["forward of 2 rewritten"]
    x = torch.randn(2, 8, 3, 3)
    assert model[2](x) is x
