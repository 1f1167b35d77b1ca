"""The command line: every slip ends in one line, the right exit code, and an untouched folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diplugin.cli import main

# Runs end before anything is exported, but for the last test: what torch warns of on the way is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
        )

class Pair(Net):
    def forward(self, x):
        return super().forward(x), x

class Nothing(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :4]

class Nan(Net):
    def __init__(self):
        super().__init__()
        self[0].weight.data[0] = float("nan")

def data(count=60, labels=None, images=None, batch=20):
    torch.manual_seed(0)
    x = torch.randn(count, 3, 8, 8) if images is None else images
    y = torch.arange(count) % 4 if labels is None else labels
    return DataLoader(TensorDataset(x, y), batch_size=batch)

def one_class(): return data(labels=torch.zeros(60).long())
def out_of_range(): return data(labels=torch.arange(60) % 9)
def negative(): return data(labels=torch.arange(60) % 4 - 1)
def real_ids(): return data(labels=torch.rand(60))
def nan_images(): return data(images=torch.full((60, 3, 8, 8), float("nan")))
def few(): return data(count=2)
def single(): return data(count=1, batch=1)
def unlabelled(): return DataLoader(TensorDataset(torch.randn(60, 3, 8, 8)), batch_size=20)
def other_channels(): return data(images=torch.randn(60, 5, 8, 8))
def empty(): return DataLoader([], batch_size=4)
def broken(): raise OSError("no such disk")
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"cli_code_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.fixture
def refused(
    code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Runs `compress` with one thing wrong; gives back the message once code, form and folder are checked."""

    # None of these runs gets as far as a result: exporting the unpruned network would be most of their time.

    def run(*, exit_code: int = 2, **changes: str) -> str:
        options = {"model": f"{code}:Net", "data": f"{code}:data", "example-shape": "1,3,8,8", "budget": "macs=0.5",
                   "out": str(tmp_path / "run"), "epochs": "0", **changes}  # fmt: skip
        options = {k: v.replace("CODE", code) for k, v in options.items()}
        argv = ["compress", options.pop("model"), options.pop("data")]
        argv += [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
        before = snapshot(tmp_path)
        assert main(argv) == exit_code
        said = [line for line in capsys.readouterr().err.splitlines() if "note:" not in line]
        assert len(said) == 1, said
        assert said[0].startswith("diplugin: ")
        assert snapshot(tmp_path) == before, "nothing is written, nothing is left behind"
        return said[0]

    return run


def snapshot(folder: Path) -> dict[str, bytes | None]:
    found = [p for p in sorted(folder.rglob("*")) if "__pycache__" not in p.parts]
    return {str(p): p.read_bytes() if p.is_file() else None for p in found}


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ("macs=0", "above 0"), ("macs=1.5", "without a unit"), ("macs=-0.5", "above 0"), ("macs=60X", "unit 'x'"),
        ("speed=0.5", "macs"), ("latency_ms=12", "without a unit"), ("latency_ms=3ms", "latency table"),
        ("macs", "macs=0.5"),
    ],
)  # fmt: skip
def test_budgets(refused: Callable[..., str], budget: str, text: str) -> None:
    assert text in refused(budget=budget)


def test_an_infeasible_budget_is_exit_code_3(refused: Callable[..., str]) -> None:
    text = refused(budget="macs=0.001", exit_code=3)
    assert "cheapest one found has macs" in text
    assert "relax the budget" in text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("CODE:one_class", "labels that differ"), ("CODE:out_of_range", "class ids from 0 to 3"),
        ("CODE:negative", "class ids"), ("CODE:real_ids", "integers"), ("CODE:nan_images", "NaN"),
        ("CODE:few", "four images"), ("CODE:single", "four images"), ("CODE:unlabelled", "(inputs, labels)"),
        ("CODE:other_channels", "expected"), ("CODE:empty", "expected"), ("CODE:broken", "no such disk"),
        ("CODE:nope", "callable"), ("no_such_module:data", "no_such_module"), ("cifar10:/no/such", "/no/such"),
        ("mnist", "digits"),
    ],
)  # fmt: skip
def test_data(refused: Callable[..., str], data: str, text: str) -> None:
    assert text in refused(data=data)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("CODE:Pair", "one tensor of logits"), ("CODE:Nothing", "channels that can be removed"), ("CODE:Nan", "NaN"),
        ("CODE:nope", "callable"), ("CODE:broken", "no such disk"), ("CODE:data", "torch.nn.Module"),
        ("resnet18", "package"),
    ],
)  # fmt: skip
def test_models(refused: Callable[..., str], model: str, text: str) -> None:
    assert text in refused(model=model)


@pytest.mark.parametrize(
    "shape",
    ["", "3", "1,3,x,8", "1,3,0,8", "1,-3,8,8", "1,4,8,8", "1,3,999999999,999999999", "1,3,8," + "9" * 30, "8,8"],
)
def test_example_shapes(refused: Callable[..., str], shape: str) -> None:
    assert "expected" in refused(example_shape=shape)


