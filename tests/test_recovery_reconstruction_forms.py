"""Reconstruction does not depend on how a network is spelled, nor on the form of the data.

The first property holds for every network: where a plan keeps all channels there is nothing to mend, so the refit must
leave the function as it was. The others compare twins: two spellings of one network, or of one data set, are refitted
to the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_layers import Standardises, padding_net
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from diplugin.errors import DataError
from diplugin.network import NetworkTrace, TensorSpec, record_layers, trace_network
from diplugin.plan import PruningPlan
from diplugin.recovery import Reconstruction, reconstruct
from diplugin.surgery import apply_plan

CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
EXACT = Reconstruction(images=40, samples=4000)


def add_in_place(y: Tensor, x: Tensor) -> Tensor:
    y += x
    return y


def add_and_drop_the_value(y: Tensor, x: Tensor) -> Tensor:
    y.add_(x)
    return y


SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "y + x": lambda y, x: y + x,
    "x + y": lambda y, x: x + y,
    "torch.add": torch.add,
    "y += x": add_in_place,
    "y.add_(x)": add_and_drop_the_value,
    "x.add_(y)": lambda y, x: x.clone().add_(y),
}


@dataclass(frozen=True)
class Form:
    """How a residual network is spelled; `norm` is "none", "before" (pre-activation) or "behind" its convolutions."""

    norm: str = "none"
    sum: str = "y + x"
    inplace: bool = False  # activations
    relu_branch: bool = False  # an activation between the branch and the sum
    padding_mode: str = "zeros"
    dims: int = 2
    keywords: bool = False  # layers are called by keyword
    bias: bool = True


class Net(nn.Module):
    """A stem, two residual blocks of two convolutions, a head."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        conv, norm = CONVS[form.dims], NORMS[form.dims] if form.norm != "none" else lambda _: nn.Identity()
        options = {"padding": 1, "padding_mode": form.padding_mode, "bias": form.bias}
        self.stem = conv(3, 6, 3, **options)
        self.a = nn.ModuleList(conv(6, 8, 3, **options) for _ in range(2))
        self.b = nn.ModuleList(conv(8, 6, 3, **options) for _ in range(2))
        behind = form.norm == "behind"
        self.m = nn.ModuleList(norm(8 if behind else 6) for _ in range(2))
        self.n = nn.ModuleList(norm(6 if behind else 8) for _ in range(2))
        self.last = norm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self._call(self.stem, x)
        if self.form.norm != "before":
            x = self._act(x)
        for a, m, b, n in zip(self.a, self.m, self.b, self.n, strict=True):
            if self.form.norm == "before":
                y = self._call(b, self._act(n(self._call(a, self._act(m(x))))))
            else:
                y = n(self._call(b, self._act(m(self._call(a, x)))))
            x = SUMS[self.form.sum](self._act(y) if self.form.relu_branch else y, x)
            if self.form.norm != "before":
                x = self._act(x)
        return self._call(self.head, F.relu(self.last(x)).flatten(2).mean(2))

    def _act(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=self.form.inplace)

    def _call(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(input=x) if self.form.keywords else layer(x)


def net_of(form: Form, seed: int = 0) -> nn.Module:
    """A network with statistics of its own data, and scales and offsets that are no unit's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Net(form)
        for _ in range(20):
            model(images_of(form, 16, seed=int(torch.randint(1 << 30, ()))))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.weight, 0.5, 2.0)
                nn.init.uniform_(module.bias, -1.0, 1.0)
    return model.eval()


def images_of(form: Form, count: int, side: int = 6, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 1 + 2 * torch.randn(count, 3, *[side] * form.dims, generator=draw)


def halved(model: nn.Module, example: Tensor) -> tuple[NetworkTrace, PruningPlan]:
    trace = trace_network(model, (example,))
    kept = {g.name: tuple(range((g.channels + 1) // 2)) for g in trace.prunable}
    return trace, PruningPlan(kept, trace.base_widths, {}, trace.inputs)


def refitted(model: nn.Module, loader: Any, example: Tensor, **options: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """Half of the channels of every group, refitted, and the layers that were."""
    trace, plan = halved(model, example)
    pruned = apply_plan(copy.deepcopy(model), plan)
    return pruned, reconstruct(pruned, model, loader, trace, plan, EXACT, **options)


def refitted_whole(model: nn.Module, x: Tensor) -> tuple[nn.Module, tuple[str, ...]]:
    """All channels; no group is looked for, since torch-pruning cannot follow circular padding past a shortcut."""
    inputs = (TensorSpec.of(x[:1]),)
    trace, plan = NetworkTrace((), tuple(record_layers(model, (x[:1],))), inputs), PruningPlan({}, {}, {}, inputs)
    same = copy.deepcopy(model)
    return same, reconstruct(same, model, [(x,)], trace, plan, EXACT)


def assert_same_weights(one: nn.Module, two: nn.Module) -> None:
    state = two.state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def assert_same_function(model: nn.Module, other: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        want, got = model(x), other(x)
    assert float((got - want).norm()) <= 1e-4 * float((want - want.mean(0)).norm())


FORMS = st.builds(
    Form, norm=st.sampled_from(["none", "before", "behind"]), sum=st.sampled_from(sorted(SUMS)), inplace=st.booleans(),
    relu_branch=st.booleans(), padding_mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    dims=st.sampled_from([1, 2, 2, 3]), keywords=st.booleans(), bias=st.booleans(),
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(form=FORMS, seed=st.integers(0, 99))
def test_a_plan_that_keeps_all_channels_leaves_the_function(form: Form, seed: int) -> None:
    model = net_of(form, seed)
    twin, x = copy.deepcopy(model), images_of(form, 40, side=4)
    same, done = refitted_whole(model, x)
    assert {"stem", "a.0", "a.1", "head"} <= set(done), "they were refitted"
    assert_same_function(twin, same, images_of(form, 20, side=4, seed=2))
    assert_same_function(twin, model, x)


@pytest.mark.parametrize(
    "form",
    [
        Form(),
        Form(norm="before", bias=False),
        Form(norm="behind", bias=False),
        Form(norm="before", inplace=True),
        Form(inplace=True, relu_branch=True),
        Form(norm="behind", inplace=True, relu_branch=True),
        Form(sum="y.add_(x)"),
        Form(padding_mode="reflect"),
        Form(padding_mode="replicate"),
        Form(padding_mode="circular"),
        Form(dims=1, padding_mode="circular"),
        Form(dims=3, padding_mode="reflect"),
    ],
    ids=repr,
)
def test_so_it_does_for_networks_that_are_easily_misread(form: Form) -> None:
    model, x = net_of(form), images_of(form, 40)
    same, done = refitted_whole(model, x)
    assert set(done) == {"stem", "a.0", "a.1", "b.0", "b.1", "head"}
    assert_same_function(model, same, images_of(form, 20, seed=2))


def test_so_it_does_where_layers_pad_their_inputs_themselves() -> None:
    model, draw = padding_net(), torch.Generator().manual_seed(0)
    x, fresh = (2 * torch.randn(40, 3, 8, 8, generator=draw) + 1 for _ in range(2))
    same, done = refitted_whole(model, x)
    assert done == ("0", "3", "6", "10")
    assert_same_function(model, same, fresh)


@pytest.mark.parametrize("odd", [Standardises(3, 6, 3), weight_norm(nn.Conv2d(3, 6, 3))])
def test_layers_whose_weight_is_not_all_are_left(odd: nn.Module) -> None:
    """Fitted as if they were plain they would be others."""
    model = nn.Sequential(odd, nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)).eval()
    x, fresh = images_of(Form(), 40), images_of(Form(), 20, seed=2)
    same, done = refitted_whole(model, x)
    assert done == ("4",)
    assert_same_function(model, same, fresh)


@pytest.mark.parametrize("norm", ["none", "before", "behind"])
@pytest.mark.parametrize("sum_", sorted(SUMS))
def test_all_spellings_of_a_sum_are_refitted_to_the_same_weights(norm: str, sum_: str) -> None:
    plain, spelled = (net_of(Form(norm=norm, sum=s)) for s in ("y + x", sum_))
    x = images_of(Form(), 40)
    assert_same_weights(*(refitted(model, [(x,)], x[:1])[0] for model in (plain, spelled)))


@pytest.mark.parametrize("change", [{"inplace": True}, {"keywords": True}], ids=str)
@pytest.mark.parametrize("norm", ["none", "before", "behind"])
def test_activations_in_place_and_calls_by_keyword_change_nothing(norm: str, change: dict[str, bool]) -> None:
    plain, spelled = net_of(Form(norm=norm, relu_branch=True)), net_of(Form(norm=norm, relu_branch=True, **change))
    x = images_of(Form(), 40)
    assert_same_weights(*(refitted(model, [(x,)], x[:1])[0] for model in (plain, spelled)))


@pytest.mark.parametrize("norm", ["none", "before", "behind"])
def test_the_refit_brings_a_halved_network_nearer(norm: str) -> None:
    form = Form(norm=norm)
    model, x, fresh = net_of(form), images_of(form, 40), images_of(form, 40, seed=3)
    mended, _ = refitted(model, [(x,)], x[:1])
    cut = apply_plan(copy.deepcopy(model), halved(model, x[:1])[1])
    with torch.no_grad():
        errors = [float((net.eval()(fresh) - model(fresh)).norm()) for net in (mended, cut)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("side", [4, 9])
def test_images_of_another_size_than_the_example(side: int) -> None:
    """The fit looks where the data are: as if the network had been traced on images of that size."""
    model, x = net_of(Form()), images_of(Form(), 40, side)
    mended, done = refitted(model, [(x,)], images_of(Form(), 1, side=6))
    twin, same = refitted(model, [(x,)], x[:1])
    assert done == same
    assert_same_weights(twin, mended)


class Windows(nn.Module):
    """Quarters of images in the place of images, one quarter more, and one learned row of tokens for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.each = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 6)
        self.token, self.mix = nn.Linear(5, 6), nn.Linear(6, 4)
        self.learned = nn.Parameter(torch.randn(1, 3, 5))

    def forward(self, x: Tensor) -> Tensor:
        quarters = x.unflatten(2, (2, -1)).unflatten(4, (2, -1)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        one_more = torch.cat([quarters, quarters[:1]])
        y = F.relu(self.conv(one_more)).mean((2, 3))[:-1]
        y = F.relu(self.each(y)).unflatten(0, (-1, 4))
        return self.mix(y + self.token(self.learned).mean(1, keepdim=True)).mean(1)


def test_layers_whose_rows_are_not_the_images() -> None:
    torch.manual_seed(0)
    model, x = Windows().eval(), images_of(Form(), 40)
    same, done = refitted_whole(model, x)
    assert set(done) == {"conv", "each", "token", "mix"}
    assert_same_function(model, same, images_of(Form(), 20, seed=2))


def test_a_forward_that_calls_the_network_twice_leaves_its_layers() -> None:
    model, x = net_of(Form()), images_of(Form(), 40)
    plain = apply_plan(copy.deepcopy(model), halved(model, x[:1])[1])
    twice = refitted(model, [(x,)], x[:1], forward=lambda m, b: m(b[0]) + m(b[0].flip(-1)))
    assert twice[1] == ()
    assert_same_weights(plain, twice[0])


def test_a_forward_that_uses_a_weight_once_more_changes_nothing() -> None:
    """To regularise it, say; what it is behind the network is no part of the network."""
    model, x = net_of(Form()), images_of(Form(), 40)
    first = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))

    def forward(net: nn.Module, batch: Any) -> Tensor:
        weight: Any = net.get_submodule(first).weight
        return net(batch[0]).sum() + F.conv2d(weight, weight).sum()

    mended, done = refitted(model, [(x,)], x[:1], forward=forward)
    twin, same = refitted(model, [(x,)], x[:1])
    assert first in done and done == same
    assert_same_weights(twin, mended)


