"""What a user's code raises becomes one line; our own errors pass through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from diplugin.boundary import guarded_forward, guarded_labels
from diplugin.errors import DataError, ModelError


def raising(error: BaseException) -> Any:
    def call(*_: Any) -> Any:
        raise error

    return call


def test_results_pass_through() -> None:
    model, batch = nn.Identity(), (torch.ones(2, 3), torch.zeros(2))
    assert torch.equal(guarded_forward(lambda m, b: m(b[0]))(model, batch), batch[0])
    assert torch.equal(guarded_labels(lambda b: b[1])(batch), batch[1])


@pytest.mark.parametrize("error", [RuntimeError("line one\nline two"), TypeError("x"), KeyError("y"), AssertionError()])
def test_foreign_errors_become_one_line(error: Exception) -> None:
    with pytest.raises(ModelError, match=r"batches \[\[2, 3\]\]") as caught:
        guarded_forward(raising(error))(nn.Identity(), torch.ones(2, 3))
    assert "\n" not in str(caught.value) and caught.value.__cause__ is error
    with pytest.raises(DataError, match="get_labels"):
        guarded_labels(raising(error))(torch.ones(2, 3))


@pytest.mark.parametrize("error", [DataError("ours"), KeyboardInterrupt()])
def test_our_own_errors_and_interrupts_pass(error: BaseException) -> None:
    with pytest.raises(type(error)):
        guarded_forward(raising(error))(nn.Identity(), None)
    with pytest.raises(type(error)):
        guarded_labels(raising(error))(None)
