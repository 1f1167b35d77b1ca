"""Widths of all channel groups under budgets: greedily in a second, or as an integer program."""

from .curves import FixedScores, LossCurve, Scorer, first_order_curve
from .exact import ExactSearch
from .greedy import GreedySearch, greedy_search
from .problem import Search, SearchLimits

__all__ = [
    "ExactSearch",
    "FixedScores",
    "GreedySearch",
    "LossCurve",
    "Scorer",
    "Search",
    "SearchLimits",
    "first_order_curve",
    "greedy_search",
]
