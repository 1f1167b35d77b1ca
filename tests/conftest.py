"""What many tests are given: tiny networks, images for them, processes, and runs without their slow parts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tiny_networks import tiny_network
from torch import Tensor, nn

from diplugin import latency
from diplugin.measurements import Measure

# By itself pytest explains only the asserts of the files that it collects.
pytest.register_assert_rewrite("nni_masks", "nni_training", "report_pages")

# For the examples; last, so that an installed diplugin is the one that is tested.
sys.path.append(str(Path(__file__).resolve().parents[1]))

# How long an example takes says more about the machine than about the code.
settings.register_profile("diplugin", deadline=None)
settings.load_profile("diplugin")

BRIEF = latency.Protocol(rounds=2, round_ms=1.0, warmup_ms=1.0, patience=1, gap_ms=0.0, pause_s=0.0, pauses=0)


@pytest.fixture
def make_net() -> Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]:
    """`make_net(kind, batch=1)` -> (model in eval mode, example inputs (x,)) of one of `tiny_networks.KINDS`."""

    def make(kind: str, batch: int = 1) -> tuple[nn.Module, tuple[Tensor, ...]]:
        return tiny_network(kind), (torch.randn(batch, 3, 8, 8),)

    return make


@dataclass(frozen=True)
class ImageSet:
    """Images [N, 3, 8, 8] whose classes differ in their mean pattern, and class ids [N]."""

    images: Tensor
    labels: Tensor

    def loader(self, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """A list serves as a loader: batches of (images, labels) in order."""
        return list(zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True))


@pytest.fixture
def make_images() -> Callable[..., ImageSet]:
    """`make_images(count, classes=4, seed=0)` -> ImageSet."""

    def make(count: int, classes: int = 4, seed: int = 0) -> ImageSet:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(classes, (count,), generator=generator)
        patterns = torch.randn(classes, 3, 8, 8, generator=generator)
        return ImageSet(patterns[labels] + 0.7 * torch.randn(count, 3, 8, 8, generator=generator), labels)

    return make


@pytest.fixture
def processes(tmp_path: Path) -> Callable[..., list[subprocess.CompletedProcess[str]]]:
    """`processes(script, size, *args)` runs a script, given as text, in processes that find each other."""

    def run(script: str, size: int, *args: object) -> list[subprocess.CompletedProcess[str]]:
        (tmp_path / "script.py").write_text(script)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        root = Path(__file__).resolve().parents[1]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "adapters")]), "OMP_NUM_THREADS": "1",
               "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
               "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
        command = [sys.executable, str(tmp_path / "script.py"), *map(str, args)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = [subprocess.Popen(command, env={**env, "RANK": str(rank)}, **pipes) for rank in range(size)]
        ended = [(process, *process.communicate(timeout=300)) for process in started]
        return [subprocess.CompletedProcess(p.args, p.returncode, out, err) for p, out, err in ended]

    return run


@pytest.fixture
def brief_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a whole run times is timed for an instant: a busy machine would repeat it for a minute, of no use here."""
    timed = partial(latency.measure_side_by_side, protocol=BRIEF)
    monkeypatch.setattr(latency, "measure_side_by_side", timed)


def _export_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Measure, "exported", lambda *_: {"size_mb": 0.1})
    patch.setattr(Measure, "timed", lambda _, *paths: [None] * len(paths))


@pytest.fixture
def not_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX files are other tests' affair, and take seconds each."""
    _export_nothing(monkeypatch)


@pytest.fixture(scope="module")
def nothing_is_exported() -> Iterator[None]:
    """`not_exported` for a whole module, and what its fixtures run before the tests."""
    with pytest.MonkeyPatch.context() as patch:
        _export_nothing(patch)
        yield


@pytest.fixture
def state_of() -> Callable[[nn.Module], dict[str, Any]]:
    """Everything about a model that tracing, scoring and the like must leave as it was."""

    def state(model: nn.Module) -> dict[str, Any]:
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return {
            "weights": {k: v.clone() for k, v in model.state_dict().items()},
            "modes": [m.training for m in model.modules()],
            "grads": [(p.requires_grad, p.grad is None) for p in model.parameters()],
            "hooks": [len(getattr(m, name)) for m in model.modules() for name in hooks],
        }

    return state


@pytest.fixture
def assert_same_state(state_of: Callable[[nn.Module], dict[str, Any]]) -> Callable[[nn.Module, dict[str, Any]], None]:
    def check(model: nn.Module, before: dict[str, Any]) -> None:
        after = state_of(model)
        assert {k: after[k] for k in after if k != "weights"} == {k: before[k] for k in before if k != "weights"}
        assert after["weights"].keys() == before["weights"].keys()
        assert all(torch.equal(after["weights"][k], v) for k, v in before["weights"].items())

    return check


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test starts from the same random state and leaves the default one to nobody."""
    torch.manual_seed(0)
    yield
