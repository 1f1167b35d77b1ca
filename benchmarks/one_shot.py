"""B1: accuracy without fine-tuning. ResNet-20 and ResNet-56 on CIFAR-10 at 70, 50 and 30 % of their MACs.

    python benchmarks/one_shot.py --data DIR --weights DIR [--nets resnet20,resnet56] [--only WORDS] [--no-nni]
                                  [--json OUT] [--quick]

torch-pruning's criteria in its own pruner (one ratio a layer, and one threshold for the network), NNI's pruners, ours
as a drop-in importance (`DI`) and as `compress` with recovery=None. All prune the same groups, read the same 1,500
training images, and have their BatchNorm recalibrated on them; `compress` repairs its net instead, and chooses the
repair on training images of its own holdout. The test images are read once a row. Rows already in OUT are kept.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

from nni_contenders import nni_contenders
from protocol import Data, Notebook, Row, arguments, at_least, chosen, network, print_targets
from torch import nn

from diplugin.compare import compare
from diplugin.contenders import Contender, default_contenders

IMAGES = 1_500
TARGETS = {
    "resnet56": {"drop-in": {0.7: 92.0, 0.5: 88.0, 0.3: 72.0}, "compress": {0.7: 92.5, 0.5: 91.0, 0.3: 80.0}},
    "resnet20": {"drop-in": {0.7: 86.0, 0.5: 74.0, 0.3: 52.0}},
}  # fmt: skip


def form(name: str) -> str:
    """In which form a contender is offered: "other", "drop-in" or "compress"."""
    if not name.startswith("DI"):
        return "other"
    return "compress" if "compress" in name else "drop-in"


def run(name: str, model: nn.Module, data: Data, contenders: Sequence[Contender], args: argparse.Namespace,
        book: Notebook) -> None:  # fmt: skip
    """The rows of one network that the notebook does not hold."""
    fractions = (0.5,) if args.quick else (0.7, 0.5, 0.3)
    for contender in contenders:
        left = [f for f in fractions if not book.has(net=name, contender=contender.name, target=f)]
        if not left:
            continue
        result = compare(model, data.calibration(500 if args.quick else IMAGES),
                         example_inputs=(data.calibration(1)[0][0],), fractions=left, contenders=[contender],
                         test_loader=data.judge(1_000 if args.quick else None), holdout=data.holdout(2_000),
                         images=IMAGES)  # fmt: skip
        for row in result.rows:
            top1 = None if row.accuracy is None else 100 * row.accuracy
            book.add({"net": name, "contender": row.contender, "form": form(row.contender), "target": row.target,
                      "macs": row.macs, "params": row.params, "top1": top1, "seconds": row.seconds,
                      "base": 100 * result.base_accuracy})  # fmt: skip
        cells = "".join(f"{100 * r.accuracy:8.2f}" if r.accuracy is not None else "       –" for r in result.rows)
        print(f"{name:9} {contender.name:32}{cells}", flush=True)


def best(rows: Sequence[Row], net: str, target: float, kind: str) -> float | None:
    figures = [r["top1"] for r in rows if (r["net"], r["target"], r["form"]) == (net, target, kind)]
    return max((f for f in figures if f is not None), default=None)


def targets_of(rows: Sequence[Row], names: Sequence[str], fractions: Sequence[float]) -> list[Row]:
    targets = []
    for net in names:
        for kind, bounds in TARGETS[net].items():
            targets += [at_least(f"{net}, {kind}, {f:.0%} MACs, top-1", bounds[f], best(rows, net, f, kind))
                        for f in fractions]  # fmt: skip
        for f in fractions:
            other = best(rows, net, f, "other")
            for kind in ("drop-in", "compress"):
                ours = best(rows, net, f, kind)
                ahead = None if ours is None or other is None else ours - other
                targets.append(at_least(f"{net}, {kind}, {f:.0%} MACs, points ahead of every other", 0.0, ahead))
    return targets


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--nets", default="resnet20,resnet56")
    parser.add_argument("--no-nni", action="store_true", help="leave NNI's pruners out")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    names = ["resnet20"] if args.quick else args.nets.split(",")
    book = Notebook(None if args.json is None else Path(args.json), ("net", "contender", "target"))
    data = Data.read(args.data)
    contenders = [*default_contenders(), *([] if args.no_nni else nni_contenders())]
    for name in names:
        run(name, network(name, args.weights), data, list(chosen(contenders, args.only)), args, book)
    targets = targets_of(book.rows, names, (0.5,) if args.quick else (0.7, 0.5, 0.3))
    book.write(targets)
    print_targets(targets)


if __name__ == "__main__":
    main()
