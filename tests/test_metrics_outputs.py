"""Distances, curves, summaries and readouts equal what their definitions say, written out."""

from __future__ import annotations

import copy
import math
import statistics

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fastfisher.metrics import (
    Outputs,
    activation_distance,
    average_gap,
    class_confusion,
    confusion_distance,
    confusion_shift,
    forget_error,
    gap,
    js_divergence,
    js_divergences,
    outputs,
    prediction_distance,
    relearn_epochs,
    tug_of_war,
    volatility,
    zrf,
)
from fastfisher.unlearning import TrainRecipe, accuracy, train


def answers(samples: int = 12, classes: int = 4) -> Outputs:
    return Outputs(3 * torch.randn(samples, classes), torch.randint(classes, (samples,)))


def probabilities(samples: int = 7, classes: int = 5) -> Tensor:
    return torch.randn(samples, classes, dtype=torch.float64).softmax(1)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def samples(count: int) -> TensorDataset:
    return TensorDataset(torch.randn(count, 6), torch.randint(3, (count,)))


def test_outputs_are_those_of_eval_mode_and_the_modes_come_back() -> None:
    model, dataset = net().train(), samples(11)
    model[0].eval()
    found = outputs(model, dataset, 4)
    assert [m.training for m in model] == [False, True, True, True]
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(dataset.tensors[0])
    torch.testing.assert_close(found.logits, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.targets, dataset.tensors[1])
    assert len(found) == 11 and found.num_classes == 3
    assert found.accuracy == accuracy(model, [dataset.tensors]) == 1 - forget_error(found)


