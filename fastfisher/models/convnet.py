"""A small convolutional net: learns the 8 x 8 digits in seconds and runs on 32 x 32 images."""

from __future__ import annotations

from torch import nn


def convnet(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Three 3 x 3 convolutions with BatchNorm, two poolings, one Linear.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        image_size: height and width of the images; at least 4.

    Raises:
        ValueError: ``image_size`` is below 4.
    """
    if image_size < 4:
        raise ValueError(f"image_size: 'convnet' needs at least 4, got {image_size}")

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(in_channels, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )
