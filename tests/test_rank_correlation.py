"""Spearman's rank correlation, against SciPy's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from diplugin.rank_correlation import rank_correlation

few = st.lists(st.tuples(st.integers(0, 5), st.floats(-1, 1)), min_size=3, max_size=30)


@given(pairs=few)
def test_it_is_scipys_where_both_vary(pairs: list[tuple[int, float]]) -> None:
    one, other = (list(map(float, values)) for values in zip(*pairs, strict=True))
    if len(set(one)) > 1 and len(set(other)) > 1:
        assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)
        assert rank_correlation(*torch.tensor([one, other], dtype=torch.float64)) == rank_correlation(one, other)


def test_what_does_not_vary_agrees_only_with_its_like() -> None:
    assert rank_correlation(torch.ones(5), torch.ones(5)) == 1
    assert rank_correlation(torch.ones(5), torch.arange(5)) == 0
    assert rank_correlation([1.0, 1.0], [1.0, 2.0]) == 0
