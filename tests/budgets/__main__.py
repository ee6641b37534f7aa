"""Shows how far every compiled kernel is from its budget, or records budgets anew.

python -m tests.budgets             what the compiled kernels use, and what passes its budget
python -m tests.budgets --record    write tests/budgets/*.json from what they use now
"""

from __future__ import annotations

import argparse
import sys

from tests import budgets
from tests.emulation import triton_sass
from tests.emulation.sass import ToolsMissing, compile_all


def main() -> int:
    """Run the command line; 1 where a kernel passes its budget or may not be recorded."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tests.budgets",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--record", action="store_true", help="write the budgets anew")
    arguments = parser.parse_args()
    try:
        kernels = compile_all()
    except ToolsMissing as error:
        parser.error(str(error))
    launches = budgets.launches_of_cases()
    twins = triton_sass.compile_all(triton_sass.CAPABILITIES)
    launches.update(budgets.triton_launches(twins))
    kernels += twins
    if arguments.record:
        try:
            written = budgets.record(kernels, launches)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        print("written:", *(path.relative_to(budgets.FOLDER.parents[1]) for path in written))
        return 0
    bad = False
    for kernel in kernels:
        launched = launches.get(kernel.name, [])
        bounds = budgets.read(kernel.source).get(kernel.name, {}).get(f"sm_{kernel.architecture}")
        problems = budgets.breaches(kernel)
        problems += ["no budget"] if bounds is None else budgets.excesses(kernel, launched, bounds)
        bad = bad or bool(problems)
        print(
            f"{budgets.label(kernel)}: {kernel.registers} registers, {kernel.shared} + "
            f"{max((each.shared for each in launched), default=0)} bytes shared, "
            f"{budgets.blocks(kernel, launched)} blocks an SM"
            + "".join(f"\n    {problem}" for problem in problems)
        )
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
