"""What B2 asks beside its contenders, one thing changed at a time: widths, ranks and repairs apart from each other.

Their rows are made where `fine_tune.py --only` names them, and count for none of its targets.
"""

from __future__ import annotations

from uniform_widths import Uniform, di_losses, norms

from diplugin.contenders import Compress, Contender, drop_in
from diplugin.ranking import BY_ENERGY_AND_NORMS, ByAll, ByBoth
from diplugin.recovery import Recalibrate, Reconstruct
from diplugin.recovery.reconstruction import Reconstruction
from diplugin.strategies import MeasuredCuts, OneShot

#: DI's order of channels before it heard the filters' norms.
WITHOUT_NORMS = ByBoth()


def variants() -> list[Contender]:
    measured = Compress("DI, measured cuts", measured=MeasuredCuts(), tell=print)
    return [*uniform(), *without_norms(), *orders(), *repairs(), measured]


def uniform() -> list[Contender]:
    """Uniform widths and the refit of `compress`, for the largest filters and for the channels it would keep."""
    return [Uniform("L2, uniform, reconstructed", norms), Uniform("DI, uniform, reconstructed", di_losses)]


def without_norms() -> list[Contender]:
    """Channels ranked by loss and energy alone."""
    before = OneShot(ranking=WITHOUT_NORMS)
    return [
        drop_in("DI without norms, local", False, ranking=WITHOUT_NORMS),
        drop_in("DI without norms, global", True, ranking=WITHOUT_NORMS),
        Compress("DI without norms, compress", before),
        Compress("DI without norms, measured cuts", before, measured=MeasuredCuts(), tell=print),
    ]


def orders() -> list[Contender]:
    """The drop-in in other orders: at uniform widths, where the order is all that it has to say, and at DI's own."""
    kinds = {"norms twice": ByAll(weight=2.0), "energy and norms": BY_ENERGY_AND_NORMS}
    scopes = {"local": False, "global": True}
    return [
        drop_in(f"DI by {name}, {scope}", everywhere, ranking=kind)
        for name, kind in kinds.items()
        for scope, everywhere in scopes.items()
    ]


def repairs() -> list[Contender]:
    """The plan of `compress`, recalibrated only, refitted, and refitted with present weights held more firmly."""
    held = {f"refitted, ridge {ridge:g}": Reconstruct(Reconstruction(ridge=ridge)) for ridge in (0.1, 1.0)}
    kinds = {"recalibrated": Recalibrate(), "refitted": Reconstruct(), **held}
    return [Compress(f"DI, {name}", OneShot(repairs=(kind,))) for name, kind in kinds.items()]
