"""The shipped models have the published shapes, and the small one learns."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher.data import batches, load_dataset
from fastfisher.fisher_diag import fisher_diag
from fastfisher.models import build, names
from fastfisher.reference import fisher_diag_loop
from fastfisher.unlearning import TrainRecipe, accuracy, train


def per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


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
        ("googlenet", 3, 32),
        ("googlenet", 1, 8),
        ("densenet", 3, 32),
        ("densenet", 1, 8),
        ("resnet50-imagenet", 3, 32),
        ("resnet50-imagenet", 1, 64),
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
        # "ResNet50" of the paper's authors.
        ("resnet50", 758_554),
        ("vgg16_bn", 14_728_266),
        ("googlenet", 6_166_250),
        # Huang et al. 2017: growth 12, compression 0.5, bottlenecks.
        ("densenet", 1_000_618),
        # He et al. 2016: 25.6 M with 1000 classes.
        ("resnet50-imagenet", 25_557_032 - 990 * 2049),
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
        ("alexnet", {}, r"name: expected one of \['convnet', .*\] or 'resnet\{6n\+2\}', got"),
        ("resnet", {}, "name: expected one of"),
        ("resnet18", {}, "depth 6n [+] 2"),
        ("resnet2", {}, "depth 6n [+] 2"),
        ("convnet", {"num_classes": 0}, "num_classes"),
        ("convnet", {"in_channels": 1.0}, "in_channels"),
        ("convnet", {"image_size": True}, "image_size"),
        ("convnet", {"image_size": 3}, "image_size: 'convnet' needs at least 4"),
        ("vgg16_bn", {"image_size": 31}, "image_size: 'vgg16_bn' needs at least 32"),
        ("densenet", {"image_size": 7}, "image_size: 'densenet' needs at least 8"),
        ("googlenet", {"num_classes": -1}, "num_classes"),
    ],
)
def test_build_rejects(name: str, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **{"num_classes": 10, **arguments})


@pytest.mark.parametrize("name", [*names(), "resnet50"])
def test_the_fisher_of_every_model_is_exact_by_fast_rules(name: str) -> None:
    model = build(name, num_classes=4).double().eval()
    batch = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([3, 0])
    fisher = fisher_diag(model, [batch])
    assert "fallback" not in fisher.rules.values()
    expected = fisher_diag_loop(model, [batch], per_sample)
    assert fisher.keys() == expected.keys()
    for key, value in expected.items():
        assert float((fisher[key] - value).norm()) <= 1e-10 * float(value.norm()), key


def test_densenet_reads_what_came_before_and_puts_its_own_channels_first() -> None:
    model = build("densenet", num_classes=2).eval()
    layer = model.get_submodule("1")
    x = torch.randn(1, 24, 4, 4)
    outputs = layer(x)
    assert outputs.shape == (1, 36, 4, 4)
    assert torch.equal(outputs[:, 12:], x)
    # Four blocks of 6, 12, 24 and 16 layers of two convolutions, three transitions, stem, head.
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 2 * (6 + 12 + 24 + 16) + 3 + 2


def test_googlenet_has_two_small_convolutions_for_a_large_one_and_biases() -> None:
    model = build("googlenet", num_classes=2)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    # Nine modules of seven convolutions, and the stem.
    assert len(convolutions) == 9 * 7 + 1
    assert {m.kernel_size for m in convolutions} == {(1, 1), (3, 3)}
    assert all(m.bias is not None for m in convolutions)


def test_torchvision_is_loaded_only_for_its_own_model() -> None:
    code = (
        "import sys; from fastfisher.models import build; build('googlenet', num_classes=2); "
        "assert 'torchvision' not in sys.modules; build('resnet50-imagenet', num_classes=2); "
        "assert 'torchvision' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_can_be_built() -> None:
    for name in names():
        assert isinstance(build(name, num_classes=2), nn.Module)


def test_convnet_learns_the_digits() -> None:
    digits = load_dataset("digits")
    model = build("convnet", num_classes=10, in_channels=1, image_size=8)
    train(model, digits.train, TrainRecipe(epochs=8))
    assert accuracy(model, batches(digits.test, 128)) > 0.97
