"""DIPruner with the real NNI: exact sparsity in NNI's words, and masked networks equal to the ones that are cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nni")

from diplugin_nni import DIPruner, speedup
from nni.compression.pruning import L1NormPruner
from nni_masks import assert_cut_equals_masked, assert_exactly, config, sparsity

from diplugin.groups import trace_groups
from diplugin.ranking import ByLoss
from diplugin.scoring import score_groups

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]
MakeImages = Callable[..., Any]
CUT = ["plain", "residual", "vgg", "depthwise", "dense", "grouped"]


@pytest.mark.parametrize("kind", CUT)
def test_one_shot_from_calibration_data(make_net: MakeNet, make_images: MakeImages, kind: str) -> None:
    model, _ = make_net(kind)
    data = make_images(100)
    pruner = DIPruner(model, config(model), calibration_data=data.loader(50))
    same, masks = pruner.compress()
    assert same is model
    assert_exactly(model, masks, 0.5)
    assert_cut_equals_masked(model, masks, data.images[:5])


def test_by_loss_the_channels_of_largest_loss_stay(make_net: MakeNet, make_images: MakeImages) -> None:
    model, inputs = make_net("residual")
    loader = make_images(100).loader(50)
    scores = score_groups(model, loader, trace_groups(model, inputs)).scores
    _, masks = DIPruner(model, config(model, 0.25), calibration_data=loader, ranking=ByLoss()).compress()
    for layer in ("a1", "c1"):
        kept = masks[layer]["weight"].flatten(1).any(1)
        assert scores[layer][kept].min() >= scores[layer][~kept].max()


def test_by_norm_the_channels_with_the_largest_filters_stay(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("residual")
    own = {name: sum_of_squares(getattr(model, name)) for name in ("a1", "c1")}
    _, masks = DIPruner(model, config(model, 0.25), calibration_data=make_images(100).loader(50),
                        ranking=lambda losses, energies, norms: norms).compress()  # fmt: skip
    for layer, norms in own.items():
        kept = masks[layer]["weight"].flatten(1).any(1)
        assert norms[kept].min() >= norms[~kept].max()


def sum_of_squares(layer: Any) -> torch.Tensor:
    return layer.weight.detach().square().flatten(1).sum(1)


def test_tied_layers_agree_without_being_told(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("residual")
    _, masks = DIPruner(model, config(model), calibration_data=make_images(100).loader(50)).compress()
    rows = masks["c2"]["weight"].flatten(1).any(1)
    assert torch.equal(masks["project"]["weight"].flatten(1).any(1), rows)
    assert torch.equal(masks["d2"]["weight"].bool(), rows)


def test_a_global_group_meets_its_share_and_its_bounds(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("vgg")
    more = {"global_group_id": 0, "max_sparse_ratio": 0.75}
    _, masks = DIPruner(model, config(model, 0.5, **more), calibration_data=make_images(100).loader(50)).compress()
    sizes = {name: masks[name]["weight"].numel() for name in sparsity(masks)}
    removed = sum(share * sizes[name] for name, share in sparsity(masks).items())
    assert max(sparsity(masks).values()) <= 0.75
    grain = max(masks[name]["weight"][0].numel() for name in sizes)
    assert 0 <= 0.5 * sum(sizes.values()) - removed < grain


def test_dependency_groups_and_alignment_follow_nnis_words(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("residual")
    entries: list[dict[str, Any]] = [
        {"op_names": ["c2", "project"], "sparse_ratio": 0.3, "dependency_group_id": "sum"},
        {"op_names": ["stem"], "sparse_ratio": 0.25},
        {"op_names": ["bn0"], "target_names": ["weight"], "target_settings": {
            "weight": {"align": {"module_name": "stem", "target_name": "weight", "dims": [0]}}}},
    ]  # fmt: skip
    _, masks = DIPruner(model, entries, calibration_data=make_images(100).loader(50)).compress()
    assert torch.equal(masks["c2"]["weight"].flatten(1).any(1), masks["project"]["weight"].flatten(1).any(1))
    assert torch.equal(masks["bn0"]["weight"].bool(), masks["stem"]["weight"].flatten(1).any(1))
    assert sparsity(masks)["c2"] == pytest.approx(0.3)


def test_a_layer_named_in_a_group_without_a_ratio_takes_part(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("residual")
    entries: list[dict[str, Any]] = [
        {"op_names": ["c2"], "sparse_ratio": 0.5, "dependency_group_id": "sum"},
        {"op_names": ["project"], "dependency_group_id": "sum"},
    ]
    _, masks = DIPruner(model, entries, calibration_data=make_images(100).loader(50)).compress()
    assert sparsity(masks)["project"] == 0.5
    assert torch.equal(masks["c2"]["weight"].flatten(1).any(1), masks["project"]["weight"].flatten(1).any(1))


def test_bounds_and_thresholds(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("vgg")
    entries: list[dict[str, Any]] = [
        {"op_names": ["0"], "sparse_ratio": 0.9, "max_sparse_ratio": 0.5},
        {"op_names": ["3"], "sparse_ratio": 1.0},
        {"op_names": ["6"], "target_settings": {"weight": {"sparse_threshold": 1e9, "max_sparse_ratio": 0.5}}},
    ]
    _, masks = DIPruner(model, entries, calibration_data=make_images(100).loader(50)).compress()
    assert sparsity(masks) == {"0": 0.5, "3": pytest.approx(5 / 6), "6": 0.5}


@pytest.mark.parametrize(
    ("granularity", "rows", "columns", "share"),
    [
        ("in_channel", None, 4, 0.5), ("out_channel", 3, None, 0.5), ([2, -1, -1, -1], 4, None, 2 / 3),
        ([1, 1, -1, -1], None, None, 0.5), ([1, 1, 1, 1], None, None, 0.5), ([-1, 2, -1, -1], None, 4, 0.5),
    ],
)  # fmt: skip
def test_every_granularity_masks_its_own_blocks(
    make_net: MakeNet, make_images: MakeImages, granularity: Any, rows: int | None, columns: int | None, share: float
) -> None:
    model, _ = make_net("vgg")  # layer 3 holds 6 filters of 8 inputs
    settings = {"weight": {"granularity": granularity}}
    ratio = 0.67 if share > 0.6 else 0.5
    entries = [{"op_names": ["3"], "sparse_ratio": ratio, "target_names": ["weight"], "target_settings": settings}]
    _, masks = DIPruner(model, entries, calibration_data=make_images(100).loader(50)).compress()
    mask = masks["3"]["weight"]
    assert 1 - float(mask.mean()) == pytest.approx(share)
    if rows is not None:
        assert int((~mask.flatten(1).bool().any(1)).sum()) == rows
    if columns is not None:
        assert int((~mask.transpose(0, 1).flatten(1).bool().any(1)).sum()) == columns


def test_activations_can_be_targets(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("vgg")
    data = make_images(100)
    settings = {"_output_": {"sparse_ratio": 0.5, "granularity": "per_channel"}}
    entries = [{"op_names": ["0"], "target_names": ["_output_"], "target_settings": settings}]
    _, masks = DIPruner(model, entries, calibration_data=data.loader(50)).compress()
    assert masks["0"]["_output_0"].shape == (1, 8, 1, 1)
    assert float(masks["0"]["_output_0"].mean()) == 0.5
    small = assert_cut_equals_masked(model, masks, data.images[:5])
    assert small.get_submodule("0").out_channels == 4


def test_transposed_convolutions_lose_output_channels(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("transposed")
    data = make_images(100)
    entries = [{"op_types": ["ConvTranspose2d"], "sparse_ratio": 0.34}]
    _, masks = DIPruner(model, entries, calibration_data=data.loader(50)).compress()
    small = assert_cut_equals_masked(model, masks, data.images[:5])
    assert [small.get_submodule(n).out_channels for n in ("2", "5")] == [4, 6]


def test_batchnorms_without_weights_follow_through_their_output(make_images: MakeImages) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Conv2d(8, 4, 3),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()  # fmt: skip
    model[1].running_mean.fill_(-1.0)
    data = make_images(100)
    entries = [{"op_names": ["0"], "sparse_ratio": 0.5}]
    _, masks = DIPruner(model, entries, calibration_data=data.loader(50)).compress()
    assert_cut_equals_masked(model, masks, data.images[:5])


def test_followers_can_be_left_to_the_user(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("plain")
    loader = make_images(50).loader(50)
    pruner = DIPruner(model, config(model), calibration_data=loader, align_followers=False)
    assert set(pruner.compress()[1]) == {"0", "3", "7"}


def test_other_pruners_masks_can_be_cut_too(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("vgg")
    _, masks = L1NormPruner(model, config(model)).compress()
    assert_cut_equals_masked(model, masks, make_images(5).images)


def test_batches_of_any_form(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("vgg")
    data = make_images(100)
    want = DIPruner(copy.deepcopy(model), config(model), calibration_data=data.loader(50)).compress()[1]
    batches = [{"input": x, "target": SimpleNamespace(y=y).y} for x, y in data.loader(50)]
    got = DIPruner(model, config(model), calibration_data=batches, get_labels=lambda b: b["target"],
                   forward=lambda m, b: m(b["input"])).compress()[1]  # fmt: skip
    assert all(torch.equal(got[m][t], want[m][t]) for m in want for t in want[m])


def test_a_layer_of_two_names_is_pruned_once(make_images: MakeImages) -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(8, 4)).eval()  # fmt: skip
    data = make_images(100)
    _, masks = DIPruner(model, config(model), calibration_data=data.loader(50)).compress()
    assert set(masks) == {"0", "2"}
    assert_cut_equals_masked(model, masks, data.images[:5])


def test_example_inputs_may_be_a_tensor(make_net: MakeNet, make_images: MakeImages) -> None:
    model, (x,) = make_net("plain")
    _, masks = DIPruner(model, config(model), calibration_data=make_images(50).loader(50), example_inputs=x).compress()
    assert len(masks) > len(sparsity({m: masks[m] for m in ("0", "3", "7")}))  # BatchNorms are masked along


class Encoder(nn.Module):
    """A Transformer's block [N, T, 16], with a head of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


def test_masks_that_torchs_fast_path_passes_by_are_said() -> None:
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(48, 5, 16)
    whole = copy.deepcopy(model)
    half = [{"op_names": ["block.linear1"], "sparse_ratio": 0.5}]
    with pytest.warns(UserWarning, match=r"passes by the masks of 'block\.linear1'.*set_fastpath_enabled"):
        pruner = DIPruner(model, half, calibration_data=[(x, torch.arange(48) % 3)])
    _, masks = pruner.compress()
    with torch.no_grad():
        assert torch.equal(model(x), whole(x)), "the fast path reads the weights as they were"
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            masked = model(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(before)
        assert not torch.allclose(masked, whole(x), atol=1e-3)
        assert torch.allclose(speedup(model, masks, (x[:1],))(x), masked, atol=1e-5)
