"""Tests that the losses beside DIST and KD train in every task, with labels and feature maps."""

import functools
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from timm.data import Mixup
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composition import composed
from lightning_dist import DistillationCallback, DistillModule, Term
from lightning_dist.cli.run.initial_weights import without_weights_of_student
from lightning_dist.functional import dkd_loss, sp_loss
from lightning_dist.losses import (
    DISTFeatureLoss,
    DKDLoss,
    KDLoss,
    SPLoss,
    StandardisedLogits,
)
from lightning_dist.tasks.classification import ClassificationModule
from lightning_dist.tasks.segmentation import SegmentationModule

sgd = functools.partial(torch.optim.SGD, lr=0.1)
DIGITS, RETINANET = "digits", "scenes/detection_retinanet"
SEGMENTATION, FASTERRCNN = "scenes/segmentation", "scenes/detection_fasterrcnn"


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def built(config: DictConfig) -> DistillModule:
    settings = OmegaConf.to_container(config.module.student, resolve=True)
    student, _ = without_weights_of_student(settings)
    return instantiate(config.module, student=instantiate(student))


def batches(size: int = 8, last: int | None = None) -> DataLoader:
    count = 3 * size + (size if last is None else last)
    return DataLoader(
        TensorDataset(torch.randn(count, 6), torch.arange(count) % 4), batch_size=size
    )


@pytest.mark.parametrize(
    ("experiment", "distill"),
    [
        *((DIGITS, name) for name in ("dkd", "lskd", "reverse_kd", "at", "sp", "rkd", "cka")),
        *((DIGITS, name) for name in ("fitnet", "dist_plus")),
        *((SEGMENTATION, name) for name in ("dkd", "jeffreys", "cwd", "dist_plus")),
        *((RETINANET, name) for name in ("lskd", "jsd", "cwd", "at")),
        *((FASTERRCNN, name) for name in ("lskd", "fitnet", "dist_plus")),
    ],
)
def test_a_loss_of_conf_trains_a_task(experiment, distill, make_trainer):
    sizes = ["data.train_size=32"]
    if experiment != DIGITS:
        sizes += ["data.val_size=8", "data.test_size=8"]
    quick = ["trainer=cpu", "data.global_batch_size=8", "module.measure_teacher=false"]
    config = composed(f"experiment={experiment}", f"distill={distill}", *quick, *sizes)
    module = built(config)
    trainer = make_trainer(limit_train_batches=2, limit_val_batches=0)
    trainer.fit(module, instantiate(config.data))
    found = trainer.callback_metrics
    names = [name for name in found if name.startswith("train/distill")]
    assert all(found[name].isfinite() and found[name] > 0 for name in names)
    features = distill in ("at", "sp", "rkd", "cka", "fitnet", "dist_plus")
    assert ("train/distill/features" in found) == features
    assert not any("_distillation" in name for name in module.state_dict())


@pytest.mark.parametrize(
    ("experiment", "distill", "message"),
    [
        (DIGITS, "cwd", "compares the places of a map"),
        (FASTERRCNN, "cwd", "compares the places of a map"),
        (RETINANET, "dkd", "DKDLoss needs a label for each row"),
        (FASTERRCNN, "dkd", "DKDLoss needs a label for each row"),
    ],
)
def test_a_loss_that_makes_no_sense_in_a_task_is_refused(
    experiment, distill, message, make_trainer
):
    config = composed(f"experiment={experiment}", f"distill={distill}", "trainer=cpu")
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        make_trainer(max_steps=1, limit_val_batches=0).fit(built(config), instantiate(config.data))


def test_a_key_of_the_config_trains_a_copy_of_the_teachers_head(make_trainer):
    options = ["distill=dist_plus", "distill.loss.tau=4", "module.adaptive_head=[head,features]"]
    quick = ["trainer=cpu", "data.train_size=32", "module.measure_teacher=false"]
    module = built(composed("experiment=digits", *options, *quick))
    callback = module.configure_distillation()
    (copy,) = (term.loss for term in callback.terms.values() if term.teacher == "features")
    assert copy.loss.tau == 4
    head = module.teacher.network.head.weight
    module.configure_distillation = lambda: callback
    datamodule = instantiate(composed("experiment=digits", *options, *quick).data)
    make_trainer(max_steps=2, limit_val_batches=0).fit(module, datamodule)
    assert not copy.head.weight.equal(head.cpu())
    assert head.equal(built(composed("experiment=digits")).teacher.network.head.weight)


@pytest.mark.parametrize(
    ("paths", "loss", "message"),
    [
        (["2"], None, "give the paths of the teacher's head and of the part"),
        (["3", "1"], None, "Sequential has no part '3', but 0, 1, 2"),
        (["2", "1"], DKDLoss(), "needs a loss of logits without labels, and this one is DKDLoss"),
    ],
)
def test_a_head_that_cannot_adapt_is_refused(paths, loss, message):
    with pytest.raises(ValueError, match=message):
        ClassificationModule(
            network(), network(), num_classes=4, adaptive_head=paths, distill_loss=loss
        ).configure_distillation()


