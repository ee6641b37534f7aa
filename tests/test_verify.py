"""``verify`` finds a wrong rule and names its parameter."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from fastfisher import cli, ops, verify


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    )


BATCH = (torch.randn(4, 1, 8, 8), torch.arange(4))


def test_an_exact_model() -> None:
    subject = model().train()
    checks = verify(subject, BATCH)
    assert {check.name for check in checks} == {name for name, _ in subject.named_parameters()}
    assert all(check.exact for check in checks)
    assert subject.training and subject[0].weight.dtype == torch.float32


def test_a_wrong_rule_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.conv2d_sum_grad_squared_

    def wrong(out: Tensor, *args: object, **kwargs: object) -> None:
        right(out, *args, **kwargs)  # type: ignore[arg-type]
        out[0].mul_(1.001)

    monkeypatch.setattr(ops, "conv2d_sum_grad_squared_", wrong)
    checks = verify(model(), BATCH)
    assert [check.name for check in checks if not check.exact] == ["0.weight"]
    assert checks[0].name == "0.weight"


def test_doctor_checks_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["doctor", "--json", "--model", "convnet", "--dataset", "digits", "--samples", "3"]
    assert cli.main(command) == 0
    parameters = json.loads(capsys.readouterr().out)["parameters"]
    assert parameters and all(p["exact"] for p in parameters)
    assert cli.main(["doctor", "--model", "convnet"]) == cli.USAGE
