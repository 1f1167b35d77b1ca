"""What users get wrong with NNI, each as one clear line instead of an empty assertion or a page of schema."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nni")

from diplugin_nni import DIPruner, speedup, torch_evaluator
from nni_training import GOOD, assert_one_line, looping, step, traced

from diplugin.errors import DataError, ModelError, PlanError, UserError

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([{"op_names": ["0"], "sparsity_ratio": 0.5}], r"keys of NNI 3.0 in config_list\[0\], got \['sparsity_rat"),
        ([{"op_names": ["0"], "sparse_ratio": 1}], "sparse_ratio in .* as a float such as 0.5, got int 1"),
        ([{"op_names": ["0"], "sparse_ratio": 1.5}], "between 0.0 and 1.0, got 1.5"),
        ([{"op_names": ["0"], "sparse_ratio": float("nan")}], "as a float such as 0.5, got float nan"),
        ([{"op_names": ["0"], "sparse_ratio": "half"}], "as a float such as 0.5, got str 'half'"),
        ([{"sparse_ratio": 0.5}], "expected op_types, op_names or op_names_re"),
        ([{"op_names": "0", "sparse_ratio": 0.5}], r"config_list\[0\] by NNI's schema"),
        ([{"op_names": ["conv"], "sparse_ratio": 0.5}], r"it has no 'conv'"),
        ([*GOOD, {"op_types": ["Conv3d"], "sparse_ratio": 0.5}], r"config_list\[1\] to select a layer"),
        ([{"op_types": ["ReLU"], "sparse_ratio": 0.5}], "ReLU is not registered"),
        ([{"op_names": ["0"], "target_settings": {"weight": {"sparse_ratio": 1}}}], "got int 1"),
        ([{"op_names": ["0"], "target_settings": ["weight"]}], "target_settings .* as a dict of dicts"),
        ([{"op_names": ["0"], "sparse_ratio": 0.5, "target_names": ["wait"]}], "NNI can apply to this model"),
        ([{"op_names": ["0"], "sparse_ratio": 0.5, "min_sparse_ratio": 0.6, "max_sparse_ratio": 0.4}], "0.6 above 0.4"),
        ([{"op_names_re": ["["], "sparse_ratio": 0.5}], r"expressions in config_list\[0\], got: unterminated char"),
        ([{**GOOD[0], "exclude_op_names_re": ["("]}], r"expressions in config_list\[0\], got: missing \)"),
        ([{**GOOD[0], "exclude_op_names": ["heda"]}], "exclude_op_names of the model .* it has no 'heda'"),
        ([{**GOOD[0], "internal_metric_block": 0}], "internal_metric_block .* as an integer of 1 or more, got 0"),
        ([{"op_names": ["0"], "total_sparsity": 0.5}], "Key 'weight' error: Wrong key 'group_id'"),
        ([], "a config_list with an entry such as"),
        ({"op_names": ["0"]}, "as a list of dicts, got dict"),
        ("half", "as a list of dicts, got str"),
    ],
)
def test_config_lists(make_net: MakeNet, make_images: Callable[..., Any], config: Any, words: str) -> None:
    model, _ = make_net("vgg")
    with pytest.raises(UserError, match=words) as caught:
        DIPruner(model, config, calibration_data=make_images(40).loader(40))
    assert_one_line(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"op_types": ["ReLU"], "sparse_ratio": 0.5},
        {"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": "per_channel"},
        {"op_types": ["Conv2d"]},
    ],
)
def test_a_refused_config_leaves_the_model_unwrapped(
    make_net: MakeNet, make_images: Callable[..., Any], entry: Any, state_of: Any, assert_same_state: Any
) -> None:
    model, _ = make_net("vgg")
    before = state_of(model)
    with pytest.raises(UserError) as caught:
        DIPruner(model, [entry], calibration_data=make_images(40).loader(40))
    assert_one_line(caught.value)
    assert not any(hasattr(m, "_nni_wrapper") for m in model.modules())
    assert_same_state(model, before)


def test_nothing_to_prune(make_net: MakeNet, make_images: Callable[..., Any]) -> None:
    loader = make_images(40).loader(40)
    with pytest.raises(UserError, match="sparse_ratio or sparse_threshold for a target"):
        DIPruner(make_net("vgg")[0], [{"op_types": ["Conv2d"]}], calibration_data=loader)
    first = DIPruner(make_net("vgg")[0], GOOD, calibration_data=loader)
    with pytest.raises(UserError, match="that no earlier compressor prunes"):
        DIPruner.from_compressor(first, GOOD, calibration_data=loader)
    assert first._is_wrapped


@pytest.mark.parametrize(
    ("granularity", "words"),
    [([3, -1, -1, -1], "blocks divide 0.weight"), ([1, 1, 1, 1, 1], "at most 4 numbers for 0.weight")],
)
def test_granularities_that_do_not_fit(
    make_net: MakeNet, make_images: Callable[..., Any], granularity: Any, words: str
) -> None:
    model, _ = make_net("vgg")
    settings = {"weight": {"sparse_ratio": 0.5, "granularity": granularity}}
    entry = {"op_names": ["0"], "target_names": ["weight"], "target_settings": settings}
    with pytest.raises(UserError, match=words) as caught:
        DIPruner(model, [entry], calibration_data=make_images(40).loader(40)).compress()
    assert_one_line(caught.value)


@pytest.mark.parametrize(
    ("model", "target", "granularity"),
    [
        (nn.Conv2d(3, 4, 3), "_output_", [-1, -1, 1, 1]), (nn.Conv2d(3, 4, 3), "_input_", [-1, -1, -1, 1]),
        (nn.Linear(8, 4), "_output_", "per_channel"), (nn.Linear(8, 4), "_output_", [-1, -1, 1]),
        (nn.Linear(8, 4), "_input_", "per_channel"),
    ],
)  # fmt: skip
def test_activations_whose_channels_are_not_told_apart(model: nn.Module, target: str, granularity: Any) -> None:
    images = torch.randn(40, 3, 8, 8) if isinstance(model, nn.Conv2d) else torch.randn(40, 24, 8)
    settings = {target: {"sparse_ratio": 0.5, "granularity": granularity}}
    entry = {"op_names": ["0"], "target_names": [target], "target_settings": settings}
    pruner = DIPruner(nn.Sequential(model), [entry], calibration_data=[(images, Y)])
    with pytest.raises(UserError, match=f"0.{target}0 .* channels in dimension 1, one block or more each") as caught:
        pruner.compress()
    assert_one_line(caught.value)


X, Y = torch.zeros(40, 3, 8, 8), torch.arange(40) % 4


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (X, "batches of .inputs, labels., got Tensor"),
        ((X,), "got a tuple of 1"),
        ((X, X, Y), "got a tuple of 3 .*get_labels="),
        ({"x": X, "y": Y}, "got dict; pass get_labels="),
        ((X, Y.float()), "class ids are integers"),
        ((X, Y[:30]), r"one length in a batch, got lengths \[30, 40\]"),
        ((X, torch.zeros(40, dtype=torch.long)), "labels that differ"),
        ((X[:, :1], Y), "batches that the model runs on"),
    ],
)
def test_batches(make_net: MakeNet, batch: Any, words: str) -> None:
    model, _ = make_net("vgg")
    with pytest.raises(DataError, match=words) as caught:
        DIPruner(model, GOOD, calibration_data=[batch]).compress()
    assert_one_line(caught.value)


@pytest.mark.parametrize("batch", [(X, X, Y), {"x": X, "y": Y}])
def test_batches_of_an_evaluator(make_net: MakeNet, batch: Any) -> None:
    model, _ = make_net("vgg")
    evaluator = torch_evaluator(looping([batch]), traced(model), lambda b, m: step((X, Y), m))
    with pytest.raises(DataError, match="get_labels=") as caught:
        DIPruner(model, GOOD, evaluator, 1)
    assert_one_line(caught.value)


@pytest.mark.parametrize("data", [[], {"x": X}, X, 7])
def test_calibration_data_that_is_no_loader(make_net: MakeNet, data: Any) -> None:
    with pytest.raises(DataError, match="expected a loader") as caught:
        DIPruner(make_net("vgg")[0], GOOD, calibration_data=data)
    assert_one_line(caught.value)


@pytest.mark.parametrize("steps", [0, -1, None, 2.5, True])
def test_training_steps(make_net: MakeNet, make_images: Callable[..., Any], steps: Any) -> None:
    model, _ = make_net("vgg")
    evaluator = torch_evaluator(looping(make_images(40).loader(20)), traced(model), step)
    with pytest.raises(UserError, match="training_steps as an integer of 1 or more") as caught:
        DIPruner(model, GOOD, evaluator, steps)
    assert_one_line(caught.value)


@pytest.mark.parametrize("count", [0, -3, "7", 2.5, True])
def test_max_samples(make_net: MakeNet, make_images: Callable[..., Any], count: Any) -> None:
    with pytest.raises(UserError, match="max_samples as an integer of 1 or more") as caught:
        DIPruner(make_net("vgg")[0], GOOD, calibration_data=make_images(40).loader(40), max_samples=count)
    assert_one_line(caught.value)


@pytest.mark.parametrize("rho", [0, -1.0, "10", float("nan"), float("inf"), True])
def test_rho(make_net: MakeNet, make_images: Callable[..., Any], rho: Any) -> None:
    with pytest.raises(UserError, match="rho above 0 and finite") as caught:
        DIPruner(make_net("vgg")[0], GOOD, calibration_data=make_images(40).loader(40), rho=rho)
    assert_one_line(caught.value)


def test_neither_data_nor_evaluator(make_net: MakeNet) -> None:
    with pytest.raises(UserError, match="calibration_data, or an evaluator with training_steps") as caught:
        DIPruner(make_net("vgg")[0], GOOD)
    assert_one_line(caught.value)


def test_an_optimizer_for_an_evaluator(make_net: MakeNet) -> None:
    model, _ = make_net("vgg")
    with pytest.raises(UserError, match="an NNI evaluator such as TorchEvaluator, got SGD") as caught:
        DIPruner(model, GOOD, torch.optim.SGD(model.parameters(), lr=0.1), 1)  # pyright: ignore
    assert_one_line(caught.value)


def test_a_layer_that_never_runs(make_images: Callable[..., Any]) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.used(x).mean((2, 3)))

    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    with pytest.raises(DataError, match="layer 'idle' to run on the data, it never did") as caught:
        DIPruner(Idle(), config, calibration_data=make_images(40).loader(40)).compress()
    assert_one_line(caught.value)


def test_batches_that_the_model_does_not_run_on_though_example_inputs_do(make_net: MakeNet) -> None:
    model, inputs = make_net("vgg")
    pruner = DIPruner(model, GOOD, calibration_data=[(X[:, :1], Y)], example_inputs=inputs)
    with pytest.raises(ModelError, match="a model that runs on the batches") as caught:
        pruner.compress()
    assert_one_line(caught.value)


def test_a_layer_of_two_names(make_images: Callable[..., Any]) -> None:
    model = nn.Sequential(layer := nn.Conv2d(3, 3, 3), nn.ReLU(), layer, nn.Flatten(), nn.Linear(48, 4))
    entry = {"op_names": ["2"], "sparse_ratio": 0.5}
    with pytest.raises(UserError, match=r"'2' is another name of '0'") as caught:
        DIPruner(model, [entry], calibration_data=make_images(40).loader(40))
    assert_one_line(caught.value)


def test_embeddings_have_no_channels() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Flatten(), nn.Linear(24, 3))
    ids = torch.randint(10, (40, 3))
    with pytest.raises(UserError, match="'0' is an Embedding"):
        DIPruner(model, GOOD, calibration_data=[(ids, Y % 3)])


def test_steps_without_an_evaluator(make_net: MakeNet, make_images: Callable[..., Any]) -> None:
    pruner = DIPruner(make_net("vgg")[0], GOOD, calibration_data=make_images(40).loader(40))
    with pytest.raises(UserError, match="no max_steps or max_epochs for one-shot"):
        pruner.compress(max_steps=5)


def test_speedup_with_another_models_masks(make_net: MakeNet) -> None:
    model, (x,) = make_net("vgg")
    with pytest.raises(PlanError, match="no layer 'conv'"):
        speedup(model, {"conv": {"weight": torch.ones(1)}}, x)


def test_speedup_with_inputs_that_do_not_fit(make_net: MakeNet) -> None:
    model, _ = make_net("vgg")
    with pytest.raises(ModelError, match=r"runs on example inputs of shapes \[\(1, 1, 8, 8\)\]"):
        speedup(model, {}, torch.zeros(1, 1, 8, 8))


def test_without_nni_the_way_to_get_it_is_said() -> None:
    code = (
        "import sys; sys.modules['nni'] = None; import diplugin\n"
        "try: diplugin.DIPruner\n"
        "except diplugin.errors.MissingExtraError as error: print(isinstance(error, ImportError), error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("True expected NNI 3.0")
    assert 'pip install "diplugin[nni]"' in done.stdout
    assert done.stdout.count("\n") == 1