def value_of(module: DistillModule, data: DataLoader, trainer: Any) -> float:
    trainer.fit(module, data)
    return trainer.callback_metrics["train/distill"].item()


@pytest.mark.parametrize("wrap", [False, True])
def test_a_classifier_gives_dkd_the_labels(wrap, make_trainer):
    student, teacher = network(), network()
    loss: nn.Module = DKDLoss(tau=2.0)
    loss = StandardisedLogits(loss) if wrap else loss
    module = ClassificationModule(
        student, teacher, num_classes=4, optimizer=sgd, distill_loss=loss, distill_weight=1.0
    )
    inputs, labels = next(iter(data := batches()))
    logits = [net(inputs).detach() for net in (student, teacher)]
    if wrap:
        logits = [(x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in logits]
    found = value_of(module, data, make_trainer(max_steps=1))
    assert found == pytest.approx(dkd_loss(*logits, labels, tau=2.0).item(), rel=1e-4)


def test_labels_that_mixup_mixes_are_not_given_to_dkd(make_trainer):
    mixup = Mixup(mixup_alpha=0.8, num_classes=4)
    module = ClassificationModule(
        network(), network(), num_classes=4, mixup=mixup, distill_loss=DKDLoss()
    )
    with pytest.raises(ValueError, match="mixup mixes images: set mixup=None"):
        make_trainer().fit(module, batches())


def test_a_term_without_the_labels_that_its_loss_needs_is_refused():
    with pytest.raises(ValueError, match="needs labels: give the term from_batch"):
        DistillationCallback(network(), terms={"logits": Term(DKDLoss())})


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(3, 4, 2, stride=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(images)


def test_segmentation_gives_dkd_the_labelled_pixels_at_the_resolution_of_the_logits(make_trainer):
    student, teacher = Segmenter(), Segmenter()
    images, masks = torch.randn(2, 3, 8, 8), torch.randint(0, 4, (2, 8, 8))
    masks[:, :4] = 255
    module = SegmentationModule(
        student, teacher, num_classes=4, optimizer=sgd, distill_loss=DKDLoss(), distill_weight=1.0
    )
    logits = [net(images).detach()[:, :, 2:] for net in (student, teacher)]
    expected = dkd_loss(*logits, masks[:, ::2, ::2][:, 2:]).item()
    data = DataLoader(TensorDataset(images, masks), batch_size=2)
    assert value_of(module, data, make_trainer(max_steps=1)) == pytest.approx(expected, rel=1e-5)


def test_one_sample_is_refused_by_a_loss_of_relations_unless_it_is_the_last(make_trainer):
    def module() -> DistillModule:
        return DistillModule(network(), network(), optimizer=sgd, distill_loss=SPLoss())

    with pytest.raises(MisconfigurationException, match="one sample, but SPLoss compares each two"):
        make_trainer().fit(module(), batches(size=1))
    trainer = make_trainer()
    trainer.fit(module(), batches(last=1))
    assert trainer.global_step == 4


def test_further_terms_join_the_logits_or_stand_alone(make_trainer):
    student, teacher = network(), network()
    term = Term(SPLoss(), 3.0, student="1", teacher="0")
    inputs, _ = next(iter(data := batches()))
    expected = 3 * sp_loss(student[:2](inputs), teacher[0](inputs)).item()
    options: dict[str, Any] = {"optimizer": sgd, "distill_terms": {"similar": term}}
    alone = DistillModule(student, teacher, **options)
    found = value_of(alone, data, make_trainer(max_steps=1))
    assert found == pytest.approx(expected, rel=1e-5)
    both = DistillModule(network(), network(), distill_loss=KDLoss(), **options)
    assert list(both.configure_distillation().terms) == ["distill", "similar"]
    options["distill_terms"] = {"distill": term}
    twice = DistillModule(network(), network(), distill_loss=KDLoss(), **options)
    with pytest.raises(ValueError, match="distill_terms has the name 'distill'"):
        twice.configure_distillation()


def test_the_projection_of_a_further_term_is_trained_and_stays_out_of_the_state(make_trainer):
    loss = DISTFeatureLoss(3, 5)
    before = loss.projection.weight.detach().clone()

    class Convolutions(nn.Sequential):
        def __init__(self, width: int) -> None:
            super().__init__(nn.Conv2d(1, width, 3), nn.Flatten(), nn.Linear(width * 16, 4))

    module = DistillModule(
        Convolutions(3),
        Convolutions(5),
        optimizer=sgd,
        distill_terms={"map": Term(loss, student="0", teacher="0")},
    )
    images, labels = torch.randn(8, 1, 6, 6), torch.arange(8) % 4
    make_trainer().fit(module, DataLoader(TensorDataset(images, labels), batch_size=4))
    assert not loss.projection.weight.equal(before)
    assert {name.split(".")[0] for name in module.state_dict()} == {"student"}
