"""Devices over ssh: against a real sshd on loopback."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_bundles import complete, script, small_plan

from diplugin.errors import DeviceError
from diplugin.latency.plan import Protocol
from diplugin.latency.remote import Remote, run_bundle_there

SLOW = Protocol(rounds=10, runs=4, round_ms=5.0, chunk=1, patience=1, gap_ms=5.0, pause_s=0.0)


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
