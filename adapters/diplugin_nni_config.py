"""NNI configuration lists: checked before NNI sees them, and made from pruning plans.

NNI's own complaints are assertions without a message and schema dumps of twenty lines; here each mistake is one line.
`config_list_for` is the way budgets enter NNI: score, search to the budgets, and say the plan's widths in NNI's words.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diplugin_nni_speedup import as_tuple
from nni.compression.base.config import default_config_schema, select_modules_by_config, trans_legacy_config_list
from torch import Tensor, nn

from diplugin.costs import Budget, CostModel, PeakActivationMemory, macs, params
from diplugin.costs.latency import LatencyCost
from diplugin.errors import DipluginError, UserError
from diplugin.features import device_of, to_device
from diplugin.groups import ChannelGroup
from diplugin.network import NetworkTrace, trace_network
from diplugin.plan import PruningPlan
from diplugin.samples import first_image
from diplugin.strategies import OneShot
from diplugin.tables import LatencyTable

_RATIOS = ("sparse_ratio", "max_sparse_ratio", "min_sparse_ratio")
_KEYS = (
    "op_types", "op_names", "op_names_re", "exclude_op_names", "exclude_op_types", "exclude_op_names_re",
    "target_names", "target_settings", "sparse_threshold", "global_group_id", "dependency_group_id",
    "internal_metric_block", "granularity", "apply_method", "align", *_RATIOS,
)  # fmt: skip


def checked_config(model: nn.Module, config_list: Any) -> list[dict[str, Any]]:
    """The config_list in NNI's current form, every entry valid and selecting at least one layer.

    Raises:
        UserError: one line that names the entry, what was expected and what came.
    """
    if not isinstance(config_list, (list, tuple)) or not all(isinstance(c, dict) for c in config_list):
        raise UserError(f"expected config_list as a list of dicts, got {type(config_list).__name__}")
    if not config_list:
        raise UserError("expected a config_list with an entry such as {'op_types': ['Conv2d'], 'sparse_ratio': 0.5}")
    with nni_errors("a config_list in NNI's form"):
        entries = trans_legacy_config_list(copy.deepcopy(list(config_list)))
    entries = [entry for entry, given in zip(entries, config_list, strict=True) if not _only_excludes(entry, given)]
    for i, entry in enumerate(entries):
        where = f"config_list[{i}]"
        _check_keys(entry, where)
        for setting in (entry, *entry.get("target_settings", {}).values()):
            _check_numbers(setting, where)
        with nni_errors(f"{where} by NNI's schema"):
            default_config_schema("pruning").validate(entry)
        _check_selection(model, entry, where)
    return entries


def _only_excludes(entry: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether it stood for layers to leave alone, in NNI's old words: the other entries exclude them now."""
    return "exclude" in given and "exclude" not in entry


def _check_keys(entry: dict[str, Any], where: str) -> None:
    unknown = sorted(map(str, set(entry) - set(_KEYS)))
    if unknown:
        raise UserError(f"expected keys of NNI 3.0 in {where}, got {unknown}; known are {', '.join(_KEYS)}")
    if not {"op_types", "op_names", "op_names_re"} & set(entry):
        raise UserError(f"expected op_types, op_names or op_names_re in {where}, got only {sorted(entry)}")
    settings = entry.get("target_settings", {})
    if not isinstance(settings, dict) or not all(isinstance(s, dict) for s in settings.values()):
        raise UserError(f"expected target_settings in {where} as a dict of dicts, got {settings!r}")


def _check_selection(model: nn.Module, entry: dict[str, Any], where: str) -> None:
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for key in ("op_names", "exclude_op_names"):
        unknown = [name for name in entry.get(key, ()) if name not in known]
        if unknown:
            raise UserError(f"expected {key} of the model in {where}, it has no {unknown[0]!r}")
    with nni_errors(f"regular expressions in {where}"):
        selected = select_modules_by_config(model, entry)[0]
    if not selected:
        asked = {k: v for k, v in entry.items() if k.startswith(("op_", "exclude_"))}
        raise UserError(f"expected {where} to select a layer of the model, {asked} selects none")
    _select_once(model, entry, selected, where)


def _select_once(model: nn.Module, entry: dict[str, Any], selected: Mapping[str, nn.Module], where: str) -> None:
    """NNI wraps a layer under each of its names, which fails at the second: it is selected by its first alone."""
    first = {module: name for name, module in model.named_modules()}
    others = [name for name, module in selected.items() if first[module] != name]
    for name in others:
        if first[selected[name]] not in selected:
            raise UserError(f"expected one name for each layer in {where}, {name!r} is another name of "
                            f"{first[selected[name]]!r}: select that one, or neither")  # fmt: skip
    if others:
        entry["exclude_op_names"] = [*entry.get("exclude_op_names", ()), *others]


