"""Quantization end to end on tiny networks: budgets, fine-tuning, files, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_quantized import FREE_ENDS, prepared
from torch import nn
from torch.nn.utils.prune import l1_unstructured

from diplugin import Budget
from diplugin.errors import BudgetError, DataError, InfeasibleBudget, ModelError, UserError
from diplugin.quantize import (
    BitAllocation,
    Bits,
    DIBits,
    EndLayers,
    MagnitudeBits,
    OutputErrorBits,
    Quantizer,
    RandomBits,
    UniformBits,
    export_quantized,
    quantize,
    quantize_run,
)
from diplugin.quantize.fake import layers_on_grid
from diplugin.recovery import FineTuning


def test_grid_values_in_the_model_and_float_where_it_was(make_net, make_images, state_of, assert_same_state):
    model, loader, example, bits = prepared(make_net, make_images)
    before = state_of(model)
    result = quantize(model, loader, example, bits, budgets=[Budget("size_mb", fraction=0.8)])
    assert_same_state(model, before)
    for name, layer in layers_on_grid(result.model):
        for row, width in zip(layer.weight.detach().flatten(1), result.allocation.bits[name], strict=True):
            assert len(row.unique()) <= 2**width
            assert width or not row.any()


def test_eight_bits_are_near_the_float_model(make_net, make_images):
    model, loader, example, bits = prepared(make_net, make_images)
    quantizer = Quantizer(model, loader, example, bits)
    expected = model(loader[0][0])
    difference = quantizer.at(quantizer.uniform(8)).model(loader[0][0]) - expected
    assert difference.norm() < 0.05 * expected.norm()


def test_every_strategy_keeps_the_budget(make_net, make_images):
    model, loader, example, bits = prepared(make_net, make_images)
    quantizer = Quantizer(model, loader, example, bits)
    eight = quantizer.at(quantizer.uniform(8))
    for strategy in (DIBits(), OutputErrorBits(), UniformBits(), MagnitudeBits(), RandomBits(3)):
        for figure in ("size_mb", "bops"):
            result = quantizer.spend(strategy, [Budget(figure, fraction=0.75)])
            assert getattr(result, figure) <= 0.75 * getattr(eight, figure)
            assert set(result.allocation.bits) == set(quantizer.uniform(8))


def test_bit_operations_are_counted_on_the_layers(make_net, make_images):
    model, loader, example, bits = prepared(make_net, make_images, "plain")
    quantizer = Quantizer(model, loader, example, bits)
    macs = 0

    def count(layer, args, output):
        nonlocal macs
        macs += output[0].numel() * layer.weight[0].numel()

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    model(*example)
    for handle in handles:
        handle.remove()
    assert quantizer.at(quantizer.uniform(4)).bops == macs * 4 * 8


def test_ends_keep_their_width(make_net, make_images):
    model, loader, example, _ = prepared(make_net, make_images)
    result = quantize(model, loader, example, Bits(ends=EndLayers(8, 4), images=80),
                      budgets=[Budget("bops", fraction=0.6)])  # fmt: skip
    layers = list(result.allocation.bits)
    assert set(result.allocation.bits[layers[0]]) == {8}
    assert set(result.allocation.bits[layers[-1]]) == {4}


def test_fine_tuning_lowers_the_loss_and_stays_on_the_grids(make_net, make_images, tmp_path):
    model, loader, example, _ = prepared(make_net, make_images)
    budgets = [Budget("bops", fraction=0.35)]
    bits = Bits(ends=FREE_ENDS, images=80)
    plain = quantize(model, loader, example, bits, budgets=budgets)
    finetune = FineTuning(epochs=8, lr=0.01)
    tuned = quantize(model, loader, example, replace(bits, finetune=finetune), budgets=budgets)

    def loss(result):
        with torch.no_grad():
            return sum(nn.functional.cross_entropy(result.model(x), labels) for x, labels in loader)

    assert tuned.allocation == plain.allocation
    assert not tuned.model.training
    assert loss(tuned) < loss(plain)
    assert export_quantized(tuned, tmp_path / "q.onnx", (loader[0][0],)).relative_difference <= 1e-3


def test_what_cannot_be_quantized_is_named(make_images):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.up = nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 2, 2)
            self.twice, self.idle, self.head = nn.Conv2d(4, 4, 1), nn.Linear(3, 3), nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.twice(self.twice(self.up(self.conv(x)))).mean((2, 3)))

    loader = make_images(40).loader(40)
    result = quantize(
        Odd().eval(),
        loader,
        (loader[0][0][:1],),
        Bits(ends=FREE_ENDS, images=40),
        budgets=[Budget("bops", fraction=0.9)],
    )
    assert set(result.kept_float) == {"up", "twice", "idle"}
    assert "not a kind" in result.kept_float["up"] and "more than once" in result.kept_float["twice"]
    assert set(result.allocation.bits) == {"conv", "head"}


def test_bad_input(make_net, make_images):
    model, loader, example, bits = prepared(make_net, make_images)
    with pytest.raises(DataError, match="calibration"):
        quantize(model, [], example, bits)
    with pytest.raises(InfeasibleBudget, match="smallest reachable"):
        quantize(model, loader, example, bits, budgets=[Budget("size_mb", limit=1e-4)])
    with pytest.raises(BudgetError, match="size_mb or bops"):
        quantize(model, loader, example, bits, budgets=[Budget("macs", fraction=0.5)])
    with pytest.raises(BudgetError, match="got none"):
        Bits(budgets=())
    with pytest.raises(UserError, match="widths"):
        Bits(widths=(3,))
    with pytest.raises(ModelError, match="layer that can be quantized"):
        quantize(nn.Sequential(nn.ReLU(), nn.Flatten()), loader, example, bits)
    next(iter(model.parameters())).data[0] = float("nan")
    with pytest.raises(ModelError, match="finite weights"):
        quantize(model, loader, example, bits)


def test_the_file_is_replaced_whole_or_not_at_all(make_net, make_images, tmp_path):
    model, loader, example, bits = prepared(make_net, make_images, "plain")
    result = quantize(model, loader, example, bits, budgets=[Budget("bops", fraction=0.9)])
    with pytest.raises(UserError, match="can be written"):
        (tmp_path / "file").write_text("")
        export_quantized(result, tmp_path / "file" / "q.onnx", example)
    layer = next(layer for _, layer in layers_on_grid(result.model))
    layer.input_on_grid.register_forward_hook(lambda m, a, out: out * 2)  # the file cannot know of this
    with pytest.raises(ModelError, match="nothing was written"):
        export_quantized(result, tmp_path / "q.onnx", (loader[0][0],))
    assert not (tmp_path / "q.onnx").exists()
    assert isinstance(result.allocation, BitAllocation)


def test_images_that_do_not_fit_leave_the_older_files(make_net, make_images, tmp_path):
    model, loader, example, bits = prepared(make_net, make_images, "plain")
    older = {"quantized.onnx": b"older", "bits.json": b"older"}
    for name, content in older.items():
        (tmp_path / name).write_bytes(content)
    images, labels = loader[0]
    bits = replace(bits, budgets=(Budget("bops", fraction=0.9),))
    with pytest.raises(UserError, match="inputs that fit the ONNX model"):
        quantize_run(model, loader, example, bits, folder=tmp_path, judge=[(images[:, :1], labels)])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == older


def test_what_others_raise_becomes_one_line(make_images):
    torch.manual_seed(0)
    x, labels = make_images(40).loader(40)[0]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    with pytest.raises(ModelError, match="data's batches"):
        quantize(net, [(x[:, :2], labels)], (x[:1],))
    with pytest.raises(ModelError, match="squares"):
        quantize(net, [(x * 1e25, labels)], (x[:1],))
    with pytest.raises(UserError, match="rho"):
        Bits(rho=float("inf"))
    l1_unstructured(net[0], "weight", 0.5)
    with pytest.raises(ModelError, match="can be copied"):
        quantize(net, [(x, labels)], (x[:1],))
    with torch.no_grad():
        net(x)
    quantizer = Quantizer(net, [(x, labels)], (x[:1],), Bits(ends=FREE_ENDS, images=40))
    assert "anew" in quantizer.kept_float["0"]
