"""The command line: what it prints and writes, its exit codes, and its errors in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastfisher
from fastfisher import commands, doctor
from fastfisher.cli import main, parser
from fastfisher.fisher_diag import FisherDiag
from fastfisher.masking import Mask

OWN = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

print("printed by the user's module")

def data(n=60, classes=3):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    inputs = torch.randn(n, 6, generator=generator) + 3 * torch.eye(6)[labels]
    return TensorDataset(inputs, labels), TensorDataset(inputs[: n // 2], labels[: n // 2])

def model():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

def images():
    train, test = data()
    return TensorDataset(train.tensors[0].view(-1, 1, 2, 3), train.tensors[1]), test

def only_train():
    return data()[0]

def no_model():
    return "model"

def weight_or_bias(name):
    return name.split(".")[-1]

def fails():
    raise RuntimeError("two\\nlines")

def interrupts():
    raise KeyboardInterrupt
"""


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module", autouse=True)
def _few_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "run"
    assert main(["demo", "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(demo: Path, tmp_path: Path) -> Path:
    """A trained model's run directory that a test may write into."""
    return Path(shutil.copytree(demo / "original", tmp_path / "trained"))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a user's own module in it."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return tmp_path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command that must succeed, with --json; its document."""

    def call(*arguments: object) -> Any:
        capsys.readouterr()
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def test_the_demo_forgets_a_class_and_keeps_the_rest(demo: Path) -> None:
    metrics = json.loads((demo / "metrics.json").read_text())
    mask, retrain = metrics["methods"]
    assert [mask["method"], retrain["method"]] == ["fisher-mask", "retrain"]
    original, masked = mask["history"][:2]
    tuned, retrained = mask["history"][-1], retrain["history"][-1]
    assert original["test_forget"] > 0.9 and original["test_remain"] > 0.95
    assert masked["test_forget"] < 0.10
    assert tuned["test_forget"] <= 0.02
    assert tuned["test_remain"] > retrained["test_remain"] - 0.03
    assert retrained["test_forget"] == 0.0 and retrained["test_remain"] > 0.95


def test_the_demo_leaves_run_directories(demo: Path, call: Callable[..., Any]) -> None:
    files = set(tree(demo))
    run_files = {"config.json", "metrics.json", "model.safetensors"}
    assert files == (
        run_files
        | {"report.html", "result.json", "mask.safetensors"}
        | {f"original/{name}" for name in {*run_files, "report.html"}}
        | {f"retrain/{name}" for name in {*run_files, "result.json"}}
    )
    metrics = json.loads((demo / "metrics.json").read_text())
    history = metrics["methods"][0]["history"]
    for folder, expected in (
        (demo / "original", history[0]),
        (demo, history[-1]),
        (demo / "retrain", metrics["methods"][1]["history"][-1]),
    ):
        found = call("evaluate", "--run", folder, "--forget-class", 0)
        assert found["forget"] == pytest.approx(expected["test_forget"])
        assert found["remain"] == pytest.approx(expected["test_remain"])
    mask = Mask.load(demo / "mask.safetensors")
    assert mask.zeroed == metrics["methods"][0]["mask"]["zeroed"]


def test_the_demo_prints_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "DEMO_RECIPE", commands.TrainRecipe(epochs=1, batch_size=64))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the default place: an earlier demo there is replaced
        assert main(["demo", "--forget-class", "4"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no progress bar where there is no terminal
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    history = json.loads((tmp_path / "runs/demo/metrics.json").read_text())["methods"][0]["history"]
    for label, record in (
        ("original", history[0]),
        ("masked", history[1]),
        ("fine-tuned", history[-1]),
    ):
        shown = [f"{100 * record[f'test_{part}']:.1f}%" for part in ("forget", "remain")]
        assert rows[label][1:3] == shown
    assert "retrained" in rows
    assert "report: runs/demo/report.html" in out
    report = (tmp_path / "runs/demo/report.html").read_text()
    assert f"<td>{rows['masked'][2]}</td>" in report
    assert "fastfisher demo --forget-class 4" in report
    assert list((tmp_path / "runs").iterdir()) == [tmp_path / "runs/demo"]


def test_the_default_place_of_the_demo_is_not_taken_from_others(
    monkeypatch: pytest.MonkeyPatch, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    shutil.copytree(run, "runs/demo")
    before = tree(run.parent)
    assert main(["demo"]) == 1
    assert "runs/demo exists" in capsys.readouterr().err
    assert tree(run.parent) == before


def test_train_writes_what_evaluate_needs(tmp_path: Path, call: Callable[..., Any]) -> None:
    out = tmp_path / "run"
    options = "--epochs 3 --lr 0.05 --schedule 1,2x0.5 --momentum 0.5 --weight-decay 0 --seed 7"
    document = call(
        "train", "--dataset", "digits", "--model", "convnet", "--out", out, *options.split(),
        "--batch-size", 50, "--channels-last", "--augment", "--warmup-epochs", 1,
    )  # fmt: skip
    assert set(tree(out)) == {"config.json", "metrics.json", "model.safetensors", "report.html"}
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"] == {
        "epochs": 3,
        "batch_size": 50,
        "lr": 0.05,
        "momentum": 0.5,
        "weight_decay": 0,
        "milestones": [1, 2],
        "gamma": 0.5,
        "warmup_epochs": 1,
        "schedule": "multistep",
        "augment": True,
        "seed": 7,
        "channels_last": True,
        "precision": "float32",
    }
    assert config["command"].startswith("fastfisher train --dataset digits")
    assert config["environment"]["torch"] == torch.__version__
    metrics = json.loads((out / "metrics.json").read_text())
    assert document == {"run": str(out), **metrics}
    assert [row["epoch"] for row in metrics["history"]] == [1, 2, 3]
    found = call("evaluate", "--run", out)
    assert found["accuracy"] == pytest.approx(metrics["test"])
    assert f"{100 * metrics['test']:.2f}%" in (out / "report.html").read_text()


def test_the_seed_decides(tmp_path: Path, call: Callable[..., Any]) -> None:
    weights = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        call("train", "--dataset", "digits", "--model", "convnet", "--epochs", 1, "--seed", seed,
             "--out", tmp_path / name)  # fmt: skip
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["a"] == weights["b"] != weights["c"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("constant", {"schedule": "multistep", "milestones": ()}),
        ("onecycle", {"schedule": "onecycle", "milestones": (), "warmup_epochs": 0}),
        ("8", {"schedule": "multistep", "milestones": (8,)}),
        ("8,12", {"schedule": "multistep", "milestones": (8, 12)}),
        ("8,12x0.2", {"schedule": "multistep", "milestones": (8, 12), "gamma": 0.2}),
    ],
)
def test_schedules(text: str, expected: dict[str, object]) -> None:
    arguments = ["train", "--dataset", "digits", "--model", "m", "--out", "o", "--schedule", text]
    assert parser().parse_args(arguments).schedule == expected


def test_score_writes_and_sums_up_both_fishers(run: Path, call: Callable[..., Any]) -> None:
    document = call("score", "--run", run, "--forget-class", 3)
    out = run / "score"
    assert document["run"] == str(out)
    assert set(tree(out)) == {
        "config.json", "metrics.json", "forget.safetensors", "remain.safetensors",
    }  # fmt: skip
    fishers = {part: FisherDiag.load(out / f"{part}.safetensors") for part in ("forget", "remain")}
    assert document["samples"] == {part: f.samples for part, f in fishers.items()}
    assert document["samples"]["forget"] + document["samples"]["remain"] == 1437
    names = set(load_file(run / "model.safetensors")) & set(fishers["forget"])
    assert set(document["parameters"]) == set(fishers["forget"]) == names
    for part, fisher in fishers.items():
        rows = {name: row[part] for name, row in document["parameters"].items()}
        for name, value in fisher.items():
            assert rows[name]["sum"] == pytest.approx(float(value.double().sum()))
            assert rows[name]["max"] == float(value.max())
            assert document["parameters"][name]["rule"] == fisher.rules[name]
            assert document["parameters"][name]["scalars"] == value.numel()
        assert sum(row["share"] for row in rows.values()) == pytest.approx(1)


def test_options_of_a_method_reach_it(run: Path, call: Callable[..., Any]) -> None:
    call(
        "unlearn", "--run", run, "--method", "ssd,fisher-mask", "--forget-class", 1, "--epochs", 0,
        "--option", "ssd.alpha=3.5", "--option", "fisher-mask.definition=paper",
    )  # fmt: skip
    out = run / "unlearn"
    options = [
        json.loads((folder / "result.json").read_text())["config"]["options"]
        for folder in (out, out / "fisher-mask")
    ]
    assert options[0]["alpha"] == 3.5
    assert options[1]["definition"] == "paper"
    assert "3.5" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("alpha=3", "expected METHOD.NAME=VALUE, got 'alpha=3'"),
        ("salun.lr=1", "'salun' is not among --method"),
        ("ssd.beta=1", "options: 'ssd' has no 'beta', only ['alpha', 'dampening', 'definition']"),
        ("ssd.alpha=-1", "options.alpha: must be"),
        ("ssd.alpha=high", "options.alpha: expected a number, got 'high'"),
    ],
)
def test_a_bad_option_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    before = tree(run)
    command = ["unlearn", "--run", str(run), "--forget-class", "1", "--method", "ssd"]
    assert main([*command, "--option", option]) == 2
    assert message in capsys.readouterr().err
    assert tree(run) == before


