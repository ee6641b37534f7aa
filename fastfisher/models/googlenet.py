"""GoogLeNet for 32 x 32 images (Szegedy et al. 2015, table 1), with BatchNorm.

The form that the paper's authors use: one 3 x 3 convolution as the stem, two 3 x 3 convolutions in
place of each 5 x 5 one, convolutions with bias, no auxiliary classifiers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Of each module: its output channels by 1 x 1; those of the reduction and the convolution of the
# 3 x 3 branch and of the "5 x 5" branch; and those after the pooling. None is a 3 x 3 max pooling.
_PLAN = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    None,
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    None,
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)
_STEM = 192


def _convolution(inputs: int, outputs: int, size: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


class Inception(nn.Module):
    """Four branches side by side, ``[N, inputs, H, W]`` to ``[N, outputs, H, W]``.

    Attributes:
        outputs: channels of the branches together.
    """

    def __init__(
        self, inputs: int, one: int, reduce3: int, three: int, reduce5: int, five: int, pooled: int
    ) -> None:
        super().__init__()
        self.outputs = one + three + five + pooled
        self.branch1 = nn.Sequential(*_convolution(inputs, one, 1))
        self.branch3 = nn.Sequential(
            *_convolution(inputs, reduce3, 1), *_convolution(reduce3, three, 3)
        )
        self.branch5 = nn.Sequential(
            *_convolution(inputs, reduce5, 1),
            *_convolution(reduce5, five, 3),
            *_convolution(five, five, 3),
        )
        self.pooled = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), *_convolution(inputs, pooled, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, inputs, H, W]``."""
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), self.pooled(x)], 1)


def googlenet(num_classes: int, in_channels: int) -> nn.Module:
    """Build the net.

    Args:
        num_classes: outputs.
        in_channels: channels of the images, which may have any size.
    """
    layers = _convolution(in_channels, _STEM, 3)
    width = _STEM
    for channels in _PLAN:
        if channels is None:
            layers.append(nn.MaxPool2d(3, stride=2, padding=1))
            continue
        module = Inception(width, *channels)
        layers.append(module)
        width = module.outputs
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)
    )