def test_losses_and_margins_are_those_of_the_softmax() -> None:
    found = answers()
    p = found.probabilities.gather(1, found.targets[:, None])[:, 0]
    torch.testing.assert_close(found.losses, -p.log(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.margins, (p / (1 - p)).log(), rtol=1e-12, atol=1e-12)


def test_losses_and_margins_where_probabilities_round_to_one_and_zero() -> None:
    logits = torch.tensor([[50.0, 0.0, 0.0], [-900.0, 0.0, 0.0], [-math.inf, 0.0, 0.0]])
    found = Outputs(logits, torch.zeros(3, dtype=torch.int64))
    assert float(found.probabilities[0, 0]) == 1
    two = math.log(2)
    assert found.margins.tolist() == pytest.approx([50 - two, -900 - two, -math.inf], rel=1e-15)
    assert found.losses.tolist() == pytest.approx([2 * math.exp(-50), 900 + two, math.inf])


@pytest.mark.parametrize(
    ("logits", "targets", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2).long(), TypeError, "logits"),
        (torch.zeros(2, 3), torch.zeros(2), TypeError, "targets"),
        (torch.zeros(2, 1), torch.zeros(2).long(), ValueError, "logits: .*two classes"),
        (torch.zeros(0, 3), torch.zeros(0).long(), ValueError, "logits: .*one sample"),
        (torch.zeros(2, 3), torch.zeros(3).long(), ValueError, "targets: expected .2."),
        (torch.zeros(2, 3), torch.tensor([0, 3]), ValueError, "targets: .*0..2"),
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), ValueError, "logits: .*NaN"),
        (torch.tensor([[-math.inf] * 2]), torch.tensor([0]), ValueError, "logits: every"),
    ],
)
def test_outputs_refuse(
    logits: Tensor, targets: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Outputs(logits, targets)


def test_outputs_of_nothing() -> None:
    with pytest.raises(ValueError, match="dataset"):
        outputs(net(), samples(0))


def loop_js(p: list[float], q: list[float]) -> float:
    total = 0.0
    for a, b in zip(p, q, strict=True):
        middle = (a + b) / 2
        total += a * math.log(a / middle) if a else 0.0
        total += b * math.log(b / middle) if b else 0.0
    return total / 2


def test_js_divergence_equals_a_loop() -> None:
    p, q = probabilities(), probabilities()
    p[0] = torch.tensor([1.0, 0, 0, 0, 0])
    q[0] = torch.tensor([0.5, 0.5, 0, 0, 0])
    expected = [loop_js(*pair) for pair in zip(p.tolist(), q.tolist(), strict=True)]
    assert js_divergences(p, q).tolist() == pytest.approx(expected, rel=1e-12)
    assert js_divergences(q, p).tolist() == pytest.approx(expected, rel=1e-12)
    assert js_divergence(p, q) == pytest.approx(statistics.fmean(expected), rel=1e-12)
    assert zrf(p, q) == 1 - js_divergence(p, q)


def test_js_divergence_at_its_ends() -> None:
    sure, other = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    assert js_divergence(sure, sure) == 0
    assert js_divergence(sure, other) == pytest.approx(math.log(2), rel=1e-15)


def test_activation_distance_by_hand() -> None:
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    q = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert activation_distance(p, q) == 1
    assert activation_distance(p, q, "l2") == pytest.approx(math.sqrt(2) / 2, rel=1e-15)


def test_distances_refuse_what_is_no_probability() -> None:
    p = probabilities()
    for bad in (p.log(), 2 * p, p * math.nan):
        with pytest.raises(ValueError, match="q: expected probabilities"):
            js_divergence(p, bad)
    with pytest.raises(ValueError, match="p and q"):
        js_divergence(p, p[:3])
    with pytest.raises(ValueError, match="norm"):
        activation_distance(p, p, "l3")  # type: ignore[arg-type]


def test_prediction_distance_counts_what_only_one_gets_right() -> None:
    targets = torch.tensor([0, 0, 1, 1])
    one = Outputs(F.one_hot(torch.tensor([0, 1, 1, 0]), 2).float(), targets)
    two = Outputs(F.one_hot(torch.tensor([0, 0, 1, 0]), 2).float(), targets)
    assert prediction_distance(one, two) == 0.25
    with pytest.raises(ValueError, match="reference"):
        prediction_distance(one, Outputs(two.logits, 1 - targets))


def test_class_confusion_equals_a_loop_and_marks_absent_classes() -> None:
    one = answers()
    one.targets[one.targets == 2] = 1
    two = Outputs(torch.randn(12, 4), one.targets)
    confusion, shift = class_confusion(one), confusion_shift(one, two)
    distance = confusion_distance(one, two)
    for label in (0, 1, 3):
        rows = [i for i in range(12) if one.targets[i] == label]
        mean = sum(one.probabilities[i] for i in rows) / len(rows)
        other = sum(two.probabilities[i] for i in rows) / len(rows)
        torch.testing.assert_close(confusion[label], mean, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(shift[label], mean - other, rtol=1e-12, atol=1e-15)
        half = (mean - other).clamp_min(0).sum()
        torch.testing.assert_close(distance[label], half, rtol=1e-12, atol=1e-15)
    assert bool(confusion[2].isnan().all()) and bool(distance[2].isnan())


CURVE = [0.1, 0.5, 0.2, 0.6]


@pytest.mark.parametrize(
    ("kind", "part", "expected"),
    [
        ("total_variation", "remain", (0.4 + 0.3 + 0.4) / 3),
        ("total_variation", "forget", (0.4 + 0.3 + 0.4) / 3),
        ("max_drawup", "remain", 0.5),
        ("paper_formula", "remain", (0.4 - 0.3 + 0.4) / 2),
        ("paper_formula", "forget", -(0.4 - 0.3 + 0.4) / 2),
        ("paper_code", "remain", 0.5),
        ("paper_code", "forget", 0.2 - 0.6),
    ],
)
def test_volatility_by_hand(kind: str, part: str, expected: float) -> None:
    assert volatility(CURVE, kind, part) == pytest.approx(expected, rel=1e-12)  # type: ignore[arg-type]


def test_drawup_is_of_what_came_before() -> None:
    assert volatility([0.9, 0.1, 0.3, 0.0], "max_drawup") == pytest.approx(0.2)
    assert volatility([0.9, 0.1], "max_drawup") == 0


def test_volatility_refuses() -> None:
    for curve, kind in (([0.5], "total_variation"), ([0.5, 0.6], "paper_formula")):
        with pytest.raises(ValueError, match="curve"):
            volatility(curve, kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="curve"):
        volatility([0.5, math.nan])
    with pytest.raises(ValueError, match="kind"):
        volatility(CURVE, "variance")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="part"):
        volatility(CURVE, part="test")  # type: ignore[arg-type]


def test_summaries_by_hand() -> None:
    assert tug_of_war(forget=-0.5, remain=0.2, test=0.1) == pytest.approx(0.5 * 0.8 * 0.9)
    assert tug_of_war(forget=0, remain=0, test=0) == 1
    assert average_gap(unlearning=-4, remain=2, test=1, membership=-1) == 2
    with pytest.raises(ValueError, match="remain"):
        tug_of_war(forget=0, remain=20, test=0)
    with pytest.raises(ValueError, match="membership"):
        average_gap(unlearning=0, remain=0, test=0, membership=math.nan)


def test_gap_by_hand() -> None:
    found = gap(0.5, [0.1, 0.3])
    assert (found.value, found.mean, found.gap) == pytest.approx((0.5, 0.2, 0.3))
    assert found.spread == pytest.approx(math.sqrt(2 * 0.1**2 / 1))
    assert gap(0.5, [0.5]).spread is None
    with pytest.raises(ValueError, match="references: expected the metric"):
        gap(0.5, [])
    with pytest.raises(ValueError, match="references: expected finite"):
        gap(0.5, [math.inf])


def learnable() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    """A fresh model, samples to relearn, and all samples."""
    inputs = torch.randn(96, 6)
    labels = inputs[:, :3].argmax(1)
    return net(), TensorDataset(inputs[:24], labels[:24]), TensorDataset(inputs, labels)


@pytest.mark.parametrize("definition", ["original", "authors"])
def test_relearning_stops_at_the_first_epoch_that_reaches_the_loss(definition: str) -> None:
    model, forget, everything = learnable()
    before = copy.deepcopy(model.state_dict())

    def relearn(loss: float, epochs: int) -> tuple[int, bool, tuple[float, ...]]:
        found = relearn_epochs(
            model,
            forget,
            everything,
            loss,
            definition=definition,
            max_epochs=epochs,  # type: ignore[arg-type]
        )
        return found.epochs, found.reached, found.losses

    epochs, reached, losses = relearn(-1.0, 6)
    assert (epochs, reached, len(losses)) == (6, False, 7)
    assert losses[0] == pytest.approx(float(outputs(model, forget).losses.mean()))
    target = losses[4]
    first = next(i for i, loss in enumerate(losses) if loss <= target + 1e-5)
    assert relearn(target - 0.9e-5, 6) == (first, True, losses[: first + 1])
    assert relearn(losses[0], 6) == (0, True, losses[:1])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_relearning_by_the_authors_is_plain_training() -> None:
    model, forget, everything = learnable()
    found = relearn_epochs(model, forget, everything, -1.0, definition="authors", max_epochs=3)
    recipe = TrainRecipe(lr=0.1, weight_decay=1e-4, milestones=())
    train(model, everything, recipe, epochs=3, seed=0)
    assert found.losses[-1] == float(outputs(model, forget).losses.mean())


def test_relearning_draws_anew_and_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, forget, everything = learnable()
    seen: list[Tensor] = []
    hook = model.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone()) if module.training else None
    )
    runs = [
        relearn_epochs(model, forget, everything, -1.0, max_epochs=2, seed=seed)
        for seed in (0, 0, 1)
    ]
    hook.remove()
    assert runs[0] == runs[1] != runs[2]
    batches_an_epoch = math.ceil(500 / 128)
    epochs = [torch.cat(seen[i * batches_an_epoch :][:batches_an_epoch]) for i in range(2)]
    assert [len(epoch) for epoch in epochs] == [500, 500]
    counts = [epoch.unique(dim=0, return_counts=True)[1].tolist() for epoch in epochs]
    assert counts[0] != counts[1]


def test_relearning_refuses() -> None:
    model, forget, everything = learnable()
    with pytest.raises(ValueError, match="definition"):
        relearn_epochs(model, forget, everything, 0.0, definition="paper")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target_loss"):
        relearn_epochs(model, forget, everything, math.nan)
    with pytest.raises(ValueError, match="max_epochs"):
        relearn_epochs(model, forget, everything, 0.0, max_epochs=0)
    with pytest.raises(ValueError, match="train_set"):
        relearn_epochs(model, forget, samples(0), 0.0)
