"""Proposition 1 of the paper in numbers: does the bound hold, how tight is it, what does it rank.

    python benchmarks/proposition.py           print the tables
    python benchmarks/proposition.py --save    and put them into docs/proposition.md

The derivation of the constants is in docs/proposition.md; everything is linear regression in
float64, on random problems from fixed seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

if not __package__:
    # Behind the installed packages: the fastfisher with compiled kernels goes before its source.
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import ROOT
from benchmarks.markdown import update_marked

PAGE = ROOT / "docs" / "proposition.md"
FEATURES, REMAIN, FORGET = 40, 450, 50
PROBLEMS = 200
RANDOM_MASKS = 20
RATIOS = (0.05, 0.25)


@dataclass(frozen=True, eq=False)
class Problem:
    """Linear regression ``y ~ N(w x, 1)``, part of whose samples is to be forgotten.

    Fishers are sums over samples, as in the proposition; every ``[d]`` tensor is a diagonal.

    Attributes:
        x: ``[N, d]`` float64.
        y: ``[N]`` float64.
        forget: ``[N]`` bool, with samples on both sides.
    """

    x: Tensor
    y: Tensor
    forget: Tensor

    @cached_property
    def fisher_forget(self) -> Tensor:
        return self.x[self.forget].square().sum(0)

    @cached_property
    def fisher_remain(self) -> Tensor:
        return self.x[~self.forget].square().sum(0)

    @cached_property
    def moment_forget(self) -> Tensor:
        """``b_f = sum over D_f of x y``."""
        return self.y[self.forget] @ self.x[self.forget]

    @cached_property
    def moment_remain(self) -> Tensor:
        return self.y[~self.forget] @ self.x[~self.forget]

    @cached_property
    def trained(self) -> Tensor:
        """``w*``, the optimum on all of D with the Fisher's diagonal in place of it."""
        moment = self.moment_forget + self.moment_remain
        return moment / (self.fisher_forget + self.fisher_remain)

    @cached_property
    def retrained(self) -> Tensor:
        """``w_r*``, the same on D_r."""
        return self.moment_remain / self.fisher_remain

    @cached_property
    def largest_eigenvalue(self) -> float:
        return float(torch.linalg.matrix_norm(self.x, 2)) ** 2

    @cached_property
    def terms(self) -> Tensor:
        """What the bound sums over the weights that are kept: ``(F_f / F_r)^2 / F^2``."""
        total = self.fisher_forget + self.fisher_remain
        return (self.fisher_forget / self.fisher_remain / total).square()

    @cached_property
    def constants(self) -> tuple[float, float]:
        """``c`` and ``c_1``; neither depends on the mask."""
        total = self.fisher_forget + self.fisher_remain
        kept = 2 * (self.moment_forget / total).square()
        c = torch.maximum(self.retrained.square(), kept).sum()
        return float(c), float(self.moment_remain.square().max())

    def kl(self, retrained: Tensor, other: Tensor) -> float:
        """KL divergence between the two models' labels, mean over the inputs in D."""
        return float((self.x @ (retrained - other)).square().mean()) / 2

    def masked_kl(self, masked: Tensor) -> float:
        """From the retrained to the masked model; ``masked`` is bool ``[d]``."""
        return self.kl(self.retrained, self.trained.where(~masked, 0.0))

    def bound(self, masked: Tensor) -> float:
        """The right side of Proposition 1 (equation 3)."""
        c, c1 = self.constants
        kept = float(self.terms[~masked].sum())
        return self.largest_eigenvalue / (2 * len(self.y)) * (c + 2 * c1 * kept)


def random_problem(family: str, generator: torch.Generator) -> Problem:
    """A problem of one of the :data:`FAMILIES`.

    Raises:
        ValueError: an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {sorted(FAMILIES)}, got {family!r}")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    samples = FORGET + REMAIN
    forget = torch.arange(samples) < FORGET
    x = normal(samples, FEATURES)
    if family == "correlated":
        x = x @ normal(FEATURES, FEATURES) / FEATURES**0.5
    if family == "scales":
        x = x * normal(FEATURES).exp()
    if family in ("class", "correlated"):
        # A tenth of the features belongs to what is forgotten, and is faint elsewhere.
        own = torch.arange(FEATURES) < FEATURES // 10
        x = x.where(forget[:, None] | ~own, 0.1 * x)
        x = x.where(~forget[:, None] | own, 0.3 * x)
    y = x @ normal(FEATURES) + normal(samples)
    return Problem(x, y, forget)


FAMILIES = {
    "alike": "all features alike, D_f drawn at random",
    "scales": "features of different scale (log-normal), D_f drawn at random",
    "class": "a tenth of the features is strong on D_f and faint elsewhere",
    "correlated": "the same, all features correlated",
}

RANKINGS: dict[str, Callable[[Problem], Tensor]] = {
    "`F_f - F_r`, sums (the paper)": lambda p: p.fisher_forget - p.fisher_remain,
    "`F_f - F_r`, means (its authors' code)": lambda p: (
        p.fisher_forget / p.forget.sum() - p.fisher_remain / (~p.forget).sum()
    ),
    "`F_f / F_r`": lambda p: p.fisher_forget / p.fisher_remain,
    "the bound's own term": lambda p: p.terms,
    "what lowers the distance most": lambda p: (
        (p.retrained - p.trained).square() - p.retrained.square()
    ),
}


def top(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest."""
    return torch.zeros(len(scores), dtype=torch.bool).scatter(0, scores.topk(count).indices, True)


