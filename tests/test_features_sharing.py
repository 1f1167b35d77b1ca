"""Two processes score as one, and end as one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

Processes = Callable[..., list[subprocess.CompletedProcess[str]]]

SCRIPT = """
import os, sys, torch
from safetensors.torch import save_file
from torch import nn
from diplugin.errors import DipluginError
from diplugin.features import Observation, UntilStable, score_points
from diplugin.taps import TapPoint
from diplugin.team import process_group

out, batch, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                      nn.Linear(6, 3))
points = [TapPoint("0", "out"), TapPoint("2", "in"), TapPoint("5", "in")]
labels = torch.randint(3, (230,))
x = torch.randn(230, 1, 8, 8) + torch.randn(3, 1, 8, 8)[labels]

def loader(rank):
    for turn, part in enumerate(zip(x.split(batch), labels.split(batch))):
        if rank == 1 and turn == 2 and mode == "fails":
            raise RuntimeError("the disk is gone")
        if rank == 1 and turn == 2 and mode == "dies":
            os._exit(9)
        yield part

try:
    with process_group() as team:
        until = UntilStable(0.9) if mode == "until" else None
        scores = score_points(model, loader(team.rank), points, Observation(chunk_size=40), until=until)
        found = {f"{p.layer}.{p.side}": s.scores for p, s in scores.items()}
        found["images"] = torch.tensor([s.images for s in scores.values()])
        found["di"] = torch.tensor([s.di for s in scores.values()], dtype=torch.float64)
        save_file(found, f"{out}.{team.rank}")
except (DipluginError, RuntimeError) as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["", "until"])
def test_two_processes_score_as_one(processes: Processes, tmp_path: Path, mode: str) -> None:
    """230 images in chunks of 40 are six: the tail of 30 stands alone, and both processes get three."""
    for size, batch in ((1, 230), (2, 17)):
        for done in processes(SCRIPT, size, tmp_path / f"of{size}", batch, mode):
            assert done.returncode == 0, done.stderr
    alone = load_file(tmp_path / "of1.0")
    for rank in (0, 1):
        shared = load_file(tmp_path / f"of2.{rank}")
        assert shared.keys() == alone.keys()
        for name in alone:
            torch.testing.assert_close(shared[name], alone[name], rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_a_process_that_fails_ends_all_with_one_message(processes: Processes, tmp_path: Path) -> None:
    first, second = processes(SCRIPT, 2, tmp_path / "of2", 17, "fails")
    assert (first.returncode, second.returncode) == (2, 2)
    assert "process 1 of 2 stopped: the disk is gone" in first.stderr
    assert "the disk is gone" in second.stderr


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_one_message(processes: Processes, tmp_path: Path) -> None:
    first, second = processes(SCRIPT, 2, tmp_path / "of2", 17, "dies")
    assert (first.returncode, second.returncode) == (2, 9)
    assert "another process of this run ended" in first.stderr
    assert "Traceback" not in first.stderr
