"""Discriminant Information as a pruner of NNI 3.0, and the way from NNI's masks to a smaller network.

`DIPruner` is an NNI `Pruner`: it takes NNI's config_list, runs alone or under `AGPPruner` and `LinearPruner`, chains
through `from_compressor`, and returns NNI's masks. What it adds to NNI's rules:

- Training, where there is an evaluator, only *samples* the data: the loss is tapped for batches, and when masks are
  due, DI is scored in eval mode over the sampled ones. No hook sits on the model while it trains.
- Layers that a shortcut sum ties together get one score, so at equal ratios their masks agree by themselves.
- BatchNorms and depthwise convolutions that pass on a masked layer's channels are masked along with it, which makes
  the masked model equal to the one that `speedup` cuts.
- Counts are exact, `max_sparse_ratio` holds in global groups too, and every layer keeps at least one channel.

DI's own settings stand in the constructor, since NNI's configuration schema is closed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from diplugin.errors import DataError, DipluginError, MissingExtraError, ModelError, UserError
from diplugin.features import (
    CHUNK_SIZE,
    Forward,
    GetLabels,
    Observation,
    chunks,
    device_of,
    first_images,
    images_in,
    labels_of,
    to_device,
)
from diplugin.groups import ChannelGroup
from diplugin.layer_scores import score_layers
from diplugin.masks import dead_channels, follower_masks, followers
from diplugin.network import trace_network
from diplugin.ranking import ByAll, Ranking, hand_out
from diplugin.samples import call_inputs, collect, forward_any, on_cpu
from diplugin.scoring import group_energies, group_norms
from diplugin.taps import Tap

try:
    from diplugin_nni_config import checked_config, config_list_for, follower_config, nni_errors
    from diplugin_nni_evaluator import check_count, check_sources, counted_steps, first_batch, torch_evaluator
    from diplugin_nni_speedup import as_tuple, speedup, unwrap
    from diplugin_nni_targets import (
        TRANSPOSED,
        Targets,
        Tensors,
        active,
        align,
        channels_of,
        check_targets,
        choose,
        decides_itself,
        follower_shape,
        metric_of,
        side_of,
        warn_of_fast_path,
    )  # fmt: skip
    from nni.compression.base.compressor import Compressor, Pruner
    from nni.compression.base.config import select_modules_by_config
    from nni.compression.base.target_space import PruningTargetSpace
    from nni.compression.utils import Evaluator
except ImportError as error:
    raise MissingExtraError(
        f"expected NNI 3.0 for DIPruner, got {type(error).__name__}: {error}; "
        'pip install "diplugin[nni]" (x86-64 Linux)'
    ) from error

__all__ = ["DIPruner", "config_list_for", "speedup", "torch_evaluator"]

MAX_SAMPLES = 2000


class DIPruner(Pruner):
    """Prunes channels by Discriminant Information, by NNI's rules.

    Args:
        model: unwrapped, or wrapped by an earlier compressor through `from_compressor`.
        config_list: NNI's; `sparse_ratio` or `sparse_threshold`, `global_group_id`, `dependency_group_id`,
            `internal_metric_block`, `align`, `min_sparse_ratio`, `max_sparse_ratio`, every granularity. Blocks finer
            than a channel share its score by their weights' energy.
        evaluator: one of NNI's; needed for training-time pruning, not if `calibration_data` is given. NNI's own for
            Transformers runs on releases up to 4.30.
        training_steps: optimizer steps whose batches are sampled before masks are made.
        calibration_data: a loader of (inputs, labels), scored in eval mode; no optimizer is needed.
        existed_wrappers: for `from_compressor`.
        rho: ridge relative to the mean energy of an image.
        tap: which tensors stand for a layer, see `diplugin.taps`.
        ranking: which channels of a layer leave first, while DI's losses compare layers, see `diplugin.ranking`.
        get_labels, forward: `get_labels(batch)` and `forward(model, batch)` for batches of other forms.
        align_followers: mask BatchNorms and depthwise convolutions along with the layers they follow.
        max_samples: images kept for scoring, on the CPU; bounds memory.
        example_inputs: positional inputs (or one tensor) to find channel groups with; None takes them from the
            calibration data, the evaluator's `dummy_input`, or one look at the evaluator's first batch.

    Raises:
        UserError: a config_list, evaluator or setting that cannot be used.
        DataError: batches without labels, or of a form that needs `get_labels`.

    >>> config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    >>> _, masks = DIPruner(model, config, calibration_data=loader).compress()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        training_steps: int | None = None,
        calibration_data: Iterable[Any] | None = None,
        existed_wrappers: dict[str, Any] | None = None,
        *,
        rho: float = 10.0,
        tap: Tap | None = None,
        ranking: Ranking | None = None,
        get_labels: GetLabels | None = None,
        forward: Forward | None = None,
        align_followers: bool = True,
        max_samples: int = MAX_SAMPLES,
        example_inputs: tuple[Any, ...] | Tensor | None = None,
    ) -> None:
        check_sources(evaluator, training_steps, calibration_data)
        check_count("max_samples", max_samples)
        self.tap, self.ranking, self.max_samples = tap, ranking or ByAll(), max_samples
        self.observation = Observation(get_labels or labels_of, forward or forward_any, _positive("rho", rho))
        self._calibration = None if calibration_data is None else collect(calibration_data, max_samples)
        self._sampled: list[Any] = []
        checked = checked_config(model, config_list)
        if evaluator is not None and not evaluator._initialization_complete:
            with nni_errors("an evaluator whose optimizers are traced with nni.trace"):
                evaluator._init_optimizer_helpers(model)
        inputs = self._example_inputs(model, evaluator) if example_inputs is None else as_tuple(example_inputs)
        self._groups = _groups_of(model, inputs)
        self._followers = self._followers_of(model, checked, existed_wrappers or {}) if align_followers else ()
        checked += [
            follower_config(name, model.get_submodule(name)) for name in self._followers
            if not getattr((existed_wrappers or {}).get(name), "pruning_target_spaces", None)
        ]  # fmt: skip
        try:
            with nni_errors("a config_list that NNI can apply to this model"):
                super().__init__(model, checked, evaluator, existed_wrappers)
            check_targets(self._target_spaces)
        except UserError:
            unwrap(model)
            raise
        warn_of_fast_path(model, self._target_spaces)
        # Read by AGPPruner and LinearPruner, which set both.
        self.training_steps = training_steps or 1
        self.interval_steps = self.training_steps
        self.total_times: int | str = 1
        self._current_step = self._remaining_times = 0

    @classmethod
    def from_compressor(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, compressor: Compressor, new_config_list: list[dict[str, Any]], *args: Any,
        evaluator: Evaluator | None = None, **kwargs: Any,
    ) -> DIPruner:  # fmt: skip
        """A DIPruner on top of an earlier compressor: its wrappers, masks and evaluator stay in force.

        Args:
            kwargs: `training_steps`, `calibration_data` and DI's settings, as in the constructor.
        """
        try:
            return super().from_compressor(compressor, new_config_list, *args, evaluator=evaluator, **kwargs)
        except DipluginError:
            if not compressor._is_wrapped:
                compressor.wrap_model()
            raise

    def compress(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, Tensors]:
        """The wrapped model with its masks in force, and the masks.

        Args:
            max_steps, max_epochs: how long to train; None trains `training_steps`. Not for calibration alone.

        Raises:
            DataError, ModelError: as scoring raises them.
        """
        if self._calibration is not None and (self.evaluator is None or max_steps is max_epochs is None):
            if max_steps is not None or max_epochs is not None:
                raise UserError("expected no max_steps or max_epochs for one-shot pruning, training needs an evaluator")
            self.update_masks(self.generate_masks())
        else:
            untold = max_steps is None and max_epochs is None
            self._fusion_compress(self.training_steps if untold else max_steps, max_epochs)
        return self.bound_model, self.get_masks()

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        self._fusion_compress(max_steps or self.training_steps, max_epochs)

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        modes = {module: module.training for module in self.bound_model.modules()}
        try:
            with counted_steps(self.evaluator):
                super()._fusion_compress(max_steps, max_epochs)
        except BaseException:
            # NNI leaves the evaluator patched and the model bound when training raises.
            if self.evaluator is not None and getattr(self.evaluator, "model", None) is not None:
                self.evaluator.unbind_model()
            for module, training in modes.items():
                module.training = training
            raise

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        self._current_step, self._sampled = 0, []
        self._remaining_times = -1 if self.total_times == "unlimited" else int(self.total_times)
        if self._calibration is None:
            evaluator.patch_loss(self._sample)
        evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[self._after_step])

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        self._sampled = []
        if self.total_times == "unlimited" or not self._remaining_times:
            return
        total, done = int(self.total_times), int(self.total_times) - self._remaining_times
        if not done:
            raise UserError(
                f"expected training of at least {self.interval_steps} optimizer steps before masks are made, "
                f"it took {self._current_step}: does training_func call training_step and loop until max_steps?"
            )
        warnings.warn(
            f"masks were made {done} of {total} times: the schedule needs at least {total * self.interval_steps} "
            f"optimizer steps, it took {done * self.interval_steps + self._current_step}", stacklevel=2,
        )  # fmt: skip

    def _sample(self, loss: Tensor, batch: Any) -> Tensor:
        """Keep the batches of the last `training_steps` steps of an interval, up to the cap."""
        recent = self._current_step >= self.interval_steps - self.training_steps
        if recent and self._remaining_times and sum(map(images_in, self._sampled)) < self.max_samples:
            self.observation.get_labels(batch)
            self._sampled.append(on_cpu(batch))
        return loss

    def _after_step(self) -> None:
        self._current_step += 1
        # At the interval's end, where a scheduler has just set its new goal: earlier, its last goal is never met.
        if self._current_step >= self.interval_steps and self._remaining_times:
            self.update_masks(self.generate_masks())
            self._remaining_times -= 1
            self._current_step, self._sampled = 0, []

    def _example_inputs(self, model: nn.Module, evaluator: Evaluator | None) -> tuple[Any, ...] | None:
        if self._calibration is not None:
            return call_inputs(model, self._calibration[0], self.observation)
        dummy = getattr(evaluator, "dummy_input", None)
        if dummy is not None:
            return as_tuple(dummy)
        batch = first_batch(model, evaluator) if evaluator is not None else None
        return None if batch is None else call_inputs(model, batch, self.observation)

    def _followers_of(
        self, model: nn.Module, checked: list[dict[str, Any]], earlier: Mapping[str, Any]
    ) -> tuple[str, ...]:
        configured = {name for config in checked for name in select_modules_by_config(model, config)[0]}
        return tuple(n for n in followers(self._groups, configured) if not decides_itself(earlier.get(n)))

    def _set_default_sparse_granularity(self, target_space: PruningTargetSpace) -> list[int] | str | None:
        # A transposed convolution holds its output channels in the weight's second dimension.
        wrapper: Any = target_space._wrapper
        if not (isinstance(wrapper.module, TRANSPOSED) and target_space._target_name == "weight"):
            return super()._set_default_sparse_granularity(target_space)
        if "bias" in wrapper.pruning_target_spaces:
            wrapper.pruning_target_spaces["bias"]._setting.get("align", {}).update(dims=[1])
        return "in_channel"

    def _collect_data(self) -> Tensors:
        sides = {(m, target): side_of(m, target, space) for m, target, space in active(self._target_spaces)}
        batches = self._calibration if self._calibration is not None else self._sampled
        if not batches:
            raise DataError("expected batches to score, training_func called no training_step")
        wanted = list(dict.fromkeys(sides.values()))
        rank = self._rank_by(batches)
        scores = score_layers(self.bound_model, batches, wanted, self._groups, self.tap, self.observation, rank)
        data: Tensors = {}
        for (module, target), side in sides.items():
            data.setdefault(module, {})[target] = scores[side]
        return data

    def _rank_by(self, batches: list[Any]) -> Callable[[ChannelGroup, Tensor], Tensor]:
        model, forward = self.bound_model, self.observation.forward

        @cache
        def measured() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            """Energies and norms: asked for once DI is known, so on batches and under masks that were run before."""
            batch = to_device(next(iter(chunks(first_images(batches, CHUNK_SIZE)))), device_of(model))
            return group_energies(model, batch, self._groups, forward), group_norms(model, self._groups)

        def rank(group: ChannelGroup, losses: Tensor) -> Tensor:
            energies, norms = measured()
            values = self.ranking(losses, energies.get(group.name), norms.get(group.name))
            return hand_out(losses, values, group.blocks)

        return rank

    def _calculate_metrics(self, data: Tensors) -> Tensors:
        spaces = self._target_spaces
        return {m: {t: metric_of(s, spaces[m][t], t) for t, s in found.items()} for m, found in data.items()}

    def _generate_sparsity(self, metrics: Tensors) -> Tensors:
        masks = choose(self._target_spaces, metrics)
        own = {module: spaces for module, spaces in self._target_spaces.items() if module not in self._followers}
        align(own, masks, self.get_masks())
        self._follow(masks)
        return masks

    def _follow(self, masks: Tensors) -> None:
        """Masks of the layers that pass on channels nobody writes or reads any more."""
        modules = dict(self.bound_model.named_modules())
        known = {m: {**targets, **masks.get(m, {})} for m, targets in self.get_masks().items()}
        # Not `_target_spaces`: those of an earlier compressor's followers stand in the wrappers alone.
        spaces: Targets = {m: self._module_wrappers[m].pruning_target_spaces for m in self._followers}
        widths = {m: channels_of(modules[m]) for m in spaces}
        for module, keep in follower_masks(self._groups, dead_channels(modules, known), widths).items():
            shaped = {target: follower_shape(keep, space, target) for target, space in spaces[module].items()}
            masks.setdefault(module, {}).update({t: mask for t, mask in shaped.items() if mask is not None})


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise UserError(f"expected {name} above 0 and finite, got {value!r}")
    return float(value)


def _groups_of(model: nn.Module, inputs: tuple[Any, ...] | None) -> tuple[ChannelGroup, ...]:
    """The network's channel groups; none, with a warning, where it cannot be traced."""
    try:
        if inputs is None:
            raise ModelError("no positional example inputs are known; pass example_inputs=")
        return trace_network(model, to_device(inputs, device_of(model))).groups
    except ModelError as error:
        warnings.warn(f"every layer is scored by itself and BatchNorms are not masked along: {error}", stacklevel=3)
        return ()