def _check_numbers(setting: dict[str, Any], where: str) -> None:
    for key in (*_RATIOS, "sparse_threshold"):
        value = setting.get(key)
        if value is None:
            continue
        if not isinstance(value, float) or not math.isfinite(value):
            raise UserError(f"expected {key} in {where} as a float such as 0.5, got {type(value).__name__} {value!r}")
        if key in _RATIOS and not 0 <= value <= 1:
            raise UserError(f"expected {key} in {where} between 0.0 and 1.0, got {value}")
    blocks = setting.get("internal_metric_block")
    if blocks is not None and not (isinstance(blocks, int) and blocks >= 1):
        raise UserError(f"expected internal_metric_block in {where} as an integer of 1 or more, got {blocks!r}")
    low, high = setting.get("min_sparse_ratio") or 0.0, setting.get("max_sparse_ratio") or 1.0
    if low > high:
        raise UserError(f"expected min_sparse_ratio at most max_sparse_ratio in {where}, got {low} above {high}")


@contextmanager
def nni_errors(expected: str) -> Iterator[None]:
    """NNI's assertions and lookups that fail, as one line each."""
    try:
        yield
    except DipluginError:
        raise
    except Exception as error:
        # A schema tells what is wrong on its last line, and where on those before.
        why = " ".join(str(error).split())[:300] or f"an {type(error).__name__} without a message"
        raise UserError(f"expected {expected}, got: {why}") from error


def follower_config(name: str, module: nn.Module) -> dict[str, Any]:
    """The entry that gives a BatchNorm or a depthwise convolution masks of its own; no ratio: it only follows."""
    if getattr(module, "weight", None) is not None:
        return {"op_names": [name], "target_names": ["weight", "bias"]}
    settings = {"_output_": {"granularity": "per_channel", "apply_method": "mul"}}
    return {"op_names": [name], "target_names": ["_output_"], "target_settings": settings}


def plan_config_list(plan: PruningPlan, groups: Iterable[ChannelGroup]) -> list[dict[str, Any]]:
    """A pruning plan in NNI's words: one entry for every group that loses channels.

    All layers that write a group's channels form one dependency group with the plan's ratio, so that any pruner
    gives them one mask and the plan's width; `DIPruner` on the plan's data keeps the plan's very channels.

    Args:
        groups: of the network that the plan is for.
    """
    entries = []
    for group in groups:
        total = plan.channels.get(group.name, group.channels)
        gone = total - len(plan.kept[group.name]) if group.name in plan.kept else 0
        if gone:
            entry = {
                "op_names": [member.layer for member in group.side("out")],
                "target_names": ["weight", "bias"],
                "sparse_ratio": gone / total,
                "dependency_group_id": group.name,
            }
            entries.append(entry if group.blocks == 1 else {**entry, "internal_metric_block": group.blocks})
    return entries


def config_list_for(
    model: nn.Module,
    budgets: Sequence[Budget | str],
    latency_table: LatencyTable | None = None,
    *,
    calibration_data: Iterable[Any],
    example_inputs: tuple[Any, ...] | Tensor | None = None,
    strategy: OneShot | None = None,
) -> list[dict[str, Any]]:
    """The config_list whose masks meet the budgets: score by DI, search greedily, say the widths in NNI's words.

    Args:
        model: unwrapped; left as it was.
        budgets: `Budget`s or texts such as "macs=0.5", "latency_ms=12ms".
        latency_table: of the target device, for budgets on latency.
        calibration_data: batches of (inputs, labels); give the same to `DIPruner`.
        example_inputs: one input, at the batch that will run; None takes the first image of the data.
        strategy: rho, tap, floors and alignment of the search, and how batches are read.

    Raises:
        InfeasibleBudget: no structure within reach meets the budgets.
        UserError: budgets, a table or data that cannot be used.

    >>> config_list = config_list_for(model, ["macs=0.5"], calibration_data=loader)  # doctest: +SKIP
    >>> _, masks = DIPruner(model, config_list, calibration_data=loader).compress()  # doctest: +SKIP
    """
    plan, trace = plan_for(model, budgets, latency_table, calibration_data, example_inputs, strategy or OneShot())
    return plan_config_list(plan, trace.groups)


def plan_for(
    model: nn.Module,
    budgets: Sequence[Budget | str],
    latency_table: LatencyTable | None,
    calibration_data: Iterable[Any],
    example_inputs: tuple[Any, ...] | Tensor | None,
    strategy: OneShot,
) -> tuple[PruningPlan, NetworkTrace]:
    """The plan behind `config_list_for`, and the network that it was traced on; arguments as there."""
    if example_inputs is None:
        calibration_data = list(calibration_data) if iter(calibration_data) is calibration_data else calibration_data
        example_inputs = first_image(next(iter(calibration_data))[0])
    inputs = as_tuple(example_inputs)
    trace = trace_network(model, to_device(inputs, device_of(model)))
    costs: list[CostModel] = [macs(trace), params(trace), PeakActivationMemory(trace)]
    if latency_table is not None:
        costs.append(LatencyCost(trace, latency_table))
    wanted = [Budget.parse(b) if isinstance(b, str) else b for b in budgets]
    return strategy.search(trace, strategy.score(model, calibration_data, trace), costs, wanted), trace