def test_unlearn_compares_methods_in_one_report(run: Path, call: Callable[..., Any]) -> None:
    before = tree(run)
    document = call(
        "unlearn", "--run", run, "--method", "fisher-mask,random-mask,finetune,retrain",
        "--forget-class", 1, "--ratio", 0.1, "--remain-weight", 2, "--granularity", "kernel",
        "--exclude", "13.*", "--scope", "layer", "--epochs", 2, "--train-epochs", 2,
        "--replay-epochs", 1,
    )  # fmt: skip
    out = run / "unlearn"
    assert {name: content for name, content in tree(run).items() if "/" not in name} == before
    assert list(document["accuracies"]) == [
        "original",
        "fisher-mask: masked",
        "fisher-mask: fine-tuned",
        "random-mask: masked",
        "random-mask: fine-tuned",
        "finetune: fine-tuned",
        "retrained",
    ]
    assert [len(method["history"]) for method in document["methods"]] == [4, 4, 3, 3]
    first = [method["history"][0] for method in document["methods"]]
    assert first == first[:1] * 4  # each method begins with the trained model
    result = json.loads((out / "result.json").read_text())["config"]
    assert (result["ratio"], result["remain_weight"], result["replay_epochs"]) == (0.1, 2.0, 1)
    assert (result["granularity"], result["exclude"]) == ("kernel", ["13.*"])
    assert result["scope"] == "layer"
    assert result["recipe"]["milestones"] == [1]  # of 2 epochs, not the 12 of the run
    mask = Mask.load(out / "mask.safetensors")
    assert (mask.granularity, mask.remain_weight, mask.ratio) == ("kernel", 2.0, 0.1)
    assert not any(name.startswith("13") for name in mask.counts)
    assert len(mask.groups) == len(mask.counts) > 1  # only weights are scored: one in a layer
    report = (out / "report.html").read_text()
    for label, stage in document["accuracies"].items():
        row = report.split(f"<td>{label}</td>")[1].split("</tr>")[0]
        assert f"<td>{100 * stage['test_remain']:.1f}%</td>" in row
    for folder, label in (
        (out, "fisher-mask: fine-tuned"),
        (out / "finetune", "finetune: fine-tuned"),
    ):
        found = call("evaluate", "--run", folder, "--forget-class", 1)
        assert found["remain"] == pytest.approx(document["accuracies"][label]["test_remain"])


