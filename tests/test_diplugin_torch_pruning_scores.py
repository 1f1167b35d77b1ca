"""Fitted scores written, read again, and files that hold none."""

from __future__ import annotations

import copy
import os
import stat
import threading

import pytest
import torch
from diplugin_torch_pruning import DIImportance
from small_residual import data, group_of, make

from diplugin.errors import PlanError, StaleScoresWarning


def test_save_and_load(tmp_path):
    model = make()
    importance = DIImportance(rho=3.0).fit(model, [data()])
    importance.save(tmp_path / "scores.safetensors")
    loaded = DIImportance.load(tmp_path / "scores.safetensors")
    for name in ("stem", "conv1"):
        group = group_of(copy.deepcopy(model), name)
        torch.testing.assert_close(loaded(group), importance(group))
    with torch.no_grad():
        model.conv1.weight.mul_(1.5)
    with pytest.warns(StaleScoresWarning, match="weights have changed"):
        loaded(group_of(model, "conv1"))


def test_saving_into_a_pipe_leaves_it_one(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    importance = DIImportance().fit(make(), [data()])
    importance.save(pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    reader.join(30)
    (tmp_path / "copy").write_bytes(got[0])
    assert DIImportance.load(tmp_path / "copy").fitted.layers == importance.fitted.layers


def test_saving_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    importance = DIImportance().fit(make(), [data()])
    for path in (tmp_path, tmp_path / "file" / "scores"):
        with pytest.raises(PlanError, match="can be written"):
            importance.save(path)


def test_loading_something_else(tmp_path):
    (tmp_path / "broken").write_bytes(b"not a file of scores")
    for path in (tmp_path / "broken", tmp_path / "none"):
        with pytest.raises(PlanError, match="expected scores saved by diplugin"):
            DIImportance.load(path)
