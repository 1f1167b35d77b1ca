"""`diplugin quantize` on a real run folder, and what it says to bad input."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from diplugin import Budget, compress
from diplugin.cli import main
from diplugin.onnx_inference import onnx_accuracy, run_onnx
from diplugin.quantize import Bits, read_bits

SOURCE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2),
                         nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))


def data():
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(120) % 4
    x = torch.randn(120, 3, 8, 8, generator=generator) + y.view(-1, 1, 1, 1)
    return DataLoader(TensorDataset(x, y), batch_size=40)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, brief_timing):
    (tmp_path / "tiny_for_bits.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import tiny_for_bits

    loader = tiny_for_bits.data()
    compress(tiny_for_bits.net().eval(), loader, example_inputs=(next(iter(loader))[0][:1],),
             budgets=[Budget("macs", fraction=0.8)], images=100, out=tmp_path / "run")  # fmt: skip
    return tmp_path / "run"


def test_a_run_gets_its_quantized_file_and_figures(run, capsys):
    import tiny_for_bits

    command = ["quantize", str(run), "tiny_for_bits:data", "--model", "tiny_for_bits:net", "--images", "100"]
    code = main([*command, "--budget", "size_mb=0.95"])
    assert code == 0, capsys.readouterr().err
    assert "bits a weight" in capsys.readouterr().out
    figures = json.loads((run / "metrics.json").read_text())["quantized"]
    size = (run / "quantized.onnx").stat().st_size / 1e6
    assert figures["size_mb"] == pytest.approx(size) and size <= 0.95 * figures["size_mb_uniform8"] * 1.02
    assert figures["relative_difference"] <= 1e-3
    allocation, rest = read_bits(run)
    assert rest["size_mb"] == figures["size_mb"]
    assert set(allocation.bits) == {"0", "3", "8"}
    assert 0 <= onnx_accuracy(run / "quantized.onnx", tiny_for_bits.data()) <= 1
    assert "Bits" in (run / "report.html").read_text()

    assert main([*command, "--budget", "size_mb=1KB"]) == 3
    assert "smallest reachable" in capsys.readouterr().err
    assert main([*command, "--budget", "macs=0.5"]) == 2
    assert "size_mb or bops" in capsys.readouterr().err
    assert read_bits(run)[0] == allocation


DAMAGE = {
    "metrics.json": [lambda m: m.clear(), lambda m: m.update(recovered=[1]), lambda m: m.pop("pruned"),
                     lambda m: m.update(seed=float("nan")), lambda m: m.update(budgets=["x"])],
    "config.json": [lambda c: c.update(holdout="x"), lambda c: c.update(holdout=2.0), lambda c: c.update(seed="x"),
                    lambda c: c.update(seed=10**30)],
    "plan.json": [lambda p: p.clear()],
}  # fmt: skip


def test_a_run_that_cannot_take_the_figures_is_left_as_it_was(run, capsys, monkeypatch):
    def never(*_, **__):
        pytest.fail("the run was not checked first")

    monkeypatch.setattr("diplugin.quantize.quantize_run", never)
    command = ["quantize", str(run), "tiny_for_bits:data", "--model", "tiny_for_bits:net", "--budget", "size_mb=0.95"]
    for name, changes in DAMAGE.items():
        whole = (run / name).read_text()
        for change in changes:
            data = json.loads(whole)
            change(data)
            (run / name).write_text(json.dumps(data))
            before = {path: path.read_bytes() for path in run.iterdir()}
            assert main(command) == 2, data
            said = capsys.readouterr().err.splitlines()
            assert len(said) == 1 and said[0].startswith("diplugin: expected"), said
            assert {path: path.read_bytes() for path in run.iterdir()} == before
        (run / name).write_text(whole)


def test_figures_go_beside_those_of_the_network_that_was_quantized(run, monkeypatch):
    figures = {"size_mb": 0.1, "mean_bits": 8.0, "size_mb_uniform8": 0.1, "accuracy": 0.5, "kept_float": {}}
    monkeypatch.setattr("diplugin.quantize.quantize_run", lambda *_, **__: (None, figures))
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"recovered": None}))
    command = ["quantize", str(run), "tiny_for_bits:data", "--model", "tiny_for_bits:net", "--budget", "size_mb=0.95"]
    assert main(command) == 0
    quantized = json.loads((run / "metrics.json").read_text())["quantized"]
    assert quantized["macs"] == metrics["pruned"]["macs"] and quantized["size_mb"] == 0.1


def test_a_folder_that_holds_no_run(tmp_path, capsys):
    command = ["quantize", str(tmp_path), "digits", "--model", "nowhere:net", "--budget", "size_mb=0.5"]
    assert main(command) == 2
    assert "plan.json" in capsys.readouterr().err


def test_compress_takes_bits_for_batches_of_any_form(brief_timing, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4))  # fmt: skip
    x, y = torch.randn(80, 3, 8, 8), torch.arange(80) % 4
    batches = [{"image": x[i : i + 20], "name": torch.arange(20), "kind": y[i : i + 20]} for i in range(0, 80, 20)]
    result = compress(net, batches, example_inputs=(x[:1],), budgets=[Budget("macs", fraction=0.8)], images=60,
                      bits=Bits(images=60), get_labels=lambda batch: batch["kind"], out=tmp_path / "run",
                      forward=lambda model, batch: model(batch["image"]), test_loader=batches)  # fmt: skip
    logits = torch.from_numpy(run_onnx(tmp_path / "run" / "quantized.onnx", [x])[0])
    assert result.metrics["quantized"]["accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
