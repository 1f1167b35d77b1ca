"""The processes of one run: what they exchange, and `compress` as a whole on two of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, SequentialSampler, TensorDataset

from diplugin.boundary import GuardedLoader
from diplugin.errors import DataError
from diplugin.plan import PruningPlan
from diplugin.team import Team, current_team, one_voice, process_group

Processes = Callable[..., list[subprocess.CompletedProcess[str]]]

COMPRESS = """
import os, sys
sys.path.insert(0, sys.argv[1])
import diplugin.pipeline as pipeline
from diplugin.cli import main

if sys.argv[3] == "interrupted":
    def epoch(self, report):
        if report.epoch == 2 and os.environ["RANK"] == "0":
            raise KeyboardInterrupt
    pipeline._Run._epoch = epoch
more = {"resumed": ["--resume"], "measured": ["--strategy", "measured-cuts", "--rounds", "1"]}.get(sys.argv[3], [])
sys.exit(main(["compress", "net:net", "digits", "--example-shape", "1,1,24,24", "--budget", "macs=0.5", "--images",
               "300", "--epochs", "3", "--out", sys.argv[2], *more]))
"""

NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3),
                         nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
"""

EXCHANGE = """
import sys, torch
from diplugin.team import process_group
with process_group() as team:
    mine = torch.tensor([1.0 + team.rank, 2.0])
    other = torch.tensor([3 + team.rank])
    team.sum([mine, other])
    assert mine.tolist() == [3.0, 4.0] and other.tolist() == [7]
    state = torch.full((2,), float(team.rank))
    team.follow_first([state])
    assert state.tolist() == [0.0, 0.0]
    assert [int(t) for t in team.everybodys(torch.tensor(team.rank))] == [0, 1]
    assert team.told_by_first("größer" if team.rank == 0 else "") == "größer"
    assert team.sent_by_first(b"") == b"" and team.sent_by_first(bytes([0, 255]) * (1 - team.rank)) == bytes([0, 255])
    done = []
    assert team.done_by_first(lambda: done.append(1) or {"a": None}) == {"a": None}
    assert len(done) == 1 - team.rank
"""

STOPPED = """
import sys, torch
import torch.distributed as dist
from diplugin.team import one_voice
try:
    with one_voice() as team:
        import torch._dynamo  # as an optimizer does, long after the processes have met
        messages = dist.distributed_c10d._get_default_store()
        if team.rank == 0:
            raise ValueError("enough")
        team.sum([torch.ones(2)])
except ValueError as error:
    print(error, "read by all" if messages.check(["diplugin/left/1"]) else "unread")
    sys.exit(1)
"""


@pytest.mark.slow
def test_what_is_exchanged(processes: Processes) -> None:
    for done in processes(EXCHANGE, 2):
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_first_process_leaves_when_the_others_have_read_why(processes: Processes) -> None:
    first, second = processes(STOPPED, 2)
    assert (first.returncode, first.stdout) == (1, "enough read by all\n")
    assert second.returncode
    assert not second.stdout + second.stderr


@pytest.mark.slow
def test_two_processes_compress_as_one_and_go_on_after_an_interruption(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)

    def run(size: int, out: str, mode: str) -> list[subprocess.CompletedProcess[str]]:
        return processes(COMPRESS, size, tmp_path, tmp_path / out, mode)

    for size, out in ((1, "one"), (2, "two")):
        assert all(done.returncode == 0 for done in run(size, out, "whole"))
    one, two = (load_file(tmp_path / out / "weights.safetensors") for out in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-4) for name in one)
    plans = [json.loads((tmp_path / out / "plan.json").read_text()) for out in ("one", "two")]
    assert plans[0] == plans[1]

    stopped = run(2, "cut", "interrupted")
    assert sum("interrupted" in done.stderr for done in stopped) == 1
    resumed = run(2, "cut", "resumed")
    assert all(done.returncode == 0 for done in resumed)
    again = load_file(tmp_path / "cut" / "weights.safetensors")
    assert all(torch.equal(two[name], again[name]) for name in two)
    assert [bool(done.stdout) for done in resumed] == [True, False]


@pytest.mark.slow
def test_two_processes_measure_cuts_as_one(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    for size, out in ((1, "one"), (2, "two")):
        assert all(done.returncode == 0 for done in processes(COMPRESS, size, tmp_path, tmp_path / out, "measured"))
    one, two = (PruningPlan.load(tmp_path / out / "plan.json") for out in ("one", "two"))
    assert one.kept == two.kept


# --- alone ---


def test_one_process_exchanges_nothing() -> None:
    team, value = Team(), torch.ones(2)
    team.sum([value])
    team.follow_first([value])
    assert value.tolist() == [1.0, 1.0]
    assert team.everybodys(value)[0] is value
    assert team.told_by_first("a") == "a"
    assert team.done_by_first(lambda: 7) == 7
    assert current_team() == team
    with process_group() as found, one_voice() as voice:
        assert found == voice == team


def of_one_process(images: Dataset[Any], how: str) -> Iterable[Any]:
    """A loader of what is the first one's share of two."""
    share = DistributedSampler(images, num_replicas=2, rank=0)
    if how == "sampler":
        return DataLoader(images, sampler=share)
    batches: Any = BatchSampler(share, 4, False)
    if how == "prepared":  # as accelerate does: every batch, of which this process takes each second one
        batches = BatchSampler(SequentialSampler(range(8)), 4, False)
        batches.num_processes = 2
    loader = DataLoader(images, batch_sampler=batches)
    return GuardedLoader(loader) if how == "guarded" else loader


@pytest.mark.parametrize("how", ["sampler", "batches", "prepared", "guarded"])
def test_a_loader_of_a_share_is_refused_where_there_are_others(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Each would be dealt a share of its share, and take it for its part of what all have."""
    images = TensorDataset(torch.zeros(8, 1))
    assert current_team(of_one_process(images, how)) == Team(), "alone: as the loader says"
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(DataError, match=r"the same loader in every process, got one with a .*Sampler"):
        current_team(of_one_process(images, how))


def test_rows_are_dealt_evenly_and_completely() -> None:
    for length, size in ((0, 2), (1, 3), (7, 3), (12, 4)):
        parts = [range(length)[Team(rank, size).rows(length)] for rank in range(size)]
        assert [row for part in parts for row in part] == list(range(length))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_errors_pass_through_alone() -> None:
    with pytest.raises(DataError, match="gone"), one_voice() as team, team.together():
        raise DataError("gone")
