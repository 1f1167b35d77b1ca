"""BatchNorm recalibration: the statistics are those of the data, and everything else stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diplugin.errors import DataError
from diplugin.recovery import recalibrate_batchnorm

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("batch", [1, 16, 100])
def test_statistics_are_those_of_the_data(make_net: MakeNet, make_images: Any, batch: int) -> None:
    model, _ = make_net("plain")
    data = make_images(100)
    recalibrate_batchnorm(model, data.loader(batch))
    with torch.no_grad():
        first = model.get_submodule("0")(data.images)
        second = model[:4](data.images)  # type: ignore[index]
    mean, variance = first.mean((0, 2, 3)), first.transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(norms(model)[0].running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norms(model)[0].running_var, variance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norms(model)[1].running_mean, second.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_the_average_over_chunks(make_net: MakeNet, make_images: Any) -> None:
    model, _ = make_net("plain")
    data = make_images(100)
    recalibrate_batchnorm(model, data.loader(30), chunk_size=50)
    means = [model.get_submodule("0")(x).mean((0, 2, 3)) for x in data.images.split(50)]
    torch.testing.assert_close(norms(model)[0].running_mean, torch.stack(means).mean(0).detach(), rtol=1e-4, atol=1e-5)


def test_nothing_else_changes(make_net: MakeNet, make_images: Any, state_of: Any, assert_same_state: Any) -> None:
    model, _ = make_net("residual")
    model.train()
    norms(model)[0].eval()
    norms(model)[1].momentum = 0.3
    before = state_of(model)
    assert recalibrate_batchnorm(model, make_images(60).loader(20)) is model
    after = state_of(model)
    changed = {k for k, v in after["weights"].items() if not torch.equal(v, before["weights"][k])}
    assert changed == {k for k in before["weights"] if "running" in k or "num_batches" in k}
    assert [n.momentum for n in norms(model)][:3] == [0.1, 0.3, 0.1]
    model.load_state_dict(before["weights"])
    assert_same_state(model, before)


def test_dropout_stays_off_and_labels_are_not_needed(make_images: Any) -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3)).train()
    images = make_images(40).images
    recalibrate_batchnorm(model, [(images, "no labels at all")])
    torch.testing.assert_close(model[1].running_mean, images.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


class Dropping(nn.BatchNorm2d):
    """With a dropout of its own behind it, as timm's norms with activations may have."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Dropout(0.9)

    def forward(self, input: Tensor) -> Tensor:
        return self.drop(super().forward(input))


def test_so_does_a_norm_s_own_dropout(make_images: Any) -> None:
    images = make_images(40).images
    dropping, plain = (nn.Sequential(norm(3), nn.BatchNorm2d(3)) for norm in (Dropping, nn.BatchNorm2d))
    for model in (dropping, plain):
        recalibrate_batchnorm(model, [(images,)])
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(dropping.state_dict()[name], value)


def test_only_so_many_images_are_read(make_net: MakeNet, make_images: Any) -> None:
    seen: list[int] = []
    model, _ = make_net("plain")
    model.register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    recalibrate_batchnorm(model, make_images(300).loader(20), images=60, chunk_size=20)
    assert sum(seen) == 60


def test_without_batchnorm_the_data_is_not_touched(make_net: MakeNet) -> None:
    def explode() -> Iterator[Any]:
        raise AssertionError("read")
        yield

    model, _ = make_net("vgg")
    assert recalibrate_batchnorm(model, explode()) is model


def test_a_norm_that_never_runs_keeps_its_statistics(make_images: Any) -> None:
    model = nn.ModuleDict({"used": nn.BatchNorm2d(3), "unused": nn.BatchNorm2d(3)})
    nn.init.constant_(model["unused"].running_mean, 5.0)
    recalibrate_batchnorm(model, make_images(40).loader(20), forward=lambda m, b: m["used"](b[0]))
    assert model["unused"].running_mean.tolist() == [5.0] * 3
    assert model["used"].running_mean.abs().max() < 2


@pytest.mark.parametrize("loader", [[], [(torch.randn(1, 3, 8, 8), torch.tensor([0]))]])
def test_too_little_data_leaves_the_statistics(
    make_net: MakeNet, loader: Any, state_of: Any, assert_same_state: Any
) -> None:
    model, _ = make_net("plain")
    before = state_of(model)
    with pytest.raises(DataError, match="two images or more"):
        recalibrate_batchnorm(model, loader)
    assert_same_state(model, before)


def test_a_failure_on_the_way_leaves_the_statistics(
    make_net: MakeNet, make_images: Any, state_of: Any, assert_same_state: Any
) -> None:
    model, _ = make_net("plain")
    before = state_of(model)

    def fails() -> Iterator[Any]:
        yield from make_images(60).loader(20)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        recalibrate_batchnorm(model, fails(), chunk_size=20)
    assert_same_state(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_leave_the_statistics(
    make_net: MakeNet, make_images: Any, value: float, state_of: Any, assert_same_state: Any
) -> None:
    model, _ = make_net("plain")
    before, data = state_of(model), make_images(60)
    data.images[33, 0, 2, 2] = value
    with pytest.raises(DataError, match="finite images and weights to recalibrate BatchNorm, got NaN or infinity"):
        recalibrate_batchnorm(model, data.loader(20), chunk_size=20)
    assert_same_state(model, before)
