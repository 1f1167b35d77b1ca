"""What the command line names: every form loads, and every slip says what was expected."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from diplugin.errors import DataError, ModelError, PlanError
from diplugin.sources import DataSource, flip_and_shift, load_data, load_model

MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))

class Zoo:
    tiny = Net

def loader():
    return DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 2), batch_size=4)

def wrong():
    return 5

def raises():
    raise RuntimeError("broken on purpose\\nsecond line")

not_callable = 3
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's, in the working folder."""
    name = f"own_code_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_broken.py").write_text("import torch\nraise SyntaxError('oh')")
    (tmp_path / f"{name}_lazy.py").write_text(
        "def __getattr__(name):\n    raise ImportError(f'{name} needs something else')"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def first_batch(source: DataSource) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = next(iter(source.train))
    return images, labels


# --- models ---


def test_models_by_callable(own_code: str) -> None:
    assert isinstance(load_model(f"{own_code}:Net"), nn.Sequential)
    assert isinstance(load_model(f"{own_code}:Zoo.tiny"), nn.Sequential)


def test_models_with_weights(own_code: str, tmp_path: Path) -> None:
    weights = {k: torch.randn_like(v) for k, v in load_model(f"{own_code}:Net").state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors")
    loaded = load_model(f"{own_code}:Net", tmp_path / "w.safetensors").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in weights.items())
    save_file({**weights, "0.weight": torch.zeros(5)}, tmp_path / "bad.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("bad.safetensors", "text.safetensors", "none.safetensors"):
        with pytest.raises(PlanError):
            load_model(f"{own_code}:Net", tmp_path / name)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("resnet18", "package.module:callable"),
        ("", "package.module:callable"),
        ("{}:", "package.module:callable"),
        ("{}:Nope", "found NoneType"),
        ("{}:not_callable", "found int"),
        ("{}:wrong", "to return a torch.nn.Module, got int"),
        ("{}:raises", "it raised RuntimeError: broken on purpose"),
        ("{}:Net.nope.deeper", "found NoneType"),
        ("no_such_module_at_all:Net", "ModuleNotFoundError"),
        ("{}_broken:Net", "SyntaxError"),
        ("{}_lazy:Net", "ImportError: Net needs something else"),
        (":Net", "expected"),
        ("..:Net", "expected"),
    ],
)
def test_models_that_cannot_be_had(own_code: str, spec: str, text: str) -> None:
    with pytest.raises(ModelError, match=text) as caught:
        load_model(spec.format(own_code))
    assert "\n" not in str(caught.value)


# --- data ---


def test_digits() -> None:
    source = load_data("digits", batch_size=50)
    images, labels = first_batch(source)
    assert images.shape == (50, 1, 24, 24)
    assert labels.dtype == torch.int64
    assert source.test is not None
    sizes = [sum(len(y) for _, y in part) for part in (source.train, source.test)]
    assert sum(sizes) == 1797
    assert abs(float(images.mean())) < 0.5


def cifar_file(path: Path, count: int = 6, **changes: np.ndarray) -> None:
    draw = np.random.default_rng(0)
    arrays = {"x": draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), "y": np.arange(count) % 10}
    np.savez(path, **{**arrays, **changes})


