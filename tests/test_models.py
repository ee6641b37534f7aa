"""The shipped models have the published shapes, and the small one learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastfisher.data import batches, load_dataset
from fastfisher.models import build, names
from fastfisher.unlearning import TrainRecipe, accuracy, train


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("convnet", 1, 4),
        ("convnet", 1, 8),
        ("convnet", 3, 32),
        ("resnet8", 1, 8),
        ("resnet20", 3, 32),
        ("resnet20", 1, 28),
        ("vgg16_bn", 3, 32),
        ("vgg16_bn", 1, 64),
    ],
)
def test_models_map_images_to_logits(name: str, channels: int, size: int) -> None:
    model = build(name, num_classes=7, in_channels=channels, image_size=size).eval()
    images = torch.randn(2, channels, size, size)
    outputs = model(images)
    assert outputs.shape == (2, 7)
    assert torch.isfinite(outputs).all()
    # One sample alone has the same output: nothing mixes samples in eval mode.
    torch.testing.assert_close(model(images[:1]), outputs[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # He et al. 2016, table 6: 0.27 M; the option-B shortcuts add 2,752 to option A's 269,722.
        ("resnet20", 272_474),
        ("resnet56", 855_770),
        ("vgg16_bn", 14_728_266),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, parameters: int) -> None:
    model = build(name, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_resnet_depth_counts_the_weighted_layers_of_the_main_path() -> None:
    model = build("resnet26", num_classes=10)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(layers) + 1 == 26
    shortcuts = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert [(m.in_channels, m.out_channels, m.stride) for m in shortcuts] == [
        (16, 32, (2, 2)),
        (32, 64, (2, 2)),
    ]


def test_resnet_convolutions_keep_the_variance() -> None:
    model = build("resnet20", num_classes=10)
    wide = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels == 64]
    assert wide
    for layer in wide:
        fan_in = layer.weight[0].numel()
        assert float(layer.weight.detach().std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.06)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("alexnet", {}, "name: expected 'convnet'"),
        ("resnet", {}, "name: expected 'convnet'"),
        ("resnet18", {}, "depth 6n [+] 2"),
        ("resnet2", {}, "depth 6n [+] 2"),
        ("convnet", {"num_classes": 0}, "num_classes"),
        ("convnet", {"in_channels": 1.0}, "in_channels"),
        ("convnet", {"image_size": True}, "image_size"),
        ("convnet", {"image_size": 3}, "image_size: 'convnet' needs at least 4"),
        ("vgg16_bn", {"image_size": 31}, "image_size: 'vgg16_bn' needs at least 32"),
    ],
)
def test_build_rejects(name: str, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **{"num_classes": 10, **arguments})


def test_names_can_be_built() -> None:
    for name in names():
        assert isinstance(build(name, num_classes=2), nn.Module)


def test_convnet_learns_the_digits() -> None:
    digits = load_dataset("digits")
    model = build("convnet", num_classes=10, in_channels=1, image_size=8)
    train(model, digits.train, TrainRecipe(epochs=8))
    assert accuracy(model, batches(digits.test, 128)) > 0.97
