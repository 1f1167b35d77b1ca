"""Plans under budgets: widths greedily in a second or as an integer program, or whole structures by measured losses."""

from .curves import FixedScores, LossCurve, Scorer, first_order_curve
from .exact import ExactSearch
from .greedy import GreedySearch, greedy_search
from .measured import Wish, measured_plan
from .problem import Search, SearchLimits, allowed_widths
from .proportions import nearest, plan_at, widest

__all__ = [
    "ExactSearch",
    "FixedScores",
    "GreedySearch",
    "LossCurve",
    "Scorer",
    "Search",
    "SearchLimits",
    "Wish",
    "allowed_widths",
    "first_order_curve",
    "greedy_search",
    "measured_plan",
    "nearest",
    "plan_at",
    "widest",
]
