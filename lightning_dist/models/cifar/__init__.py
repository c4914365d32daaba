"""CIFAR networks of the distillation literature, which load their published checkpoints.

Every builder takes `num_classes` and returns a network that maps images (N, 3, 32, 32) to logits
(N, num_classes). The parameters have the names of the networks released with Tian, Krishnan, Isola,
"Contrastive Representation Distillation" (ICLR 2020); later papers publish the same networks.
"""

from lightning_dist.models.cifar.mobilenet import mobilenet_v2_half
from lightning_dist.models.cifar.resnet import (
    resnet8,
    resnet8x4,
    resnet14,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet50,
    resnet56,
    resnet110,
)
from lightning_dist.models.cifar.shufflenet import shufflenet_v1, shufflenet_v2
from lightning_dist.models.cifar.vgg import vgg8, vgg11, vgg13, vgg16, vgg19
from lightning_dist.models.cifar.wide_resnet import wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2

__all__ = [
    "mobilenet_v2_half",
    "resnet8",
    "resnet8x4",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet110",
    "shufflenet_v1",
    "shufflenet_v2",
    "vgg8",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
]
