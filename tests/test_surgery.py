"""Surgery: what is left computes what the masked network computed, and comes back from its folder."""

from __future__ import annotations

import copy
import json
import os
import random
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_plans import masked, random_plan
from safetensors.torch import load, save_file
from tiny_networks import KINDS
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from diplugin.errors import PlanError
from diplugin.network import trace_network
from diplugin.plan import PruningPlan
from diplugin.surgery import (
    PLAN_FILE,
    WEIGHTS_FILE,
    apply_plan,
    load_pruned,
    load_weights,
    read_weights,
    save_pruned,
    save_weights,
)

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]


def assert_same_outputs(one: nn.Module, two: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        outputs = [tree_leaves(model(*inputs)) for model in (one, two)]
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_pruned_equals_masked(make_net: MakeNet, kind: str, seed: int) -> None:
    model, inputs = make_net(kind)
    trace = trace_network(model, inputs)
    plan = random_plan(trace, random.Random(f"{kind}{seed}"))
    twin = masked(model, trace, plan.removed)
    pruned = apply_plan(copy.deepcopy(model), plan)
    assert_same_outputs(pruned, twin, (torch.randn(5, 3, 8, 8),))
    for group in trace.prunable:
        layer: Any = pruned.get_submodule(group.name)
        assert getattr(layer, "out_channels", getattr(layer, "out_features", None)) == plan.widths[group.name]


@pytest.mark.parametrize("kind", KINDS)
def test_cutting_twice_is_cutting_by_both_plans(make_net: MakeNet, kind: str) -> None:
    model, inputs = make_net(kind)
    trace = trace_network(model, inputs)
    first = random_plan(trace, random.Random(kind))
    once = apply_plan(copy.deepcopy(model), first)
    again = trace_network(once, inputs)
    assert again.base_widths == first.widths
    second = random_plan(again, random.Random(7))
    assert_same_outputs(
        apply_plan(copy.deepcopy(model), first.then(second)), apply_plan(once, second), (torch.randn(3, 3, 8, 8),)
    )


def test_surgery_is_in_place_and_trainable(make_net: MakeNet) -> None:
    model, inputs = make_net("residual")
    plan = random_plan(trace_network(model, inputs), random.Random(0))
    model.train()
    assert apply_plan(model, plan) is model
    assert model.training
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_a_frozen_model_can_be_cut_and_stays_frozen(make_net: MakeNet) -> None:
    model, inputs = make_net("plain")
    plan = random_plan(trace_network(model, inputs), random.Random(0))
    model.requires_grad_(False)
    apply_plan(model, plan)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in make_net("plain")[0].parameters())
    assert not any(p.requires_grad for p in model.parameters())


def test_a_plan_that_keeps_all_changes_nothing(make_net: MakeNet, state_of: Any, assert_same_state: Any) -> None:
    model, inputs = make_net("grouped")
    trace = trace_network(model, inputs)
    before = state_of(model)
    apply_plan(
        model, PruningPlan({n: tuple(range(c)) for n, c in trace.base_widths.items()}, trace.base_widths), inputs
    )
    assert_same_state(model, before)


# --- a plan that does not fit ---


def plan_for(make_net: MakeNet, kind: str, **changes: Any) -> PruningPlan:
    trace = trace_network(*make_net(kind))
    plan = PruningPlan({n: tuple(range(c)) for n, c in trace.base_widths.items()}, trace.base_widths, {}, trace.inputs)
    fields = {"kept": dict(plan.kept), "channels": dict(plan.channels), "costs": {}, "inputs": plan.inputs}
    return PruningPlan(**{**fields, **changes})


@pytest.mark.parametrize("other", ["residual", "vgg", "tokens"])
def test_another_networks_plan_is_refused_before_anything_is_cut(
    make_net: MakeNet, other: str, state_of: Any, assert_same_state: Any
) -> None:
    model, _ = make_net("plain")
    before = state_of(model)
    with pytest.raises(PlanError):
        apply_plan(model, random_plan(trace_network(*make_net(other)), random.Random(0)))
    assert_same_state(model, before)


@pytest.mark.parametrize(
    ("kind", "kept", "channels", "text"),
    [
        ("plain", {"0": (0,)}, {"0": 9}, "9 channels at '0'; found 8"),
        ("plain", {"nope": (0,)}, {"nope": 9}, "no such layer"),
        ("plain", {"1": (0,)}, {"1": 8}, "'1'"),
        ("plain", {"11": (0, 1)}, {"11": 4}, "output of the model"),
        ("option_a", {"stem": (0, 1)}, {"stem": 8}, "'stem'"),
        ("option_a", {"d": (0, 1)}, {"d": 16}, "shortcut"),
        ("grouped", {"2": (0, 1, 2, 4)}, {"2": 16}, "4 blocks"),
        ("grouped", {"0": (0, 1, 2)}, {"0": 8}, "4 blocks"),
    ],
)
def test_hostile_plans_are_refused_before_anything_is_cut(
    make_net: MakeNet, kind: str, kept: Any, channels: Any, text: str, state_of: Any, assert_same_state: Any
) -> None:
    model, inputs = make_net(kind)
    before = state_of(model)
    with pytest.raises(PlanError, match=text):
        apply_plan(model, PruningPlan(kept, channels, {}, ()), inputs)
    assert_same_state(model, before)


def test_inputs_are_needed_from_somewhere(make_net: MakeNet) -> None:
    model, _ = make_net("plain")
    with pytest.raises(PlanError, match="carries none"):
        apply_plan(model, PruningPlan({"0": (0,)}, {"0": 8}))


