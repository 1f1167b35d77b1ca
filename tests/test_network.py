"""Traces: what ran, in which shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from odd_layers import PadsItself, Pools
from tiny_networks import KINDS
from torch import Tensor, nn

from diplugin.costs.latency import op_key
from diplugin.errors import ModelError
from diplugin.network import LayerSpec, TensorSpec, Width, record_layers, trace_network

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]
IMAGE = (torch.randn(1, 3, 8, 8),)


def layer(model: nn.Module, name: str, inputs: tuple[Tensor, ...] = IMAGE) -> LayerSpec:
    return next(spec for spec in record_layers(model, inputs) if spec.name == name)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_have_the_shapes_that_run(make_net: MakeNet, kind: str) -> None:
    model, inputs = make_net(kind)
    seen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d)
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            module.register_forward_hook(
                lambda _, args, out, name=name: seen.append((name, tuple(args[0].shape), tuple(out.shape)))
            )
    model(*inputs)
    expected = list(seen)
    assert [(s.name, s.input_shape, s.output_shape) for s in record_layers(model, inputs)] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_tracing_changes_nothing(make_net: MakeNet, kind: str, state_of: Any, assert_same_state: Any) -> None:
    model, inputs = make_net(kind)
    model.train()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    before = state_of(model)
    trace_network(model, inputs)
    assert_same_state(model, before)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "option_a"])
def test_every_group_but_the_outputs_is_found_prunable(make_net: MakeNet, kind: str) -> None:
    trace = trace_network(*make_net(kind))
    assert trace.prunable
    assert all("output of the model" in g.note for g in trace.groups if not g.prunable)
    assert trace.base_widths == {g.name: g.channels for g in trace.prunable}


@pytest.mark.parametrize("kind", ["plain", "depthwise", "grouped", "tokens"])
@pytest.mark.parametrize("change", ["bfloat16", "double", "channels_last"])
def test_dtype_and_memory_format_do_not_matter(make_net: MakeNet, kind: str, change: str) -> None:
    model, inputs = make_net(kind)
    expected = trace_network(model, inputs).groups
    option: dict[str, Any] = {"memory_format": torch.channels_last} if change == "channels_last" else {}
    dtype = getattr(torch, change) if change != "channels_last" else torch.float32
    trace = trace_network(model.to(dtype=dtype, **option), (inputs[0].to(dtype=dtype, **option),))
    assert trace.groups == expected
    assert trace.inputs == (TensorSpec((1, 3, 8, 8), str(dtype).removeprefix("torch.")),)


# --- layers ---


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (nn.ReLU(), "relu"), (nn.ReLU(inplace=True), "relu"), (nn.ReLU6(), "relu6"), (nn.Hardswish(), "hardswish"),
        (nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.Sigmoid(), "sigmoid"), (nn.Tanh(), "tanh"),
        (nn.LeakyReLU(), "leaky_relu"), (nn.Identity(), None), (nn.MaxPool2d(2), None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("normalised", [False, True])
def test_activations(activation: nn.Module, expected: str | None, normalised: bool) -> None:
    norm = nn.BatchNorm2d(4) if normalised else nn.Identity()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, activation, nn.Conv2d(4, 2, 1))
    assert layer(model, "0").activation == expected
    assert layer(model, "3").activation is None


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.relu(x) + x


def test_an_activation_that_is_not_the_only_reader_is_not_fused() -> None:
    assert layer(TwoReaders(), "conv").activation is None


@pytest.mark.parametrize(("padding", "expected"), [("same", (2, 1)), ("valid", (0, 0)), (1, (1, 1)), ((0, 2), (0, 2))])
def test_padding_is_in_numbers(padding: Any, expected: tuple[int, ...]) -> None:
    model = nn.Conv2d(3, 4, (5, 3), padding=padding)
    spec = layer(model, "")
    assert spec.padding == expected
    assert (spec.kernel, spec.stride, spec.dilation, spec.groups, spec.bias) == ((5, 3), (1, 1), (1, 1), 1, True)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [7, 8, 9, 10])
def test_keys_of_layers_that_pad_themselves_have_their_output_size(stride: int, size: int) -> None:
    x = torch.randn(1, 3, size, size + 1)
    model = PadsItself(3, 4, (3, 5), stride)
    key = op_key(layer(model, "", (x,)), 3, 4)
    assert key.output_size == tuple(model(x).shape[2:])


def test_a_layer_that_makes_its_map_smaller_first_has_no_negative_padding() -> None:
    spec = layer(Pools(3, 4, 3, padding=1), "", (torch.randn(1, 3, 16, 16),))
    assert (spec.padding, spec.output_shape) == ((0, 0), (1, 4, 4, 4))


def test_what_a_spec_says_about_a_layer() -> None:
    assert layer(nn.Conv2d(4, 4, 3, groups=4), "", (torch.randn(1, 4, 8, 8),)).depthwise
    assert not layer(nn.Conv2d(4, 8, 3, groups=4), "", (torch.randn(1, 4, 8, 8),)).depthwise
    assert not layer(nn.Conv2d(1, 1, 3), "", (torch.randn(1, 1, 8, 8),)).depthwise
    assert layer(nn.ConvTranspose2d(3, 5, 2), "").op == "conv_transpose"
    assert (layer(nn.LayerNorm([3, 8, 8]), "").op, layer(nn.BatchNorm2d(3), "").in_channels) == ("norm", 3)
    assert layer(nn.Linear(8, 2, bias=False), "").bias is False


class ByName(nn.Module):
    """Calls its layers with keyword arguments, as some transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(input=F.relu(self.one(input=x)))


