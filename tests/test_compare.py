"""Criteria side by side: everybody lands at the target, on equal terms, and the table says who is best."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diplugin.compare import Comparison, Row, compare, count_macs
from diplugin.contenders import Case, Compress, Criterion, default_contenders, drop_in, torch_pruning_contenders
from diplugin.errors import BudgetError, DataError, ModelError
from diplugin.network import trace_network


def trained(make_net, images) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model, inputs = make_net("residual")
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images.images), images.labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), inputs


def test_every_criterion_lands_under_the_target_and_near_it(make_net, make_images) -> None:
    images = make_images(120)
    model, inputs = trained(make_net, images)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    contenders = [c for c in default_contenders(compress=False) if "FPGM" not in c.name]
    result = compare(model, images.loader(40), example_inputs=inputs, test_loader=images.loader(60),
                     fractions=(0.7, 0.4), contenders=contenders)  # fmt: skip
    assert len(result.rows) == 2 * len(contenders)
    for row in result.rows:
        assert row.macs is not None and row.target - 0.25 < row.macs <= row.target
        assert row.params is not None and row.params < 1
        assert row.accuracy is not None and 0 <= row.accuracy <= 1
    assert result.base_accuracy > 0.9
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_frozen_network_is_compared_like_any_other(make_net, make_images) -> None:
    """As one at hand for inference is, of which torch-pruning would find nothing to prune, or to derive."""
    images = make_images(60)
    model, inputs = trained(make_net, images)
    frozen = copy.deepcopy(model).requires_grad_(False)
    contenders = [c for c in default_contenders() if c.name in ("Taylor, global", "L2, local", "DI, global")]

    def rows(net: nn.Module) -> list[Any]:
        result = compare(net, images.loader(40), example_inputs=inputs, test_loader=images.loader(60),
                         fractions=(0.5,), contenders=contenders)  # fmt: skip
        return [replace(row, seconds=0.0) for row in result.rows]

    assert rows(frozen) == rows(model) and len(rows(model)) == 3
    assert not any(p.requires_grad for p in frozen.parameters())


def test_the_drop_in_lands_like_a_pruner_of_the_users_own(make_net, make_images) -> None:
    """What `compare` would remove is what torch-pruning's step removes at the ratio that was found."""
    import torch_pruning as tp

    images = make_images(100)
    model, inputs = trained(make_net, images)
    case = Case(model, inputs, trace_network(model, inputs), images.loader(50))
    own = copy.deepcopy(model)
    l2 = tp.importance.MagnitudeImportance(p=2)
    tp.pruner.BasePruner(own, inputs, l2, pruning_ratio=0.5, ignored_layers=[own.head], in_channel_groups={},
                         out_channel_groups={}, num_heads={}, channel_groups={}).step()  # fmt: skip
    fraction = count_macs(own, inputs) / count_macs(model, inputs)
    pruned = Criterion("L2, local", lambda *_: tp.importance.MagnitudeImportance(p=2)).prune(case, [fraction + 1e-9])
    found = next(iter(pruned.values()))
    assert found is not None
    for (name, a), (_, b) in zip(own.named_parameters(), found.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_compress_meets_the_target(make_net, make_images) -> None:
    images = make_images(120)
    model, inputs = trained(make_net, images)
    result = compare(model, images.loader(40), example_inputs=inputs, test_loader=images.loader(60), fractions=(0.5,),
                     contenders=[Compress()], holdout=images.loader(30))  # fmt: skip
    assert result.rows[0].macs is not None and result.rows[0].macs <= 0.5


def test_a_target_out_of_reach_is_an_empty_row(make_net, make_images) -> None:
    images = make_images(60)
    model, inputs = make_net("residual")
    contenders = [*torch_pruning_contenders(["local"])[:1], drop_in("DI, global", True), Compress()]
    result = compare(model, images.loader(30), example_inputs=inputs, test_loader=images.loader(30),
                     fractions=(0.001,), contenders=contenders)  # fmt: skip
    assert [row.accuracy for row in result.rows] == [None, None, None]


def test_the_best_row() -> None:
    rows = (Row("L2, local", 0.5, 0.5, 0.5, 0.7, 1.0), Row("DI, global", 0.5, 0.5, 0.5, 0.8, 1.0),
            Row("random", 0.5, None, None, None, 1.0))  # fmt: skip
    result = Comparison(0.9, 0.9, rows)
    assert result.best(0.5) == rows[1]
    assert result.best(0.5, without="DI") == rows[0]
    assert result.best(0.3) is None
    assert json.loads(result.to_json())["rows"][2]["accuracy"] is None


def test_bad_input(make_net, make_images) -> None:
    images = make_images(20)
    model, inputs = make_net("plain")
    for fractions in ((), (0.0,), (1.5,)):
        with pytest.raises(BudgetError, match="between 0 and 1"):
            compare(model, images.loader(10), example_inputs=inputs, test_loader=[], fractions=fractions)
    with pytest.raises(DataError, match="empty"):
        compare(model, [], example_inputs=inputs, test_loader=images.loader(10))


class Raises(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        raise OSError("disk gone")


def test_test_data_that_do_not_fit_or_cannot_be_read_are_one_line(make_net, make_images) -> None:
    images, (model, inputs) = make_images(20), make_net("plain")

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).relu().flatten(1))

    large = [(torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(ModelError, match="runs on the data") as misfit:
        compare(Fixed().eval(), images.loader(10), example_inputs=inputs, test_loader=large)
    unread = torch.utils.data.DataLoader(Raises())
    for given in ({"loader": unread}, {"test_loader": unread}, {"holdout": unread, "contenders": [Compress()]}):
        data = {"loader": images.loader(10), "test_loader": images.loader(10), **given}
        with pytest.raises(DataError, match="disk gone") as unreadable:
            compare(model, data.pop("loader"), example_inputs=inputs, fractions=(0.7,), **data)
        assert "\n" not in str(unreadable.value) + str(misfit.value)


@pytest.mark.parametrize("listed", [False, True], ids=["a data set", "batches"])
def test_without_test_data_nobody_is_judged_by_the_images_they_chose_by(monkeypatch, listed: bool) -> None:
    from diplugin import compare as module
    from diplugin.sources import DataSource

    images = torch.arange(200.0).view(200, 1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, images[:, 0].long()), batch_size=16)
    seen: list[tuple[set[float], ...]] = []

    def look(model: nn.Module, loader: Any, *, test_loader: Any, holdout: Any, **_: Any) -> Comparison:
        seen.append(tuple({float(v) for x, _ in part for v in x} for part in (loader, holdout, test_loader)))
        return Comparison(0.0, 0.0, ())

    monkeypatch.setattr(module, "compare", look)
    source = DataSource("numbers", list(loader) if listed else loader)  # pyright: ignore[reportArgumentType]
    for seed in (0, 0, 1):
        module.compare_source(nn.Identity(), source, example_inputs=(), seed=seed)
    training, holdout, judged = seen[0]
    assert not training & holdout and not training & judged and not holdout & judged
    assert (len(training), len(holdout), len(judged)) == (180, 10, 10)
    assert seen[1] == seen[0] != seen[2]


@pytest.mark.parametrize(
    ("only", "names"),
    [("L1, local", ["L1, local"]), ("l1,bn", ["L1, local", "L1, global", "BN scale, local", "BN scale, global"]),
     ("bn scale,", ["BN scale, local", "BN scale, global"]), (None, [c.name for c in default_contenders()])],
)  # fmt: skip
def test_contenders_are_picked_by_whole_names_or_by_words(only, names, monkeypatch) -> None:
    import importlib

    from diplugin.sources import DataSource

    module, chosen = importlib.import_module("diplugin.compare"), []

    def take(*_: Any, contenders: Any, **__: Any) -> Comparison:
        chosen.extend(contenders)
        return Comparison(1, 1, ())

    monkeypatch.setattr(module, "compare", take)
    x = torch.zeros(40, 3, 8, 8)
    data = torch.utils.data.TensorDataset(x, torch.arange(40) % 4)
    source = DataSource("own", torch.utils.data.DataLoader(data, batch_size=8))
    module.compare_source(nn.Identity(), source, example_inputs=(x[:1],), only=only)
    assert [contender.name for contender in chosen] == names


def test_command(make_net, tmp_path, monkeypatch, capsys) -> None:
    from diplugin.cli import main

    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def tiny():\n"
        "    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code = main(["compare", "nets:tiny", "digits", "--example-shape", "1,1,24,24", "--macs", "0.5", "--images", "250",
                 "--only", "L1,BN", "--test-images", "200", "--json", "rows.json"])  # fmt: skip
    assert code == 0
    shown = capsys.readouterr().out
    assert "L1, local" in shown and "BN scale, global" in shown
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 4
    assert main(["compare", "nets:tiny", "digits", "--example-shape", "1,1,24,24", "--only", "nothing"]) == 2
    assert "expected contenders among" in capsys.readouterr().err
