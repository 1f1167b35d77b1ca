"""NNI experiments that search over staged cuts: offline, local, and gone when they are done.

A trial is any command that asks NNI for its parameters (`trial_cut`), makes and judges a network, and reports
(`report`). `run_experiment` starts NNI's manager, waits for `DONE`, reads the outcomes and takes the manager down,
whatever happens meanwhile. Experiments keep their state under their folder, so one that was stopped goes on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diplugin.errors import DataError, MissingExtraError, UserError, first_line
from diplugin.network import NetworkTrace
from diplugin.strategies.pareto import Outcome
from diplugin.strategies.staged import StagedCut, stages_of

try:
    import nni
    from nni.experiment import Experiment, launcher, rest
except ImportError as error:
    raise MissingExtraError(f'expected NNI 3.0 for experiments, got {error}; pip install "diplugin[nni]"') from error

TUNERS = ("TPE", "Random", "Evolution")
_ENDS = ("DONE", "STOPPED", "ERROR")
_POLL_S = 0.5
_START_S = 60.0
_ATTEMPTS = 4


def search_space(trace: NetworkTrace, rho: tuple[float, float] = (1.0, 100.0)) -> dict[str, Any]:
    """NNI's search space over a network's staged cuts: each stage's depth, the greedy share and rho."""
    depths = {f"depth_{i}": {"_type": "uniform", "_value": [0.05, 1.0]} for i in range(len(stages_of(trace)))}
    share = {"greedy_share": {"_type": "uniform", "_value": [0.0, 1.0]}}
    return {**depths, **share, "rho": {"_type": "loguniform", "_value": list(rho)}}


def cut_from(parameters: Mapping[str, Any]) -> StagedCut:
    """The staged cut that a trial's parameters stand for.

    Raises:
        UserError: parameters of another search space.
    """
    depths = [parameters[name] for name in sorted((k for k in parameters if k.startswith("depth_")), key=_number)]
    if not depths or not {"greedy_share", "rho"} <= set(parameters):
        raise UserError(f"expected parameters depth_0, …, greedy_share and rho, got {sorted(parameters)}")
    return StagedCut(tuple(depths), parameters["greedy_share"], parameters["rho"])


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def trial_cut() -> StagedCut:
    """In a trial: the cut that NNI asks for."""
    return cut_from(nni.get_next_parameter())


def report(accuracy: float, cost: float | None = None) -> None:
    """In a trial: an intermediate accuracy, or with the cost the final one.

    The parameters go along: where trials start at the same moment, NNI hands them out in the order of asking and
    writes them down in another.
    """
    if cost is None:
        nni.report_intermediate_result(accuracy)
    else:
        nni.report_final_result({"default": accuracy, "cost": cost, "parameters": nni.get_current_parameter()})


def run_experiment(
    command: str,
    space: Mapping[str, Any],
    folder: str | Path,
    *,
    trials: int = 20,
    tuner: str = "TPE",
    concurrency: int = 1,
    port: int = 8080,
    seed: int = 0,
    name: str = "diplugin",
    resume: str | None = None,
    code: str | Path = ".",
) -> list[Outcome]:
    """Run trials until there are enough of them, and take everything down again.

    Args:
        command: run in `code` for each trial, through a shell: quote what a user named.
        space: NNI's search space.
        folder: keeps the experiment's state and logs, by its id.
        trials: in all, those of a resumed experiment included.
        tuner: "TPE", "Random" or "Evolution".
        port: of the web page, on this machine.
        resume: the id of a stopped experiment under the folder.

    Returns:
        the successful trials, in NNI's order.

    Raises:
        UserError: an unknown tuner, a port in use, an experiment that is not there.
        DataError: every trial failed, and the message says where their logs are; or they report in another way.
    """
    if tuner not in TUNERS or trials < 1 or concurrency < 1:
        raise UserError(f"expected a tuner among {', '.join(TUNERS)} and counts of 1 or more, got {tuner!r}, "
                        f"{trials} trials, {concurrency} at once")  # fmt: skip
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # NNI talks to its own manager over HTTP; no proxy may come between.
    with _Environment(no_proxy="localhost,127.0.0.1", NO_PROXY="localhost,127.0.0.1"):
        for _ in range(_ATTEMPTS):
            experiment: Any = Experiment("local", resume)
            config: Any = experiment.config
            config.experiment_name, config.trial_command, config.search_space = name, command, dict(space)
            config.trial_code_directory, config.experiment_working_directory = str(Path(code).resolve()), str(folder)
            config.max_trial_number, config.trial_concurrency = trials, concurrency
            config.tuner.name, config.tuner.class_args = tuner, _class_args(tuner, seed)
            status, jobs = _run(experiment, port, resume is not None, trials)
            # NNI gives its tuner ten seconds to come up, which a busy machine does not keep either.
            if status != "ERROR" or jobs:
                break
    outcomes = [_outcome(job) for job in jobs if job.finalMetricData]
    if not outcomes:
        logs = folder / experiment.id / "environments" / "local-env" / "trials"
        raise DataError(f"expected trials that report, all failed ({status}): see {logs}")
    return outcomes


