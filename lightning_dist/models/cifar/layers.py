"""Building blocks of all CIFAR networks."""

from collections.abc import Callable

from torch import Tensor, nn


def conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """Build a convolution without bias, because a batch norm follows.

    Args:
        in_channels: the number of input channels.
        out_channels: the number of output channels.
        kernel_size: the height and width of the kernel in pixels, an odd number. At stride 1, the
            padding keeps the size of the map.
        stride: the stride in pixels.
        groups: the number of groups of channels; each group is convolved separately.
    """
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False
    )


def depthwise(channels: int, stride: int = 1) -> nn.Conv2d:
    """Build a 3x3 convolution that processes each channel separately.

    Args:
        channels: the number of input and output channels.
        stride: the stride in pixels.
    """
    return conv(channels, channels, 3, stride, groups=channels)


def stage(
    block: Callable[[int, int, int], nn.Module],
    in_channels: int,
    out_channels: int,
    stride: int,
    depth: int,
) -> nn.Sequential:
    """Build a sequence of blocks; the first may change the number of channels and the resolution.

    Args:
        block: a function that builds a block from (in_channels, out_channels, stride).
        in_channels: the number of input channels of the first block.
        out_channels: the number of output channels of every block.
        stride: the stride of the first block, in pixels.
        depth: the number of blocks.
    """
    first = block(in_channels, out_channels, stride)
    rest = (block(out_channels, out_channels, 1) for _ in range(depth - 1))
    return nn.Sequential(first, *rest)


def global_average(features: Tensor) -> Tensor:
    """Return the average of a feature map (N, C, H, W) over its pixels, shape (N, C)."""
    return features.mean(dim=(2, 3))


def init_convs(network: nn.Module) -> None:
    """Initialise convolutions with Kaiming's normal distribution (fan-out) and zero biases.

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
