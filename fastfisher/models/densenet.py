"""DenseNet-BC for 32 x 32 images (Huang et al. 2017): blocks of 6, 12, 24 and 16 layers, growth 12.

The form that the paper's authors use: bottlenecks of 4 x growth channels, halving transitions and a
stem of 2 x growth channels. A layer puts its own channels before those that it has read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_BLOCKS = (6, 12, 24, 16)
_GROWTH = 12


def _normalised(inputs: int, convolution: nn.Module) -> list[nn.Module]:
    return [nn.BatchNorm2d(inputs), nn.ReLU(), convolution]


class DenseLayer(nn.Sequential):
    """A bottleneck: ``[N, inputs, H, W]`` to ``[N, growth + inputs, H, W]``, its own ones first."""

    def __init__(self, inputs: int) -> None:
        wide = 4 * _GROWTH
        super().__init__(
            *_normalised(inputs, nn.Conv2d(inputs, wide, 1, bias=False)),
            *_normalised(wide, nn.Conv2d(wide, _GROWTH, 3, padding=1, bias=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, inputs, H, W]``."""
        return torch.cat([super().forward(x), x], 1)


def densenet(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build the net.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        image_size: height and width of the images; at least 8, which three poolings halve to 1.

    Raises:
        ValueError: ``image_size`` is below 8.
    """
    if image_size < 8:
        raise ValueError(f"image_size: 'densenet' needs at least 8, got {image_size}")
    width = 2 * _GROWTH
    layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1, bias=False)]
    for index, depth in enumerate(_BLOCKS):
        if index:
            narrow = nn.Conv2d(width, width // 2, 1, bias=False)
            layers += [*_normalised(width, narrow), nn.AvgPool2d(2)]
            width //= 2
        for _ in range(depth):
            layers.append(DenseLayer(width))
            width += _GROWTH
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)]
    return nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU(), *head)
