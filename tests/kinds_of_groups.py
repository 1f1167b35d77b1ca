"""A small network for every kind of channel group, in float64: how channels are spelled between writer and reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGES = 24


class Net(nn.Module):
    """A network whose forward is a function of its layers."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *x: Any) -> Any:
        return self.run(self, *x)


@dataclass(frozen=True)
class Kind:
    """A network, the root whose channels are removed, and what reads them.

    `readers` are (layer, dimension of its channels). `blocks`: so many channels go at once, evenly spaced.
    `whole`: what is read besides the removed channels stays as it was, so that the pruned network itself can be
    measured; else the removed columns are taken out of what the unpruned network reads.
    """

    net: Callable[[], nn.Module]
    root: str
    readers: Sequence[tuple[str, int]]
    shapes: Sequence[tuple[int, ...]] = ((3, 6, 6),)
    blocks: int = 1
    whole: bool = True


def conv(cin: int, cout: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, k, padding=k // 2, **options)


def residual() -> nn.Module:
    return Net(lambda m, x: m.out(F.relu(m.a(x) + m.b(x))), a=conv(3, 6), b=conv(3, 6, 1), out=conv(6, 2))


def concat() -> nn.Module:
    return Net(lambda m, x: m.out(F.relu(torch.cat([m.a(x), m.b(x)], 1))), a=conv(3, 6), b=conv(3, 5), out=conv(11, 2))


def reordered(order: str = "bca") -> nn.Module:
    """Three pieces, joined in one order for the sum with `tied` and in another for a second reader."""

    def run(m: Any, x: Tensor) -> Tensor:
        pieces = {name: getattr(m, name)(x) for name in "abc"}
        straight, other = (torch.cat([pieces[name] for name in names], 1) for names in ("abc", order))
        return m.d(F.relu(m.tied(x) + straight)) + m.e(F.relu(other))

    return Net(run, tied=conv(3, 9), a=conv(3, 3), b=conv(3, 3), c=conv(3, 3), d=conv(9, 2), e=conv(9, 2))


def split() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        p, q = m.a(x).chunk(2, 1)
        return m.q(q) + m.p(p)

    return Net(run, a=conv(3, 8), p=conv(4, 2), q=conv(4, 2))


def flatten() -> nn.Module:
    return Net(lambda m, x: m.fc(F.max_pool2d(F.relu(m.a(x)), 2).flatten(1)), a=conv(3, 6), fc=nn.Linear(54, 2))


def depthwise() -> nn.Module:
    return Net(lambda m, x: m.out(F.relu6(m.dw(F.relu6(m.a(x))))), a=conv(3, 6), dw=conv(6, 6, groups=6),
               out=conv(6, 2))  # fmt: skip


def grouped_reader() -> nn.Module:
    return Net(lambda m, x: m.out(F.relu(m.g(F.relu(m.a(x))))), a=conv(3, 8), g=conv(8, 6, groups=2), out=conv(6, 2))


def transposed() -> nn.Module:
    return Net(lambda m, x: m.out(F.relu(m.up(F.relu(m.a(x))))), a=conv(3, 6), up=nn.ConvTranspose2d(6, 5, 2, 2),
               out=nn.ConvTranspose2d(5, 2, 3))  # fmt: skip


def conv1d() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 2, 3))


def conv3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(3, 6, 3), nn.ReLU(), nn.Conv3d(6, 2, 1))


def linears() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 7), nn.GELU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2))


def tokens() -> nn.Module:
    """Two readers of one LayerNorm: its statistics run over the channels that go."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        y = m.norm(x)
        return m.up(y).relu().mean((1, 2), keepdim=True) + m.head(y)

    return Net(run, embed=nn.Linear(5, 8), norm=nn.LayerNorm(8), up=nn.Linear(8, 3), head=nn.Linear(8, 2))


def group_norm() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), nn.ReLU(), conv(8, 2))


def gate() -> nn.Module:
    """Squeeze and excitation: the gate reads the pooled channels, the next layer the gated ones."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return m.out(y * torch.sigmoid(m.excite(F.relu(m.squeeze(y.mean((2, 3), keepdim=True))))))

    return Net(run, a=conv(3, 6), squeeze=conv(6, 3, 1), excite=conv(3, 6, 1), out=conv(6, 2))


def attention(kv_heads: int = 2) -> nn.Module:
    """Two query heads of width 4 over as many key and value heads, or over one that both share."""

    def run(m: Any, x: Tensor) -> Tensor:
        def heads(layer: nn.Module, count: int) -> Tensor:
            y = layer(x)
            return y.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)

        q, k, v = heads(m.q, 2), heads(m.k, kv_heads), heads(m.v, kv_heads)
        if kv_heads == 1:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = torch.softmax(q @ k.transpose(-2, -1), -1) @ v
        return m.proj(y.transpose(1, 2).flatten(2))

    wide = 4 * kv_heads
    return Net(run, q=nn.Linear(5, 8), k=nn.Linear(5, wide), v=nn.Linear(5, wide), proj=nn.Linear(8, 3))


def shared_attention() -> nn.Module:
    return attention(kv_heads=1)


def twice() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.shared(F.relu(m.stem(x))))
        return m.out(F.relu(m.shared(x)))

    return Net(run, stem=conv(3, 6), shared=conv(6, 6), out=conv(6, 2))


def many() -> nn.Module:
    """Two inputs, outputs in a dict."""

    def run(m: Any, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        y = F.relu(m.a(x) + m.b(z))
        return {"maps": m.maps(y), "logits": m.logits(y.mean((2, 3)))}

    return Net(run, a=conv(3, 6), b=conv(1, 6), maps=conv(6, 2), logits=nn.Linear(6, 4))


KINDS = {
    "conv1d": Kind(conv1d, "0", [("3", 1)], ((3, 9),)),
    "conv3d": Kind(conv3d, "0", [("2", 1)], ((3, 4, 4, 4),)),
    "linears": Kind(linears, "0", [("2", -1)], ((9,),)),
    "residual": Kind(residual, "a", [("out", 1)]),
    "concat": Kind(concat, "b", [("out", 1)]),
    "reordered": Kind(reordered, "a", [("d", 1), ("e", 1)]),
    "split": Kind(split, "a", [("p", 1), ("q", 1)], whole=False),
    "flatten": Kind(flatten, "a", [("fc", -1)]),
    "depthwise": Kind(depthwise, "a", [("out", 1)]),
    "grouped, read": Kind(grouped_reader, "a", [("g", 1)], blocks=2),
    "grouped, written": Kind(grouped_reader, "g", [("out", 1)], blocks=2),
    "transposed, read": Kind(transposed, "a", [("up", 1)]),
    "transposed, written": Kind(transposed, "up", [("out", 1)]),
    "layer_norm": Kind(tokens, "embed", [("up", -1), ("head", -1)], ((3, 5),), whole=False),
    "group_norm": Kind(group_norm, "0", [("3", 1)], blocks=2, whole=False),
    "gate": Kind(gate, "a", [("squeeze", 1), ("out", 1)], whole=False),
    "twice": Kind(twice, "stem", [("shared", 1), ("shared", 1), ("out", 1)], whole=False),
    "several inputs and outputs": Kind(many, "b", [("maps", 1), ("logits", -1)], ((3, 6, 6), (1, 6, 6))),
}


def inputs_of(kind: Kind, count: int = IMAGES) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    return tuple(torch.randn(count, *shape, generator=draw, dtype=torch.float64) for shape in kind.shapes)
