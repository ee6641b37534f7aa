"""Run everything on a GPU: proof, tests, sanitizers, and the measurements, into one result file.

    make gpu                                    all of it, into benchmarks/results/<device>.json
    python benchmarks/gpu.py --steps models,topr --cases resnet20,gpt
    python benchmarks/gpu.py --dry-run          every step as far as it goes without a card

The dry run is there so that nothing fails on its first line on the day there is a card: a proof
case of each kernel goes through the emulated kernels, a model and its layers are measured on the
CPU with a batch of two, and tools that are not there are said to be missing.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

if not __package__:
    # Behind the installed packages: the fastfisher with compiled kernels goes before its source.
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import report, roofline, shapes, topr
from benchmarks.machine import ROOT, environment, slug
from benchmarks.measure import Settings, measure_case
from benchmarks.registry import CASES, Case
from benchmarks.rivals import PLAIN, RIVALS
from fastfisher import _build, backends, doctor
from fastfisher.files import replacing

RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 1
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
MODELS = ("resnet20", "vgg16_bn", "resnet50", "vit_tiny", "gpt")
DRY_MODELS = ("seq_mlp",)
#: Contenders that are told apart on a card; the others need packages of their own.
CONTENDERS = (PLAIN, "fisher_diag", "torch_func", "torch_func_compiled", "backpack")
DEVICE_TESTS = ("tests/test_device.py", "tests/test_device_runtime.py")
BACKENDS = ("cuda", "triton")
#: Scores of the selection's benchmark: 400 MB of float32.
SCORES = 100_000_000


@dataclass
class Plan:
    """What is run, where, and what came of it.

    Attributes:
        device: ``"cuda"``, or ``"meta"`` for the dry run.
        cases: models.
        path: the result file; None to write none.
        quick: one round, small sizes.
        document: what is written.
        failures: what went wrong, a line each.
    """

    device: str
    cases: Sequence[Case]
    path: Path | None
    quick: bool
    document: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def dry(self) -> bool:
        """Whether there is no card."""
        return self.device == "meta"

    @property
    def computing(self) -> str:
        """The device that numbers are computed on."""
        return "cpu" if self.dry else self.device

    def fail(self, text: str) -> None:
        """Note and show a failure; the steps after it run all the same."""
        text = textwrap.shorten(text, 400)
        self.failures.append(text)
        print(f"FAILED: {text}", flush=True)

    def write(self) -> None:
        """Write what is known so far."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        document = {**self.document, "failures": self.failures}
        with replacing(self.path) as temporary:
            text = json.dumps(_finite(document), indent=1, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON has no word for infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def device_facts() -> dict[str, Any]:
    """The card, as far as torch knows it."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "cuda": torch.version.cuda,
        "serving": backends.serving(torch.device("cuda", 0)),
    }


# -- Steps ---------------------------------------------------------------------------------------


def step_doctor(plan: Plan) -> None:
    """What the installation and the machine offer."""
    findings = list(doctor.checks())
    for check in findings:
        print(f"{check.state:8} {check.name}: {check.found}")
        if check.state == "broken":
            plan.fail(f"doctor: {check.name}: {check.found}")
    plan.document["doctor"] = [asdict(check) for check in findings]


def step_proof(plan: Plan) -> None:
    """Every proof case on the device, by every backend, against the float64 oracle."""
    from tests.proof.collection import collect, operators
    from tests.proof.device import OnDevice

    rows = []
    cases = collect(small=plan.dry)
    if plan.dry:
        cases = list({case.kernel: case for case in cases}.values())
    for backend in ("emulated",) if plan.dry else BACKENDS:
        try:
            on_device = OnDevice(operators(backend), plan.computing)
        except RuntimeError as error:
            plan.fail(f"proof: {error}")
            continue
        for case in cases:
            row: dict[str, Any] = {"backend": backend, "kernel": case.kernel, "case": case.name}
            try:
                row["error"] = case.run(on_device)
            except Exception as error:
                row["failure"] = textwrap.shorten(str(error), 400)
                plan.fail(f"proof: {backend}: {case.name}: {error}")
            rows.append(row)
        right = sum("error" in row for row in rows if row["backend"] == backend)
        print(f"{backend}: {right} of {len(cases)} cases are right")
    plan.document["proof"] = rows


def step_tests(plan: Plan) -> None:
    """The tests that only a device can run, with opcheck among them."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *DEVICE_TESTS]
    # Without a card all that can be known is that they are found.
    code, output = _shown([*command, "--collect-only"] if plan.dry else command)
    if code:
        plan.fail(f"tests: exit code {code}")
    plan.document["tests"] = {"exit": code, "summary": output.strip().splitlines()[-1:]}


def step_sanitizers(plan: Plan) -> None:
    """The small proof cases under compute-sanitizer's four tools."""
    tool = _compute_sanitizer()
    results: dict[str, Any] = {}
    proof = [sys.executable, "-m", "tests.proof", "--small", "--device", plan.device]
    if tool is None:
        print("compute-sanitizer was not found: it comes with the CUDA toolkit; left out")
        plan.document["sanitizers"] = "compute-sanitizer was not found"
        return
    for backend in BACKENDS:
        if backends.unavailable(backend) is not None:
            continue
        for name in SANITIZERS:
            # torch's allocator would hide what lies between two tensors.
            command = [
                *("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"),
                *(str(tool), "--tool", name, "--error-exitcode", "9"),
                *(*proof, "--backend", backend),
            ]
            code, output = _shown(command)
            errors = re.findall(r"ERROR SUMMARY: (\d+)|RACECHECK SUMMARY: (\d+)", output)
            results[f"{backend}: {name}"] = {"exit": code, "errors": errors}
            if code:
                plan.fail(f"sanitizers: {backend}: {name}: exit code {code}")
    plan.document["sanitizers"] = results


def _compute_sanitizer() -> Path | None:
    found = shutil.which("compute-sanitizer")
    if found:
        return Path(found)
    home = _build.toolkit()
    place = home / "bin" / "compute-sanitizer" if home else None
    return place if place is not None and place.exists() else None


def step_layers(plan: Plan) -> None:
    """Each layer shape beside torch's weight gradient and beside the card's own rates."""
    rows = []
    quick = plan.quick or plan.dry
    for case in plan.cases:
        for shape, layers in _shapes(case, quick).items():
            for precision in shapes.PRECISIONS:
                for layout in shape.layouts:
                    with _tf32(precision == "tf32"):
                        row = _layer(plan, case, shape, layers, layout, precision)
                    if row is not None:
                        rows.append(row)
    plan.document["layers"] = rows


def _shapes(case: Case, quick: bool) -> dict[shapes.Shape, int]:
    """The shapes of a model's layers; of its first one on two samples for a quick look."""
    if not quick:
        return shapes.collect(case)
    shape, layers = next(iter(shapes.collect(replace(case, batch=2)).items()))
    return {shape: layers}


def _layer(
    plan: Plan,
    case: Case,
    shape: shapes.Shape,
    layers: int,
    layout: str,
    precision: str,
) -> dict[str, Any] | None:
    quick = plan.quick or plan.dry
    about = f"{case.name}, {layout}, {precision}, {shape}"
    try:
        row = roofline.measure(
            *(case.name, layout, layers, shape),
            *(roofline.LEAST_ROUNDS if quick else 9, 0.0 if quick else 1.0),
            *(plan.computing, precision),
        )
    except (ValueError, RuntimeError) as error:
        plan.fail(f"layers: {about}: {error}")
        return None
    print(
        f"{about}: {row.time_ms:.3f} ms, {row.ratio:.2f} of torch's weight gradient, "
        f"{100 * row.of_floor:.0f}% of the floor, error {row.error:.1e}"
    )
    derived = {"floor_ms": row.floor_ms, "of_floor": row.of_floor, "precision": precision}
    return {**asdict(row), **derived, "shape": shapes.to_json(shape)}


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Let torch round to tf32, or do not: the reference has to compute what ours does."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = allowed
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def step_models(plan: Plan) -> None:
    """Whole models: time, peak memory and error of the contenders."""
    rows = []
    settings = Settings(device=plan.computing)
    contenders = CONTENDERS
    if plan.dry:
        settings = Settings(rounds=1, budget=0.0, memory=False, batch=2)
        # What a contender's library does on a device is its own affair.
        contenders = (PLAIN, "fisher_diag", "torch_func")
    elif plan.quick:
        settings = Settings(rounds=3, budget=1.0, batch=4, device=plan.computing)
    for case in plan.cases:
        for layout in case.layouts[:1] if plan.dry else case.layouts:
            with _tf32(False):
                found = measure_case(case, layout, [RIVALS[n] for n in contenders], settings)
            print("\n" + report.table(found), flush=True)
            rows += [asdict(row) for row in found]
            for row in found:
                if row.contender == report.OURS and row.status != "ok":
                    plan.fail(f"models: {case.name}, {layout}: {row.status}: {row.note}")
    plan.document["models"] = rows


def step_topr(plan: Plan) -> None:
    """The selection beside torch.topk and kthvalue, the masks compared with a stable sort's."""
    size = 100_000 if plan.quick or plan.dry else SCORES
    rounds = 1 if plan.quick or plan.dry else 9
    rows = topr.one_tensor(size, 0.01, rounds, rivals=True, device=plan.computing)
    rows += topr.one_tensor(size, 0.1, rounds, device=plan.computing)
    rows += topr.one_tensor(size, 0.01, rounds, torch.bfloat16, device=plan.computing)
    if not plan.dry:
        rows += topr.many_tensors(0.01, rounds, device=plan.computing)
    for row in rows:
        print(f"{row.case}: {row.contender}: {row.ms:.2f} ms, {row.reads:.1f} reads, {row.mask}")
        if row.mask != "same" and row.contender not in topr.RIVALS:
            plan.fail(f"topr: {row.case}: {row.contender}: {row.mask}")
    plan.document["topr"] = [asdict(row) for row in rows]


STEPS: dict[str, Callable[[Plan], None]] = {
    "doctor": step_doctor,
    "proof": step_proof,
    "tests": step_tests,
    "sanitizers": step_sanitizers,
    "layers": step_layers,
    "models": step_models,
    "topr": step_topr,
}


def _shown(command: Sequence[str]) -> tuple[int, str]:
    """Run a command in the repository's root, show what it writes, and give that back."""
    print("$ " + " ".join(command), flush=True)
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


# -- Command line --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; those of the process when ``None``.

    Returns:
        0; 1 where something failed.
    """
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.py",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "meta"), default="cuda", help="meta: the dry run")
    add("--dry-run", action="store_const", const="meta", dest="device", help="--device meta")
    add("--steps", metavar="A,B", help=f"default: {','.join(STEPS)}")
    add("--cases", metavar="A,B", help=f"models; default: {','.join(MODELS)}")
    add("--quick", action="store_true", help="few rounds and small sizes")
    add("--json", type=Path, metavar="F", help="default: benchmarks/results/<device's name>.json")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; --dry-run goes through the steps without one")
    steps = _named(parser, arguments.steps, STEPS, "--steps", tuple(STEPS))
    default = DRY_MODELS if arguments.device == "meta" else MODELS
    cases = _named(parser, arguments.cases, CASES, "--cases", default)
    plan = Plan(
        device=arguments.device,
        cases=[CASES[name] for name in cases],
        path=arguments.json,
        quick=arguments.quick,
    )
    plan.document = {"schema": SCHEMA, "environment": environment()}
    if not plan.dry:
        plan.document["device"] = device_facts()
        plan.path = plan.path or RESULTS / f"{slug(plan.document['device']['name'])}.json"
    seconds: dict[str, float] = {}
    plan.document["seconds"] = seconds
    for name in steps:
        print(f"\n== {name}: {STEPS[name].__doc__}", flush=True)
        start = perf_counter()
        try:
            STEPS[name](plan)
        except Exception as error:
            plan.fail(f"{name}: {type(error).__name__}: {error}")
        seconds[name] = perf_counter() - start
        plan.write()
    print(f"\n{len(plan.failures)} failure(s)")
    for failure in plan.failures:
        print(f"  {failure}")
    if plan.path is not None:
        print(f"written: {plan.path}")
    return int(bool(plan.failures))


def _named(
    parser: argparse.ArgumentParser,
    text: str | None,
    known: Mapping[str, object],
    option: str,
    default: Sequence[str],
) -> Sequence[str]:
    names = default if text is None else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"{option}: no {', '.join(unknown)!r}; known: {', '.join(known)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
