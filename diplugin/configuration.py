"""What a run was asked to do: one record, checked when it is made, written to `config.json`, compared on resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from .costs import Budget
from .discriminant.targets import check_positive
from .errors import BudgetError, DataError, ModelError, UserError
from .measurements import versions
from .recovery import FineTuning
from .run_folder import recorded
from .strategies import OneShot, Strategy
from .tables import LatencyTable


@dataclass(frozen=True)
class Configuration:
    """Everything that decides how a run goes, apart from the model and the data.

    Attributes:
        once: how the network is scored, searched and cut, each time.
        strategy: how the network shrinks, if not at once by one plan of DI's.
        holdout: fraction of the training data set aside.

    Raises:
        UserError: no budget, no repair, or a number out of its range.
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
        if self.strategy is not None and not hasattr(self.strategy, "shrink"):
            raise UserError(f"expected a strategy such as StructureDistillation() or None, got {self.strategy!r:.80}")
        check_positive(self.once.rho, "rho")
        images = self.once.images
        if not isinstance(images, int) or images < 2:
            raise DataError(f"expected images of 2 or more, got {images!r}")
        if not self.once.repairs:
            raise UserError("expected a repair to try at least, such as Recalibrate(), got none")
        if not self.budgets:
            raise BudgetError("expected a budget such as macs=0.5, got none")

    def record(self, model: nn.Module) -> dict[str, Any]:
        """As JSON; two runs with the same record and data are the same run.

        Raises:
            ModelError: not a module.
        """
        if not isinstance(model, nn.Module):
            raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
        return {
            "model": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "budgets": [str(budget) for budget in self.budgets],
            "latency_table": self.latency_table.name if self.latency_table is not None else None,
            "recovery": recorded(self.recovery),
            "strategy": None if self.strategy is None else self.strategy.record(),
            "bits": None if self.bits is None else json.loads(json.dumps(asdict(self.bits), default=str)),
            "rho": self.once.rho, "images": self.once.images,
            "tap": repr(self.once.tap), "limits": asdict(self.once.limits), "ranking": repr(self.once.ranking),
            "search": repr(self.once.searcher),
            "repairs": [repr(repair) for repair in self.once.repairs],
            "holdout": self.holdout, "seed": self.seed, "versions": versions(),
        }  # fmt: skip
