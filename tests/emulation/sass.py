"""What the compiler made of csrc/cuda: registers, memory and instructions of every kernel.

Each ``.cu`` file becomes a cubin for each architecture, and NVIDIA's tools say what is in it; no
driver and no card are needed. Cubins and what was read from them are kept in ``build/static``
under a hash of all they were made of.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from fastfisher import _build

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = ROOT / "build" / "static"

ARCHITECTURES = tuple(
    int(each.partition("+")[0].replace(".", "")) for each in _build.ARCHITECTURES.split(";")
)
FLAGS = ("-O3", "-std=c++17")
#: Compilers at a time; each takes a few hundred MB.
PARALLEL = 2


class ToolsMissing(RuntimeError):
    """A tool of NVIDIA's toolkit is not on this machine."""


@functools.cache
def tool(name: str) -> Path:
    """A program of the toolkit: of the toolkit that builds the kernels, or of the triton package.

    Raises:
        ToolsMissing: none of them has it.
    """
    home = _build.toolkit()
    places = [home / "bin" / name] if home else []
    triton = find_spec("triton")
    if triton and triton.origin:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name)
    for place in places:
        if place.exists():
            return place
    raise ToolsMissing(f"{name} was not found; set CUDA_HOME to a toolkit or install triton")


def run(command: Sequence[str | Path]) -> str:
    """What a command writes.

    Raises:
        RuntimeError: it fails.
    """
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{Path(command[0]).name} failed:\n{(done.stderr or done.stdout)[-6000:]}"
        )
    # ptxas -v reports to stderr.
    return done.stdout + done.stderr


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled kernel instance.

    Attributes:
        name: with its template arguments, without namespaces and parameters.
        source: the stem of its file.
        architecture: 80 for sm_80.
        registers: a thread.
        stack: bytes of a thread's stack frame, which is local memory.
        spills: bytes of registers that were stored to local memory and loaded from it.
        shared: bytes of static shared memory.
        threads: largest block that ``__launch_bounds__`` allows; 0 where it has none.
        opcodes: how often each instruction occurs, with its modifiers as nvdisasm writes them.
        hot: the same of the hot loop alone (:func:`hot_loop`); empty where there is no loop.
        ways: what one pass executes, of the hot loop, of each loop around it, and of the kernel,
            see :func:`ways`.
    """

    name: str
    source: str
    architecture: int
    registers: int
    stack: int
    spills: int
    shared: int
    threads: int
    opcodes: Mapping[str, int]
    hot: Mapping[str, int]
    ways: Sequence[Mapping[str, Mapping[str, int]]] = ()

    def count(self, pattern: str) -> int:
        """Instructions that match a pattern; see :func:`matching`."""
        return matching(self.opcodes, pattern)


def matching(opcodes: Mapping[str, int], pattern: str) -> int:
    """How many instructions match ``pattern``: an opcode and modifiers that it has to have.

    ``LDG.128`` matches ``LDG.E.128.CONSTANT``, not ``LDGSTS.E.128``. A star stands for any letters:
    ``D*`` would match every opcode that begins with D.
    """
    opcode, *modifiers = pattern.split(".")
    expression = re.compile(re.escape(opcode).replace(r"\*", r"\w*"))
    return sum(
        count
        for name, count in opcodes.items()
        if expression.fullmatch(name.split(".")[0]) and set(modifiers) <= set(name.split(".")[1:])
    )


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a disassembly.

    Attributes:
        offset: in bytes.
        opcode: with its modifiers.
        target: the offset that a branch goes to.
        always: nothing but the target follows it; for an exit, nothing at all.
    """

    offset: int
    opcode: str
    target: int | None = None
    always: bool = False


_FUNCTION = re.compile(r"^\.text\.([\w$.]+):")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)\s*(.*)"
)
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


