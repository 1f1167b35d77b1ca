"""An NNI experiment that looks for the most accurate network within a latency measured on this machine.

    python examples/nni_experiment.py --trials 20 --port 8080      # http://localhost:8080 shows it at work

Each trial sets how deep every stage is cut, what share of the cut the greedy search may choose, and DI's rho; the
absolute depth follows from the latency table, so every trial meets the budget and is judged by its accuracy on a
holdout. The folder ends with `pareto.png`, `outcomes.json` and `best/`, which `diplugin.load_pruned` reads. A run that
was stopped goes on with `--resume ID`; `--trials` counts those it had.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from digits import EXAMPLE, DigitNet, accuracy, loaders, train, trained_net
from safetensors.torch import save_file

from diplugin import Budget, LatencyTable, PruningPlan, apply_plan, score_groups, trace_network
from diplugin.costs import macs, params
from diplugin.costs.latency import LatencyCost
from diplugin.latency import profile_here
from diplugin.recovery import recalibrate_batchnorm
from diplugin.strategies.pareto import Outcome, best_outcome, pareto_picture
from diplugin.strategies.staged import StagedCut, staged_plan, stages_of
from diplugin.surgery import load_weights, read_weights, save_pruned


def carve(folder: Path, cut: StagedCut, fraction: float) -> tuple[DigitNet, PruningPlan]:
    """The trained network of the folder, cut to the latency budget."""
    model = DigitNet()
    load_weights(model, read_weights(folder / "base.safetensors"), "base.safetensors")
    train_loader, _, _ = loaders()
    trace = trace_network(model, (EXAMPLE,))
    scores = score_groups(model, train_loader, trace.groups, rho=cut.rho).scores
    costs = [macs(trace), params(trace), LatencyCost(trace, LatencyTable.load(folder / "table.json"))]
    plan = staged_plan(trace, scores, costs, Budget("latency_ms", fraction=fraction), cut)
    apply_plan(model, plan)
    recalibrate_batchnorm(model, train_loader)
    return model, plan


def trial(folder: Path, fraction: float) -> None:
    """What NNI runs: cut as told, train a little, report on the way."""
    from diplugin_nni_search import report, trial_cut

    model, plan = carve(folder, trial_cut(), fraction)
    train_loader, holdout, _ = loaders()
    report(accuracy(model, holdout))
    train(model, train_loader, epochs=2, lr=0.02)
    report(accuracy(model, holdout), plan.costs["latency_ms"].predicted)


def prepare(folder: Path) -> DigitNet:
    """The trained network; it and a latency table of this machine are made unless the folder has them."""
    train_loader, _, _ = loaders()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base.safetensors").exists():
        model = trained_net(train_loader)
        save_file(model.state_dict(), folder / "base.safetensors")
    model = DigitNet()
    load_weights(model, read_weights(folder / "base.safetensors"), "base.safetensors")
    if not (folder / "table.json").exists():
        profile_here(model, (EXAMPLE,), budget_s=5, points=4, nets=10, out=folder / "table.json")
    return model


def search(args: argparse.Namespace) -> None:
    """Run the experiment, then keep its best network."""
    from diplugin_nni_search import cut_from, run_experiment, search_space

    folder = args.folder
    unpruned = prepare(folder)
    train_loader, holdout, test_loader = loaders()
    trace = trace_network(DigitNet(), (EXAMPLE,))
    carve(folder, StagedCut((1.0,) * len(stages_of(trace))), args.latency)  # a budget out of reach is said here
    script = [sys.executable, str(Path(__file__).resolve()), "--folder", str(folder.resolve()), "--trial"]
    command = shlex.join([*script, "--latency", str(args.latency)])
    outcomes = run_experiment(command, search_space(trace), folder, trials=args.trials, tuner=args.tuner,
                              concurrency=args.concurrency, port=args.port, resume=args.resume)  # fmt: skip
    latency = LatencyCost(trace, LatencyTable.load(folder / "table.json")).base
    base = Outcome("unpruned", accuracy(unpruned, holdout), latency)
    pareto_picture(outcomes, folder / "pareto.png", "latency, ms", base)
    (folder / "outcomes.json").write_text(json.dumps([vars(o) for o in outcomes], indent=1))
    best = best_outcome(outcomes, limit=args.latency * latency)
    model, plan = carve(folder, cut_from(best.parameters), args.latency)
    train(model, train_loader, epochs=2, lr=0.02)
    save_pruned(model, plan, folder / "best")
    print(f"test accuracy: unpruned {accuracy(unpruned, test_loader):.1%} at {latency:.3f} ms, best of {len(outcomes)} "
          f"trials {accuracy(model, test_loader):.1%} at {best.cost:.3f} ms; see {folder / 'pareto.png'}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Search staged cuts of a small network under a measured latency.")
    parser.add_argument("--folder", type=Path, default=Path("runs/nni-experiment"))
    parser.add_argument("--latency", type=float, default=0.7, help="fraction of the unpruned latency")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--tuner", default="TPE", help="TPE, Random or Evolution")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--resume", help="id of a stopped experiment of the folder")
    parser.add_argument("--trial", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trial:
        trial(args.folder, args.latency)
    else:
        search(args)


if __name__ == "__main__":
    main()
