"""The run folder: everything a run leaves behind, written so that a killed run is never taken for a whole one.

    config.json          what was asked for                 first
    scores.json          DI per group and channel
    plan.json            the pruning plan
    weights.safetensors  the pruned network's weights
    model.onnx           the same, for a runtime
    metrics.json         figures of every stage             last but one
    report.html          all of it for a person             last
    log.txt              what happened when
    stages/              checkpoints, gone once the run is whole

Every file appears under its name only when it is complete. A run is whole when `metrics.json` is there.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .errors import PlanError, first_line
from .team import Team
from .whole_files import LEFTOVERS, finite_number, whole_number, write_json, write_text

CONFIG, SCORES, METRICS, REPORT, LOG = "config.json", "scores.json", "metrics.json", "report.html", "log.txt"
ONNX = "model.onnx"
STAGES = "stages"
#: Of a stage: the losses of trial cuts.
TRIALS = "trials.json"


class RunFolder:
    """A folder that belongs to one run.

    Raises:
        PlanError: the folder holds something already and `resume` was not asked for, holds another run's settings or
            a run that is whole, or cannot be written.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = Path(path)
        try:
            text = json.dumps(config, indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PlanError(f"expected settings that can be written down, got {first_line(error)}") from error
        try:
            self._fresh = not self.path.exists()
            held = sorted(p.name for p in self.path.iterdir()) if self.path.exists() else []
            self.path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise PlanError(f"expected a folder that can be made at {path!s:.100}, got {error!s:.200}") from error
        if not resume:
            refuse_held(self.path)
        if resume and (self.path / CONFIG).exists():
            self._check_same(config)
            self._check_unfinished()
        elif held:
            raise PlanError(f"expected a run to resume in {self.path}, it holds no {CONFIG}")
        try:
            (self.path / STAGES).mkdir(exist_ok=True)
            self.write_text(CONFIG, text)
        except OSError as error:
            if not held:
                self.abandon()
            raise PlanError(f"expected a run folder that can be written at {path}, got {error}") from error

    def _check_same(self, config: Mapping[str, Any]) -> None:
        before = read_json(self.path / CONFIG)
        now = json.loads(json.dumps(config))
        differing = [k for k in {**before, **now} if before.get(k) != now.get(k) and k != "versions"]
        if differing:
            raise PlanError(
                f"expected the settings of the run to resume, {differing[0]!r} was {before.get(differing[0])!r} "
                f"and is {now.get(differing[0])!r}; use another folder"
            )

    def _check_unfinished(self) -> None:
        """A run that is whole has no checkpoints left: to go on with it would be to train anew, beside old figures."""
        if (self.path / METRICS).exists():
            raise PlanError(f"expected a killed run to resume, the one in {self.path} is finished; choose another "
                            "folder to run it again, or write its page with `diplugin report`")  # fmt: skip

    def stage(self, name: str) -> Path:
        """Where a stage keeps its checkpoint."""
        return self.path / STAGES / name

    def write_json(self, name: str, data: Any) -> None:
        """Write atomically; numbers must be finite."""
        write_json(self.path / name, data)

    def write_text(self, name: str, text: str) -> None:
        """Write atomically."""
        write_text(self.path / name, text)

    def log(self, line: str) -> None:
        """Add a line with the time to log.txt.

        Raises:
            PlanError: it cannot be written.
        """
        try:
            with (self.path / LOG).open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        except OSError as error:
            raise PlanError(f"expected a log that can be written at {self.path / LOG}, got {error}") from error

    @contextmanager
    def recording_warnings(self) -> Iterator[None]:
        """Warnings of the block go to the log as well as to the caller, also where the block fails.

        A caller who makes errors of warnings gets them where they arise: at the end they would cost a whole run.
        """
        caught: list[warnings.WarningMessage] = []
        try:
            with warnings.catch_warnings(record=True) as caught:
                if all(action != "error" for action, *_ in warnings.filters):
                    warnings.simplefilter("default")
                yield
        finally:  # nothing from here may take the place of a failure's own exception
            for warning in caught:
                with suppress(Warning):
                    warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
                if self.path.exists() and isinstance(warning.message, Warning):
                    with suppress(PlanError):
                        self.log(f"warning: {first_line(warning.message)}")

    def follow_first(self, team: Team) -> None:
        """Of many processes: take over from the first one's folder what a run is resumed from, plan and checkpoints."""
        if team.size == 1:
            return
        files = (self.path / "plan.json", *sorted((self.path / STAGES).rglob("*")))
        held = [file.relative_to(self.path).as_posix() for file in files if file.is_file()]
        for name in json.loads(team.told_by_first(json.dumps(held))):
            data = team.sent_by_first((self.path / name).read_bytes() if team.rank == 0 else b"")
            if team.rank:
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                (self.path / name).write_bytes(data)

    def finish(self) -> None:
        """Remove the checkpoints of a run that is whole, and what kills on the way have left half written."""
        shutil.rmtree(self.path / STAGES, ignore_errors=True)
        for left in self.path.glob(LEFTOVERS):
            left.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Leave nothing of a run that never got to a plan, nor to one of its steps' plans, nor to a trial cut."""
        held = [self.path / "plan.json", self.stage(TRIALS), *(self.path / STAGES).glob("*.plan.json")]
        if any(path.exists() for path in held):
            return
        for name in (CONFIG, LOG, SCORES):
            (self.path / name).unlink(missing_ok=True)
        self.finish()
        if self._fresh and not any(self.path.iterdir()):
            self.path.rmdir()


def refuse_held(path: str | Path) -> None:
    """Raise PlanError if there is anything in this folder, or if it is no folder."""
    path = Path(path)
    try:
        if path.exists() and not path.is_dir():
            raise PlanError(f"expected a folder for the run at {path}, there is a file")
        held = sorted(p.name for p in path.iterdir()) if path.exists() else []
    except OSError as error:
        raise PlanError(f"expected a folder for the run at {path!s:.100}, got {error!s:.200}") from error
    if held:
        raise PlanError(f"expected an empty folder, {path} holds {held[0]}; choose another, or --resume a killed run")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, its numbers finite.

    Raises:
        PlanError: no such file, or no JSON object in it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_int=whole_number, parse_float=finite_number,
                          parse_constant=finite_number)  # fmt: skip
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"expected a JSON object at {path}, got {error}") from error
    if not isinstance(data, dict):
        raise PlanError(f"expected a JSON object at {path}, got a {type(data).__name__}")
    return data


def cut_figures(metrics: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a run's metrics say of the float network that it ended with, which `model.onnx` holds.

    Raises:
        PlanError: nothing.
    """
    figures = next((metrics[name] for name in ("recovered", "pruned") if metrics.get(name) is not None), None)
    if not isinstance(figures, dict):
        raise PlanError(f"expected a whole run in {folder}, its {METRICS} holds no figures of a pruned network")
    return figures


def recorded(settings: Any) -> dict[str, Any] | None:
    """Settings (a dataclass) for `config.json`, with their kind; None for None."""
    return None if settings is None else {"kind": type(settings).__name__, **asdict(settings)}


def next_numbered(parent: str | Path, stem: str) -> Path:
    """The first folder `parent/stem-1`, `stem-2`, … that does not exist."""
    number = 1
    while (Path(parent) / f"{stem}-{number}").exists():
        number += 1
    return Path(parent) / f"{stem}-{number}"
