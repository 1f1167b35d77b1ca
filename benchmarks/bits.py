"""B6: bits per channel. File size on disk and accuracy as ONNX Runtime gives it, ResNet-20 and ResNet-56 on CIFAR-10.

    python benchmarks/bits.py --data DIR --weights DIR [--nets resnet20,resnet56] [--pruned] [--finetune EPOCHS]
                              [--fractions 0.6,0.5,0.45] [--strategies di,uniform,…]
                              [--json OUT] [--quick]

For every network: float32, 8 bits everywhere, then mixed bits at fractions of that file's size, allocated by DI,
by output error, uniformly, by magnitude and at random: same rounding, same search, same grids. Calibration takes 500
training images; every setting was chosen on other training images; the test split is read once per file. `--pruned`
first prunes the network to 70 % of its MACs (`compress`, short epochs of distillation on 5,000 training images) and
compares with the pruned network's own float accuracy. Agreement of ONNX Runtime with the fake-quantized torch model is
over 500 test images, as is the divergence (mean KL of the file's predictions from float32's), which still tells files
apart whose accuracy is that of float32. Latency is one image, one thread, median, measured here in the same run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import network, normalised, read_npz
from torch import Tensor, nn

from diplugin import Budget
from diplugin.export import export_onnx
from diplugin.onnx_inference import onnx_accuracy, run_onnx
from diplugin.quantize import (
    Bits,
    DIBits,
    MagnitudeBits,
    OutputErrorBits,
    QuantizedResult,
    Quantizer,
    RandomBits,
    UniformBits,
    export_quantized,
)
from diplugin.recovery import Distillation, train

STRATEGIES = (DIBits(), OutputErrorBits(), UniformBits(), MagnitudeBits(), RandomBits())
FRACTIONS = "0.5"
CHECKED = 500
Rows = list[dict[str, Any]]


def images(folder: Path, split: str, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Normalised images [N, 3, 32, 32] and labels [N] of one part of a split, in the file's order."""
    x, y = read_npz(folder / f"{split}.npz")
    return normalised(x[first:last]), y[first:last]


def batches(x: Tensor, y: Tensor, size: int = 250) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def pruned(model: nn.Module, folder: Path, epochs: int) -> nn.Module:
    """At 70 % of the MACs, recovered by short epochs, or by no gradient step at all."""
    from diplugin import compress

    x, y = images(folder, "train", 10_000, 15_000)
    result = compress(model, batches(x, y, 100), example_inputs=(x[:1],), budgets=[Budget("macs", fraction=0.7)],
                      images=1000, recovery=Distillation(epochs=epochs, lr=0.01) if epochs else None)  # fmt: skip
    return result.model


def latency_ms(path: Path) -> float:
    from diplugin.latency import measure_onnx

    return measure_onnx(path).latency_ms


class Bench:
    """One network: its rows, measured one after the other."""

    def __init__(self, name: str, model: nn.Module, args: argparse.Namespace, scratch: Path) -> None:
        self.name, self.model, self.args, self.scratch = name, model, args, scratch
        self.calibration = batches(*images(args.data, "train", 0, 500))
        self.test = batches(*images(args.data, "test", 0, 1000 if args.quick else args.test_images))
        self.example = (self.calibration[0][0][:1],)

    def rows(self) -> Iterator[dict[str, Any]]:
        yield self.float_row()
        quantizer = Quantizer(self.model, self.calibration, self.example, Bits())
        eight = self.row("uniform 8", quantizer.at(quantizer.uniform(8)), 1.0)
        yield eight
        yield self.row("uniform 4", quantizer.at(self.ends(quantizer, 4)), None, eight)
        for fraction in [0.45] if self.args.quick else [float(f) for f in self.args.fractions.split(",")]:
            for strategy in (s for s in STRATEGIES if s.name in self.args.strategies.split(",")):
                result = quantizer.spend(strategy, [Budget("size_mb", fraction=fraction)])
                yield self.row(strategy.name, result, fraction, eight)
                if strategy.name == "di" and self.args.finetune:
                    yield self.row("di, fine-tuned", self.fine_tuned(result), fraction, eight)

    def ends(self, quantizer: Quantizer, width: int) -> dict[str, np.ndarray]:
        """`width` everywhere but in the first and last layer, which keep 8 bits as in the mixed rows."""
        bits = quantizer.uniform(width)
        names = list(bits)
        for layer in (names[0], names[-1]):
            bits[layer] = np.full_like(bits[layer], 8)
        return bits

    def fine_tuned(self, result: QuantizedResult) -> QuantizedResult:
        x, y = images(self.args.data, "train", 15_000, 20_000)
        settings = Distillation(epochs=self.args.finetune, lr=0.002)
        train(result.model, batches(x, y, 100), settings, teacher=self.model)
        return replace(result, model=result.model.eval())

    def float_row(self) -> dict[str, Any]:
        path = export_onnx(self.model, self.example, self.scratch / "float.onnx").path
        return {"net": self.name, "bits": "float32", "size_mb": path.stat().st_size / 1e6,
                "accuracy": onnx_accuracy(path, self.test), "latency_ms": latency_ms(path)}  # fmt: skip

    def row(
        self, bits: str, result: QuantizedResult, fraction: float | None, eight: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        written = export_quantized(result, self.scratch / "quantized.onnx", self.example)
        x = torch.cat([batch[0] for batch in self.test])[:CHECKED]
        with torch.no_grad():
            wanted = torch.cat([result.model(part) for part in x.split(250)]).numpy()
            float32 = torch.cat([self.model(part) for part in x.split(250)]).log_softmax(1)
        found = np.concatenate([run_onnx(written.path, (part,))[0] for part in x.split(250)])
        return {
            "net": self.name, "bits": bits, "budget": fraction, "size_mb": written.size_mb,
            "size_mb_predicted": result.size_mb,
            "of_uniform8": written.size_mb / eight["size_mb"] if eight else 1.0,
            "mean_bits": result.allocation.mean_bits(result.weights), "channels": result.allocation.counts(),
            "mbops": result.bops / 1e6, "accuracy": onnx_accuracy(written.path, self.test),
            "agreement": float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)),
            "divergence": float((float32.exp() * (float32 - torch.from_numpy(found).log_softmax(1))).sum(1).mean()),
            "latency_ms": latency_ms(written.path) if bits in ("di", "uniform 8", "uniform 4") else None,
        }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    latency = f"{row['latency_ms']:.2f} ms" if row.get("latency_ms") else ""
    extra = (f"x{row['of_uniform8']:.3f}  {row['mean_bits']:.2f} bits  {row['mbops']:.0f} MBOPs  "
             f"agree {row['agreement']:.0e}  KL {row['divergence']:.4f}  "
             f"predicted {row['size_mb_predicted'] / row['size_mb'] - 1:+.1%}"
             if "of_uniform8" in row else "")  # fmt: skip
    name = f"{row['net']:16} {row['bits']:14}"
    print(f"{name} {row['size_mb'] * 1e3:7.1f} kB  {row['accuracy']:.2%}  {latency:9} {extra}", flush=True)


