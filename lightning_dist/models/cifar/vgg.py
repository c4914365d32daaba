"""VGG networks with batch norm for 32x32 images."""

from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from lightning_dist.models.cifar.layers import global_average, init_classifier, init_convs


class CifarVGG(nn.Module):
    """A VGG with one linear layer that maps images (N, 3, 32, 32) to logits (N, num_classes).

    The number in a name includes the three linear layers of the paper, but these networks have only
    one: VGG-8 has five convolutions and one linear layer.

    Args:
        depths: the number of convolutions in each of the five blocks, which have 64, 128, 256, 512
            and 512 channels.
        num_classes: the number of logits.

    Reference:
        Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
        ICLR 2015, table 1.
    """

    def __init__(self, depths: tuple[int, int, int, int, int], num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.block0 = _block(3, 64, depths[0])
        self.block1 = _block(64, 128, depths[1])
        self.block2 = _block(128, 256, depths[2])
        self.block3 = _block(256, 512, depths[3])
        self.block4 = _block(512, 512, depths[4])
        self.classifier = nn.Linear(512, num_classes)
        init_convs(self)
        init_classifier(self.classifier)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, before the pooling, as timm's networks do.

        Args:
            x: images.
        """
        x = max_pool2d(self.block0(x), 2)
        x = max_pool2d(self.block1(x), 2)
        x = max_pool2d(self.block2(x), 2)
        # There is no pooling between the last two blocks, so both have 4x4 maps.
        return self.block4(self.block3(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(global_average(self.forward_features(x)))


def _block(in_channels: int, channels: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(depth):
        # The bias has no effect before a batch norm, but published checkpoints contain it.
        convolution = nn.Conv2d(in_channels if index == 0 else channels, channels, 3, padding=1)
        layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers)


def vgg8(num_classes: int = 100) -> CifarVGG:
    """Build VGG-8 with five convolutions, one per block; the paper does not have this network."""
    return CifarVGG((1, 1, 1, 1, 1), num_classes)


def vgg11(num_classes: int = 100) -> CifarVGG:
    """Build VGG-11 with eight convolutions, as in configuration A."""
    return CifarVGG((1, 1, 2, 2, 2), num_classes)


def vgg13(num_classes: int = 100) -> CifarVGG:
    """Build VGG-13 with ten convolutions, as in configuration B."""
    return CifarVGG((2, 2, 2, 2, 2), num_classes)


def vgg16(num_classes: int = 100) -> CifarVGG:
    """Build VGG-16 with thirteen convolutions, as in configuration D."""
    return CifarVGG((2, 2, 3, 3, 3), num_classes)


def vgg19(num_classes: int = 100) -> CifarVGG:
    """Build VGG-19 with sixteen convolutions, as in configuration E."""
    return CifarVGG((2, 2, 4, 4, 4), num_classes)
