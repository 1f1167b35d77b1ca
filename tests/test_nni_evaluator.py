"""Evaluators: what is wrong with them in one line, and one look at their data that leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nni")

from diplugin_nni import DIPruner, torch_evaluator
from diplugin_nni_evaluator import first_batch
from nni_training import GOOD, assert_one_line, looping, step, traced

from diplugin.errors import UserError

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]
X = torch.zeros(40, 3, 8, 8)


def test_an_untraced_optimizer(make_net: MakeNet) -> None:
    model, _ = make_net("vgg")
    with pytest.raises(UserError, match=r"optimizer made as nni.trace\(SGD\)\(...\), got a plain SGD") as caught:
        torch_evaluator(looping([]), torch.optim.SGD(model.parameters(), lr=0.1), step)
    assert_one_line(caught.value)


def test_an_untraced_scheduler(make_net: MakeNet) -> None:
    model, _ = make_net("vgg")
    optimizer = traced(model)
    with pytest.raises(UserError, match=r"lr_scheduler made as nni.trace\(StepLR\)"):
        torch_evaluator(looping([]), optimizer, step, lr_schedulers=torch.optim.lr_scheduler.StepLR(optimizer, 1))


@pytest.mark.parametrize(("batches", "took"), [(0, 0), (2, 2)])
def test_a_training_function_that_stops_early(
    make_net: MakeNet, make_images: Callable[..., Any], batches: int, took: int
) -> None:
    model, _ = make_net("vgg")
    loader = make_images(40).loader(20)[:batches]
    evaluator = torch_evaluator(looping(loader, epochs=1), traced(model), step, dummy_input=X[:1])
    with pytest.raises(UserError, match=f"at least 5 optimizer steps .* it took {took}") as caught:
        DIPruner(model, GOOD, evaluator, 5).compress()
    assert_one_line(caught.value)


def test_the_first_batch_is_seen_and_nothing_is_changed(
    make_net: MakeNet, make_images: Callable[..., Any], state_of: Any, assert_same_state: Any
) -> None:
    model, _ = make_net("residual")
    model.train()
    loader = make_images(40).loader(20)
    evaluator = torch_evaluator(looping(loader), traced(model), step)
    evaluator._init_optimizer_helpers(model)
    before, random = state_of(model), torch.random.get_rng_state()
    images, labels = first_batch(model, evaluator)
    assert torch.equal(images, loader[0][0])
    assert torch.equal(labels, loader[0][1])
    assert_same_state(model, before)
    assert torch.equal(random, torch.random.get_rng_state())
    assert evaluator.model is None


def test_a_loop_that_fails_shows_no_batch(make_net: MakeNet) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no data here")

    model, _ = make_net("vgg")
    evaluator = torch_evaluator(broken, traced(model), step)
    evaluator._init_optimizer_helpers(model)
    assert first_batch(model, evaluator) is None
    with pytest.warns(UserWarning, match="every layer is scored by itself"):
        DIPruner(model, GOOD, evaluator, 1)
