"""What a user's code raises becomes one line; our own errors pass through."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from diplugin.boundary import GuardedLoader, guarded_forward, guarded_labels
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


class Unreadable(Dataset[Any]):
    """Eight images, the sixth of which raises."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 5:
            raise self._error
        return torch.zeros(1), index % 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_that_raises_is_one_line(workers: int) -> None:
    loader = DataLoader(Unreadable(OSError("truncated file\nline two")), batch_size=2, num_workers=workers)
    batches = iter(GuardedLoader(loader))
    assert len(GuardedLoader(loader)) == 4 and len(next(batches)) == 2
    with pytest.raises(DataError, match="data that can be read, got OSError") as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="ours"):
        list(GuardedLoader(DataLoader(Unreadable(DataError("ours")))))


def test_only_the_data_answers_for_its_errors() -> None:
    with pytest.raises(KeyError, match="mine"):
        for _ in GuardedLoader([1, 2]):
            raise KeyError("mine")
    with pytest.raises(DataError, match="TypeError"):
        list(GuardedLoader(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        len(GuardedLoader(iter([1])))


def test_images_are_varied_on_the_way_out() -> None:
    x, y = torch.ones(2, 3), torch.zeros(2)
    ((images, labels),) = GuardedLoader([(x, y)], lambda images: 2 * images)
    assert torch.equal(images, 2 * x) and labels is y
    with pytest.raises(DataError, match="ZeroDivisionError"):
        list(GuardedLoader([(x, y)], lambda images: images / (1 // 0)))


def test_what_is_varied_is_the_first_of_a_batch_which_keeps_its_form() -> None:
    class Named(NamedTuple):
        image: torch.Tensor
        label: torch.Tensor

    (batch,) = GuardedLoader([Named(torch.ones(2), torch.zeros(2))], lambda images: 2 * images)
    assert isinstance(batch, Named) and batch.image.tolist() == [2.0, 2.0]
    for form in ({"image": torch.ones(2)}, torch.ones(2)):
        with pytest.raises(DataError, match=r"batches of .images, .* to augment, got a .*; vary them in the data set"):
            list(GuardedLoader([form], lambda images: images))
