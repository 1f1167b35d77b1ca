"""torch-pruning's dependency graph of a model: built with the model left as it was, or refused in one line.

torch-pruning follows `grad_fn` from outputs back to weights. What would make it give no groups without a word (frozen
weights, detached outputs, NaN, compiled code), fail in its own terms or never come back is caught here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch.utils import _pytree as pytree
from torch_pruning.dependency import graph as graph_module

from .errors import ModelError, first_line
from .modes import evaluating


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Eval mode and gradients on for every floating parameter, both as before afterwards.

    torch-pruning follows `grad_fn`: a frozen backbone would silently give no groups.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for p in frozen:
            p.requires_grad_(True)
        with evaluating(model), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def frozen_kept(model: nn.Module) -> Iterator[None]:
    """Parameters that the block replaces, which would all ask for gradients, do so only where the old ones did."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    yield
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)


def dependency_graph(
    model: nn.Module, example_inputs: tuple[Any, ...], forward: Callable[..., Any] | None = None
) -> tp.DependencyGraph:
    """torch-pruning's graph of the model; modes and `requires_grad` are left as they were.

    Args:
        forward: runs the model on the inputs; None for `model(*example_inputs)`.

    Raises:
        ModelError: the model does not run on the example inputs, or cannot be followed.
    """
    _check_model(model)
    if not isinstance(example_inputs, tuple):
        raise ModelError(f"expected example_inputs as a tuple such as (x,), got {type(example_inputs).__name__}")
    with traceable(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # Once without torch-pruning, which would hide why a call fails and leave its hooks behind.
            output = model(*example_inputs) if forward is None else forward(model, example_inputs)
        except Exception as error:
            shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__ for x in example_inputs]
            raise ModelError(
                f"expected a model that runs on example inputs of shapes {shapes}, got {type(error).__name__}: "
                f"{first_line(error)}; check --example-shape and the model's first layers"
            ) from error
        _check_output(model, output)
        try:
            # torch-pruning's annotation leaves out its own default, None.
            how: dict[str, Any] = {"forward_fn": forward, "verbose": False}
            return tp.DependencyGraph().build_dependency(model, example_inputs, **how)
        except Exception as error:
            raise ModelError(
                f"expected a model that torch-pruning can follow, got {type(error).__name__}: {first_line(error)}; "
                "it cannot where channels are split and joined again, or where a one-slope PReLU is concatenated"
            ) from error


def _check_model(model: nn.Module) -> None:
    """Raise ModelError unless it is a module whose layers can be seen."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    compiled = next((name for name, module in model.named_modules() if _is_compiled(module)), None)
    if compiled is not None:
        raise ModelError(
            f"expected a model before torch.compile, which hides its layers, got one compiled at {compiled!r}; pass "
            "what was compiled (a wrapper's _orig_mod, or the model made anew), and compile what comes out"
        )


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has wrapped a module, or compiled it in its place; asked without loading the compiler."""
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The tensors anywhere in what a model returns."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _check_output(model: nn.Module, output: Any) -> None:
    """Raise ModelError unless there is a graph to follow from the output back to the weights."""
    tensors = tensors_of(output)
    if not tensors and not isinstance(output, Mapping):
        raise ModelError(
            f"expected a model that returns tensors, alone or in a tuple, list or dict, got {type(output).__name__}; "
            "wrap it in a module that does"
        )
    if any(t.is_floating_point() and bool(t.isnan().any()) for t in tensors):
        raise ModelError("expected numbers from the model, it returns NaN on the example inputs; check its weights")
    weights = any(p.requires_grad for p in model.parameters())
    if tensors and weights and not any(t.requires_grad for t in tensors):
        raise ModelError(
            "expected an output that depends on the model's weights, got one without gradients; return it undetached"
        )


@contextmanager
def bounded(members: int) -> Iterator[None]:
    """Stop torch-pruning where it would go on for ever: a slice that is concatenated again shifts at every turn.

    Real networks stay far below the bound: no group of DenseNet-121's 433 modules has more than 102 members.
    """
    original = graph_module.Group

    class Bounded(original):
        def add_dep(self, dep: Any, idxs: Any) -> None:
            if len(self) > members:
                raise ModelError(
                    f"expected a model that torch-pruning can follow, it goes in circles at {dep.target.name}; "
                    "it cannot where channels are split or sliced and joined again"
                )
            super().add_dep(dep, idxs)

    graph_module.Group = Bounded
    try:
        yield
    finally:
        graph_module.Group = original
