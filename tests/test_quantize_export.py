"""The file of integers: ONNX Runtime computes from it what the fake-quantized model computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from odd_layers import padding_net
from small_quantized import FREE_ENDS, prepared
from torch import nn

from diplugin import Budget
from diplugin.errors import ModelError
from diplugin.onnx_inference import run_onnx
from diplugin.quantize import (
    Bits,
    DIBits,
    JoinedWeights,
    Quantizer,
    SplitLayers,
    export_model,
    export_quantized,
)
from diplugin.quantize.fake import layers_on_grid


def test_layers_that_pad_their_inputs_themselves(make_images, tmp_path):
    """Their kernels may be larger than the maps that they read: the last one here reads 2x2 through 5x5."""
    loader = make_images(80).loader(40)
    model, x = padding_net(), loader[1][0]
    quantizer = Quantizer(model, loader, (x[:1],), Bits(ends=FREE_ENDS, images=80))
    result = quantizer.spend(DIBits(), [Budget("size_mb", fraction=0.8)])
    written = export_quantized(result, tmp_path / "q.onnx", (x[:8],))
    with torch.no_grad():
        expected, unquantized = result.model(x), model(x)
    got = torch.from_numpy(run_onnx(written.path, (x,))[0])
    assert (got - expected).norm() <= 1e-3 * expected.norm()
    assert (quantizer.at(quantizer.uniform(8)).model(x) - unquantized).norm() <= 0.05 * unquantized.norm()


# Every export takes a second or two: kinds that the others cover are left to the test of folding.
EXPORTED = ["residual", "depthwise", "grouped", "tokens", "transposed"]


@pytest.mark.parametrize("kind", EXPORTED)
def test_onnx_runtime_computes_what_the_fake_quantized_model_computes(make_net, make_images, kind, tmp_path):
    model, loader, example, bits = prepared(make_net, make_images, kind)
    try:
        quantizer = Quantizer(model, loader, example, bits)
    except ModelError as error:
        pytest.skip(str(error))
    generator = np.random.default_rng(0)
    uniform = quantizer.uniform(8)
    mixed = {name: generator.choice([0, 2, 4, 8], len(row)) for name, row in uniform.items()}
    for row in mixed.values():
        row[0] = 4
    result = quantizer.at(mixed)
    written = export_quantized(result, tmp_path / "q.onnx", (loader[0][0][:8],))
    x = loader[1][0]
    with torch.no_grad():
        expected = result.model(x)
    got = torch.from_numpy(run_onnx(written.path, (x,))[0])
    assert (got - expected).norm() <= 1e-3 * expected.norm()
    # A tiny file is nearly all overhead: the prediction is held to a few bytes a layer instead of two per cent.
    size = written.path.stat().st_size
    assert abs(result.size_mb * 1e6 - size) <= max(0.02 * size, 40 * len(mixed))


def test_layers_of_one_width_each_and_split_layers(make_net, make_images, tmp_path):
    model, loader, example, _ = prepared(make_net, make_images, "plain")
    quantizer = Quantizer(model, loader, example, Bits(ends=FREE_ENDS, images=80))
    for layout, widths in ((JoinedWeights(), (2,)), (JoinedWeights(), (4,)), (SplitLayers(), (2, 8, 4))):
        result = quantizer.at({n: np.resize(widths, len(row)) for n, row in quantizer.uniform(8).items()})
        written = export_model(result.model, tmp_path / "q.onnx", (loader[0][0][:8],), layout=layout)
        assert written.relative_difference <= 1e-3
        assert written.opset == (25 if 2 in widths else 21)


def test_stored_bits_take_their_true_size(make_images, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 64, 3)).eval()
    loader = make_images(20).loader(20)
    quantizer = Quantizer(net, loader, (loader[0][0][:1],), Bits(ends=FREE_ENDS, images=20))
    sizes = {}
    for width in (2, 4, 8):
        result = quantizer.at(quantizer.uniform(width))
        sizes[width] = export_quantized(result, tmp_path / "q.onnx", (loader[0][0],)).size_mb
        assert result.size_mb == pytest.approx(sizes[width], rel=0.02)
    weights = sum(m.weight.numel() for m in net if isinstance(m, nn.Conv2d))
    assert (sizes[8] - sizes[4]) * 1e6 == pytest.approx(weights / 2, rel=0.01)
    assert (sizes[4] - sizes[2]) * 1e6 == pytest.approx(weights / 4, rel=0.01)


def test_biases_fit_the_integers_of_int8_kernels(make_images, tmp_path):
    """Channels of no weight, or next to none, whose bias is all that they say, as trained BatchNorms leave them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    for channel, size in enumerate((0.0, 1e-20, 1e-12, 1e-6)):
        model[0].weight.data[channel] *= size
        model[0].bias.data[channel] = 1.0
    loader = make_images(80).loader(80)
    quantizer = Quantizer(model.eval(), loader, (loader[0][0][:1],), Bits(ends=FREE_ENDS, images=80))
    result = quantizer.at(quantizer.uniform(8))
    for _, layer in layers_on_grid(result.model):
        step = layer.input_on_grid.grid.scale * layer.parametrizations.weight[0].scale.abs()
        assert (layer.bias.double() / step.double()).abs().max() < 2**31
    assert (result.model(loader[0][0]) - model(loader[0][0])).norm() < 0.02 * model(loader[0][0]).norm()
    assert export_quantized(result, tmp_path / "q.onnx", (loader[0][0],)).relative_difference <= 1e-3


