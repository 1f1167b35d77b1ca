"""The exception tree: what is caught as what, and which exit code it brings."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from diplugin import errors

TREE = {
    name: item for name, item in vars(errors).items()
    if isinstance(item, type) and issubclass(item, errors.DipluginError)
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TREE))
def test_exit_code_says_whose_fault_it_is(name: str) -> None:
    expected = 2 if issubclass(TREE[name], errors.UserError) else 3 if name == "InfeasibleBudget" else 1
    assert TREE[name].exit_code == expected


def test_an_infeasible_budget_is_no_user_error() -> None:
    assert not issubclass(errors.InfeasibleBudget, errors.UserError)


def test_a_missing_extra_is_an_import_error_too() -> None:
    assert issubclass(errors.MissingExtraError, ImportError)
    assert issubclass(errors.MissingExtraError, errors.UserError)


def test_the_drawing_shows_the_tree() -> None:
    """The module's docstring draws every exception, indented below its parent."""
    drawing = [line for line in (errors.__doc__ or "").splitlines() if "──" in line or line.strip() == "DipluginError"]
    depth = {line.split("──")[-1].split()[0]: line.index(line.split("──")[-1].strip()[:1]) for line in drawing}
    drawn = {line.split("──")[-1].split()[0] for line in drawing}
    assert drawn == set(TREE)
    for name, item in TREE.items():
        parents = [base.__name__ for base in item.__bases__ if base.__name__ in TREE]
        assert all(depth[parent] < depth[name] for parent in parents)


def test_warnings_are_user_warnings() -> None:
    named = [item for name, item in vars(errors).items() if name.endswith("Warning") and isinstance(item, type)]
    assert named
    assert all(issubclass(item, UserWarning) for item in named)


def test_every_error_says_when_it_is_raised() -> None:
    assert all(inspect.getdoc(item) for item in TREE.values())


def test_the_library_raises_only_errors_of_the_tree() -> None:
    """`raise X(...)` in diplugin names an exception of the tree, or one that Python's own protocols ask for."""
    protocol = {"AttributeError", "NotImplementedError", "StopIteration", "SystemExit", "TypeError", "ValueError",
                "KeyboardInterrupt", "ArgumentTypeError"}  # fmt: skip
    package = Path(errors.__file__).parent
    odd = []
    for path in sorted(package.rglob("*.py")):
        if path.parent.name == "device":  # runs on devices without us and has errors of its own
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                name = node.exc.func.id
                if name[0].isupper() and name not in TREE and name not in protocol:
                    odd.append(f"{path.relative_to(package)}:{node.lineno} raises {name}")
    assert not odd
