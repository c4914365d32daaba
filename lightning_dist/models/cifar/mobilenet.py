"""MobileNetV2 at half width for 32x32 images."""

from functools import partial

from torch import Tensor, nn

from lightning_dist.models.cifar.layers import (
    conv,
    depthwise,
    global_average,
    init_classifier,
    init_convs,
    stage,
)

# Each stage is (expansion, channels, stride, depth), as in table 2 of the paper but with half of
# the channels. The second stage has stride 1, because the images are small.
STAGES = (
    (1, 8, 1, 1),
    (6, 12, 1, 2),
    (6, 16, 2, 3),
    (6, 32, 2, 4),
    (6, 48, 1, 3),
    (6, 80, 2, 3),
    (6, 160, 1, 1),
)


class InvertedResidual(nn.Module):
    """A block of 1x1 expansion, 3x3 depthwise and linear 1x1 convolutions.

    It maps (N, in, H, W) to (N, out, H/stride, W/stride), and adds the input if the shapes are
    equal.

    Args:
        in_channels: the number of input channels.
        out_channels: the number of output channels.
        stride: the stride of the depthwise convolution, in pixels.
        expansion: the factor between `in_channels` and the channels of the depthwise convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *_norm_relu(conv(in_channels, inner, 1)),
            *_norm_relu(depthwise(inner, stride)),
            conv(inner, out_channels, 1),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class CifarMobileNetV2(nn.Module):
    """A MobileNetV2 at half width that maps images (N, 3, 32, 32) to logits (N, num_classes).

    Unlike torchvision's and timm's MobileNetV2, it has ReLU instead of ReLU6, an expansion
    convolution in the first stage too, and no dropout. It does not round the numbers of channels to
    multiples of eight.

    Args:
        num_classes: the number of logits.

    Reference:
        Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = _norm_relu(conv(3, 16, 3, stride=2))
        stages = []
        in_channels = 16
        for expansion, channels, stride, depth in STAGES:
            block = partial(InvertedResidual, expansion=expansion)
            stages.append(stage(block, in_channels, channels, stride, depth))
            in_channels = channels
        self.blocks = nn.Sequential(*stages)
        self.conv2 = _norm_relu(conv(in_channels, 1280, 1))
        linear = nn.Linear(1280, num_classes)
        # The Sequential has one layer, because published checkpoints name this layer classifier.0.
        self.classifier = nn.Sequential(linear)
        init_convs(self)
        init_classifier(linear)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, before the pooling, as timm's networks do.

        Args:
            x: images.
        """
        return self.conv2(self.blocks(self.conv1(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(global_average(self.forward_features(x)))


def _norm_relu(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU())


def mobilenet_v2_half(num_classes: int = 100) -> CifarMobileNetV2:
    """Build MobileNetV2 at half width, with seven stages of 8 to 160 channels."""
    return CifarMobileNetV2(num_classes)
