"""Runs the proof cases with the operators of one backend, a line each.

    python -m tests.proof --backend cuda --device cuda
    compute-sanitizer --tool racecheck python -m tests.proof --backend cuda --device cuda --small

Without a test runner around them: a tool that watches every instruction then sees little else.
"""

from __future__ import annotations

import argparse
import sys

from .collection import NAMESPACES, collect, operators
from .device import OnDevice


def main() -> int:
    """Run the command line; 1 where a case failed."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tests.proof",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", choices=[*NAMESPACES, "emulated"], required=True)
    parser.add_argument("--device", default="cpu", help="where tensors go; default: cpu")
    parser.add_argument("--small", action="store_true", help="only the cheap cases")
    parser.add_argument("--match", default="", help="only cases with this in their name")
    arguments = parser.parse_args()
    try:
        on_device = OnDevice(operators(arguments.backend), arguments.device)
    except RuntimeError as error:
        parser.error(str(error))
    cases = [case for case in collect(arguments.small) if arguments.match in case.name]
    failed = 0
    for case in cases:
        try:
            print(f"ok {case.run(on_device):.1e}  {case.name}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED  {case.name}: {error}", flush=True)
    print(f"{len(cases) - failed} of {len(cases)} cases are right")
    return int(failed > 0 or not cases)


if __name__ == "__main__":
    sys.exit(main())
