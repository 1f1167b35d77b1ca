"""DIPruner with the real NNI: every way in, exact sparsity, and masked networks equal to the ones that are cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

nni = pytest.importorskip("nni")

from diplugin_nni import DIPruner, speedup, torch_evaluator  # noqa: E402
from nni.compression import TorchEvaluator  # noqa: E402
from nni.compression.pruning import AGPPruner, L1NormPruner, LinearPruner  # noqa: E402

from diplugin.groups import trace_groups  # noqa: E402
from diplugin.ranking import ByLoss  # noqa: E402
from diplugin.scoring import score_groups  # noqa: E402

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]
MakeImages = Callable[..., Any]
HEADS = ["head", "8", "11", "9"]
CUT = ["plain", "residual", "vgg", "depthwise", "dense", "grouped"]


def config(model: nn.Module, ratio: float = 0.5, **more: Any) -> list[dict[str, Any]]:
    """Every convolution and linear layer but the classifier."""
    head = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    return [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": [head], "sparse_ratio": ratio, **more}]


def trained_by(model: nn.Module, loader: list[Any], make: Any = TorchEvaluator, **more: Any) -> TorchEvaluator:
    """An evaluator as NNI's users write it."""

    def training_step(batch: Any, model: nn.Module, *_: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def training_func(
        model: nn.Module, optimizer: Any, step: Any, _lr: Any = None, max_steps: Any = None, max_epochs: Any = None
    ) -> None:
        model.train()
        taken = 0
        for _ in range(max_epochs or 1000):
            for batch in loader:
                optimizer.zero_grad()
                step(batch, model).backward()
                optimizer.step()
                taken += 1
                if taken == max_steps:
                    return

    return make(training_func, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01), training_step, **more)


def sparsity(masks: Any) -> dict[str, float]:
    """Masked share of every weight mask."""
    return {name: 1 - float(m["weight"].float().mean()) for name, m in masks.items() if m.get("weight") is not None}


def assert_exactly(model: nn.Module, masks: Any, ratio: float) -> None:
    """Every masked convolution and linear layer has lost just the asked share of its rows, rounded down."""
    layers = {name: m for name, m in model.named_modules() if name in masks and isinstance(m, (nn.Conv2d, nn.Linear))}
    assert layers
    for name in layers:
        rows = masks[name]["weight"].flatten(1)
        assert int((~rows.bool().any(1)).sum()) == int(len(rows) * ratio), name
        assert set(rows.mean(1).tolist()) <= {0.0, 1.0}


