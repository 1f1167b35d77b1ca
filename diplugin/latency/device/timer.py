"""How one job is timed: of each round its fastest run counts, of the rounds the lower quartile."""

from __future__ import annotations

import statistics
import time

from .state import peak_memory_mb

MAX_CV = 0.05


def floor_of(values):
    """The lower quartile: of each round's fastest run it is the undisturbed time, where medians still scatter."""
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
