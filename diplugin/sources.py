"""What the command line names: models and data.

Models: `package.module:callable` (called without arguments), `torchvision:resnet18`, `timm:resnet18`.
Data: `digits`, `cifar10:FOLDER` (train.npz and test.npz with x [N,H,W,3] uint8 and y [N]), `fashion-mnist:FOLDER`
(the four idx.gz files), `imagefolder:FOLDER` (FOLDER/class/image, or FOLDER/train and FOLDER/test of that form), or
`package.module:callable`, which returns a `DataSource` or a DataLoader of (inputs, labels). Images of CIFAR-10 and of
folders are normalised by ImageNet's mean and deviation; who trained by others' gives a callable.
"""

from __future__ import annotations

import gzip
import importlib
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from .errors import DataError, MissingExtraError, ModelError, first_line
from .surgery import load_weights, read_weights

Augment = Callable[[Tensor], Tensor]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_GRAY = ((0.449,), (0.226,))  # ImageNet's, over its three channels
_FASHION = ((0.2860,), (0.3530,))
_IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm"}


@dataclass(frozen=True)
class DataSource:
    """Training data, test data if there is any, and how training images may be varied.

    `train` keeps the data's own order; whoever trains on it shuffles.
    """

    name: str
    train: DataLoader[Any]
    test: DataLoader[Any] | None = None
    augment: Augment | None = None


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory as uint8 [N, C, H, W]; normalised when they are read."""

    def __init__(self, x: np.ndarray, y: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> None:
        self.x, self.y = torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y.astype(np.int64))
        self._mean, self._std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return (self.x[index].float() / 255 - self._mean) / self._std, self.y[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        x = (self.x[list(indices)].float() / 255 - self._mean) / self._std
        return list(zip(x, self.y[list(indices)], strict=True))


class ImageFolder(Dataset[tuple[Tensor, Tensor]]):
    """FOLDER/class/image files, read when asked for and brought to the model's input [C, H, W], gray where C is 1."""

    def __init__(self, folder: Path, shape: tuple[int, int, int], classes: Sequence[str]) -> None:
        self._shape = shape
        ids = {name: i for i, name in enumerate(classes)}
        unknown = [name for name in _class_names(folder) if name not in ids]
        if unknown:
            raise DataError(f"expected classes of the training images in {folder}, got {unknown[0]!r}")
        here = [name for name in classes if (folder / name).is_dir()]  # test data may lack a class
        self._files = [(path, ids[path.parent.name]) for name in here for path in sorted((folder / name).iterdir())
                       if path.suffix.lower() in _IMAGE_ENDINGS]  # fmt: skip
        if not self._files:
            raise DataError(f"expected images under {folder}/CLASS/, found none ({', '.join(sorted(_IMAGE_ENDINGS))})")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image

        path, label = self._files[index]
        channels, height, width = self._shape
        try:
            with Image.open(path) as file:
                image = file.convert("L" if channels == 1 else "RGB")
                pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
            raise DataError(f"expected an image at {path}, got {first_line(error)}") from error
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (_GRAY if channels == 1 else _IMAGENET))
        x = torch.from_numpy(pixels.copy()).view(height, width, channels).permute(2, 0, 1).float() / 255
        return (x - mean) / std, torch.tensor(label)


def flip_and_shift(x: Tensor, pad: int = 4) -> Tensor:
    """Random horizontal flips and shifts by up to `pad` pixels, one draw an image; [N, C, H, W].

    Drawn on the CPU, so that a seed gives the same images on every device.
    """
    return flipped_and_shifted(x, draw_moves(len(x), pad).to(x.device), pad)


def draw_moves(images: int, pad: int = 4) -> Tensor:
    """For every image a flip (0 or 1) and the row and column (0 to 2 · pad) where it begins; int64 [3, images]."""
    flips = torch.rand(images) < 0.5
    return torch.cat([flips[None].long(), torch.randint(0, 2 * pad + 1, (2, images))])


def flipped_and_shifted(x: Tensor, moves: Tensor, pad: int = 4) -> Tensor:
    """Images [N, C, H, W] after the moves [3, N] that `draw_moves` drew; both lie on one device."""
    images, channels, height, width = x.shape
    flip, top, left = moves
    x = torch.where(flip.bool().view(-1, 1, 1, 1), x.flip(-1), x)
    padded = torch.nn.functional.pad(x, (pad,) * 4)
    image, channel, row, column = (torch.arange(n, device=x.device) for n in (images, channels, height, width))
    rows = (top[:, None] + row)[:, None, :, None]
    columns = (left[:, None] + column)[:, None, None, :]
    return padded[image[:, None, None, None], channel[None, :, None, None], rows, columns]


