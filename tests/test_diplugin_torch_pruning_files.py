"""A model pruned through torch-pruning, written and rebuilt, as a plan and as a history."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch_pruning as tp
from diplugin_torch_pruning import DIImportance
from diplugin_torch_pruning_files import HISTORY_FILE, load_history, plan_of, save_history
from torch import nn

import diplugin
from diplugin.errors import PlanError, StaleScoresWarning
from diplugin.surgery import save_pruned

KINDS = ["plain", "residual", "vgg", "depthwise", "dense", "grouped", "transposed", "tokens", "twice"]


def pruned(model: nn.Module, inputs: tuple[Any, ...], images, **options: Any) -> Any:
    importance = DIImportance().fit(model, images.loader(30))
    last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    fresh: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}, "channel_groups": {}}
    arguments = {"pruning_ratio": 0.4, "ignored_layers": [last], **fresh, **options}
    pruner = tp.pruner.BasePruner(model, inputs, importance, **arguments)
    for _ in range(options.get("iterative_steps", 1)):
        pruner.step()
    return pruner


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::diplugin.errors.StaleScoresWarning", "ignore:Unwrapped parameters")
def test_a_fresh_model_takes_the_plan_and_the_weights(kind: str, make_net, make_images, tmp_path) -> None:
    model, inputs = make_net(kind)
    unpruned = copy.deepcopy(model)
    pruner = pruned(model, inputs, make_images(60), iterative_steps=2, global_pruning=kind == "dense")
    plan = plan_of(pruner, unpruned, inputs)
    assert any(len(plan.kept[name]) < plan.channels[name] for name in plan.kept)
    save_pruned(model, plan, tmp_path)
    again = diplugin.load_pruned(make_net(kind)[0], tmp_path)
    torch.testing.assert_close(again(*inputs), model(*inputs))


@pytest.mark.parametrize("kind", ["residual", "dense", "multi_output"])
def test_a_fresh_model_takes_the_history(kind: str, make_net, make_images, tmp_path) -> None:
    model, inputs = make_net(kind)
    pruner = pruned(model, inputs, make_images(60))
    save_history(model, pruner, tmp_path, inputs)
    again = load_history(make_net(kind)[0], tmp_path)
    torch.testing.assert_close(again(*inputs), model(*inputs))


def test_iterative_pruning_warns_once(make_net, make_images) -> None:
    model, inputs = make_net("residual")
    with pytest.warns(StaleScoresWarning) as caught:
        pruned(model, inputs, make_images(60), iterative_steps=3)
    assert len(caught) == 1


def test_broken_files_and_other_models(make_net, make_images, tmp_path) -> None:
    model, inputs = make_net("residual")
    pruner = pruned(model, inputs, make_images(60))
    save_history(model, pruner, tmp_path, inputs)
    with pytest.raises(PlanError, match="has no layer"):
        load_history(make_net("plain")[0], tmp_path)
    with pytest.raises(PlanError, match="history of this network"):
        plan_of(pruner, make_net("plain")[0], inputs)
    whole = (tmp_path / HISTORY_FILE).read_text()
    for text in ("", "[]", json.dumps({**json.loads(whole), "schema": 9}), whole.replace("history", "story"), "nul"):
        (tmp_path / HISTORY_FILE).write_text(text)
        with pytest.raises(PlanError, match="expected a"):
            load_history(make_net("residual")[0], tmp_path)
    with pytest.raises(PlanError, match="history"):
        load_history(make_net("residual")[0], tmp_path / "nowhere")
