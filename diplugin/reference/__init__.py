"""scikit-learn as the referee: is DI what it claims to be, on a sceptic's own model and data?

`check_identities` computes DI and, by scikit-learn alone, the same number again; `validate_network` does so for the
layers of a model, follows DI along channel orders (it must never fall), and measures by cross-validated linear
discriminant analysis what the channels are worth that DI keeps, against those that others keep.
"""

from __future__ import annotations

from .identities import Identity, check_identities, di_along, greedy_order, lda_trace, ridge_value
from .network import choose_groups, collect, l1_norms, validate_network
from .plot import check_outputs, plot_validation
from .study import (
    FRACTIONS,
    Accuracy,
    LayerValidation,
    lda_accuracy,
    mean_accuracies,
    save_validation,
    validate_layer,
)

__all__ = [
    "FRACTIONS",
    "Accuracy",
    "Identity",
    "LayerValidation",
    "check_identities",
    "check_outputs",
    "choose_groups",
    "collect",
    "di_along",
    "greedy_order",
    "l1_norms",
    "lda_accuracy",
    "lda_trace",
    "mean_accuracies",
    "plot_validation",
    "ridge_value",
    "save_validation",
    "validate_layer",
    "validate_network",
]
