"""The same scores inside a forward hook: no copy of the maps, nothing kept but an N×N matrix.

DI is defined over chunks of images (its ridge and its value depend on their number), and the scores of a data set are
the average over its chunks. For one chunk the maps F are read twice: once for the Gram matrix FFᵀ, uncentred, since
centring the small matrix from both sides gives the same K; once for FᵀZ, where Z sums to zero over the images, so the
mean of F cancels by itself. Products run in float32 over blocks of columns, sums and the factorisation in float64.
Where float32 would lose digits (maps whose mean dwarfs their variation, extreme scales) the chunk is computed by
`exact` instead; where the ridge is as small as the rounding of products, they too run in float64.

Large maps hold far more columns than an N×N matrix can tell apart: a `Sketch` takes the Gram matrix from a fixed,
evenly spread draw of columns, at which the ridge, ten times the mean energy, hardly notices; W is still read from every
position. (Averaging positions instead costs as much and misranks: neighbours of opposite sign cancel.)

‖FᵀZ‖² asks for ZZᵀ alone. With a thousand classes Z has a column for nearly every image, and most of the eigenvalues
of ZZᵀ, those of classes seen once, are nearly equal: the few directions that stand out are followed one by one, and
the others count with their mean through the norm of F, which costs one more look at the maps instead of a product as
large as the Gram matrix'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import DataError
from .exact import make_problem, problem_scores
from .targets import check_length, check_positive, unit_targets

#: Elements of the maps that enter one product: bounds the memory of conversions.
BLOCK_ELEMENTS = 1 << 23
#: Elements of a product FᵀZ that stay in a processor's cache until they are squared and summed: twice as fast.
PRODUCT_ELEMENTS = 1 << 18
#: The same on a GPU, which rather waits for each product to begin.
GPU_PRODUCT_ELEMENTS = 1 << 24
#: From so many columns an image on, following fewer directions saves more than finding them costs.
WORTH_EIGENVECTORS = 32
#: Where centring removes all but this share of the energy, float32 products no longer hold enough digits.
MIN_VARIATION = 1e-3
#: Of a ridge below this share of the energy, rounding in float32 takes more than a thousandth.
MIN_RIDGE = 1e-5
#: Energies outside this range have over- or underflowed in float32.
ENERGY_RANGE = (1e-25, 1e30)


@dataclass(frozen=True)
class Sketch:
    """How much of a large map is read.

    Attributes:
        columns: at most so many columns of [N, D] enter the Gram matrix; maps with fewer are exact. None: all.
        directions: at most so many directions of the targets are followed one by one (classes that do not occur in the
            chunk have none); of more, those are that stand out, and the rest count alike. None: all, as on a GPU.

    Against exact scores (`benchmarks/scoring_cost.py --data`: real images on ResNet-50, and on EfficientNet-Lite0 with
    ImageNet weights) the rank correlation is ≥ .999 in every layer with ten classes, ≥ .996 with a thousand logits.
    """

    columns: int | None = 12288
    directions: int | None = 32


#: Every column, every position.
EXACT = Sketch(None, None)


@dataclass(frozen=True)
class ChunkScores:
    """First-order scores of one tensor on one chunk: `scores` float64 [C], on the CPU, and `di` in fractions of label
    variance, `ridge` the absolute ρ used, `images` the size of the chunk."""

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
    features: Tensor,
    targets: Tensor,
    rho: float = 10.0,
    ridge: float | None = None,
    channel_dim: int = 1,
    sketch: Sketch = Sketch(),
) -> ChunkScores:
    """Scores 2ρ‖W_c‖²/‖Y‖² of one chunk of feature maps, without a copy of them.

    Args:
        features: [N, ...] with the channels in `channel_dim`, in any floating dtype and dense memory format.
        targets: centred targets [N, L] of these images, from `label_targets`.
        rho, ridge: as in `discriminant_information`.
        channel_dim: 1 for maps, −1 for tokens [N, T, C].
        sketch: how much of large maps is read; `EXACT` for all of them.

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
    maps = _flat_maps(features, channel_dim)
    if features.dtype != torch.float64 and maps.flat.shape[1] > len(features):
        for tried in dict.fromkeys((sketch, EXACT)):  # a draw may miss the few columns that vary
            fast = _fast_scores(maps, targets, rho, ridge, tried)
            if fast is not None:
                return fast
    problem = make_problem(features.movedim(channel_dim, 1), targets, rho, ridge)
    scores, di = problem_scores(problem)
    return ChunkScores(scores.cpu(), di, problem.ridge * problem.scale * problem.scale, len(features))


@dataclass(frozen=True)
class _Maps:
    """Maps as a view [N, before, channels, after] in the order of memory."""

    view: Tensor

    @property
    def flat(self) -> Tensor:
        return self.view.flatten(1)

    @property
    def squares(self) -> Tensor:
        """‖F_c‖² of every channel, float64 [C]."""
        view = self.view[:, 0] if self.view.shape[1] == 1 else self.view
        norms = torch.linalg.vector_norm(view, dim=[d for d in range(1, view.ndim) if d != view.ndim - 2],
                                         dtype=torch.float32)  # fmt: skip
        return norms.double().square_().sum(0)


def _flat_maps(features: Tensor, channel_dim: int) -> _Maps:
    channel_dim %= features.ndim
    if channel_dim == 0:
        raise DataError("channel_dim 0 is the images' dimension: name the channels' one")
    order = sorted(range(1, features.ndim), key=lambda dim: -features.stride(dim))
    place = order.index(channel_dim)
    sizes = [features.shape[dim] for dim in order]
    split = math.prod(sizes[:place]), sizes[place], math.prod(sizes[place + 1 :])
    return _Maps(features.permute(0, *order).reshape(len(features), *split))


