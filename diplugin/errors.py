"""Every error that diplugin raises on purpose.

    DipluginError
    ├── UserError                 the user's input cannot be used          exit code 2
    │   ├── ModelError            the model, or what it returns
    │   ├── DataError             inputs, labels, loaders, data files
    │   ├── TableError            a latency table, a bundle, a journal
    │   ├── PlanError             a pruning plan, a checkpoint, a run folder
    │   ├── BudgetError           a budget that means nothing
    │   ├── NotFittedError        an importance used before, or apart from, its `fit`
    │   ├── DeviceError           a remote device that does not answer or lacks something
    │   ├── ProcessError          another process of the same run stopped, and said why
    │   └── MissingExtraError     an optional package that is not installed
    └── InfeasibleBudget          a budget that no structure meets         exit code 3

A message is one line: what was expected, what came, what to do. Exceptions of the libraries underneath are mapped
where a user's object enters (the model, the loader, the file), not one by one along the way.
"""

from __future__ import annotations


class DipluginError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 1


class UserError(DipluginError):
    """What the user gave cannot be used."""

    exit_code = 2


class ModelError(UserError):
    """The model cannot be traced, run or pruned."""


class DataError(UserError):
    """Inputs, labels, a loader or a data file cannot be used."""


class TableError(UserError):
    """A latency table, a profile bundle or a journal cannot be used."""


class PlanError(UserError):
    """A pruning plan, a checkpoint or a run folder cannot be used."""


class BudgetError(UserError):
    """A budget has no meaning: an unknown cost, an unknown unit, a limit that is not positive."""


class NotFittedError(UserError):
    """An importance was asked for scores of channels that it was never fitted on."""


class DeviceError(UserError):
    """A remote device does not answer, or lacks what the work needs."""


class ProcessError(UserError):
    """Another process of the same run stopped; the message is its own."""


class MissingExtraError(UserError, ImportError):
    """An optional package is needed and not installed."""


class InfeasibleBudget(DipluginError):
    """No reachable structure meets the budget; the message names the cheapest one that was found."""

    exit_code = 3


class DISaturationWarning(UserWarning):
    """DI is so near 1 that the ranking of channels is mostly noise: use more images or a larger rho."""


class OneClassWarning(UserWarning):
    """Chunks of images that all have one label were left out, since they tell no channel from another."""


class StaleScoresWarning(UserWarning):
    """Scores are used on a model that has changed since they were computed."""


class UncalibratedLatencyWarning(UserWarning):
    """A latency is predicted by a plain sum of table entries, without an end-to-end calibration."""


class RoundedLatencyWarning(UserWarning):
    """A latency was looked up at a wider profiled width, since its own width was not profiled."""


class FrozenLayersWarning(UserWarning):
    """Layers whose weights take no gradient: a host that follows gradients will silently leave them alone."""


def first_line(error: BaseException) -> str:
    """An exception's message cut to one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
