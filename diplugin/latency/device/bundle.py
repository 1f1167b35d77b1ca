"""A bundle: a plan and its graphs in one zip file.

Idea: whoever made it may have erred or meant ill. A hash says that a plan is whole, not that it makes sense, so every
field that is used here is checked for its type and range before anything runs.
"""

from __future__ import annotations

import hashlib
import zipfile

from .documents import SCHEMA, canonical, parse
from .errors import ProfileError, first_line

PLAN_FORMAT = "diplugin-profile-plan"
KINDS = ("sentinel", "call", "edge", "probe", "entry", "net")
SETTING_WORDS = ("runtime", "version", "provider", "graph_optimization")
COUNTS = ("rounds", "runs", "min_runs", "chunk", "patience", "pauses")
DURATIONS = ("round_ms", "warmup_ms", "gap_ms", "pause_s")
#: Graph optimisations that a plan may ask for, and ONNX Runtime's names of them.
LEVELS = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


class Bundle:
    """A plan and its graphs, in a zip file: `plan.json` and `blobs/NAME`."""

    def __init__(self, path):
        self.path = str(path)
        try:
            self.plan = checked_plan(parse(unzipped(self.path, "plan.json").decode()))
        except ValueError as error:
            raise ProfileError(
                f"expected a profile bundle in {self.path!r}, but {first_line(error)}: make it again "
                "with 'diplugin profile plan'"
            ) from None

    def blob(self, name):
        try:
            data = unzipped(self.path, "blobs/" + name)
        except ValueError as error:
            raise ProfileError(f"graph {name} of the bundle cannot be read: {first_line(error)}") from None
        if hashlib.sha256(data).hexdigest() != name.split(".")[0]:
            raise ProfileError(f"graph {name} of the bundle is damaged: copy the bundle again")
        return data


def unzipped(path, name):
    """What a file in a zip holds; ValueError for whatever zipfile and its decompressors raise where they find none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)
    except Exception as error:
        raise ValueError(first_line(error)) from None


def checked_plan(plan):
    if not isinstance(plan, dict) or plan.get("format") != PLAN_FORMAT:
        raise ValueError("it holds no profile plan")
    if plan.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {str(plan.get('schema'))[:20]} and this version reads {SCHEMA}")
    if plan_sha256(plan) != plan.get("sha256"):
        raise ValueError("its plan does not match its SHA-256")
    try:
        check_plan_fields(plan)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its plan is incomplete ({first_line(error)})") from None
    return plan


def check_plan_fields(plan):
    """Types and ranges of all that is used here: a hash says that a plan is whole, not that it makes sense."""
    setting, protocol, jobs = plan["setting"], plan["protocol"], plan["jobs"]
    if set(setting) != {*SETTING_WORDS, "threads"}:
        raise ValueError(f"its setting does not hold exactly {', '.join(SETTING_WORDS)} and threads")
    words = [plan["name"], *(setting[name] for name in SETTING_WORDS)]
    if not all(type(word) is str and len(word) <= 200 and word.isprintable() for word in words):
        raise ValueError("its name or setting is no short text")
    if setting["graph_optimization"] not in LEVELS:
        raise ValueError(f"its graph optimisation is none of {', '.join(LEVELS)}")
    counts = {"threads": setting["threads"], **{n: protocol[n] for n in COUNTS}}
    for name, value in counts.items():
        if type(value) is not int or not (0 if name == "pauses" else 1) <= value <= 1 << 20:
            raise ValueError(f"{name} is no plausible count")
    for name in DURATIONS:
        if type(protocol[name]) not in (int, float) or not 0 <= protocol[name] < 3.6e6:
            raise ValueError(f"{name} is no plausible duration")
    for job in jobs:
        check_job(job)
    ids = [job["id"] for job in jobs]
    if len(set(ids)) != len(ids) or plan["sentinel"] not in ids:
        raise ValueError("its jobs are named twice or lack the sentinel")


def check_job(job):
    if type(job["id"]) is not str or job["kind"] not in KINDS or type(job["detail"]) is not dict:
        raise ValueError("one of its jobs is none that is known here")
    digest, _, ending = job["blob"].partition(".")
    if len(digest) != 64 or set(digest) - set("0123456789abcdef") or ending != "onnx":
        raise ValueError("one of its jobs names no graph of the bundle")
    for name, shape, dtype in job["inputs"]:
        size = 1
        for side in shape:
            if type(side) is not int or not 0 <= side <= 1 << 24:
                raise ValueError("one of its inputs has no plausible shape")
            size *= side
        if type(name) is not str or type(dtype) is not str or len(dtype) > 20 or size > 1 << 30:
            raise ValueError("one of its inputs is none that fits")


def plan_sha256(plan):
    return hashlib.sha256(canonical({k: v for k, v in plan.items() if k != "sha256"}).encode()).hexdigest()
