"""Fine-tuning: deterministic, resumable, and towards what it says."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small_disk import files_up_to
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from diplugin.errors import DataError, ModelError, PlanError, UserError
from diplugin.recovery import Distillation, EpochReport, FineTuning, train

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]


@pytest.fixture
def loader(make_images: Any) -> DataLoader[Any]:
    """Shuffled, and with a last batch of one image."""
    data = make_images(65)
    return DataLoader(TensorDataset(data.images, data.labels), batch_size=16, shuffle=True)


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_the_same_seed_gives_the_same_network(make_net: MakeNet, loader: Any) -> None:
    one, two, three = (make_net("plain")[0] for _ in range(3))
    for model, seed in ((one, 3), (two, 3), (three, 4)):
        torch.rand(5 + seed)  # whatever went on before
        train(model, loader, FineTuning(epochs=2), seed=seed)
    assert same(one, two)
    assert not same(one, three)


@pytest.mark.parametrize("settings", [FineTuning(epochs=4, lr=0.05), Distillation(epochs=4, lr=0.05)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    make_net: MakeNet, loader: Any, tmp_path: Path, settings: FineTuning
) -> None:
    model, _ = make_net("plain")
    teacher = make_net("plain")[0]
    whole = train(copy.deepcopy(model), loader, settings, teacher=teacher)

    def kill(report: EpochReport) -> None:
        if report.epoch == 2:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(copy.deepcopy(model), loader, settings, teacher=teacher, checkpoint=checkpoint, on_epoch=kill)
    epochs: list[int] = []
    again = train(
        copy.deepcopy(model), loader, settings, teacher=teacher, checkpoint=checkpoint,
        on_epoch=lambda report: epochs.append(report.epoch),
    )  # fmt: skip
    assert epochs == [3, 4]
    assert same(again, whole)
    finished = train(copy.deepcopy(model), loader, settings, teacher=teacher, checkpoint=checkpoint)
    assert same(finished, whole)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("place", ["loader", "sampler", "batches"])
def test_a_loader_with_a_generator_of_its_own_is_seeded_as_well(make_images: Any, tmp_path: Path, place: str) -> None:
    """Its state goes on from training to training, and dies with a killed one."""
    data, own = make_images(24), torch.Generator()
    images = TensorDataset(data.images, data.labels)
    sampler = RandomSampler(images, generator=own)
    loader = {
        "loader": lambda: DataLoader(images, 8, shuffle=True, generator=own),
        "sampler": lambda: DataLoader(images, 8, sampler=sampler),
        "batches": lambda: DataLoader(images, batch_sampler=BatchSampler(sampler, 8, True)),
    }[place]()
    model = nn.Sequential(nn.Flatten(), nn.Linear(data.images[0].numel(), 4))
    whole = train(copy.deepcopy(model), loader, FineTuning(epochs=3))
    assert same(train(copy.deepcopy(model), loader, FineTuning(epochs=3)), whole)

    def kill(report: EpochReport) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(copy.deepcopy(model), loader, FineTuning(epochs=3), checkpoint=path, on_epoch=kill)
    own.seed()
    assert same(train(copy.deepcopy(model), loader, FineTuning(epochs=3), checkpoint=path), whole)


def test_a_checkpoint_that_no_disk_has_room_for_is_one_line_and_the_one_before_stays(
    make_net: MakeNet, loader: Any, tmp_path: Path
) -> None:
    model, _ = make_net("plain")
    path = tmp_path / "state.safetensors"
    train(copy.deepcopy(model), loader, FineTuning(epochs=1), checkpoint=path)
    before = path.read_bytes()
    with files_up_to(100), pytest.raises(PlanError, match=r"expected a checkpoint .*state\.safetensors") as caught:
        train(copy.deepcopy(model), loader, FineTuning(epochs=2), checkpoint=path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def written(change: Callable[[dict[str, Tensor]], Any], epoch: str | None = "1") -> Callable[[Path], Any]:
    """Changes the tensors of a checkpoint and says that they are of this epoch."""

    def write(path: Path) -> None:
        state = load_file(path)
        change(state)
        save_file(state, path, metadata=None if epoch is None else {"epoch": epoch})

    return write


@pytest.mark.parametrize(
    "broken",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-50]),
        lambda path: path.write_bytes(b""),
        lambda path: torch.save({"a": 1}, path),
        written(lambda state: None, "x"),
        written(lambda state: None, "-1"),
        written(lambda state: None, "3"),
        written(lambda state: None, None),
        written(lambda state: state.pop(next(k for k in state if k.endswith("weight")))),
        written(lambda state: state.update({"momentum.0": torch.zeros(1, 2, 3)})),
        written(lambda state: state.update({"momentum.99": torch.zeros(3)})),
        written(lambda state: state.update({"momentum.0": state["momentum.0"] * math.nan})),
        written(lambda state: state.update({k: v + math.inf for k, v in state.items() if k.endswith("weight")})),
    ],
    ids=["cut off", "empty", "pickle", "no number", "before the first", "after the last", "no epoch", "tensor missing",
         "momentum's shape", "momentum of none", "momentum NaN", "weights infinite"],
)  # fmt: skip
def test_a_checkpoint_that_is_broken_is_one_line(
    make_net: MakeNet, loader: Any, tmp_path: Path, broken: Callable[[Path], Any]
) -> None:
    model, _ = make_net("plain")
    path = tmp_path / "state.safetensors"
    train(copy.deepcopy(model), loader, FineTuning(epochs=1), checkpoint=path)
    broken(path)
    with pytest.raises(PlanError, match=r"state of this training in .*state\.safetensors, .*; remove it") as caught:
        train(model, loader, FineTuning(epochs=2), checkpoint=path)
    assert "\n" not in str(caught.value)


def test_training_lowers_the_loss(make_net: MakeNet, make_images: Any) -> None:
    model, _ = make_net("residual")
    data = make_images(128)
    losses: list[float] = []
    train(model, data.loader(32), FineTuning(epochs=6, lr=0.1), on_epoch=lambda report: losses.append(report.loss))
    assert losses[-1] < 0.7 * losses[0]


def test_the_teacher_is_followed_and_never_changed(
    make_net: MakeNet, make_images: Any, state_of: Any, assert_same_state: Any
) -> None:
    teacher, _ = make_net("plain")
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.randn_like(p))
    data = make_images(128)
    wrong_labels = [(x, torch.zeros_like(y)) for x, y in data.loader(32)]
    before = state_of(teacher)

    def distance() -> float:
        with torch.no_grad():
            return float((student.eval()(data.images) - teacher.eval()(data.images)).norm())

    start = distance()
    train(student, wrong_labels, Distillation(epochs=8, lr=0.02, teacher_weight=1.0), teacher=teacher)
    assert distance() < 0.6 * start
    assert_same_state(teacher, before)
    teacher.train()
    train(student, wrong_labels, Distillation(epochs=1), teacher=teacher)
    assert all(module.training for module in teacher.modules()), "its modes come back"


def test_modes_come_back_and_frozen_weights_stay(make_net: MakeNet, loader: Any) -> None:
    model, _ = make_net("plain")
    model.get_submodule("0").requires_grad_(False)
    frozen = model.get_submodule("0").weight.clone()
    model.train()
    model.get_submodule("1").eval()
    modes = [m.training for m in model.modules()]
    train(model, loader, FineTuning(epochs=1))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model.get_submodule("0").weight, frozen)


def test_the_learning_rate_warms_up_and_ends_near_zero(
    make_net: MakeNet, make_images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    train(make_net("plain")[0], make_images(80).loader(4), FineTuning(epochs=2, lr=0.04, warm_up=0.1))
    assert len(rates) == 40
    assert rates[:4] == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 0.001


def test_normalisation_and_biases_do_not_decay(make_net: MakeNet, make_images: Any) -> None:
    model, _ = make_net("plain")
    for p in model.parameters():
        p.register_hook(torch.zeros_like)
    before = {n: p.clone() for n, p in model.named_parameters()}
    train(model, make_images(32).loader(16), FineTuning(epochs=1, lr=0.1, weight_decay=0.5))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (p.ndim <= 1), name


def test_what_cannot_be_trained_or_taught_is_said_before_anything_is_done() -> None:
    model, batches = nn.Linear(3, 2), [(torch.randn(4, 3), torch.arange(4) % 2)]
    with pytest.raises(UserError, match="expected a teacher for Distillation, got none"):
        train(model, batches, Distillation(epochs=1))
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(ModelError, match=r"parameters to train, got one .* all frozen"):
        train(frozen, batches, FineTuning(epochs=1))


def test_settings_on_the_edge_are_taken(make_net: MakeNet, loader: Any) -> None:
    """Also whole numbers of NumPy's, which searches over settings come with."""
    numbers: Any = {"epochs": np.int64(1), "lr": np.float32(0.01)}
    edge = FineTuning(**numbers, momentum=0.0, weight_decay=0.0, smoothing=0.0, warm_up=1.0)
    model, _ = make_net("plain")
    assert not same(train(copy.deepcopy(model), loader, edge), model)


