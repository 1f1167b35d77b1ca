"""What the benchmarks share, and that each of them starts as its page says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuts
import fine_tune
import numpy as np
import protocol
import pytest
import torch
import torch_pruning as tp
import training
from safetensors.torch import load_file, save_file
from torch import nn

from diplugin.sources import flip_and_shift

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [p.name for p in sorted((ROOT / "benchmarks").glob("*.py")) if '__name__ == "__main__"' in p.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_starts_from_any_folder(name: str, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), "--help"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


def test_processes_that_share_a_notebook_lose_no_row(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[1:3]; from protocol import Notebook\n"
        "book = Notebook(Path(sys.argv[3]), ('worker', 'turn'))\n"
        "for turn in range(20): book.add({'worker': sys.argv[4], 'turn': turn})"
    )
    out = tmp_path / "rows.json"
    places = [str(ROOT / "benchmarks"), str(ROOT), str(out)]
    started = [subprocess.Popen([sys.executable, "-c", script, *places, str(worker)]) for worker in range(3)]
    assert [process.wait(120) for process in started] == [0, 0, 0]
    rows = protocol.Notebook(out, ("worker", "turn")).rows
    assert {(row["worker"], row["turn"]) for row in rows} == {(str(w), t) for w in range(3) for t in range(20)}
    assert len(rows) == 60


def test_fingerprints_tell_networks_apart_by_every_weight_and_buffer() -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    assert fine_tune.fingerprint(net()) == fine_tune.fingerprint(net())
    for name in net().state_dict():
        other = net()
        other.state_dict()[name].add_(1)
        assert fine_tune.fingerprint(other) != fine_tune.fingerprint(net()), name


@pytest.mark.parametrize(("share", "shift"), [(0.0, 4), (0.7, 1)])
def test_training_does_the_same_steps_as_a_plain_loop(share: float, shift: int) -> None:
    x, y = torch.randn(40, 3, 8, 8), torch.randint(3, (40,))

    def net(seed: int = 1) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))

    teacher = net(2).eval()
    recipe = training.Recipe(epochs=2, lr=0.1, batch=20, teacher_weight=share, shift=shift)
    trained = recipe.train(net(), x, y, seed=3, teacher=teacher)
    twin = net().train()
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(4):
        if step % 2 == 0:
            order = torch.randperm(40)
        ids = order[20 * (step % 2) :][:20]
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + torch.cos(torch.tensor(torch.pi * step / 4)).item())
        images = flip_and_shift(x[ids], shift)
        said = twin(images)
        hard = nn.functional.cross_entropy(said, y[ids])
        told, own = (torch.softmax(z / 4, 1) for z in (teacher(images).detach(), said))
        soft = 16 * (told * (told.log() - own.log())).sum(1).mean()
        optimizer.zero_grad()
        ((1 - share) * hard + share * soft).backward()
        optimizer.step()
    for ours, theirs in zip(trained.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_share_for_a_teacher_asks_for_one() -> None:
    with pytest.raises(ValueError, match="teacher"):
        training.Recipe(teacher_weight=0.5).train(nn.Linear(2, 2), torch.zeros(4, 2), torch.zeros(4).long(), seed=0)


def small_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3))


def trained_on(device: str, nets: list[nn.Module], together: bool) -> list[list[torch.Tensor]]:
    """What the nets' tensors are after their courses, each with another seed."""
    recipe = training.Recipe(epochs=3, lr=0.1, batch=16, teacher_weight=0.3)
    draw = torch.Generator().manual_seed(5)
    x, y = torch.randn(48, 3, 8, 8, generator=draw).to(device), torch.randint(3, (48,), generator=draw).to(device)
    runs = [training.Training(recipe, net.to(device), x, y, seed, small_net(9)) for seed, net in enumerate(nets)]
    for group in [runs] if together else [[run] for run in runs]:
        training.train_together(group)
    return [[t.detach().cpu() for t in run.model.state_dict().values()] for run in runs]