def test_cifar10(tmp_path: Path) -> None:
    cifar_file(tmp_path / "train.npz")
    source = load_data(f"cifar10:{tmp_path}", batch_size=4)
    images, labels = first_batch(source)
    assert source.test is None
    assert images.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 1, 2, 3]
    raw = np.load(tmp_path / "train.npz")["x"][0].transpose(2, 0, 1) / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (raw - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(images[0].numpy(), expected, rtol=1e-4, atol=1e-5)
    cifar_file(tmp_path / "test.npz", 3)
    assert load_data(f"cifar10:{tmp_path}").test is not None


@pytest.mark.parametrize(
    "make",
    [
        lambda f: None,
        lambda f: f.write_bytes(b"not a zip"),
        lambda f: f.write_bytes(b""),
        lambda f: np.savez(f, x=np.zeros((2, 32, 32, 3), np.uint8)),
        lambda f: cifar_file(f, y=np.arange(5)),
        lambda f: cifar_file(f, x=np.zeros((6, 3, 32, 32), np.uint8)),
        lambda f: cifar_file(f, x=np.zeros((6, 32, 32, 3), np.float32)),
        lambda f: np.savez(f, x=np.zeros((0, 32, 32, 3), np.uint8), y=np.zeros(0, int)),
        lambda f: np.savez(f, x=np.array([{}], dtype=object), y=np.zeros(1, int)),
        lambda f: cifar_file(f, y=np.array(["a"] * 6)),
        lambda f: cifar_file(f, y=np.full(6, np.nan)),
        lambda f: cifar_file(f, y=np.full(6, -1)),
    ],
)
def test_cifar10_files_that_are_broken(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "train.npz")
    with pytest.raises(DataError, match=r"train\.npz") as caught:
        load_data(f"cifar10:{tmp_path}")
    assert "\n" not in str(caught.value)


def idx(path: Path, array: np.ndarray, kind: int = 8) -> None:
    header = bytes([0, 0, kind, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def fashion(folder: Path) -> None:
    for split, count in (("train", 5), ("t10k", 3)):
        idx(folder / f"{split}-images-idx3-ubyte.gz", np.arange(count * 784, dtype=np.uint8).reshape(count, 28, 28))
        idx(folder / f"{split}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8))


def test_fashion_mnist(tmp_path: Path) -> None:
    fashion(tmp_path)
    source = load_data(f"fashion-mnist:{tmp_path}")
    images, labels = first_batch(source)
    assert images.shape == (5, 1, 28, 28)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert source.test is not None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: f.unlink(),
        lambda f: f.write_bytes(f.read_bytes()[:40]),
        lambda f: f.write_bytes(b"plain"),
        lambda f: f.write_bytes(gzip.compress(b"")),
        lambda f: idx(f, np.zeros((5, 28, 28), np.uint8), kind=13),
        lambda f: idx(f, np.zeros((5, 28), np.uint8)),
        lambda f: idx(f, np.zeros((4, 28, 28), np.uint8)),
        lambda f: f.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + b"\xff" * 12)),
        lambda f: f.write_bytes(f.read_bytes()[:10] + b"\xff" * 8 + f.read_bytes()[18:]),
    ],
)
def test_fashion_mnist_files_that_are_broken(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    fashion(tmp_path)
    spoil(tmp_path / "train-images-idx3-ubyte.gz")
    with pytest.raises(DataError):
        load_data(f"fashion-mnist:{tmp_path}")


def image_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 2) -> None:
    image = pytest.importorskip("PIL.Image")
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(count):
            image.new("RGB", (12, 9), (40 * i, 10 * k, 0)).save(root / name / f"{k}.png")
        (root / name / "notes.txt").write_text("no image")


def test_imagefolder(tmp_path: Path) -> None:
    image_folder(tmp_path / "train")
    image_folder(tmp_path / "val", count=1)
    source = load_data(f"imagefolder:{tmp_path}", example_shape=(1, 3, 16, 20))
    images, labels = first_batch(source)
    assert images.shape == (4, 3, 16, 20)
    assert labels.tolist() == [0, 0, 1, 1]
    assert source.test is not None
    assert len(next(iter(source.test))[1]) == 2
    assert load_data(f"imagefolder:{tmp_path / 'train'}").test is None


def test_images_of_folders_are_gray_where_the_model_has_one_channel(tmp_path: Path) -> None:
    image_folder(tmp_path)
    gray, labels = first_batch(load_data(f"imagefolder:{tmp_path}", example_shape=(1, 1, 9, 12)))
    assert gray.shape == (4, 1, 9, 12) and labels.tolist() == [0, 0, 1, 1]
    # Rec. 601 luma of the colours that `image_folder` paints: (40 i, 10 k, 0).
    luma = torch.tensor([0.299 * 40 * i + 0.587 * 10 * k for i in range(2) for k in range(2)])
    assert torch.allclose(gray.mean((1, 2, 3)) * 0.226 + 0.449, luma / 255, atol=1 / 255)
    for shape in ((1, 4, 9, 12), (1, 12), (1, 3, 9, 12, 2)):
        with pytest.raises(DataError, match="1 or 3 channels"):
            load_data(f"imagefolder:{tmp_path}", example_shape=shape)