def load_data(spec: str, *, example_shape: Sequence[int] | None = None, batch_size: int = 128) -> DataSource:
    """The data that a specification names.

    Args:
        example_shape: of the model's input, [N, C, H, W]; images of folders are resized to it, and gray if C is 1;
            others must fit.

    Raises:
        DataError: an unknown name, missing or broken files, no images, or images of another shape.
    """
    source = _source(spec, example_shape, batch_size)
    data = source.train.dataset
    in_memory = isinstance(data, Images | TensorDataset) and len(data) > 0  # there a look at one is free
    if example_shape is not None and in_memory:
        here, asked = (" x ".join(map(str, shape)) for shape in (data[0][0].shape, example_shape[1:]))
        if here != asked:
            raise DataError(f"expected inputs of {asked} as the example shape says, {spec} has {here}")
    return source


def _source(spec: str, example_shape: Sequence[int] | None, batch_size: int) -> DataSource:
    kind, _, place = spec.partition(":")
    if kind == "digits" and not place:
        return _digits(batch_size)
    if kind in ("cifar10", "fashion-mnist", "imagefolder"):
        if not place:
            raise DataError(f"expected a folder after {kind}:, got {spec!r}")
        folder = Path(place)
        if not os.path.isdir(folder):  # no name is too long for it, as for a path's own
            raise DataError(f"expected a folder at {folder}, there is none")
        if kind == "cifar10":
            return _cifar10(folder, batch_size)
        if kind == "fashion-mnist":
            return _fashion_mnist(folder, batch_size)
        return _image_folder(folder, tuple(example_shape or (1, 3, 224, 224))[1:], batch_size)
    if not place:
        raise DataError(f"expected data as digits, cifar10:DIR, fashion-mnist:DIR, imagefolder:DIR or "
                        f"package.module:callable, got {spec!r}")  # fmt: skip
    found = _call(spec, DataError)
    if isinstance(found, DataSource):
        return found
    if isinstance(found, DataLoader):
        return DataSource(spec, found)
    raise DataError(f"expected {spec} to return a DataLoader or a DataSource, got {type(found).__name__}")


def load_model(spec: str, weights: str | Path | None = None) -> nn.Module:
    """The model that a specification names, with weights from a safetensors file if one is given.

    Raises:
        ModelError: no such callable, one that raises, or one that returns no module.
        PlanError: weights that do not fit.
    """
    kind, colon, name = spec.partition(":")
    if not colon or not name:
        raise ModelError(f"expected a model as package.module:callable, torchvision:NAME or timm:NAME, got {spec!r}")
    model = _zoo_model(kind, name) if kind in ("torchvision", "timm") else _call(spec, ModelError)
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected {spec} to return a torch.nn.Module, got {type(model).__name__}")
    if weights is not None:
        load_weights(model, read_weights(weights), str(weights))
    return model


def _zoo_model(kind: str, name: str) -> Any:
    try:
        zoo = importlib.import_module("torchvision.models" if kind == "torchvision" else "timm")
    except (ImportError, RuntimeError) as error:
        reason = first_line(error)
        raise MissingExtraError(f"expected {kind} to be installed for {kind}:{name}, got {reason}") from error
    try:
        return zoo.get_model(name, weights=None) if kind == "torchvision" else zoo.create_model(name)
    except Exception as error:
        raise ModelError(f"expected a model of {kind}, {name!r} gave {first_line(error)}") from error


def _call(spec: str, kind: type[DataError] | type[ModelError]) -> Any:
    """Import and call `package.module:callable`; the working folder counts as a place to import from."""
    module_name, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        target: Any = importlib.import_module(module_name)
        for part in name.split("."):
            target = getattr(target, part, None)
    except (Exception, SystemExit) as error:
        raise kind(f"expected a module {module_name!r} that imports, got {type(error).__name__}: {first_line(error)}"
                   ) from error  # fmt: skip
    if not callable(target):
        raise kind(f"expected a callable {name!r} in {module_name}, found {type(target).__name__}")
    try:
        return target()
    except (Exception, SystemExit) as error:
        raise kind(f"expected {spec}() to return, it raised {type(error).__name__}: {first_line(error)}") from error


