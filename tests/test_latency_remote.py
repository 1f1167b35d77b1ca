"""Devices over ssh: against a stand-in that runs commands here."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_bundles import QUICK, complete, script, small_plan

from diplugin.errors import DeviceError, TableError
from diplugin.latency.device.rows import sealed, unsealed
from diplugin.latency.graphs import export_bytes
from diplugin.latency.remote import ConnectionLost, Remote, measure_there, run_bundle_there

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
