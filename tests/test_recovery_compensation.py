"""Compensation: exact where channels depend on each other, and least squares where they do not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from odd_layers import PadsItself, Squares, Standardises
from torch import Tensor, nn

from diplugin.errors import DataError
from diplugin.network import NetworkTrace, trace_network
from diplugin.plan import PruningPlan
from diplugin.recovery import compensate
from diplugin.surgery import apply_plan

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]


def plan_of(trace: NetworkTrace, **kept: tuple[int, ...]) -> PruningPlan:
    """The plan that keeps these channels, and all of the groups not named."""
    whole = {n: tuple(range(c)) for n, c in trace.base_widths.items()}
    return PruningPlan({**whole, **kept}, trace.base_widths, {}, trace.inputs)


class Small(nn.Module):
    """A producer whose channels 2 and 5 repeat channels 0 and 1, a reader of one of several kinds, a head."""

    def __init__(self, reader: str, bias: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.kind = reader
        self.reader: nn.Module = {
            "conv": nn.Conv2d(6, 5, 3, padding=1, bias=bias),
            "strided": nn.Conv2d(6, 5, 3, stride=2, dilation=2, bias=bias),
            "transposed": nn.ConvTranspose2d(6, 5, 2, stride=2, bias=bias),
            "linear": nn.Linear(6 * 64, 5, bias=bias),
            "tokens": nn.Linear(6, 5, bias=bias),
        }[reader]
        with torch.no_grad():
            for copy_, original, scale in ((2, 0, 1.0), (5, 1, 2.5)):
                self.first.weight[copy_] = scale * self.first.weight[original]
                self.first.bias[copy_] = scale * self.first.bias[original]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        if self.kind == "linear":
            x = x.flatten(1)
        elif self.kind == "tokens":
            x = x.flatten(2).transpose(1, 2)
        return self.reader(x)


@pytest.mark.parametrize("reader", ["conv", "strided", "transposed", "linear", "tokens"])
@pytest.mark.parametrize("bias", [False, True])
def test_dependent_channels_leave_without_a_trace(make_images: Any, reader: str, bias: bool) -> None:
    model = Small(reader, bias)
    data = make_images(500)
    trace = trace_network(model, (data.images[:1],))
    original = copy.deepcopy(model)
    plan = plan_of(trace, first=(0, 1, 3, 4))
    names = compensate(model, data.loader(50), trace, plan, strength=1e-10)
    assert names == ("reader",)
    pruned = apply_plan(model, plan)
    with torch.no_grad():
        want, got = original(data.images), pruned(data.images)
        uncompensated = apply_plan(copy.deepcopy(original), plan)(data.images)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert float((uncompensated - want).norm()) > 20 * float((got - want).norm())


def test_a_constant_channel_goes_into_the_bias() -> None:
    """Of a pixel-wise reader: no window reaches over the border."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0.0, 3.0
    images = torch.randn(60, 3, 6, 6)
    trace, want = trace_network(model, (images[:1],)), model(images).detach()
    plan = plan_of(trace, **{"0": (0, 1, 3)})
    compensate(model, [(images, torch.zeros(60))], trace, plan, strength=1e-10)
    torch.testing.assert_close(apply_plan(model, plan)(images), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tracks", [False, True])
def test_a_constant_is_left_to_the_norm_that_takes_it_up(tracks: bool) -> None:
    """An InstanceNorm with running statistics subtracts the old mean, as a fixed scale and offset behind would."""
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(5, track_running_stats=tracks)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1, bias=False), norm).eval()
    images = torch.randn(60, 3, 6, 6)
    trace = trace_network(model, (images[:1],))
    plan, hidden = plan_of(trace, **{"0": (0, 1, 3)}), model[:2](images).detach().double()
    rows, weight = hidden.movedim(1, -1).flatten(0, 2), model[2].weight.detach().double().flatten(1)
    read = torch.cat([rows[:, [0, 1, 3]], torch.ones(len(rows), 0 if tracks else 1)], 1)
    expected = weight[:, [0, 1, 3]] + weight[:, 2:3] @ torch.linalg.lstsq(read, rows[:, 2:3]).solution[:3].T
    compensate(model, [(images, torch.zeros(60))], trace, plan, strength=1e-12)
    got = apply_plan(model, plan)[2].weight.flatten(1)  # pyright: ignore
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)


def test_no_bias_appears_that_a_fresh_model_lacks(make_net: MakeNet, make_images: Any) -> None:
    model, inputs = make_net("residual")
    trace = trace_network(model, inputs)
    plan = plan_of(trace, a1=(0, 3, 5), c1=(1, 2, 8, 9))
    names = {name: p.shape for name, p in model.named_parameters()}
    assert set(compensate(model, make_images(60).loader(20), trace, plan)) == {"a2", "c2"}
    assert {name: p.shape for name, p in model.named_parameters()} == names


