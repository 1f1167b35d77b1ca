"""`diplugin score`: how much label information every channel of a model carries."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..whole_files import check_writable, write_text
from .common import add_data, add_model, data_of, model_of, positive

if TYPE_CHECKING:
    from ..features import ScoreProfile
    from ..network import NetworkTrace
    from ..scoring import GroupScores


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("score", help="print DI per channel group")
    add_model(parser)
    add_data(parser)
    parser.add_argument("--rho", type=float, default=10.0, help="relative ridge of DI (default 10)")
    parser.add_argument("--images", type=positive, help="training images scored (default 2000, or all that it takes)")
    parser.add_argument(
        "--until-stable", type=float, nargs="?", const=0.98, metavar="R",
        help="stop once the ranking would correlate by R (default .98) with that of fresh images",
    )  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="show time and memory of scoring, layer by layer")
    parser.add_argument("--device", default="cpu", help="where the model runs: cpu, cuda, cuda:1 (default cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every channel's score")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..team import one_voice

    if args.json:
        check_writable(args.json)
    with one_voice() as team:
        trace, scores, profile = _score(args)
    if team.rank == 0:
        _print_scores(trace, scores, profile)
        if args.profile:
            _print_profile(profile)
        if args.json:
            data = {"di": dict(scores.di), "scores": {n: v.tolist() for n, v in scores.scores.items()},
                    "rho": scores.rho, "images": scores.images, "reliability": profile.reliability}  # fmt: skip
            write_text(args.json, json.dumps(data, indent=1))
    return 0


def _score(args: argparse.Namespace) -> tuple[NetworkTrace, GroupScores, ScoreProfile]:
    from ..features import ScoreProfile, UntilStable, first_images, move_to
    from ..holdout import split_holdout
    from ..network import trace_network
    from ..scoring import score_groups

    until = None if args.until_stable is None else UntilStable(args.until_stable)
    model, inputs = model_of(args)
    loader = split_holdout(data_of(args).train).scoring
    trace = trace_network(model, inputs)
    if args.images or until is None:
        loader = first_images(loader, args.images or 2000)
    move_to(model, args.device)
    profile = ScoreProfile()
    return trace, score_groups(model, loader, trace.groups, rho=args.rho, until=until, profile=profile), profile


def _print_scores(trace: NetworkTrace, scores: GroupScores, profile: ScoreProfile) -> None:
    for group in trace.groups:
        if group.prunable:
            values = scores.scores[group.name]
            print(f"{group.name:40s} {group.channels:5d} channels  DI {scores.di[group.name]:.4f}  "
                  f"score per channel {values.min():.2e} to {values.max():.2e}")  # fmt: skip
        else:
            print(f"{group.name:40s} {group.channels:5d} channels  left alone: {group.note}")
    print(f"{scores.images} images: the ranking would correlate by {profile.reliability:.3f} with that of others")


def _print_profile(profile: ScoreProfile) -> None:
    print(f"\n{'tensor':44s} {'shape':>24s} {'MB':>8s} {'ms a chunk':>11s} {'share':>6s}")
    for layer in profile.layers:
        name = f"{layer.point.layer} ({layer.point.side})"
        share = layer.seconds / profile.total_seconds
        print(f"{name:44s} {' x '.join(map(str, layer.shape)):>24s} {layer.map_mb:8.1f} "
              f"{1000 * layer.seconds / layer.calls:11.1f} {share:6.1%}")  # fmt: skip
    print(f"scoring took {profile.scoring_seconds:.2f} s of {profile.total_seconds:.2f} s, data included: "
          f"{profile.ratio:.2f} times the pass without")  # fmt: skip
