"""What `import diplugin` costs on top of torch, in fresh processes: CPU milliseconds, medians over rounds.

    python benchmarks/import_time.py [--rounds 5] [--json OUT]

`diplugin` names its public face lazily, so the second row is what a program pays that imports it and uses nothing; the
others are what the first use of a part brings with it; torch-pruning, which all that traces needs, is shown apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

TARGET_MS = 100.0
#: Row -> what is imported after torch.
ROWS = {
    "diplugin": "import diplugin",
    "torch_pruning": "import torch_pruning",
    "diplugin.compress, torch_pruning imported already": "import diplugin; diplugin.compress",
    "the command line's parser": "from diplugin.cli import build_parser; build_parser()",
}
BEFORE = {"diplugin.compress, torch_pruning imported already": "import torch_pruning"}
SCRIPT = """
import time, warnings
warnings.simplefilter("ignore")
import torch
{before}
started = time.process_time()
{after}
print(time.process_time() - started)
"""


def milliseconds(row: str) -> float:
    """CPU time of a row's import in a process of its own, after torch."""
    script = SCRIPT.format(before=BEFORE.get(row, "pass"), after=ROWS[row])
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return 1000 * float(out.split()[-1])


def torch_alone() -> float:
    script = "import time\nstarted = time.process_time()\nimport torch\nprint(time.process_time() - started)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return 1000 * float(out.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="cost of importing diplugin on top of torch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    seen: dict[str, list[float]] = {"torch": []} | {row: [] for row in ROWS}
    for _ in range(args.rounds):
        seen["torch"].append(torch_alone())
        for row in ROWS:
            seen[row].append(milliseconds(row))
    rows: list[dict[str, Any]] = [{"name": name, "ms": statistics.median(times)} for name, times in seen.items()]
    for row in rows:
        print(f"{row['name']:52s} {row['ms']:8.1f} ms")
    value = rows[1]["ms"]
    target = {"name": "import diplugin on top of torch, ms", "target": f"<= {TARGET_MS:g}", "value": round(value, 1),
              "met": value <= TARGET_MS}  # fmt: skip
    print(f"{target['name']:52s} {target['value']:8.1f} {target['target']} {'met' if target['met'] else 'NOT met'}")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "targets": [target]}, indent=1))


if __name__ == "__main__":
    main()
