"""ShuffleNet V1 and V2 for 32x32 images.

Both start with a 1x1 convolution at full resolution. The papers use larger images and start with a
strided 3x3 convolution and a max pooling. Both keep PyTorch's initialisation, like the published
networks.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from lightning_dist.models.cifar.layers import conv, depthwise, global_average, stage

STEM = 24
GROUPS_V1 = 3


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of several groups, so that the next convolution mixes them.

    Args:
        x: the feature map (N, C, H, W).
        groups: the number of groups of adjacent channels; C must be a multiple of `groups`.

    Returns:
        The map (N, C, H, W) with its channels reordered.
    """
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleUnitV1(nn.Module):
    """A unit of a grouped 1x1, a shuffle, a depthwise 3x3 and a grouped 1x1, with a shortcut.

    It maps (N, in, H, W) to (N, out, H/stride, W/stride). At stride 1 the shortcut is added. At
    stride 2 the shortcut is average-pooled and concatenated, so the convolutions compute only the
    other channels.

    Args:
        in_channels: the number of input channels.
        out_channels: the number of output channels; equal to `in_channels` at stride 1.
        stride: the stride in pixels, 1 or 2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        branch = out_channels if stride == 1 else out_channels - in_channels
        inner = branch // 4
        # The paper uses one group after the stem, because the stem has few channels.
        self.groups = 1 if in_channels == STEM else GROUPS_V1
        self.conv1 = conv(in_channels, inner, 1, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = depthwise(inner, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv(inner, branch, 1, groups=GROUPS_V1)
        self.bn3 = nn.BatchNorm2d(branch)

    def forward(self, x: Tensor) -> Tensor:
        out = channel_shuffle(relu(self.bn1(self.conv1(x))), self.groups)
        # The published networks have a ReLU here, but the paper has none.
        out = relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 1:
            return relu(out + x)
        return relu(torch.cat([out, avg_pool2d(x, 3, stride=2, padding=1)], dim=1))


class CifarShuffleNetV1(nn.Module):
    """A ShuffleNet V1 with three groups: it maps images (N, 3, 32, 32) to logits (N, num_classes).

    Args:
        num_classes: the number of logits.

    Reference:
        Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile
        Devices", CVPR 2018, table 1.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = conv(3, STEM, 1)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.layer1 = stage(ShuffleUnitV1, STEM, 240, 2, 4)
        self.layer2 = stage(ShuffleUnitV1, 240, 480, 2, 8)
        self.layer3 = stage(ShuffleUnitV1, 480, 960, 2, 4)
        self.linear = nn.Linear(960, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, before the pooling, as timm's networks do.

        Args:
            x: images.
        """
        x = relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(global_average(self.forward_features(x)))


class ShuffleUnitV2(nn.Module):
    """A unit that convolves half of the channels and then shuffles all; it keeps the shape.

    Args:
        channels: the number of input and output channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = depthwise(half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, out = x.chunk(2, dim=1)
        out = relu(self.bn1(self.conv1(out)))
        out = self.bn2(self.conv2(out))
        out = relu(self.bn3(self.conv3(out)))
        return channel_shuffle(torch.cat([kept, out], dim=1), 2)


class ShuffleDownV2(nn.Module):
    """A unit of two branches with stride 2, which maps (N, in, H, W) to (N, out, H/2, W/2).

    Args:
        in_channels: the number of input channels of both branches.
        out_channels: the number of output channels; each branch computes half of them.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        # The short branch has a depthwise and a 1x1 convolution.
        self.conv1 = depthwise(in_channels, stride=2)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = conv(in_channels, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        # The long branch has a 1x1, a depthwise and a 1x1 convolution.
        self.conv3 = conv(in_channels, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = depthwise(half, stride=2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv(half, half, 1)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        short = self.bn1(self.conv1(x))
        short = relu(self.bn2(self.conv2(short)))
        long = relu(self.bn3(self.conv3(x)))
        long = self.bn4(self.conv4(long))
        long = relu(self.bn5(self.conv5(long)))
        return channel_shuffle(torch.cat([short, long], dim=1), 2)


class CifarShuffleNetV2(nn.Module):
    """A ShuffleNet V2 at width 1 that maps images (N, 3, 32, 32) to logits (N, num_classes).

    Args:
        num_classes: the number of logits.

    Reference:
        Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design",
        ECCV 2018, table 5.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = conv(3, STEM, 1)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.layer1 = _stage_v2(STEM, 116, 4)
        self.layer2 = _stage_v2(116, 232, 8)
        self.layer3 = _stage_v2(232, 464, 4)
        self.conv2 = conv(464, 1024, 1)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, before the pooling, as timm's networks do.

        Args:
            x: images.
        """
        x = relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return relu(self.bn2(self.conv2(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(global_average(self.forward_features(x)))


def _stage_v2(in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
    units = (ShuffleUnitV2(out_channels) for _ in range(depth - 1))
    return nn.Sequential(ShuffleDownV2(in_channels, out_channels), *units)


def shufflenet_v1(num_classes: int = 100) -> CifarShuffleNetV1:
    """Build ShuffleNet V1 with three groups, 4-8-4 units and 240-480-960 channels."""
    return CifarShuffleNetV1(num_classes)


def shufflenet_v2(num_classes: int = 100) -> CifarShuffleNetV2:
    """Build ShuffleNet V2 at width 1, with 4-8-4 units and 116-232-464 channels."""
    return CifarShuffleNetV2(num_classes)