def _run(experiment: Any, port: int, resume: bool, trials: int) -> tuple[str, list[Any]]:
    """The status at the end and all trial jobs; the manager is down afterwards, whatever happened."""
    try:
        _start(experiment, port, resume)
        if resume:
            # A resumed experiment comes with its old count.
            experiment.update_max_trial_number(trials)
        return _wait(experiment, trials), experiment.list_trial_jobs()
    finally:
        experiment.stop()


def _class_args(tuner: str, seed: int) -> dict[str, Any]:
    if tuner == "Evolution":
        return {"optimize_mode": "maximize", "population_size": 8}
    if tuner == "Random":
        return {"seed": seed}
    return {"optimize_mode": "maximize", **({"seed": seed} if tuner == "TPE" else {})}


def _start(experiment: Any, port: int, resume: bool) -> None:
    if resume:
        if not experiment.has_checkpoint():
            raise UserError(f"expected an experiment {experiment.id!r} to resume, there is none")
        experiment._action = "resume"
    # NNI gives its manager three seconds to answer, which a busy machine does not keep.
    impatient = launcher._check_rest_server
    launcher._check_rest_server = _answers
    try:
        experiment.start(port)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"expected NNI's manager to start on port {port}, got {first_line(error)}") from error
    finally:
        launcher._check_rest_server = impatient


def _answers(port: int, retry: int = 0, url_prefix: str | None = None) -> None:
    """Wait until the manager answers; its server listens a little before it knows what to say."""
    pause, waited = threading.Event(), 0.0
    while True:
        try:
            rest.get(port, "/check-status", url_prefix)
            return
        except Exception:
            if waited > _START_S:
                raise
        pause.wait(_POLL_S)
        waited += _POLL_S


def _wait(experiment: Any, trials: int) -> str:
    """The status at the end; a resumed experiment says that it is done until it notices that more is asked of it."""
    pause, idle = threading.Event(), 0.0
    while True:
        status = experiment.get_status()
        short = status == "DONE" and len(experiment.list_trial_jobs()) < trials and idle < _START_S
        if status in _ENDS and not short:
            return status
        idle = idle + _POLL_S if short else 0.0
        pause.wait(_POLL_S)


def _outcome(job: Any) -> Outcome:
    value = job.finalMetricData[-1].data
    if not isinstance(value, dict) or not {"default", "cost", "parameters"} <= set(value):
        raise DataError(f"expected trials that end with diplugin_nni_search.report(accuracy, cost), got {value!r}")
    return Outcome(job.trialJobId, float(value["default"]), float(value["cost"]), value["parameters"])


class _Environment:
    """Environment variables for the time of a block."""

    def __init__(self, **values: str) -> None:
        self._values = values

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self._values}
        os.environ.update(self._values)

    def __exit__(self, *_: Any) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
