"""Settings of a training: what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from diplugin.errors import UserError
from diplugin.recovery import Distillation, FineTuning


@pytest.mark.parametrize(
    "make",
    [lambda: Distillation(teacher_weight=1.5), lambda: Distillation(temperature=0.0),
     lambda: Distillation(temperature=math.inf), lambda: Distillation(epochs=0),
     lambda: Distillation(temperature="4"), lambda: Distillation(teacher_weight=None)],  # type: ignore[arg-type]
)  # fmt: skip
def test_settings_of_a_teacher_that_mean_nothing(make: Callable[[], FineTuning]) -> None:
    with pytest.raises(UserError):
        make()


@pytest.mark.parametrize(
    ("name", "values"),
    [("epochs", (0, -1, 2.5, math.nan, "3", None)), ("lr", (0.0, -1.0, math.nan, math.inf, "0.1")),
     ("momentum", (-0.1, 1.0, math.nan)), ("weight_decay", (-1.0, math.nan, math.inf)),
     ("smoothing", (-0.1, 1.0, 2.0, math.nan)), ("warm_up", (-0.1, 1.1, math.nan))],
)  # fmt: skip
def test_settings_that_mean_nothing(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(UserError, match=f"expected {name} .*, got {value!r}"):
            FineTuning(**{name: value})
