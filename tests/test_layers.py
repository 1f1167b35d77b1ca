"""Imports point down only, read from the source of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: Every module directly under diplugin/ has its level here; imports go to the same level (without cycles) or below.
LEVELS = [
    {"errors", "plots", "rank_correlation", "whole_files"},
    {"discriminant", "plan", "modes", "samples", "tables", "team", "dependency", "groups", "network", "taps",
     "features", "costs", "layer_calls", "verification"},
    {"accuracy", "boundary", "disguise", "export", "filters", "fitted_scores", "holdout", "labels", "latency",
     "layer_scores", "mask_rules", "masks", "measurements", "onnx_inference", "quantize", "ranking", "reader_energy",
     "recovery", "reference", "run_folder", "scoring", "search", "surgery", "survivors"},
    {"compare", "contenders", "report", "sources", "strategies"},
    {"configuration", "pipeline"},
    {"cli", "demo"},
]  # fmt: skip
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
#: The package's own lazy `__getattr__` names everything, and `python -m diplugin` is the command line.
ABOVE_ALL = {"__init__", "__main__"}


def modules() -> dict[str, Path]:
    """Dotted module name -> file, for everything under diplugin/."""
    package = ROOT / "diplugin"
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Absolute names of what a module imports; `if TYPE_CHECKING` counts unless `top_only`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_only else ast.walk(tree)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            yield target
            yield from (f"{target}.{alias.name}" for alias in node.names)


def part(module: str) -> str:
    """`diplugin.costs.base` -> `costs`; the package itself -> `__init__`."""
    return [*module.split("."), "__init__"][1]


def edges() -> dict[str, set[str]]:
    """Which parts of diplugin each part imports, anywhere in its source."""
    known = modules()
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = {part(t) for t in imports(name, path) if t.startswith("diplugin.") and part(t) in LEVEL_OF}
        found.setdefault(part(name), set()).update(targets - {part(name)})
    return found


def test_every_module_has_a_level() -> None:
    assert {part(name) for name in modules()} - ABOVE_ALL <= set(LEVEL_OF)


def test_imports_point_down() -> None:
    up = [
        f"{source} imports {target}"
        for source, targets in edges().items() if source not in ABOVE_ALL
        for target in targets if LEVEL_OF[target] > LEVEL_OF[source]
    ]  # fmt: skip
    assert not up


def test_no_cycles_within_a_level() -> None:
    graph = {source: targets for source, targets in edges().items() if source not in ABOVE_ALL}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {name for name in graph if name not in done and graph[name] <= done}
        assert ready, f"a cycle among {sorted(set(graph) - done)}"
        done |= ready


def test_the_core_knows_no_host() -> None:
    hosts = {"nni", "diplugin_nni", "diplugin_torch_pruning"}
    wrong = [
        (name, target) for name, path in modules().items() if name != "diplugin"
        for target in imports(name, path) if target.split(".")[0] in hosts
    ]  # fmt: skip
    assert not wrong


@pytest.mark.parametrize("path", sorted((ROOT / "adapters").glob("*.py")), ids=lambda path: path.stem)
def test_an_adapter_imports_one_host(path: Path) -> None:
    host = "nni" if path.stem.startswith("diplugin_nni") else "torch_pruning"
    own = {p.stem for p in path.parent.glob(f"diplugin_{host}*.py")}
    foreign = {target.split(".")[0] for target in imports(path.stem, path)} - set(sys.stdlib_module_names)
    assert foreign <= {"torch", "safetensors", "diplugin", host, *own}  # safetensors: what diplugin itself writes
    assert "diplugin" in foreign


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    heavy = {"sklearn", "scipy", "onnx", "onnxruntime", "onnxscript", "matplotlib", "jinja2", "accelerate", "timm"}
    early = [
        (name, target) for name, path in modules().items()
        for target in imports(name, path, top_only=True) if target.split(".")[0] in heavy
    ]  # fmt: skip
    assert not early


def test_importing_diplugin_brings_in_nothing_heavy() -> None:
    code = "import sys, diplugin; print(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    loaded = {name.split(".")[0] for name in out.split()}
    assert loaded.isdisjoint({"nni", "sklearn", "onnx", "onnxruntime", "onnxscript", "matplotlib", "jinja2", "scipy"})


def test_every_public_name_has_a_home() -> None:
    """What `diplugin.__all__` offers exists in the module it names, by reading that module's source."""
    import diplugin

    known = modules()
    for public, home in diplugin._HOMES.items():
        path = known.get(home) or ROOT / "adapters" / f"{home}.py"
        names = {
            name
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            for name in _bound_by(node)
        }  # fmt: skip
        assert public in names, f"{home} defines no {public}"


def _bound_by(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name for alias in node.names)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import diplugin

    with pytest.raises(AttributeError, match="no attribute 'Foo'"):
        _ = diplugin.Foo
    assert set(diplugin.__all__) <= set(dir(diplugin))