def _fast_scores(maps: _Maps, targets: Tensor, rho: float, ridge: float | None, sketch: Sketch) -> ChunkScores | None:
    """Scores by products over blocks of columns, or None where those would not hold enough digits.

    What is N×N lives on the CPU: a GPU takes longer for matrices so small, and every look at a number waits for it.
    """
    images, dtype = len(maps.view), torch.float32
    gram, raw_energy, share = _centred_gram(maps.flat, sketch.columns, dtype)
    energy = float(gram.diagonal().sum())
    if not (ENERGY_RANGE[0] < raw_energy < ENERGY_RANGE[1]) or energy < MIN_VARIATION * raw_energy:
        return None
    absolute = check_positive(rho, "rho") * energy / images if ridge is None else check_positive(ridge, "ridge") * share
    if absolute < MIN_RIDGE * energy:
        dtype = torch.float64
        gram, _, _ = _centred_gram(maps.flat, sketch.columns, dtype)
    targets = unit_targets(targets.cpu())
    shifted = gram + absolute * torch.eye(images, dtype=gram.dtype)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if int(failed):
        return None
    solution = torch.cholesky_solve(targets, factor)
    if dtype == torch.float64:  # so small a ridge lets the mean of F back in through rounding
        solution -= solution.mean(0)
    di = float((targets * (gram @ solution)).sum())
    # Scaled to order one, so that float32 holds it whatever the scale of the features.
    size = float(solution.abs().max())
    energies = _energies(maps, (solution / size).to(maps.view.device), sketch, dtype).cpu()
    # The sketched ridge is `share` of the whole one, and the solution 1/share of the whole one's.
    scores = energies.mul_(2 * absolute * size * size * share)
    return ChunkScores(scores, di, absolute / share, images) if bool(torch.isfinite(scores).all()) else None


def _centred_gram(flat: Tensor, columns: int | None, dtype: torch.dtype) -> tuple[Tensor, float, float]:
    """(K in float64 on the CPU from at most so many columns, the energy before centring, the share of columns)."""
    images, width = flat.shape
    share = 1.0
    if columns is not None and columns < width:
        flat, share = flat.index_select(1, _drawn(width, columns, flat.device)), columns / width
    gram = torch.zeros(images, images, dtype=torch.float64, device=flat.device)
    for block in flat.split(max(1, BLOCK_ELEMENTS // images), dim=1):
        part = block.to(dtype)
        gram += part @ part.T
    gram = gram.cpu()
    energy = float(gram.diagonal().sum())
    gram = gram - gram.mean(0)
    return gram - gram.mean(1, keepdim=True), energy, share


def _energies(maps: _Maps, solution: Tensor, sketch: Sketch, dtype: torch.dtype) -> Tensor:
    """‖F_cᵀZ‖² of every channel, float64 [C]; `solution` is Z [N, L]."""
    # Eigenvectors cost as much as the products of a small map, and more than those of any on a GPU.
    on_cpu = maps.view.device.type == "cpu"
    worth = on_cpu and maps.flat.shape[1] >= WORTH_EIGENVECTORS * len(solution)
    limit = sketch.directions if worth else None
    directions, weights, tail = _directions(solution, limit)
    directions, weights = directions.to(dtype), weights.to(dtype)
    width = max(256, (PRODUCT_ELEMENTS if on_cpu else GPU_PRODUCT_ELEMENTS) // len(directions))
    squares = [weights @ (directions @ block.to(dtype)).square_() for block in maps.flat.split(width, dim=1)]
    energies = torch.cat(squares).view(maps.view.shape[1:]).sum((0, 2), dtype=torch.float64)
    return energies if tail == 0 else energies.add_(maps.squares, alpha=tail).clamp_(min=0)


def _directions(solution: Tensor, limit: int | None) -> tuple[Tensor, Tensor, float]:
    """Directions [k, N], weights [k] and a tail with ‖FᵀZ‖² ≈ Σ w_j ‖Fᵀv_j‖² + tail · ‖F‖².

    Exact while Z has no more columns than the limit. Beyond it k = limit eigenvectors of ZZᵀ are kept, and the others
    count with their mean eigenvalue: the ones whose eigenvalues lie closest together.
    """
    images, columns = solution.shape
    if limit is None or columns <= limit or images <= limit + 2:
        return solution.T.contiguous(), solution.new_ones(columns), 0.0
    product = solution @ solution.T
    # Z sums to zero over the images: the direction of their mean has no weight, and is kept apart from the tail.
    mean = torch.full((images,), images**-0.5, dtype=product.dtype, device=product.device)
    values, vectors = torch.linalg.eigh(product + 2 * product.trace() * torch.outer(mean, mean))
    values, vectors = values[:-1], vectors[:, :-1]
    rest = images - 1 - (limit - 1)
    first = int(values.unfold(0, rest, 1).var(1).argmin())
    tail = float(values[first : first + rest].mean())
    kept = [*range(first), *range(first + rest, images - 1)]
    directions = torch.cat([mean[:, None], vectors[:, kept]], 1)
    weights = torch.cat([values.new_zeros(1), values[kept]]) - tail
    return directions.T.contiguous(), weights, tail


@lru_cache(maxsize=256)
def _drawn(length: int, count: int, device: torch.device) -> Tensor:
    """`count` of `length` places, one at random in every stretch of equal size: always the same ones."""
    generator = torch.Generator().manual_seed(length)
    stretch = length / count
    places = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) * stretch
    return places.long().clamp(max=length - 1).to(device)
