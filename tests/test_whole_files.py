"""Files are whole or not there."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from small_disk import files_up_to

from diplugin.whole_files import check_writable, write_bytes, write_json, write_text, writing_whole


def test_content_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    write_json(path, {"a": [1, 2.5]})
    assert json.loads(path.read_text()) == {"a": [1, 2.5]}
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_full_disk_leaves_the_old_file_and_is_said_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with files_up_to(10), pytest.raises(OSError, match=r"file\.txt"):
        write_text(path, "new " * 1000)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_it_has_the_rights_of_any_other_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_bytes(tmp_path / "ours", b"")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("before", [None, "before"])
def test_an_error_leaves_what_was_there(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_text(before)
    with pytest.raises(RuntimeError, match="stop"), writing_whole(path) as partial:
        partial.write_text("half of")
        raise RuntimeError("stop")
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if before is None else [before])


def test_a_killed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    script = (
        "import os, signal, sys; from diplugin.whole_files import writing_whole\n"
        "with writing_whole(sys.argv[1]) as partial:\n"
        "    partial.write_text('half of'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == -signal.SIGKILL
    assert path.read_text() == "before"


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "after"


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_bytes(pipe, b"through")
    reader.join(30)
    assert got == [b"through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        write_text(tmp_path, "text")
    assert tmp_path.is_dir()


def test_a_place_that_can_be_written_is_told_from_one_that_cannot(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "file")
    (tmp_path / "old").write_text("kept")
    check_writable(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "kept" and not list((tmp_path / "new").iterdir())
    for place in (tmp_path, tmp_path / "old" / "file"):
        with pytest.raises(OSError, match=str(tmp_path)):
            check_writable(place)
