"""Quantization end to end on tiny networks: against plain float arithmetic, brute-force DI and ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured

from diplugin import Budget
from diplugin.discriminant import absolute_ridge, channel_scores, label_targets
from diplugin.errors import BudgetError, DataError, InfeasibleBudget, ModelError, UserError
from diplugin.onnx_inference import run_onnx
from diplugin.quantize import (
    BitAllocation,
    Bits,
    DIBits,
    EndLayers,
    JoinedWeights,
    MagnitudeBits,
    OutputErrorBits,
    Quantizer,
    RandomBits,
    SplitLayers,
    UniformBits,
    export_model,
    export_quantized,
    quantize,
    quantize_run,
)
from diplugin.quantize.fake import layers_on_grid
from diplugin.quantize.strategies import di_damage, output_error
from diplugin.recovery import FineTuning

FREE_ENDS = EndLayers(None, None)
# Every export takes a second or two: kinds that the others cover are left to the test of folding.
EXPORTED = ["residual", "depthwise", "grouped", "tokens", "transposed"]


def prepared(make_net, make_images, kind="residual", bits=None):
    model, _ = make_net(kind)
    images = make_images(80)
    loader = images.loader(40)
    return model.eval(), loader, (loader[0][0][:1],), bits or Bits(ends=FREE_ENDS, images=80)


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


def chunk_di_scores(module, inputs, labels, error, rho):
    """2ρ‖EᵀZ‖²/‖Y‖² from whole maps in float64: the definition, without label images."""
    plain = nn.Conv2d(module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding)
    plain.double().weight.data = module.weight.detach().double()
    maps = plain(inputs.double()).detach()
    errors = nn.functional.conv2d(inputs.double(), error.double(), None, module.stride, module.padding)
    x = maps.flatten(1) - maps.flatten(1).mean(0)
    ridge = absolute_ridge(maps, rho)
    y = label_targets(labels)
    solution = torch.linalg.solve(x @ x.T + ridge * torch.eye(len(x), dtype=x.dtype), y)
    e = (errors - errors.mean(0)).flatten(2)
    return 2 * ridge * torch.einsum("ncp,nl->cpl", e, solution).square().sum((1, 2)) / y.square().sum()


def test_di_damage_is_the_di_score_of_the_error_map(make_images):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)).eval()
    images = make_images(60)
    loader = images.loader(60)
    x, labels = loader[0]
    quantizer = Quantizer(net, loader, (x[:1],), Bits(ends=FREE_ENDS, images=60))
    for width in (2, 4):
        error = quantizer.task.rounded("0", width).values.view(net[0].weight.shape) - net[0].weight.detach()
        expected = chunk_di_scores(net[0], x, labels, error, rho=10.0)
        np.testing.assert_allclose(di_damage(quantizer.task, "0", width), expected.numpy(), rtol=1e-3)
    own = channel_scores(net[0](x).detach(), labels)
    np.testing.assert_allclose(di_damage(quantizer.task, "0", 0), own.numpy(), rtol=1e-3)


def test_first_order_perturbation_predicts_the_change_of_di_by_rounding(make_images):
    """`perturbation_scores` against brute force: DI recomputed with one channel's rounded map, ridge fixed."""
    from diplugin.discriminant import discriminant_information, perturbation_scores

    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(320, 4)).eval()
    x, labels = make_images(60).loader(60)[0]
    quantizer = Quantizer(net, [(x, labels)], (x[:1],), Bits(ends=FREE_ENDS, images=60))
    maps = net[0](x).detach().double()
    ridge = absolute_ridge(maps)
    base = discriminant_information(maps, labels, ridge=ridge)
    for width, tolerance in ((8, 0.02), (4, 0.2)):
        error = quantizer.task.rounded("0", width).values.view(net[0].weight.shape) - net[0].weight.detach()
        errors = nn.functional.conv2d(x, error, None, padding=1).double()
        predicted = perturbation_scores(maps, errors, labels, ridge=ridge)
        for channel in range(5):
            changed = maps.clone()
            changed[:, channel] += errors[:, channel]
            brute = discriminant_information(changed, labels, ridge=ridge) - base
            scale = predicted.abs().max()
            assert abs(float(brute - predicted[channel])) <= tolerance * float(scale)


def test_output_error_is_the_variance_of_the_error_map(make_images):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)).eval()
    x, labels = make_images(60).loader(60)[0]
    quantizer = Quantizer(net, [(x, labels)], (x[:1],), Bits(ends=FREE_ENDS, images=60))
    error = quantizer.task.rounded("0", 4).values.view(net[0].weight.shape) - net[0].weight.detach()
    maps = nn.functional.conv2d(x, net[0].weight, net[0].bias)
    expected = nn.functional.conv2d(x, error).transpose(0, 1).flatten(1).var(1, correction=0)
    spread = maps.transpose(0, 1).flatten(1).var(1, correction=0).mean()
    np.testing.assert_allclose(output_error(quantizer.task, "0", 4), (expected / spread).detach().numpy(), rtol=1e-3)


def test_very_wide_layers_and_many_labels_are_bounded(make_images, monkeypatch):
    """Diagonal blocks in place of the whole second moment; the principal label images in place of all."""
    from diplugin.quantize import observe as module
    from diplugin.quantize.rounding import CompensatedRounding

    x, _ = make_images(60).loader(60)[0]
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 6)).eval()
    data, targets = [(x, torch.randn(60, 7))], []
    for block, kept in ((2304, 32), (50, 3)):
        monkeypatch.setattr(module, "BLOCK", block)
        monkeypatch.setattr(module, "LABEL_IMAGES", kept)
        quantizer = Quantizer(net, data, (x[:1],), Bits(ends=FREE_ENDS, images=60))
        statistics = quantizer.task.statistics["1"]
        targets.append((di_damage(quantizer.task, "1", 4), output_error(quantizer.task, "1", 4)))
        assert len(statistics.label_images[0]) == min(7, kept)
    assert statistics.gram.shape == (1, 4, 48, 48)
    grid, gram = quantizer.task.rounded("1", 4).grid, (statistics.gram / 60).float()
    alone = CompensatedRounding()(net[1].weight.detach()[:, 48:96], gram[:, 1], grid) * grid.scale[:, None]
    assert torch.equal(quantizer.task.rounded("1", 4).values[:, 48:96], alone)
    assert bool((targets[1][0] < 10 * targets[0][0] + 1e-9).all()) and bool((targets[1][1] > 0).all())


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


class Windows(nn.Module):
    """The middle layer sees four windows an image, as a batch; called by keyword."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.embed, self.inner, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        tokens = self.embed(input=x).flatten(2)
        if self.first:  # tokens first
            return self.head(self.inner(input=tokens.permute(2, 0, 1)).mean(0))
        windows = self.inner(input=tokens.transpose(1, 2).reshape(-1, 4, 8))
        return self.head(windows.reshape(-1, 16, 8).mean(1))


@pytest.mark.parametrize("first", [False, True])
def test_a_layer_that_sees_no_images_is_not_silenced(make_images, first):
    torch.manual_seed(0)
    model, loader = Windows(first).eval(), make_images(80).loader(40)
    x = torch.cat([images for images, _ in loader])
    result = quantize(model, loader, (x[:1],), Bits(ends=FREE_ENDS, images=80), budgets=[Budget("bops", fraction=0.5)])
    expected = model(x)
    assert (result.model(x) - expected).norm() < 0.3 * (expected - expected.mean(0)).norm()


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
