"""What each compiled kernel may use, for each architecture, and what has to be in its code.

Two kinds of bounds: ``RULES`` says by hand what holds for a kind of kernel whatever its numbers;
the JSON files beside this one hold the numbers of each kernel instance, as ``python -m
tests.budgets --record`` found them. Recording cannot make a breach of a rule legal.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastfisher.files import replacing
from tests.emulation.build import emulated
from tests.emulation.launches import Launch, noting
from tests.emulation.occupancy import blocks_per_sm
from tests.emulation.sass import Kernel
from tests.proof.collection import collect

FOLDER = Path(__file__).parent
RECORD = "python -m tests.budgets --record"

#: Registers that another compiler may need more.
SLACK = 8
MOST_REGISTERS = 255

#: Instructions whose presence is recorded: what a change must not lose.
KEPT = ("FFMA", "HMMA", "LDSM", "LDGSTS.128", "LDG.128", "LDS.128", "STG.128")
#: Instructions whose number is recorded: what a change must not add to.
LIMITED = ("MEMBAR", "ATOMG", "ATOM", "RED", "REDG")

_LOCAL = ("LDL", "STL")
_DOUBLE = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "DMMA")


@dataclass(frozen=True, slots=True)
class Rule:
    """What holds for the kernels whose name matches.

    Attributes:
        kernels: a regular expression for the whole name, without template arguments.
        required: patterns (:func:`tests.emulation.sass.matching`) each of which has to occur.
        one_of: at least one of these has to occur, where there are any.
        forbidden: patterns none of which may occur.
        membars: most fences of the memory that blocks share.
        arguments: a regular expression to be found in the template arguments; empty for all.
    """

    kernels: str
    required: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    membars: int = 0
    arguments: str = ""

    def applies(self, name: str) -> bool:
        """Whether it is about the kernel of this name."""
        function, _, arguments = name.partition("<")
        return bool(re.fullmatch(self.kernels, function) and re.search(self.arguments, arguments))


_TENSOR = ("HMMA", "HGMMA", "UTC*MMA")
_TF32 = ("HMMA.TF32", "HGMMA.TF32")

#: For each kernel the first rule that applies counts; one without a rule is refused.
RULES: tuple[Rule, ...] = (
    # Float32's own path: rounding an operand to tf32 for the tensor cores would be 1000 times off.
    Rule("outer_simt", ("DFMA", "LDGSTS.128", "LDS.128"), arguments="double.*true>$"),
    Rule("outer_simt", ("DFMA", "LDGSTS", "LDS.128"), arguments="double"),
    Rule("outer_simt", ("FFMA", "LDGSTS.128", "LDS.128"), forbidden=("HMMA",), arguments="true>$"),
    Rule("outer_simt", ("FFMA", "LDGSTS", "LDS.128"), forbidden=("HMMA",)),
    Rule("outer_mma", ("HMMA.BF16", "LDSM", "LDGSTS.128"), forbidden=_TF32, arguments="bfloat16"),
    Rule("outer_mma", ("HMMA.TF32", "LDGSTS.128")),
    Rule("outer_depthwise", one_of=("FFMA", "DFMA"), forbidden=("HMMA",)),
    # Adds partial sums up: bytes are all it has, and 16 at a time where out allows it.
    Rule("outer_reduce", ("LDG.128", "STG.128"), forbidden=("HMMA",), arguments="[24]>$"),
    Rule("outer_reduce", ("LDG",), forbidden=("HMMA",)),
    # Streams: 16 bytes at a time, in the instances for operands that allow it.
    Rule("channel_squares", ("LDG.128",), forbidden=_TENSOR, arguments="^true"),
    Rule("channel_sums", ("LDG.128", "STG.128"), forbidden=_TENSOR, arguments=r"^\w+, true"),
    Rule(r"gather_\w+", ("LDG.128", "STG.128"), forbidden=_TENSOR, arguments="^true"),
    Rule("recurrent_step", ("LDG.128", "STG.128"), forbidden=_TENSOR, arguments="^true"),
    Rule(r"(channel|gather|recurrent)_\w+", ("LDG",), forbidden=_TENSOR),
    # The selection: integers, and histograms by atomics.
    Rule(
        r"topr::\w+",
        forbidden=_TENSOR,
    ),
    # Triton's, named by kernel and call. It has instructions of its own for later devices.
    Rule("outer_tile: .*float32.*", ("FFMA",), forbidden=_TENSOR),
    Rule("outer_tile: .*float64.*", forbidden=_TENSOR),
    Rule("outer_tile: .*tf32.*", one_of=("HMMA.TF32", "HGMMA.TF32", "UTC*MMA")),
    Rule("outer_tile: .*bfloat16.*", one_of=("HMMA", "HGMMA", "UTC*MMA"), forbidden=_TF32),
    Rule(r"\w+: .*", forbidden=_TENSOR),
)


def breaches(kernel: Kernel) -> list[str]:
    """What of a kernel no recording makes legal."""
    found = []
    if not kernel.threads:
        found.append("it has no __launch_bounds__")
    if kernel.spills:
        found.append(f"{kernel.spills} bytes of registers are spilled")
    if kernel.stack:
        found.append(f"{kernel.stack} bytes of local memory")
    rule = next((rule for rule in RULES if rule.applies(kernel.name)), None)
    if rule is None:
        return [*found, "no rule in tests/budgets/__init__.py says what kind of kernel it is"]
    double = () if re.search("double|float64|<long>", kernel.name) else _DOUBLE
    found += [
        f"{kernel.count(pattern)} {pattern}, which are forbidden"
        for pattern in (*_LOCAL, *double, *rule.forbidden)
        if kernel.count(pattern)
    ]
    found += [f"no {pattern}" for pattern in rule.required if not kernel.count(pattern)]
    if rule.one_of and not any(map(kernel.count, rule.one_of)):
        found.append(f"none of {', '.join(rule.one_of)}")
    # Within a block they only wait for what the block wrote to its own shared memory.
    fences = kernel.count("MEMBAR") - kernel.count("MEMBAR.CTA")
    if fences > rule.membars:
        found.append(f"{fences} MEMBAR, at most {rule.membars} allowed")
    return found


def blocks(kernel: Kernel, launches: Iterable[Launch]) -> int:
    """Blocks that an SM holds at once, in the launch that needs most; -1 where there is none."""
    return min(
        (
            blocks_per_sm(
                kernel.architecture,
                kernel.registers,
                kernel.shared + launch.shared,
                launch.threads,
            )
            for launch in launches
        ),
        default=-1,
    )


def budget(kernel: Kernel, launches: Iterable[Launch]) -> dict[str, Any]:
    """The bounds that recording writes for one kernel and architecture."""
    return {
        "registers": min(kernel.registers + SLACK, MOST_REGISTERS),
        "shared": kernel.shared,
        "blocks": blocks(kernel, launches),
        "required": [pattern for pattern in KEPT if kernel.count(pattern)],
        "at_most": {pattern: kernel.count(pattern) for pattern in LIMITED if kernel.count(pattern)},
    }


def excesses(kernel: Kernel, launches: Sequence[Launch], bounds: Mapping[str, Any]) -> list[str]:
    """How a kernel passes its recorded bounds."""
    found = [
        f"{getattr(kernel, name)} {unit}, at most {bounds[name]} allowed"
        for name, unit in (("registers", "registers"), ("shared", "bytes of shared memory"))
        if getattr(kernel, name) > bounds[name]
    ]
    if not launches:
        found.append("no proof case launches it")
    elif blocks(kernel, launches) < bounds["blocks"]:
        found.append(
            f"{blocks(kernel, launches)} blocks fit an SM, at least {bounds['blocks']} demanded"
        )
    found += [
        f"no {pattern} any more" for pattern in bounds["required"] if not kernel.count(pattern)
    ]
    found += [
        f"{kernel.count(pattern)} {pattern}, at most {bounds['at_most'].get(pattern, 0)} allowed"
        for pattern in LIMITED
        if kernel.count(pattern) > bounds["at_most"].get(pattern, 0)
    ]
    return found


def launches_of_cases() -> dict[str, list[Launch]]:
    """The launches of all proof cases, each kind once, per kernel."""
    operators = emulated()
    launches: list[Launch] = []
    for case in collect():
        # The selection's later launches depend on what the earlier ones found.
        dependent = case.kernel == "topr"
        if dependent and not case.small:
            continue
        # Elsewhere nothing is computed, so a case that looks at values finds wrong ones.
        with noting(run=dependent) as made, contextlib.suppress(AssertionError):
            case.run(operators)
        launches += made
    kinds: dict[str, dict[tuple[int, int], Launch]] = {}
    for launch in launches:
        kinds.setdefault(launch.kernel, {})[launch.threads, launch.shared] = launch
    return {kernel: list(each.values()) for kernel, each in kinds.items()}


def triton_launches(kernels: Iterable[Kernel]) -> dict[str, list[Launch]]:
    """Launches of Triton kernels, whose compiler says what a block has."""
    return {
        kernel.name: [Launch(kernel.name, (1, 1, 1), (kernel.threads, 1, 1), 0)]
        for kernel in kernels
    }


def path_of(source: str) -> Path:
    """The file of the budgets of ``csrc/cuda/<source>.cu``."""
    return FOLDER / f"{source}.json"


def read(source: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Bounds per kernel and architecture (``"sm_80"``); empty where none were recorded."""
    path = path_of(source)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record(kernels: Iterable[Kernel], launches: Mapping[str, Sequence[Launch]]) -> list[Path]:
    """Writes the bounds of all kernels anew, and removes the files of sources that are gone.

    Raises:
        ValueError: a kernel breaks a rule, or no proof case launches it; nothing is written then.
    """
    by_source: dict[str, dict[str, dict[str, Any]]] = {}
    refused = []
    for kernel in kernels:
        launched = launches.get(kernel.name, ())
        problems = breaches(kernel) + ([] if launched else ["no proof case launches it"])
        refused += [f"{label(kernel)}: {problem}" for problem in problems]
        of_kernel = by_source.setdefault(kernel.source, {}).setdefault(kernel.name, {})
        of_kernel[f"sm_{kernel.architecture}"] = budget(kernel, launched)
    if refused:
        raise ValueError("\n".join(refused))
    for path in FOLDER.glob("*.json"):
        if path.stem not in by_source:
            path.unlink()
    for source, of_source in by_source.items():
        with replacing(path_of(source)) as temporary:
            temporary.write_text(_text(of_source), encoding="utf-8")
    return [path_of(source) for source in by_source]


def label(kernel: Kernel) -> str:
    """A kernel and its architecture, for messages."""
    return f"{kernel.name}, sm_{kernel.architecture}"


def _text(of_source: Mapping[str, Mapping[str, Any]]) -> str:
    """JSON with a line for each kernel and architecture, so that diffs show what changed."""
    parts = []
    for name, architectures in sorted(of_source.items()):
        lines = ",\n".join(
            f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in architectures.items()
        )
        parts.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