def test_unlearn_searches_the_weight(run: Path, call: Callable[..., Any]) -> None:
    document = call(
        "unlearn", "--run", run, "--forget-class", 1, "--remain-weight", "auto", "--epochs", 0
    )
    chosen = document["methods"][0]["chosen"]
    mask = Mask.load(run / "unlearn/mask.safetensors")
    assert (mask.remain_weight, mask.ratio) == (chosen["remain_weight"], chosen["ratio"])
    assert mask.granularity == chosen["granularity"]
    report = (run / "unlearn/report.html").read_text()
    assert f'<td class="chosen">{100 * chosen["forget"]:.1f}% / ' in report


def test_the_ratio_is_that_of_groups_of_ones_own(
    own: Path, run: Path, call: Callable[..., Any]
) -> None:
    call(
        "unlearn", "--run", run, "--forget-class", 1, "--epochs", 0,
        "--scope", "own:weight_or_bias",
    )  # fmt: skip
    groups = Mask.load(run / "unlearn/mask.safetensors").groups
    assert [{name.split(".")[-1] for name in group} for group in groups] == [{"weight"}, {"bias"}]
    result = json.loads((run / "unlearn/result.json").read_text())
    assert result["config"]["scope"] == "own:weight_or_bias"


def test_single_samples_are_forgotten_by_position(
    run: Path, tmp_path: Path, call: Callable[..., Any]
) -> None:
    (tmp_path / "indices").write_text("5, 7\n\n9 1436\n")
    document = call(
        "unlearn", "--run", run, "--forget-indices", tmp_path / "indices", "--epochs", 0,
        "--out", tmp_path / "out",
    )  # fmt: skip
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["config"]["samples"] == {
        "train_forget": 4, "train_remain": 1433, "test_remain": 360,
    }  # fmt: skip
    assert document["accuracies"]["masked"]["test_forget"] is None