@pytest.mark.parametrize(
    "option",
    [{"epochs": "-1"}, *({"epochs": "2", "lr": lr} for lr in ("0", "nan", "inf")), {"rho": "0"}, {"rho": "nan"},
     {"floor": "1.5"}, {"floor": "nan"}, {"images": "1"}, {"bits": "size_mb=0"}, {"bits": "speed=1"},
     {"weights": "none.safetensors"}, {"table": "none.json"}, {"steps": "2"}, {"rounds": "2"},
     {"strategy": "measured-cuts", "steps": "2"}, {"strategy": "structure-distillation", "rounds": "2"},
     {"strategy": "structure-distillation", "step-epochs": "-1"}],
    ids=str,
)  # fmt: skip
def test_settings(refused: Callable[..., str], option: dict[str, str]) -> None:
    assert "expected" in refused(**option) or option.get("rho") is not None


def test_weights_that_do_not_fit(refused: Callable[..., str], tmp_path: Path) -> None:
    save_file({"0.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-4])
    assert "w.safetensors" in refused(weights=str(tmp_path / "w.safetensors"))
    assert "cut.safetensors" in refused(weights=str(tmp_path / "cut.safetensors"))


def test_a_folder_that_is_not_empty(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("keep me")
    assert "precious.txt" in refused()
    (tmp_path / "file").write_text("a file")
    assert "there is a file" in refused(out=str(tmp_path / "file"))
    assert "can be made" in refused(out=str(tmp_path / "file" / "below"))


def test_resuming_what_is_no_run(tmp_path: Path, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("keep me")
    before = snapshot(tmp_path)
    argv = ["compress", f"{code}:Net", f"{code}:data", "--example-shape=1,3,8,8", "--budget=macs=0.5", "--resume",
            f"--out={tmp_path / 'run'}"]  # fmt: skip
    assert main(argv) == 2
    assert "expected a run to resume" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "argv",
    [["report", "no/such/run"], ["export", "no/such/run", "--out", "x.onnx"], ["measure", "no/such/run"],
     ["tables", "show", "none.json"], ["tables", "check", "none.json"]],
    ids=" ".join,
)  # fmt: skip
def test_other_commands_on_what_is_not_there(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("diplugin: expected")
    assert snapshot(tmp_path) == {}


def test_a_run_folder_that_is_torn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for text in ("", "{", "[]", "{}", '{"base": 3}', '{"base": {"accuracy": "high"}}', "\x00"):
        for name in ("metrics.json", "plan.json", "config.json"):
            (run / name).write_text(text)
        for command in (["report", str(run)], ["export", str(run), "--out", str(tmp_path / "x.onnx")]):
            assert main(command) == 2, (command, text)
            said = capsys.readouterr().err.splitlines()
            assert len(said) == 1, said
    assert not (tmp_path / "x.onnx").exists()


def test_structure_distillation(
    code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], not_exported: None
) -> None:
    argv = ["compress", f"{code}:Net", f"{code}:data", "--example-shape=1,3,8,8", "--budget=macs=0.6", "--epochs=1",
            "--search=exact", "--strategy=structure-distillation", "--steps=2",
            f"--out={tmp_path / 'run'}"]  # fmt: skip
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "step 2 of 2: macs" in said and "after the lesson" in said
    assert "Step by step" in (tmp_path / "run" / "report.html").read_text()


def test_measured_cuts(code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], not_exported: None) -> None:
    argv = ["compress", f"{code}:Net", f"{code}:data", "--example-shape=1,3,8,8", "--budget=macs=0.6", "--epochs=0",
            "--strategy=measured-cuts", "--rounds=1", f"--out={tmp_path / 'run'}"]  # fmt: skip
    assert main(argv) == 0
    assert "structures measured, round 1 of 1: loss" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["strategy"]["kind"] == "MeasuredCuts" and config["strategy"]["rounds"] == 1


@pytest.mark.parametrize(
    "argv",
    [["score", "CODE:Net", "CODE:data", "--example-shape=1,3,8,8", "--json=taken"],
     ["compare", "CODE:Net", "CODE:data", "--example-shape=1,3,8,8", "--only=random", "--json=taken"],
     ["tables", "estimate", "--device=raspberry-pi-4", "--model=CODE:Net", "--example-shape=1,3,8,8", "--points=1",
      "--out=taken"]],
    ids=["score", "compare", "estimate"],
)  # fmt: skip
def test_a_file_that_cannot_be_written_is_one_line(
    argv: list[str], code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    assert main([word.replace("CODE", code) for word in argv]) == 2
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if "note:" not in line]
    assert len(said) == 1 and said[0].startswith("diplugin: expected") and "taken" in said[0]
    assert argv[0] == "tables" or not out, "asked before the work, not after it"


def test_score_prints_every_group(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", f"{code}:Net", f"{code}:data", "--example-shape=1,3,8,8"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if "channels" in line}
    assert set(lines) == {"0", "3", "7"}
    assert "left alone: its channels are an output" in lines["7"]
    assert all(np.isfinite(float(lines[n].split("DI ")[1].split()[0])) for n in ("0", "3"))
