"""The command line ``fastfisher``: options, output streams, errors and exit codes.

What the commands do is in :mod:`fastfisher.commands`. Exit codes: 0 done, 1 failed, 2 wrong usage,
130 interrupted. With ``--json`` one JSON document is all that goes to the standard output.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TextIO, get_args

import torch

from . import __version__, commands
from .data import dataset_names
from .masking import Granularity
from .models import names as model_names
from .runs import to_json
from .unlearning import methods

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; default those of the process.

    Returns:
        The exit code. ``--help`` and ``--version`` raise ``SystemExit``, as argparse does.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("fastfisher: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has left. Without this the interpreter complains again at its exit.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        return FAILED
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"fastfisher: error: {_line(error)}", file=sys.stderr)
        return USAGE if isinstance(error, commands.UsageError) else FAILED


def _run(arguments: Sequence[str]) -> int:
    args = parser().parse_args(arguments)
    args.command_line = shlex.join(["fastfisher", *arguments])
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = _show_warning
        document_stream: TextIO = sys.stdout
        if args.json:
            # A user's own model or data may print, too.
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        outcome = args.run_command(args)
    if args.json:
        print(to_json(outcome.document), file=document_stream)
    document_stream.flush()
    return OK if outcome.good else FAILED


def _line(error: Exception) -> str:
    """The error in one line that a user of the command line can act on."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    # The str() of a KeyError is the repr() of its message.
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = " ".join(str(message).split())
    if isinstance(error, (ArithmeticError, OSError, ValueError, TypeError, LookupError)) and text:
        return text
    if isinstance(error, (ImportError, AttributeError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"fastfisher: warning: {' '.join(str(message).split())}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line like every other error: in one line."""

    def error(self, message: str) -> NoReturn:
        raise commands.UsageError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = _Parser(
        prog="fastfisher",
        description="Exact diagonal Fisher information, and unlearning with it.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
    )
    top.add_argument("--version", action="version", version=f"fastfisher {__version__}")
    subparsers = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], commands.Outcome], text: str
    ) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(run_command=run)
        common = sub.add_argument_group("common options")
        common.add_argument(
            "--json", action="store_true", help="print one JSON document; all else goes to stderr"
        )
        common.add_argument("--debug", action="store_true", help="show the traceback of an error")
        common.add_argument("--threads", type=_positive, metavar="N", help="CPU threads to use")
        return sub

    demo = command("demo", commands.demo, "train on scikit-learn's digits, unlearn a class, report")
    demo.add_argument(
        "--forget-class", type=_natural, default=0, metavar="C", help="digit to forget (default 0)"
    )
    demo.add_argument("--seed", type=_natural, default=0, metavar="N", help="default 0")
    _out(demo, "runs/demo, where an earlier demo is replaced")

    train = command("train", commands.train, "train a model to unlearn from")
    train.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help=f"{', '.join(model_names())} (resnet: any 6n+2), or your own as "
        "package.module:callable, called without arguments",
    )
    _data(train, required=True)
    train.add_argument("--download", action="store_true", help="fetch a missing data set")
    train.add_argument("--epochs", type=_positive, metavar="N", help="default 160")
    _recipe(train, default_batch=128)
    _out(train)

    score = command("score", commands.score, "compute the Fishers of forget and remain set")
    _source(score)
    _forget(score)
    _batch(score)
    _out(score, "the folder `score` in the run")

    unlearn = command("unlearn", commands.unlearn, "make a trained model forget training data")
    _source(unlearn)
    _forget(unlearn)
    known = ", ".join(methods())
    unlearn.add_argument(
        "--method",
        type=_methods,
        default=["fisher-mask"],
        metavar="NAME[,NAME...]",
        help=f"one or more of {known}; several are compared in one report (default fisher-mask)",
    )
    unlearn.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="a hyper-parameter of a method's own, such as fisher-mask.definition=authors or "
        "ssd.alpha=5; may be given again",
    )
    unlearn.add_argument(
        "--ratio",
        type=_share,
        default=0.02,
        metavar="R",
        help="share of the units to zero, 0 to 1 (default 0.02)",
    )
    unlearn.add_argument(
        "--remain-weight",
        type=_weight,
        default=1.0,
        metavar="W",
        help="w of the score F_f - w F_r, or `auto`: searched on held-out training images with "
        "R, and with granularity and scope where they are left at their defaults (default 1)",
    )
    unlearn.add_argument(
        "--granularity",
        choices=get_args(Granularity),
        default="parameter",
        help="what is masked as one: a scalar (default), a convolution kernel or, by random-mask "
        "only, a channel; methods that score channels always mask channels",
    )
    unlearn.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="parameters never to mask, such as 'fc.*'; may be given again",
    )
    unlearn.add_argument(
        "--scope",
        type=_scope,
        default="global",
        metavar="SCOPE",
        help="of what the ratio is taken: `global`, all parameters together (default); `layer`, "
        "each layer; or your own groups as package.module:callable, which maps a parameter's name "
        "to a key of its group",
    )
    unlearn.add_argument(
        "--epochs", type=_natural, default=5, metavar="N", help="of fine-tuning (default 5)"
    )
    unlearn.add_argument(
        "--replay-epochs",
        type=_positive,
        default=5,
        metavar="S",
        help="epochs into which the learning-rate curve of the training is compressed (default 5)",
    )
    unlearn.add_argument(
        "--score-batch-size",
        type=_positive,
        default=128,
        metavar="N",
        help="of scoring and evaluation (default 128)",
    )
    training = unlearn.add_argument_group(
        "original training", "what fine-tuning and `retrain` take from it; default: as in the run"
    )
    training.add_argument("--train-epochs", type=_positive, metavar="N", help="its epochs")
    _recipe(training)
    _out(unlearn, "the folder `unlearn` in the run")

    evaluate = command("evaluate", commands.evaluate, "measure a model on its test data")
    _source(evaluate)
    evaluate.add_argument(
        "--forget-class", type=_natural, metavar="C", help="also the accuracy without this class"
    )
    _batch(evaluate)

    reproduce = command(
        "reproduce", commands.reproduce, "run a recipe of the paper's experiments, or go on with it"
    )
    reproduce.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="a recipe's name, or a TOML file; without one the names are listed",
    )
    reproduce.add_argument(
        "--budget",
        default="small",
        metavar="NAME",
        help="small fits two CPU cores (default), full is the paper's schedule, for a GPU",
    )
    reproduce.add_argument("--data-root", type=Path, metavar="DIR", help="folder of the data sets")
    reproduce.add_argument("--download", action="store_true", help="fetch a missing data set")
    reproduce.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help="tasks at a time (default: one a CPU core, or one where there is a GPU)",
    )
    reproduce.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)"
    )
    reproduce.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write, or to go on with (default runs/reproduce/RECIPE-BUDGET)",
    )

    doctor = command(
        "doctor", commands.doctor, "tell what is installed, and how to fix what is missing"
    )
    doctor.add_argument(
        "--model",
        metavar="NAME",
        help="check the Fisher of this model, too, against single-sample backward passes",
    )
    _data(doctor)
    doctor.add_argument(
        "--samples", type=_positive, default=4, metavar="N", help="to check it on (default 4)"
    )
    return top


