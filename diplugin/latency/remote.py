"""A device at the other end of the system's own `ssh`: copy a bundle, run it, bring the journal back.

The user's ssh configuration, keys and known hosts are what decides; nothing is asked for or stored here. Files go
through `cat` on either side, so that the device needs a shell and python3 only. A connection that breaks leaves the
measuring on the device alone: the next one waits for it, or goes on where its journal ends.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import DeviceError, TableError, first_line
from . import device
from .finish import load_bundle, own_journal
from .onnx_timing import OnnxTiming, onnx_plan, onnx_timing

RETRIES, BACKOFF_S = 5, 2.0
_CONNECTION_LOST = 255
_NOT_FOUND = (126, 127)
#: Comes before what a command says: login scripts that greet say it on the same stream.
_BEGIN = "diplugin-begins-here"
_CONNECTION_TROUBLES = (
    (r"host key verification failed|remote host identification has changed|no .* host key is known",
     "its host key is not known or has changed: connect once with 'ssh {host}' and check the key"),
    (r"permission denied", "it refuses the login: set up a key, so that 'ssh {host}' works by itself"),
    (r"could not resolve|name or service not known",
     "its name cannot be resolved: check the spelling or ~/.ssh/config"),
    (r"connection refused|timed out|no route|unreachable", "it does not answer: check that it is on and runs sshd"),
)  # fmt: skip
_DEVICE_TROUBLES = (
    (r"no space left", "its disk is full: make room, or name another --folder; nothing done so far is lost"),
    (r"read-only file system|permission denied", "it may not be written to there: name another --folder"),
)


@dataclass(frozen=True)
class Remote:
    """A device by the name that ssh knows it by.

    Attributes:
        host: as in `ssh HOST`.
        python: the interpreter there.
        folder: where bundles and journals live there; by default one of its own in the home directory.
        options: passed on to ssh, before the ones set here.
        backoff_s: first pause after a lost connection.
    """

    host: str
    python: str = "python3"
    folder: str = ""
    options: tuple[str, ...] = ()
    backoff_s: float = BACKOFF_S

    def __post_init__(self) -> None:
        if not self.host or self.host.startswith("-") or any(c.isspace() for c in self.host):
            raise DeviceError(f"expected a host as USER@HOST, got {self.host!r}")

    def command(self, remote: str) -> list[str]:
        """The local command that runs `remote`, a shell command, on the device."""
        return ["ssh", *self.options, "-oConnectTimeout=15", "-oServerAliveInterval=10", "-oServerAliveCountMax=3",
                "--", self.host, remote]  # fmt: skip

    def path(self, name: str) -> str:
        """A shell word for a file in the folder there."""
        folder = shlex.quote(self.folder) if self.folder else '"$HOME"/.cache/diplugin'
        return f"{folder}/{shlex.quote(name)}"

    def call(self, remote: str, *, data: bytes | None = None, progress: IO[str] | None = None) -> bytes:
        """Run a command there with `data` as its input; returns its output.

        Raises:
            DeviceError: it failed, in one line; `ConnectionLost` if the connection did.
        """
        try:
            # Files and no pipes where nobody reads along: a device that says much would wait for ever.
            with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as spool:
                process = subprocess.Popen(
                    self.command(f"echo {_BEGIN}; {remote}"),
                    stdin=subprocess.PIPE if data is not None else subprocess.DEVNULL,
                    stdout=said, stderr=subprocess.PIPE if progress is not None else spool,
                )  # fmt: skip
                lines = _relay(process, progress) if progress is not None else []
                process.communicate(data)
                output, errors = (_content(file) for file in (said, spool))
                lines = lines or [_printable(line) for line in errors.splitlines()]
        except FileNotFoundError:
            raise DeviceError("expected the ssh command on this machine, found none: install OpenSSH") from None
        if process.returncode:
            raise self.trouble(process.returncode, lines)
        return output.partition(f"{_BEGIN}\n".encode())[2]

    def trouble(self, code: int, lines: list[str]) -> DeviceError:
        """What a failed command means, in one line."""
        if code in _NOT_FOUND:
            return DeviceError(f"{self.host!r} has no {self.python} that runs: install it or name another with "
                               "--python")  # fmt: skip
        said, lost = " ".join(lines), code == _CONNECTION_LOST
        for pattern, meaning in _CONNECTION_TROUBLES if lost else _DEVICE_TROUBLES:
            if re.search(pattern, said, re.IGNORECASE):
                kind = ConnectionLost if "answer" in meaning else DeviceError
                return kind(f"cannot work on {self.host!r}: " + meaning.format(host=self.host))
        own = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)
        if own is not None:
            return DeviceError(f"on {self.host!r}: {own}")
        last = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")[:300]
        if lost:
            return ConnectionLost(f"the connection to {self.host!r} was lost ({last}): run the same command to go on")
        return DeviceError(f"the command failed on {self.host!r}: {last}")

    def send(self, path: Path, name: str) -> None:
        """Copy a file there unless it is there already; it appears whole or not at all."""
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        there = self.path(name)
        code = "import hashlib,sys; print(hashlib.sha256(open(sys.argv[1],'rb').read()).hexdigest())"
        known = self.call(f"test -f {there} && {shlex.quote(self.python)} -c {shlex.quote(code)} {there} || true")
        if known.decode("ascii", "replace").strip() == digest:
            return
        partial = self.path(name + ".partial")
        self.call(f'mkdir -p "$(dirname {there})" && cat > {partial} && mv {partial} {there}', data=data)

    def fetch(self, name: str) -> bytes:
        """A file's content there; empty if there is none."""
        there = self.path(name)
        return self.call(f"test -f {there} && cat {there} || true")

    def remove(self, name: str) -> None:
        """Take a journal away, and its lock."""
        there = self.path(name)
        self.call(f"rm -f {there} {there}.lock")


