"""Surgery: a plan becomes a smaller network.

Channels are removed through torch-pruning's dependency graph, which is built once on the inputs that the plan carries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from .errors import PlanError, first_line
from .groups import ChannelGroup, remove_channels, trace_groups
from .plan import PruningPlan
from .whole_files import write_bytes

PLAN_FILE = "plan.json"
WEIGHTS_FILE = "weights.safetensors"

#: Types that stand for one another; floats of one byte are in none, as torch can neither check nor convert them all.
_KINDS = (
    {torch.float16, torch.bfloat16, torch.float32, torch.float64},
    {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64},
    {torch.complex64, torch.complex128},
    {torch.bool},
)


def apply_plan(model: nn.Module, plan: PruningPlan, example_inputs: tuple[Any, ...] | None = None) -> nn.Module:
    """Remove, in place, every channel that the plan does not keep; returns the model.

    Parameters are replaced: build optimizers afterwards.

    Args:
        model: the unpruned network that the plan was made for.
        example_inputs: what to trace it with; None for random ones of the plan's specification.

    Raises:
        PlanError: the plan is for another network, or removes what must stay; nothing has been removed then.
    """
    modules = dict(model.named_modules())
    for name, channels in plan.channels.items():
        width = _out_channels(modules.get(name))
        if width != channels:
            found = "no such layer" if width is None else f"{width}"
            raise PlanError(f"expected the network of the plan, with {channels} channels at {name!r}; found {found}")
    inputs = example_inputs or _examples(model, plan)
    removed = {name: channels for name, channels in plan.removed.items() if channels}
    groups = {group.name: group for group in trace_groups(model, inputs)} if removed else {}
    for name, channels in removed.items():
        _check_removal(groups.get(name), name, channels)
    return remove_channels(model, inputs, removed)


def _examples(model: nn.Module, plan: PruningPlan) -> tuple[torch.Tensor, ...]:
    try:
        inputs = tuple(spec.example().to(_device(model)) for spec in plan.inputs)
    except (RuntimeError, MemoryError, TypeError, OverflowError) as error:
        raise PlanError(f"expected inputs that can be made in the plan, got {first_line(error)}") from error
    if not inputs:
        raise PlanError("expected example inputs to trace the model with, the plan carries none")
    return inputs


def _check_removal(group: ChannelGroup | None, name: str, channels: Sequence[int]) -> None:
    """A file can say anything: what it removes must be whole units of a group that may be pruned."""
    if group is None or group.note:
        why = group.note if group is not None else "it is no group of its own"
        raise PlanError(f"expected a plan that leaves {name!r} alone ({why}), got one that prunes it")
    units = Counter(channel % group.units for channel in channels)
    if any(count != group.blocks for count in units.values()):
        raise PlanError(f"expected {name!r} to lose the same channels in each of its {group.blocks} blocks, not others")


def _out_channels(module: nn.Module | None) -> int | None:
    for attribute in ("out_channels", "out_features"):
        if hasattr(module, attribute):
            return int(getattr(module, attribute))
    return None


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def save_pruned(model: nn.Module, plan: PruningPlan, folder: str | Path) -> None:
    """Write a pruned model as plan and safetensors, which `load_pruned` reads; nothing in it can execute.

    Raises:
        PlanError: the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plan.save(folder / PLAN_FILE)
        save_weights(model, folder / WEIGHTS_FILE)
    except OSError as error:
        raise PlanError(f"expected a folder that can be written at {folder}, got {first_line(error)}") from error


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write a model's parameters and buffers as safetensors.

    Raises:
        OSError: the file cannot be written.
    """
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    write_bytes(path, save(state))


def load_pruned(fresh_model: nn.Module, folder: str | Path) -> nn.Module:
    """Rebuild a pruned network from a fresh, unpruned one and a run folder, in place; returns the model.

    Args:
        fresh_model: the architecture that was pruned, with any weights.
        folder: holds `plan.json` and `weights.safetensors`.

    Raises:
        PlanError: no such files, broken ones, or another architecture's.

    >>> pruned = load_pruned(make_model(), "runs/a")  # doctest: +SKIP
    """
    plan = PruningPlan.load(Path(folder) / PLAN_FILE)
    weights = read_weights(Path(folder) / WEIGHTS_FILE)
    model = apply_plan(fresh_model, plan)
    load_weights(model, weights, str(folder))
    return model


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file.

    Raises:
        PlanError: no such file, or not a whole safetensors file.
    """
    try:
        return load_file(str(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise PlanError(f"expected a safetensors file at {path}, got {first_line(error)}") from error


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], where: str) -> None:
    """Load weights that must fit the model exactly; batch counters may be missing.

    Raises:
        PlanError: a tensor is missing, left over, of another shape or kind, or not finite; nothing has been loaded
            then.
    """
    wanted = model.state_dict()
    missing = [k for k in wanted if k not in weights and not k.endswith("num_batches_tracked")]
    left_over = [k for k in weights if k not in wanted]
    wrong = [k for k in weights if k in wanted and weights[k].shape != wanted[k].shape]
    if missing or left_over or wrong:
        name = (missing or left_over or wrong)[0]
        what = "lacks" if missing else "has besides" if left_over else "has in another shape"
        raise PlanError(f"expected weights for this model in {where}, which {what} {name!r}; is it another model's?")
    odd = next((k for k, v in weights.items() if not any({v.dtype, wanted[k].dtype} <= kind for kind in _KINDS)), None)
    if odd is not None:
        raise PlanError(f"expected numbers of the model's kind in {where}, {odd!r} is of {weights[odd].dtype} and the "
                        f"model's of {wanted[odd].dtype}; convert it or name another file")  # fmt: skip
    bad = next((k for k, v in weights.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())), None)
    if bad is not None:
        raise PlanError(f"expected finite weights in {where}, {bad!r} contains NaN or infinity")
    model.load_state_dict(weights, strict=False)
