"""Residual networks for 32x32 images: three stages of basic blocks, and ResNet-50."""

from torch import Tensor, nn
from torch.nn.functional import relu

from lightning_dist.models.cifar.layers import conv, global_average, init_convs, stage


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Build a residual block's shortcut, the identity if its input and output shapes are equal.

    Args:
        in_channels: the number of input channels.
        out_channels: the number of output channels.
        stride: the stride in pixels.
    """
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        conv(in_channels, out_channels, 1, stride),
        nn.BatchNorm2d(out_channels),
    )


class BasicBlock(nn.Module):
    """A residual block of two 3x3 convolutions.

    It maps (N, in, H, W) to (N, out, H/stride, W/stride).

    Args:
        in_channels: the number of input channels.
        out_channels: the number of output channels.
        stride: the stride of the first convolution, in pixels.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return relu(out + self.downsample(x))


class Bottleneck(nn.Module):
    """A residual block of 1x1, 3x3 and 1x1 convolutions.

    It maps (N, in, H, W) to (N, out, H/stride, W/stride).

    Args:
        in_channels: the number of input channels.
        out_channels: the number of output channels; the 3x3 convolution has a quarter of them.
        stride: the stride of the 3x3 convolution, in pixels, as in torchvision.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        inner = out_channels // 4
        self.conv1 = conv(in_channels, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv(inner, inner, 3, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv(inner, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        out = relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """A ResNet of 6n + 2 layers that maps images (N, 3, 32, 32) to logits (N, num_classes).

    Args:
        depth: the number of layers, 6n + 2 for n basic blocks in each of the three stages.
        stem: the number of channels of the first convolution.
        widths: the number of channels of each of the three stages.
        num_classes: the number of logits.

    Reference:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """

    def __init__(
        self, depth: int, stem: int, widths: tuple[int, int, int], num_classes: int
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.num_classes = num_classes
        self.conv1 = conv(3, stem, 3)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = stage(BasicBlock, stem, widths[0], 1, blocks)
        self.layer2 = stage(BasicBlock, widths[0], widths[1], 2, blocks)
        self.layer3 = stage(BasicBlock, widths[1], widths[2], 2, blocks)
        self.fc = nn.Linear(widths[2], num_classes)
        init_convs(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, before the pooling, as timm's networks do.

        Args:
            x: images.
        """
        x = relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(global_average(self.forward_features(x)))


class CifarResNet50(nn.Module):
    """ImageNet's ResNet-50, but with a 3x3 stem of stride 1.

    It maps images (N, 3, 32, 32) to logits (N, num_classes).

    Args:
        num_classes: the number of logits.

    Reference:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = conv(3, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = stage(Bottleneck, 64, 256, 1, 3)
        self.layer2 = stage(Bottleneck, 256, 512, 2, 4)
        self.layer3 = stage(Bottleneck, 512, 1024, 2, 6)
        self.layer4 = stage(Bottleneck, 1024, 2048, 2, 3)
        self.linear = nn.Linear(2048, num_classes)
        init_convs(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, before the pooling, as timm's networks do.

        Args:
            x: images.
        """
        x = relu(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(global_average(self.forward_features(x)))


def _thin(depth: int, num_classes: int) -> CifarResNet:
    return CifarResNet(depth, stem=16, widths=(16, 32, 64), num_classes=num_classes)


def _four_times_wider(depth: int, num_classes: int) -> CifarResNet:
    # The stem is only twice as wide, so the first stage also needs a projection.
    return CifarResNet(depth, stem=32, widths=(64, 128, 256), num_classes=num_classes)


def resnet8(num_classes: int = 100) -> CifarResNet:
    """Build ResNet-8 with one basic block per stage and 16-32-64 channels."""
    return _thin(8, num_classes)


def resnet14(num_classes: int = 100) -> CifarResNet:
    """Build ResNet-14 with two basic blocks per stage and 16-32-64 channels."""
    return _thin(14, num_classes)


def resnet20(num_classes: int = 100) -> CifarResNet:
    """Build ResNet-20 with three basic blocks per stage and 16-32-64 channels."""
    return _thin(20, num_classes)


def resnet32(num_classes: int = 100) -> CifarResNet:
    """Build ResNet-32 with five basic blocks per stage and 16-32-64 channels."""
    return _thin(32, num_classes)


def resnet44(num_classes: int = 100) -> CifarResNet:
    """Build ResNet-44 with seven basic blocks per stage and 16-32-64 channels."""
    return _thin(44, num_classes)


def resnet56(num_classes: int = 100) -> CifarResNet:
    """Build ResNet-56 with nine basic blocks per stage and 16-32-64 channels."""
    return _thin(56, num_classes)


def resnet110(num_classes: int = 100) -> CifarResNet:
    """Build ResNet-110 with eighteen basic blocks per stage and 16-32-64 channels."""
    return _thin(110, num_classes)


def resnet8x4(num_classes: int = 100) -> CifarResNet:
    """Build ResNet-8x4 with one basic block per stage and 64-128-256 channels."""
    return _four_times_wider(8, num_classes)


def resnet32x4(num_classes: int = 100) -> CifarResNet:
    """Build ResNet-32x4 with five basic blocks per stage and 64-128-256 channels."""
    return _four_times_wider(32, num_classes)


def resnet50(num_classes: int = 100) -> CifarResNet50:
    """Build ResNet-50 with 3-4-6-3 bottleneck blocks and 256-512-1024-2048 channels."""
    return CifarResNet50(num_classes)
