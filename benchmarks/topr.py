"""Time of the top-R selection beside torch's own ways to it, and beside reading the scores.

    python benchmarks/topr.py                      10^8 scores in several ways, 10^4 small tensors
    python benchmarks/topr.py --size 1e6           a smoke run
    python benchmarks/topr.py --threads 2 --save   keep the run and put it into docs/performance

Zeroes what the k largest of float32 scores belong to. The unit is a plain read: the time in which
torch reads the bytes of the scores once, the fastest of dot, sum and max of the same round. The
bound is two reads, of both Fishers where both are given, and of an in-place pass over the
parameters (neg_) the part that falls on cache lines with something to zero.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

if not __package__:
    # Behind the installed packages: the fastfisher with compiled kernels goes before its source.
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.machine import ROOT, environment, slug
from benchmarks.markdown import update_marked
from benchmarks.measure import _give_back_freed_memory, peak_growth, wait_for_device
from fastfisher import fisher_mask_, topr
from fastfisher.files import replacing

RESULTS = ROOT / "benchmarks" / "results" / "topr"
PAGE = ROOT / "docs" / "performance" / "topr.md"
TENSORS = 10_000
OURS = "select_top + zero_selected_"
RIVALS = (
    "torch.topk + scatter",
    "kthvalue + masked_fill",
    "cat + kthvalue + a loop of masked_fill",
)

Call = Callable[[], object]


@dataclass
class Row:
    """One contender on one case; what was not measured is ``None``.

    Attributes:
        mask: "same" as a stable sort's, or how it differs.
        ms: median over rounds.
        reads: median over rounds of its time over that of one plain read of the scores.
        times_ours: median over rounds of its time over that of ``OURS``.
        bound: median over rounds of the bound over its time, in percent.
        peak_percent: peak resident memory above the level before the call, over the bytes of the
            scores.
    """

    case: str
    contender: str
    mask: str
    rounds: int
    ms: float
    reads: float
    times_ours: float
    bound: float | None = None
    peak_percent: float | None = None


def zero_top(
    parameters: Sequence[Tensor],
    scores: Sequence[Tensor],
    k: int,
    remain: Sequence[Tensor] = (),
    record: bool = False,
) -> None:
    """What fisher_mask_ does between its checks and the building of the mask."""
    [chosen] = topr.select_top(scores, [k], remain=remain).rows()
    topr.zero_selected_(parameters, scores, chosen, remain=remain, record=record)


def zero_top_plain(parameters: Sequence[Tensor], scores: Sequence[Tensor], k: int) -> None:
    """The same by the operators' plain-torch kernels: a loop over the tensors."""
    [chosen] = topr.Selection(*topr._select_top_default(scores, [], 1.0, [k]), (k,)).rows()
    topr._zero_selected_default(parameters, scores, [], 1.0, *chosen, False)


def topk_scatter(parameter: Tensor, score: Tensor, k: int) -> None:
    parameter.scatter_(0, score.topk(k, sorted=False).indices, 0.0)


def kthvalue_masked_fill(parameter: Tensor, score: Tensor, k: int) -> None:
    parameter.masked_fill_(score >= score.kthvalue(score.numel() - k + 1).values, 0.0)


def loop(parameters: Sequence[Tensor], scores: Sequence[Tensor], k: int) -> None:
    """One threshold for all, then tensor by tensor."""
    everything = torch.cat(list(scores))
    threshold = everything.kthvalue(everything.numel() - k + 1).values
    for parameter, score in zip(parameters, scores, strict=True):
        parameter.masked_fill_(score >= threshold, 0.0)


def compare(parameters: Sequence[Tensor], ranked: Tensor, k: int) -> str:
    """How the zeros in ``parameters``, of ones before, differ from a stable sort's first ``k``."""
    zeroed = torch.cat([p.reshape(-1) for p in parameters]) == 0
    count = int(zeroed.sum())
    if count != k:
        return f"{count - k:+} scalars"
    threshold = ranked[zeroed].min()
    ties = zeroed[ranked == threshold]
    in_order = not bool((ties[1:] & ~ties[:-1]).any())
    if bool(zeroed[ranked > threshold].all()) and in_order:
        return "same"
    return "other ties" if bool(zeroed[ranked > threshold].all()) else "wrong"


def timed(call: Call) -> float:
    start = perf_counter()
    call()
    wait_for_device()
    return perf_counter() - start


