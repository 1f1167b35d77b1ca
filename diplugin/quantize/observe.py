"""One pass over calibration images: all that rounding and bit allocation need to know of every layer.

Kept per layer and independent of the number of images: the second moment and mean of its inputs (of the patches, for a
convolution), a sample of input values for the 8-bit grid, and the *label images* Zᵀx. Z = (K + ρI)⁻¹Y is the solution
of the layer's Discriminant Information problem; a layer is linear in its input, so what an error ΔW of its weights does
to the label information of its output, EᵀZ, is the layer with weights ΔW applied to those L images: no feature map and
no perturbed map is kept, whatever the number of bit widths.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..discriminant import label_targets
from ..errors import DataError, ModelError
from ..features import CHUNK_SIZE, Forward, GetLabels, chunks, device_of, to_device
from ..layer_calls import LayerCall, set_call, watching_calls
from .fake import quantizable_layers

#: Inputs of an output channel beyond which their second moment is kept in diagonal blocks only.
BLOCK = 2304
#: Label images kept of a chunk: with more labels, the principal ones (their energies add up, so the strongest count).
LABEL_IMAGES = 32
_SAMPLES = 40_000
_PATCHES_PER_IMAGE = 96


@dataclass
class LayerStatistics:
    """What was seen of one layer; D inputs per output channel (in_channels / groups times kernel positions).

    Attributes:
        gram: float64 [G, B, D/B, D/B], sum of second moments of the inputs of each of G groups of channels; of a very
            wide layer only B diagonal blocks.
        mean: float64 [G, D], sum of inputs.
        call: how the layer uses its weight; `x` is empty.
        samples: float32, input values.
        label_images: float32 [chunks, L, ...], what its weight was multiplied with (padded, if the layer does that
            itself), projected on Z, scaled so that 2·‖call.of(label image, weight)‖², summed over labels and
            positions, is a DI score in fractions of label variance.
        macs: multiply-accumulates per output channel and image.
        patches: input vectors in the sums.
        repeated: whether one forward pass calls it more than once.
    """

    gram: Tensor
    mean: Tensor
    call: LayerCall
    samples: list[Tensor] = field(default_factory=list)
    label_images: list[Tensor] = field(default_factory=list)
    macs: float = 0.0
    patches: int = 0
    calls: int = 0
    repeated: bool = False


def observe(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    images: int,
    rho: float,
    get_labels: GetLabels,
    forward: Forward,
    seed: int = 0,
) -> dict[str, LayerStatistics]:
    """Statistics of every quantizable layer that runs, by name, in the order of their first call.

    Args:
        model: in eval mode, BatchNorm folded.
        loader: batches of calibration data; read until `images` images were seen.

    Raises:
        DataError: no calibration data.
        ModelError: activations that are not finite, or so large that their squares are not.
    """
    seen: dict[str, LayerStatistics] = {}
    generator = torch.Generator().manual_seed(seed)
    targets: list[Tensor] = []

    layers = quantizable_layers(model)

    def look(name: str, x: Tensor, output: Tensor, call: LayerCall | None) -> None:
        call = call or set_call(layers[name], x)
        _look(seen.setdefault(name, _empty(call)), x, output, call, targets[-1], rho, generator)

    count, device = 0, device_of(model)
    with torch.no_grad(), watching_calls(layers, look):
        for batch in chunks(loader, min(CHUNK_SIZE, images)):
            labels = get_labels(batch)
            targets.append(label_targets(labels))
            forward(model, to_device(batch, device))
            count += len(labels)
            for statistics in seen.values():
                statistics.repeated |= statistics.calls > len(targets)
            if count >= images:
                break
    if count < 2:
        raise DataError(f"expected calibration data to set activation ranges by, the loader gave {count} images")
    if not all(bool(torch.isfinite(statistics.gram).all()) for statistics in seen.values()):
        raise ModelError("expected activations whose squares are finite on the calibration data, they overflow")
    return seen


def _empty(call: LayerCall) -> LayerStatistics:
    width = call.weight[0].numel()
    blocks = next(b for b in range(1, width + 1) if width % b == 0 and width // b <= BLOCK)
    gram = torch.zeros(call.groups, blocks, width // blocks, width // blocks, dtype=torch.float64)
    mean = torch.zeros(call.groups, width, dtype=torch.float64)
    return LayerStatistics(gram, mean, replace(call, x=call.x.new_empty(0)))


def _look(
    statistics: LayerStatistics, x: Tensor, output: Tensor, call: LayerCall, targets: Tensor, rho: float,
    generator: torch.Generator,
) -> None:  # fmt: skip
    if not bool(torch.isfinite(x).all()):
        raise ModelError("expected finite activations on the calibration data, got NaN or infinity")
    statistics.calls += 1
    flat = x.flatten()
    picked = torch.randint(len(flat), (min(len(flat), _SAMPLES),), generator=generator)
    statistics.samples.append(torch.cat([flat[picked.to(flat.device)].cpu(), flat.aminmax().max[None].cpu()]))
    for part in call.x.split(50):
        patches = input_patches(call, part, generator)
        blocks = patches.unflatten(2, (statistics.gram.shape[1], -1))
        statistics.gram += torch.einsum("gpbi,gpbj->gbij", blocks, blocks).double().cpu()
        statistics.mean += patches.sum(1).double().cpu()
        statistics.patches += patches.shape[1]
    statistics.macs = output[0].numel() / call.weight.shape[0] * call.weight[0].numel()
    if len(call.x) == len(targets):  # a layer that sees something else than images tells nothing of labels here
        statistics.label_images.append(_label_images(call.x, output, targets, rho))


def input_patches(call: LayerCall, x: Tensor, generator: torch.Generator) -> Tensor:
    """Vectors that the call multiplies with the weight's rows: [G, P, D], a random few positions of each of its images.

    Args:
        x: some of the images that it reads.
    """
    if not call.kernel:
        return x.reshape(1, -1, x.shape[-1]).float()
    padded, kernel, stride, dilation = call.padded(x.float()), call.kernel, call.stride, call.dilation
    if len(kernel) == 1:
        padded, kernel, stride, dilation = padded[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    patches = F.unfold(padded, kernel, dilation=dilation, stride=stride)
    picked = torch.randperm(patches.shape[2], generator=generator)[:_PATCHES_PER_IMAGE].to(x.device)
    images, depth, _ = patches.shape
    grouped = patches[:, :, picked].reshape(images, call.groups, depth // call.groups, -1)
    return grouped.permute(1, 0, 3, 2).reshape(call.groups, -1, depth // call.groups)


def _label_images(x: Tensor, output: Tensor, targets: Tensor, rho: float) -> Tensor:
    flat = output.flatten(1).float()
    flat = flat - flat.mean(0)
    gram = (flat @ flat.T).double()
    ridge = float(rho * gram.trace() / len(gram))
    y = (targets / targets.norm()).to(gram)
    if ridge <= 0:
        return torch.zeros(1, *x.shape[1:])
    shifted = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(shifted, y) * ridge**0.5
    if solution.shape[1] > LABEL_IMAGES:
        left, strength, _ = torch.linalg.svd(solution, full_matrices=False)
        solution = (left * strength)[:, :LABEL_IMAGES]
    return torch.einsum("nl,n...->l...", solution.float(), x.float()).cpu()
