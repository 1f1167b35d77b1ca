"""Devices over ssh: against a stand-in that runs commands here, and (slow) against a real sshd on loopback."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diplugin.errors import DeviceError, TableError
from diplugin.latency import device
from diplugin.latency.device.rows import sealed, unsealed
from diplugin.latency.graphs import export_bytes
from diplugin.latency.plan import ProfilePlan, Protocol, add_entries, runtime_setting
from diplugin.latency.remote import ConnectionLost, Remote, measure_there, run_bundle_there
from diplugin.tables import OpKey

QUICK = Protocol(
    rounds=2, runs=2, min_runs=1, round_ms=0.2, warmup_ms=0.0, chunk=2, patience=1, gap_ms=0.0, pause_s=0.0
)
SLOW = Protocol(rounds=10, runs=4, round_ms=5.0, chunk=1, patience=1, gap_ms=5.0, pause_s=0.0)


def small_plan(protocol: Protocol = QUICK, entries: int = 8) -> ProfilePlan:
    plan = ProfilePlan("small", runtime_setting(), protocol)
    ones = (1, 1)
    add_entries(plan, [OpKey("conv", 8, 4 * i + 4, ones, ones, (0, 0), ones, 1, (4, 4)) for i in range(entries)])
    return plan


def script(path: Path, text: str) -> Path:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def complete(plan: ProfilePlan, journal: Path) -> bool:
    """Whether a journal holds every row of the plan, each once."""
    lines = journal.read_text().splitlines()
    return len(lines) == len(plan.jobs) + 1 and set(device.read_journal(str(journal))[1]) == {j.id for j in plan.jobs}


StandIn = Callable[[str], Remote]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A directory first on PATH whose `ssh` runs `before` and then the remote command here."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(before: str = "") -> Remote:
        script(folder / "ssh", f'for last; do :; done\n{before}\nexec sh -c "$last"\n')
        return Remote("pi@desk", sys.executable, str(tmp_path / "there's a device"), backoff_s=0.0)

    return make


def test_a_bundle_goes_there_runs_and_its_journal_comes_back(tmp_path: Path, stand_in: StandIn) -> None:
    plan, progress = small_plan(), io.StringIO()
    bundle, journal = plan.save(tmp_path / "b.pyz"), tmp_path / "b.jsonl"
    assert run_bundle_there(stand_in(""), bundle, journal, progress) == len(plan.jobs)
    assert complete(plan, journal) and f"{len(plan.jobs)}/{len(plan.jobs)}" in progress.getvalue()
    before = journal.read_bytes()
    assert run_bundle_there(stand_in(""), bundle, journal) == len(plan.jobs)
    assert journal.read_bytes() == before


def test_a_device_that_says_much_is_heard_out(tmp_path: Path, stand_in: StandIn) -> None:
    """More than a pipe holds, on the stream that nobody reads while the other one is relayed."""
    plan, remote = small_plan(), stand_in("head -c 300000 /dev/zero | tr '\\\\0' x")
    bundle, journal = plan.save(tmp_path / "b.pyz"), tmp_path / "b.jsonl"
    assert run_bundle_there(remote, bundle, journal, io.StringIO()) == len(plan.jobs)
    assert complete(plan, journal)


def test_a_wiped_device_goes_on_with_the_journal_that_is_here(tmp_path: Path, stand_in: StandIn) -> None:
    plan, remote = small_plan(), stand_in("")
    bundle, journal = plan.save(tmp_path / "b.pyz"), tmp_path / "b.jsonl"
    run_bundle_there(remote, bundle, journal)
    kept = journal.read_bytes().splitlines(keepends=True)[:5]
    journal.write_bytes(b"".join(kept))
    shutil.rmtree(remote.folder)
    run_bundle_there(remote, bundle, journal)
    assert complete(plan, journal) and journal.read_bytes().splitlines(keepends=True)[:5] == kept


def test_a_journal_begun_on_another_device_is_refused_there_and_another_name_works(
    tmp_path: Path, stand_in: StandIn
) -> None:
    """The second Pi of an engineer who forgot that a journal of the first lies here, half done."""
    plan, remote = small_plan(), stand_in("")
    bundle, journal = plan.save(tmp_path / "b.pyz"), tmp_path / "b.jsonl"
    run_bundle_there(remote, bundle, journal)
    header, *rows = journal.read_text().splitlines(keepends=True)
    said = unsealed(header)
    journal.write_text(sealed({**said, "provenance": {**said["provenance"], "device": "Pi 4"}}) + "".join(rows[:4]))
    before = journal.read_bytes()
    shutil.rmtree(remote.folder)
    with pytest.raises(DeviceError, match=r"begun with device 'Pi 4'.*--journal"):
        run_bundle_there(remote, bundle, journal)
    assert journal.read_bytes() == before
    assert run_bundle_there(remote, bundle, tmp_path / "second.jsonl") == len(plan.jobs)
    assert complete(plan, tmp_path / "second.jsonl")


def test_a_journal_of_another_plan_is_left_alone_and_never_sent(tmp_path: Path, stand_in: StandIn) -> None:
    other, mine = small_plan(), small_plan(entries=3)
    remote, journal = stand_in(f"touch {tmp_path}/called"), tmp_path / "precious.jsonl"
    run_bundle_there(remote, other.save(tmp_path / "other.pyz"), journal)
    (tmp_path / "called").unlink()
    before, bundle = journal.read_bytes(), mine.save(tmp_path / "b.pyz")
    with pytest.raises(TableError, match="another plan"):
        run_bundle_there(remote, bundle, journal)
    assert journal.read_bytes() == before and not (tmp_path / "called").exists()
    assert run_bundle_there(remote, bundle, tmp_path / "b.jsonl") == len(mine.jobs)
    assert complete(mine, tmp_path / "b.jsonl")


def test_a_journal_of_another_plan_does_not_come_back(tmp_path: Path, stand_in: StandIn) -> None:
    """Whatever lies on the device under this plan's name."""
    plan, journal = small_plan(entries=3), tmp_path / "b.jsonl"
    bundle, remote = plan.save(tmp_path / "b.pyz"), stand_in("")
    run_bundle_there(remote, small_plan().save(tmp_path / "other.pyz"), tmp_path / "other.jsonl")
    shutil.copy(tmp_path / "other.jsonl", Path(remote.folder) / f"b-{plan.plan['sha256'][:12]}.jsonl")
    passing = stand_in('case "$last" in *--wait*) exit 0;; esac')
    for there in (remote, passing):
        with pytest.raises(DeviceError, match="another plan"):
            run_bundle_there(there, bundle, journal)
        assert not journal.exists()