@dataclass
class Contender:
    """What is timed.

    Attributes:
        call: zeroes elements of the parameters.
        ranked: what it ranks, in one piece.
        rounds: to take part in.
        streams: tensors of the size of the scores that it reads; 0 if it has no bound.
    """

    call: Call
    ranked: Tensor
    rounds: int
    streams: int = 0


def touched_lines(zeroed: Tensor) -> float:
    """The part of a flat float32 tensor's cache lines that have an element of the mask."""
    return float(
        nn.functional.pad(zeroed, (0, -len(zeroed) % 16)).view(-1, 16).any(1).double().mean()
    )


def measure(
    case: str,
    parameters: Sequence[Tensor],
    everything: Tensor,
    contenders: Mapping[str, Contender],
    *,
    k: int,
    memory: bool,
) -> list[Row]:
    """Check, then time in interleaved rounds.

    Args:
        case: name of the case.
        parameters: what the calls zero elements of.
        everything: the scores in one piece, which the unit reads.
        contenders: by name.
        k: how many are zeroed.
        memory: also measure peak memory.
    """
    masks, peaks = {}, dict.fromkeys(contenders)
    for name, contender in contenders.items():
        for parameter in parameters:
            parameter.fill_(1.0)
        contender.call()
        masks[name] = compare(parameters, contender.ranked, k)
        if memory:
            _give_back_freed_memory()
            peak = peak_growth(contender.call, everything.device.type)
            peaks[name] = 100 * peak / everything.nbytes
    touched = touched_lines(torch.cat([p.reshape(-1) for p in parameters]) == 0)
    # Of halves, the same bytes: torch is slow at adding them up.
    unit = everything[: everything.numel() // 2 * 2].view(torch.float32)
    reads: list[float] = []
    writes: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(max(contender.rounds for contender in contenders.values())):
        reads.append(min(map(timed, (unit.sum, lambda: torch.dot(unit, unit), unit.max))))
        writes.append(touched * sum(timed(parameter.neg_) for parameter in parameters))
        for name, contender in contenders.items():
            if number < contender.rounds:
                seconds[name].append(timed(contender.call))

    def row(name: str, contender: Contender) -> Row:
        taken, streams = seconds[name], contender.streams
        bounds = [2 * streams * read + write for read, write in zip(reads, writes, strict=True)]
        return Row(
            case,
            name,
            masks[name],
            len(taken),
            1e3 * statistics.median(taken),
            statistics.median(t / r for t, r in zip(taken, reads, strict=False)),
            statistics.median(t / o for t, o in zip(taken, seconds[OURS], strict=False)),
            100 * statistics.median(b / t for b, t in zip(bounds, taken, strict=False))
            if streams
            else None,
            peaks[name],
        )

    return [row(name, contender) for name, contender in contenders.items()]


def one_tensor(
    size: int,
    ratio: float,
    rounds: int,
    dtype: torch.dtype = torch.float32,
    rivals: bool = False,
    device: str = "cpu",
) -> list[Row]:
    """The cases of one large float32 parameter, with scores of one dtype."""
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(size, generator=generator).square_().to(device, dtype)
    remain = torch.rand(size, generator=generator).square_().to(device, dtype)
    parameter = torch.ones(size, device=device)
    k = int(ratio * size)

    def ours(*arguments: object) -> Call:
        return lambda: zero_top([parameter], [score], k, *arguments)  # type: ignore[arg-type]

    contenders = {
        OURS: Contender(ours(), score, rounds, 1),
        "with the record of a mask": Contender(ours((), True), score, rounds, 1),
        "of F_f - w * F_r, not formed": Contender(ours([remain]), score - remain, rounds, 2),
    }
    if rivals:
        for name, function in zip(RIVALS, (topk_scatter, kthvalue_masked_fill), strict=False):
            contenders[name] = Contender(
                lambda function=function: function(parameter, score, k), score, min(rounds, 3)
            )
    name = str(dtype).removeprefix("torch.")
    case = f"one tensor of {size:,} {name} scores, k = {k:,}"
    return measure(case, [parameter], score, contenders, k=k, memory=True)


def many_tensors(ratio: float, rounds: int, device: str = "cpu") -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 200, (TENSORS,), generator=generator).tolist()
    everything = torch.rand(sum(sizes), generator=generator).square_().to(device)
    scores = [part.clone() for part in everything.split(sizes)]
    parameters = [torch.ones_like(part) for part in scores]
    k = int(ratio * sum(sizes))
    model = nn.ParameterList(map(nn.Parameter, parameters))
    forget = dict(zip(dict(model.named_parameters()), scores, strict=True))
    contenders = {
        OURS: Contender(lambda: zero_top(parameters, scores, k), everything, rounds),
        RIVALS[2]: Contender(lambda: loop(parameters, scores, k), everything, rounds),
        "a loop of ours in plain torch, ties heeded": Contender(
            lambda: zero_top_plain(parameters, scores, k), everything, 1
        ),
        "fisher_mask_: checks, and a mask to undo": Contender(
            lambda: fisher_mask_(model, forget, ratio=ratio), everything, rounds
        ),
    }
    case = f"{TENSORS:,} tensors, {sum(sizes):,} float32 scores, k = {k:,}"
    return measure(case, parameters, everything, contenders, k=k, memory=False)


