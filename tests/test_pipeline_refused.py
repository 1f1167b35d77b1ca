"""What no run can be made of is refused in one line, and leaves no folder behind."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bars import CLASSES, bars
from small_runs import compress, make_net, seen, trained_net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import diplugin
from diplugin.errors import BudgetError, DataError, InfeasibleBudget, ModelError, UserError
from diplugin.measurements import Measure
from diplugin.quantize import Bits
from diplugin.ranking import ByAll
from diplugin.recovery import FineTuning, Recalibrate
from diplugin.search import ExactSearch, SearchLimits

pytestmark = pytest.mark.usefixtures("nothing_is_exported")


def test_an_infeasible_budget_names_what_is_in_reach_and_leaves_nothing(tmp_path: Path) -> None:
    budgets = [diplugin.Budget("macs", fraction=1e-4)]
    with pytest.raises(InfeasibleBudget, match="cheapest"):
        compress(trained_net(), seen(), budgets=budgets, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_budgets_on_latency_need_a_table() -> None:
    with pytest.raises(BudgetError, match="latency table"):
        compress(trained_net(), seen(), budgets=[diplugin.Budget("latency_ms", limit=1.0)])


def test_no_budget() -> None:
    with pytest.raises(BudgetError, match="got none"):
        compress(trained_net(), seen(), budgets=[])


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30, 0.5])
def test_a_seed_that_generators_do_not_take(tmp_path: Path, seed: Any) -> None:
    with pytest.raises(UserError, match="expected a seed from 0"):
        compress(trained_net(), seen(), out=tmp_path / "run", seed=seed)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "training",
    [{"recovery": FineTuning(epochs=1)}, {"strategy": diplugin.StructureDistillation()},
     {"bits": Bits(finetune=FineTuning(epochs=1))}],
)  # fmt: skip
def test_a_frozen_network_that_is_to_be_trained_is_said_at_once(tmp_path: Path, training: dict[str, Any]) -> None:
    frozen = make_net().eval().requires_grad_(False)
    with pytest.raises(ModelError, match="expected a model with parameters to train"):
        compress(frozen, seen(), out=tmp_path / "run", **training)
    assert not (tmp_path / "run").exists()


def test_an_error_of_any_kind_leaves_a_folder_that_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise OverflowError("too large")

    monkeypatch.setattr(Measure, "base", broken)
    with pytest.raises(OverflowError):
        compress(trained_net(), seen(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Pair(nn.Module):
    """Returns a tuple, which is no tensor of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.net(x)
        return y, y


def test_a_model_that_returns_a_tuple() -> None:
    with pytest.raises(ModelError, match=r"one tensor of logits.*tuple"):
        compress(Pair(), seen())


def test_a_model_that_returns_a_tuple_with_a_forward_of_its_own() -> None:
    result = compress(Pair(), seen(), forward=lambda model, batch: model(batch[0])[0])
    assert result.metrics["budgets"][0]["met"]


def test_a_model_without_channels_to_remove() -> None:
    with pytest.raises(ModelError, match="can be removed"):
        compress(nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)), seen())


def labelled(change: Any) -> DataLoader[Any]:
    x, y = bars(100, 1).tensors
    x, y = change(x.clone(), y.clone())
    return DataLoader(TensorDataset(x, y), batch_size=20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, torch.zeros_like(y)), "differ|same"),
        (lambda x, y: (x, y + CLASSES), "class ids from 0"),
        (lambda x, y: (x, y - CLASSES), "class ids"),
        (lambda x, y: (x * float("nan"), y), "NaN"),
        (lambda x, y: (x[:1], y[:1]), "four images"),
        (lambda x, y: (x[:, :, :, :4], y), "runs|shape|size"),
        (lambda x, y: (x, y.float()), "integers"),
    ],
    ids=["one class", "ids too high", "ids below zero", "NaN", "one image", "wrong shape", "float ids"],
)
def test_data_that_cannot_be_used(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((DataError, ModelError), match=message):
        compress(trained_net(), labelled(change), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("data", [[], [(torch.zeros(4, 1, 8, 8),)], [{"x": torch.zeros(4, 1, 8, 8)}]])
def test_batches_of_another_form(data: Any) -> None:
    with pytest.raises(DataError, match="expected"):
        compress(trained_net(), data)


class Broken(TensorDataset):
    """Its tenth image cannot be read."""

    def __getitem__(self, index: Any) -> Any:
        if index == 10:
            raise OSError("truncated file")
        return super().__getitem__(index)


def test_a_data_set_that_raises(tmp_path: Path) -> None:
    loader = DataLoader(Broken(*bars(40, 1).tensors), batch_size=20)
    with pytest.raises(DataError, match="OSError: truncated file"):
        compress(trained_net(), loader, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("budgets", diplugin.Budget("macs", fraction=0.5)), ("budgets", "macs=0.5"), ("budgets", ["macs=0.5"]),
        ("repairs", Recalibrate()), ("repairs", [Recalibrate]), ("repairs", "recalibration"),
        ("recovery", FineTuning), ("recovery", "fine-tuning"), ("strategy", diplugin.MeasuredCuts),
        ("search", ExactSearch), ("search", "exact"), ("ranking", ByAll), ("limits", SearchLimits), ("limits", 0.1),
        ("tap", "input"), ("bits", Bits), ("bits", 4), ("augment", "flip"), ("latency_table", "table.json"),
    ],
)  # fmt: skip
def test_settings_of_another_kind_are_one_line(tmp_path: Path, name: str, value: Any) -> None:
    """Such as a class, where one of its objects was meant; before anything is run or written."""
    with pytest.raises(UserError, match=r"^expected .*, got ") as caught:
        compress(nn.Identity(), [], out=tmp_path / "run", **{name: value})
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_holdout_that_takes_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leaves images to train on"):
        compress(trained_net(), seen(), holdout=0.999, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Warns(nn.Module):
    """Says something whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("the classes are stale", stacklevel=1)
        return self.net(x)


def test_a_run_that_fails_has_told_its_warnings() -> None:
    budgets = [diplugin.Budget("macs", fraction=1e-4)]
    with pytest.warns(UserWarning, match="the classes are stale"), pytest.raises(InfeasibleBudget):
        compress(Warns(), seen(), budgets=budgets, repairs=(Recalibrate(),))