@pytest.mark.parametrize("place", ["no folder/b.jsonl", "."])
def test_a_journal_that_cannot_be_written_is_said_before_any_work(
    place: str, tmp_path: Path, stand_in: StandIn
) -> None:
    remote = stand_in(f"touch {tmp_path}/called")
    with pytest.raises(TableError, match="--journal"):
        run_bundle_there(remote, small_plan().save(tmp_path / "b.pyz"), tmp_path / place)
    assert not (tmp_path / "called").exists()


def test_a_connection_lost_once_is_taken_up_again(tmp_path: Path, stand_in: StandIn) -> None:
    plan, flag = small_plan(), tmp_path / "lost"
    remote = stand_in(
        f'case "$last" in *--wait*) test -f {flag} || {{ touch {flag}; echo broken pipe >&2; exit 255; }};; esac'
    )
    run_bundle_there(remote, plan.save(tmp_path / "b.pyz"), tmp_path / "b.jsonl")
    assert flag.exists() and complete(plan, tmp_path / "b.jsonl")


def test_a_device_that_greets_every_login_is_understood(tmp_path: Path, stand_in: StandIn) -> None:
    """A shell's start-up file that prints: its words came home as the first line of the journal."""
    plan, progress = small_plan(), io.StringIO()
    remote, bundle = stand_in("echo Welcome to the Pi; echo 'Load: 3' >&2"), plan.save(tmp_path / "b.pyz")
    assert run_bundle_there(remote, bundle, tmp_path / "b.jsonl", progress) == len(plan.jobs)
    assert complete(plan, tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_text("".join((tmp_path / "b.jsonl").read_text().splitlines(keepends=True)[:4]))
    shutil.rmtree(remote.folder)
    run_bundle_there(remote, bundle, tmp_path / "b.jsonl")
    assert complete(plan, tmp_path / "b.jsonl")


def test_a_connection_that_stays_lost_is_said(tmp_path: Path, stand_in: StandIn) -> None:
    remote = stand_in("echo 'client_loop: send disconnect' >&2; exit 255")
    with pytest.raises(ConnectionLost, match="to go on"):
        run_bundle_there(remote, small_plan().save(tmp_path / "b.pyz"), tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("echo 'Host key verification failed.' >&2; exit 255", "host key"),
        ("echo 'pi@desk: Permission denied (publickey).' >&2; exit 255", "login"),
        ("echo 'ssh: Could not resolve hostname desk: x' >&2; exit 255", "resolved"),
        ("echo 'ssh: connect to host desk port 22: Connection refused' >&2; exit 255", "sshd"),
        ("echo 'cat: write error: No space left on device' >&2; exit 1", "disk is full"),
        ("echo 'sh: 1: python9: not found' >&2; exit 127", "--python"),
        ("echo 'sh: 1: python3: Permission denied' >&2; exit 126", "--python"),
        ("echo \"mkdir: cannot create directory '/opt/x': Permission denied\" >&2; exit 1", "--folder"),
        ("echo 'error: the journal cannot be written (Permission denied)' >&2; exit 2", "--folder"),
        ("echo 'odd: the sensor timed out' >&2; exit 9", "sensor timed out"),
        ("echo 'something odd' >&2; exit 9", "something odd"),
        ("printf 'something \\033[2J\\033]0;odd\\007' >&2; exit 9", "something .*odd"),
    ],
)
def test_each_trouble_is_one_line(before: str, said: str, tmp_path: Path, stand_in: StandIn) -> None:
    with pytest.raises(DeviceError, match=said) as error:
        run_bundle_there(stand_in(before), small_plan().save(tmp_path / "b.pyz"), tmp_path / "b.jsonl")
    assert str(error.value).isprintable() and "desk" in str(error.value)
    assert not (tmp_path / "b.jsonl").exists()


