"""Tests of classification with images that have no label, which is -100."""

import pytest
import timm.data
import timm.loss
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.functional import dist_loss
from lightning_dist.module import DistillModule
from lightning_dist.tasks.classification import ClassificationModule

CLASSES = 4


class ArgmaxLoss(nn.Module):
    """A cross-entropy that does not ignore the label -100."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return -logits.log_softmax(1).gather(1, target[:, None]).mean()


def batch_of(labels: list[int]) -> tuple[Tensor, Tensor]:
    return torch.randn(len(labels), 6, dtype=torch.float64), torch.tensor(labels)


def gradient_after_a_step(make_trainer, batch, teacher=None, **options) -> Tensor:
    """Return the gradient of the student's weight: its change in one step of SGD with rate 1."""
    torch.manual_seed(1)
    student = nn.Linear(6, CLASSES).double()
    before = student.weight.detach().clone()
    module = ClassificationModule(
        student,
        teacher,
        num_classes=CLASSES,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        measure_teacher=False,
        **options,
    )
    loader = DataLoader(TensorDataset(*batch), batch_size=len(batch[0]))
    make_trainer(max_steps=1, precision="64-true").fit(module, loader)
    return before - student.weight.detach()


def student_weights() -> Tensor:
    torch.manual_seed(1)
    return nn.Linear(6, CLASSES).double()


@pytest.mark.parametrize("labels", [[1, -100, 3, -100, -100, 0], [-100] * 6, [0, 1, 2, 3, 1, 0]])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"task_loss": ArgmaxLoss()}])
def test_the_loss_is_that_of_the_labelled_images_and_the_terms_of_all(
    make_trainer, labels, options
):
    torch.manual_seed(0)
    inputs, target = batch_of(labels)
    teacher = nn.Linear(6, CLASSES).double()
    found = gradient_after_a_step(make_trainer, (inputs, target), teacher, **options)
    student = student_weights()
    logits = student(inputs)
    loss = 2 * dist_loss(logits, teacher(inputs))
    rows = [i for i, label in enumerate(labels) if label >= 0]
    if rows:
        smoothing = options.get("label_smoothing", 0.0)
        loss = loss + F.cross_entropy(logits[rows], target[rows], label_smoothing=smoothing)
    (expected,) = torch.autograd.grad(loss, student.weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("mixup", "loss", "smoothing"),
    [
        (timm.data.Mixup(0.8, 0.0, label_smoothing=0.1, num_classes=CLASSES), None, 0.1),
        (timm.data.Mixup(0.8, 0.0, mode="elem", num_classes=CLASSES, label_smoothing=0.0), None, 0),
        (v2.MixUp(num_classes=CLASSES), timm.loss.SoftTargetCrossEntropy(), 0),
    ],
    ids=["timm", "timm-elem", "torchvision"],
)
def test_a_mixed_image_counts_by_its_labelled_share(make_trainer, mixup, loss, smoothing):
    """The images are unit vectors, so that a mixed image shows the shares of its parts."""
    inputs = torch.eye(6, dtype=torch.float64)[:, :, None, None]
    target = torch.tensor([1, -100, 3, -100, -100, 0])
    mixed = []

    class Student(nn.Linear):
        def forward(self, inputs):
            mixed.append(inputs.flatten(1))
            return super().forward(mixed[-1])

    torch.manual_seed(1)
    student = Student(6, CLASSES).double()
    start = {name: x.clone() for name, x in student.state_dict().items()}
    module = ClassificationModule(
        student,
        num_classes=CLASSES,
        mixup=mixup,
        task_loss=loss,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
    )
    loader = DataLoader(TensorDataset(inputs, target), batch_size=6)
    make_trainer(max_steps=1, precision="64-true").fit(module, loader)
    (parts,) = mixed
    found = start["weight"] - student.weight.detach()
    student.load_state_dict(start)
    log_p = student(parts[:, :, None, None]).log_softmax(1)
    labelled = target >= 0
    one_hot = F.one_hot(target.clamp(min=0), CLASSES) * labelled[:, None]
    shares = parts[:, labelled].sum(1)
    wanted = (1 - smoothing) * parts @ one_hot.double() + smoothing / CLASSES * shares[:, None]
    (expected,) = torch.autograd.grad(-(wanted * log_p).sum() / shares.sum(), student.weight)
    # These functions mix in float32.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert mixup.num_classes == CLASSES


def test_a_module_with_torchs_cross_entropy_trains_on_batches_without_labels(make_trainer):
    torch.manual_seed(1)
    module = DistillModule(nn.Linear(6, CLASSES).double(), nn.Linear(6, CLASSES).double())
    loader = DataLoader(TensorDataset(*batch_of([-100, -100, 3, 0])), batch_size=2)
    trainer = make_trainer(precision="64-true")
    trainer.fit(module, loader)
    assert all(p.isfinite().all() for p in module.student.parameters())
    assert trainer.global_step == 2


def test_metrics_leave_out_what_has_no_label(make_trainer):
    torch.manual_seed(0)
    inputs, target = batch_of([1, -100, 3, -100, -100, 0])
    module = ClassificationModule(student_weights(), num_classes=CLASSES)
    trainer: Trainer = make_trainer(precision="64-true")
    (found,) = trainer.validate(
        module, DataLoader(TensorDataset(inputs, target), batch_size=2), verbose=False
    )
    logits, rows = module.student(inputs), target >= 0
    right = (logits.argmax(1) == target)[rows].double().mean().item()
    assert found["val/accuracy"] == pytest.approx(right)
    loss = F.cross_entropy(logits[rows], target[rows]).item()
    assert found["val/loss"] == pytest.approx(loss)


def test_an_evaluation_set_without_any_label_is_refused():
    data = DigitsDataModule()
    data.setup("fit")
    dataset = data.val_dataset()
    dataset.labels[:] = -100
    data.check_dataset("train", dataset)
    with pytest.raises(ValueError, match=r"the val set of .* has no label"):
        data.check_dataset("val", dataset)
