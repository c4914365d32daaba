"""Tests of the segmentation task: losses, terms on both heads, metrics over a whole set."""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist import DISTLoss
from lightning_dist.functional import dist_loss
from lightning_dist.tasks.segmentation import PixelLoss, SegmentationModule

CLASSES = 5


class TwoHeads(nn.Module):
    """A network that returns logits at a quarter of the resolution, named as in torchvision."""

    def __init__(self, width=6, aux=True):
        super().__init__()
        self.backbone = nn.Conv2d(3, width, 3, stride=4, padding=1)
        self.classifier = nn.Conv2d(width, CLASSES, 1)
        if aux:
            self.aux_classifier = nn.Conv2d(width, CLASSES, 1)

    def forward(self, images):
        features = self.backbone(images).relu()
        heads = {"out": self.classifier(features)}
        if hasattr(self, "aux_classifier"):
            heads["aux"] = self.aux_classifier(features)
        return heads


@pytest.fixture
def loader():
    masks = torch.randint(0, CLASSES, (6, 16, 24))
    masks[:, :3] = 255
    return DataLoader(TensorDataset(torch.randn(6, 3, 16, 24), masks), batch_size=4)


def make_module(teacher=None, student=None, **options):
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    options = {"num_classes": CLASSES, "optimizer": sgd} | options
    return SegmentationModule(student or TwoHeads(), teacher, **options)


def upsampled(logits, size=(16, 24)):
    return F.interpolate(logits, size, mode="bilinear", align_corners=True)


@pytest.mark.parametrize("weight", [2.0, lambda trainer: 2.0], ids=["number", "schedule"])
def test_the_loss_is_task_plus_dist_on_both_heads_at_native_resolution(
    make_trainer, loader, reference_dist_loss, weight
):
    teacher = TwoHeads(width=9)
    module = make_module(teacher, distill_weight=weight)
    student = copy.deepcopy(module.student)
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, loader)
    images, masks = next(iter(loader))
    ours, theirs = student(images), teacher(images)
    task = sum(
        factor * F.cross_entropy(upsampled(ours[name]), masks, ignore_index=255)
        for name, factor in (("out", 1.0), ("aux", 0.4))
    )
    main, aux = (reference_dist_loss(ours[name], theirs[name]) for name in ("out", "aux"))
    logged = trainer.callback_metrics
    assert logged["train/task"].item() == pytest.approx(task.item(), rel=1e-5)
    assert logged["train/distill/main"].item() == pytest.approx(main.item(), rel=1e-4)
    assert logged["train/distill/aux"].item() == pytest.approx(aux.item(), rel=1e-4)
    total = task + 2.0 * (main + 0.4 * aux)
    assert logged["train/loss"].item() == pytest.approx(total.item(), rel=1e-5)


def test_ignored_pixels_are_left_out_of_the_distillation_where_an_option_asks(make_trainer, loader):
    teacher = TwoHeads(width=9)
    module = make_module(teacher, distill_ignored=False)
    student = copy.deepcopy(module.student)
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, loader)
    images, masks = next(iter(loader))
    ours, theirs = student(images), teacher(images)
    stride = 16 // ours["out"].shape[2]
    kept = (masks != 255)[:, ::stride, ::stride]
    assert 0 < kept.sum() < kept.numel()
    for name, term in (("out", "main"), ("aux", "aux")):
        rows = [x[name].movedim(1, -1)[kept] for x in (ours, theirs)]
        found = trainer.callback_metrics[f"train/distill/{term}"].item()
        assert found == pytest.approx(dist_loss(*rows).item(), rel=1e-4)


def test_without_an_auxiliary_head_of_both_there_is_one_term(make_trainer, loader):
    module = make_module(TwoHeads(aux=False))
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, loader)
    assert "train/distill/main" in trainer.callback_metrics
    assert "train/distill/aux" not in trainer.callback_metrics


def confusion(pairs):
    """Compute the confusion matrix without torchmetrics: masks in rows, predictions in columns."""
    table = np.zeros((CLASSES, CLASSES), dtype=np.int64)
    for predicted, mask in pairs:
        kept = mask != 255
        np.add.at(table, (mask[kept], predicted[kept]), 1)
    return table


def test_miou_and_accuracy_are_those_of_the_whole_sets_confusion_matrix(make_trainer, loader):
    loader.dataset.tensors[1][loader.dataset.tensors[1] == 4] = 3  # Class 4 does not occur.
    module = make_module()
    with torch.no_grad():
        module.student.classifier.bias[4] = -100.0
    scores = make_trainer().test(module, loader, verbose=False)[0]
    images, masks = loader.dataset.tensors
    logits = upsampled(module.student(images)["out"])
    table = confusion([(logits.argmax(1).numpy(), masks.numpy())])
    union = table.sum(0) + table.sum(1) - table.diagonal()
    assert union[4] == 0
    iou = table.diagonal()[:4] / union[:4]
    assert scores["test/miou"] == pytest.approx(iou.mean(), rel=1e-5)
    accuracy = table.diagonal().sum() / table.sum()
    assert scores["test/pixel_accuracy"] == pytest.approx(accuracy, rel=1e-5)


