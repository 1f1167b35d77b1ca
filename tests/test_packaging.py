"""What gets installed: our modules and tables, and no top-level package of a name that others own."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

if sys.version_info >= (3, 11):
    import tomllib

    CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
else:  # pragma: no cover
    pytest.skip("tomllib came with Python 3.11", allow_module_level=True)

SETUPTOOLS = CONFIG["tool"]["setuptools"]
TABLES = "diplugin.latency_tables"


def packages_in_tree() -> set[str]:
    folders = {p.parent for p in (ROOT / "diplugin").rglob("*.py")}
    return {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {TABLES}


def test_the_packages_listed_are_those_of_the_tree() -> None:
    assert set(SETUPTOOLS["packages"]) == packages_in_tree()
    assert len(SETUPTOOLS["packages"]) == len(set(SETUPTOOLS["packages"]))


def test_every_package_can_be_imported_as_one() -> None:
    folders = [ROOT.joinpath(*name.split(".")) for name in SETUPTOOLS["packages"] if name != TABLES]
    assert all((folder / "__init__.py").is_file() for folder in [*folders, ROOT / "latency_tables"])


def test_the_adapters_listed_are_those_of_the_tree() -> None:
    assert set(SETUPTOOLS["py-modules"]) == {p.stem for p in (ROOT / "adapters").glob("*.py")}
    assert {"diplugin_torch_pruning", "diplugin_nni"} <= set(SETUPTOOLS["py-modules"])
    assert all(name.startswith("diplugin_") for name in SETUPTOOLS["py-modules"])
    assert not (ROOT / "adapters" / "__init__.py").exists()


def test_other_files_are_package_data() -> None:
    """Whatever a package holds besides Python files is named in package-data."""
    data = SETUPTOOLS["package-data"]
    for path in (ROOT / "diplugin").rglob("*"):
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts:
            package = ".".join(path.relative_to(ROOT).parts[:-1])
            assert any(path.match(pattern) for pattern in data.get(package, [])), (
                f"{path.relative_to(ROOT)} is left behind"
            )


def test_the_version_is_said_once_more_in_the_package() -> None:
    import diplugin

    assert diplugin.__version__ == CONFIG["project"]["version"]


def test_tests_need_no_package_of_tests() -> None:
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()


def test_every_import_is_a_declared_dependency() -> None:
    """Top-level names that diplugin imports anywhere are its dependencies or extras."""
    import ast

    distribution_of = {"sklearn": "scikit-learn", "torch_pruning": "torch-pruning"}
    brought_along = {"PIL": "matplotlib", "markupsafe": "jinja2"}  # requirements of those
    project = CONFIG["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    declared = {re.split(r"[\s\[<>=!;~]", d, maxsplit=1)[0].lower()
                for d in wanted}  # fmt: skip
    own = {"diplugin", *SETUPTOOLS["py-modules"]}
    distribution_of |= brought_along
    unknown = set()
    for path in [*(ROOT / "diplugin").rglob("*.py"), *(ROOT / "adapters").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for name in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - own:
                if distribution_of.get(name, name).lower() not in declared:
                    unknown.add((name, str(path.relative_to(ROOT))))
    assert not unknown


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: building leaves folders behind."""
    import shutil

    source, out = tmp_path_factory.mktemp("source") / "project", tmp_path_factory.mktemp("wheel")
    wanted = ["pyproject.toml", "LICENSE", "README.md", "diplugin", "adapters", "latency_tables"]
    source.mkdir()
    for name in wanted:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-w",
        str(out),
    ]
    subprocess.run([*command, str(source)], check=True, capture_output=True, text=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_tree(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "diplugin").rglob("*")
               if p.is_file() and "__pycache__" not in p.parts}  # fmt: skip
    assert sources <= names
    assert {p.name for p in (ROOT / "adapters").glob("*.py")} <= names
    tables = {
        f"diplugin/latency_tables/{p.name}"
        for p in (ROOT / "latency_tables").glob("*")
        if p.suffix in {".json", ".py", ".md"}
    }
    assert tables <= names
    top = {name.split("/")[0] for name in names}
    extra = {name for name in top if not name.startswith("diplugin")}
    assert not extra, "nothing but diplugin, its two adapters and their metadata"
    assert not any(name.startswith(("tests", "benchmarks", "examples", "adapters")) for name in names)


@pytest.mark.slow
def test_an_installed_wheel_works_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "-q",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    code = (
        "import sys, diplugin, importlib.metadata as m, importlib.resources as r, pathlib;"
        "home = pathlib.Path(diplugin.__file__).resolve();"
        "assert home.is_relative_to(pathlib.Path(sys.argv[1]).resolve()), home;"
        "import diplugin.latency_tables, diplugin_torch_pruning;"
        "assert diplugin.DIImportance is diplugin_torch_pruning.DIImportance;"
        "assert (r.files('diplugin') / 'py.typed').is_file();"
        "d = m.distribution('diplugin');"
        "points = {(e.group, e.name): e.value for e in d.entry_points};"
        "assert points['console_scripts', 'diplugin'] == 'diplugin.cli:main', points;"
        "assert {n for g, n in points if g == 'diplugin.adapters'} == {'torch_pruning', 'nni'};"
        "print(d.version)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(target)], cwd=elsewhere, capture_output=True, text=True,
        env={"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == CONFIG["project"]["version"]
    assert {p.name for p in target.iterdir() if not p.name.startswith("diplugin")} <= {"bin", "__pycache__"}