def markdown(machine: report.Environment, command: str, rows: Sequence[Row]) -> str:
    """One run as a section of the page."""
    lines = [f"### {machine['threads']} thread(s)", ""]
    lines.append("| case | contender | mask | ms | reads | of bound | times ours | peak memory |")
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        peak = "-" if row.peak_percent is None else f"{row.peak_percent:.2f}%"
        bound = "-" if row.bound is None else f"{row.bound:.0f}%"
        lines.append(
            f"| {row.case} | {row.contender} | {row.mask} | {row.ms:.1f} | {row.reads:.2f} "
            f"| {bound} | {row.times_ours:.1f} | {peak} |"
        )
    two = f"{OURS}, first case: {100 * 2 / rows[0].reads:.0f}% of the speed of two plain reads."
    lines += ["", two, ""]
    lines += [f"{line}  " for line in report.header(machine).splitlines()]
    return "\n".join([*lines, f"`{command}`"]) + "\n"


def saved_runs(folder: Path = RESULTS) -> str:
    """All saved runs as the generated part of the page."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return "\n".join(
        markdown(run["environment"], run["command"], [Row(**row) for row in run["rows"]])
        for run in runs
    )


def main(argv: Sequence[str] | None = None, *, results: Path = RESULTS, page: Path = PAGE) -> int:
    """Run the command line.

    Args:
        argv: arguments; those of the process when ``None``.
        results: the folder that ``--save`` writes to.
        page: the page whose generated part ``--save`` renews.

    Returns:
        0; 1 where a mask of ours is not that of a stable sort.
    """
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="benchmarks/topr.py",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", type=float, default=1e8, metavar="N", help="default: 1e8")
    parser.add_argument("--ratio", type=float, default=0.01, metavar="R", help="default: 0.01")
    parser.add_argument("--threads", type=int, metavar="T", help="default: torch's own choice")
    parser.add_argument("--rounds", type=int, default=9, metavar="R", help="default: 9")
    parser.add_argument("--save", action="store_true", help="keep the run; renew the page")
    given = parser.parse_args(argv)
    if not (given.size * given.ratio >= 1 and 0 < given.ratio < 1 and given.rounds > 0):
        parser.error("--size, --ratio, --rounds: expected 0 < R < 1, R * N of 1 or more, a round")
    arguments = sys.argv[1:] if argv is None else argv
    command = " ".join(["python", "benchmarks/topr.py", *arguments])
    if given.threads:
        torch.set_num_threads(given.threads)
    machine = environment()
    # First the small ones, before large ones have come and gone in the heap.
    small = many_tensors(given.ratio, given.rounds)
    size = int(given.size)
    rows = one_tensor(size, given.ratio, given.rounds, rivals=True)
    rows += one_tensor(size, 0.1, given.rounds)
    for dtype in (torch.bfloat16, torch.float16):
        rows += one_tensor(size, given.ratio, given.rounds, dtype)
    rows += small
    print(markdown(machine, command, rows))
    if given.save:
        run = {"command": command, "environment": machine, "rows": [asdict(row) for row in rows]}
        name = f"{slug(str(machine['cpu']))}-{machine['threads']}t.json"
        results.mkdir(parents=True, exist_ok=True)
        with replacing(results / name) as temporary:
            temporary.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        update_marked(page, saved_runs(results))
    ours = [row for row in rows if row.contender not in RIVALS]
    return int(any(row.mask != "same" for row in ours))


if __name__ == "__main__":
    sys.exit(main())