def test_hidden_folders_are_no_classes_and_classes_that_were_not_trained_are_refused(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", classes=(".ipynb_checkpoints", "cat", "dog"))
    image_folder(tmp_path / "test")
    source = load_data(f"imagefolder:{tmp_path}", example_shape=(1, 3, 9, 12))
    assert source.test is not None
    assert [y.tolist() for loader in (source.train, source.test) for _, y in loader] == [[0, 0, 1, 1]] * 2
    (tmp_path / "test" / "emu").mkdir()
    with pytest.raises(DataError, match="emu"):
        load_data(f"imagefolder:{tmp_path}", example_shape=(1, 3, 9, 12))


def test_imagefolders_that_are_broken(tmp_path: Path) -> None:
    (tmp_path / "one" / "only").mkdir(parents=True)
    with pytest.raises(DataError, match="two class folders"):
        load_data(f"imagefolder:{tmp_path / 'one'}")
    (tmp_path / "one" / "second").mkdir()
    with pytest.raises(DataError, match="found none"):
        load_data(f"imagefolder:{tmp_path / 'one'}")
    image_folder(tmp_path / "good")
    (tmp_path / "good" / "cat" / "0.png").write_bytes(b"no png")
    with pytest.raises(DataError, match=r"0\.png"):
        list(load_data(f"imagefolder:{tmp_path / 'good'}").train)
    image_folder(tmp_path / "split" / "train")
    image_folder(tmp_path / "split" / "test", classes=("dog",))
    test = load_data(f"imagefolder:{tmp_path / 'split'}").test
    assert test is not None
    assert next(iter(test))[1].tolist() == [1, 1], "test data may lack a class, ids are those of training"


def test_an_image_whose_header_is_damaged_is_named(tmp_path: Path) -> None:
    image_folder(tmp_path)
    (tmp_path / "cat" / "0.ppm").write_bytes(b"P6\n\xd200 8\n255\n" + bytes(192))
    dataset: Any = load_data(f"imagefolder:{tmp_path}").train.dataset
    with pytest.raises(DataError, match=r"0\.ppm"):
        list(dataset)


def test_data_by_callable(own_code: str) -> None:
    source = load_data(f"{own_code}:loader")
    assert isinstance(source.train, DataLoader)
    assert (source.test, source.augment) == (None, None)


@pytest.mark.parametrize(
    "spec",
    ["", "mnist", "digits:5", "cifar10", "cifar10:", "cifar10:/no/such/folder", "imagefolder:/no/such", "{}:wrong",
     "{}:raises", "{}:Nope", "fashion-mnist:/no/such", "no_such_module:loader", ":loader", "cifar10:" + "x" * 300,
     "imagefolder:a\0b"],
)  # fmt: skip
def test_data_that_cannot_be_had(own_code: str, spec: str) -> None:
    with pytest.raises(DataError) as caught:
        load_data(spec.format(own_code))
    assert "\n" not in str(caught.value)


def test_a_callable_that_exits_is_no_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaves_early.py").write_text("import sys\ndef net(): sys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match="SystemExit"):
        load_model("leaves_early:net")


def test_no_data_have_no_shape(own_code: str, tmp_path: Path) -> None:
    (tmp_path / f"{own_code}_empty.py").write_text(
        "import torch\nfrom torch.utils.data import DataLoader, TensorDataset\n"
        "def loader(): return DataLoader(TensorDataset(torch.zeros(0, 3, 8, 8), torch.zeros(0)))\n"
    )
    assert len(load_data(f"{own_code}_empty:loader", example_shape=(1, 3, 8, 8)).train) == 0


def test_data_must_fit_the_example_shape() -> None:
    assert load_data("digits", example_shape=(1, 1, 24, 24)).name == "digits"
    for shape in ((1, 1, 8, 8), (1, 3, 24, 24), (1, 24, 24)):
        with pytest.raises(DataError, match="digits has 1 x 24 x 24") as caught:
            load_data("digits", example_shape=shape)
        assert "\n" not in str(caught.value)


# --- augmentation ---


def test_flips_and_shifts_show_pixels_of_the_image() -> None:
    torch.manual_seed(0)
    x = torch.arange(1.0, 1 + 2 * 6 * 7).view(1, 2, 6, 7).repeat(64, 1, 1, 1)
    got = flip_and_shift(x, pad=2)
    assert got.shape == x.shape
    seen = set()
    for image in got:
        matches = []
        for flip in (False, True):
            source = nn.functional.pad(x[0].flip(-1) if flip else x[0], (2,) * 4)
            matches += [(flip, t, s) for t in range(5) for s in range(5)
                        if torch.equal(image, source[:, t : t + 6, s : s + 7])]  # fmt: skip
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 20


def test_augmentation_keeps_dtype_and_is_seeded() -> None:
    x = torch.randn(5, 3, 8, 8)
    torch.manual_seed(1)
    one: Any = flip_and_shift(x)
    torch.manual_seed(1)
    assert torch.equal(one, flip_and_shift(x))
    assert one.dtype == x.dtype
