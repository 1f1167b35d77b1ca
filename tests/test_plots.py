"""Plots become whole files of the kind that their name says, or one line and nothing at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from diplugin.errors import UserError
from diplugin.plots import check_plot_file, new_figure, save_figure


@pytest.mark.parametrize(("name", "magic"), [("p.png", b"\x89PNG"), ("p.SVG", b"<?xml"), ("p.pdf", b"%PDF")])
def test_the_ending_says_the_kind(tmp_path: Path, name: str, magic: bytes) -> None:
    figure = new_figure(3, 2)
    figure.add_subplot().plot([0, 1], [1, 0])
    path = save_figure(figure, str(tmp_path / name))
    assert path.read_bytes().startswith(magic)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["nowhere/x.png", "x.unheard-of", "pic", ".png/x", ""])
def test_names_that_no_plot_can_have(tmp_path: Path, name: str) -> None:
    (tmp_path / "pic.png").write_bytes(b"precious")
    for use in (check_plot_file, lambda path: save_figure(new_figure(1, 1), path)):
        with pytest.raises(UserError, match="expected a PNG, SVG or PDF file"):
            use(tmp_path / name)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("pic.png", b"precious")]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="can be written") as caught:
        save_figure(new_figure(1, 1), tmp_path / "folder.png")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


def test_a_plot_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    class Broken:
        def savefig(self, path: Path, **_: object) -> None:
            path.write_bytes(b"half")
            raise OSError("no space left")

    (tmp_path / "p.png").write_bytes(b"old")
    with pytest.raises(UserError, match="no space left"):
        save_figure(Broken(), tmp_path / "p.png")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("p.png", b"old")]