def test_a_window_as_large_as_the_image_changes_nothing():
    images = torch.randn(2, 3, 16, 24)
    module = make_module()
    whole = module.infer(module.student, images)
    module.window = (64, 64)
    torch.testing.assert_close(module.infer(module.student, images), whole)


def test_windows_cover_the_image_and_average_where_they_overlap():
    seen = torch.zeros(1, 1, 20, 30)

    class Count(nn.Module):
        """A network that returns its input, and stores its pixels."""

        classifier = nn.Identity()

        def forward(self, images):
            assert images.shape[2:] == (8, 12)
            top, left = (int(x) for x in images[0, 1:, 0, 0])
            seen[:, :, top : top + 8, left : left + 12] += 1
            return images

    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    images = torch.stack([torch.randn(20, 30), rows, columns])[None]
    module = make_module(student=Count(), window=(8, 12))
    torch.testing.assert_close(module.infer(module.student, images), images)
    assert seen.min() >= 1
    assert seen.max() > 1


def test_a_mask_of_ignored_pixels_gives_no_loss_and_no_nan():
    logits = torch.randn(2, CLASSES, 4, 4, requires_grad=True)
    loss = PixelLoss(0.4, 255, True)(logits, torch.full((2, 8, 8), 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_torchvisions_networks_train_as_they_are(make_trainer, loader):
    def network():
        return torchvision.models.segmentation.lraspp_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=CLASSES
        )

    module = make_module(network(), network(), distill_loss=DISTLoss())
    trainer = make_trainer(limit_train_batches=1)
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["train/distill/main"] > 0
    assert 0 <= trainer.callback_metrics["val/miou"] <= 1


def test_segmentation_models_pytorchs_networks_train_as_they_are(make_trainer, loader):
    smp = pytest.importorskip("segmentation_models_pytorch")

    def network():
        return smp.Unet("resnet18", encoder_weights=None, classes=CLASSES)

    masks = torch.randint(0, CLASSES, (4, 32, 32))
    loader = DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), masks), batch_size=4)
    module = make_module(network(), network(), head="segmentation_head")
    trainer = make_trainer()
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["train/distill/main"] > 0
    assert 0 <= trainer.callback_metrics["val/miou"] <= 1


def test_bf16_and_channels_last_train_as_float32_does_but_for_rounding(make_trainer, loader):
    def losses(precision, **options):
        torch.manual_seed(1)
        found = []

        class Keep(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, *_):
                found.append(outputs["loss"].item())
                weight = pl_module.student.backbone.weight
                wanted = torch.channels_last if options else torch.contiguous_format
                assert weight.is_contiguous(memory_format=wanted)

        trainer = make_trainer(max_epochs=3, precision=precision, callbacks=[Keep()])
        trainer.fit(make_module(TwoHeads(width=9), **options), loader)
        return found

    plain = losses("32-true")
    assert losses("32-true", channels_last=True) == pytest.approx(plain, rel=1e-5)
    mixed = losses("bf16-mixed", channels_last=True)
    assert mixed == pytest.approx(plain, rel=0.02)
    assert mixed != plain


def test_training_lowers_the_loss_and_the_distance_to_the_teacher(make_trainer, loader):
    losses = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, *_):
            losses.append(trainer.callback_metrics["train/distill/main"].item())

    trainer = make_trainer(max_epochs=20, callbacks=[Keep()])
    trainer.fit(make_module(TwoHeads(width=9), distill_weight=5.0), loader)
    assert losses[-1] < 0.5 * losses[0]


def test_an_unknown_head_is_an_error_that_lists_near_ones():
    with pytest.raises(Exception, match=r"clasifier.*classifier"):
        make_module(TwoHeads(), head="clasifier")


def test_a_network_without_logits_is_an_error():
    with pytest.raises(ValueError, match=r"segmentation needs \(N, C, h, w\)"):
        PixelLoss(0.4, 255, True)({"logits": torch.zeros(1)}, torch.zeros(1, 2, 2).long())


def test_the_mean_loss_of_a_set_does_not_depend_on_its_batches(make_trainer):
    """Every pixel counts the same, although the images have different numbers of ignored ones."""
    masks = torch.randint(0, CLASSES, (6, 16, 24))
    for index, mask in enumerate(masks):
        mask[: 3 * index] = 255
    data, module = TensorDataset(torch.randn(6, 3, 16, 24), masks), make_module()
    with torch.no_grad():
        logits = upsampled(module.student.eval()(data.tensors[0])["out"])
    expected = F.cross_entropy(logits, masks, ignore_index=255)
    for batch_size in (1, 4, 6):
        (found,) = make_trainer().validate(module, DataLoader(data, batch_size), verbose=False)
        assert found["val/loss"] == pytest.approx(float(expected), rel=1e-5)
