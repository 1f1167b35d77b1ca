"""Networks drawn at random: whatever is found prunable is cut as predicted, and computes what the masked one computes.

The drawn graphs mix branches, sums, gates, concatenations, depthwise and grouped convolutions in ways that nobody
designs, so that the check behind `trace_network` meets what no list of kinds foresees. (Slices and chunks that are
concatenated again are not drawn: torch-pruning refuses some of them, and follows others without end.)
"""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_plans import masked, random_plan
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from diplugin.costs import PeakActivationMemory, macs, params
from diplugin.network import trace_network
from diplugin.surgery import apply_plan

INPUTS = (torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)),)


class Drawn(nn.Module):
    """A random graph of layers over maps of one size; step k reads tensors made before it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._draw = random.Random(seed)
        self.layers = nn.ModuleList()
        self._steps: list[tuple[str, Any, int]] = []
        self._widths = [self._layer(nn.Conv2d(3, 8, 3, padding=1), 0, 8)]
        for _ in range(self._draw.randint(2, 9)):
            source = self._draw.randrange(max(0, len(self._widths) - 3), len(self._widths))
            self._grow(source, self._widths[source])
        self._flat = self._draw.random() < 0.4
        self._returned = self._draw.randrange(len(self._widths)) if self._draw.random() < 0.2 else None
        self.head = nn.Linear(self._widths[-1] * (36 if self._flat else 1), 5)

    def _layer(self, layer: nn.Module, source: int, width: int) -> int:
        self.layers.append(layer)
        self._steps.append(("layer", len(self.layers) - 1, source))
        return width

    def _grow(self, source: int, width: int) -> None:
        draw, widths = self._draw, self._widths
        equals = [i for i, w in enumerate(widths) if w == width and i != source]
        kinds = ["conv", "conv", "grouped", "depthwise", "norm", "prelu", "relu", "add", "gate", "cat"]
        match draw.choice(kinds):
            case "conv":
                out = draw.choice([4, 6, 8, 12])
                conv = nn.Conv2d(width, out, draw.choice([1, 3]), padding="same", bias=draw.random() < 0.5)
                widths.append(self._layer(conv, source, out))
            case "grouped" if width % 2 == 0:
                out = 2 * draw.choice([2, 3, 5])
                widths.append(self._layer(nn.Conv2d(width, out, 3, padding=1, groups=2), source, out))
            case "depthwise":
                widths.append(self._layer(nn.Conv2d(width, width, 3, padding=1, groups=width), source, width))
            case "norm":
                norm = nn.BatchNorm2d(width)
                nn.init.uniform_(norm.running_var, 0.5, 2.0)
                nn.init.normal_(norm.bias)
                widths.append(self._layer(norm, source, width))
            case "prelu":
                widths.append(self._layer(nn.PReLU(width), source, width))
            case "add" | "gate" as kind if equals:
                self._steps.append((kind, draw.choice(equals), source))
                widths.append(width)
            case "cat":
                other = draw.randrange(len(widths))
                self._steps.append(("cat", other, source))
                widths.append(width + widths[other])
            case _:
                self._steps.append(("relu", None, source))
                widths.append(width)

    def forward(self, x: Tensor) -> Any:
        made: list[Tensor] = []
        for kind, other, source in self._steps:
            made.append(self._step(kind, other, made[source] if made else x, made))
        x = self.head(made[-1].flatten(1) if self._flat else made[-1].mean((2, 3)))
        return x if self._returned is None else (x, made[self._returned])

    def _step(self, kind: str, other: Any, x: Tensor, made: list[Tensor]) -> Tensor:
        match kind:
            case "layer":
                return self.layers[other](x)
            case "relu":
                return F.relu(x)
            case "add":
                return x + made[other]
            case "gate":
                return x * made[other].sigmoid()
            case _:
                return torch.cat([x, made[other]], 1)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_found_prunable_is_cut_as_predicted(seed: int) -> None:
    torch.manual_seed(seed)
    model = Drawn(seed).eval()
    trace = trace_network(model, INPUTS)
    plan = random_plan(trace, random.Random(seed))
    pruned = apply_plan(copy.deepcopy(model), plan, INPUTS)
    images = torch.randn(3, 3, 6, 6)
    with torch.no_grad():
        got, want = tree_leaves(pruned(images)), tree_leaves(masked(model, trace, plan.removed)(images))
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4 * float(1 + two.abs().max()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pruned(*INPUTS)
    assert macs(trace).cost(plan.widths) == counter.get_total_flops() / 2
    assert params(trace).cost(plan.widths) == sum(p.numel() for p in pruned.parameters())
    after = PeakActivationMemory(trace_network(pruned, INPUTS, verify=False))
    assert PeakActivationMemory(trace).cost(plan.widths) == pytest.approx(after.base)


def test_most_of_them_have_something_to_prune() -> None:
    """So that the test above does not pass by finding nothing."""
    prunable = [len(trace_network(Drawn(seed).eval(), INPUTS).prunable) for seed in range(10)]
    assert sum(count > 0 for count in prunable) >= 5
