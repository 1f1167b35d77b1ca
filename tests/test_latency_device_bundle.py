"""A device's bundle: what is no bundle, or one that makes no sense, is said in one line."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_profiles import small_plan

from diplugin.latency import device


def test_a_bundle_that_is_none(tmp_path: Path) -> None:
    plan = small_plan(2)
    good = plan.save(tmp_path / "good.pyz")
    document = plan.plan
    cases = {"text": b"hello", "empty": b"", "cut": good.read_bytes()[:-40]}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    for name, changed in (("edited", {**document, "name": "x"}), ("newer", {**document, "schema": 9}), ("list", [1])):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("plan.json", json.dumps(changed))
    for name in (*cases, "edited", "newer", "list", "missing"):
        with pytest.raises(device.ProfileError) as error:
            device.Bundle(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_damaged_graph_is_refused(tmp_path: Path) -> None:
    plan = small_plan(2)
    name = plan.jobs[0].blob
    plan.blobs[name] += b" "
    with pytest.raises(device.ProfileError, match="damaged"):
        device.Bundle(plan.save(tmp_path / "b.pyz")).blob(name)


def in_every_header(data: bytearray, local: int, central: int) -> Iterator[int]:
    """Where a zip's field lies, so far behind the mark of every header before a file and of every one at the end."""
    for mark, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        for header in re.finditer(re.escape(mark), bytes(data)):
            yield header.start() + offset


@pytest.mark.parametrize("method", [99, 14, 12])
def test_a_bundle_cut_inside_or_packed_in_other_ways_is_one_line(method: int, tmp_path: Path) -> None:
    """What a failing SD card makes of it: sizes that lie, other ways of packing, other bytes than were packed."""
    bundle = small_plan(2).save(tmp_path / "b.pyz")
    plain, data = device.Bundle(bundle), bytearray(bundle.read_bytes())
    for place in in_every_header(data, 8, 10):
        data[place : place + 2] = method.to_bytes(2, "little")
    bundle.write_bytes(data)
    with pytest.raises(device.ProfileError, match="profile bundle"):
        device.Bundle(bundle)
    with pytest.raises(device.ProfileError, match="cannot be read"):
        plain.blob(plain.plan["jobs"][0]["blob"])


@pytest.mark.parametrize("name", ["plan.json", "a graph"])
def test_packed_bytes_that_lie_beyond_the_end_are_one_line(name: str, tmp_path: Path) -> None:
    bundle = small_plan(2).save(tmp_path / "b.pyz")
    plain, data = device.Bundle(bundle), bytearray(bundle.read_bytes())
    graph = plain.plan["jobs"][0]["blob"]
    with zipfile.ZipFile(bundle) as archive:
        member = archive.getinfo(name if name == "plan.json" else f"blobs/{graph}")
    data[member.header_offset + 29] = 0x76  # 30208 bytes of something else come first, it says
    bundle.write_bytes(data)
    with pytest.raises(device.ProfileError, match=r"profile bundle|cannot be read"):
        device.Bundle(bundle).blob(graph)


def test_an_encrypted_bundle_is_one_line(tmp_path: Path) -> None:
    bundle = small_plan(2).save(tmp_path / "b.pyz")
    plain, data = device.Bundle(bundle), bytearray(bundle.read_bytes())
    for place in in_every_header(data, 6, 8):
        data[place] |= 1  # the bit that says so
    bundle.write_bytes(data)
    with pytest.raises(device.ProfileError, match="encrypted"):
        device.Bundle(bundle)
    with pytest.raises(device.ProfileError, match="encrypted"):
        plain.blob(plain.plan["jobs"][0]["blob"])


def rewritten(bundle: Path, change: Callable[[Any], None]) -> Path:
    """A bundle whose plan was changed by somebody who also mended its hash."""
    with zipfile.ZipFile(bundle) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    plan = json.loads(held["plan.json"])
    change(plan)
    plan["sha256"] = device.plan_sha256(plan)
    held["plan.json"] = device.canonical(plan).encode()
    with zipfile.ZipFile(bundle, "w") as archive:
        for name, data in held.items():
            archive.writestr(name, data)
    return bundle


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "no setting": lambda p: p.pop("setting"),
    "threads as text": lambda p: p["setting"].update(threads="2"),
    "a setting with something besides": lambda p: p["setting"].update(more=1),
    "no threads": lambda p: p["setting"].update(threads=0),
    "a runtime that is a list": lambda p: p["setting"].update(runtime=[]),
    "an unknown optimisation": lambda p: p["setting"].update(graph_optimization="utmost"),
    "a name with a control character": lambda p: p.update(name="a\x1b[2J"),
    "endless rounds": lambda p: p["protocol"].update(rounds=10**12),
    "no rounds": lambda p: p["protocol"].update(rounds=0),
    "a pause of years": lambda p: p["protocol"].update(pause_s=1e9),
    "a protocol without chunks": lambda p: p["protocol"].pop("chunk"),
    "jobs that are a number": lambda p: p.update(jobs=3),
    "no jobs": lambda p: p.update(jobs=[]),
    "a job that is a text": lambda p: p["jobs"].append("job"),
    "a job twice": lambda p: p["jobs"].append(p["jobs"][0]),
    "an unknown kind": lambda p: p["jobs"][2].update(kind="shell"),
    "a blob elsewhere": lambda p: p["jobs"][2].update(blob="../../etc/passwd"),
    "an input that fills the memory": lambda p: p["jobs"][2].update(inputs=[["x", [1 << 20, 1 << 20], "float32"]]),
    "a negative shape": lambda p: p["jobs"][2].update(inputs=[["x", [-1], "float32"]]),
    "inputs that are no triples": lambda p: p["jobs"][2].update(inputs=[["x"]]),
    "a sentinel that is nobody": lambda p: p.update(sentinel="x"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_plan_that_makes_no_sense_is_one_line_though_its_hash_is_right(
    change: Callable[[Any], Any], tmp_path: Path
) -> None:
    bundle = rewritten(small_plan(2).save(tmp_path / "b.pyz"), change)
    with pytest.raises(device.ProfileError, match="profile plan") as error:
        device.Bundle(bundle)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