def test_a_loader_without_a_length_or_batches(make_net: MakeNet, make_images: Any) -> None:
    with pytest.raises(DataError, match="with a length"):
        train(make_net("plain")[0], iter(make_images(8).loader(4)), FineTuning(epochs=1))
    with pytest.raises(DataError, match="an empty one"):
        train(make_net("plain")[0], [], FineTuning(epochs=1))


def test_divergence_is_said(make_net: MakeNet, make_images: Any) -> None:
    model, _ = make_net("plain")
    with pytest.raises(DataError, match="lower the learning rate"):
        train(model, make_images(64).loader(8), FineTuning(epochs=30, lr=1e30))


def test_an_overflow_that_batchnorm_hides_from_the_loss_is_a_divergence() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    for weight in list(model.parameters())[:1]:
        weight.data.mul_(1e25)  # a variance beyond float32, by which the layer behind divides
    with pytest.raises(DataError, match="lower the learning rate"):
        train(model, [(torch.randn(8, 1, 2, 2), torch.arange(8) % 2)], FineTuning(epochs=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_of_one_train_what_has_no_batchnorm(dtype: torch.dtype) -> None:
    """A first step by hand: down the decayed gradient, with Nesterov momentum 1 + momentum times as far."""
    x, y = torch.randn(1, 5, dtype=dtype), torch.tensor([2])
    for momentum in (0.9, 0.0):
        model = nn.Linear(5, 3).to(dtype)
        w, b = (p.detach().clone() for p in model.parameters())
        error = (x @ w.T + b).softmax(1) - F.one_hot(y, 3)
        train(model, [(x, y)], FineTuning(epochs=1, lr=0.1, momentum=momentum, weight_decay=0.01))
        torch.testing.assert_close(model.weight.detach(), w - 0.1 * (1 + momentum) * (error.T @ x + 0.01 * w))
        torch.testing.assert_close(model.bias.detach(), b - 0.1 * (1 + momentum) * error[0])


def test_single_images_are_left_out_of_the_loss_where_batchnorm_cannot_take_them(
    make_net: MakeNet, make_images: Any
) -> None:
    model, _ = make_net("plain")
    data = make_images(17)
    with torch.no_grad():
        expected = F.cross_entropy(copy.deepcopy(model).train()(data.images[:16]), data.labels[:16])
    losses: list[float] = []
    train(model, data.loader(16), FineTuning(epochs=1), on_epoch=lambda report: losses.append(report.loss))
    assert losses == [pytest.approx(float(expected))], "the batch of 16, before its step"


def test_training_that_could_not_take_a_step_is_said(
    make_net: MakeNet, make_images: Any, state_of: Any, assert_same_state: Any
) -> None:
    model, _ = make_net("plain")
    before, told = state_of(model), []
    with pytest.raises(DataError, match="two images or more to train BatchNorm with, got none"):
        train(model, make_images(5).loader(1), FineTuning(epochs=2), on_epoch=told.append)
    assert_same_state(model, before)
    assert not told
