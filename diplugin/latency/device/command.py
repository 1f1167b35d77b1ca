"""The command that a bundle is: `python3 bundle.pyz [--journal FILE] [--quiet]`, with its progress and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time

from .bundle import Bundle
from .errors import ProfileError
from .profiler import profile


def progress_line(stream):
    """Progress with the remaining time: in place on a terminal, else a line every ten per cent."""
    start, last = time.monotonic(), [-1, None]

    def show(done, total):
        with contextlib.suppress(OSError):  # nobody listens any more; measuring goes on
            tell(done, total)

    def tell(done, total):
        if last[1] is None:
            last[1] = done
        elapsed, fresh = time.monotonic() - start, done - last[1]
        left = f"{elapsed / fresh * (total - done):.0f} s left" if fresh else "starting"
        if stream.isatty():
            stream.write(f"\r{done}/{total}  {left}   ")
        elif done * 10 // max(total, 1) > last[0] or done == total:
            last[0] = done * 10 // max(total, 1)
            stream.write(f"{done}/{total} {left}\n")
        stream.flush()

    return show


def waiter(path, bundle, progress):
    """Shows the progress of the process that holds the journal."""

    def wait():
        if progress is not None and os.path.exists(path):
            with open(path, "rb") as file:
                progress(max(0, file.read().count(b"\n") - 1), len(bundle.plan["jobs"]))

    return wait


def main(argv=None):
    own = sys.argv[0]
    parser = argparse.ArgumentParser(prog=os.path.basename(own), description="Time this bundle's graphs here.")
    parser.add_argument("--bundle", default=own, help=argparse.SUPPRESS)
    parser.add_argument("--journal", help="where results go (default: the bundle's name with .jsonl)")
    parser.add_argument("--wait", action="store_true", help="wait for another process that writes the journal")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args(argv)
    journal = args.journal or os.path.splitext(os.path.basename(args.bundle))[0] + ".jsonl"
    try:
        bundle, progress = Bundle(args.bundle), None if args.quiet else progress_line(sys.stderr)
        done = profile(bundle, journal, progress, wait=waiter(journal, bundle, progress) if args.wait else None)
    except ProfileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    print(f"{len(done.rows)} rows in {journal}; bring it back and run 'diplugin profile finish'")
    return 0
