"""torchvision and timm through torch-pruning with DI: a third of the zoo, and the two examples."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from torchvision_models import import_timm

    try:
        import_timm()
    except ImportError as error:
        pytest.skip(f"needs torchvision and timm: {error}")


@pytest.mark.filterwarnings("ignore")
def test_a_third_of_the_zoo(capsys: pytest.CaptureFixture[str]) -> None:
    """Small ones of a dozen families: whatever passes with MagnitudeImportance passes with ours."""
    from zoo import main

    names = ("resnet18,mobilenet_v2,mobilenet_v3_small,efficientnet_b0,regnet_x_400mf,squeezenet1_1,googlenet,"
             "shufflenet_v2_x1_0,repvgg_a0,dla34,ghostnet_100,convnextv2_atto,legacy_seresnet18")  # fmt: skip
    assert main(["--only", names]) == 0
    assert "13 models" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_torch_pruning_resnet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.torch_pruning_resnet import main

    main(["--out", str(tmp_path / "run")])
    assert "same outputs" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_timm_vit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.timm_vit import main

    main(["--out", str(tmp_path / "run")])
    assert "same outputs" in capsys.readouterr().out
