"""diplugin prunes neural networks by Discriminant Information, inside the frameworks that people already use.

Measure how much label information every channel carries and what it costs on the device, then keep the cheapest
structure that keeps the information.

>>> import diplugin
>>> diplugin.Budget.parse("macs=0.5")
Budget(cost='macs', fraction=0.5, limit=None)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diplugin_nni import DIPruner as DIPruner
    from diplugin_torch_pruning import DIImportance as DIImportance

    from .costs import Budget as Budget
    from .groups import trace_groups as trace_groups
    from .network import trace_network as trace_network
    from .pipeline import CompressionResult as CompressionResult
    from .pipeline import compress as compress
    from .plan import PruningPlan as PruningPlan
    from .recovery import Distillation as Distillation
    from .scoring import score_groups as score_groups
    from .search import ExactSearch as ExactSearch
    from .search import greedy_search as greedy_search
    from .strategies import MeasuredCuts as MeasuredCuts
    from .strategies import StructureDistillation as StructureDistillation
    from .surgery import apply_plan as apply_plan
    from .surgery import load_pruned as load_pruned
    from .tables import LatencyTable as LatencyTable

__version__ = "0.1.0"

# Everything is offered lazily: `import diplugin` costs next to nothing on top of torch, and never imports a host.
_HOMES = {
    "Budget": "diplugin.costs",
    "CompressionResult": "diplugin.pipeline",
    "DIImportance": "diplugin_torch_pruning",
    "DIPruner": "diplugin_nni",
    "Distillation": "diplugin.recovery",
    "ExactSearch": "diplugin.search",
    "LatencyTable": "diplugin.tables",
    "MeasuredCuts": "diplugin.strategies",
    "PruningPlan": "diplugin.plan",
    "StructureDistillation": "diplugin.strategies",
    "apply_plan": "diplugin.surgery",
    "compress": "diplugin.pipeline",
    "greedy_search": "diplugin.search",
    "load_pruned": "diplugin.surgery",
    "score_groups": "diplugin.scoring",
    "trace_groups": "diplugin.groups",
    "trace_network": "diplugin.network",
}

__all__ = [
    "Budget",
    "CompressionResult",
    "DIImportance",
    "DIPruner",
    "Distillation",
    "ExactSearch",
    "LatencyTable",
    "MeasuredCuts",
    "PruningPlan",
    "StructureDistillation",
    "__version__",
    "apply_plan",
    "compress",
    "greedy_search",
    "load_pruned",
    "score_groups",
    "trace_groups",
    "trace_network",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'diplugin' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