# argparse has no public name for what both a parser and a group of it are.
_Options = argparse._ActionsContainer


def _data(options: _Options, *, required: bool = False) -> None:
    which = options.add_mutually_exclusive_group(required=required)
    which.add_argument("--dataset", choices=dataset_names(), help="a data set known by name")
    which.add_argument(
        "--data",
        metavar="MODULE:CALLABLE",
        help="your own as package.module:callable, which returns (train, test) or a DataBundle",
    )
    options.add_argument("--data-root", type=Path, metavar="DIR", help="folder of the data set")
    options.add_argument(
        "--image-size", type=_positive, metavar="N", help="pixels; default the data set's own"
    )


def _source(options: _Options) -> None:
    """A trained model: a run directory, or all of its parts."""
    options.add_argument("--run", type=Path, metavar="DIR", help="run directory of a trained model")
    options.add_argument("--model", metavar="NAME", help="instead of --run: as of `train`")
    options.add_argument(
        "--weights", type=Path, metavar="FILE", help="with --model: its safetensors file"
    )
    _data(options)


def _forget(options: _Options) -> None:
    which = options.add_mutually_exclusive_group(required=True)
    which.add_argument("--forget-class", type=_natural, metavar="C", help="label to forget")
    which.add_argument(
        "--forget-indices",
        type=Path,
        metavar="FILE",
        help="text file with the positions, from 0, of the training samples to forget",
    )


