#!/usr/bin/env python3
"""The one file that runs on a device: times the graphs of a profile bundle and writes a journal.

Idea: everything that needs thought happened where the bundle was made. Here a list of *jobs* (tiny ONNX graphs) is
timed in interleaved rounds, so that a slow minute touches all of a chunk alike, and every finished job becomes one
checksummed JSON line, synced to disk. Killed at any moment and started again it goes on where it was.

It imports nothing but the standard library, numpy and a runtime, and keeps to Python 3.8.

    python3 bundle.pyz [--journal FILE] [--quiet]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib

JOURNAL_FORMAT = "diplugin-journal"
PLAN_FORMAT = "diplugin-profile-plan"
SCHEMA = 1
DRIFT, MAX_CV = 0.05, 0.05
WAIT_S = 1.0
KINDS = ("sentinel", "call", "edge", "probe", "entry", "net")
COUNTS = ("rounds", "runs", "min_runs", "chunk", "patience", "pauses")
DURATIONS = ("round_ms", "warmup_ms", "gap_ms", "pause_s")
LEVELS = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
ROW_FIELDS = (
    "attempts",
    "cpu_ms",
    "cv",
    "id",
    "n",
    "peak_mb",
    "ratio",
    "rounds",
    "runs",
    "sentinel_ms",
    "unstable",
    "wall_ms",
)


class ProfileError(Exception):
    """The bundle, the journal or this device cannot be used; one line."""


# ------------------------------------------------------------------------------------------------ bundle and journal


def canonical(document):
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def refuse_constant(name):
    raise ValueError(f"{name} is no number")


def parse(text):
    """One JSON value; ValueError for everything that is not strictly JSON."""
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class Bundle:
    """A plan and its graphs, in a zip file: `plan.json` and `blobs/NAME`."""

    def __init__(self, path):
        self.path = str(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                text = archive.read("plan.json").decode()
            self.plan = checked_plan(parse(text))
        except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise ProfileError(
                f"expected a profile bundle in {self.path!r}, but {first_line(error)}: make it again "
                "with 'diplugin profile plan'"
            ) from None

    def blob(self, name):
        try:
            with zipfile.ZipFile(self.path) as archive:
                data = archive.read("blobs/" + name)
        except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise ProfileError(f"graph {name} of the bundle cannot be read: {first_line(error)}") from None
        if hashlib.sha256(data).hexdigest() != name.split(".")[0]:
            raise ProfileError(f"graph {name} of the bundle is damaged: copy the bundle again")
        return data


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
    words = [plan["name"], *(setting[name] for name in ("runtime", "version", "provider", "graph_optimization"))]
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


def first_line(error):
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def sealed(row):
    """A row as a line of the journal, with a checksum that tells a flipped bit."""
    return canonical({**row, "crc": f"{zlib.crc32(canonical(row).encode()):08x}"}) + "\n"


def unsealed(line):
    """The row of a journal's line; ValueError if it is damaged."""
    row = parse(line)
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    crc = row.pop("crc", None)
    if crc != f"{zlib.crc32(canonical(row).encode()):08x}":
        raise ValueError("its checksum is wrong")
    return row


class Journal:
    """Append-only JSON lines: a header, then one row a finished job, each synced before the next begins.

    Two processes never write to one journal: a lock file beside it keeps the second out, or lets it wait.
    """

    def __init__(self, path, plan, wait=None):
        self.path, self.plan = str(path), plan
        self.lock = locked(self.path, wait)
        self.rows, self.fresh = {}, True
        try:
            if os.path.exists(self.path):
                self._take_up()
        except BaseException:
            self.close()
            raise

    def _take_up(self):
        self._repair()
        header, self.rows = read_journal(self.path)
        if header is not None and header["plan_sha256"] != self.plan["sha256"]:
            raise ProfileError(f"journal {self.path!r} belongs to another plan: name another one with --journal")
        self.fresh = header is None

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
        if self.fresh:
            self._append(
                {
                    "format": JOURNAL_FORMAT,
                    "schema": SCHEMA,
                    "plan_sha256": self.plan["sha256"],
                    "provenance": provenance,
                }
            )
        self.fresh = False

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
        except OSError:
            if wait is None:
                lock.close()
                raise ProfileError(
                    f"another process is writing the journal {path!r}: wait for it, or use --wait"
                ) from None
            wait()
            time.sleep(WAIT_S)


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