def parse(disassembly: str) -> dict[str, list[Instruction]]:
    """The instructions of ``nvdisasm -c``, per mangled function name, padding left out."""
    functions: dict[str, list[Instruction]] = {}
    labels: dict[str, int] = {}
    pending: list[str] = []
    branches: list[tuple[list[Instruction], int, str]] = []
    current: list[Instruction] | None = None
    for line in disassembly.splitlines():
        if found := _FUNCTION.match(line):
            current = functions.setdefault(found[1], [])
        elif found := _LABEL.match(line):
            pending.append(found[1])
        elif current is not None and (found := _INSTRUCTION.match(line)):
            offset = int(found[1], 16)
            labels.update(dict.fromkeys(pending, offset))
            pending.clear()
            opcode = found[3].split(".")[0]
            target = _TARGET.search(found[4])
            if opcode in ("BRA", "JMP") and target:
                branches.append((current, len(current), target[1]))
            # A branch may have its condition among the operands, too: `BRA.U UP0, ...`.
            always = found[2] is None and (
                opcode == "EXIT" or (target is not None and found[4].startswith("`"))
            )
            if found[3] != "NOP":
                current.append(Instruction(offset, found[3], always=always))
    for instructions, index, label in branches:
        if label in labels:
            instructions[index] = replace(instructions[index], target=labels[label])
    return functions


