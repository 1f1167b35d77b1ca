"""DIPruner under NNI's evaluators for PyTorch Lightning and Hugging Face Transformers, with the real frameworks.

Both are checked against the masks that calibration data alone gives: training at a learning rate of 0 changes no
weight, and the whole data set is one interval, so every road must lead to the same channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

nni = pytest.importorskip("nni")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

from diplugin_nni import DIPruner, speedup  # noqa: E402

IMAGES, BATCH = 120, 20
CONFIG = [{"op_names": ["net.0"], "sparse_ratio": 0.5}]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(128, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    y = torch.arange(IMAGES) % 4
    return torch.randn(IMAGES, 3, 8, 8) + y.view(-1, 1, 1, 1), y


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return Net().state_dict()


def by_calibration(weights: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Any:
    model = Net()
    model.load_state_dict(weights)
    loader = list(zip(*(t.split(BATCH) for t in data), strict=True))
    return DIPruner(model, CONFIG, calibration_data=loader).compress()[1]


def assert_same_masks(found: Any, wanted: Any) -> None:
    assert {m: set(t) for m, t in found.items()} == {m: set(t) for m, t in wanted.items()}
    for module, targets in wanted.items():
        for target, mask in targets.items():
            assert (mask is None) == (found[module][target] is None)
            assert mask is None or torch.equal(found[module][target], mask)


def frozen_norms(model: nn.Module) -> None:
    """Batches seen in training mode move BatchNorm's statistics, which would be another network to score."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0


@pytest.mark.parametrize("told", [{}, {"max_steps": IMAGES // BATCH}, {"max_epochs": 1}])
def test_lightning(data: Any, weights: dict[str, Tensor], tmp_path: Path, told: dict[str, int]) -> None:
    pl: Any = pytest.importorskip("pytorch_lightning")
    from nni.compression import LightningEvaluator

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net().net
            self.load_state_dict(weights)
            frozen_norms(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, _index: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return nni.trace(torch.optim.SGD)(self.parameters(), lr=0.0)

    class Images(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(*data), batch_size=BATCH)

    trainer = nni.trace(pl.Trainer)(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                                    enable_progress_bar=False, default_root_dir=tmp_path)  # fmt: skip
    model = Module()
    pruner = DIPruner(model, CONFIG, LightningEvaluator(trainer, nni.trace(Images)()), training_steps=IMAGES // BATCH)
    _, masks = pruner.compress(**told)
    assert_same_masks(masks, by_calibration(weights, data))
    small: Any = speedup(model, masks, data[0][:1])
    assert small.net[0].out_channels == 4


def test_transformers(data: Any, weights: dict[str, Tensor], tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) > 4 or int(transformers.__version__.split(".")[1]) > 30:
        pytest.skip("NNI 3.0's TransformersEvaluator finds no optimizer in Transformers after 4.30")
    from nni.compression import TransformersEvaluator

    class WithLoss(Net):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:  # pyright: ignore
            logits = self.net(x)
            return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class Images(Dataset[Any]):
        def __len__(self) -> int:
            return IMAGES

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"x": data[0][index], "labels": int(data[1][index])}

    model = WithLoss()
    model.load_state_dict(weights)
    frozen_norms(model)
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=BATCH, report_to=[], save_strategy="no", no_cuda=True,
        disable_tqdm=True, num_train_epochs=1,
    )  # fmt: skip
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.0)
    trainer = nni.trace(transformers.Trainer)(
        model=model, args=settings, train_dataset=Images(), optimizers=(optimizer, None)
    )
    pruner = DIPruner(
        model, CONFIG, TransformersEvaluator(trainer), training_steps=IMAGES // BATCH,
        get_labels=lambda batch: batch["labels"], forward=lambda model, batch: model(batch["x"])["logits"],
        example_inputs=(data[0][:1],),
    )  # fmt: skip
    _, masks = pruner.compress()
    # The trainer shuffles, so that images fall into other chunks: the one chunk here holds them all.
    assert_same_masks(masks, by_calibration(weights, data))
