"""What runs graphs, by the name that a plan gives it.

Idea: a runtime has a `version`, and its `load(blob, inputs)` gives a function without arguments that runs the graph
once; or, from a runtime with a clock of its own, something whose `times(runs)` gives the milliseconds of so many runs.
"""

from __future__ import annotations

from .bundle import LEVELS
from .errors import ProfileError, first_line
from .trtexec import Trtexec


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


RUNTIMES = {"onnxruntime": OnnxRuntime, "trtexec": Trtexec}