def test_evaluate_counts_each_class(
    run: Path, call: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    document = call("evaluate", "--run", run, "--forget-class", 2)
    classes = document["classes"]
    assert [c["label"] for c in classes] == list(range(10))
    assert sum(c["samples"] for c in classes) == document["samples"] == 360
    right = [round(c["samples"] * c["accuracy"]) for c in classes]
    assert document["accuracy"] == pytest.approx(sum(right) / 360)
    assert document["forget"] == classes[2]["accuracy"]
    assert document["remain"] == pytest.approx(
        (sum(right) - right[2]) / (360 - classes[2]["samples"])
    )
    assert main(["evaluate", "--run", str(run)]) == 0
    out, err = capsys.readouterr()
    assert f"test accuracy {100 * document['accuracy']:.1f}% on 360 samples" in out
    assert err == ""


def test_ones_own_model_and_data(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = "train --model own:model --data own:data --epochs 8 --batch-size 9 --out run --json"
    assert main(train.split()) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["test"] > 0.9  # and nothing but the document
    assert "printed by the user's module" in err
    unlearn = "unlearn --run run --forget-class 2 --epochs 1 --method fisher-mask,retrain"
    assert main(unlearn.split()) == 0
    same = "evaluate --model own:model --data own:data --weights run/model.safetensors --json"
    assert main(same.split()) == 0
    out = capsys.readouterr().out.splitlines()
    document = json.loads("\n".join(out[out.index("{") :]))
    assert [c["samples"] for c in document["classes"]] == [10, 10, 10]
    assert document["accuracy"] == json.loads((own / "run/metrics.json").read_text())["test"]


BASE = "train --dataset digits --model convnet --epochs 1 --out o"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("", 2, "required: COMMAND"),
        ("learn", 2, "invalid choice: 'learn'"),
        ("train", 2, "required: --model, --out"),
        ("train --model convnet --out o", 2, "one of the arguments --dataset --data is required"),
        (f"{BASE} --dataset svhn", 2, "invalid choice: 'svhn'"),
        (f"{BASE} --data own:data", 2, "not allowed with argument --dataset"),
        (f"{BASE} --epochs 0", 2, "--epochs: expected an integer of at least 1, got '0'"),
        (f"{BASE} --epochs 1.5", 2, "--epochs: expected an integer of at least 1, got '1.5'"),
        (f"{BASE} --seed -1", 2, "--seed"),
        (f"{BASE} --seed x", 2, "--seed: expected an integer of at least 0, got 'x'"),
        (f"{BASE} --lr nan", 2, "--lr: expected a number of at least 0, got 'nan'"),
        (f"{BASE} --lr 0", 2, "recipe.lr: must be positive"),
        (f"{BASE} --momentum 1", 2, "recipe.momentum"),
        (f"{BASE} --schedule 5", 2, "recipe.milestones: expected increasing epochs below epochs=1"),
        (f"{BASE} --schedule soon", 2, "--schedule: expected epochs such as 80,120"),
        (f"{BASE} --schedule 5x-1", 2, "--schedule: expected a number of at least 0, got '-1'"),
        (f"{BASE} --threads 0", 2, "--threads"),
        (f"{BASE} --model nonsense", 1, "name: expected one of ['convnet'"),
        (f"{BASE} --model own", 1, "name: expected one of ['convnet'"),
        (f"{BASE} --model own:absent", 1, "has no 'absent'"),
        (f"{BASE} --model absent:model", 1, "cannot be imported"),
        (f"{BASE} --model own:no_model", 1, "expected a torch.nn.Module, got str"),
        (f"{BASE} --model own:fails", 1, "RuntimeError: two lines"),
        (f"{BASE} --model own:model", 1, "mat1 and mat2 shapes cannot be multiplied"),
        (f"{BASE} --lr 1e30", 1, "the training loss became"),
        ("train --dataset cifar10 --model resnet20 --out o", 1, "data_root"),
        ("train --dataset cifar10 --data-root absent --model resnet20 --out o", 1, "not found"),
        ("train --data own:only_train --model own:model --out o", 1, "expected (train, test)"),
        ("train --data own:data --model convnet --out o", 1, "--model convnet needs images"),
        (f"{BASE}/../existing", 1, "existing exists: choose another --out, or give --overwrite"),
        (f"{BASE}/../existing --overwrite", 1, "existing is no run directory of fastfisher"),
        ("evaluate", 2, "give --run, or --model with --weights"),
        ("evaluate --model convnet --dataset digits", 2, "give --run, or --model with --weights"),
        ("evaluate --run trained --model convnet", 2, "--run brings its own"),
        ("evaluate --run absent", 1, "no run directory at absent: config.json is missing"),
        ("evaluate --run broken", 1, "not valid JSON"),
        ("evaluate --run trained --forget-class 10", 1, "no sample of class 10"),
        ("evaluate --run weightless", 1, "no weights at weightless/model.safetensors"),
        ("evaluate --model convnet --dataset digits --weights own.py", 1, "not a safetensors file"),
        ("evaluate --model resnet20 --dataset digits --weights trained/model.safetensors", 1,
         "holds the weights of another model"),
        ("evaluate --model convnet --dataset digits --weights other.safetensors", 1,
         "holds the weights of another model"),
        ("score --run trained", 2, "one of the arguments --forget-class --forget-indices"),
        ("score --run trained --forget-class 10", 1, "no sample of class 10"),
        ("score --run trained --forget-indices absent", 1, "absent: No such file or directory"),
        ("score --run trained --forget-indices own.py", 1, "expected positions, integers of at"),
        ("score --run trained --forget-indices empty", 1, "expected at least one position"),
        ("score --run trained --forget-indices high", 1, "positions must lie in 0..1436"),
        ("score --model convnet --dataset digits --weights trained/model.safetensors "
         "--forget-class 1", 2, "without --run, --out is required"),
        ("unlearn --run trained --forget-class 1 --method magic", 2, "got 'magic'"),
        ("unlearn --run trained --forget-class 1 --method finetune,finetune", 2, "named twice"),
        ("unlearn --run trained --forget-class 1 --ratio 2", 2, "expected a number from 0 to 1"),
        ("unlearn --run trained --forget-class 1 --remain-weight much", 2, "--remain-weight"),
        ("unlearn --run trained --forget-class 1 --exclude 99.*", 1, "matches no parameter"),
        ("unlearn --run trained --forget-class 1 --granularity row", 2, "--granularity"),
        ("unlearn --run trained --forget-class 1 --scope layers", 2, "--scope: expected global,"),
        ("unlearn --run trained --forget-class 1 --scope own:absent", 1, "has no 'absent'"),
        ("unlearn --run trained --forget-class 1 --scope own:__name__", 1,
         "--scope own:__name__: expected a callable, got str"),
        ("unlearn --run trained/score --forget-class 1", 1, "no run directory at trained/score"),
        ("doctor --run x", 2, "unrecognized arguments: --run x"),
    ],
)  # fmt: skip
def test_every_error_is_one_line(
    own: Path,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    code: int,
    message: str,
) -> None:
    (own / "existing").mkdir()
    (own / "existing" / "precious").write_text("")
    (own / "broken").mkdir()
    (own / "broken" / "config.json").write_text("{")
    (own / "weightless").mkdir()
    shutil.copy(run / "config.json", own / "weightless")
    save_file({"x": torch.zeros(1)}, own / "other.safetensors")
    (own / "empty").write_text("\n")
    (own / "high").write_text("1437")
    before = tree(own)
    for extra in ([], ["--json"]) if arguments else ([],):
        assert main([*arguments.split(), *extra]) == code
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line != "printed by the user's module"]
        assert lines[-1].startswith("fastfisher: error: ")
        assert message in lines[-1]
        if extra:
            assert out == ""
        else:
            assert len(lines) == 1
    after = {name: content for name, content in tree(own).items() if "__pycache__" not in name}
    assert after == before
    assert not list(own.glob("**/.*"))  # no half-written run


