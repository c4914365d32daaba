"""Wide residual networks (WRN) for 32x32 images."""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn.functional import relu

from lightning_dist.models.cifar.layers import conv, global_average, init_convs, stage


class PreActivationBlock(nn.Module):
    """A residual block of two 3x3 convolutions, each after a batch norm and a ReLU.

    It maps (N, in, H, W) to (N, out, H/stride, W/stride).

    Args:
        in_channels: the number of input channels.
        out_channels: the number of output channels.
        stride: the stride of the first convolution, in pixels.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        # It is None, not nn.Identity: without a projection, forward adds the raw input instead.
        self.convShortcut = (
            None if in_channels == out_channels else conv(in_channels, out_channels, 1, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = relu(self.bn1(x))
        out = relu(self.bn2(self.conv1(activated)))
        # A projection takes the activated input; without a projection, the raw input is added.
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return shortcut + self.conv2(out)


class WideResNet(nn.Module):
    """A wide residual network that maps images (N, 3, 32, 32) to logits (N, num_classes).

    Args:
        depth: the number of layers, 6n + 4 for n blocks in each of the three stages.
        width: the factor by which the 16, 32 and 64 channels of the stages are multiplied.
        num_classes: the number of logits.

    Reference:
        Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016, table 1.
    """

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        narrow, middle, wide = 16 * width, 32 * width, 64 * width
        self.num_classes = num_classes
        self.conv1 = conv(3, 16, 3)
        self.block1 = _named_stage(16, narrow, 1, blocks)
        self.block2 = _named_stage(narrow, middle, 2, blocks)
        self.block3 = _named_stage(middle, wide, 2, blocks)
        self.bn1 = nn.BatchNorm2d(wide)
        self.fc = nn.Linear(wide, num_classes)
        init_convs(self)
        nn.init.zeros_(self.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, before the pooling, as timm's networks do.

        Args:
            x: images.
        """
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return relu(self.bn1(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(global_average(self.forward_features(x)))


def _named_stage(in_channels: int, out_channels: int, stride: int, depth: int) -> nn.Sequential:
    # Published checkpoints name the blocks block1.layer.0, block1.layer.1, ...
    blocks = stage(PreActivationBlock, in_channels, out_channels, stride, depth)
    return nn.Sequential(OrderedDict(layer=blocks))


def wrn_16_1(num_classes: int = 100) -> WideResNet:
    """Build WRN-16-1 with two blocks per stage and 16-32-64 channels."""
    return WideResNet(16, 1, num_classes)


def wrn_16_2(num_classes: int = 100) -> WideResNet:
    """Build WRN-16-2 with two blocks per stage and 32-64-128 channels."""
    return WideResNet(16, 2, num_classes)


def wrn_40_1(num_classes: int = 100) -> WideResNet:
    """Build WRN-40-1 with six blocks per stage and 16-32-64 channels."""
    return WideResNet(40, 1, num_classes)


def wrn_40_2(num_classes: int = 100) -> WideResNet:
    """Build WRN-40-2 with six blocks per stage and 32-64-128 channels."""
    return WideResNet(40, 2, num_classes)