def test_layers_called_by_keyword_are_seen_too() -> None:
    assert [spec.name for spec in record_layers(ByName(), (torch.randn(1, 8),))] == ["one", "two"]


def test_width() -> None:
    width = Width(2, (("a", 1), ("b", 16)))
    assert width.at({"a": 3, "b": 2, "c": 9}) == 2 + 3 + 32
    assert Width(5).at({}) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_widths_of_the_unpruned_network_are_its_own(make_net: MakeNet, kind: str) -> None:
    trace = trace_network(*make_net(kind))
    for spec in trace.layers:
        if spec.op != "norm":
            assert trace.width(spec.name, "in", spec.in_channels).at(trace.base_widths) == spec.in_channels
        assert trace.width(spec.name, "out", spec.out_channels).at(trace.base_widths) == spec.out_channels


# --- input specifications ---


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_tensor_specs_make_examples_of_their_kind(dtype: torch.dtype) -> None:
    spec = TensorSpec.of(torch.zeros(2, 3, dtype=dtype))
    example = spec.example()
    assert (tuple(example.shape), example.dtype) == ((2, 3), dtype)
    assert TensorSpec.of(example) == spec


def test_examples_can_be_seeded() -> None:
    spec = TensorSpec((4,))
    one, two = (spec.example(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)


# --- bad input ---


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("first line\nsecond line")


def test_a_model_that_raises(state_of: Any, assert_same_state: Any) -> None:
    model = Raises()
    before = state_of(model)
    for run in (trace_network, record_layers):
        with pytest.raises(ModelError, match="first line") as caught:
            run(model, IMAGE)
        assert "second" not in str(caught.value)
    assert_same_state(model, before)


@pytest.mark.parametrize("where", ["wrapped", "wrapped inside", "in place", "in place inside"])
def test_a_compiled_model_is_not_taken_for_one_without_channels(make_net: MakeNet, where: str) -> None:
    model, inputs = make_net("residual")
    whole = nn.Sequential(model) if where.endswith("inside") else model
    if where.startswith("in place"):
        model.compile(backend="eager")
    else:
        compiled: Any = torch.compile(model, backend="eager")
        whole = nn.Sequential(compiled) if where.endswith("inside") else compiled
    with pytest.raises(ModelError, match="before torch.compile.*'0'" if where.endswith("inside") else "before"):
        trace_network(whole, inputs)


def test_inputs_that_are_no_tensors() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, input: Tensor, scale: int = 1) -> Tensor:
            return super().forward(input) * scale

    with pytest.raises(ModelError, match="expected tensors as example inputs, got int"):
        trace_network(Scaled(3, 4, 3), (*IMAGE, 2))
