"""From a masked model to a smaller one: NNI's wrappers come off, masked channels go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from diplugin.masks import remove_masked


def speedup(model: nn.Module, masks: Mapping[str, Mapping[str, Tensor | None]], example_inputs: Any) -> nn.Module:
    """Physically remove masked channels, in place; returns the model, which computes what the masked one did.

    NNI's wrappers are taken off first. Channels that only some of the layers tied by a shortcut mask stay, as zeros.
    Unlike NNI's `ModelSpeedup` it follows torch-pruning's dependency graph, and so works on today's torch.

    Args:
        masks: as `Pruner.compress` or `Pruner.get_masks` return them; other pruners' too, whose BatchNorms are not
            masked: there the smaller model equals the masked one up to those BatchNorms' shifts.
        example_inputs: a tensor, or a tuple of positional inputs.

    Raises:
        ModelError: the model does not run on the example inputs.
        PlanError: the masks are another model's.

    >>> _, masks = pruner.compress()  # doctest: +SKIP
    >>> small = speedup(model, masks, torch.randn(1, 3, 32, 32))  # doctest: +SKIP
    """
    unwrap(model)
    return remove_masked(model, masks, as_tuple(example_inputs))


def unwrap(model: nn.Module) -> None:
    """Take NNI's wrappers off, whoever put them on."""
    for module in list(model.modules()):
        wrapper = getattr(module, "_nni_wrapper", None)
        if wrapper is not None:
            wrapper.unwrap()


def as_tuple(inputs: Any) -> tuple[Any, ...]:
    """Positional inputs, of which one may have come alone."""
    return inputs if isinstance(inputs, tuple) else (inputs,)
