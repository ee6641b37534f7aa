"""What an experiment does, read from a TOML file; nothing is left to the code's taste.

A recipe may name another one that it ``extends``; tables are merged, all else is replaced. The
tables under ``[budget.NAME]`` change it for a budget: "full" is the recipe itself, "small" fits two
CPU cores. ``[changes.LABEL]`` changes a method's entry without repeating the others.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

from ..data import dataset_names
from ..masking import Granularity
from ..unlearning import TrainRecipe, methods
from ..unlearning.recipe import check_integer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FULL = "full"
RETRAIN = "retrain"
_Table = TypeVar("_Table")


@dataclass(frozen=True)
class DataPart:
    """Which samples.

    Attributes:
        name: of a data set, as :func:`fastfisher.data.load_dataset` takes it.
        image_size: pixels; default the data set's own.
        train_samples: use so many training samples, drawn with each class in proportion; 0 is all.
        test_samples: the same of the test samples.
    """

    name: str
    image_size: int | None = None
    train_samples: int = 0
    test_samples: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        _one_of("data.name", self.name, dataset_names())
        if self.image_size is not None:
            check_integer("data.image_size", self.image_size, 1)
        check_integer("data.train_samples", self.train_samples, 0)
        check_integer("data.test_samples", self.test_samples, 0)


@dataclass(frozen=True)
class Entry:
    """A row of the tables: a method with its arguments.

    Attributes:
        label: what tables call it; unique in a recipe.
        method: a name in :func:`fastfisher.unlearning.methods`.
        options: the method's own hyper-parameters.
        ratio: R; default that of the recipe.
        remain_weight: w, or "auto".
        granularity: of masks.
        scope: "global" or "layer".
        exclude: patterns of parameters never masked.
        epochs: of fine-tuning; default that of the recipe.
        classes_only: the method's definition needs a whole class to forget.
        control: shows what a metric cannot see; no method that anybody should use.
        beyond_paper: the paper does not compare with it.
    """

    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    ratio: float | None = None
    remain_weight: float | str = 1.0
    granularity: Granularity = "parameter"
    scope: str = "global"
    exclude: tuple[str, ...] = ()
    epochs: int | None = None
    classes_only: bool = False
    control: bool = False
    beyond_paper: bool = False

    def __post_init__(self) -> None:
        """Check what :func:`fastfisher.unlearn` would only find after hours."""
        known = [name for name in methods() if name != RETRAIN]
        _one_of(f"methods.{self.label}.method", self.method, known)
        _one_of(f"methods.{self.label}.granularity", self.granularity, get_args(Granularity))
        _one_of(f"methods.{self.label}.scope", self.scope, ("global", "layer"))
        try:
            methods()[self.method].options(self.options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"methods.{self.label}: {error}") from error
        if self.epochs is not None:
            check_integer(f"methods.{self.label}.epochs", self.epochs, 0)
        object.__setattr__(self, "exclude", tuple(self.exclude))


@dataclass(frozen=True)
class UnlearnPart:
    """What the methods have in common.

    Attributes:
        forget_class: the label to forget.
        seeds: one run of each method for each, from an original model of that seed.
        references: models retrained on the remain set, whose spread is the noise of the reference.
        ratio: R.
        epochs: of fine-tuning.
        replay_epochs: S (paper, section 3.4).
        batch_size: of scores and evaluation.
        relearn_epochs: measure the relearn time, up to so many epochs; 0 does not.
    """

    seeds: tuple[int, ...]
    forget_class: int = 0
    references: int = 3
    ratio: float = 0.02
    epochs: int = 30
    replay_epochs: int = 5
    batch_size: int = 128
    relearn_epochs: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"unlearn.seeds: expected different integers, got {self.seeds}")
        for seed in self.seeds:
            check_integer("unlearn.seeds", seed, 0)
        for name, least in (
            ("forget_class", 0),
            ("references", 1),
            ("epochs", 0),
            ("replay_epochs", 1),
            ("batch_size", 1),
            ("relearn_epochs", 0),
        ):
            check_integer(f"unlearn.{name}", getattr(self, name), least)
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"unlearn.ratio: expected 0 to 1, got {self.ratio!r}")


@dataclass(frozen=True)
class Study:
    """One experiment beside the removal of a class, over some values, of some methods.

    Attributes:
        values: shares of noisy labels, sizes of the remain set, ratios, or constant learning
            rates.
        methods: labels of entries.
        epochs: of fine-tuning; default that of the recipe.
    """

    values: tuple[float, ...]
    methods: tuple[str, ...]
    epochs: int | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "methods", tuple(self.methods))
        if self.epochs is not None:
            check_integer("epochs", self.epochs, 0)


@dataclass(frozen=True)
class AuditPart:
    """Membership attacks by shadow models.

    Attributes:
        shadows: models trained besides those of the seeds, on all data, and unlearned by each
            audited method, and as many retrained ones: U-LiRA's.
        methods: labels of entries; default those of the paper.
        shokri: shadow models on random halves, for the attack of Shokri et al.; 0 leaves it out.
    """

    shadows: int = 0
    methods: tuple[str, ...] = ()
    shokri: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        object.__setattr__(self, "methods", tuple(self.methods))
        check_integer("audit.shadows", self.shadows, 0)
        check_integer("audit.shokri", self.shokri, 0)


@dataclass(frozen=True)
class Recipe:
    """A whole experiment; see the classes of its parts.

    Attributes:
        name: of the file, without its ending.
        version: raised whenever the results would change.
        budget: which of its budgets this is.
        outliers: over shares of noisy labels (paper, section 4.2).
        limited: over sizes of the remain set (4.3).
        ratios: over R (4.4).
        schedules: over constant learning rates, beside the replayed schedule (4.5).
    """

    name: str
    title: str
    version: int
    budget: str
    data: DataPart
    model: str
    train: TrainRecipe
    unlearn: UnlearnPart
    methods: tuple[Entry, ...]
    text: str = ""
    outliers: Study | None = None
    limited: Study | None = None
    ratios: Study | None = None
    schedules: Study | None = None
    audit: AuditPart = AuditPart()

    def __post_init__(self) -> None:
        """Check what the parts have to do with each other."""
        labels = [entry.label for entry in self.methods]
        if len(set(labels)) < len(labels):
            raise ValueError(f"methods: a label occurs twice among {labels}")
        for name in ("outliers", "limited", "ratios", "schedules", "audit"):
            for label in getattr(getattr(self, name), "methods", ()):
                _one_of(f"{name}.methods", label, labels)

    def entry(self, label: str) -> Entry:
        """The entry of a label."""
        return next(entry for entry in self.methods if entry.label == label)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-able values."""
        return {**asdict(self), "train": self.train.to_dict()}


