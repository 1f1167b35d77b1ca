"""What a run was asked to do: one record, checked when it is made, written to `config.json`, compared on resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .costs import Budget
from .discriminant.targets import check_positive
from .errors import BudgetError, DataError, ModelError, UserError, first_line
from .measurements import versions
from .recovery import FineTuning, check_trainable
from .run_folder import recorded
from .search import SearchLimits
from .strategies import OneShot, Strategy
from .tables import LatencyTable
from .tables.file_format import document_from_table

#: torch, NumPy and scikit-learn all take a seed up to here.
LARGEST_SEED = 2**32 - 1


def is_seed(value: Any) -> bool:
    """Whether every generator takes it."""
    return isinstance(value, int) and 0 <= value <= LARGEST_SEED


def listed(values: Any, example: str) -> tuple[Any, ...]:
    """What was given as a list, as a tuple.

    Raises:
        UserError: no list; a text is none.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(f"expected a list such as [{example}], got {values!r:.80}")
    return tuple(values)


def check_kind(name: str, value: Any, kind: type | str, example: str) -> None:
    """Raise UserError unless the value is an instance of a class, or an object (no class) with an attribute."""
    fits = isinstance(value, kind) if isinstance(kind, type) else hasattr(value, kind) and not isinstance(value, type)
    if not fits:
        raise UserError(f"expected {name} such as {example}, got {value!r:.80}")


@dataclass(frozen=True)
class Configuration:
    """Everything that decides how a run goes, apart from the model and the data.

    Attributes:
        once: how the network is scored, searched and cut, each time.
        strategy: how the network shrinks, if not at once by one plan of DI's.
        holdout: fraction of the training data set aside.

    Raises:
        UserError: no budget, no repair, something of another kind, or a number out of its range.
    """

    budgets: tuple[Budget, ...]
    once: OneShot
    latency_table: LatencyTable | None = None
    recovery: FineTuning | None = None
    strategy: Strategy | None = None
    bits: Any = None
    augment: Callable[[Tensor], Tensor] | None = None
    holdout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_kinds()
        check_positive(self.once.rho, "rho")
        images = self.once.images
        if not isinstance(images, int) or images < 2:
            raise DataError(f"expected images of 2 or more, got {images!r}")
        if not self.once.repairs:
            raise UserError("expected a repair to try at least, such as Recalibrate(), got none")
        if not self.budgets:
            raise BudgetError("expected a budget such as macs=0.5, got none")
        if not is_seed(self.seed):
            raise UserError(f"expected a seed from 0 to {LARGEST_SEED}, got {self.seed!r:.80}")

    def _check_kinds(self) -> None:
        once, optional = self.once, (
            ("a strategy", self.strategy, "shrink", "StructureDistillation() or None"),
            ("a recovery", self.recovery, FineTuning, "FineTuning(epochs=10) or None"),
            ("a latency_table", self.latency_table, LatencyTable, "LatencyTable.load('table.json') or None"),
            ("bits", self.bits, "__dataclass_fields__", "quantize.Bits() or None"),
            ("augment", self.augment, "__call__", "a function of images or None"),
        )  # fmt: skip
        for name, value, kind, example in optional:
            if value is not None:
                check_kind(name, value, kind, example)
        check_kind("a search", once.searcher, "__call__", "ExactSearch() or None")
        check_kind("a ranking", once.ranking, "__call__", "ranking.ByAll() or None")
        check_kind("a tap", once.tap, "members", "AfterActivation() or None")
        check_kind("limits", once.limits, SearchLimits, "SearchLimits(floor=0.1) or None")
        for budget in self.budgets:
            check_kind("budgets", budget, Budget, "Budget('macs', fraction=0.5)")
        for repair in once.repairs:
            check_kind("repairs", repair, "repaired", "Recalibrate()")

    def record(self, model: nn.Module) -> dict[str, Any]:
        """As JSON; two runs with the same record and data are the same run.

        Raises:
            ModelError: not a module, one whose weights cannot be read, or without a parameter to train where one is to
                be trained.
        """
        if not isinstance(model, nn.Module):
            raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
        if any((self.recovery, getattr(self.strategy, "lesson", None), getattr(self.bits, "finetune", None))):
            check_trainable(model)
        table = self.latency_table
        return {
            "model": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "weights": _digest(model),
            "budgets": [_exactly(budget) for budget in self.budgets],
            "latency_table": None if table is None else table.name,
            "latency_table_sha256": None if table is None else document_from_table(table)["sha256"],
            "recovery": recorded(self.recovery),
            "strategy": None if self.strategy is None else self.strategy.record(),
            "bits": None if self.bits is None else json.loads(json.dumps(asdict(self.bits), default=str)),
            "rho": self.once.rho, "images": self.once.images,
            "tap": repr(self.once.tap), "limits": asdict(self.once.limits), "ranking": repr(self.once.ranking),
            "search": repr(self.once.searcher),
            "repairs": [repr(repair) for repair in self.once.repairs],
            "holdout": self.holdout, "seed": self.seed, "versions": versions(),
        }  # fmt: skip


def _exactly(budget: Budget) -> str:
    """A budget in words, with all the digits of its number: one that differs in the last is another run's."""
    if budget.fraction is not None:
        return f"{budget.cost} <= {float(budget.fraction)!r} of the unpruned network"
    return f"{budget.cost} <= {float(budget.limit or 0)!r}"


def _digest(model: nn.Module) -> str:
    """What tells a network's weights from others of the same architecture: a hash of its state.

    Raises:
        ModelError: there are weights without values, such as those of a lazy layer or on the meta device.
    """
    digest = hashlib.sha256()
    try:
        for name, tensor in model.state_dict().items():
            if isinstance(tensor, Tensor):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"expected a model whose weights can be read, got {first_line(error)}") from error
    return digest.hexdigest()[:16]
