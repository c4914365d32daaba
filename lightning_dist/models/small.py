"""Small convolutional networks for small images."""

from collections.abc import Sequence

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """3x3 convolutions with batch norm and ReLU, halving the image after each but the last.

    Args:
        channels: output channels of each convolution.
        num_classes: number of classes.
        in_channels: channels of the image.

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
