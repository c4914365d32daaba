"""Tests of segmentation with images that have no label, whose mask is ignored everywhere."""

import functools

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist.data.scenes import ScenesDataModule
from lightning_dist.losses import DKDLoss
from lightning_dist.tasks.segmentation import SegmentationModule

CLASSES = 4


class TwoHeads(nn.Module):
    """A network with a main and an auxiliary output at half of the resolution, in float64."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.backbone = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.classifier = nn.Conv2d(width, CLASSES, 1)
        self.aux_classifier = nn.Conv2d(width, CLASSES, 1)
        self.double()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images).tanh()
        return {"out": self.classifier(features), "aux": self.aux_classifier(features)}


class MainOnly(nn.CrossEntropyLoss):
    """A loss of one's own, which is NaN if all pixels are ignored."""

    def forward(self, output: dict[str, Tensor], target: Tensor) -> Tensor:
        sizes = {"size": target.shape[1:], "mode": "bilinear", "align_corners": True}
        return sum(
            super(MainOnly, self).forward(F.interpolate(x, **sizes), target)
            for x in output.values()
        )


def batch_of(labeled: list[bool]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(len(labeled), 3, 8, 8, dtype=torch.float64)
    masks = torch.randint(0, CLASSES, (len(labeled), 8, 8))
    masks[:, :2] = 255
    masks[[not has for has in labeled]] = 255
    return images, masks


def train(make_trainer, batches, teacher=None, **options) -> dict[str, Tensor]:
    """Train one step of SGD with rate 1, and return each parameter's change, the gradient."""
    student = TwoHeads()
    before = {name: x.detach().clone() for name, x in student.named_parameters()}
    module = SegmentationModule(
        student,
        teacher,
        num_classes=CLASSES,
        optimizer=functools.partial(torch.optim.SGD, lr=1.0),
        measure_teacher=False,
        **options,
    )
    make_trainer(precision="64-true").fit(module, DataLoader(batches, batch_size=None))
    return {name: before[name] - x.detach() for name, x in student.named_parameters()}


@pytest.mark.parametrize("labeled", [[True, False, True, False], [False, False]])
@pytest.mark.parametrize("task_loss", [None, MainOnly(ignore_index=255)])
def test_the_loss_is_that_of_the_labelled_images_and_the_terms_of_all(
    make_trainer, reference_dist_loss, labeled, task_loss
):
    batch, teacher = batch_of(labeled), TwoHeads(6)
    options = {} if task_loss is None else {"task_loss": task_loss}
    found = train(make_trainer, [batch], teacher, **options)
    student, (images, masks) = TwoHeads(), batch
    ours, theirs = student(images), teacher(images)
    aux_weight = 0.4 if task_loss is None else 1.0
    loss = 2 * reference_dist_loss(ours["out"], theirs["out"].detach())
    loss = loss + 0.8 * reference_dist_loss(ours["aux"], theirs["aux"].detach())
    if any(labeled):
        rows, kept = torch.tensor(labeled), masks[labeled] != 255
        for name, weight in (("out", 1.0), ("aux", aux_weight)):
            logits = F.interpolate(
                ours[name][rows], (8, 8), mode="bilinear", align_corners=True
            ).movedim(1, -1)[kept]
            loss = loss + weight * F.cross_entropy(logits, masks[labeled][kept])
    names, weights = zip(*student.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, weights), strict=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("task_loss", [None, MainOnly(ignore_index=255)])
def test_a_batch_without_any_label_trains_nothing_but_gives_each_parameter_a_gradient(
    make_trainer, task_loss
):
    seen = {}

    class Student(SegmentationModule):
        def on_before_optimizer_step(self, optimizer):
            seen.update((name, x.grad) for name, x in self.student.named_parameters())

    options = {} if task_loss is None else {"task_loss": task_loss}
    module = Student(TwoHeads(), num_classes=CLASSES, **options)
    trainer = make_trainer(precision="64-true")
    trainer.fit(module, DataLoader([batch_of([False, False])], batch_size=None))
    assert trainer.callback_metrics["train/loss"] == 0
    assert len(seen) == 6
    assert all(grad is not None and not grad.any() for grad in seen.values())


def test_a_loss_with_labels_leaves_out_what_has_none(make_trainer):
    """A term that needs labels is that of the labelled images alone, and 0 without any."""
    options = {"distill_loss": DKDLoss(), "aux_weight": 0.0}
    (images, masks), teacher = batch_of([True, False]), TwoHeads(6)
    found = train(make_trainer, [(images, masks)], teacher, **options)
    alone = train(make_trainer, [(images[:1], masks[:1])], teacher, **options)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-12)
    without = train(make_trainer, [(images[1:], masks[1:])], teacher, **options)
    assert not any(x.any() for x in without.values())


def test_metrics_leave_out_what_has_no_label(make_trainer):
    images, masks = batch_of([True, False, False, True])
    module = SegmentationModule(TwoHeads(), num_classes=CLASSES)

    def scores(rows):
        loader = DataLoader(TensorDataset(images[rows], masks[rows]), batch_size=2)
        return make_trainer(precision="64-true").validate(module, loader, verbose=False)[0]

    assert scores([0, 1, 2, 3]) == pytest.approx(scores([0, 3]), rel=1e-6)


def test_a_label_of_minus_one_is_not_no_label(make_trainer):
    images, masks = batch_of([True, False])
    masks[0] = -1
    with pytest.raises(ValueError, match="a mask has the label -1"):
        train(make_trainer, [(images, masks)])


def test_images_without_a_label_that_would_not_be_distilled_are_refused(make_trainer):
    data = ScenesDataModule(train_size=4, val_size=2, test_size=2, scene_size=16, labels=2)
    student, teacher = (TwoHeads() for _ in range(2))
    module = SegmentationModule(student, teacher, num_classes=11, distill_ignored=False)
    with pytest.raises(MisconfigurationException, match=r"labels=2 .*distill_ignored=True"):
        make_trainer().fit(module, data)
