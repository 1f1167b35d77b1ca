"""Every kind of channel group, against brute force: remove a channel physically, measure DI of what is then read.

The first-order score of a channel is the derivative of DI with respect to a mask on it. Under a huge ridge DI is
linear in the Gram matrix, and there that derivative is exactly twice the loss of removing the channel. So with
rho = 1e7, in float64, the score must be twice the loss that surgery gives, whichever way channels are spelled.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch_pruning as tp
from diplugin_torch_pruning import PLAIN, DIImportance
from kinds_of_groups import IMAGES, KINDS, Kind, attention, inputs_of, reordered, shared_attention
from torch import Tensor, nn

from diplugin.discriminant import absolute_ridge, channel_scores, discriminant_information

RHO = 1e7


def group_of(model: nn.Module, kind: Kind, indices: Sequence[int] | None = None) -> Any:
    graph = tp.DependencyGraph().build_dependency(model, inputs_of(kind, 1))
    layer = dict(model.named_modules())[kind.root]
    pruner = graph.get_pruner_of_module(layer)
    everything = range(graph.get_out_channels(layer))
    return graph.get_pruning_group(layer, pruner.prune_out_channels, list(everything if indices is None else indices))


def read(model: nn.Module, kind: Kind) -> list[Tensor]:
    """What each reader reads, call by call in the order of `kind.readers`, channels moved to dimension 1."""
    seen: dict[str, list[Tensor]] = {}
    names = {name for name, _ in kind.readers}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, layer in model.named_modules() if name in names
    ]  # fmt: skip
    with torch.no_grad():
        model(*inputs_of(kind))
    for handle in handles:
        handle.remove()
    return [seen[name].pop(0).movedim(dim, 1) for name, dim in kind.readers]


def columns_left(before: nn.Module, after: nn.Module, name: str) -> list[int]:
    """Which inputs of a reader surgery has kept, by its weights, random and so all different."""

    def columns(model: nn.Module) -> Tensor:
        layer: Any = dict(model.named_modules())[name]
        weight = layer.weight.detach()
        if getattr(layer, "groups", 1) > 1:  # [out, in/groups]: a block's columns stand under its own filters
            weight = torch.cat(weight.chunk(layer.groups), 1)
        return weight.flatten(1) if getattr(layer, "transposed", False) else weight.transpose(0, 1).flatten(1)

    old, new = columns(before), columns(after)
    return [i for i, row in enumerate(old) if any(set(kept.tolist()) <= set(row.tolist()) for kept in new)]


def losses_by_surgery(kind: Kind, model: nn.Module, labels: Tensor) -> Tensor:
    """DI lost when each unit leaves, summed over readers: [channels / blocks]."""
    maps = read(model, kind)
    ridges = [absolute_ridge(m, RHO) for m in maps]
    full = [discriminant_information(m, labels, ridge=r) for m, r in zip(maps, ridges, strict=True)]
    units = len(group_of(model, kind)[0].idxs) // kind.blocks
    losses = []
    for unit in range(units):
        pruned = copy.deepcopy(model)
        group_of(pruned, kind, [unit + b * units for b in range(kind.blocks)]).prune()
        if kind.whole:
            left = read(pruned, kind)
        else:
            left = [m[:, columns_left(model, pruned, n)] for m, (n, _) in zip(maps, kind.readers, strict=True)]
        gone = [d - discriminant_information(m, labels, ridge=r) if m.shape != o.shape else torch.nan * d
                for d, m, r, o in zip(full, left, ridges, maps, strict=True)]  # fmt: skip
        losses.append(torch.stack(gone).nansum())
    return torch.stack(losses)


def fitted(kind: Kind, **options: Any) -> tuple[nn.Module, DIImportance, Tensor]:
    torch.manual_seed(3)
    model = kind.net().double().eval()
    labels = torch.arange(IMAGES) % 3
    return model, DIImportance(rho=RHO, **{**PLAIN, **options}).fit(model, [(inputs_of(kind), labels)]), labels


@pytest.mark.parametrize("name", KINDS)
def test_scores_are_what_surgery_costs(name: str) -> None:
    kind = KINDS[name]
    model, importance, labels = fitted(kind)
    scores = importance(group_of(model, kind))
    assert scores is not None
    by_unit = scores.double().view(kind.blocks, -1).sum(0)
    if name == "twice":  # two calls of one layer are one reader, whose score is the mean of its calls
        maps = read(model, kind)
        own = [channel_scores(m, labels, rho=RHO) for m in maps]
        torch.testing.assert_close(by_unit, (own[0] + own[1]) / 2 + own[2], rtol=1e-5, atol=0)
        return
    torch.testing.assert_close(by_unit, 2 * losses_by_surgery(kind, model, labels), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", [n for n, k in KINDS.items() if k.blocks == 1])
def test_the_cheapest_channels_go(name: str) -> None:
    """Through a pruner: the root keeps the channels of the highest scores."""
    kind = KINDS[name]
    model, importance, _ = fitted(kind)
    group = group_of(model, kind)
    scores, graph = importance(group), group._DG
    tied = {i.dep.target.module for i in group.items if graph.is_out_channel_pruning_fn(i.dep.handler)}
    rest = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) and m not in tied]
    root: Any = dict(model.named_modules())[kind.root]
    bias = root.bias.detach().clone()
    prune(model, kind, importance, ignored_layers=rest)
    kept = scores.argsort()[len(scores) - int(len(scores) * 0.5) :].sort().values
    torch.testing.assert_close(root.bias.detach(), bias[kept])


def prune(model: nn.Module, kind: Kind, importance: DIImportance, **options: Any) -> None:
    """Half of the channels, one step; dicts are fresh, since torch-pruning's defaults are shared between pruners."""
    fresh: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}, "channel_groups": {}}
    arguments = {"pruning_ratio": 0.5, **fresh, **options}
    tp.pruner.BasePruner(model, inputs_of(kind, 1), importance, **arguments).step()


