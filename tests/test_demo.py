"""The demo: its network, and what it hands to `compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diplugin import demo
from diplugin.costs import macs
from diplugin.demo import Demo, digits_net
from diplugin.network import trace_network
from diplugin.sources import load_data


def test_the_network_is_what_it_says() -> None:
    model, x = digits_net().eval(), torch.zeros(1, 1, 24, 24)
    assert model(x).shape == (1, 10)
    trace = trace_network(model, (x,))
    assert round(macs(trace).base / 1e6) == 90
    assert [group.name for group in trace.groups if not group.prunable] == ["head"]


def test_it_trains_profiles_and_compresses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    handed: dict[str, Any] = {}
    table = type("Table", (), {"entries": (1, 2), "nets": (1,)})()
    monkeypatch.setattr(demo, "profile_here", lambda *_, **__: table)
    monkeypatch.setattr(demo, "train", lambda model, loader, settings, **_: handed.update(training=settings) or model)
    monkeypatch.setattr(demo, "compress", lambda *args, **kwargs: handed.update(kwargs, model=args[0], data=args[1]))
    told: list[str] = []
    Demo(epochs=3, recovery_epochs=2, macs=0.7).run(tmp_path / "run", told.append)
    assert handed["training"].epochs == 3 and handed["recovery"].epochs == 2
    assert [(b.cost, b.fraction) for b in handed["budgets"]] == [("macs", 0.7), ("latency_ms", 0.6)]
    assert handed["latency_table"] is table and handed["out"] == tmp_path / "run"
    assert handed["source"] == {"source": "diplugin.demo:digits_net", "data": "digits"}
    assert not handed["model"].training
    source = load_data("digits", batch_size=64)
    assert source.test is not None
    for given, expected in ((handed["data"], source.train), (handed["test_loader"], source.test)):
        assert sum(len(y) for _, y in given) == sum(len(y) for _, y in expected)
    assert "profiled: 2 operators, 1 whole nets" in told