def check_header(row, earlier):
    if row["format"] != JOURNAL_FORMAT:
        raise ValueError("it is of another format")
    if row.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {str(row.get('schema'))[:20]} and this version reads {SCHEMA}")
    if not isinstance(row.get("provenance"), dict) or not isinstance(row.get("plan_sha256"), str):
        raise ValueError("its header is incomplete")
    if earlier is not None and earlier != row:
        raise ValueError("it is a second header")


def check_row(row):
    if tuple(sorted(row)) != ROW_FIELDS:
        raise ValueError("its fields are not those of a row")
    if not isinstance(row["id"], str) or type(row["unstable"]) is not bool:
        raise ValueError("its fields have wrong types")
    for name in ("attempts", "n", "rounds", "runs"):
        if type(row[name]) is not int or not 0 <= row[name] < 1 << 31:
            raise ValueError(f"{name} is no count")
    for name in ("cpu_ms", "cv", "peak_mb", "ratio", "sentinel_ms", "wall_ms"):
        if type(row[name]) not in (int, float) or not 0 <= row[name] < 3.6e6:
            raise ValueError(f"{name} is no plausible number")


# ------------------------------------------------------------------------------------------------ the device's state


def read_text(path):
    try:
        with open(path, "rb") as file:
            return file.read(4096).decode("utf-8", "replace").replace("\0", "").strip()
    except OSError:
        return ""


def tool(*command):
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=20, check=False)
        return done.stdout.decode("utf-8", "replace").strip()[:400]
    except (OSError, subprocess.SubprocessError):
        return ""


def device_model():
    """The device in words."""
    model = read_text("/proc/device-tree/model")
    cpu = [
        line.split(":", 1)[1].strip()
        for line in read_text("/proc/cpuinfo").splitlines()
        if line.lower().startswith(("model name", "hardware"))
    ]
    return model or (cpu[0] if cpu else platform.processor() or platform.machine())


def frequencies():
    found = (read_text(f"/sys/devices/system/cpu/cpu{i}/cpufreq/scaling_cur_freq") for i in range(os.cpu_count() or 1))
    return " ".join(filter(None, found))


def emulated():
    """Whether an emulator stands in for the device: its times mean nothing."""
    if os.environ.get("DIPLUGIN_EMULATED"):
        return True
    # qemu-user's own name is what the kernel runs; older versions show the host's processor, newer ones make one up.
    names = [read_text("/proc/self/comm"), os.path.basename(link("/proc/thread-self/exe"))]
    host = read_text("/proc/cpuinfo").lower()
    foreign = platform.machine() in ("aarch64", "armv7l") and ("genuineintel" in host or "authenticamd" in host)
    return foreign or any(name.startswith("qemu-") for name in names)


def link(path):
    try:
        return os.readlink(path)
    except OSError:
        return ""


