"""Spearman's rank correlation: how far scores of channels, or times of networks, agree on an order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def rank_correlation(one: Tensor | Sequence[float], other: Tensor | Sequence[float]) -> float:
    """Of two vectors [n]; equal values share their mean rank; 1 where neither varies, 0 where only one does.

    >>> round(rank_correlation([1.0, 2.0, 3.0], [0.1, 0.3, 0.2]), 6)
    0.5
    """
    from scipy.stats import rankdata

    first, second = (
        ranks - ranks.mean()
        for ranks in (rankdata(torch.as_tensor(values, dtype=torch.float64).cpu().numpy()) for values in (one, other))
    )
    norms = np.linalg.norm(first), np.linalg.norm(second)
    if min(norms) == 0:
        return float(max(norms) == 0)
    return float(first @ second / (norms[0] * norms[1]))