def _recipe(options: _Options, *, default_batch: int | None = None) -> None:
    """Options of :class:`fastfisher.unlearning.TrainRecipe`; ``None`` is for its defaults."""
    batch = f" (default {default_batch})" if default_batch else ""
    options.add_argument(
        "--batch-size", type=_positive, metavar="N", help=f"samples a training step{batch}"
    )
    options.add_argument("--lr", type=_number, metavar="X", help="learning rate (default 0.1)")
    options.add_argument("--momentum", type=_number, metavar="X", help="default 0.9")
    options.add_argument("--weight-decay", type=_number, metavar="X", help="default 1e-4")
    options.add_argument(
        "--schedule",
        type=_schedule,
        metavar="WHEN",
        help="epochs after which the learning rate is multiplied by 0.1, such as 80,120, or by "
        "another factor, such as 80,120x0.2; or `constant`, or `onecycle` (default: after half "
        "and three quarters of the epochs)",
    )
    options.add_argument(
        "--warmup-epochs", type=_natural, metavar="N", help="of linearly rising learning rate"
    )
    options.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="shift and mirror the training images at random",
    )
    options.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="memory format of training; often faster",
    )
    options.add_argument("--seed", type=_natural, metavar="N", help="default 0")


def _batch(options: _Options) -> None:
    options.add_argument(
        "--batch-size", type=_positive, default=128, metavar="N", help="default 128"
    )


def _out(options: _Options, default: str = "") -> None:
    options.add_argument(
        "--out",
        type=Path,
        required=not default,
        metavar="DIR",
        help=f"run directory to write{f' (default {default})' if default else ''}",
    )
    options.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the run at --out, once the new one is done",
    )


def _natural(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def _weight(text: str) -> float | str:
    return text if text == "auto" else _number(text)


def _scope(text: str) -> str:
    if text not in ("global", "layer") and ":" not in text:
        raise argparse.ArgumentTypeError(
            f"expected global, layer or package.module:callable, got {text!r}"
        )
    return text


def _methods(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in methods()]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"expected {', '.join(methods())}, separated by commas, got {unknown[0]!r}"
        )
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"a method is named twice: {text!r}")
    return names


def _option(text: str) -> tuple[str, str, object]:
    """A method, the name of one of its options, and its value: JSON, or else a string."""
    match = re.fullmatch(r"([a-z0-9-]+)\.([a-z_0-9]+)=(.+)", text, re.ASCII)
    if not match:
        raise argparse.ArgumentTypeError(f"expected METHOD.NAME=VALUE, got {text!r}")
    try:
        value = json.loads(match[3])
    except ValueError:
        value = match[3]
    return match[1], match[2], value


def _schedule(text: str) -> dict[str, object]:
    """The recipe's fields that a schedule stands for."""
    if text == "constant":
        return {"schedule": "multistep", "milestones": ()}
    if text == "onecycle":
        return {"schedule": "onecycle", "milestones": (), "warmup_epochs": 0}
    match = re.fullmatch(r"(\d+(?:,\d+)*)(?:x(.+))?", text, re.ASCII)
    if not match:
        raise argparse.ArgumentTypeError(
            f"expected epochs such as 80,120 or 80,120x0.1, constant or onecycle, got {text!r}"
        )
    fields: dict[str, object] = {
        "schedule": "multistep",
        "milestones": tuple(int(epoch) for epoch in match[1].split(",")),
    }
    return fields | ({"gamma": _number(match[2])} if match[2] else {})
