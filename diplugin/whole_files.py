"""Files that are whole or not there: written beside their name and then renamed to it."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Names that killed writers leave behind.
LEFTOVERS = ".*.partial"


def finite_number(value: Any) -> float:
    """A number as strict JSON has it; also what `json.loads` may be given to parse numbers with.

    Raises:
        ValueError: NaN, infinity, or no number.
        TypeError: no number.
        OverflowError: an integer beyond every float.
    """
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {value!r:.80}")
    return number


def whole_number(value: Any) -> int:
    """An integer that is also a float, as others read JSON; given to `json.loads` to parse integers with.

    Raises:
        ValueError: no integer.
        TypeError: no integer.
        OverflowError: an integer beyond every float.
    """
    finite_number(value)
    return int(value)


@contextmanager
def writing_whole(path: str | Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` once the block has ended well; the folder is made where it is missing.

    Whoever reads `path` meanwhile, or after a kill, finds the old file or the new one and never half of one. A link is
    followed; what is there and no plain file, such as a pipe, is written to as it is.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a full disk does not say whose
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Make sure that `writing_whole` can write here, before minutes of work are spent on what is to be written.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        path.open("ab").close()  # which the system refuses, in its own words
    if not path.exists() or path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file whole.

    Raises:
        OSError: it cannot be written.
    """
    with writing_whole(path) as partial:
        partial.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file whole.

    Raises:
        OSError: it cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, data: Any) -> None:
    """Write strict JSON whole: numbers must be finite.

    Raises:
        OSError: it cannot be written.
        ValueError: a number that JSON does not have.
    """
    write_text(path, json.dumps(data, indent=1, allow_nan=False))
