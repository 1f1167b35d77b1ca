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
from functools import partial
from pathlib import Path

from nni_contenders import nni_contenders
from protocol import (
    Data,
    Notebook,
    Row,
    arguments,
    at_least,
    case_of,
    chosen,
    network,
    print_targets,
    prune,
    timed,
)
from torch import nn

from diplugin.accuracy import accuracy
from diplugin.compare import count_macs
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
    case = case_of(model, data, 500 if args.quick else IMAGES)
    judged = data.judge(1_000 if args.quick else None)
    row: Row = {"net": name, "contender": "unpruned", "form": "unpruned", "target": 1.0}
    if not book.has(**row):
        book.add({**row, "macs": 1.0, "top1": 100 * accuracy(model, judged), "seconds": 0.0})
    for contender in contenders:
        row = {"net": name, "contender": contender.name, "form": form(contender.name)}
        left = [f for f in fractions if not book.has(**row, target=f)]
        if not left:
            continue
        pruned, seconds = timed(partial(prune, contender, case, left))
        for fraction, net in pruned.items():
            top1 = None if net is None else 100 * accuracy(net, judged)
            macs = None if net is None else count_macs(net, case.inputs) / count_macs(model, case.inputs)
            book.add({**row, "target": fraction, "macs": macs, "top1": top1, "seconds": seconds / len(left)})
            figure = "out of reach" if top1 is None else f"{top1:6.2f}"
            print(f"{name:9} {contender.name:32} {fraction:4.0%} {figure}", flush=True)


def print_table(rows: Sequence[Row], fractions: Sequence[float]) -> None:
    """Contenders down, networks and fractions across, best first at the middle fraction of the first network."""
    columns = [(net, f) for net in dict.fromkeys(r["net"] for r in rows) for f in fractions]
    at = {(r["contender"], r["net"], r["target"]): r["top1"] for r in rows}
    names = [n for n in dict.fromkeys(r["contender"] for r in rows) if n != "unpruned"]
    net, middle = columns[len(fractions) // 2]
    print("\n" + " " * 32 + "".join(f"{f'{net} {f:.0%}':>15}" for net, f in columns))
    for name in sorted(names, key=lambda n: -(at.get((n, net, middle)) or 0.0)):
        found = [at.get((name, *column)) for column in columns]
        print(f"{name:32}" + "".join("–".rjust(15) if f is None else f"{f:15.2f}" for f in found))


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
    fractions = (0.5,) if args.quick else (0.7, 0.5, 0.3)
    targets = targets_of(book.rows, names, fractions)
    book.write(targets)
    print_table(book.rows, fractions)
    print_targets(targets)


if __name__ == "__main__":
    main()