def targets_of(rows: Rows) -> Rows:
    targets = []
    for net in dict.fromkeys(row["net"] for row in rows):
        own = [row for row in rows if row["net"] == net]
        base = next(row for row in own if row["bits"] == "float32")["accuracy"]
        mixed = [row for row in own if row["bits"].startswith("di") and row["of_uniform8"] <= 0.6]
        lost = min((100 * (base - row["accuracy"]) for row in mixed), default=float("nan"))
        targets.append({"name": f"{net}: points below float32 at <= 0.6 of uniform 8 bit", "target": "<= 0.5",
                        "value": round(lost, 3), "met": lost <= 0.5})  # fmt: skip
        for fraction in dict.fromkeys(row.get("budget") for row in mixed):
            at = [row for row in own if row.get("budget") == fraction]
            di = next(row["accuracy"] for row in at if row["bits"] == "di")
            others = max(
                (row["accuracy"] for row in at if row["bits"] in ("uniform", "magnitude", "random")), default=0
            )
            targets.append({"name": f"{net}: DI ahead of uniform, magnitude, random at {fraction} (points)",
                            "target": "> 0", "value": round(100 * (di - others), 3), "met": di > others})  # fmt: skip
    quantized = [row for row in rows if "agreement" in row]
    worst = max((row["agreement"] for row in quantized), default=0.0)
    off = max((abs(row["size_mb_predicted"] / row["size_mb"] - 1) for row in quantized), default=0.0)
    targets.append({"name": "ONNX Runtime agrees with torch, relative", "target": "<= 1e-3", "value": worst,
                    "met": worst <= 1e-3})  # fmt: skip
    targets.append({"name": "predicted size off by", "target": "<= 0.02", "value": round(off, 4), "met": off <= 0.02})
    return targets


def main() -> None:
    parser = argparse.ArgumentParser(description="B6: bits per channel")
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10 as train.npz and test.npz")
    parser.add_argument("--weights", type=Path, required=True, help="folder with cifar10_resnet20.safetensors, …56…")
    parser.add_argument("--nets", default="resnet20,resnet56")
    parser.add_argument("--fractions", default=FRACTIONS, help="of the size of the 8-bit file")
    parser.add_argument("--strategies", default=",".join(s.name for s in STRATEGIES))
    parser.add_argument("--pruned", action="store_true", help="also at 70 %% of the MACs")
    parser.add_argument("--only-pruned", action="store_true")
    parser.add_argument("--prune-epochs", type=int, default=1, help="of recovery after pruning (default 1)")
    parser.add_argument("--finetune", type=int, default=0, metavar="EPOCHS", help="also DI's bits after short training")
    parser.add_argument("--test-images", type=int, default=10_000, help="the first of the test split (default: all)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="ResNet-20, 1,000 test images, one size")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    rows: Rows = []
    start = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        for name in ["resnet20"] if args.quick else args.nets.split(","):
            model = network(name, args.weights)
            nets = [] if args.only_pruned else [(name, model)]
            if args.pruned or args.only_pruned:
                nets.append((f"{name} pruned", pruned(model, args.data, args.prune_epochs)))
            for title, net in nets:
                for row in Bench(title, net, args, Path(scratch)).rows():
                    show(row)
                    rows.append(row)
                    if args.json:
                        args.json.write_text(json.dumps({"rows": rows, "targets": targets_of(rows)}, indent=1))
    for target in targets_of(rows):
        print(f"{'met   ' if target['met'] else 'MISSED'} {target['name']}: {target['value']} ({target['target']})")
    print(f"{time.time() - start:.0f} s, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
