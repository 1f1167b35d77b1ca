"""Modes come back module by module, whatever happens in between."""

from __future__ import annotations

import pytest
from torch import nn

from diplugin.modes import evaluating, modes_kept


def mixed() -> nn.Sequential:
    """Training, with a BatchNorm that is frozen and a Dropout that is not."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).train()
    net[1].eval()
    return net


def test_eval_inside_and_every_module_as_before_outside() -> None:
    net = mixed()
    with evaluating(net):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net] == [True, False, True]


def test_an_error_changes_nothing_about_it() -> None:
    net = mixed()
    with pytest.raises(ValueError, match="no"), modes_kept(net):
        net.eval()
        raise ValueError("no")
    assert net.training and [module.training for module in net] == [True, False, True]
