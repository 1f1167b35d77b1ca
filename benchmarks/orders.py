"""Which order of channels recovers best at uniform widths, and which repair? Many small networks, one cut of each.

    python benchmarks/orders.py --data DIR [--bases DIR] [--seeds 0,1,2,3,4,5,6,7] [--fractions .5,.3] [--only WORDS]
                                [--against NAME] [--teacher SHARE] [--compile] [--json OUT] [--quick]

Orders that are near each other choose different channels in one network, and which of two such cuts recovers better
is luck: half a point either way, more than lies between the orders. Only many networks tell. So images are halved to
16x16 here, where a ResNet-20 trains in minutes, and every seed is a network of its own: trained from scratch on 35,000
images, cut at uniform widths by every order, recovered as in B2 (10 epochs on 20,000 images, lr .02), judged on 15,000
training images that it has never seen. What counts is the difference to L2 on the same network, its mean and error.
Orders at DI's own widths are asked for in the same way, `--only "DI, global;energy and norms, global" --against
"DI, global"`, and repairs of `compress`'s plan, `--only "DI, refitted" --against "DI, refitted"`.
`--bases` keeps the unpruned networks; rows in OUT are kept, and several commands with other seeds may share it.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from cuts import Cuts
from fine_tune import SHORT, Bench, Setting
from fine_tune_variants import orders, repairs
from protocol import Data, Notebook, Row, arguments, chosen
from torch import Tensor
from training import Recipe, from_scratch

from diplugin.contenders import default_contenders
from examples import cifar_resnet

LEARNED = 35_000
#: As B2's recipes, with shifts that are the same share of an image.
LEARNING = Recipe(epochs=20, images=LEARNED, lr=0.1, shift=2)
RECOVERY = replace(SHORT["recipe"], shift=2)


def halved(data: Data) -> Data:
    """At 16x16, and all training images behind the first `LEARNED` held out too."""
    (x, y), (x_held, y_held) = data.train, data.held
    held = torch.cat([x[LEARNED:], x_held]), torch.cat([y[LEARNED:], y_held])
    return Data((_halved(x[:LEARNED]), y[:LEARNED]), (_halved(held[0]), held[1]), (_halved(data.test[0]), data.test[1]))


def _halved(x: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(x.float(), 2).round().to(torch.uint8)


def ahead_of(yardstick: str, rows: Sequence[Row], setting: Setting, fraction: float) -> dict[str, list[float]]:
    """Contender -> points ahead of the yardstick on the same network, for every network that has both."""
    mine = [row for row in rows if {**setting.key, "target": fraction}.items() <= row.items()]
    found = {(row["contender"], row["seed"]): row["top1"] for row in mine}
    ahead: dict[str, list[float]] = {}
    for (name, seed), top1 in found.items():
        if name != yardstick and (yardstick, seed) in found:
            ahead.setdefault(name, []).append(top1 - found[yardstick, seed])
    return ahead


def main() -> None:
    parser = arguments(__doc__, weights=False)
    parser.add_argument("--bases", type=Path, metavar="DIR", help="where unpruned networks are kept and looked for")
    parser.add_argument("--seeds", default="0,1,2,3,4,5,6,7", help="one network each")
    parser.add_argument("--fractions", default=".5,.3", help="of the MACs")
    parser.add_argument("--against", default="L2, local", metavar="NAME", help="whom to compare with")
    parser.add_argument("--teacher", type=float, default=0.0, metavar="SHARE", help="of the loss while recovering")
    parser.add_argument("--compile", dest="compiled", action="store_true", help="train compiled")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    data = halved(Data.read(args.data))
    learning = replace(LEARNING, compiled=args.compiled)
    recovery = replace(RECOVERY, compiled=args.compiled, teacher_weight=args.teacher)
    if args.quick:
        args.seeds = "0"
        learning, recovery = (replace(recipe, epochs=1, images=3_000) for recipe in (learning, recovery))
    fractions = tuple(float(f) for f in args.fractions.split(","))
    setting = Setting("resnet20, 16 px", fractions, recovery, judge="holdout")
    book = Notebook(args.json, (*setting.key, "contender", "target", "seed"))
    everybody = [*default_contenders(compress=False), *orders(), *repairs()]
    wanted = list(chosen(everybody, args.only or "L2, local;DI, local;energy and norms, local;norms twice, local"))
    for seed in (int(seed) for seed in args.seeds.split(",")):
        kept = args.bases and args.bases / f"resnet20-16px-{learning.epochs}-{seed}.safetensors"
        model = from_scratch(cifar_resnet.resnet20, learning, *data.training(0, learning.images), seed, kept)
        bench = Bench(setting, data, model, book, data.holdout(len(data.held[1])), Cuts(None, lambda m=model: m))
        bench.run(wanted, [seed])
    for fraction in fractions:
        for name, ahead in ahead_of(args.against, book.rows, setting, fraction).items():
            error = statistics.stdev(ahead) / len(ahead) ** 0.5 if len(ahead) > 1 else float("nan")
            print(f"{fraction:4.0%} {name:32} {statistics.mean(ahead):+.2f} ± {error:.2f} against {args.against}, "
                  f"{len(ahead)} networks")  # fmt: skip
    book.write([])


if __name__ == "__main__":
    main()
