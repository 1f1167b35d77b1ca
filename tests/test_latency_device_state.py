"""What a device says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from diplugin.latency.device import state
from diplugin.tables import checks


def test_vcgencmd_and_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def bits(said: str) -> int:
        monkeypatch.setattr(state, "tool", lambda *_: said)
        return state.throttle_bits()

    for said, expected in (
        ("throttled=0x0", False),
        ("throttled=0x50000", False),
        ("throttled=0x50005", True),
        ("", False),
        ("throttled=warm", False),
    ):
        assert state.throttled(bits(said), bits(said)) is expected


def test_a_throttle_that_has_come_and_gone_between_two_readings_leaves_its_mark() -> None:
    assert state.throttled(0x0, 0x40000) and state.throttled(0x40000, 0x50000)
    assert not state.throttled(0x40000, 0x40000)
    assert not state.throttled(0x40004, 0x40000)


def test_provenance_is_plain_printable_and_bounded() -> None:
    found = state.provenance({"version": "1.0"})
    assert found["device"] and found["machine"] and found["emulated"] is False
    assert all(isinstance(v, bool | int | float) or (v.isprintable() and len(v) <= 500) for v in found.values())


def test_what_hundreds_of_cores_say_fits_into_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    read = state.read_text
    monkeypatch.setattr(state, "read_text", lambda path: "2400000" if "scaling_cur_freq" in path else read(path))
    monkeypatch.setattr(state.os, "cpu_count", lambda: 256)
    monkeypatch.setattr(state.os, "sched_getaffinity", lambda _: set(range(256)), raising=False)
    monkeypatch.setattr(state, "tool", lambda *_: "a long story " * 99)
    said = state.provenance({"version": "1.0"})
    assert said["frequencies_khz"].startswith("2400000 2400000") and said["affinity"].startswith("0 1 2 3")
    assert checks.provenance(said) == said


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2048K", 2048), ("1M", 1024), ("256K", 256), ("0K", 0), ("", 0), ("2048", 0), ("K", 0), ("-1K", 0), ("1.5M", 0),
     ("2048K\n1M", 0), ("9" * 400 + "K", 0), ("garbage", 0)],
)  # fmt: skip
def test_sizes_as_the_kernel_writes_them(text: str, expected: int) -> None:
    assert state.kibibytes(text) == expected


LEVEL_1 = {"level": "1", "type": "Data", "size": "48K"}
CODE = {"level": "2", "type": "Instruction", "size": "64K"}
LEVEL_2 = {"level": "2", "type": "Unified", "size": "2048K"}


@pytest.mark.parametrize(
    ("caches", "expected"),
    [
        ([LEVEL_1, CODE, LEVEL_2, {**LEVEL_2, "level": "3", "size": "32M"}], 2048),
        ([{**LEVEL_2, "type": "Data", "size": "1M"}], 1024),
        ([LEVEL_1], 0),
        ([{**LEVEL_2, "size": "large"}], 0),
        ([{"level": "2"}, {}], 0),
        ([], 0),
    ],
)
def test_the_l2_of_a_core(
    caches: list[dict[str, str]], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, cache in enumerate(caches):
        (tmp_path / f"index{number}").mkdir()
        for name, text in cache.items():
            (tmp_path / f"index{number}" / name).write_text(text + "\n")
    monkeypatch.setattr(state, "CACHES", str(tmp_path if caches else tmp_path / "nowhere"))
    assert state.l2_kb() == expected
    assert state.provenance({})["l2_kb"] == expected


@pytest.mark.parametrize(
    ("machine", "texts", "expected"),
    [
        ("aarch64", {"/proc/cpuinfo": "model name : Cortex-A76"}, False),
        ("aarch64", {"/proc/cpuinfo": "vendor_id : GenuineIntel"}, True),
        ("aarch64", {"/proc/cpuinfo": "model name : ARMv8", "/proc/self/comm": "qemu-aarch64"}, True),
        ("x86_64", {"/proc/cpuinfo": "vendor_id : GenuineIntel"}, False),
    ],
)
def test_an_emulator_gives_itself_away(
    machine: str, texts: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "read_text", lambda path: texts.get(path, ""))
    monkeypatch.setattr(state.platform, "machine", lambda: machine)
    assert state.emulated() is expected
