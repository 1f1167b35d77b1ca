"""Two processes score as one, and end as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import os, sys, torch
from safetensors.torch import save_file
from torch import nn
from diplugin.errors import DipluginError
from diplugin.features import Observation, UntilStable, process_group, score_points
from diplugin.taps import TapPoint

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


def run(folder: Path, size: int, batch: int, mode: str = "") -> list[subprocess.CompletedProcess[str]]:
    """Start `size` processes that find each other on a free port of this machine."""
    script = folder / "score.py"
    script.write_text(SCRIPT)
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(size):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "adapters")]), "RANK": str(rank),
               "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
               "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
        command = [sys.executable, str(script), str(folder / f"of{size}"), str(batch), mode]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    done = []
    for process in started:
        out, err = process.communicate(timeout=300)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["", "until"])
def test_two_processes_score_as_one(tmp_path: Path, mode: str) -> None:
    """230 images in chunks of 40 are six: the tail of 30 stands alone, and both processes get three."""
    for size, batch in ((1, 230), (2, 17)):
        for done in run(tmp_path, size, batch, mode):
            assert done.returncode == 0, done.stderr
    alone = load_file(tmp_path / "of1.0")
    for rank in (0, 1):
        shared = load_file(tmp_path / f"of2.{rank}")
        assert shared.keys() == alone.keys()
        for name in alone:
            torch.testing.assert_close(shared[name], alone[name], rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_a_process_that_fails_ends_all_with_one_message(tmp_path: Path) -> None:
    first, second = run(tmp_path, 2, 17, "fails")
    assert (first.returncode, second.returncode) == (2, 2)
    assert "process 1 of 2 stopped: the disk is gone" in first.stderr
    assert "the disk is gone" in second.stderr


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_one_message(tmp_path: Path) -> None:
    first, second = run(tmp_path, 2, 17, "dies")
    assert (first.returncode, second.returncode) == (2, 9)
    assert "another process of this run ended" in first.stderr
    assert "Traceback" not in first.stderr