def run(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(x)


def assert_cut_equals_masked(model: nn.Module, masks: Any, x: Tensor) -> nn.Module:
    want = run(model, x)
    before = sum(p.numel() for p in copy.deepcopy(model).parameters())
    small = speedup(model, masks, x[:1])
    assert torch.allclose(run(small, x), want, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < before
    return small


@pytest.mark.parametrize("kind", CUT)
def test_one_shot_from_calibration_data(make_net: MakeNet, make_images: MakeImages, kind: str) -> None:
    model, _ = make_net(kind)
    data = make_images(100)
    pruner = DIPruner(model, config(model), calibration_data=data.loader(50))
    same, masks = pruner.compress()
    assert same is model
    assert_exactly(model, masks, 0.5)
    assert_cut_equals_masked(model, masks, data.images[:5])


@pytest.mark.parametrize("scheduler", [None, AGPPruner, LinearPruner])
@pytest.mark.parametrize("kind", ["residual", "vgg", "depthwise", "dense"])
def test_training_reaches_the_asked_sparsity(
    make_net: MakeNet, make_images: MakeImages, kind: str, scheduler: Any
) -> None:
    model, _ = make_net(kind)
    data = make_images(100)
    pruner: Any = DIPruner(model, config(model, 0.5), trained_by(model, data.loader(50)), training_steps=2)
    if scheduler is not None:
        pruner = scheduler(pruner, interval_steps=5, total_times=3)
    _, masks = pruner.compress(16 if scheduler else None, None)
    assert_exactly(model, masks, 0.5)
    assert_cut_equals_masked(model, masks, data.images[:5])


def test_scheduled_sparsity_rises_step_by_step(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("vgg")
    pruner = DIPruner(model, config(model, 0.5), trained_by(model, make_images(60).loader(30)), training_steps=1)
    seen: list[float] = []
    update = pruner.update_masks
    pruner.update_masks = lambda masks: (seen.append(sparsity(masks)["0"]), update(masks))[1]  # pyright: ignore
    LinearPruner(pruner, interval_steps=2, total_times=4).compress(8, None)
    assert seen == [0.125, 0.25, 0.375, 0.5]


def test_calibration_data_serves_a_scheduler_as_well(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("plain")
    loader = make_images(100).loader(50)
    pruner = DIPruner(model, config(model), calibration_data=iter(loader))
    _, masks = AGPPruner(pruner, 2, 2, trained_by(model, loader)).compress(4, None)
    assert set(sparsity(masks).values()) == {0.5}


def test_by_loss_the_channels_of_largest_loss_stay(make_net: MakeNet, make_images: MakeImages) -> None:
    model, inputs = make_net("residual")
    loader = make_images(100).loader(50)
    scores = score_groups(model, loader, trace_groups(model, inputs)).scores
    _, masks = DIPruner(model, config(model, 0.25), calibration_data=loader, ranking=ByLoss()).compress()
    for layer in ("a1", "c1"):
        kept = masks[layer]["weight"].flatten(1).any(1)
        assert scores[layer][kept].min() >= scores[layer][~kept].max()


def test_by_norm_the_channels_with_the_largest_filters_stay(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("residual")
    own = {name: sum_of_squares(getattr(model, name)) for name in ("a1", "c1")}
    _, masks = DIPruner(model, config(model, 0.25), calibration_data=make_images(100).loader(50),
                        ranking=lambda losses, energies, norms: norms).compress()  # fmt: skip
    for layer, norms in own.items():
        kept = masks[layer]["weight"].flatten(1).any(1)
        assert norms[kept].min() >= norms[~kept].max()


def sum_of_squares(layer: Any) -> torch.Tensor:
    return layer.weight.detach().square().flatten(1).sum(1)


def test_tied_layers_agree_without_being_told(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("residual")
    _, masks = DIPruner(model, config(model), calibration_data=make_images(100).loader(50)).compress()
    rows = masks["c2"]["weight"].flatten(1).any(1)
    assert torch.equal(masks["project"]["weight"].flatten(1).any(1), rows)
    assert torch.equal(masks["d2"]["weight"].bool(), rows)


def test_chaining_keeps_the_masks_of_the_first_pruner(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("vgg")
    data = make_images(100)
    first = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.25}])
    first.compress()
    second = DIPruner.from_compressor(
        first, [{"op_names": ["3", "6"], "sparse_ratio": 0.5}], calibration_data=data.loader(50)
    )
    _, masks = second.compress()
    assert sparsity(masks) == {"0": 0.25, "3": 0.5, "6": 0.5}
    assert_cut_equals_masked(model, masks, data.images[:5])


def test_chaining_behind_a_pruner_with_an_evaluator(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("vgg")
    loader = make_images(100).loader(50)
    first = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.25}], trained_by(model, loader))
    first.compress()
    second = DIPruner.from_compressor(first, [{"op_names": ["3"], "sparse_ratio": 0.5}], training_steps=2)
    _, masks = second.compress()
    assert sparsity(masks) == {"0": 0.25, "3": 0.5}


def test_a_refused_chain_leaves_the_first_pruner_in_force(make_net: MakeNet, make_images: MakeImages) -> None:
    from diplugin.errors import UserError

    model, _ = make_net("vgg")
    first = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.25}])
    with pytest.raises(UserError, match="it has no 'nope'"):
        DIPruner.from_compressor(first, [{"op_names": ["nope"], "sparse_ratio": 0.5}],
                                 calibration_data=make_images(50).loader(50))  # fmt: skip
    assert first._is_wrapped
    assert hasattr(model[0], "_nni_wrapper")


