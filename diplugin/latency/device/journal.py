"""The journal: rows that are only ever appended, each synced to disk before the next job begins.

Idea: a process killed at any moment leaves whole lines and at most one cut line, which the next process takes off.
"""

from __future__ import annotations

import os
import time

from .documents import SCHEMA
from .errors import ProfileError, first_line
from .rows import JOURNAL_FORMAT, check_header, check_row, sealed, unsealed

WAIT_S = 1.0
#: What stays the same for all rows of a journal: times of two devices, or under two runtimes, make no table.
UNCHANGED = ("device", "machine", "emulated", "runtime_version")


class Journal:
    """Append-only JSON lines: a header, then one row a finished job, each synced before the next begins.

    Two processes never write to one journal: a lock file beside it keeps the second out, or lets it wait.
    """

    def __init__(self, path, plan, wait=None):
        self.path, self.plan = str(path), plan
        self.lock = locked(self.path, wait)
        self.rows, self.begun = {}, None
        try:
            if os.path.exists(self.path):
                self._take_up()
        except OSError as error:
            self.close()
            raise ProfileError(f"the journal {self.path!r} cannot be written: {first_line(error)}") from None
        except BaseException:
            self.close()
            raise

    def _take_up(self):
        self._repair()
        header, self.rows = read_journal(self.path)
        if header is not None and header["plan_sha256"] != self.plan["sha256"]:
            raise ProfileError(f"journal {self.path!r} belongs to another plan: name another one with --journal")
        self.begun = None if header is None else header["provenance"]

    def _repair(self):
        """Cut a last line that a kill left unfinished."""
        with open(self.path, "rb+") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            if whole != len(data):
                file.truncate(whole)
                file.flush()
                os.fsync(file.fileno())

    def start(self, provenance):
        """Begin the journal here, or go on with it if it was begun here."""
        if self.begun is None:
            self._append(
                {
                    "format": JOURNAL_FORMAT,
                    "schema": SCHEMA,
                    "plan_sha256": self.plan["sha256"],
                    "provenance": provenance,
                }
            )
            self.begun = provenance
        for name in UNCHANGED:
            before, now = (str(said.get(name, ""))[:80] for said in (self.begun, provenance))
            if name in self.begun and before != now:
                raise ProfileError(
                    f"the journal {self.path!r} was begun with {name} {before!r} and here it is {now!r}: finish it "
                    "there, or name another one with --journal"
                )

    def close(self):
        """Let other processes at the journal."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def add(self, row):
        row = dict(row, n=1 + max((known["n"] for known in self.rows.values()), default=-1))
        self._append(row)
        self.rows[row["id"]] = row

    def _append(self, row):
        try:
            with open(self.path, "a", encoding="ascii") as file:
                file.write(sealed(row))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ProfileError(
                f"the journal {self.path!r} cannot be written ({first_line(error)}): make room or name "
                "another place with --journal; nothing done so far is lost"
            ) from None


def locked(path, wait):
    """An open, locked file beside the journal; `wait` is called every second while another process holds it."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        lock = open(path + ".lock", "a")  # noqa: SIM115, held as long as the journal
    except OSError as error:
        raise ProfileError(
            f"the journal {path!r} cannot be written ({first_line(error)}): name another place with --journal"
        ) from None
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except (BlockingIOError, PermissionError):  # the second from locks over NFS
            if wait is None:
                lock.close()
                raise ProfileError(
                    f"another process is writing the journal {path!r}: wait for it, or use --wait"
                ) from None
            wait()
            time.sleep(WAIT_S)
        except OSError:
            return lock  # a file system that knows no locks, a network's mostly: nobody is known to write


def read_journal(path):
    """(header or None, rows by job id) of a journal; its unfinished last line, if any, is not read.

    Identical repeated lines count once, and order does not matter: rows are numbered.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(256 << 20)
    except OSError as error:
        raise ProfileError(f"the journal {str(path)!r} cannot be read: {first_line(error)}") from None
    header, rows, numbers = None, {}, {}
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            row = unsealed(line.decode("ascii"))
            if "format" in row:
                check_header(row, header)
                header = row
                continue
            check_row(row)
            if rows.get(row["id"], row) != row or numbers.get(row["n"], row["id"]) != row["id"]:
                raise ValueError("it contradicts an earlier line")
        except (ValueError, OverflowError) as error:
            raise ProfileError(
                f"line {number} of the journal {str(path)!r} is damaged ({first_line(error)}): delete "
                "that line to measure it again"
            ) from None
        rows[row["id"]], numbers[row["n"]] = row, row["id"]
    if header is None and rows:
        raise ProfileError(f"the journal {str(path)!r} has lost its header: profile again")
    return header, rows
