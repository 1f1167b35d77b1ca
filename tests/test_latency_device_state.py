"""What a device says of itself."""

from __future__ import annotations

import pytest

from diplugin.latency.device import state


def test_vcgencmd_and_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, expected in (
        ("throttled=0x0", False),
        ("throttled=0x50000", False),
        ("throttled=0x50005", True),
        ("", False),
    ):
        monkeypatch.setattr(state, "tool", lambda *_, said=said: said)
        assert state.throttled() is expected


def test_provenance_is_plain_printable_and_bounded() -> None:
    found = state.provenance({"version": "1.0"})
    assert found["device"] and found["machine"] and found["emulated"] is False
    assert all(isinstance(v, bool | int | float) or (v.isprintable() and len(v) <= 500) for v in found.values())


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