class ConnectionLost(DeviceError):
    """The connection broke; what runs on the device goes on, and the same command takes it up again."""


def _relay(process: subprocess.Popen[bytes], progress: IO[str]) -> list[str]:
    """Pass a process's error lines on as they come; returns the last of them."""
    lines: list[str] = []
    for raw in process.stderr or ():
        line = _printable(raw)
        lines = [*lines[-19:], line]
        if not line.startswith("error: "):
            print(line, file=progress, flush=True)
    return lines


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _printable(raw: bytes) -> str:
    """A line of a device's, without what moves a terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in raw.decode("utf-8", "replace").rstrip())


def run_bundle_there(remote: Remote, bundle: Path, journal: Path, progress: IO[str] | None = None) -> int:
    """Run a bundle on a device and bring its journal back; returns the number of rows.

    After a lost connection it connects again, a few times; after that the same call goes on with what is done. The
    journal there is named after the one here: one begun on another device stands in nobody's way.

    Raises:
        TableError: the bundle is none, or the journal here is of another plan or cannot be written.
        DeviceError: the device cannot be reached, or lacks something.
    """
    plan = load_bundle(bundle).plan
    _check_here(plan, journal)
    program, rows = _name_there(bundle, plan, ".pyz"), _name_there(journal, plan, ".jsonl")
    for attempt in range(RETRIES + 1):
        try:
            remote.send(bundle, program)
            if journal.exists() and not remote.fetch(rows):
                remote.send(journal, rows)
            words = (shlex.quote(remote.python), remote.path(program), "--wait --journal", remote.path(rows))
            remote.call(" ".join(words), progress=progress)
            break
        except ConnectionLost:
            _bring_back(remote, rows, plan, journal, quiet=True)
            if attempt == RETRIES:
                raise
            time.sleep(remote.backoff_s * 2**attempt)
        except DeviceError:
            _bring_back(remote, rows, plan, journal, quiet=True)
            raise
    return _bring_back(remote, rows, plan, journal)


def _name_there(path: Path, plan: Mapping[str, Any], ending: str) -> str:
    """What a plan's bundle or journal is called on a device."""
    return f"{path.stem}-{plan['sha256'][:12]}{ending}"


def _check_here(plan: Mapping[str, Any], journal: Path) -> None:
    """Hours of a device's work must find a place, and nobody else's measurements in it."""
    folder = journal.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or (journal.exists() and not journal.is_file()):
        raise TableError(f"expected a journal that can be written at {str(journal)!r}: make its folder or name "
                         "another one with --journal")  # fmt: skip
    if journal.exists():
        own_journal(plan, journal)


def _bring_back(remote: Remote, name: str, plan: Mapping[str, Any], journal: Path, *, quiet: bool = False) -> int:
    """Fetch the journal, replacing the local one only by a readable one of the same plan with no fewer rows."""
    try:
        data = remote.fetch(name)
        partial = journal.with_name(journal.name + ".partial")
        partial.write_bytes(data)
        try:
            _, rows = own_journal(plan, partial)
            if not data or (journal.exists() and len(own_journal(plan, journal)[1]) > len(rows)):
                return 0
            os.replace(partial, journal)
            return len(rows)
        finally:
            partial.unlink(missing_ok=True)
    except (DeviceError, TableError, OSError) as error:
        if quiet:
            return 0
        raise DeviceError(f"the journal of {remote.host!r} cannot be brought back: {first_line(error)}") from None


def measure_there(remote: Remote, path: str | Path, *, threads: int = 1, dtype: str = "float32") -> OnnxTiming:
    """Time a finished ONNX file on a device, by the profiler's protocol; with "int8" its 8-bit form.

    The journal there is taken away once it is here: the next call times again.

    Raises:
        ModelError: the file does not load.
        DeviceError: the device cannot be reached, or lacks something.
    """
    plan = onnx_plan(path, threads=threads, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        bundle, journal = plan.save(Path(folder) / "measure.pyz"), Path(folder) / "measure.jsonl"
        run_bundle_there(remote, bundle, journal)
        remote.remove(_name_there(journal, plan.plan, ".jsonl"))
        return onnx_timing(plan, device.read_journal(str(journal))[1])
