"""NNI's target spaces: whose channels a target's blocks are, scores in its granularity, and the rules set for it.

A *target* is a weight, a bias, an input or an output of a wrapped layer. Its *metric* has the shape that NNI's scaler
shrinks the target to, so (C, 1, 1, 1) for a convolution's weight by output channels; masks are chosen in that shape
and broadcast back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from torch import Tensor, nn

from diplugin.errors import DataError, UserError
from diplugin.layer_scores import LayerSide
from diplugin.mask_rules import MaskRule, choose_masks

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Targets = dict[str, dict[str, PruningTargetSpace]]
Tensors = dict[str, dict[str, Tensor]]


def check_targets(spaces: Targets) -> None:
    """Raise UserError unless there is something to prune, all of it with channels."""
    aligned_to_others = any((space.align or {}).get("module_name") for *_, space in targets_with(spaces, "align"))
    if not aligned_to_others and not any(targets_with(spaces, "sparse_ratio", "sparse_threshold")):
        raise UserError("expected sparse_ratio or sparse_threshold for a target that no earlier compressor prunes, "
                        "config_list has none")  # fmt: skip
    for module, target, space in active(spaces):
        kind = type(space._wrapper.module)
        if issubclass(kind, nn.Embedding):
            raise UserError(f"expected layers with channels, {module!r} is an Embedding, whose rows are not channels")
        if target.startswith(("_input_", "_output_")) and not target.endswith("_0"):
            raise UserError(f"expected the first input or output of {module!r} as a target, got {target!r}")


def warn_of_fast_path(model: nn.Module, spaces: Targets) -> None:
    """Say which masks torch's fast path for Transformers passes by: it reads weights past all wrappers."""
    fast = [name for name, module in model.named_modules() if isinstance(module, nn.TransformerEncoderLayer)]
    passed = next((module for module in spaces if module.startswith(tuple(f"{name}." for name in fast))), None)
    if passed is not None:
        warnings.warn(
            f"torch's fast path for Transformers, in eval mode without gradients, passes by the masks of {passed!r}, "
            "which count in training and after speedup; to judge the masked model call "
            "torch.backends.mha.set_fastpath_enabled(False)", stacklevel=3,
        )  # fmt: skip


def targets_with(spaces: Targets, *settings: str) -> Iterator[tuple[str, str, PruningTargetSpace]]:
    """Targets for which one of the settings is given; a bias that the layer does not have is none."""
    for module, targets in spaces.items():
        for target, space in targets.items():
            missing = space.type is TargetType.PARAMETER and space.target is None
            if not missing and any(getattr(space, setting) is not None for setting in settings):
                yield module, target, space


def active(spaces: Targets) -> Iterator[tuple[str, str, PruningTargetSpace]]:
    """Targets that are scored: by rules of their own, or those of a group."""
    return targets_with(spaces, "sparse_ratio", "sparse_threshold", "dependency_group_id", "global_group_id")


def decides_itself(wrapper: Any) -> bool:
    """Whether an earlier compressor was told what to mask in this layer, so that it does not just follow."""
    spaces: Targets = {"": getattr(wrapper, "pruning_target_spaces", {})}
    return any(active(spaces)) or any((s.align or {}).get("module_name") for *_, s in targets_with(spaces, "align"))


def _kernel(space: PruningTargetSpace) -> list[int]:
    """The scaler's block, one number a dimension, -1 for all of it; elements where there is no scaler."""
    shape, scaler = space.shape or [], space._scaler
    if scaler is None:
        return [1] * len(shape)
    if len(scaler.kernel_size) > len(shape):
        raise UserError(f"expected a granularity of at most {len(shape)} numbers for {_name(space)}, "
                        f"got {scaler.kernel_size}")  # fmt: skip
    fill = [scaler.kernel_padding_val] * (len(shape) - len(scaler.kernel_size))
    kernel = [*fill, *scaler.kernel_size] if scaler.kernel_padding_mode == "front" else [*scaler.kernel_size, *fill]
    if any(step != -1 and (step < 1 or size % step) for step, size in zip(kernel, shape, strict=True)):
        raise UserError(f"expected a granularity whose blocks divide {_name(space)} of shape {shape}, got {kernel} "
                        f"(NNI fills a short list up in front)")  # fmt: skip
    return kernel


def _name(space: PruningTargetSpace) -> str:
    wrapper: Any = space._wrapper
    return f"{wrapper.name}.{space._target_name}"


def _channel_axis(space: PruningTargetSpace, target: str) -> int:
    """The dimension of a target along which its blocks divide channels."""
    if target.startswith(("_input_", "_output_")):
        return 1
    kernel = _kernel(space)
    return int(len(kernel) > 1 and kernel[0] == -1 and kernel[1] != -1)


def side_of(module: str, target: str, space: PruningTargetSpace) -> LayerSide:
    """Which side's channels a target's scores are."""
    if target.startswith(("_input_", "_output_")):
        return module, "in" if target.startswith("_input_") else "out"
    transposed = isinstance(space._wrapper.module, TRANSPOSED) and target == "weight"
    return module, "in" if (_channel_axis(space, target) == 1) != transposed else "out"


