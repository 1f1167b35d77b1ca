"""What each part of the default selection and repair is worth, judged on training images that nobody else reads.

    python benchmarks/selection_study.py --data DIR --weights DIR [--nets resnet20,resnet56] [--only WORDS]
                                         [--json OUT] [--quick]

Every row changes one thing about a common point of departure, channels ranked by loss and energy: drop-in rows one
option of `DIImportance`, repair rows the repair of `compress`'s plan, the rows behind them one thing about `compress`
with its refit. One of them, `ranked by norms too`, is the default today. No row sees a test image: this is where
defaults are chosen, `one_shot.py` is where they are judged.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diplugin_torch_pruning import PLAIN
from protocol import Data, Notebook, Row, arguments, chosen, network
from torch import nn

from diplugin.compare import compare
from diplugin.contenders import Compress, Contender, drop_in
from diplugin.fitted_scores import MACs
from diplugin.ranking import BY_ENERGY_AND_NORMS, ByAll, ByBoth, ByEnergy, ByLoss
from diplugin.recovery import Compensate, Cut, Recalibrate, Reconstruct, Repair, recalibrate_batchnorm
from diplugin.recovery.reconstruction import Reconstruction
from diplugin.search import SearchLimits
from diplugin.strategies import OneShot
from diplugin.taps import AtLayer, AtNorm

IMAGES = 1_500
DEPARTURE: dict[str, Any] = {"ranking": ByBoth()}


def drop_ins() -> list[Contender]:
    """The point of departure, and one thing changed."""
    variants = {
        "departure": {},
        "loss as it is": dict(PLAIN),
        "loss per MAC, ranked by loss": {"ranking": ByLoss(), "per_cost": MACs()},
        "ranked by energy": {"ranking": ByEnergy()},
        "ranked by norms too": {"ranking": ByAll()},
        "ranked by energy and norms": {"ranking": BY_ENERGY_AND_NORMS},
        "no floor": {"floor": 0.0},
        "rho 1": {"rho": 1.0},
        "rho 100": {"rho": 100.0},
        "layer output": {"tap": AtLayer()},
        "norm output": {"tap": AtNorm()},
        "chunks of 125": {"chunk_size": 125},
        "chunks of 500": {"chunk_size": 500},
    }
    return [drop_in(f"DI, {name}", True, **{**DEPARTURE, **options}) for name, options in variants.items()]


@dataclass(frozen=True)
class RefitRecalibrated:
    """The refit, and new BatchNorm statistics on top of it; for comparison."""

    name: str = "reconstruction, recalibrated"

    def repaired(self, cut: Cut) -> nn.Module:
        return recalibrate_batchnorm(Reconstruct().repaired(cut), cut.loader, images=cut.images)


def repairs() -> list[Contender]:
    """`compress` without a gradient step, held to one repair."""
    kinds: tuple[Repair, ...] = (Recalibrate(), Compensate(), Reconstruct(), RefitRecalibrated())
    return [Compress(f"compress, {kind.name}", OneShot(repairs=(kind,), **DEPARTURE)) for kind in kinds]


def refits() -> list[Contender]:
    """`compress` with its refit, and one thing changed."""
    once = partial(OneShot, repairs=(Reconstruct(),), **DEPARTURE)
    variants = {
        "ridge 1e-4": once(repairs=(Reconstruct(Reconstruction(ridge=1e-4)),)),
        "ridge 1e-1": once(repairs=(Reconstruct(Reconstruction(ridge=1e-1)),)),
        "refit on 250 images": once(repairs=(Reconstruct(Reconstruction(images=250)),)),
        "ranked by loss": once(ranking=ByLoss()),
        "ranked by energy": once(ranking=ByEnergy()),
        "ranked by norms too": once(ranking=ByAll()),
        "ranked by energy and norms": once(ranking=BY_ENERGY_AND_NORMS),
        "rho 1": once(rho=1.0),
        "rho 100": once(rho=100.0),
        "layer output": once(tap=AtLayer()),
        "no floor": once(limits=SearchLimits(floor=0.0)),
        "floor of 0.2": once(limits=SearchLimits(floor=0.2)),
    }
    return [Compress(f"compress, {name}", strategy) for name, strategy in variants.items()]


def run(name: str, model: nn.Module, data: Data, contenders: Sequence[Contender], args: argparse.Namespace,
        book: Notebook) -> None:  # fmt: skip
    fractions = (0.5,) if args.quick else (0.5, 0.3)
    for contender in contenders:
        left = [f for f in fractions if not book.has(net=name, contender=contender.name, target=f)]
        if not left:
            continue
        result = compare(model, data.calibration(500 if args.quick else IMAGES),
                         example_inputs=(data.calibration(1)[0][0],), fractions=left, contenders=[contender],
                         test_loader=data.holdout(500 if args.quick else 3_000), images=IMAGES)  # fmt: skip
        rows: list[Row] = [
            {"net": name, "contender": r.contender, "target": r.target, "macs": r.macs,
             "holdout": None if r.accuracy is None else 100 * r.accuracy} for r in result.rows
        ]  # fmt: skip
        for row in rows:
            book.add(row)
        cells = "".join(f"{r['holdout']:8.2f}" if r["holdout"] is not None else "       –" for r in rows)
        print(f"{name:9} {contender.name:34}{cells}", flush=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--nets", default="resnet20,resnet56")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    names = ["resnet20"] if args.quick else args.nets.split(",")
    book = Notebook(None if args.json is None else Path(args.json), ("net", "contender", "target"))
    data = Data.read(args.data)
    contenders = [*drop_ins()[: 3 if args.quick else None], *repairs(), *([] if args.quick else refits())]
    for name in names:
        run(name, network(name, args.weights), data, list(chosen(contenders, args.only)), args, book)
    book.write([])


if __name__ == "__main__":
    main()
