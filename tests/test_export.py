"""Exported files against the torch model they come from, run in ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from diplugin.accuracy import accuracy
from diplugin.errors import DataError, ModelError, UserError
from diplugin.export import export_onnx
from diplugin.groups import remove_channels
from diplugin.onnx_inference import OnnxNetwork, onnx_accuracy, run_onnx


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    with torch.no_grad():  # batch statistics that are not the identity
        net(torch.randn(32, 3, 8, 8))
    return net


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    net = remove_channels(small_net().eval(), (images(1),), {"0": [1, 5], "3": [0]})
    path = tmp_path_factory.mktemp("export") / "net.onnx"
    check = export_onnx(net, (images(1),), path)
    assert check.path == path
    assert check.dynamic_batch
    assert check.size_mb == path.stat().st_size / 1e6
    assert check.max_abs_difference < 1e-4 * check.max_abs_output
    return net, path


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_pruned_net_gives_the_same_outputs_at_any_batch(exported: tuple[nn.Module, Path], batch: int) -> None:
    net, path = exported
    x = images(batch)
    (got,) = run_onnx(path, [x])
    with torch.no_grad():
        np.testing.assert_allclose(got, net(x).numpy(), rtol=1e-4, atol=1e-5)


def test_the_file_is_whole_folded_and_tells_nothing_of_this_machine(exported: tuple[nn.Module, Path]) -> None:
    _, path = exported
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    model = onnx.load(path, load_external_data=False)
    assert all(i.data_location == onnx.TensorProto.DEFAULT for i in model.graph.initializer)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", 3, 8, 8]
    content = path.read_bytes()
    assert b"test_export" not in content and b"site-packages" not in content


def test_modes_weights_and_gradients_are_left_as_they_were(tmp_path: Path) -> None:
    net = small_net().train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    export_onnx(net, (images(1),), tmp_path / "net.onnx", dynamic_batch=False)
    assert [m.training for m in net] == [i != 1 for i in range(len(net))]
    assert not net[0].weight.requires_grad and net[3].weight.requires_grad
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


class Several(nn.Module):
    """Two inputs, a dictionary with a tuple in it as output."""

    def forward(self, left: Tensor, right: Tensor) -> dict[str, object]:
        return {"sum": left + right, "parts": (left * 2, right.flatten(1))}


def test_several_inputs_and_nested_outputs_keep_their_order(tmp_path: Path) -> None:
    left, right = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    check = export_onnx(Several(), (left, right), tmp_path / "s.onnx")
    assert check.dynamic_batch
    total, twice, flat = run_onnx(check.path, [left, right])
    np.testing.assert_allclose(total, (left + right).numpy())
    np.testing.assert_allclose(twice, (left * 2).numpy())
    assert flat.shape == (1, 6)


class TiedToOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.view(1, -1))


def test_a_model_tied_to_its_batch_is_exported_for_that_batch(tmp_path: Path) -> None:
    net = TiedToOne()
    check = export_onnx(net, (images(1),), tmp_path / "one.onnx")
    assert not check.dynamic_batch
    x = images(5)
    with torch.no_grad():
        labels = torch.cat([net(row[None]) for row in x]).argmax(1)
    assert onnx_accuracy(check.path, [(x[:3], labels[:3]), (x[3:], 1 - labels[3:])]) == pytest.approx(3 / 5)


def test_accuracy_in_onnx_runtime_is_the_torch_models(exported: tuple[nn.Module, Path]) -> None:
    net, path = exported
    x, ids = images(40), torch.arange(40) % 4
    several = (torch.rand(40, 4, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    for labels in (ids, nn.functional.one_hot(ids, 4).float(), several):
        batches = [(x[:17], labels[:17]), (x[17:], labels[17:])]
        assert onnx_accuracy(path, batches) == pytest.approx(accuracy(net, batches))
    named = [{"image": x, "kind": ids}]
    by_form = {"get_labels": lambda batch: batch["kind"], "forward": lambda model, batch: model(batch["image"])}
    assert onnx_accuracy(path, named, **by_form) == pytest.approx(accuracy(net, named, **by_form))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.mean() > 0 else x


def test_a_forward_that_depends_on_values_is_refused_in_one_quiet_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "b.onnx"
    target.write_bytes(b"older")
    with pytest.raises(ModelError, match="branches on") as caught:
        export_onnx(Branches(), (images(1),), target)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert target.read_bytes() == b"older" and list(tmp_path.iterdir()) == [target]


def test_an_export_that_disagrees_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diplugin.export as module

    cleaned = module._cleaned

    def damaged(proto: onnx.ModelProto) -> onnx.ModelProto:
        weight = next(i for i in proto.graph.initializer if len(i.dims) == 4)
        weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * np.float32(1.5)).tobytes()
        return cleaned(proto)

    monkeypatch.setattr(module, "_cleaned", damaged)
    with pytest.raises(ModelError, match="differ by"):
        export_onnx(small_net(), (images(1),), tmp_path / "net.onnx", dynamic_batch=False)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_named_in_one_line(exported: tuple[nn.Module, Path], tmp_path: Path) -> None:
    _, path = exported
    (tmp_path / "not.onnx").write_bytes(b"no model")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match="expected an ONNX model at"):
        run_onnx(tmp_path / "not.onnx", [images(1)])
    with pytest.raises(ModelError, match="1 inputs"):
        run_onnx(path, [images(1), images(1)])
    with pytest.raises(ModelError, match="inputs that fit"):
        run_onnx(path, [torch.randn(1, 4, 8, 8)])
    with pytest.raises(DataError, match="an empty one"):
        onnx_accuracy(path, [])
    with pytest.raises(ModelError, match="tuple of tensors"):
        export_onnx(small_net(), ("x",), tmp_path / "x.onnx")
    with pytest.raises(ModelError, match="got a Tensor"):
        export_onnx(small_net(), images(1), tmp_path / "x.onnx")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="runs on inputs"):
        export_onnx(small_net(), (torch.randn(1, 5, 8, 8),), tmp_path / "x.onnx")
    with pytest.raises(ModelError, match="bfloat16"):
        export_onnx(nn.ReLU(), (torch.ones(1, 2, dtype=torch.bfloat16),), tmp_path / "x.onnx")
    with pytest.raises(ModelError, match="by the names input"):
        OnnxNetwork(path)(image=images(1))
    with pytest.raises(ModelError, match="NaN"):
        export_onnx(nn.ReLU(), (torch.full((1, 2), float("nan")),), tmp_path / "x.onnx")
    with pytest.raises(UserError, match="can be written"):
        export_onnx(nn.ReLU(), (torch.ones(1, 2),), tmp_path / "file" / "x.onnx", dynamic_batch=False)


def test_importing_the_module_imports_no_runtime() -> None:
    code = "import sys, diplugin.export; print([m for m in ('onnx', 'onnxruntime', 'onnxscript') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
