"""The embedded default: scikit-learn's digits, a small residual CNN trained on the spot, and this very machine.

Everything that diplugin does, on data that needs no download, in a minute or two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .costs import Budget
from .latency import profile_here
from .network import trace_network
from .pipeline import CompressionResult, compress
from .recovery import Distillation, FineTuning, train
from .search import SearchLimits
from .sources import DataSource, load_data
from .tables import LatencyTable

_PROFILE_SECONDS = 30.0


class Block(nn.Module):
    """y = relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), with a 1x1 convolution where the shape changes."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual CNN for 24 x 24 digits: 90 M MACs, a millisecond or more on one core."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.stage1 = Block(32, 80)
        self.stage2 = Block(80, 112, stride=2)
        self.stage3 = Block(112, 144, stride=2)
        self.head = nn.Linear(144, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.head(x.mean((2, 3)))


def digits_net() -> DigitsNet:
    """The demo's network, untrained: `diplugin.demo:digits_net` on the command line."""
    return DigitsNet()


@dataclass(frozen=True)
class Demo:
    """What the demo does: a network, budgets as fractions of the unpruned cost, and how it trains."""

    macs: float = 0.5
    latency: float = 0.6
    epochs: int = 5
    recovery_epochs: int = 4
    seed: int = 0

    def run(self, out: Path, tell: Callable[[str], None]) -> CompressionResult:
        """Train, profile, prune, recover, export, verify and report into the folder `out`."""
        source = load_data("digits", batch_size=64)
        model = self.trained(source, tell)
        inputs = (torch.zeros(1, 1, 24, 24),)
        tell("profiling this machine (ONNX Runtime, one thread)")
        table = self.profiled(model, inputs)
        tell(f"profiled: {len(table.entries)} operators, {len(table.nets)} whole nets")
        return compress(
            model, source.train, example_inputs=inputs,
            budgets=[Budget("macs", fraction=self.macs), Budget("latency_ms", fraction=self.latency)],
            latency_table=table, recovery=Distillation(epochs=self.recovery_epochs), limits=SearchLimits(align=1),
            test_loader=source.test, out=out, seed=self.seed, tell=tell,
            source={"source": "diplugin.demo:digits_net", "data": "digits"},
        )  # fmt: skip

    def trained(self, source: DataSource, tell: Callable[[str], None]) -> nn.Module:
        """The demo's network after a few epochs on digits."""
        torch.manual_seed(self.seed)
        model = digits_net()
        shuffled = torch.utils.data.DataLoader(source.train.dataset, batch_size=64, shuffle=True)

        def say(report: Any) -> None:
            tell(f"training the digits net: epoch {report.epoch} of {report.epochs}, loss {report.loss:.3f}")

        return train(model, shuffled, FineTuning(epochs=self.epochs, lr=0.05), seed=self.seed, on_epoch=say).eval()

    def profiled(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> LatencyTable:
        """A calibrated latency table of this machine for this network."""
        trace = trace_network(model, inputs)
        return profile_here(model, inputs, trace=trace, name="digits-net", budget_s=_PROFILE_SECONDS)
