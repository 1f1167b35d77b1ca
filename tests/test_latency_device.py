"""What runs on a device, as a whole: files that need each other and little else, in Python 3.8."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from diplugin.latency import device

TREES = {
    path.stem: ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    for path in sorted(Path(device.__file__).parent.glob("*.py"))
}


def test_the_device_files_need_nothing_of_ours_and_little_else() -> None:
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    top = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    top |= {(n.module or "").split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
    assert top - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


def test_the_device_files_import_each_other_one_way() -> None:
    """`from .file import name` alone, which means the same in diplugin and in a bundle."""
    needs: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        inner = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
        assert all(n.level == 1 for n in inner), f"{name} reaches out of the package"
        needs[name] = {n.module or "" for n in inner}
    assert set().union(*needs.values()) <= set(needs)
    assert len(list(TopologicalSorter(needs).static_order())) == len(TREES) >= 10
