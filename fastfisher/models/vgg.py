"""VGG16 with BatchNorm for 32 x 32 images: thirteen convolutions and a single Linear."""

from __future__ import annotations

from torch import nn

# Output channels of each 3 x 3 convolution; 0 is a 2 x 2 max pooling.
_PLAN = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


def vgg16_bn(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build the net (the CIFAR form of Simonyan and Zisserman's configuration D).

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        image_size: height and width of the images; at least 32, which five poolings halve to 1.

    Raises:
        ValueError: ``image_size`` is below 32.
    """
    if image_size < 32:
        raise ValueError(f"image_size: 'vgg16_bn' needs at least 32, got {image_size}")
    layers: list[nn.Module] = []
    inputs = in_channels
    for outputs in _PLAN:
        if outputs == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    model = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes)
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return model
