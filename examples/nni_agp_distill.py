"""Gradual pruning by Discriminant Information under NNI's AGPPruner, taught by the unpruned network.

    python examples/nni_agp_distill.py

NNI's distiller is built on top of the scheduled pruner, so one training loop does all three: it trains on labels, it
follows the teacher's logits, and every few steps more channels are masked.
"""

from __future__ import annotations

import copy

import nni
import torch
import torch.nn.functional as F
from digits import EXAMPLE, accuracy, loaders, size, trained_net
from diplugin_nni import DIPruner, speedup, torch_evaluator
from nni.compression.distillation import DynamicLayerwiseDistiller
from nni.compression.pruning import AGPPruner

TRAIN, _, TEST = loaders()


def training_step(batch, model, *args, **kwargs):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def training_func(model, optimizers, training_step, lr_schedulers=None, max_steps=None, max_epochs=None):
    model.train()
    steps = 0
    for _ in range(max_epochs or 1000):
        for batch in TRAIN:
            optimizers.zero_grad()
            training_step(batch, model).backward()
            optimizers.step()
            steps += 1
            if steps == max_steps:
                return


def main() -> None:
    model = trained_net(TRAIN)
    teacher = copy.deepcopy(model).eval()
    print(f"teacher  accuracy {accuracy(teacher, TEST):.1%}  {size(teacher):6,} parameters")

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    evaluator = torch_evaluator(training_func, optimizer, training_step, dummy_input=EXAMPLE)
    config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.6}]
    pruner = DIPruner(model, config_list, evaluator, training_steps=8)
    scheduled = AGPPruner(pruner, interval_steps=12, total_times=5)

    distiller = DynamicLayerwiseDistiller.from_compressor(
        scheduled,
        [{"op_names": ["head"], "lambda": 2.0, "apply_method": "kl"}],
        teacher_model=teacher,
        teacher_predict=lambda batch, teacher: teacher(batch[0]),
    )
    distiller.compress(max_steps=120, max_epochs=None)
    masks = pruner.get_masks()
    print(f"masked   accuracy {accuracy(model, TEST):.1%}")

    distiller.unwrap_model()
    distiller.unwrap_teacher_model()
    model = speedup(model, masks, EXAMPLE)
    print(f"sped up  accuracy {accuracy(model, TEST):.1%}  {size(model):6,} parameters")


if __name__ == "__main__":
    main()