def test_the_regression_is_least_squares(make_images: Any) -> None:
    """Against torch.linalg.lstsq on the stored maps of a linear reader without a bias."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 4, bias=False))
    x, labels = torch.randn(200, 12), torch.zeros(200)
    hidden = model[:2](x).detach().double()
    trace = trace_network(model, (x[:1],))
    kept, gone = [0, 2, 5, 6], [1, 3, 4]
    plan = plan_of(trace, **{"0": tuple(kept)})
    weight = model[2].weight.detach().double().clone()
    compensate(model, [(x, labels)], trace, plan, strength=1e-12)
    solution = torch.linalg.lstsq(hidden[:, kept], hidden[:, gone]).solution
    expected = weight[:, kept] + weight[:, gone] @ solution.T
    torch.testing.assert_close(model[2].weight[:, kept].double(), expected, rtol=1e-3, atol=1e-4)


def outputs_of(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """What a layer writes, channels first, each channel's mean over images and pixels removed."""
    seen: list[Tensor] = []
    module = model.get_submodule(layer)
    handle = module.register_forward_hook(lambda _m, _a, out: seen.append(out.detach()))
    with torch.no_grad():
        model(images)
    handle.remove()
    out = seen[0].movedim(-1 if isinstance(module, nn.Linear) else 1, 0).flatten(1)
    return out - out.mean(1, keepdim=True)


@pytest.mark.parametrize("kind", ["plain", "residual", "vgg", "dense", "depthwise", "tokens", "transposed"])
def test_what_readers_write_comes_closer_on_every_kind(make_net: MakeNet, make_images: Any, kind: str) -> None:
    """Group by group, up to a constant, which a BatchNorm behind the reader takes up."""
    model, inputs = make_net(kind)
    data = make_images(300)
    trace = trace_network(model, inputs)
    for group in trace.prunable:
        plan = plan_of(trace, **{group.name: tuple(range(0, group.channels, 2))})
        plain = apply_plan(copy.deepcopy(model), plan)
        better = copy.deepcopy(model)
        names = compensate(better, data.loader(100), trace, plan)
        better = apply_plan(better, plan)
        assert set(names) == {m.layer for m in group.side("in")}
        first = next(spec.name for spec in trace.layers if spec.name in names)  # later ones may read what it wrote
        want, without, with_ = (outputs_of(m, first, data.images) for m in (model, plain, better))
        assert float((with_ - want).norm()) <= float((without - want).norm())


def test_grouped_readers_are_passed_over(make_net: MakeNet, make_images: Any) -> None:
    model, inputs = make_net("grouped")
    trace = trace_network(model, inputs)
    plan = plan_of(trace, **{"0": (0, 2, 4, 6)})
    before = copy.deepcopy(model.state_dict())
    assert compensate(model, make_images(30).loader(10), trace, plan) == ()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_readers_that_do_more_than_multiply_are_passed_over(make_images: Any) -> None:
    """Folded into before it is standardised, a weight would come out as another one."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), Standardises(6, 5, 3), nn.Flatten())
    images = make_images(40)
    trace = trace_network(model, (images.images[:1],), verify=False)
    before = copy.deepcopy(model.state_dict())
    assert compensate(model, images.loader(20), trace, plan_of(trace, **{"0": (0, 1, 2)})) == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square()


@pytest.mark.parametrize(
    ("reader", "before"), [(Squares(6, 5, 3), Square()), (PadsItself(6, 5, 3, 2), nn.ZeroPad2d((0, 1, 0, 1)))]
)
def test_readers_that_prepare_what_they_read(make_images: Any, reader: Any, before: nn.Module) -> None:
    """As where a module of its own does that."""
    plain = nn.Conv2d(6, 5, reader.kernel_size, reader.stride)
    plain.load_state_dict(reader.state_dict())
    first, images = nn.Conv2d(3, 6, 3, padding=1), make_images(40)
    for layers in ([first, reader], [copy.deepcopy(first), before, plain]):
        model = nn.Sequential(*layers)
        trace = trace_network(model, (images.images[:1],), verify=False)
        assert compensate(model, images.loader(20), trace, plan_of(trace, **{"0": (0, 1, 2)}))
    torch.testing.assert_close(dict(reader.named_parameters()), dict(plain.named_parameters()))


def test_a_plan_that_keeps_all_needs_no_data(make_net: MakeNet) -> None:
    model, inputs = make_net("plain")
    trace = trace_network(model, inputs)
    assert compensate(model, [], trace, plan_of(trace)) == ()


def test_modes_and_hooks_are_left(make_net: MakeNet, make_images: Any, state_of: Any) -> None:
    model, inputs = make_net("plain")
    trace = trace_network(model, inputs)
    model.train()
    before = state_of(model)
    compensate(model, make_images(40).loader(20), trace, plan_of(trace, **{"3": (0, 1)}))
    after = state_of(model)
    assert (after["modes"], after["hooks"], after["grads"]) == (before["modes"], before["hooks"], before["grads"])
    changed = {k for k, v in after["weights"].items() if not torch.equal(v, before["weights"][k])}
    assert changed <= {"7.weight", "7.bias"}


def test_bad_data(make_net: MakeNet, make_images: Any, state_of: Any, assert_same_state: Any) -> None:
    model, inputs = make_net("plain")
    trace = trace_network(model, inputs)
    plan = plan_of(trace, **{"0": (0, 1)})
    before = state_of(model)
    with pytest.raises(DataError, match="empty"):
        compensate(model, [], trace, plan)
    with pytest.raises(DataError, match="finite"):
        compensate(model, [(make_images(20).images * torch.nan, torch.zeros(20))], trace, plan)
    assert_same_state(model, before)
