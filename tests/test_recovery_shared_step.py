"""Two processes recover a network as one, and end as one."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from diplugin.recovery.shared_step import Part, SharedBatchNorm, SharedStep, fused_backward, plain_backward
from diplugin.team import Team

Processes = Callable[..., list[subprocess.CompletedProcess[str]]]

SCRIPT = """
import copy, os, signal, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from diplugin.accuracy import accuracy
from diplugin.errors import DipluginError
from diplugin.network import trace_network
from diplugin.plan import PruningPlan
from diplugin.recovery import Distillation, compensate, recalibrate_batchnorm, reconstruct, train
from diplugin.surgery import apply_plan
from diplugin.team import one_voice

out, mode = Path(sys.argv[1]), sys.argv[2]

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.deep_norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8, affine=False)
        self.up, self.up_norm = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12, momentum=None)
        self.down, self.head = nn.Conv2d(12, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        y = self.deep_norm(self.deep(x)).relu()
        x = x + self.down(self.up_norm(self.up(y)).relu())
        return self.head(x.mean((2, 3)))

torch.manual_seed(0)
model, x = Net().eval(), torch.randn(99, 3, 8, 8)
y = torch.randint(4, (99,))
x[torch.arange(99), 0, y] += 2.0

class Images(TensorDataset):  # batches of 32, and 3 that are too few to be dealt out
    def __getitem__(self, index):
        if mode == "fails" and torch.distributed.get_rank() == 1 and index == 40:
            raise OSError("the disk is gone")
        return super().__getitem__(index)

data = Images(x, y)
trace = trace_network(model, (x[:1],))
kept = {g.name: tuple(range(0, g.channels, 2)) for g in trace.prunable}
plan = PruningPlan(kept, trace.base_widths, {}, trace.inputs)

def watch(report):
    if mode in ("interrupted", "dies") and report.epoch == 1 and team.rank == 0:
        if mode == "dies":
            os._exit(9)
        raise KeyboardInterrupt

def work():
    shown = {}
    loader = DataLoader(data, batch_size=32)
    shown["repaired"] = copy.deepcopy(model)
    shown["layers"] = compensate(shown["repaired"], loader, trace, plan)
    apply_plan(shown["repaired"], plan)
    recalibrate_batchnorm(shown["repaired"], loader, chunk_size=40)
    rebuilt = shown["rebuilt"] = apply_plan(copy.deepcopy(model), plan)
    reconstruct(rebuilt, model, loader, trace, plan)
    trained = shown["trained"] = copy.deepcopy(rebuilt)
    if team.rank:  # whatever a process comes with, all go on from the first one's state
        nn.init.zeros_(trained.head.weight)
    losses = []
    shuffled = DataLoader(data, batch_size=32, shuffle=True)
    train(trained, shuffled, Distillation(epochs=3, lr=0.05), teacher=model, checkpoint=out / "state.safetensors",
          on_epoch=lambda report: (losses.append(report.loss), watch(report)))
    state = {f"{n}.{k}": v for n, m in shown.items() if isinstance(m, nn.Module) for k, v in m.state_dict().items()}
    state["losses"] = torch.tensor(losses, dtype=torch.float64)
    state["accuracy"] = torch.tensor([accuracy(trained, loader)])
    save_file({k: v.contiguous() for k, v in state.items()}, out / f"rank{team.rank}")

try:
    with one_voice() as team:
        work()
except (DipluginError, KeyboardInterrupt, OSError) as error:
    print("said:", str(error) or "interrupted", file=sys.stderr)
    sys.exit(2)
"""


SINGLES = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from torch import nn
from diplugin.errors import DipluginError
from diplugin.recovery import FineTuning, train
from diplugin.team import one_voice

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
x, y, losses = torch.randn(18, 6), torch.arange(18) % 3, []
sizes = {"some": [8, 1, 8, 1], "only": [1, 1]}[sys.argv[2]]
batches = list(zip(x[:sum(sizes)].split(sizes), y[:sum(sizes)].split(sizes)))
try:
    with one_voice() as team:
        train(model, batches, FineTuning(epochs=2, momentum=0.0), on_epoch=lambda report: losses.append(report.loss))
    state = {**model.state_dict(), "losses": torch.tensor(losses, dtype=torch.float64)}
    save_file(state, Path(sys.argv[1]) / f"rank{team.rank}")
except DipluginError as error:
    print("said:", error, file=sys.stderr)
    sys.exit(2)
"""

UNEVEN = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from torch import nn
from diplugin.recovery import Distillation, FineTuning, train
from diplugin.team import one_voice

out, mode = Path(sys.argv[1]), sys.argv[2]

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.rare = nn.Linear(6, 8), nn.Linear(8, 8)
        self.drop, self.head = nn.Dropout(0.5 if mode == "dropout" else 0.0), nn.Linear(8, 3)

    def forward(self, x):
        chosen, x = x[:, 0] > 0, self.drop(self.stem(x).relu())
        if bool(chosen.any()):
            x = torch.where(chosen[:, None], self.rare(x), x)
        return self.head(x)

torch.manual_seed(0)
model, teacher, x = Net(), Net(), torch.randn(19, 6)
x[:, 0] = -1.0
if mode == "rare":  # of two processes the first one alone runs that layer, in the first of the batches
    x[:3, 0] = 1.0
y = torch.eye(3)[torch.arange(19) % 3]
if mode == "soft":
    y[4:8] = torch.randn(4, 3).softmax(1)  # what the second one has of the first batch
batches, losses = list(zip(x.split(8), y.split(8))), []
settings = {"soft": FineTuning, "rare": FineTuning, "dropout": Distillation}[mode](epochs=3, lr=0.1)
stop = sys.argv[3:] == ["stop"]

def watch(report):
    losses.append(report.loss)
    if stop:
        raise KeyboardInterrupt

try:
    with one_voice() as team:
        train(model, batches, settings, teacher=teacher, checkpoint=out / "state.safetensors", on_epoch=watch)
except KeyboardInterrupt:
    sys.exit(130)
state = {**model.state_dict(), "losses": torch.tensor(losses, dtype=torch.float64)}
save_file(state, out / f"rank{team.rank}")
"""


def close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def of_one_and_two(
    processes: Processes, script: str, folder: Path, mode: str
) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """What every process of one and of two has saved, by (processes, rank)."""
    found = {}
    for size in (1, 2):
        (folder / f"of{size}").mkdir()
        for rank, done in enumerate(processes(script, size, folder / f"of{size}", mode)):
            assert done.returncode == 0, done.stderr
            found[size, rank] = load_file(folder / f"of{size}" / f"rank{rank}")
    return found


@pytest.mark.slow
def test_two_processes_recover_as_one(processes: Processes, tmp_path: Path) -> None:
    """Compensation, recalibration, reconstruction, training and accuracy; batches of 32, 32, 32 and 3."""
    found = of_one_and_two(processes, SCRIPT, tmp_path, "")
    close(found[1, 0], found[2, 0])
    assert all(torch.equal(found[2, 0][name], value) for name, value in found[2, 1].items())


@pytest.mark.slow
def test_interrupted_all_end_with_one_message_and_go_on(processes: Processes, tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    assert all(done.returncode == 0 for done in processes(SCRIPT, 2, tmp_path / "whole", ""))
    stopped = processes(SCRIPT, 2, tmp_path / "cut", "interrupted")
    assert {done.returncode for done in stopped} <= {2, 130}
    said = [line for done in stopped for line in done.stderr.splitlines() if line.startswith("said:")]
    assert len(said) == 1
    assert "interrupted" in said[0]
    assert all(done.returncode == 0 for done in processes(SCRIPT, 2, tmp_path / "cut", ""))
    whole, again = (load_file(tmp_path / name / "rank1") for name in ("whole", "cut"))
    assert len(again.pop("losses")) == 2
    assert all(torch.equal(whole[name], value) for name, value in again.items())


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "message"), [("fails", "the disk is gone"), ("dies", "another process of this run")])
def test_a_process_that_stops_ends_all_with_one_message(
    processes: Processes, tmp_path: Path, mode: str, message: str
) -> None:
    stopped = processes(SCRIPT, 2, tmp_path, mode)
    assert all(done.returncode for done in stopped)
    said = [line for done in stopped for line in done.stderr.splitlines() if line.startswith("said:")]
    assert len(said) == 1
    assert message in said[0]


@pytest.mark.slow
def test_single_images_are_skipped_by_all_processes_alike(processes: Processes, tmp_path: Path) -> None:
    found = of_one_and_two(processes, SINGLES, tmp_path, "some")
    assert len(found[1, 0]["losses"]) == 2
    for rank in (0, 1):
        close(found[1, 0], found[2, rank])
    stopped = processes(SINGLES, 2, tmp_path, "only")
    assert {done.returncode for done in stopped} == {2}
    said = [line for done in stopped for line in done.stderr.splitlines() if line.startswith("said:")]
    assert len(said) == 1
    assert "two images or more to train BatchNorm with" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["soft", "rare"])
def test_parts_that_are_unlike_train_as_the_whole(processes: Processes, tmp_path: Path, mode: str) -> None:
    """Soft labels in one part only, where the other alone looks like 0/1 targets; a layer that one part never runs."""
    found = of_one_and_two(processes, UNEVEN, tmp_path, mode)
    for rank in (0, 1):
        close(found[1, 0], found[2, rank])


@pytest.mark.slow
def test_with_dropout_processes_stay_together_and_go_on_as_if_not_interrupted(
    processes: Processes, tmp_path: Path
) -> None:
    """Batches of 8, 8 and 3, the last one too small to be dealt."""
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    assert all(done.returncode == 0 for done in processes(UNEVEN, 2, tmp_path / "whole", "dropout"))
    assert all(done.returncode == 130 for done in processes(UNEVEN, 2, tmp_path / "cut", "dropout", "stop"))
    assert all(done.returncode == 0 for done in processes(UNEVEN, 2, tmp_path / "cut", "dropout"))
    whole = load_file(tmp_path / "whole" / "rank0")
    del whole["losses"]
    for name, rank in (("whole", 1), ("cut", 0), ("cut", 1)):
        found = load_file(tmp_path / name / f"rank{rank}")
        assert all(torch.equal(found[key], value) for key, value in whole.items()), (name, rank)


# --- without other processes ---


def test_the_shared_normalisation_is_batch_norm() -> None:
    """Of a team of one: value, running statistics and all gradients, in double precision."""
    one = nn.BatchNorm2d(5).double().train()
    nn.init.normal_(one.weight)
    two = copy.deepcopy(one)
    x = (torch.randn(6, 5, 3, 3, dtype=torch.float64) + 50).requires_grad_()
    z = x.detach().clone().requires_grad_()
    pull = torch.randn_like(x)
    (one(x) * pull).sum().backward()
    with SharedBatchNorm(Team()):
        (two(z) * pull).sum().backward()
    torch.testing.assert_close(z.grad, x.grad)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad)
    for a, b in zip(one.buffers(), two.buffers(), strict=True):
        torch.testing.assert_close(b, a)


def test_gradients_flow_through_the_statistics() -> None:
    x, weight, bias = torch.randn(4, 3, 2), torch.rand(3), torch.randn(3)

    def normalised(*args: torch.Tensor) -> torch.Tensor:
        with SharedBatchNorm(Team()):
            return F.batch_norm(args[0], None, None, args[1], args[2], True)

    assert torch.autograd.gradcheck(normalised, [t.double().requires_grad_() for t in (x, weight, bias)])


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3), (4, 5, 3, 2)])
def test_the_backward_for_other_devices_is_the_fused_one(shape: tuple[int, ...]) -> None:
    dy, x = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    scale, mean, var = (torch.rand(5, dtype=torch.float64) for _ in range(3))
    for one, two in zip(fused_backward(dy, x, scale, mean, var, 1e-5), plain_backward(dy, x, scale, mean, var, 1e-5),
                        strict=True):  # fmt: skip
        torch.testing.assert_close(two, one)


def test_in_eval_mode_nothing_is_exchanged() -> None:
    norm, x = nn.BatchNorm1d(3).eval(), torch.randn(4, 3)
    with SharedBatchNorm(Team(1, 2)):  # there is no other process: an exchange would fail
        normalised = norm(x)
    torch.testing.assert_close(normalised, x / (1 + norm.eps) ** 0.5)


def test_parts_cover_the_batch() -> None:
    batch = (torch.arange(11), torch.arange(11))
    parts = [SharedStep(Team(rank, 3)).part(batch) for rank in range(3)]
    assert torch.equal(torch.cat([part.batch[0] for part in parts]), batch[0])
    assert sum(part.share for part in parts) == pytest.approx(1.0)
    few = (torch.arange(5), torch.arange(5))
    assert SharedStep(Team(0, 3)).part(few) == Part(few)
