"""Models for the shipped data sets, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .convnet import convnet
from .densenet import densenet
from .googlenet import googlenet
from .resnet import resnet
from .resnet_imagenet import resnet50_imagenet
from .vgg import vgg16_bn

__all__ = ["build", "names"]

# From num_classes, in_channels and image_size.
_NAMED: dict[str, Callable[[int, int, int], nn.Module]] = {
    "convnet": convnet,
    "vgg16_bn": vgg16_bn,
    "googlenet": lambda classes, channels, size: googlenet(classes, channels),
    "densenet": densenet,
    "resnet50-imagenet": lambda classes, channels, size: resnet50_imagenet(classes, channels),
}


def names() -> tuple[str, ...]:
    """Names that :func:`build` takes; "resnet20" stands for any depth 6n + 2."""
    return ("resnet20", *_NAMED)


def build(name: str, *, num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """Make a freshly initialised model (from torch's global random generator).

    Args:
        name: "convnet", "vgg16_bn", "googlenet", "densenet", "resnet{6n+2}" such as "resnet20",
            "resnet56" and what the paper's authors call ResNet50, "resnet50"; or
            "resnet50-imagenet", torchvision's ResNet-50.
        num_classes: outputs.
        in_channels: channels of the images.
        image_size: height and width of the images, in pixels.

    Returns:
        A module from ``[N, in_channels, image_size, image_size]`` to logits ``[N, num_classes]``.

    Raises:
        ValueError: unknown name or depth, sizes below 1, or images too small for the model.
    """
    for argument, value in (
        ("num_classes", num_classes),
        ("in_channels", in_channels),
        ("image_size", image_size),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument}: expected a positive integer, got {value!r}")
    if name in _NAMED:
        return _NAMED[name](num_classes, in_channels, image_size)
    if name.startswith("resnet") and name[len("resnet") :].isdecimal():
        return resnet(int(name[len("resnet") :]), num_classes, in_channels)
    raise ValueError(f"name: expected one of {[*_NAMED]} or 'resnet{{6n+2}}', got {name!r}")
