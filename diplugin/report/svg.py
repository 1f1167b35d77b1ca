"""A drawing in SVG, written by hand: few shapes, real text, colours by class.

Colours come from CSS variables, so that one drawing follows the light or dark page it lies in, prints, and stands
alone as a file with the same style inside. Everything that comes from outside is escaped here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

LIGHT = {
    "paper": "#ffffff", "ink": "#1c2429", "soft": "#5d6b75", "line": "#d9dfe3", "track": "#e9edf0",
    "kept": "#1f6f8b", "second": "#c8622d", "third": "#6b5ca5", "fourth": "#4c8a3f", "gone": "#b9c4cb",
}  # fmt: skip
DARK = {
    "paper": "#14191d", "ink": "#e4eaee", "soft": "#97a6b0", "line": "#303a41", "track": "#252d33",
    "kept": "#56b3d1", "second": "#ee9664", "third": "#a99be0", "fourth": "#8cc97e", "gone": "#55626b",
}  # fmt: skip
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
WIDTH = 760
SERIES = ("kept", "second", "third", "fourth")


def variables(colours: dict[str, str]) -> str:
    """CSS custom properties of a palette."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def drawing_style() -> str:
    """Rules that every drawing needs, whether in the page or alone."""
    fills = "".join(
        f".fill-{n} {{ fill: var(--{n}); }} .stroke-{n} {{ stroke: var(--{n}); fill: none; }} " for n in LIGHT
    )
    return (
        f"svg.drawing text {{ font-family: {FONT}; font-size: 12px; fill: var(--ink); "
        "font-variant-numeric: tabular-nums; } svg.drawing text.soft { fill: var(--soft); } "
        "svg.drawing text.small { font-size: 11px; } svg.drawing text.strong { font-weight: 600; } "
        "svg.drawing text.large { font-size: 22px; font-weight: 600; } "
        f"{fills} .dashed {{ stroke-dasharray: 4 3; }}"
    )


@dataclass
class Drawing:
    """Shapes in the order they were added; `width` and `height` in CSS pixels."""

    width: float
    height: float
    label: str
    parts: list[str] = field(default_factory=list)

    def rect(
        self, x: float, y: float, width: float, height: float, colour: str, title: str = "", shade: float = 1
    ) -> None:
        depth = f' fill-opacity="{_n(shade)}"' if shade < 1 else ""
        self.parts.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(max(width, 0))}" height="{_n(height)}" '
            f'rx="{2 if width > 8 else 0}" class="fill-{colour}"{depth}>{_title(title)}</rect>'
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, colour: str = "line", width: float = 1, dashed: bool = False
    ) -> None:
        kind = f"stroke-{colour} dashed" if dashed else f"stroke-{colour}"
        self.parts.append(
            f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" class="{kind}" stroke-width="{_n(width)}"/>'
        )

    def path(self, points: Sequence[tuple[float, float]], colour: str, width: float = 2) -> None:
        steps = " L".join(f"{_n(x)} {_n(y)}" for x, y in points)
        self.parts.append(
            f'<path d="M{steps}" class="stroke-{colour}" stroke-width="{_n(width)}" stroke-linejoin="round"/>'
        )

    def dot(self, x: float, y: float, radius: float, colour: str, title: str = "", hollow: bool = False) -> None:
        kind = f'class="stroke-{colour}" stroke-width="1.5"' if hollow else f'class="fill-{colour}"'
        self.parts.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" {kind}>{_title(title)}</circle>')

    def dots(self, points: Sequence[tuple[float, float]], radius: float, colour: str, hollow: bool = False) -> None:
        """Many dots as one element."""
        if not points:
            return
        marks = "".join(f"M{_n(x)} {_n(y)}h0" for x, y in points)
        rings = ((colour, 2 * radius), ("paper", 2 * radius - 2.2)) if hollow else ((colour, 2 * radius),)
        for shade, width in rings:
            self.parts.append(
                f'<path d="{marks}" class="stroke-{shade}" stroke-width="{_n(width)}" stroke-linecap="round"/>'
            )

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start", title: str = "") -> None:
        self.parts.append(
            f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}" class="{kind}">'
            f"{_escaped(words)}{_title(title)}</text>"
        )

    def place(self, other: Drawing, x: float, y: float) -> None:
        """Another drawing, with its upper left corner at (x, y)."""
        self.parts.append(f'<g transform="translate({_n(x)} {_n(y)})">{"".join(other.parts)}</g>')

    def inline(self) -> str:
        """The element, for a page that has `drawing_style`."""
        return self._element("")

    def standalone(self) -> str:
        """A whole SVG file, light or dark as the viewer prefers."""
        style = (
            f":root {{ {variables(LIGHT)} }} @media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }} "
            f"{drawing_style()}"
        )
        paper = f'<rect width="{_n(self.width)}" height="{_n(self.height)}" class="fill-paper"/>'
        return self._element(f"<style>{style}</style>{paper}") + "\n"

    def _element(self, head: str) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" viewBox="0 0 {_n(self.width)} {_n(self.height)}" '
            f'width="{_n(self.width)}" height="{_n(self.height)}" role="img" aria-label="{_escaped(self.label)}">'
            f"{head}{''.join(self.parts)}</svg>"
        )


def _n(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".")


def _title(text: str) -> str:
    return f"<title>{_escaped(text)}</title>" if text else ""


def _escaped(text: str) -> str:
    """Markup as text; control characters, which no XML file may hold, as a replacement mark."""
    return escape(
        "".join("\ufffd" if c < " " or "\x7f" <= c < "\xa0" or "\ud800" <= c <= "\udfff" else c for c in text)
    )


def shortened(text: str, characters: int) -> str:
    """The end of a name says most: `…layer3.2.conv1`."""
    return text if len(text) <= characters else "…" + text[-(characters - 1) :]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover [low, high] at about that many steps."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + i) * step, 12) for i in range(count)]


@dataclass(frozen=True)
class Axis:
    """A linear map from [low, high] to [start, end] in pixels.

    Room around figures near the largest float would be infinite: the ends stay where their distance is a number.
    """

    low: float
    high: float
    start: float
    end: float

    def __post_init__(self) -> None:
        most = sys.float_info.max / 4
        object.__setattr__(self, "low", min(max(self.low, -most), most))
        object.__setattr__(self, "high", min(max(self.high, -most), most))

    def __call__(self, number: float) -> float:
        span = self.high - self.low
        return self.start + (self.end - self.start) * ((number - self.low) / span if span else 0.5)
