"""NNI experiments: spaces and cuts, what is refused, and (slowly) managers that start, finish, resume and are gone."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

pytest.importorskip("nni")

from diplugin_nni_search import cut_from, run_experiment, search_space
from nni.experiment import launcher
from nni.tools.nnictl.config_utils import Experiments

from diplugin.errors import DataError, UserError
from diplugin.network import trace_network
from diplugin.strategies.staged import StagedCut, stages_of

TRIAL = """
from diplugin_nni_search import report, trial_cut
cut = trial_cut()
report(sum(cut.depths) / 10)
report(1 - abs(cut.depths[0] - 0.5), cost=cut.rho)
"""
#: NNI leaves sockets and log files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", "ignore:subprocess:ResourceWarning")


def test_a_space_names_every_stage(make_net: Callable[..., Any]) -> None:
    trace = trace_network(*make_net("residual"))
    space = search_space(trace)
    assert [name for name in space if name.startswith("depth_")] == [f"depth_{i}" for i in range(len(stages_of(trace)))]
    assert {"greedy_share", "rho"} <= set(space)
    assert all(low < high for low, high in (entry["_value"] for entry in space.values()))


def test_parameters_become_a_cut_in_the_order_of_the_stages() -> None:
    parameters = {f"depth_{i}": i / 20 + 0.05 for i in (10, 2, 1, 0, 3, 4, 5, 6, 7, 8, 9)}
    cut = cut_from({**parameters, "greedy_share": 0.5, "rho": 3.0})
    assert cut == StagedCut(tuple(i / 20 + 0.05 for i in range(11)), 0.5, 3.0)


@pytest.mark.parametrize("parameters", [{}, {"depth_0": 0.5}, {"greedy_share": 0.1, "rho": 1.0}])
def test_parameters_of_another_space_are_refused(parameters: Any) -> None:
    with pytest.raises(UserError, match="expected parameters depth_0"):
        cut_from(parameters)


@pytest.mark.parametrize("more", [{"tuner": "Magic"}, {"trials": 0}, {"concurrency": 0}])
def test_experiments_that_mean_nothing_are_refused(tmp_path: Path, more: Any) -> None:
    with pytest.raises(UserError, match="a tuner among TPE, Random, Evolution"):
        run_experiment("true", {}, tmp_path, **more)


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"start on port {port}, got Port {port} is not idle"):
            run_experiment("true", {"x": {"_type": "choice", "_value": [1]}}, tmp_path, port=port)


def test_an_experiment_that_is_not_there_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an experiment 'nothing' to resume"):
        run_experiment("true", {}, tmp_path, resume="nothing")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(autouse=True)
def _manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NNI lists its experiments in the home folder, which it looks up when it is imported."""
    monkeypatch.setattr(Experiments.__init__, "__defaults__", (str(tmp_path),))


@pytest.fixture
def managers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(experiment id, process group) of every manager that was started."""
    seen: list[tuple[str, int]] = []
    start = launcher.start_experiment

    def noting(action: str, name: str, *args: Any) -> Any:
        process = start(action, name, *args)  # pyright: ignore[reportArgumentType]
        seen.append((name, os.getpgid(process.pid)))
        return process

    monkeypatch.setattr(launcher, "start_experiment", noting)
    return seen


def assert_gone(managers: list[tuple[str, int]]) -> None:
    assert managers
    for _, group in managers:
        assert group != os.getpgrp()
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["Random", "Evolution"])
def test_an_experiment_runs_resumes_and_is_gone(
    tmp_path: Path, make_net: Callable[..., Any], managers: list[tuple[str, int]], tuner: str
) -> None:
    (tmp_path / "trial.py").write_text(TRIAL)
    model: nn.Module
    model, inputs = make_net("vgg")
    space = search_space(trace_network(model, inputs), rho=(2.0, 9.0))
    settings = {"tuner": tuner, "concurrency": 2, "code": tmp_path}
    command, folder = shlex.join([sys.executable, "trial.py"]), tmp_path / "runs"
    outcomes = run_experiment(command, space, folder, trials=2, port=free_port(), **settings)
    assert len({o.name for o in outcomes}) == 2
    for outcome in outcomes:
        cut = cut_from(outcome.parameters)
        assert outcome.accuracy == pytest.approx(1 - abs(cut.depths[0] - 0.5))
        assert outcome.cost == pytest.approx(cut.rho)
        assert 2 <= cut.rho <= 9
    assert_gone(managers)
    if tuner == "Random":
        more = run_experiment(command, space, folder, trials=3, port=free_port(), resume=managers[-1][0],
                              **settings)  # fmt: skip
        assert len(more) == 3
        assert {o.name for o in outcomes} < {o.name for o in more}
        assert_gone(managers)


@pytest.mark.slow
def test_trials_that_all_fail_say_where_their_logs_are(tmp_path: Path, managers: list[tuple[str, int]]) -> None:
    space = {"x": {"_type": "choice", "_value": [1]}}
    with pytest.raises(DataError, match=r"all failed .* see .*trials") as caught:
        run_experiment("false", space, tmp_path / "runs", trials=1, port=free_port(), tuner="Random")
    assert Path(str(caught.value).rpartition("see ")[2]).is_dir()
    assert_gone(managers)
