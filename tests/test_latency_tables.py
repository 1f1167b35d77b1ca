"""The tables that come with the package: sound, labelled, and covering what they say they cover."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diplugin.costs.latency import LatencyCost
from diplugin.latency.quality import findings
from diplugin.network import trace_network
from diplugin.tables import LatencyTable
from diplugin.tables.file_format import shipped_folder, shipped_tables

NAMES = shipped_tables()


def test_the_tables_folder_documents_itself() -> None:
    readme = Path(__file__).resolve().parents[1] / "latency_tables" / "README.md"
    assert "schema 1" in readme.read_text()
    assert shipped_folder().is_dir()


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_table_loads_is_sound_and_tells_where_it_is_from(name: str) -> None:
    table = LatencyTable.load(name)
    assert table.name == name and table.origin == "measured" and not table.emulated
    assert table.calibration is not None and not [f.text for f in findings(table) if f.fatal]
    assert {"device", "kernel", "runtime_version", "date"} <= set(table.provenance)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(("resnet20", "resnet56"))])
def test_a_shipped_table_of_a_cifar_net_predicts_it(name: str) -> None:
    from examples import cifar_resnet

    model = getattr(cifar_resnet, name.rpartition("-")[2])().eval()
    trace = trace_network(model, (torch.zeros(1, 3, 32, 32),))
    cost = LatencyCost(trace, LatencyTable.load(name))
    narrow = {g: (cost.allowed_widths(g) or (w,))[0] for g, w in trace.base_widths.items()}
    assert 0 < cost.cost(narrow) < cost.base
