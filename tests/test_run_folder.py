"""The run folder: refused when it holds something, resumed only with the same settings, never half a run for whole."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from diplugin.errors import DISaturationWarning, PlanError
from diplugin.run_folder import RunFolder, next_numbered, read_json, refuse_held


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(PlanError, match=r"holds thesis\.tex"):
        RunFolder(tmp_path, {"seed": 0})
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(PlanError, match="there is a file"):
        refuse_held(tmp_path / "run")


def test_resume_needs_a_run_with_the_same_settings(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", {"seed": 0, "versions": {"torch": "1"}})
    RunFolder(tmp_path / "run", {"seed": 0, "versions": {"torch": "2"}}, resume=True)
    with pytest.raises(PlanError, match="'seed' was 0 and is 1"):
        RunFolder(tmp_path / "run", {"seed": 1}, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("")
    with pytest.raises(PlanError, match=r"no config\.json"):
        RunFolder(tmp_path / "other", {"seed": 0}, resume=True)


def test_a_run_without_a_plan_leaves_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    folder.log("search begins")
    folder.abandon()
    assert not (tmp_path / "run").exists()


def test_a_run_with_a_plan_stays_to_be_resumed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    (tmp_path / "run" / "plan.json").write_text("{}")
    folder.abandon()
    assert (tmp_path / "run" / "config.json").exists()


def test_a_folder_that_cannot_be_used_is_one_line_and_left_alone(tmp_path: Path) -> None:
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(PlanError, match="expected a folder"):
            RunFolder(tmp_path / name, {"seed": 0})
    with pytest.raises(PlanError, match="expected a folder for the run"):
        refuse_held(tmp_path / ("x" * 300))
    with pytest.raises(PlanError, match="expected settings"):
        RunFolder(tmp_path / "run", {"lr": float("inf")})
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_parts_are_of_another_kind_is_one_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    (folder.path / "log.txt").mkdir()
    with pytest.raises(PlanError, match=r"expected a log .*log\.txt"):
        folder.log("trace begins")
    (folder.path / "stages").rmdir()
    (folder.path / "stages").write_text("precious")
    with pytest.raises(PlanError, match="expected a run folder that can be written"):
        RunFolder(folder.path, {"seed": 0}, resume=True)
    assert (folder.path / "stages").read_text() == "precious" and (folder.path / "config.json").exists()


def test_json_is_written_whole_and_refuses_nan(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    folder.write_json("metrics.json", {"accuracy": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        folder.write_json("metrics.json", {"accuracy": float("nan")})
    assert read_json(tmp_path / "run" / "metrics.json") == {"accuracy": 0.5}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{",
        "\x00",
        "[" * 100_000,
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": 1' + "0" * 400 + "}",
    ],
)
def test_broken_json_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(PlanError, match=r"expected a JSON object"):
        read_json(tmp_path / "metrics.json")


def test_numbers_of_fresh_folders(tmp_path: Path) -> None:
    (tmp_path / "demo-1").mkdir()
    assert next_numbered(tmp_path, "demo").name == "demo-2"
    assert json.dumps(str(next_numbered(tmp_path / "none", "demo"))).endswith('demo-1"')


def test_a_whole_run_keeps_nothing_of_the_kills_on_its_way(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    (folder.path / ".plan.json.1234.partial").write_text("half of")
    folder.write_json("plan.json", {})
    folder.finish()
    assert [p.name for p in folder.path.iterdir() if p.name.endswith(".partial")] == []
    assert (folder.path / "plan.json").exists()


# --- warnings ---


def warn_and(then: Exception | None, folder: RunFolder) -> None:
    with folder.recording_warnings():
        warnings.warn("DI is near 1", DISaturationWarning, stacklevel=1)
        if then is not None:
            raise then


@pytest.mark.parametrize("failure", [None, KeyError("gone")])
def test_warnings_reach_the_caller_and_the_log_whether_the_run_fails_or_not(
    tmp_path: Path, failure: Exception | None
) -> None:
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    with pytest.warns(DISaturationWarning, match="DI is near 1") as heard:
        if failure is None:
            warn_and(None, folder)
        else:
            with pytest.raises(KeyError, match="gone"):
                warn_and(failure, folder)
    assert len(heard) == 1
    assert (folder.path / "log.txt").read_text().count("warning: DI is near 1") == 1


def test_warnings_that_the_caller_ignores_are_logged_all_the_same(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    with warnings.catch_warnings(record=True) as heard:
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        warn_and(None, folder)
    assert not heard
    assert "warning: DI is near 1" in (folder.path / "log.txt").read_text()


def test_a_warning_that_is_an_error_stops_where_it_arises(tmp_path: Path) -> None:
    """Not at the end, when all the work is done."""
    folder, reached = RunFolder(tmp_path / "run", {"seed": 0}), []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(DISaturationWarning), folder.recording_warnings():
            warnings.warn("DI is near 1", DISaturationWarning, stacklevel=1)
            reached.append("the end")
    assert not reached


def test_a_log_that_cannot_be_written_hides_no_failure(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    (folder.path / "log.txt").mkdir()
    with pytest.warns(DISaturationWarning), pytest.raises(KeyError, match="gone"):
        warn_and(KeyError("gone"), folder)
    with pytest.warns(DISaturationWarning):
        warn_and(None, folder)