def metric_of(scores: Tensor, space: PruningTargetSpace, target: str) -> Tensor:
    """Channel scores in the shape that NNI's granularity gives the target: each block has the sum of its parts.

    A block finer than a channel gets a share of its score, in proportion to the energy of its weights.
    """
    shape, axis = list(space.shape or ()), _channel_axis(space, target)
    if not shape:
        raise DataError(f"expected {_name(space)} to be seen while the data ran, it was not")
    if target.startswith(("_input_", "_output_")):
        _check_activation(space, shape)
    if len(scores) != shape[axis]:
        # A grouped convolution's column stands for one input channel in each of its blocks.
        scores = scores.view(-1, shape[axis]).sum(0)
    along = scores.view(*[-1 if d == axis else 1 for d in range(len(shape))])
    if target.startswith(("_input_", "_output_")):
        shape[0] = 1
        spread = along.expand(shape) / prod(shape[2:])
    else:
        energy = torch.ones(shape) if space.target is None else space.target.detach().cpu().double().square()
        total = energy.sum([d for d in range(len(shape)) if d != axis], keepdim=True)
        even = torch.full_like(energy, energy.shape[axis] / energy.numel())
        spread = along * torch.where(total > 0, energy / total.clamp(min=1e-300), even)
    if space._scaler is None:
        return spread
    metric = space._scaler.shrink(spread, lambda block: block.sum(-1), keepdim=True)
    # Whole channels keep their scores to the last bit, so that equal ones stay equal.
    return along.clone() if metric.shape == along.shape else metric


def _check_activation(space: PruningTargetSpace, shape: list[int]) -> None:
    tokens = isinstance(space._wrapper.module, nn.Linear) and len(shape) > 2
    if tokens or _kernel(space)[1] == -1:
        raise UserError(f"expected {_name(space)} to hold its channels in dimension 1, one block or more each, got "
                        f"shape {shape} and granularity {space.granularity}; mask the weight instead")  # fmt: skip


def _rule(space: PruningTargetSpace) -> MaskRule:
    blocks = space.internal_metric_block
    return MaskRule(
        space.sparse_ratio, space.sparse_threshold, space.min_sparse_ratio, space.max_sparse_ratio,
        space.dependency_group_id, space.global_group_id, blocks if isinstance(blocks, int) else 1,
        prod(space.shape or ()) if space.type is TargetType.PARAMETER else prod((space.shape or ())[1:]),
    )  # fmt: skip


def choose(spaces: Targets, metrics: Tensors) -> Tensors:
    flat = {(m, t): metric for m, found in metrics.items() for t, metric in found.items()}
    chosen = choose_masks({(m, t): _rule(spaces[m][t]) for m, t in flat}, flat)
    masks: Tensors = {}
    for (module, target), mask in chosen.items():
        masks.setdefault(module, {})[target] = _expanded(mask, spaces[module][target], target)
    return masks


def _expanded(mask: Tensor, space: PruningTargetSpace, target: str) -> Tensor:
    """A mask in metric shape, broadcastable to the target."""
    if space._scaler is None:
        return mask
    shape = list(space.shape or ())
    if target.startswith(("_input_", "_output_")):
        shape[0] = 1
    return space._scaler.expand(mask, shape, keepdim=True, full_expand=False)


def align(spaces: Targets, masks: Tensors, known: Mapping[str, Mapping[str, Tensor | None]]) -> None:
    """Add the masks of targets that align with others, those first that others wait for.

    Args:
        masks: chosen just now; a ratio or a threshold of its own goes before a target's alignment.
        known: what was in force before.
    """
    all_aligned = targets_with(spaces, "align")
    waiting = {(m, t): space for m, t, space in all_aligned if space.sparse_ratio is space.sparse_threshold is None}
    while waiting:
        ready = [key for key, space in waiting.items() if _source_of(key[0], space) not in waiting]
        if not ready:
            names = " and ".join(f"{module}.{target}" for module, target in waiting)
            raise UserError(f"expected targets that align with a mask of its own, {names} wait for each other")
        for module, target in ready:
            space = waiting.pop((module, target))
            source = _source_of(module, space)
            mask = masks.get(source[0], {}).get(source[1], known.get(source[0], {}).get(source[1]))
            masks.setdefault(module, {})[target] = _aligned(space, target, mask)


def _source_of(module: str, space: PruningTargetSpace) -> tuple[str, str]:
    align = space.align or {}
    return align.get("module_name") or module, align["target_name"]


def _aligned(space: PruningTargetSpace, target: str, source: Tensor | None) -> Tensor:
    """The mask that another target's mask implies: zero where its slice is zero throughout."""
    align = space.align or {}
    if source is None:
        raise UserError(f"expected {_name(space)} to align with a masked target, got {align}: is it in config_list?")
    kept = {d % source.ndim for d in align["dims"]}
    others = [d for d in range(source.ndim) if d not in kept]
    mask = source.bool().float().amax(others) if others else source.bool().float()
    shape = space.shape
    if shape is None:
        raise DataError(f"expected {_name(space)} to be seen while the data ran, it was not")
    axis = _channel_axis(space, target) if mask.ndim == 1 else 0
    module: Any = space._wrapper.module
    if isinstance(module, TRANSPOSED) and target == "bias" and len(mask) * module.groups == shape[0]:
        mask = mask.repeat(module.groups)  # a column of the weight stands for one channel in each of its blocks
    if list(mask.shape) != shape[axis : axis + mask.ndim]:
        raise UserError(f"expected {_name(space)!r} and the mask that it aligns with to have as many channels, "
                        f"got {shape} and {list(mask.shape)} of {align}")  # fmt: skip
    return mask.view(*[1] * axis, *mask.shape, *[1] * (len(shape) - axis - mask.ndim))


def channels_of(module: Any) -> int:
    names = ("num_features", "out_channels", "out_features")
    return next(int(getattr(module, name)) for name in names if hasattr(module, name))


def follower_shape(keep: Tensor, space: PruningTargetSpace, target: str) -> Tensor | None:
    """Zeros and ones [C], broadcastable to a target of a layer that follows; None where there is nothing to mask."""
    shape = space.shape
    if target.startswith("_output_"):
        return None if shape is None else keep.view(1, -1, *[1] * (len(shape) - 2))
    return None if shape is None or space.target is None else keep.view(-1, *[1] * (len(shape) - 1))