def test_a_global_group_meets_its_share_and_its_bounds(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("vgg")
    more = {"global_group_id": 0, "max_sparse_ratio": 0.75}
    _, masks = DIPruner(model, config(model, 0.5, **more), calibration_data=make_images(100).loader(50)).compress()
    sizes = {name: masks[name]["weight"].numel() for name in sparsity(masks)}
    removed = sum(share * sizes[name] for name, share in sparsity(masks).items())
    assert max(sparsity(masks).values()) <= 0.75
    grain = max(masks[name]["weight"][0].numel() for name in sizes)
    assert 0 <= 0.5 * sum(sizes.values()) - removed < grain


def test_dependency_groups_and_alignment_follow_nnis_words(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("residual")
    entries: list[dict[str, Any]] = [
        {"op_names": ["c2", "project"], "sparse_ratio": 0.3, "dependency_group_id": "sum"},
        {"op_names": ["stem"], "sparse_ratio": 0.25},
        {"op_names": ["bn0"], "target_names": ["weight"], "target_settings": {
            "weight": {"align": {"module_name": "stem", "target_name": "weight", "dims": [0]}}}},
    ]  # fmt: skip
    _, masks = DIPruner(model, entries, calibration_data=make_images(100).loader(50)).compress()
    assert torch.equal(masks["c2"]["weight"].flatten(1).any(1), masks["project"]["weight"].flatten(1).any(1))
    assert torch.equal(masks["bn0"]["weight"].bool(), masks["stem"]["weight"].flatten(1).any(1))
    assert sparsity(masks)["c2"] == pytest.approx(0.3)


def test_bounds_and_thresholds(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("vgg")
    entries: list[dict[str, Any]] = [
        {"op_names": ["0"], "sparse_ratio": 0.9, "max_sparse_ratio": 0.5},
        {"op_names": ["3"], "sparse_ratio": 1.0},
        {"op_names": ["6"], "target_settings": {"weight": {"sparse_threshold": 1e9, "max_sparse_ratio": 0.5}}},
    ]
    _, masks = DIPruner(model, entries, calibration_data=make_images(100).loader(50)).compress()
    assert sparsity(masks) == {"0": 0.5, "3": pytest.approx(5 / 6), "6": 0.5}


@pytest.mark.parametrize(
    ("granularity", "rows", "columns", "share"),
    [
        ("in_channel", None, 4, 0.5), ("out_channel", 3, None, 0.5), ([2, -1, -1, -1], 4, None, 2 / 3),
        ([1, 1, -1, -1], None, None, 0.5), ([1, 1, 1, 1], None, None, 0.5), ([-1, 2, -1, -1], None, 4, 0.5),
    ],
)  # fmt: skip
def test_every_granularity_masks_its_own_blocks(
    make_net: MakeNet, make_images: MakeImages, granularity: Any, rows: int | None, columns: int | None, share: float
) -> None:
    model, _ = make_net("vgg")  # layer 3 holds 6 filters of 8 inputs
    settings = {"weight": {"granularity": granularity}}
    ratio = 0.67 if share > 0.6 else 0.5
    entries = [{"op_names": ["3"], "sparse_ratio": ratio, "target_names": ["weight"], "target_settings": settings}]
    _, masks = DIPruner(model, entries, calibration_data=make_images(100).loader(50)).compress()
    mask = masks["3"]["weight"]
    assert 1 - float(mask.mean()) == pytest.approx(share)
    if rows is not None:
        assert int((~mask.flatten(1).bool().any(1)).sum()) == rows
    if columns is not None:
        assert int((~mask.transpose(0, 1).flatten(1).bool().any(1)).sum()) == columns


def test_activations_can_be_targets(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("vgg")
    data = make_images(100)
    settings = {"_output_": {"sparse_ratio": 0.5, "granularity": "per_channel"}}
    entries = [{"op_names": ["0"], "target_names": ["_output_"], "target_settings": settings}]
    _, masks = DIPruner(model, entries, calibration_data=data.loader(50)).compress()
    assert masks["0"]["_output_0"].shape == (1, 8, 1, 1)
    assert float(masks["0"]["_output_0"].mean()) == 0.5
    small = assert_cut_equals_masked(model, masks, data.images[:5])
    assert small.get_submodule("0").out_channels == 4


def test_transposed_convolutions_lose_output_channels(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("transposed")
    data = make_images(100)
    entries = [{"op_types": ["ConvTranspose2d"], "sparse_ratio": 0.34}]
    _, masks = DIPruner(model, entries, calibration_data=data.loader(50)).compress()
    small = assert_cut_equals_masked(model, masks, data.images[:5])
    assert [small.get_submodule(n).out_channels for n in ("2", "5")] == [4, 6]


def test_batchnorms_without_weights_follow_through_their_output(make_images: MakeImages) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Conv2d(8, 4, 3),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()  # fmt: skip
    model[1].running_mean.fill_(-1.0)
    data = make_images(100)
    entries = [{"op_names": ["0"], "sparse_ratio": 0.5}]
    _, masks = DIPruner(model, entries, calibration_data=data.loader(50)).compress()
    assert_cut_equals_masked(model, masks, data.images[:5])


def test_followers_can_be_left_to_the_user(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("plain")
    loader = make_images(50).loader(50)
    pruner = DIPruner(model, config(model), calibration_data=loader, align_followers=False)
    assert set(pruner.compress()[1]) == {"0", "3", "7"}


def test_other_pruners_masks_can_be_cut_too(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("vgg")
    _, masks = L1NormPruner(model, config(model)).compress()
    assert_cut_equals_masked(model, masks, make_images(5).images)


def test_batches_of_any_form(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("vgg")
    data = make_images(100)
    want = DIPruner(copy.deepcopy(model), config(model), calibration_data=data.loader(50)).compress()[1]
    batches = [{"input": x, "target": SimpleNamespace(y=y).y} for x, y in data.loader(50)]
    got = DIPruner(model, config(model), calibration_data=batches, get_labels=lambda b: b["target"],
                   forward=lambda m, b: m(b["input"])).compress()[1]  # fmt: skip
    assert all(torch.equal(got[m][t], want[m][t]) for m in want for t in want[m])


def test_memory_is_bounded_by_the_sample_cap(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("vgg")
    pruner = DIPruner(model, config(model), trained_by(model, make_images(100).loader(10)), training_steps=9,
                      max_samples=25)  # fmt: skip
    held: list[int] = []
    score = pruner._collect_data
    pruner._collect_data = lambda: (held.append(sum(len(b[0]) for b in pruner._sampled)), score())[1]  # pyright: ignore
    pruner.compress()
    assert held == [30]
    assert pruner._sampled == []


def test_looking_for_groups_leaves_model_and_randomness_alone(
    make_net: MakeNet, make_images: MakeImages, state_of: Any, assert_same_state: Any
) -> None:
    model, _ = make_net("residual")
    model.train()
    before, random = state_of(model), torch.random.get_rng_state()
    pruner = DIPruner(model, config(model), trained_by(model, make_images(60).loader(30)), training_steps=1)
    pruner.unwrap_model()
    assert_same_state(model, before)
    assert torch.equal(random, torch.random.get_rng_state())


@pytest.mark.parametrize("scheduler", [None, AGPPruner])
def test_hooks_and_state_are_restored_when_training_raises(
    make_net: MakeNet, make_images: MakeImages, state_of: Any, scheduler: Any
) -> None:
    model, _ = make_net("residual")
    loader = make_images(60).loader(30)
    broken = [*loader, (loader[0][0], loader[0][1][:-1])]
    evaluator = trained_by(model, broken)
    pruner: Any = DIPruner(model, config(model), evaluator, training_steps=5)
    hooks = state_of(model)["hooks"]
    modes = [m.training for m in model.modules()]
    wrapped = pruner if scheduler is None else scheduler(pruner, 5, 1)
    with pytest.raises(ValueError, match="batch_size"):
        wrapped.compress(5, None)
    assert state_of(model)["hooks"] == hooks
    if scheduler is None:
        assert evaluator.model is None
        assert evaluator._training_step is evaluator._ori_training_step
        assert [m.training for m in model.modules()] == modes
    broken.pop()
    _, masks = wrapped.compress(5, None)
    assert set(sparsity(masks).values()) == {0.5}


def test_the_helper_makes_nnis_own_evaluator(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("vgg")
    evaluator = trained_by(model, make_images(60).loader(30), make=torch_evaluator)
    _, masks = DIPruner(model, config(model), evaluator, 2).compress()
    assert set(sparsity(masks).values()) == {0.5}