def test_a_device_without_a_runtime_is_told_so(tmp_path: Path, stand_in: StandIn) -> None:
    bare = script(tmp_path / "bare-python", f'exec {sys.executable} -I -S "$@"\n')
    remote = stand_in("")
    with pytest.raises(DeviceError, match="pip install"):
        run_bundle_there(
            Remote(remote.host, str(bare), remote.folder), small_plan().save(tmp_path / "b.pyz"), tmp_path / "j"
        )


def test_a_damaged_bundle_never_leaves(tmp_path: Path, stand_in: StandIn) -> None:
    (tmp_path / "b.pyz").write_bytes(b"no bundle")
    with pytest.raises(TableError, match="bundle"):
        run_bundle_there(stand_in("exit 255"), tmp_path / "b.pyz", tmp_path / "b.jsonl")


@pytest.mark.parametrize("host", ["", "-oProxyCommand=touch x", "a b", "pi@desk\n"])
def test_a_host_that_is_an_option_or_a_sentence_is_refused(host: str) -> None:
    with pytest.raises(DeviceError, match="USER@HOST"):
        Remote(host)


def test_without_ssh_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="OpenSSH"):
        Remote("pi@desk").call("true")


def test_a_finished_file_is_timed_there(tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from diplugin.latency import onnx_timing, remote

    path = tmp_path / "net.onnx"
    path.write_bytes(export_bytes(torch.nn.Conv2d(3, 8, 3), (torch.zeros(1, 3, 8, 8),), ["x"]))
    monkeypatch.setattr(remote, "onnx_plan", lambda p, **asked: onnx_timing.onnx_plan(p, **asked, protocol=QUICK))
    there = stand_in("")
    script(tmp_path / "bin" / "vcgencmd", "echo throttled=0x50005\n")
    timing = measure_there(there, path)
    assert timing.latency_ms > 0 and timing.peak_memory_mb is not None
    assert timing.unstable, "the Pi said that it was throttled"
    left = [file.suffix for file in Path(there.folder).iterdir()]
    assert left == [".pyz"], "a journal left there would be read again instead of the clock"


# ------------------------------------------------------------------------------------------------ a real sshd


class Loopback:
    """A real sshd of our own on a high port of loopback, with its own keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ["PATH"])
        if sshd is None or shutil.which("ssh-keygen") is None:
            pytest.skip("needs Debian's openssh-server")
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        shutil.copy(folder / "user.pub", folder / "authorized")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (folder / "config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nPasswordAuthentication no\n"
            "PermitRootLogin prohibit-password\n"
        )
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        self.process = subprocess.Popen([sshd, "-D", "-e", "-f", folder / "config"], stderr=subprocess.PIPE)
        assert self.process.stderr is not None
        while b"listening" not in (line := self.process.stderr.readline()):
            assert line, "sshd did not start"
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        key = (folder / "host.pub").read_text().split()[:2]
        (folder / "known").write_text(f"[127.0.0.1]:{self.port} {' '.join(key)}\n")

    def remote(self, *, python: str = sys.executable, folder: str = "", known: str = "known") -> Remote:
        options = ("-F/dev/null", f"-p{self.port}", f"-i{self.folder}/user", "-oBatchMode=yes",
                   f"-oUserKnownHostsFile={self.folder}/{known}", "-oStrictHostKeyChecking=yes")  # fmt: skip
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        return Remote(f"{user}@127.0.0.1", python, folder or str(self.folder / "there"), options, backoff_s=0.2)

    def cut(self) -> None:
        """Kill the processes that serve connections, and leave the listener."""
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=False
        )
        for pid in found.stdout.split():
            os.kill(int(pid), signal.SIGKILL)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()


@pytest.fixture
def loopback(tmp_path: Path) -> Iterator[Loopback]:
    folder = tmp_path / "sshd"
    folder.mkdir(mode=0o700)
    server = Loopback(folder)
    try:
        yield server
    finally:
        server.close()


@pytest.mark.slow
def test_sshd_a_bundle_there_and_back(tmp_path: Path, loopback: Loopback) -> None:
    plan = small_plan()
    rows = run_bundle_there(loopback.remote(), plan.save(tmp_path / "b.pyz"), tmp_path / "b.jsonl", io.StringIO())
    assert rows == len(plan.jobs) and complete(plan, tmp_path / "b.jsonl")


class CutsAfter(io.StringIO):
    """A progress stream that cuts the connection once a few rows are done."""

    def __init__(self, loopback: Loopback) -> None:
        super().__init__()
        self.loopback, self.cuts = loopback, 0

    def write(self, text: str) -> int:
        done = text.partition("/")[0]
        if self.cuts == 0 and done.isdigit() and int(done) >= 3:
            self.cuts += 1
            self.loopback.cut()
        return super().write(text)


@pytest.mark.slow
def test_sshd_the_connection_cut_in_the_middle(tmp_path: Path, loopback: Loopback) -> None:
    plan, progress = small_plan(SLOW, 30), CutsAfter(loopback)
    run_bundle_there(loopback.remote(), plan.save(tmp_path / "b.pyz"), tmp_path / "b.jsonl", progress)
    assert progress.cuts == 1 and complete(plan, tmp_path / "b.jsonl")


@pytest.mark.slow
def test_sshd_a_host_without_onnxruntime(tmp_path: Path, loopback: Loopback) -> None:
    bare = script(tmp_path / "bare-python", f'exec {sys.executable} -I -S "$@"\n')
    with pytest.raises(DeviceError, match="pip install"):
        run_bundle_there(loopback.remote(python=str(bare)), small_plan().save(tmp_path / "b.pyz"), tmp_path / "j")


@pytest.mark.slow
def test_sshd_an_unknown_host_key(tmp_path: Path, loopback: Loopback) -> None:
    with pytest.raises(DeviceError, match="host key"):
        run_bundle_there(loopback.remote(known="empty"), small_plan().save(tmp_path / "b.pyz"), tmp_path / "j")


@pytest.mark.slow
def test_sshd_a_full_disk_loses_nothing(tmp_path: Path, loopback: Loopback) -> None:
    small = tmp_path / "small disk"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", small], capture_output=True, check=False
    ).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        plan = small_plan()
        bundle = plan.save(tmp_path / "b.pyz")
        ballast = small / "ballast"
        ballast.write_bytes(bytes(248 << 10))
        with pytest.raises(DeviceError, match="disk is full"):
            run_bundle_there(loopback.remote(folder=str(small)), bundle, tmp_path / "b.jsonl")
        ballast.write_bytes(bytes(1))
        loopback.remote(folder=str(small)).send(bundle, f"b-{plan.plan['sha256'][:12]}.pyz")
        free = os.statvfs(small).f_bavail * os.statvfs(small).f_bsize
        ballast.write_bytes(bytes(max(1, free)))
        with pytest.raises(DeviceError, match="make room"):
            run_bundle_there(loopback.remote(folder=str(small)), bundle, tmp_path / "b.jsonl")
        ballast.unlink()
        run_bundle_there(loopback.remote(folder=str(small)), bundle, tmp_path / "b.jsonl")
        assert complete(plan, tmp_path / "b.jsonl")
    finally:
        subprocess.run(["umount", small], check=False)