def random_masks(count: int, generator: torch.Generator) -> list[Tensor]:
    """Masks of ``count`` features each."""
    return [top(torch.rand(FEATURES, generator=generator), count) for _ in range(RANDOM_MASKS)]


def problems(family: str) -> list[Problem]:
    """The problems of the tables, always the same."""
    generator = torch.Generator().manual_seed(0)
    return [random_problem(family, generator) for _ in range(PROBLEMS)]


def tightness(family: str) -> str:
    """A line of the first table."""
    generator = torch.Generator().manual_seed(1)
    ratios, eigen = [], []
    for problem in problems(family):
        for ratio in RATIOS:
            for masked in random_masks(int(ratio * FEATURES), generator):
                kl, bound = problem.masked_kl(masked), problem.bound(masked)
                ratios.append(kl / bound)
                difference = problem.retrained - problem.trained.where(~masked, 0.0)
                largest = problem.largest_eigenvalue * float(difference.square().sum())
                eigen.append(2 * len(problem.y) * kl / largest)
    return (
        f"| {family} | {len(ratios):,} | {sum(r > 1 for r in ratios)} | "
        f"{max(ratios):.2g} | {statistics.median(ratios):.2g} | {statistics.median(eigen):.2g} |"
    )


def rankings(family: str, ratio: float) -> list[str]:
    """Lines of the second table: kept sum and KL, beside random masks and no mask."""
    count = int(ratio * FEATURES)
    generator = torch.Generator().manual_seed(2)
    sums: dict[str, list[float]] = {name: [] for name in RANKINGS}
    kls: dict[str, list[float]] = {name: [] for name in RANKINGS}
    unmasked: dict[str, list[float]] = {name: [] for name in RANKINGS}
    for problem in problems(family):
        drawn = random_masks(count, generator)
        # The mean over all masks of this size: each term is in the same share of them.
        random_sum = float(problem.terms.sum()) * (1 - count / FEATURES)
        random_kl = statistics.fmean(problem.masked_kl(m) for m in drawn)
        for name, score in RANKINGS.items():
            masked = top(score(problem), count)
            sums[name].append(float(problem.terms[~masked].sum()) / random_sum)
            kls[name].append(problem.masked_kl(masked) / random_kl)
            without = problem.masked_kl(torch.zeros_like(masked))
            unmasked[name].append(problem.masked_kl(masked) / without)
    return [
        f"| {family} | {ratio:.0%} | {name} | {statistics.median(sums[name]):.2g} | "
        f"{sum(s < 1 for s in sums[name]) / PROBLEMS:.1%} | {statistics.median(kls[name]):.2g} | "
        f"{sum(k < 1 for k in kls[name]) / PROBLEMS:.1%} | "
        f"{statistics.median(unmasked[name]):.2g} |"
        for name in RANKINGS
    ]


def tables() -> str:
    """Both tables, in Markdown."""
    lines = [
        f"{PROBLEMS} problems of a family, {FEATURES} features, {REMAIN} remain and {FORGET} "
        f"forget samples, {RANDOM_MASKS} random masks of "
        f"{' and of '.join(f'{ratio:.0%}' for ratio in RATIOS)} of the weights for each.",
        "",
        *(f"- {name}: {meaning}." for name, meaning in FAMILIES.items()),
        "",
        "### Does it hold, and how tight is it",
        "",
        "The last column is the part of λ: the median of the KL over what it is with λ alone.",
        "",
        "| family | masks | violations | largest KL / bound | median | median of λ's part |",
        "| --- | --- | --- | --- | --- | --- |",
        *map(tightness, FAMILIES),
        "",
        "### What ranking lowers it",
        "",
        "Medians, in multiples of the mean of random masks of the same problem; below 1 is better "
        "than random, and the percentages say on how many of the problems it is. The last column "
        "is in multiples of the KL without a mask.",
        "",
        "| family | masked | ranking | sum in the bound | below 1 | KL | below 1 | no mask = 1 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for family in FAMILIES:
        for ratio in RATIOS:
            lines += rankings(family, ratio)
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and save them if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help=f"write them into {PAGE.name}")
    options = parser.parse_args(arguments)
    found = tables()
    print(found, end="")
    if options.save:
        update_marked(PAGE, found)


if __name__ == "__main__":
    main()
