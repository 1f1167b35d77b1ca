"""One-shot pruning with NNI and Discriminant Information: half of all channels, no optimizer needed.

    python examples/nni_one_shot.py

`DIPruner` takes NNI's config_list and returns NNI's masks; `speedup` turns masks into a smaller network.
"""

from __future__ import annotations

import torch
from digits import EXAMPLE, accuracy, loaders, size, train, trained_net
from diplugin_nni import DIPruner, speedup

from diplugin.recovery import recalibrate_batchnorm


def main() -> None:
    train_loader, _, test_loader = loaders()
    model = trained_net(train_loader)
    print(f"trained   accuracy {accuracy(model, test_loader):.1%}  {size(model):6,} parameters")

    config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    pruner = DIPruner(model, config_list, calibration_data=train_loader)
    _, masks = pruner.compress()
    print(f"masked    accuracy {accuracy(model, test_loader):.1%}")

    images = next(iter(test_loader))[0]
    with torch.no_grad():
        masked_logits = model.eval()(images)
    pruner.unwrap_model()
    model = speedup(model, masks, EXAMPLE)
    with torch.no_grad():
        difference = float((model.eval()(images) - masked_logits).abs().max())
    print(f"sped up   accuracy {accuracy(model, test_loader):.1%}  {size(model):6,} parameters, "
          f"largest change of a logit {difference:.0e}")  # fmt: skip

    recalibrate_batchnorm(model, train_loader)
    print(f"new BatchNorm statistics: accuracy {accuracy(model, test_loader):.1%}")

    train(model, train_loader, epochs=4, lr=0.02)
    print(f"fine-tuned: accuracy {accuracy(model, test_loader):.1%}")


if __name__ == "__main__":
    main()
