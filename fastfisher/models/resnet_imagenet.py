"""ResNet-50 of ImageNet (He et al. 2016, table 1): torchvision's, freshly initialised."""

from __future__ import annotations

from torch import nn


def resnet50_imagenet(num_classes: int, in_channels: int) -> nn.Module:
    """Build the net, with another first convolution where the images are not of three channels.

    Args:
        num_classes: outputs.
        in_channels: channels of the images, which may have any size; 224 is what it was made for.
    """
    from torchvision.models import resnet50

    model: nn.Module = resnet50(weights=None, num_classes=num_classes)
    if in_channels != 3:
        stem = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        model.conv1 = stem
    return model
