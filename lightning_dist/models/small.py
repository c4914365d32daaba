"""Small convolutional networks for classification and segmentation of small images."""

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class SmallCNN(nn.Module):
    """A classifier of 3x3 convolutions with batch norm, ReLU, and max pooling by 2 between them.

    Args:
        channels: the number of output channels of each convolution.
        num_classes: the number of classes.
        in_channels: the number of channels of an image.

    Shape:
        ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``.

    Example:
        >>> sum(p.numel() for p in SmallCNN([4, 8]).parameters())
        438
    """

    def __init__(
        self, channels: Sequence[int], num_classes: int = 10, in_channels: int = 1
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        layers: list[nn.Module] = []
        for before, after in zip([in_channels, *channels], channels, strict=False):
            layers += [
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.features = nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class SmallUNet(nn.Module):
    """A U-Net (Ronneberger et al., 2015) with batch norm, whose finest feature maps have stride 2.

    In the encoder, each level has two 3x3 convolutions. In the decoder, the coarser map is
    convolved (1x1), resized and added to the finer map, and two 3x3 convolutions follow.

    Args:
        channels: the number of channels of each level, from fine to coarse.
        num_classes: the number of classes.
        in_channels: the number of channels of an image.

    Shape:
        ``(N, in_channels, H, W)`` to logits ``(N, num_classes, H / 2, W / 2)``; odd sizes round up.

    Example:
        >>> import torch
        >>> SmallUNet([4, 8], num_classes=3)(torch.zeros(1, 3, 10, 14)).shape
        torch.Size([1, 3, 5, 7])
    """

    def __init__(self, channels: Sequence[int], num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        before = [in_channels, *channels]
        self.down = nn.ModuleList(
            nn.Sequential(conv_block(a, b, stride=2), conv_block(b, b))
            for a, b in zip(before, channels, strict=False)
        )
        pairs = list(itertools.pairwise(channels))
        self.lateral = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for fine, coarse in pairs)
        self.up = nn.ModuleList(
            nn.Sequential(conv_block(fine, fine), conv_block(fine, fine)) for fine, _ in pairs
        )
        self.classifier = nn.Conv2d(channels[0], num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = []
        x = images
        for level in self.down:
            x = level(x)
            maps.append(x)
        for lateral, level, fine in reversed(
            list(zip(self.lateral, self.up, maps[:-1], strict=True))
        ):
            x = level(fine + F.interpolate(lateral(x), fine.shape[2:], mode="bilinear"))
        return self.classifier(x)


def conv_block(before: int, after: int, stride: int = 1) -> nn.Sequential:
    """Build a 3x3 convolution with batch norm and ReLU.

    Args:
        before: the number of input channels.
        after: the number of output channels.
        stride: the stride of the convolution, in pixels.
    """
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    )
