"""A model pruned through torch-pruning, written and rebuilt, as a plan and as a history."""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import pytest
import torch
import torch_pruning as tp
from diplugin_torch_pruning import DIImportance
from diplugin_torch_pruning_files import HISTORY_FILE, load_history, plan_of, save_history
from torch import nn

import diplugin
from diplugin.errors import ModelError, PlanError, StaleScoresWarning
from diplugin.surgery import WEIGHTS_FILE, save_pruned

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


def test_frozen_layers_come_back_frozen(make_net, make_images, tmp_path) -> None:
    model, inputs = make_net("plain")
    save_history(model, pruned(model, inputs, make_images(60)), tmp_path, inputs)
    fresh, _ = make_net("plain")
    fresh[0].requires_grad_(False)
    before = {name: p.requires_grad for name, p in fresh.named_parameters()}
    load_history(fresh, tmp_path)
    assert {name: p.requires_grad for name, p in fresh.named_parameters()} == before


@pytest.mark.parametrize(
    ("wrong", "text"), [(lambda x: x, "a tuple such as"), (lambda x: {"x": x}, "a tuple such as"),
                        (lambda x: (x, 3), "got int")],
)  # fmt: skip
def test_inputs_that_no_fresh_model_could_be_traced_with(wrong, text, make_net, make_images, tmp_path) -> None:
    """A bare tensor was written as its rows: a folder that nothing could be rebuilt from."""
    model, inputs = make_net("plain")
    with pytest.raises(ModelError, match=text):
        save_history(model, pruned(model, inputs, make_images(60)), tmp_path / "run", wrong(inputs[0]))
    assert not (tmp_path / "run").exists()


def test_iterative_pruning_warns_once(make_net, make_images) -> None:
    model, inputs = make_net("residual")
    with pytest.warns(StaleScoresWarning) as caught:
        pruned(model, inputs, make_images(60), iterative_steps=3)
    assert len(caught) == 1


HOSTILE: dict[str, Any] = {
    "negative": lambda step: step.append(-1), "too large": lambda step: step.append(99),
    "twice": lambda step: step.append(step[0]), "infinite": lambda step: step.append(float("inf")),
    "a half": lambda step: step.append(0.5), "true": lambda step: step.append(True),
    "all": lambda step: step.__setitem__(slice(None), range(8)), "text": lambda step: step.append("0"),
}  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_indices_that_cannot_be_are_refused_and_nothing_is_removed(change, make_net, make_images, tmp_path) -> None:
    model, inputs = make_net("plain")
    save_history(model, pruned(model, inputs, make_images(60)), tmp_path, inputs)
    data = json.loads((tmp_path / HISTORY_FILE).read_text())
    assert len(data["history"]) > 1
    change(data["history"][-1][2])
    (tmp_path / HISTORY_FILE).write_text(json.dumps(data))
    fresh, _ = make_net("plain")
    shapes = [p.shape for p in fresh.parameters()]
    with pytest.raises(PlanError, match="expected") as error:
        load_history(fresh, tmp_path)
    assert "\n" not in str(error.value)
    assert [p.shape for p in fresh.parameters()] == shapes


@pytest.mark.filterwarnings("ignore::diplugin.errors.StaleScoresWarning")
def test_an_index_past_what_earlier_steps_left_is_refused(make_net, make_images, tmp_path) -> None:
    model, inputs = make_net("plain")
    width = model[0].out_channels
    save_history(model, pruned(model, inputs, make_images(60), iterative_steps=2), tmp_path, inputs)
    data = json.loads((tmp_path / HISTORY_FILE).read_text())
    last = next(step for step in reversed(data["history"]) if step[0] == "0")
    last[2][-1] = width - 1
    (tmp_path / HISTORY_FILE).write_text(json.dumps(data))
    with pytest.raises(PlanError, match="removes"):
        load_history(make_net("plain")[0], tmp_path)


@pytest.mark.parametrize("name", [HISTORY_FILE, WEIGHTS_FILE])
def test_a_folder_in_a_files_place(name: str, make_net, make_images, tmp_path) -> None:
    model, inputs = make_net("plain")
    (tmp_path / name).mkdir()
    with pytest.raises(PlanError, match="can be written"):
        save_history(model, pruned(model, inputs, make_images(60)), tmp_path, inputs)


def test_a_history_is_whole_or_not_there(make_net, make_images, tmp_path, monkeypatch) -> None:
    model, inputs = make_net("plain")
    pruner = pruned(model, inputs, make_images(60))
    save_history(model, pruner, tmp_path, inputs)
    before = (tmp_path / HISTORY_FILE).read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(PlanError, match="killed"):
        save_history(model, pruner, tmp_path, (inputs[0].repeat(2, 1, 1, 1),))
    assert (tmp_path / HISTORY_FILE).read_bytes() == before


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