def test_batches_with_names_beside_tensors() -> None:
    """Lists of names, nested ones too, are joined and cut with the images; the refit is that of the images alone."""
    model, x = net_of(Form()), images_of(Form(), 50)
    labels, names = torch.arange(50), [f"image {i}" for i in range(50)]
    batches = [
        {"x": x[i : i + 15], "of": {"name": names[i : i + 15], "split": "train"}, "y": (labels[i : i + 15], 1.0)}
        for i in range(0, 50, 15)
    ]
    seen = []

    def forward(net: nn.Module, batch: Any) -> Tensor:
        seen.append((batch["of"], batch["y"][0].tolist(), batch["y"][1]))
        return net(batch["x"])

    mended, done = refitted(model, batches, x[:1], forward=forward)
    twin, same = refitted(model, [(x[:40],)], x[:1])
    assert done == same
    assert_same_weights(twin, mended)
    assert seen == [({"name": names[:40], "split": "train"}, list(range(40)), 1.0)] * 2


def test_batches_that_cannot_be_joined() -> None:
    model, x = net_of(Form()), images_of(Form(), 10)
    for other in (images_of(Form(), 10, side=7), {"x": x}):
        with pytest.raises(DataError, match="batches of one shape"):
            refitted(model, [(x,), (other,)], x[:1])
    with pytest.raises(DataError, match="empty"):
        refitted(model, [("no tensor",)], x[:1])
