"""Building blocks of all CIFAR networks."""

from collections.abc import Callable

from torch import Tensor, nn


def conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """Build a convolution without bias, because a batch norm follows.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: height and width of the kernel in pixels, odd; padding keeps the map's size at
            stride 1.
        stride: stride in pixels.
        groups: number of groups of channels that do not mix.
    """
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False
    )


def depthwise(channels: int, stride: int = 1) -> nn.Conv2d:
    """Build a 3x3 convolution of each channel on its own.

    Args:
        channels: number of input and output channels.
        stride: stride in pixels.
    """
    return conv(channels, channels, 3, stride, groups=channels)


def stage(
    block: Callable[[int, int, int], nn.Module],
    in_channels: int,
    out_channels: int,
    stride: int,
    depth: int,
) -> nn.Sequential:
    """Chain blocks, of which only the first changes the number of channels and the resolution.

    Args:
        block: builds a block from (in_channels, out_channels, stride).
        in_channels: number of input channels of the first block.
        out_channels: number of output channels of every block.
        stride: stride of the first block, in pixels.
        depth: number of blocks.
    """
    first = block(in_channels, out_channels, stride)
    rest = (block(out_channels, out_channels, 1) for _ in range(depth - 1))
    return nn.Sequential(first, *rest)


def global_average(features: Tensor) -> Tensor:
    """Average a map (N, C, H, W) over its pixels to (N, C)."""
    return features.mean(dim=(2, 3))


def init_convs(network: nn.Module) -> None:
    """Initialise convolutions kaiming-normal over their fan-out, with zero biases.

    Batch norms keep PyTorch's initialisation, weight 1 and bias 0.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_classifier(classifier: nn.Linear) -> None:
    """Initialise a classifier near zero, so that its first predictions are almost uniform."""
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