def _loader(dataset: Dataset[Any], batch_size: int) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=batch_size)


def _digits(batch_size: int) -> DataSource:
    """scikit-learn's 1,797 digits as 24 x 24 images, every fifth one for testing."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    small = torch.from_numpy(digits.images)[:, None].float()
    images = torch.nn.functional.interpolate(small, size=(24, 24), mode="bilinear", align_corners=False)
    x = (images * (255 / 16)).round().clamp(0, 255).to(torch.uint8).numpy()
    y = np.asarray(digits.target)
    tests = np.arange(len(y)) % 5 == 4
    parts = [Images(x[mask], y[mask], (0.3,), (0.35,)) for mask in (~tests, tests)]
    return DataSource("digits", _loader(parts[0], batch_size), _loader(parts[1], batch_size))


def _cifar10(folder: Path, batch_size: int) -> DataSource:
    train = _npz(folder / "train.npz")
    if train is None:
        raise DataError(f"expected {folder / 'train.npz'} with arrays x and y, there is none")
    test = _npz(folder / "test.npz")
    return DataSource(
        "cifar10", _loader(Images(*train, *_IMAGENET), batch_size),
        None if test is None else _loader(Images(*test, *_IMAGENET), batch_size), flip_and_shift,
    )  # fmt: skip


def _npz(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = file["x"], file["y"]
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"expected arrays x and y in {path}, got {reason}") from error
    fits = x.ndim == 4 and x.shape[-1] == 3 and x.dtype == np.uint8 and y.shape == (len(x),) and len(x)
    if fits and (y.dtype.kind not in "iu" or y.min() < 0):
        raise DataError(f"expected class ids y from 0 in {path}, got {y.dtype} such as {np.sort(y)[0]!r:.40}")
    if not fits:
        raise DataError(f"expected x uint8 [N,H,W,3] and y [N] in {path}, got {x.dtype} {x.shape} and {y.shape}")
    return x.transpose(0, 3, 1, 2), y


def _fashion_mnist(folder: Path, batch_size: int) -> DataSource:
    parts = []
    for split in ("train", "t10k"):
        x, y = _idx(folder / f"{split}-images-idx3-ubyte.gz"), _idx(folder / f"{split}-labels-idx1-ubyte.gz")
        if x.ndim != 3 or y.shape != (len(x),):
            raise DataError(f"expected images [N,H,W] and labels [N] of {split} in {folder}, got {x.shape}, {y.shape}")
        parts.append(Images(x[:, None], y, *_FASHION))
    return DataSource("fashion-mnist", _loader(parts[0], batch_size), _loader(parts[1], batch_size), flip_and_shift)


def _idx(path: Path) -> np.ndarray:
    """An idx file: two zero bytes, a type (8: uint8), the number of dimensions, each as big-endian int32, the data."""
    try:
        raw = gzip.decompress(path.read_bytes())
        dimensions = raw[3]
        shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
        if raw[:3] != b"\0\0\x08":
            raise ValueError("not an idx file of bytes")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
    except (OSError, EOFError, zlib.error, ValueError, IndexError, MemoryError) as error:
        raise DataError(f"expected a gzipped idx file at {path}, got {first_line(error)}") from error


def _class_names(folder: Path) -> list[str]:
    """Folders of a folder; hidden ones, which editors and notebooks leave, are no classes and shift nobody's id."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_folder(folder: Path, shape: tuple[int, ...], batch_size: int) -> DataSource:
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise DataError(f"expected a model of inputs [N, C, H, W] with 1 or 3 channels for images, got {[1, *shape]}")
    shape = (shape[0], shape[1], shape[2])
    root = folder / "train" if (folder / "train").is_dir() else folder
    classes = _class_names(root)
    if len(classes) < 2:
        raise DataError(f"expected two class folders or more in {root}, found {len(classes)}")
    train = ImageFolder(root, shape, classes)
    held = next((folder / name for name in ("test", "val") if root != folder and (folder / name).is_dir()), None)
    test = None if held is None else _loader(ImageFolder(held, shape, classes), batch_size)
    return DataSource(f"imagefolder:{folder.name}", _loader(train, batch_size), test, flip_and_shift)
