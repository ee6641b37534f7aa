"""CIFAR ResNet of depth 6n + 2 (He et al. 2016, section 4.2): widths 16, 32, 64.

The shortcut that changes the shape is a 1 x 1 convolution with BatchNorm (option B), as in the
code of the paper's authors; their "ResNet50" is this net with n = 8.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, ``[N, inputs, H, W]`` to ``[N, outputs, H', W']``."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, inputs, H, W]``."""
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(cast("Tensor", self.bn2(self.conv2(inner)) + self.shortcut(x)))


def resnet(depth: int, num_classes: int, in_channels: int) -> nn.Module:
    """Build the net.

    Args:
        depth: 6n + 2 with n at least 1: 8, 14, 20, 26, 32, 44, 50, 56, 110 ...
        num_classes: outputs.
        in_channels: channels of the images, which may have any size.

    Raises:
        ValueError: ``depth`` is not 6n + 2.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"name: a CIFAR ResNet has depth 6n + 2 (8, 14, 20, ...), got {depth}")
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    ]
    inputs = 16
    for outputs in (16, 32, 64):
        for index in range((depth - 2) // 6):
            stride = 2 if outputs != 16 and index == 0 else 1
            layers.append(Block(inputs, outputs, stride))
            inputs = outputs
    model = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes)
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
