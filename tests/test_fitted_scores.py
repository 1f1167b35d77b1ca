"""Fitted scores: a file holds what was fitted, and what no network can have is refused when it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diplugin.errors import PlanError
from diplugin.fitted_scores import FittedScores, fit_scores
from diplugin.taps import TapPoint

Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


@pytest.fixture(scope="module")
def fitted() -> FittedScores:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 2))
    return fit_scores(net, [(torch.randn(30, 3, 8, 8), torch.arange(30) % 2)], [TapPoint("2", "in")])


def changed(fitted: FittedScores, path: Path, change: Change) -> Path:
    """The file of these scores after a change of its header or its tensors."""
    fitted.save(path)
    with safe_open(str(path), "pt") as file:
        header = json.loads(file.metadata()["diplugin"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    new = change(header, tensors)
    save_file(tensors, str(path), metadata={"diplugin": new if isinstance(new, str) else json.dumps(header)})
    return path


def test_a_file_holds_what_was_fitted(fitted: FittedScores, tmp_path: Path) -> None:
    loaded = FittedScores.load(changed(fitted, tmp_path / "s", lambda header, tensors: None))
    assert loaded.layers == fitted.layers and loaded.settings == fitted.settings
    for name, energies in fitted.energies.items():
        assert torch.equal(loaded.energies[name], energies)
    point = TapPoint("2", "in")
    assert torch.equal(loaded.points[point].scores, fitted.points[point].scores)


@pytest.mark.parametrize(
    "change",
    [
        lambda header, tensors: "[" * 200_000,
        lambda header, tensors: header.update(schema=2),
        lambda header, tensors: header.update(settings=[]),
        lambda header, tensors: header["settings"].update(refit=True),
        lambda header, tensors: header["settings"].update(rho="large"),
        lambda header, tensors: header["settings"].update(chunk_size=0),
        lambda header, tensors: header["layers"]["2"].update(macs="many"),
        lambda header, tensors: header["layers"]["2"].update(macs=10**400),
        lambda header, tensors: header["layers"]["2"].update(macs=-1.0),
        lambda header, tensors: header["layers"]["2"].update(macs=float("nan")),
        lambda header, tensors: header["layers"]["2"].update(norm="x"),
        lambda header, tensors: header["layers"]["2"].update(in_channels=0),
        lambda header, tensors: header["layers"]["2"].update(out_channels=2.5),
        lambda header, tensors: header["points"][0].update(side="sideways"),
        lambda header, tensors: header["points"][0].update(images=0),
        lambda header, tensors: header["points"].clear(),
        lambda header, tensors: tensors["0"].fill_(float("nan")),
        lambda header, tensors: tensors.update({"0": torch.empty(0)}),
        lambda header, tensors: tensors.update({"0": torch.ones(4, dtype=torch.int64)}),
        lambda header, tensors: tensors.update({"0": torch.ones(2, 2)}),
        lambda header, tensors: tensors.update({"0": torch.ones(4).to(torch.float8_e4m3fn)}),
        lambda header, tensors: tensors.update({"energy:2": torch.ones(3)}),
        lambda header, tensors: tensors.update({"energy:nowhere": torch.ones(4)}),
    ],
)
def test_what_no_network_has_is_refused(fitted: FittedScores, tmp_path: Path, change: Change) -> None:
    with pytest.raises(PlanError, match="expected scores") as caught:
        FittedScores.load(changed(fitted, tmp_path / "s", change))
    assert "\n" not in str(caught.value)