def test_attention_heads_lose_the_same_dimensions() -> None:
    kind = Kind(attention, "q", [("proj", -1)], ((6, 5),))
    model, importance, labels = fitted(kind)
    weight = model.v.weight.detach().clone()
    want = channel_scores(read(model, kind)[0], labels, rho=RHO)
    kept = want.view(2, 4).sum(0).argsort()[2:].sort().values
    prune(model, kind, importance, num_heads={model.q: 2, model.k: 2, model.v: 2}, ignored_layers=[model.proj])
    assert model.q.out_features == model.k.out_features == model.v.out_features == model.proj.in_features == 4
    torch.testing.assert_close(model.v.weight.detach(), weight[torch.cat([kept, kept + 4])])


def test_a_floor_under_heads_is_one_of_dimensions_and_leaves_their_order() -> None:
    kind = Kind(attention, "q", [("proj", -1)], ((6, 5),))
    model, _, labels = fitted(kind)
    graph = tp.DependencyGraph().build_dependency(model, inputs_of(kind, 1))
    group = graph.get_pruning_group(model.proj, tp.prune_linear_in_channels, list(range(8)))
    heads = {model.q: 2, model.k: 2, model.v: 2}
    dimensions = {}
    for floor in (0.0, 0.25):
        importance = DIImportance(floor=floor, num_heads=heads).fit(model, [(inputs_of(kind), labels)])
        dimensions[floor] = importance(group).view(2, 4).mean(0)
    assert torch.equal(dimensions[0.0].argsort(), dimensions[0.25].argsort())
    assert int((dimensions[0.25] > 1000 * dimensions[0.0].max()).sum()) == 1


def test_grouped_query_attention_is_scored_where_its_heads_are_read() -> None:
    kind = Kind(shared_attention, "q", [("proj", -1)], ((6, 5),))
    model, importance, labels = fitted(kind)
    graph = tp.DependencyGraph().build_dependency(model, inputs_of(kind, 1))
    group = graph.get_pruning_group(model.proj, tp.prune_linear_in_channels, list(range(8)))
    want = channel_scores(read(model, kind)[0], labels, rho=RHO)
    torch.testing.assert_close(importance(group).double(), want, rtol=1e-5, atol=0)


def test_a_reordered_concat_on_which_taylor_misranks() -> None:
    """The same function, spelled with its concatenation in another order, must give the same ranking."""
    kind = Kind(reordered, "tied", [("d", 1), ("e", 1)])
    model, importance, labels = fitted(kind)
    straight = reordered("abc").double().eval()
    straight.load_state_dict(model.state_dict())
    straight.e.weight.data = straight.e.weight.data[:, [6, 7, 8, 0, 1, 2, 3, 4, 5]]
    x = inputs_of(kind)
    torch.testing.assert_close(straight(*x), model(*x))
    ours = DIImportance(rho=RHO, **PLAIN).fit(straight, [(x, labels)])
    torch.testing.assert_close(importance(group_of(model, kind)), ours(group_of(straight, kind)))
    for net in (model, straight):
        net(*x)[:, 0].pow(2).mean().backward()
    taylor = [tp.importance.TaylorImportance()(group_of(net, kind)) for net in (model, straight)]
    assert not torch.equal(taylor[0].argsort(), taylor[1].argsort())
