"""The command line: arguments become a call of the library; no logic lives here.

Exit codes: 0 done, 1 a defect of diplugin, 2 the user's input, 3 a budget that no structure meets, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence

from ..errors import DipluginError, first_line

# One module a family of commands, each with `add_parser(subparsers)`.
COMMANDS = (
    "demo", "compress", "score", "compare", "profile", "tables", "measure", "quantize", "export", "validate", "report",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = build_parser().parse_args(argv)
    warnings.showwarning = _show_warning
    try:
        return int(args.run(args) or 0)
    except DipluginError as error:
        print(f"diplugin: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("diplugin: interrupted; a run folder can be taken up again with --resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:
        print(f"diplugin: expected files that can be read and written, got {first_line(error)}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from .. import __version__

    parser = argparse.ArgumentParser(
        prog="diplugin",
        description="Prune neural networks by Discriminant Information, under budgets measured on the target device.",
    )
    parser.add_argument("--version", action="version", version=f"diplugin {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"{__name__}.{name}").add_parser(subparsers)
    return parser


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Warnings as one line for people; other libraries' housekeeping is left out."""
    if category.__module__.startswith("diplugin"):
        print(f"diplugin: note: {' '.join(str(message).split())}", file=sys.stderr)
