"""Settings of a training: what is trained towards, for how long, and how fast."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError

#: What a number may be, in words and as a test.
Range = tuple[str, Callable[[Any], bool]]
#: Of the numbers of a `FineTuning`.
_RANGES: dict[str, Range] = {
    "epochs": ("as a whole number of 1 or more", lambda n: isinstance(n, numbers.Integral) and int(n) >= 1),
    "lr": ("above 0 and finite", lambda x: 0 < x < math.inf),
    "momentum": ("from 0 to below 1", lambda x: 0 <= x < 1),
    "weight_decay": ("of 0 or more and finite", lambda x: 0 <= x < math.inf),
    "smoothing": ("from 0 to below 1", lambda x: 0 <= x < 1),
    "warm_up": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "teacher_weight": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "temperature": ("above 0 and finite", lambda x: 0 < x < math.inf),
}


def check_numbers(settings: Any, ranges: Mapping[str, Range]) -> None:
    """Raise UserError for the first of a setting's attributes that is no number, or not in its range."""
    for name, (meaning, holds) in ranges.items():
        value = getattr(settings, name)
        if not (isinstance(value, numbers.Real) and holds(value)):
            raise UserError(f"expected {name} {meaning}, got {value!r:.80}")


@dataclass(frozen=True)
class FineTuning:
    """Plain fine-tuning: SGD with Nesterov momentum, a short warm-up, then a cosine to zero.

    Attributes:
        epochs: passes over the training data.
        lr: peak learning rate.

    Raises:
        UserError: a number that means nothing.
    """

    epochs: int = 10
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    smoothing: float = 0.0
    warm_up: float = 0.05
    teacher_weight: float = field(default=0.0, init=False)
    temperature: float = field(default=4.0, init=False)

    def __post_init__(self) -> None:
        check_numbers(self, _RANGES)


@dataclass(frozen=True)
class Distillation(FineTuning):
    """Fine-tuning with the unpruned network as teacher.

    Attributes:
        teacher_weight: share of the teacher's loss, the labels' loss has the rest.
        temperature: softens both networks' outputs.
    """

    teacher_weight: float = 0.7
    temperature: float = 4.0
