"""NVIDIA's trtexec: a program that times a graph by itself, and what it writes."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile

from .documents import parse
from .errors import ProfileError
from .state import tool


class Trtexec:
    """NVIDIA's `trtexec` behind the face of a runtime: it times a graph by itself and exports the times as JSON.

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
