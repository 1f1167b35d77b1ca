"""torch itself as the runtime, for servers and CUDA GPUs: the same jobs, run as modules instead of ONNX graphs.

It is for this machine only: a bundle needs no torch. CUDA runs are timed by events on the GPU's own clock.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, TableError
from ..tables import OpKey, Setting
from .graphs import Graph

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish, "silu": nn.SiLU, "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh,
}  # fmt: skip


def torch_setting(place: str = "cpu", threads: int = 1) -> Setting:
    """The setting of eager torch on "cpu" or "cuda".

    Raises:
        TableError: no such place here.
    """
    if place not in ("cpu", "cuda") or (place == "cuda" and not torch.cuda.is_available()):
        raise TableError(f"expected cpu, or cuda where there is a GPU, got {place!r}")
    return Setting("torch", torch.__version__.partition("+")[0], place, "eager", threads)


def operator_module(key: OpKey) -> tuple[nn.Module, tuple[int, ...]]:
    """A module of one operator with its activation, and the shape of its input.

    Raises:
        ModelError: a number of dimensions or an activation that torch runs not at all, or not here.
    """
    if key.activation not in _ACTIVATIONS:
        raise ModelError(f"expected a known activation behind a layer, got {key.activation!r}")
    activation = _ACTIVATIONS[key.activation]()
    if key.op == "linear":
        shape = (key.batch, key.cin) if key.size == (1,) else (key.batch, *key.size, key.cin)
        return nn.Sequential(nn.Linear(key.cin, key.cout), activation).eval(), shape
    kinds: dict[tuple[str, int], Any] = {
        ("conv", 1): nn.Conv1d, ("conv", 2): nn.Conv2d, ("conv", 3): nn.Conv3d, ("conv_transpose", 1):
        nn.ConvTranspose1d, ("conv_transpose", 2): nn.ConvTranspose2d, ("conv_transpose", 3): nn.ConvTranspose3d,
    }  # fmt: skip
    layer = kinds[key.op, len(key.size)](key.cin, key.cout, key.kernel, key.stride, key.padding, groups=key.groups,
                                         dilation=key.dilation)  # fmt: skip
    return nn.Sequential(layer, activation).eval(), (key.batch, key.cin, *key.size)


class TorchRuntime:
    """Jobs whose blob is an operator's key as JSON, or the name of a net that is held here."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.version, self.edges = setting, setting.version, False
        self.nets: dict[bytes, tuple[nn.Module, tuple[Any, ...]]] = {}
        torch.set_num_threads(setting.threads)

    def call(self) -> Graph:
        """What a plan holds for a call that does nothing."""
        return b"call", []

    def edge(self, channels: int, size: tuple[int, ...], batch: int, repeats: int, dtype: str = "float32") -> Graph:
        """torch computes in one layout: an edge costs a call."""
        return self.call()

    def operator(self, key: OpKey) -> Graph:
        """What a plan holds for an operator.

        Raises:
            ModelError: it is to run in 8 bits.
        """
        if key.dtype != "float32":
            raise ModelError(f"expected float32 for torch, got {key.dtype}: profile it in ONNX Runtime")
        return json.dumps(key.row).encode(), []

    def net(self, model: nn.Module, example_inputs: tuple[Any, ...], name: str, dtype: str = "float32") -> Graph:
        """What a plan holds for a whole net; a copy is kept here."""
        self.nets[name.encode()] = (copy.deepcopy(model).eval(), example_inputs)
        return name.encode(), []

    def load(self, blob: bytes, inputs: list[Any]) -> Any:
        """A function without arguments that runs the job once; on CUDA one that times itself."""
        if blob in self.nets:
            module, arguments = self.nets[blob]
        elif blob == b"call":
            module, arguments = nn.Identity(), (torch.zeros(1),)
        else:
            module, shape = operator_module(OpKey.from_row(json.loads(blob)))
            arguments = (torch.rand(shape),)
        place = self.setting.provider
        module = module.to(place)
        arguments = tuple(x.to(place) for x in arguments)
        return _OnGpu(module, arguments) if place == "cuda" else _once(module, arguments)


def _once(module: nn.Module, arguments: tuple[Any, ...]) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            module(*arguments)

    return run


class _OnGpu:
    """A module timed by CUDA events: milliseconds on the GPU's own clock, one pair of events a run."""

    def __init__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._run = _once(module, arguments)
        for _ in range(10):
            self._run()
        torch.cuda.synchronize()

    def times(self, runs: int) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
        for before, after in events:
            before.record()
            self._run()
            after.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in events]


__all__ = ["TorchRuntime", "operator_module", "torch_setting"]
