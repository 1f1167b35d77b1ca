"""Which jobs are timed when: chunk by chunk in interleaved rounds, and again later where the device was slow.

Idea: a sentinel among each chunk's jobs tells a slow minute from a fast one; a chunk that met a slow one is put off.
"""

from __future__ import annotations

import contextlib
import time

from .errors import ProfileError, first_line
from .journal import Journal
from .runtimes import RUNTIMES
from .state import provenance, throttle_bits, throttled
from .timer import Timer, floor_of

DRIFT = 0.05


class Profiler:
    """Times the jobs of a plan that its journal does not hold yet."""

    def __init__(self, bundle, journal, runtime, progress=None, known=()):
        self.bundle, self.journal, self.runtime, self.known = bundle, journal, runtime, known
        self.plan = bundle.plan
        self.setting, self.protocol = self.plan["setting"], self.plan["protocol"]
        self.thread_clock = self.setting["threads"] == 1 and self.setting["provider"] == "CPUExecutionProvider"
        self.progress = progress or (lambda done, total: None)
        self.seen = []

    def run(self):
        todo = [job for job in self.plan["jobs"] if job["id"] not in self.journal.rows]
        total = len(self.plan["jobs"])
        self.progress(total - len(todo), total)
        if not todo:
            return
        self.journal.start(provenance({"version": self.runtime.version}))
        done = [row["sentinel_ms"] for row in self.journal.rows.values()]
        self.seen = [*done, *self.known, self.time_rounds([])]
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
        timers, bits = [self.timer(job) for job in chunk], throttle_bits()
        sentinel_ms = self.time_rounds(timers)
        limited = throttled(bits, throttle_bits())
        self.seen.append(sentinel_ms)
        if not last and (limited or drifted(sentinel_ms, floor_of(self.seen))):
            return None
        return [t.row(sentinel_ms, limited) for t in timers]

    def time_rounds(self, timers):
        """Interleaved rounds until every job, and a sentinel among them, has enough; returns the sentinel's time."""
        job = next(job for job in self.plan["jobs"] if job["id"] == self.plan["sentinel"])
        sentinel = self.timer(job)
        waiting = [sentinel, *timers]
        while waiting:
            for t in waiting:
                with self.told(t.job):
                    t.round()
            waiting = [t for t in waiting if not t.done]
            time.sleep(self.protocol["gap_ms"] / 1e3)
        return floor_of(sentinel.judged)

    def timer(self, job):
        with self.told(job):
            run = self.runtime.load(self.bundle.blob(job["blob"]), job["inputs"])
            return Timer(job, run, self.protocol, self.thread_clock)

    @contextlib.contextmanager
    def told(self, job):
        """Whatever a runtime raises over a job's graph becomes one line that names the job."""
        try:
            yield
        except ProfileError:
            raise
        except Exception as error:
            what = f"{job['kind']} {str(job['detail'].get('key') or job['detail'].get('name') or '')[:120]}".strip()
            raise ProfileError(
                f"the graph of {what} does not run in this device's runtime {self.runtime.version} "
                f"({first_line(error)}): update the runtime, or plan again without it"
            ) from None


def drifted(sentinel_ms, usual_ms):
    """Whether a device was slower than usual, or for a moment faster. What is usual is the lower quartile of what was
    seen: not the fastest, beside which all else would look slow."""
    return not usual_ms / (1 + DRIFT) <= sentinel_ms <= usual_ms * (1 + DRIFT)


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