def recipe_names() -> list[str]:
    """Names of the recipes that come with fastfisher."""
    folder = resources.files("fastfisher") / "recipes"
    names = [Path(each.name).stem for each in folder.iterdir() if each.name.endswith(".toml")]
    return sorted(name for name in names if not name.startswith("_"))


def load_recipe(name: str, budget: str = "small") -> Recipe:
    """Read a recipe.

    Args:
        name: one of :func:`recipe_names`, or the path of a TOML file.
        budget: "full", or one that the recipe has a table for.

    Raises:
        ValueError: there is no such recipe or budget; the file is no TOML; or a value is missing,
            unknown or out of range, which the message names.
        TypeError: a value is of the wrong type.
    """
    values = _read(name)
    budgets = values.pop("budget", {})
    if budget != FULL:
        _one_of("budget", budget, [FULL, *budgets])
        values = _merged(values, budgets[budget])
    changes = values.pop("changes", {})
    labels = [entry.get("label") for entry in values.get("methods", [])]
    for label in changes:
        _one_of("changes", label, labels)
    if changes:
        values["methods"] = [
            _merged(entry, changes.get(entry.get("label"), {})) for entry in values["methods"]
        ]
    # A study can be switched off where it is not wanted.
    values = {key: value for key, value in values.items() if value is not False}
    try:
        return _recipe(values, budget)
    except (TypeError, ValueError) as error:
        raise type(error)(f"recipe {name}: {error}") from error


def _recipe(values: dict[str, Any], budget: str) -> Recipe:
    parts: dict[str, type[Any]] = {
        "data": DataPart,
        "unlearn": UnlearnPart,
        "outliers": Study,
        "limited": Study,
        "ratios": Study,
        "schedules": Study,
        "audit": AuditPart,
    }
    built: dict[str, Any] = {"budget": budget}
    for key, value in values.items():
        if key in parts:
            built[key] = _table(parts[key], value, key)
        elif key == "train":
            built[key] = TrainRecipe.from_dict(value)
        elif key == "methods":
            built[key] = tuple(_table(Entry, entry, "methods") for entry in value)
        else:
            built[key] = value
    return _table(Recipe, built, "recipe")


def _table(kind: type[_Table], values: Any, where: str) -> _Table:
    if not isinstance(values, Mapping):
        raise TypeError(f"{where}: expected a table, got {values!r}")
    known = fields(kind)  # type: ignore[arg-type]
    unknown = sorted(set(values) - {each.name for each in known})
    if unknown:
        raise ValueError(f"{where}: unknown names {unknown}")
    needed = [f.name for f in known if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in values]
    if missing:
        raise ValueError(f"{where}: {missing} missing")
    return kind(**values)


def _read(name: str) -> dict[str, Any]:
    if name.endswith(".toml"):
        path: Any = Path(name)
    else:
        path = resources.files("fastfisher") / "recipes" / f"{name}.toml"
        if not path.is_file():
            raise ValueError(
                f"recipe: expected the path of a TOML file or one of {recipe_names()}, got {name!r}"
            )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"recipe: {name} is not valid TOML: {error}") from error
    values.setdefault("name", Path(name).stem)
    base = values.pop("extends", None)
    return values if base is None else _merged(_read(base), values)


def _merged(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``other``; tables are merged."""
    merged = dict(base)
    for key, value in other.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _one_of(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {list(known)}, got {value!r}")
