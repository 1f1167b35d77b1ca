"""DIPruner behind an evaluator, a scheduler or another pruner of the real NNI, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nni")

from diplugin_nni import DIPruner, torch_evaluator
from nni.compression.pruning import AGPPruner, L1NormPruner, LinearPruner
from nni_masks import assert_cut_equals_masked, assert_exactly, config, sparsity
from nni_training import trained_by

from diplugin.errors import UserError

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]
MakeImages = Callable[..., Any]


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


def test_followers_of_the_first_pruner_follow_the_second(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("residual")
    data = make_images(100)
    loader = data.loader(50)
    first = DIPruner(model, [{"op_names": ["c2"], "sparse_ratio": 0.5}], calibration_data=loader)
    rows = first.compress()[1]["c2"]["weight"].flatten(1).any(1)
    # The other branch of the same sum is told to lose the same channels, which then are gone.
    entry = {"op_names": ["project"], "sparse_ratio": 0.5}
    second = DIPruner.from_compressor(first, [entry], calibration_data=loader, ranking=lambda *_: rows.double())
    _, masks = second.compress()
    assert torch.equal(masks["project"]["weight"].flatten(1).any(1), rows)
    assert torch.equal(masks["d2"]["bias"].bool(), rows)
    assert_cut_equals_masked(model, masks, data.images[:5])


def test_what_the_first_pruner_was_told_of_a_follower_stays(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("plain")
    loader = make_images(100).loader(50)
    first = L1NormPruner(model, [{"op_names": ["1"], "sparse_ratio": 0.25}])
    mask = first.compress()[1]["1"]["weight"]
    second = DIPruner.from_compressor(first, [{"op_names": ["0"], "sparse_ratio": 0.5}], calibration_data=loader)
    assert torch.equal(second.compress()[1]["1"]["weight"], mask)


@pytest.mark.parametrize("scheduler", [AGPPruner, LinearPruner])
def test_training_that_ends_before_the_schedule_does_is_said(
    make_net: MakeNet, make_images: MakeImages, scheduler: Any
) -> None:
    model, _ = make_net("vgg")
    pruner = DIPruner(model, config(model), trained_by(model, make_images(60).loader(30)), training_steps=1)
    with pytest.warns(UserWarning, match="masks were made 2 of 3 times: .* at least 6 optimizer steps, it took 4"):
        scheduler(pruner, interval_steps=2, total_times=3).compress(None, 2)


def test_a_refused_chain_leaves_the_first_pruner_in_force(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("vgg")
    first = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.25}])
    with pytest.raises(UserError, match="it has no 'nope'"):
        DIPruner.from_compressor(first, [{"op_names": ["nope"], "sparse_ratio": 0.5}],
                                 calibration_data=make_images(50).loader(50))  # fmt: skip
    assert first._is_wrapped
    assert hasattr(model[0], "_nni_wrapper")


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
