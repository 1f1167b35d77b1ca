"""A ResNet for CIFAR-10 that has never seen the holdout, for choices that must not mistake memory for learning.

    python benchmarks/base_network.py --data DIR --out DIR [--net resnet20] [--epochs 15] [--seed 0]
                                      [--compile] [--quick]

Trained from scratch on the training images less `Data.holdout`, lr .1 with a cosine, and written where the other
benchmarks look for it: give them OUT for `--weights` and `--judge holdout`. The published weights know all training
images by heart, these know nothing of the held-out ones; they are a few points worse for want of epochs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from protocol import Data
from training import Recipe, from_scratch

from diplugin.accuracy import accuracy
from diplugin.surgery import save_weights
from examples import cifar_resnet


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of train.npz and test.npz of CIFAR-10")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--net", default="resnet20", choices=("resnet20", "resnet56"))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", dest="compiled", action="store_true", help="train compiled")
    parser.add_argument("--quick", action="store_true", help="one epoch on 2,000 images")
    args = parser.parse_args()
    path = args.out / f"cifar10_{args.net}.safetensors"
    if path.exists():
        parser.error(f"expected a folder without weights of {args.net}, got {args.out}: published ones would be lost")
    data = Data.read(args.data)
    images, epochs = (2_000, 1) if args.quick else (len(data.train[1]), args.epochs)
    recipe = Recipe(epochs=epochs, images=images, lr=0.1, compiled=args.compiled)
    model = from_scratch(getattr(cifar_resnet, args.net), recipe, *data.training(0, images), args.seed)
    print(f"{args.net}: {100 * accuracy(model, data.holdout()):.2f} % of the holdout after {epochs} epochs")
    args.out.mkdir(parents=True, exist_ok=True)
    save_weights(model, path)


if __name__ == "__main__":
    main()