# --- folders ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_brings_the_network_back(make_net: MakeNet, kind: str, tmp_path: Path) -> None:
    model, inputs = make_net(kind)
    plan = random_plan(trace_network(model, inputs), random.Random(kind))
    pruned = apply_plan(model, plan)
    save_pruned(pruned, plan, tmp_path / "run")
    fresh, _ = make_net(kind)
    for p in fresh.parameters():
        nn.init.normal_(p)
    loaded = load_pruned(fresh, tmp_path / "run")
    assert loaded is fresh
    assert loaded.state_dict().keys() == pruned.state_dict().keys()
    assert all(torch.equal(v, pruned.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert_same_outputs(loaded, pruned, inputs)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {PLAN_FILE, WEIGHTS_FILE}


@pytest.fixture
def saved(make_net: MakeNet, tmp_path: Path) -> Path:
    model, inputs = make_net("plain")
    plan = random_plan(trace_network(model, inputs), random.Random(1))
    save_pruned(apply_plan(model, plan), plan, tmp_path)
    return tmp_path


def broken(saved: Path, how: str) -> None:
    weights = saved / WEIGHTS_FILE
    tensors = read_weights(weights)
    if how == "no plan":
        (saved / PLAN_FILE).unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "weights cut short":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif how == "weights are text":
        weights.write_text("hello")
    elif how == "weights are empty":
        weights.write_bytes(b"")
    elif how == "a tensor is missing":
        save_file({k: v for k, v in tensors.items() if k != "0.weight"}, weights)
    elif how == "one too many":
        save_file({**tensors, "more": torch.zeros(2)}, weights)
    elif how == "another shape":
        save_file({**tensors, "0.bias": torch.zeros(99)}, weights)
    elif how == "NaN":
        save_file({**tensors, "0.bias": tensors["0.bias"] + torch.nan}, weights)
    elif how == "plan of another width":
        data = json.loads((saved / PLAN_FILE).read_text())
        data["groups"]["0"]["channels"] = 64
        (saved / PLAN_FILE).write_text(json.dumps(data))
    elif how in ("absurd inputs", "astronomic inputs"):
        data = json.loads((saved / PLAN_FILE).read_text())
        data["inputs"][0]["shape"] = [10**9, 10**9, 10**9] if how == "absurd inputs" else [1, 3, 10**30, 8]
        (saved / PLAN_FILE).write_text(json.dumps(data))


@pytest.mark.parametrize(
    "how",
    ["no plan", "no weights", "weights cut short", "weights are text", "weights are empty", "a tensor is missing",
     "one too many", "another shape", "NaN", "plan of another width", "absurd inputs",
     "astronomic inputs"],
)  # fmt: skip
def test_broken_folders_are_plan_errors(make_net: MakeNet, saved: Path, how: str) -> None:
    broken(saved, how)
    with pytest.raises(PlanError) as caught:
        load_pruned(make_net("plain")[0], saved)
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_architecture(make_net: MakeNet, saved: Path) -> None:
    with pytest.raises(PlanError):
        load_pruned(make_net("residual")[0], saved)


def test_weights_that_do_not_fit_change_nothing(make_net: MakeNet, state_of: Any, assert_same_state: Any) -> None:
    model, _ = make_net("plain")
    before = state_of(model)
    good = {k: v + 1 for k, v in model.state_dict().items()}
    for weights in ({**good, "0.bias": torch.zeros(3)}, {**good, "11.weight": good["11.weight"] * torch.inf}):
        with pytest.raises(PlanError):
            load_weights(model, weights, "here")
        assert_same_state(model, before)
    load_weights(model, {k: v for k, v in good.items() if "num_batches" not in k}, "here")
    assert torch.equal(model.state_dict()["0.bias"], good["0.bias"])


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]
)  # fmt: skip
def test_weights_of_another_kind_are_refused(make_net: MakeNet, state_of: Any, assert_same_state: Any, dtype) -> None:
    model, _ = make_net("plain")
    before = state_of(model)
    with pytest.raises(PlanError, match=str(dtype)):
        load_weights(model, {**model.state_dict(), "0.weight": model.state_dict()["0.weight"].to(dtype)}, "here")
    assert_same_state(model, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_taken(make_net: MakeNet, dtype: torch.dtype) -> None:
    model, _ = make_net("plain")
    given = torch.ones_like(model.state_dict()["0.weight"], dtype=dtype)
    load_weights(model, {**model.state_dict(), "0.weight": given}, "here")
    assert torch.equal(model.state_dict()["0.weight"], given.float())


def test_weights_go_through_a_pipe(make_net: MakeNet, tmp_path: Path) -> None:
    pipe, got, (model, _) = tmp_path / "pipe", list[bytes](), make_net("plain")
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    save_weights(model, pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    reader.join(30)
    state = load(got[0])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", [PLAN_FILE, WEIGHTS_FILE])
def test_a_folder_in_a_files_place(make_net: MakeNet, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(PlanError, match="can be written"):
        save_pruned(make_net("plain")[0], plan_for(make_net, "plain"), tmp_path)


def test_a_folder_that_cannot_be_written(make_net: MakeNet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, _ = make_net("plain")
    with pytest.raises(PlanError, match="can be written"):
        save_pruned(model, plan_for(make_net, "plain"), tmp_path / "file" / "run")


def test_tied_weights_survive_the_folder(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.again = nn.Linear(8, 8)
            self.again.weight = self.two.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.again(self.two(self.one(x).relu()).relu()).relu())

    inputs = (torch.randn(2, 6),)
    model = Tied()
    plan = PruningPlan({}, {}, {}, trace_network(model, inputs).inputs)
    save_pruned(model, plan, tmp_path)
    assert_same_outputs(load_pruned(Tied(), tmp_path), model, inputs)
