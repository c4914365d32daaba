"""The building blocks that the CIFAR network families share."""

from collections.abc import Callable

from torch import Tensor, nn


def conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """Convolution that keeps the map's size at stride 1; no bias, as a batch norm follows it."""
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False
    )


def depthwise(channels: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution of each channel on its own."""
    return conv(channels, channels, 3, stride, groups=channels)


def stage(
    block: Callable[[int, int, int], nn.Module],
    in_channels: int,
    out_channels: int,
    stride: int,
    depth: int,
) -> nn.Sequential:
    """Chain `depth` blocks, of which the first alone changes the width and the resolution."""
    first = block(in_channels, out_channels, stride)
    rest = (block(out_channels, out_channels, 1) for _ in range(depth - 1))
    return nn.Sequential(first, *rest)


def global_average(features: Tensor) -> Tensor:
    """Average a map (N, C, H, W) over its pixels to (N, C)."""
    return features.mean(dim=(2, 3))


def init_convs(network: nn.Module) -> None:
    """Draw convolutions kaiming-normal over their fan-out, with zero biases.

    Batch norms need no word here: PyTorch starts them at weight one and bias zero.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_classifier(classifier: nn.Linear) -> None:
    """Start a classifier near zero, so that the first predictions are near uniform."""
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