def test_networks_that_train_together_end_as_they_do_alone() -> None:
    together = trained_on("cpu", [small_net(1), small_net(2)], together=True)
    alone = trained_on("cpu", [small_net(1), small_net(2)], together=False)
    assert all(torch.equal(a, b) for mine, its in zip(together, alone, strict=True)
               for a, b in zip(mine, its, strict=True))  # fmt: skip


def test_a_training_that_was_killed_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    class Killed(training.Training):
        def step(self) -> None:
            if self.done == 7:
                raise KeyboardInterrupt
            super().step()

    def run(kind: type[training.Training], seed: int) -> training.Training:
        return kind(training.Recipe(epochs=3, lr=0.1, batch=16), small_net(seed), x, y, seed=4)

    x, y, path = torch.randn(48, 3, 8, 8), torch.randint(3, (48,)), tmp_path / "half.safetensors"
    whole, again = run(training.Training, 1), run(training.Training, 2)
    training.train_together([whole])
    with pytest.raises(KeyboardInterrupt):
        training.train_together([run(Killed, 1)], [path], every=5)
    assert int(load_file(path)["at"]) == 5
    training.train_together([again], [path], every=5)
    for ours, theirs in zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert not path.exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_does_what_a_step_on_the_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    on_gpu = trained_on("cuda", [small_net(1), small_net(2)], together=True)
    on_cpu = trained_on("cpu", [small_net(1), small_net(2)], together=False)
    for mine, its in zip(on_gpu, on_cpu, strict=True):
        for a, b in zip(mine, its, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_pruned_networks_come_back_from_their_folder_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(2, 3, 32, 32), protocol.cifar_resnet.resnet20().eval()
    graph = tp.DependencyGraph().build_dependency(model, x)
    block: Any = model.layer2[1]
    graph.get_pruning_group(block.conv1, tp.prune_conv_out_channels, [0, 3, 17]).prune()
    block.conv2.bias = nn.Parameter(torch.randn(32))  # as repairs may add one
    kept = cuts.Cuts(tmp_path, lambda: protocol.cifar_resnet.resnet20())
    assert kept.get("L2, local", 0.5, lambda: model) is model
    again: Any = kept.get("L2, local", 0.5, lambda: pytest.fail("pruned twice"))
    assert torch.equal(again(x), model(x))
    assert fine_tune.fingerprint(again) == fine_tune.fingerprint(model)
    assert again.layer2[1].conv1.out_channels == again.layer2[1].conv2.in_channels == 29
    assert kept.get("L2, local", 0.3, lambda: None) is None
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_fine_tuning_shared_by_two_processes_ends_with_the_rows_of_one(tmp_path: Path) -> None:
    def run(out: str, *more: str) -> list[dict[str, Any]]:
        command = [sys.executable, str(ROOT / "benchmarks" / "fine_tune.py"), "--data", str(tmp_path), "--weights",
                   str(tmp_path), "--json", str(tmp_path / out), "--only", "L2, local;L1, local", "--fractions", ".6",
                   "--seeds", "0", "--epochs", "1", "--images", "256", *more]  # fmt: skip
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        rows = json.loads((tmp_path / out).read_text())["rows"]
        return sorted(rows, key=lambda row: row["contender"])

    draw = np.random.default_rng(0)
    for name, count in (("train", protocol.HOLDOUT + fine_tune.CALIBRATION + 256), ("test", 100)):
        x, y = draw.integers(256, size=(count, 32, 32, 3), dtype=np.uint8), draw.integers(10, size=count)
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
    torch.manual_seed(0)
    save_file(protocol.cifar_resnet.resnet20().state_dict(), tmp_path / "cifar10_resnet20.safetensors")
    shared = run("shared.json", "--workers", "2")
    assert [row["contender"] for row in shared] == ["L1, local", "L2, local"]
    assert run("alone.json") == shared
    assert run("shared.json") == shared  # nothing is left to do
