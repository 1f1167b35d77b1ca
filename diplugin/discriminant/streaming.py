"""The same scores inside a forward hook: no copy of the maps, nothing kept but an N×N matrix.

DI is defined over chunks of images (its ridge and its value depend on their number), and the scores of a data set are
the average over its chunks. For one chunk the maps F are read twice: once for the Gram matrix FFᵀ, uncentred, since
centring the small matrix from both sides gives the same K; once for FᵀZ, where Z sums to zero over the images, so the
mean of F cancels by itself. Products run in float32 over blocks of columns, sums and the factorisation in float64.
Where float32 would lose digits (maps whose mean dwarfs their variation, extreme scales) the chunk is computed by
`exact` instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diplugin.discriminant.exact import make_problem, problem_scores
from diplugin.discriminant.targets import check_length, check_positive, unit_targets
from diplugin.errors import DataError

#: Elements of the maps that one product covers: bounds the memory of conversions and of the product FᵀZ.
BLOCK_ELEMENTS = 1 << 23
#: Where centring removes all but this share of the energy, float32 products no longer hold enough digits.
MIN_VARIATION = 1e-3
#: Energies outside this range have over- or underflowed in float32.
ENERGY_RANGE = (1e-25, 1e30)


@dataclass(frozen=True)
class ChunkScores:
    """First-order scores of one tensor on one chunk: `scores` float64 [C] and `di` in fractions of label variance,
    `ridge` the absolute ρ used, `images` the size of the chunk."""

    scores: Tensor
    di: float
    ridge: float
    images: int


class ScoreAverage:
    """Average of chunk scores, weighted by images: the same whatever the order in which chunks arrive.

    >>> average = ScoreAverage()
    >>> average.add(ChunkScores(torch.tensor([1.0, 0.0], dtype=torch.float64), 0.5, 1.0, 250))
    >>> average.add(ChunkScores(torch.tensor([0.0, 0.0], dtype=torch.float64), 0.3, 3.0, 250))
    >>> average.result()
    ChunkScores(scores=tensor([0.5000, 0.0000], dtype=torch.float64), di=0.4, ridge=2.0, images=500)
    """

    def __init__(self) -> None:
        self._chunks: list[ChunkScores] = []

    def add(self, chunk: ChunkScores) -> None:
        """Take in the scores of one more chunk."""
        self._chunks.append(chunk)

    @property
    def images(self) -> int:
        """Images seen so far."""
        return sum(chunk.images for chunk in self._chunks)

    def result(self) -> ChunkScores:
        """The average; `images` is the total."""
        if not self._chunks:
            raise DataError("no chunk of images was scored: the loader yielded too few")
        total = self.images
        shares = [chunk.images / total for chunk in self._chunks]
        scores = torch.stack([share * chunk.scores for share, chunk in zip(shares, self._chunks, strict=True)]).sum(0)
        di = sum(share * chunk.di for share, chunk in zip(shares, self._chunks, strict=True))
        ridge = sum(share * chunk.ridge for share, chunk in zip(shares, self._chunks, strict=True))
        return ChunkScores(scores, di, ridge, total)


@torch.no_grad()
def chunk_scores(
    features: Tensor, targets: Tensor, rho: float = 10.0, ridge: float | None = None, channel_dim: int = 1
) -> ChunkScores:
    """Scores 2ρ‖W_c‖²/‖Y‖² of one chunk of feature maps, without a copy of them.

    Args:
        features: [N, ...] with the channels in `channel_dim`, in any floating dtype and dense memory format.
        targets: centred targets [N, L] of these images, from `label_targets`.
        rho, ridge: as in `discriminant_information`.
        channel_dim: 1 for maps, −1 for tokens [N, T, C].

    Raises:
        DataError: wrong shapes; NaN or infinity in the features.

    >>> x = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 1.0], [1.0, -1.0]])
    >>> from diplugin.discriminant import label_targets
    >>> chunk_scores(x, label_targets(torch.tensor([0, 0, 1, 1])), ridge=1.0).scores
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    if features.ndim < 2 or not features.is_floating_point():
        raise DataError(f"features are real maps [N, C, ...], got {list(features.shape)} of {features.dtype}")
    check_length(features, targets)
    features = features.detach()
    flat, shape = _flat_view(features, channel_dim)
    fast = None
    if features.dtype != torch.float64 and flat.shape[1] > flat.shape[0]:
        fast = _fast_scores(flat, targets, rho, ridge)
    if fast is None:
        problem = make_problem(features.movedim(channel_dim, 1), targets, rho, ridge)
        scores, di = problem_scores(problem)
        return ChunkScores(scores, di, problem.ridge * problem.scale * problem.scale, len(features))
    energy, di, absolute = fast
    return ChunkScores(energy.view(shape).sum((0, 2)), di, absolute, len(features))


def _flat_view(features: Tensor, channel_dim: int) -> tuple[Tensor, tuple[int, int, int]]:
    """The maps as [N, D] in the order of memory, and how D splits into (before, channels, after)."""
    channel_dim %= features.ndim
    if channel_dim == 0:
        raise DataError("channel_dim 0 is the images' dimension: name the channels' one")
    order = sorted(range(1, features.ndim), key=lambda dim: -features.stride(dim))
    place = order.index(channel_dim)
    sizes = [features.shape[dim] for dim in order]
    before = int(torch.Size(sizes[:place]).numel())
    after = int(torch.Size(sizes[place + 1 :]).numel())
    return features.permute(0, *order).flatten(1), (before, sizes[place], after)


def _fast_scores(flat: Tensor, targets: Tensor, rho: float, ridge: float | None) -> tuple[Tensor, float, float] | None:
    """(scores of every column [D], DI, ρ) by float32 products, or None where those would not hold enough digits."""
    images = len(flat)
    width = max(1, BLOCK_ELEMENTS // images)
    gram = torch.zeros(images, images, dtype=torch.float64, device=flat.device)
    for block in flat.split(width, dim=1):
        part = block.float()
        gram += part @ part.T
    raw_energy = float(gram.diagonal().sum())
    gram = gram - gram.mean(0)
    gram = gram - gram.mean(1, keepdim=True)
    energy = float(gram.diagonal().sum())
    if not (ENERGY_RANGE[0] < raw_energy < ENERGY_RANGE[1]) or energy < MIN_VARIATION * raw_energy:
        return None
    absolute = check_positive(rho, "rho") * energy / images if ridge is None else check_positive(ridge, "ridge")
    targets = unit_targets(targets.to(gram.device))
    shifted = gram + absolute * torch.eye(images, dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if int(failed):
        return None
    solution = torch.cholesky_solve(targets, factor)
    di = float((targets * (gram @ solution)).sum())
    # Scaled to order one, so that float32 holds it whatever the scale of the features.
    size = float(solution.abs().max())
    directions = (solution / size).T.float().contiguous()
    squares = [
        torch.einsum("ld,ld->d", product, product).double()
        for product in (directions @ block.float() for block in flat.split(width, dim=1))
    ]
    return torch.cat(squares).mul_(2 * absolute * size * size), di, absolute