def _spans(instructions: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First and last offset of each loop.

    A loop is what lies between a branch and an earlier instruction that it goes back to. A branch
    to itself, which the compiler puts behind the end of a kernel, is none.
    """
    ends: dict[int, int] = {}
    for each in instructions:
        if each.target is not None and each.target < each.offset:
            # Several branches may go back to one instruction: one loop.
            ends[each.target] = max(each.offset, ends.get(each.target, 0))
    return sorted(ends.items())


def _within(span: tuple[int, int], offset: int) -> bool:
    return span[0] <= offset <= span[1]


def _inner(spans: Iterable[tuple[int, int]], span: tuple[int, int]) -> list[tuple[int, int]]:
    return [each for each in spans if span[0] < each[0] and each[1] <= span[1]]


def loops(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """The body of every loop, less the loops in it."""
    spans = _spans(instructions)
    return [_body(instructions, span, _inner(spans, span)) for span in spans]


def _body(
    instructions: Sequence[Instruction],
    span: tuple[int, int],
    inner: Sequence[tuple[int, int]],
) -> list[Instruction]:
    return [
        each
        for each in instructions
        if _within(span, each.offset) and not any(_within(loop, each.offset) for loop in inner)
    ]


#: What a kernel is there for: multiplications where it has any, else memory.
_WORK = (("HMMA",), ("FFMA", "FFMA2", "DFMA"), ("LDG", "LDGSTS", "LDS"))


def _work(body: Mapping[str, int]) -> tuple[int, ...]:
    kinds = [sum(matching(body, opcode) for opcode in opcodes) for opcodes in _WORK]
    return (*kinds, sum(body.values()))


def hot_loop(instructions: Sequence[Instruction]) -> Counter[str]:
    """Instructions of the loop that does most of the work, as far as the code alone can say.

    That is the one with most tensor-core products; where none has any, with most fused
    multiplications and additions; then with most loads, then with most instructions. Loops in it
    are not counted.
    """
    bodies = [Counter(each.opcode for each in body) for body in loops(instructions)]
    return max(bodies, key=_work, default=Counter())


def ways(instructions: Sequence[Instruction]) -> list[dict[str, Counter[str]]]:
    """What one pass through the hot loop executes, then one through each loop around it, outwards.

    The last entry is the kernel as a whole. Each leaves out the loops within it. Of all ways
    through the branches, ``"usual"`` is that of a full tile in the middle of its work: most
    tensor-core products, then most copies of 16 bytes (for the sums, of 8), most copies, fewest
    instructions.
    ``"fullest"`` has most arithmetic after the tensor-core products: what else is done at the end
    of a sample, where that is a branch.
    """
    spans = _spans(instructions)
    if not spans:
        return []
    counted = {
        span: Counter(each.opcode for each in _body(instructions, span, _inner(spans, span)))
        for span in spans
    }
    hot = max(spans, key=lambda span: _work(counted[span]))
    chain = [span for span in spans if _within(span, hot[0]) and hot[1] <= span[1]]
    chain.sort(key=lambda span: span[1] - span[0])
    chain.append((-1, instructions[-1].offset))
    found = []
    for number, span in enumerate(chain):
        through = chain[number - 1][0] if number else None
        inner = _inner(spans, span)
        found.append(
            {
                "usual": _way(instructions, span, inner, through, ()),
                "fullest": _way(instructions, span, inner, through, ("FFMA", "FADD", "FMUL")),
            }
        )
    return found


def _way(
    instructions: Sequence[Instruction],
    span: tuple[int, int],
    inner: Sequence[tuple[int, int]],
    through: int | None,
    arithmetic: Sequence[str],
) -> Counter[str]:
    """The best way from a span's first instruction to its end; ``through`` has to be on it."""
    body = [each for each in instructions if _within(span, each.offset)]

    def value(each: Instruction) -> tuple[int, ...]:
        if any(_within(loop, each.offset) for loop in inner):
            return (int(each.offset == through), 0, 0, 0, 0, 0)
        one = {each.opcode: 1}
        wide = sum(
            matching(one, pattern)
            for pattern in ("LDG.128", "LDGSTS.128", "STG.128", "LDG.64", "STG.64")
        )
        copies = matching(one, "LDG") + matching(one, "LDGSTS")
        extra = sum(matching(one, opcode) for opcode in arithmetic)
        return (0, matching(one, "HMMA"), extra, wide, copies, -1)

    Score = tuple[int, ...]
    # The best way to each instruction: its score, and where it came from.
    best: dict[int, tuple[Score, int | None]] = {}
    if body:
        best[body[0].offset] = ((0,) * 6, None)
    ends: list[tuple[Score, int]] = []
    for number, each in enumerate(body):
        if each.offset not in best:
            continue
        score = tuple(map(sum, zip(best[each.offset][0], value(each), strict=True)))
        following = []
        if each.target is not None and each.target > each.offset and _within(span, each.target):
            following.append(each.target)
        if not each.always and number + 1 < len(body):
            following.append(body[number + 1].offset)
        goes_back = each.target == span[0] or each.opcode == "EXIT"
        if goes_back:
            ends.append((score, each.offset))
        for offset in following:
            if offset not in best or score > best[offset][0]:
                best[offset] = (score, each.offset)
    if not ends:
        # Code that the compiler put in another order than it runs: everything, once.
        return Counter(each.opcode for each in _body(instructions, span, inner))
    at: int | None = max(ends)[1]
    opcodes = {each.offset: each.opcode for each in body}
    passed: Counter[str] = Counter()
    while at is not None:
        if not any(_within(loop, at) for loop in inner):
            passed[opcodes[at]] += 1
        at = best[at][1]
    return passed


def plain_names(mangled: Iterable[str]) -> dict[str, str]:
    """Kernels' names with template arguments, without namespaces and parameters."""
    names = list(mangled)
    demangled = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return dict(zip(names, map(undecorated, demangled), strict=True))


def undecorated(demangled: str) -> str:
    """A demangled function without return type, namespaces and parameters."""
    # Anonymous namespaces hold a hash of the file's path, in one of two spellings.
    text = re.sub(
        r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|\bfastfisher::|\bcuda::", "", demangled
    )
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            text = text[:i]
            break
    head, bracket, arguments = text.partition("<")
    # Literals are cast to their type: `(int)64`.
    arguments = re.sub(r"\((?:unsigned |signed )?(?:int|bool|long|char|short)\)", "", arguments)
    return head.split()[-1] + bracket + arguments


_PTXAS = re.compile(
    r"Compiling entry function '(?P<name>[\w$.]+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def _threads(elf: str) -> dict[str, int]:
    """The launch bounds in ``cuobjdump -elf``, per mangled name."""
    found: dict[str, int] = {}
    name = None
    lines = iter(elf.splitlines())
    for line in lines:
        if section := re.match(r"^\.nv\.info\.([\w$.]+)$", line.strip()):
            name = section[1]
        elif name and ("EIATTR_MAX_THREADS" in line or "EIATTR_REQNTID" in line):
            next(lines)
            x, y, z = (int(value, 16) for value in next(lines).split(":")[1].split())
            found[name] = x * y * z
    return found


def _read(cubin: Path, log: str, source: str, architecture: int) -> list[Kernel]:
    code = parse(run([tool("nvdisasm"), "-c", cubin]))
    threads = _threads(run([tool("cuobjdump"), "-elf", cubin]))
    reports = list(_PTXAS.finditer(log))
    names = plain_names(report["name"] for report in reports)
    kernels = []
    for report in reports:
        instructions = code[report["name"]]
        shared = re.search(r"(\d+) bytes smem", report["rest"])
        kernels.append(
            Kernel(
                name=names[report["name"]],
                source=source,
                architecture=architecture,
                registers=int(report["registers"]),
                stack=int(report["stack"]),
                spills=int(report["stores"]) + int(report["loads"]),
                shared=int(shared[1]) if shared else 0,
                threads=threads.get(report["name"], 0),
                opcodes=dict(sorted(Counter(each.opcode for each in instructions).items())),
                hot=dict(sorted(hot_loop(instructions).items())),
                ways=[
                    {kind: dict(sorted(way.items())) for kind, way in level.items()}
                    for level in ways(instructions)
                ],
            )
        )
    return sorted(kernels, key=lambda kernel: kernel.name)


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


@functools.cache
def _version(path: Path) -> str:
    return run([path, "--version"])


def _headers(source: Path) -> str:
    folders = (source.parent, source.parent.parent)
    found = sorted({path for folder in folders for path in folder.glob("*.*h")})
    return "\0".join(path.read_text() for path in found)


def compile_kernels(source: Path, architecture: int, flags: Sequence[str] = FLAGS) -> list[Kernel]:
    """Compiles one file for one architecture and reads what came out.

    Args:
        source: a ``.cu`` file; headers beside it and one folder above it count as its own.
        architecture: 80 for sm_80.
        flags: for nvcc.

    Raises:
        ToolsMissing: nvcc, nvdisasm or cuobjdump is not there.
        RuntimeError: the file does not compile.
    """
    compiler = tool("nvcc")
    command = [*flags, f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
    key = _key(source.read_text(), _headers(source), *command, _version(compiler))
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    cubin = DIRECTORY / f"{source.stem}-{architecture}-{key}.cubin"
    log = cubin.with_suffix(".log")
    # Written last: where it is there, so is the cubin.
    if not log.exists():
        unfinished = cubin.with_suffix(f".{os.getpid()}")
        text = run([compiler, *command, source, "-o", unfinished])
        unfinished.rename(cubin)
        unfinished.write_text(text)
        unfinished.rename(log)
    reading = _key(Path(__file__).read_text(), _version(tool("nvdisasm")))
    facts = cubin.with_suffix(f".{reading[:8]}.json")
    if not facts.exists():
        kernels = _read(cubin, log.read_text(), source.stem, architecture)
        unfinished = cubin.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps([asdict(kernel) for kernel in kernels]))
        unfinished.rename(facts)
    return [Kernel(**fields) for fields in json.loads(facts.read_text())]


def compile_all(
    sources: Path = ROOT / "csrc" / "cuda", architectures: Sequence[int] = ARCHITECTURES
) -> list[Kernel]:
    """Every kernel of every ``.cu`` file for every architecture.

    Raises:
        ToolsMissing: as :func:`compile_kernels`.
        RuntimeError: a file does not compile, or two kernels of one architecture share a name.
    """
    work = [(path, each) for path in sorted(sources.glob("*.cu")) for each in architectures]
    with concurrent.futures.ThreadPoolExecutor(PARALLEL) as pool:
        kernels = [
            kernel
            for found in pool.map(lambda each: compile_kernels(*each), work)
            for kernel in found
        ]
    counts = Counter((kernel.name, kernel.architecture) for kernel in kernels)
    twice = sorted({name for (name, _), count in counts.items() if count > 1})
    if twice:
        raise RuntimeError(f"kernels that share a name: {', '.join(twice)}")
    return kernels