def provenance(setting):
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    load = os.getloadavg() if hasattr(os, "getloadavg") else (0.0, 0.0, 0.0)
    found = {
        "device": device_model(),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "cpus": os.cpu_count() or 0,
        "python": platform.python_version(),
        "affinity": " ".join(map(str, affinity)),
        "governor": read_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "frequencies_khz": frequencies(),
        "load": f"{load[0]:.2f}",
        "emulated": emulated(),
        "runtime_version": setting.get("version", ""),
        "throttled": tool("vcgencmd", "get_throttled"),
        "nvpmodel": tool("nvpmodel", "-q"),
        "jetson_clocks": tool("jetson_clocks", "--show"),
        "jetpack": read_text("/etc/nv_tegra_release")[:400],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    clean = {
        k: "".join(c if c.isprintable() else " " for c in v) if isinstance(v, str) else v for k, v in found.items()
    }
    return {k: v for k, v in clean.items() if v not in ("", None)}


def peak_memory_mb():
    """Most memory that this process has held, in MB (10^6 bytes); 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 3)


def throttled():
    """Whether a Raspberry Pi says that it is, right now, short of voltage, capped or throttled."""
    text = tool("vcgencmd", "get_throttled")
    try:
        return bool(int(text.split("=", 1)[1], 16) & 0xF)
    except (IndexError, ValueError):
        return False


# ------------------------------------------------------------------------------------------------ runtimes


class OnnxRuntime:
    """Sessions of ONNX Runtime with the plan's setting."""

    def __init__(self, setting):
        try:
            import numpy
            import onnxruntime
        except ImportError as error:
            raise ProfileError(
                f"this device lacks {error.name or first_line(error)}: install it with "
                "'python3 -m pip install numpy onnxruntime'"
            ) from None
        self.numpy, self.runtime, self.setting = numpy, onnxruntime, setting
        if setting["provider"] not in onnxruntime.get_available_providers():
            have = ", ".join(onnxruntime.get_available_providers())
            raise ProfileError(f"this device's onnxruntime has no {setting['provider']}, it has {have}")
        self.version = onnxruntime.__version__

    def load(self, blob, inputs):
        """A function without arguments that runs the graph once on fixed inputs."""
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = self.setting["threads"]
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        level = LEVELS[self.setting["graph_optimization"]]
        options.graph_optimization_level = getattr(self.runtime.GraphOptimizationLevel, level)
        session = self.runtime.InferenceSession(blob, options, providers=[self.setting["provider"]])
        draw = self.numpy.random.RandomState(0)
        feed = {name: draw.rand(*shape).astype(dtype) for name, shape, dtype in inputs}
        return lambda: session.run(None, feed)


class Trtexec:
    """NVIDIA's `trtexec` behind the same face: it times a graph by itself and exports the times as JSON.

    Tested on recorded output only, not on a Jetson.
    """

    def __init__(self, setting):
        self.tool = os.environ.get("TRTEXEC", "trtexec")
        banner = tool(self.tool, "--help")
        if not banner:
            raise ProfileError("expected NVIDIA's trtexec on this device's PATH (or named by TRTEXEC), found none")
        self.half, self.version = setting["provider"] == "TensorRT-fp16", trtexec_version(banner)

    def load(self, blob, inputs):
        """A graph that times itself: its engine is built at the first round and loaded at the others."""
        return TrtexecGraph(self.tool, blob, self.half)


class TrtexecGraph:
    """One graph: `times` runs it and gives milliseconds of GPU compute of each run."""

    def __init__(self, command, blob, half):
        self.command, self.half, self.eight_bit = command, half, b"QuantizeLinear" in blob
        self.folder = tempfile.mkdtemp()
        with open(self.path("model.onnx"), "wb") as file:
            file.write(blob)

    def path(self, name):
        return os.path.join(self.folder, name)

    def __del__(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def times(self, runs):
        engine, exported = self.path("model.engine"), self.path("times.json")
        built = os.path.exists(engine)
        command = [self.command, "--exportTimes=" + exported, f"--iterations={runs}", "--warmUp=200", "--duration=0"]
        if built:
            command += ["--loadEngine=" + engine]
        else:
            command += [
                "--onnx=" + self.path("model.onnx"),
                "--saveEngine=" + engine,
                *(["--fp16"] if self.half else []),
                *(["--int8"] if self.eight_bit else []),
            ]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if done.returncode != 0:
            tail = done.stdout.decode("utf-8", "replace").strip().splitlines()[-1:] or [""]
            raise ProfileError(f"trtexec failed: {tail[0][:300]}")
        with open(exported, encoding="utf-8") as file:
            return trtexec_times(file.read())


def trtexec_version(text):
    """The version in trtexec's banner, as "8.6.1"; "" if there is none."""
    for word in text.replace("]", " ").split():
        if word.startswith("v") and word[1:].isdigit() and len(word) >= 5:
            number = int(word[1:])
            # 8502 is 8.5.2; since version 10 the middle number has two digits: 100300 is 10.3.0.
            major, minor = divmod(number // 100, 10 if number < 100000 else 100)
            return f"{major}.{minor}.{number % 100}"
    return ""


def trtexec_times(text):
    """Compute times in ms from what `trtexec --exportTimes` wrote; ProfileError if it is something else."""
    try:
        records = parse(text)
        times = [float(record["computeMs"]) for record in records]
    except (ValueError, KeyError, TypeError, OverflowError):
        raise ProfileError("expected a JSON list with computeMs, as trtexec --exportTimes writes it") from None
    if not times or not all(0 < t < 3.6e6 for t in times):
        raise ProfileError("trtexec's times are empty or not positive")
    return times


RUNTIMES = {"onnxruntime": OnnxRuntime, "trtexec": Trtexec}


# ------------------------------------------------------------------------------------------------ timing


def floor_of(values):
    """The lower quartile: of each round's fastest run it is the undisturbed time, to half a per cent on a machine
    whose other processes spread the medians by twelve."""
    return sorted(values)[(len(values) - 1) // 4]


class Timer:
    """One job's rounds: the fastest of `runs` runs in CPU time of the thread and in wall time, and their medians."""

    def __init__(self, job, run, protocol, thread_clock):
        self.job, self.run, self.protocol, self.thread_clock = job, run, protocol, thread_clock
        self.clock = time.thread_time_ns if thread_clock else time.process_time_ns
        self.cpu, self.wall, self.ratio = [], [], []
        self.times = getattr(run, "times", None)
        self.runs = protocol["runs"] if self.times is not None else self.warm_up()

    def warm_up(self):
        """Run until caches and clocks have settled; returns how many runs make a round."""
        protocol = self.protocol
        start = time.perf_counter()
        self.run()
        self.run()
        first = max(1e-6, (time.perf_counter() - start) / 2)
        for _ in range(min(5, int(protocol["warmup_ms"] / 1e3 / first))):
            self.run()
        return int(max(protocol["min_runs"], min(protocol["runs"], protocol["round_ms"] / 1e3 / first)))

    def sample(self):
        """(CPU, wall) times in ms of the runs of a round; a graph with a clock of its own is asked for its times."""
        if self.times is not None:
            times = self.times(self.runs)
            return times, times
        cpu, wall = [], []
        for _ in range(self.runs):
            w0, c0 = time.perf_counter_ns(), self.clock()
            self.run()
            c1, w1 = self.clock(), time.perf_counter_ns()
            cpu.append((c1 - c0) / 1e6)
            wall.append((w1 - w0) / 1e6)
        return cpu, wall

    def round(self):
        cpu, wall = self.sample()
        self.cpu.append(min(cpu))
        self.wall.append(min(wall))
        self.ratio.append(sum(cpu) / max(sum(wall), 1e-9))

    @property
    def judged(self):
        """The times that count: with one thread its CPU time, which other processes disturb less; else wall time."""
        return self.cpu if self.thread_clock else self.wall

    @property
    def cv(self):
        """Coefficient of variation over the quieter half of the rounds."""
        quiet = sorted(self.judged)[: (len(self.judged) + 1) // 2]
        mean = statistics.mean(quiet)
        return statistics.pstdev(quiet) / mean if mean > 0 else 0.0

    @property
    def done(self):
        wanted, have = self.protocol["rounds"], len(self.cpu)
        return have >= wanted * self.protocol["patience"] or (have >= wanted and self.cv <= MAX_CV)

    def row(self, sentinel_ms, limited):
        cv, rounds = self.cv, len(self.cpu)
        return {
            "id": self.job["id"],
            "cpu_ms": round(floor_of(self.cpu), 6),
            "wall_ms": round(floor_of(self.wall), 6),
            "cv": round(cv, 5),
            "ratio": round(min(statistics.median(self.ratio), 1e3), 4),
            "runs": self.runs,
            "rounds": rounds,
            "attempts": -(-rounds // self.protocol["rounds"]),
            "peak_mb": peak_memory_mb(),
            "sentinel_ms": round(sentinel_ms, 6),
            "unstable": limited or cv > MAX_CV,
        }


class Profiler:
    """Times the jobs of a plan that its journal does not hold yet."""

    def __init__(self, bundle, journal, runtime, progress=None, known=()):
        self.bundle, self.journal, self.runtime, self.known = bundle, journal, runtime, known
        self.plan = bundle.plan
        self.setting, self.protocol = self.plan["setting"], self.plan["protocol"]
        self.thread_clock = self.setting["threads"] == 1 and self.setting["provider"] == "CPUExecutionProvider"
        self.progress = progress or (lambda done, total: None)
        self.reference = 0.0

    def run(self):
        todo = [job for job in self.plan["jobs"] if job["id"] not in self.journal.rows]
        total = len(self.plan["jobs"])
        self.progress(total - len(todo), total)
        if not todo:
            return
        self.journal.start(provenance({"version": self.runtime.version}))
        seen = [row["sentinel_ms"] for row in self.journal.rows.values()]
        self.reference = min([*seen, *self.known, self.time_rounds([])])
        waiting = [(chunk, 0) for chunk in chunks(todo, self.protocol["chunk"])]
        while waiting:
            chunk, put_off = waiting.pop(0)
            rows = self.measure(chunk, last=put_off >= self.protocol["pauses"])
            if rows is None:
                # The device is slower than it can be: later may be better, and what is later still is done meanwhile.
                waiting.append((chunk, put_off + 1))
                if all(times for _, times in waiting):
                    time.sleep(self.protocol["pause_s"])
                continue
            for row in rows:
                self.journal.add(row)
            self.progress(len(self.journal.rows), total)

    def measure(self, chunk, last):
        """Rows of a chunk of jobs; None if the device drifted or said that it is throttled, but for the last try."""
        timers = [self.timer(job) for job in chunk]
        sentinel_ms, limited = self.time_rounds(timers), throttled()
        self.reference = min(self.reference, sentinel_ms)
        if not last and (limited or sentinel_ms > (1 + DRIFT) * self.reference):
            return None
        return [t.row(sentinel_ms, limited) for t in timers]

    def time_rounds(self, timers):
        """Interleaved rounds until every job, and a sentinel among them, has enough; returns the sentinel's time."""
        job = next(job for job in self.plan["jobs"] if job["id"] == self.plan["sentinel"])
        sentinel = self.timer(job)
        waiting = [sentinel, *timers]
        while waiting:
            for t in waiting:
                t.round()
            waiting = [t for t in waiting if not t.done]
            time.sleep(self.protocol["gap_ms"] / 1e3)
        return floor_of(sentinel.judged)

    def timer(self, job):
        try:
            run = self.runtime.load(self.bundle.blob(job["blob"]), job["inputs"])
            return Timer(job, run, self.protocol, self.thread_clock)
        except ProfileError:
            raise
        except Exception as error:
            what = f"{job['kind']} {str(job['detail'].get('key') or job['detail'].get('name') or '')[:120]}".strip()
            raise ProfileError(
                f"the graph of {what} does not run in this device's runtime {self.runtime.version} "
                f"({first_line(error)}): update the runtime, or plan again without it"
            ) from None


def chunks(jobs, size):
    """Jobs in chunks that are timed together; whole nets in chunks of at most three, for memory's sake."""
    chunk = []
    for job in jobs:
        limit = min(size, 3) if job["kind"] == "net" else size
        if chunk and (len(chunk) >= limit or (job["kind"] == "net") != (chunk[0]["kind"] == "net")):
            yield chunk
            chunk = []
        chunk.append(job)
    if chunk:
        yield chunk


def profile(bundle, journal_path, progress=None, runtime=None, wait=None, known=()):
    """Time every job of a bundle that the journal does not hold yet; returns the journal.

    `wait` is called while another process holds the journal; without it that is an error. `known` are times in ms that
    the sentinel has been seen to take on this device.
    """
    setting = bundle.plan["setting"]
    if runtime is None:
        if setting["runtime"] not in RUNTIMES:
            raise ProfileError(f"this file cannot run {str(setting['runtime'])[:40]!r}")
        runtime = RUNTIMES[setting["runtime"]](setting)
    journal = Journal(journal_path, bundle.plan, wait)
    try:
        Profiler(bundle, journal, runtime, progress, known).run()
    finally:
        journal.close()
    return journal


# ------------------------------------------------------------------------------------------------ command


def progress_line(stream):
    """Progress with the remaining time: in place on a terminal, else a line every ten per cent."""
    start, last = time.monotonic(), [-1, None]

    def show(done, total):
        with contextlib.suppress(OSError):  # nobody listens any more; measuring goes on
            tell(done, total)

    def tell(done, total):
        if last[1] is None:
            last[1] = done
        elapsed, fresh = time.monotonic() - start, done - last[1]
        left = f"{elapsed / fresh * (total - done):.0f} s left" if fresh else "starting"
        if stream.isatty():
            stream.write(f"\r{done}/{total}  {left}   ")
        elif done * 10 // max(total, 1) > last[0] or done == total:
            last[0] = done * 10 // max(total, 1)
            stream.write(f"{done}/{total} {left}\n")
        stream.flush()

    return show


def waiter(path, bundle, progress):
    """Shows the progress of the process that holds the journal."""

    def wait():
        if progress is not None and os.path.exists(path):
            with open(path, "rb") as file:
                progress(max(0, file.read().count(b"\n") - 1), len(bundle.plan["jobs"]))

    return wait


def main(argv=None):
    own = sys.argv[0]
    parser = argparse.ArgumentParser(prog=os.path.basename(own), description="Time this bundle's graphs here.")
    parser.add_argument("--bundle", default=own, help=argparse.SUPPRESS)
    parser.add_argument("--journal", help="where results go (default: the bundle's name with .jsonl)")
    parser.add_argument("--wait", action="store_true", help="wait for another process that writes the journal")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args(argv)
    journal = args.journal or os.path.splitext(os.path.basename(args.bundle))[0] + ".jsonl"
    try:
        bundle, progress = Bundle(args.bundle), None if args.quiet else progress_line(sys.stderr)
        done = profile(bundle, journal, progress, wait=waiter(journal, bundle, progress) if args.wait else None)
    except ProfileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    print(f"{len(done.rows)} rows in {journal}; bring it back and run 'diplugin profile finish'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