def test_hooks_of_others_are_exported(make_images, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    model[3].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    loader = make_images(80).loader(80)
    quantizer = Quantizer(model, loader, (loader[0][0][:1],), Bits(ends=FREE_ENDS, images=80))
    result = quantizer.at(quantizer.uniform(4))
    assert export_quantized(result, tmp_path / "q.onnx", (loader[0][0],)).relative_difference <= 1e-3


class Odd(nn.Module):
    """Layers that the file cannot hold as they are, beside two that it can."""

    class Standardised(nn.Conv2d):
        def forward(self, x):
            return nn.functional.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    class Normed(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    def __init__(self):
        super().__init__()
        self.standardised, self.merged, self.norm = self.Standardised(3, 8, 3), nn.Conv2d(8, 8, 3), self.Normed(8)
        self.unused, self.left, self.right = nn.Conv2d(8, 2, 1), nn.Linear(8, 8), nn.Linear(8, 8)
        self.right.load_state_dict(self.left.state_dict())
        self.tied, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.tied.weight = self.left.weight

    def forward(self, x):
        x = self.norm(self.merged(self.standardised(x)))
        self.unused(x)
        x = x.mean((2, 3))
        return self.head((self.left(x) + self.right(x)).relu() + self.tied(x.flip(1) ** 2))


def test_what_the_file_cannot_hold_stays_in_float(make_images, tmp_path):
    torch.manual_seed(0)
    model, loader = Odd().eval(), make_images(80).loader(80)
    x = loader[0][0]
    quantizer = Quantizer(model, loader, (x[:1],), Bits(ends=FREE_ENDS, images=80))
    for name in ("standardised", "merged", "unused"):
        assert name in quantizer.kept_float
    assert {"left", "tied", "head"} <= set(quantizer.uniform(8))
    result = quantizer.at(quantizer.uniform(8))
    assert (result.model(x) - model(x)).norm() < 0.05 * model(x).norm()
    assert export_quantized(result, tmp_path / "q.onnx", (x,)).relative_difference <= 1e-3


class TwoHeads(nn.Module):
    """One output is a thousand times the other; the batch is the one that it was made for, if `tied`."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.conv, self.small, self.large, self.tied = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(8, 4), tied

    def forward(self, x):
        x = self.conv(x).relu().mean((2, 3))
        return self.small(x), 1e3 * (self.large(x) + (torch.zeros(int(x.shape[0]), 4) if self.tied else 0))


def test_every_output_is_checked(make_images, tmp_path):
    torch.manual_seed(0)
    loader = make_images(80).loader(80)
    x = loader[0][0]
    quantizer = Quantizer(TwoHeads(False).eval(), loader, (x[:1],), Bits(ends=FREE_ENDS, images=80))
    result = quantizer.at(quantizer.uniform(8))
    assert export_quantized(result, tmp_path / "q.onnx", (x[:1],), (x,)).relative_difference <= 1e-3
    result.model.small.input_on_grid.register_forward_hook(lambda m, a, out: out * 1.5)  # the file cannot know of this
    with pytest.raises(ModelError, match="nothing was written"):
        export_quantized(result, tmp_path / "q.onnx", (x,))


def test_a_model_tied_to_its_batch_is_written_for_the_example_s(make_images, tmp_path):
    torch.manual_seed(0)
    loader = make_images(80).loader(80)
    x = loader[0][0]
    quantizer = Quantizer(TwoHeads(True).eval(), loader, (x[:1],), Bits(ends=FREE_ENDS, images=80))
    written = export_quantized(quantizer.at(quantizer.uniform(8)), tmp_path / "q.onnx", (x[:1],), (x[:8],))
    assert run_onnx(written.path, (x[:1],))[0].shape == (1, 4)
    with pytest.raises(ModelError, match="inputs that fit"):
        run_onnx(written.path, (x[:3],))
