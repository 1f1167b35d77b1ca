"""What the accuracy benchmarks share: the networks, CIFAR-10 and its split, rows and targets.

The test split is read by `Data.judge` alone, at the end of a row. What is chosen is chosen on `Data.holdout`,
the last 5,000 training images, which nobody calibrates or trains on. The networks' makers did, though, and the networks
know them by heart: `Data.unfamiliar` shows the same images turned, scaled and dimmed, to tell learning from memory.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diplugin.contenders import Case, Contender
from diplugin.disguise import disguised
from diplugin.network import trace_network

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples are not installed

from examples import cifar_resnet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HOLDOUT = 5_000
CHUNK = 250
Row = dict[str, Any]
Batches = list[tuple[Tensor, Tensor]]


def network(name: str, weights: Path) -> nn.Module:
    """`resnet20` or `resnet56` with its CIFAR-10 weights, in eval mode."""
    model = getattr(cifar_resnet, name)()
    model.load_state_dict(load_file(weights / f"cifar10_{name}.safetensors"))
    return model.eval()


@dataclass(frozen=True)
class Data:
    """CIFAR-10 as uint8 [N, 3, 32, 32], in one fixed, mixed order, less the holdout."""

    train: tuple[Tensor, Tensor]
    held: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def read(cls, folder: Path, seed: int = 0) -> Data:
        """`train.npz` and `test.npz` with x [N, 32, 32, 3] and y [N]."""
        x, y = read_npz(folder / "train.npz")
        order = torch.randperm(len(x) - HOLDOUT, generator=torch.Generator().manual_seed(seed))
        return cls((x[order], y[order]), (x[-HOLDOUT:], y[-HOLDOUT:]), read_npz(folder / "test.npz"))

    def calibration(self, images: int) -> Batches:
        """Training images for scores, recalibration and repairs."""
        return _batches(*self.train, 0, images)

    def holdout(self, images: int = HOLDOUT) -> Batches:
        """Training images that choices are made by."""
        return _batches(*self.held, 0, images)

    def unfamiliar(self, images: int = HOLDOUT) -> Batches:
        """The holdout as nobody has seen it: turned by up to 20°, scaled by up to a fifth, lighter or darker."""
        draw = torch.Generator().manual_seed(0)
        return [(disguised(x, draw, flip=True), y) for x, y in self.holdout(images)]

    def judge(self, images: int | None = None) -> Batches:
        """Test images."""
        return _batches(*self.test, 0, images or len(self.test[1]))

    def training(self, first: int, images: int) -> tuple[Tensor, Tensor]:
        """Normalised images [N, 3, 32, 32] and labels to train on; give a `first` behind the calibration images."""
        x, y = (t[first : first + images] for t in self.train)
        return normalised(x), y


def read_npz(path: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, H, W] and labels [N] of a file with x [N, H, W, 3] and y."""
    with np.load(path) as data:
        return torch.from_numpy(data["x"]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(data["y"])


def normalised(x: Tensor) -> Tensor:
    """ImageNet's mean and deviation, which these weights were trained with."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (x.float() / 255 - mean) / std


def _batches(x: Tensor, y: Tensor, first: int, count: int) -> Batches:
    return [(normalised(x[i : min(i + CHUNK, first + count)]), y[i : min(i + CHUNK, first + count)])
            for i in range(first, first + count, CHUNK)]  # fmt: skip


def case_of(model: nn.Module, data: Data, images: int) -> Case:
    """What every contender is given: calibration images, and a holdout for those that choose."""
    inputs = (data.calibration(1)[0][0],)
    return Case(model, inputs, trace_network(model, inputs), data.calibration(images), data.holdout(2_000))


def prune(contender: Contender, case: Case, fractions: Sequence[float]) -> Mapping[float, nn.Module | None]:
    """A contender's networks, seeded."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return contender.prune(case, fractions)


def arguments(description: str | None, weights: bool = True) -> argparse.ArgumentParser:
    """What every benchmark of this kind takes; `weights` where it begins with published networks."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of train.npz and test.npz of CIFAR-10")
    if weights:
        parser.add_argument("--weights", type=Path, required=True, help="folder of the networks' safetensors")
    parser.add_argument("--json", type=Path, help="where rows and targets are written; rows found there are kept")
    parser.add_argument("--quick", action="store_true", help="a minute's version")
    parser.add_argument("--only", help="contenders whose names contain one of these words, separated by ;")
    return parser


class Notebook:
    """Rows of a benchmark, written after each one and taken up again where the file exists.

    Several processes may write into one file: each adds its rows to those that it finds there.
    """

    def __init__(self, path: Path | None, keys: Sequence[str]) -> None:
        self._path, self.keys = path, tuple(keys)
        self.rows: list[Row] = []
        self._read()

    def has(self, **key: Any) -> bool:
        return any(all(row.get(k) == key[k] for k in self.keys) for row in self.rows)

    def beside(self, row: Row) -> Path | None:
        """A file for what becomes of this row, apart from every other row's; None where nothing is written."""
        if self._path is None:
            return None
        name = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]
        return self._path.with_name(f"{self._path.stem}-{name}.safetensors")

    def add(self, row: Row) -> None:
        with self._alone():
            self._read()
            self.rows.append(row)
            self.write([])

    def write(self, targets: Sequence[Row]) -> None:
        if self._path is None:
            return
        whole = Path(f"{self._path}.{os.getpid()}")
        whole.write_text(json.dumps({"rows": self.rows, "targets": list(targets)}, indent=1), encoding="utf-8")
        whole.replace(self._path)  # at once: nobody reads half a file, and a kill leaves the old one

    def _read(self) -> None:
        if self._path is not None and self._path.exists():
            self.rows = json.loads(self._path.read_text(encoding="utf-8"))["rows"]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process reads or writes the file meanwhile."""
        if self._path is None:
            yield
            return
        folder = os.open(self._path.resolve().parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def chosen(names: Sequence[Any], only: str | None) -> Iterator[Any]:
    """Contenders whose names contain one of the words."""
    words = [word.strip().lower() for word in (only or "").split(";")]
    return (c for c in names if any(word in c.name.lower() for word in words))


def at_least(name: str, bound: float, value: float | None) -> Row:
    """One target; not met where nothing was measured."""
    return {"name": name, "target": f">= {bound:g}", "value": value, "met": value is not None and value >= bound}


def print_targets(targets: Sequence[Row]) -> None:
    for target in targets:
        value = "not measured" if target["value"] is None else f"{target['value']:.2f}"
        print(f"{'met   ' if target['met'] else 'MISSED'}  {target['name']}: {value} (target {target['target']})")


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start
