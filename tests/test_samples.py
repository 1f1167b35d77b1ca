"""Bounded samples of a user's data, and what the model is called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diplugin.errors import DataError
from diplugin.features import Observation, images_in
from diplugin.samples import call_inputs, collect, forward_any, on_cpu


def test_a_loader_is_read_up_to_the_cap_and_no_further(make_images: Callable[..., Any]) -> None:
    loader = iter(make_images(100).loader(10))
    batches = collect(loader, 25)
    assert [images_in(b) for b in batches] == [10, 10, 5]
    assert len(list(loader)) == 7


@pytest.mark.parametrize("loader", [3, "digits", {"x": 1}, torch.zeros(4, 3), None])
def test_what_is_no_loader_is_refused(loader: Any) -> None:
    with pytest.raises(DataError, match="expected a loader"):
        collect(loader, 10)


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        collect([], 10)


def test_batches_are_detached(make_images: Callable[..., Any]) -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    assert not on_cpu({"x": x, "name": "a"})["x"].requires_grad


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_example_inputs_are_what_the_model_is_called_with() -> None:
    batch = ((torch.zeros(5, 3), torch.ones(5, 3)), torch.arange(5))
    inputs = call_inputs(TwoInputs(), batch, Observation(forward=forward_any))
    assert inputs is not None
    assert [tuple(x.shape) for x in inputs] == [(1, 3), (1, 3)]


def test_inputs_by_name_cannot_be_traced_by_position() -> None:
    batch = {"x": torch.zeros(5, 3), "y": torch.zeros(5, 3)}
    seen = Observation(get_labels=lambda _: torch.arange(5), forward=forward_any)
    assert call_inputs(TwoInputs(), batch, seen) is None


def test_a_batch_that_the_model_does_not_run_on_is_one_line() -> None:
    with pytest.raises(DataError, match="pass forward="):
        call_inputs(TwoInputs(), (torch.zeros(5, 3), torch.arange(5)), Observation(forward=forward_any))