def test_debug_shows_the_traceback(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BASE.split(), "--model", "own:fails", "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "in fails" in err
    assert err.splitlines()[-1] == "fastfisher: error: RuntimeError: two lines"


def test_an_interrupt_leaves_nothing(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BASE.split(), "--model", "own:interrupts"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "fastfisher: interrupted"
    assert {path.name for path in own.iterdir()} <= {"own.py", "__pycache__"}


def test_a_failure_at_the_end_leaves_the_old_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(run.parent)

    def fails(*_args: object, **_facts: object) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(commands, "training_page", fails)
    arguments = ["train", "--dataset", "digits", "--model", "convnet", "--epochs", "1"]
    assert main([*arguments, "--out", str(run), "--overwrite"]) == 1
    assert capsys.readouterr().err == "fastfisher: error: no space left\n"
    assert tree(run.parent) == before


def test_overwrite_replaces_a_run(run: Path, call: Callable[..., Any]) -> None:
    old = (run / "model.safetensors").read_bytes()
    call("train", "--dataset", "digits", "--model", "convnet", "--epochs", 1, "--out", run,
         "--overwrite")  # fmt: skip
    assert (run / "model.safetensors").read_bytes() != old
    assert [path.name for path in run.parent.iterdir()] == [run.name]


def test_warnings_are_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warns(*_args: object) -> tuple[list[int], list[int]]:
        warnings.warn("a\nb", stacklevel=2)
        return [1] * 10, [1] * 10

    monkeypatch.setattr(commands, "_per_class", warns)
    before = warnings.showwarning
    assert main(["evaluate", "--run", str(run)]) == 0
    assert capsys.readouterr().err == "fastfisher: warning: a b\n"
    assert warnings.showwarning is before


def test_threads_are_set_for_the_command_only(
    demo: Path, tmp_path: Path, call: Callable[..., Any]
) -> None:
    before = torch.get_num_threads()
    call("train", "--dataset", "digits", "--model", "convnet", "--epochs", 1, "--out",
         tmp_path / "run", "--threads", before + 1)  # fmt: skip
    assert torch.get_num_threads() == before
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["environment"]["threads"] == before + 1
    assert json.loads((demo / "config.json").read_text())["environment"]["threads"] == 1


def test_the_doctor_finds_a_working_installation(
    call: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    document = call("doctor")
    assert document["usable"] is True
    checks = {check["name"]: check for check in document["checks"]}
    assert checks["fastfisher"]["found"] == fastfisher.__version__
    assert checks["torch"]["found"] == torch.__version__
    assert checks["self-test"]["state"] == "ok"
    assert {"CPU kernels", "CPU", "threads", "CUDA", "triton", "torchvision"} <= set(checks)
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert "fastfisher is usable" in out and err == ""


def test_the_doctor_finds_wrong_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = doctor.fisher_diag
    monkeypatch.setattr(
        doctor, "fisher_diag", lambda *a, **k: {n: 1.001 * v for n, v in exact(*a, **k).items()}
    )
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "!!  self-test     fisher_diag is wrong by 1.0e-03" in out
    assert "fastfisher is not usable as it is" in out


@pytest.mark.parametrize(("package", "code"), [("torchvision", 0), ("safetensors", 1)])
def test_the_doctor_tells_how_to_get_a_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str, code: int
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["doctor"]) == code
    out = capsys.readouterr().out
    assert f"{package:<13} not installed" in out
    assert f"to fix: pip install {package}" in out


def test_the_doctor_finds_a_package_that_does_not_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: Callable[..., Any]
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('no operator nms')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    assert main(["doctor", "--json"]) == 1


def test_the_doctor_without_compiled_kernels(
    monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any]
) -> None:
    absent = {"compiled": False, "load_error": "no module", "cpu_isa": None}
    monkeypatch.setattr(doctor.ops, "build_info", lambda: absent)
    kernels = next(c for c in call("doctor")["checks"] if c["name"] == "CPU kernels")
    assert kernels["state"] == "missing"
    assert "plain torch operators serve" in kernels["found"]
    assert "C++ compiler" in kernels["fix"]
    assert doctor.environment()["kernels"] == "plain torch"


def test_a_wrong_cap_of_the_instruction_set_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses() -> dict[str, object]:
        raise ValueError("FASTFISHER_CPU_ISA: expected baseline, got 'x'")

    monkeypatch.setattr(doctor.ops, "build_info", refuses)
    monkeypatch.setenv("FASTFISHER_CPU_ISA", "x")
    assert main(["doctor"]) == 1
    assert "to fix: correct or unset FASTFISHER_CPU_ISA" in capsys.readouterr().out


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--version"], ["--help"], ["unlearn", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"fastfisher {fastfisher.__version__}" in out
    for command in ("demo", "train", "score", "unlearn", "evaluate", "doctor"):
        assert command in out


def test_python_dash_m_and_a_reader_that_leaves(run: Path) -> None:
    command = [sys.executable, "-m", "fastfisher", "evaluate", "--run", str(run)]
    root = Path(fastfisher.__file__).parents[1]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
