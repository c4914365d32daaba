"""Tests of EnsembleTeacher: the mean of several teachers, alone, in a run and from a config."""

import copy
import pickle

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from lightning_dist import DistillationCallback, KDLoss, Teacher, Term
from lightning_dist.teacher import EnsembleTeacher, InputBridge
from normalisation import MEAN, OURS, STD, as_student, raw_images


def test_the_softmax_of_an_ensemble_is_the_mean_of_its_teachers_probabilities():
    networks = [nn.Linear(4, 3).double() for _ in range(3)]
    x = torch.rand(5, 4).double()
    expected = sum(net(x).softmax(1) for net in networks) / 3
    torch.testing.assert_close(
        EnsembleTeacher(networks)(x).softmax(1), expected, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(EnsembleTeacher(networks)(x).exp(), expected, rtol=1e-12, atol=0)


def test_an_ensemble_takes_the_mean_of_logits():
    networks = {name: nn.Linear(4, 3) for name in "abc"}
    x = torch.rand(5, 4)
    expected = sum(net(x) for net in networks.values()) / 3
    torch.testing.assert_close(EnsembleTeacher(networks, mean="logits")(x), expected)


def test_each_teacher_of_an_ensemble_has_its_own_bridge_and_classes():
    raw = raw_images()
    first, second = (nn.Sequential(nn.Flatten(), nn.Linear(n, 4)) for n in (192, 48))
    ensemble = EnsembleTeacher(
        [
            Teacher(first, inputs=InputBridge(MEAN, STD, **OURS), class_map=[3, 1]),
            EnsembleTeacher(
                [Teacher(second, inputs=InputBridge(MEAN, STD, **OURS, size=4), class_map=[0, 2])]
            ),
        ]
    )
    theirs = v2.Normalize(MEAN, STD)
    one = first(theirs(raw))[:, [3, 1]].softmax(1)
    two = second(theirs(v2.Resize(4, v2.InterpolationMode.BICUBIC)(raw)))[:, [0, 2]].softmax(1)
    seen = ensemble(as_student(raw)).exp()
    torch.testing.assert_close(seen, (one + two) / 2, rtol=1e-5, atol=1e-6)


def test_an_ensemble_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="the ensemble has no teachers"):
        EnsembleTeacher([])
    with pytest.raises(ValueError, match="mean is 'median': use 'probabilities' or 'logits'"):
        EnsembleTeacher([nn.Linear(4, 3)], mean="median")
    odd = EnsembleTeacher([nn.Linear(4, 3), Teacher(nn.Linear(4, 2))])
    with pytest.raises(
        ValueError, match=r"teacher 1 .*\(5, 2\) and teacher 0 \(5, 3\).*give each a class_map"
    ):
        odd(torch.rand(5, 4))


def test_hydra_builds_an_ensemble_with_bridges_and_class_names():
    config = OmegaConf.create(
        """
        mean: [0.5, 0.5, 0.5]
        std: [0.25, 0.25, 0.25]
        teacher:
          _target_: lightning_dist.teacher.EnsembleTeacher
          teachers:
            - _target_: lightning_dist.teacher.loading.load_teacher
              source: timm/test_resnet.r160_in1k
              pretrained: false
              num_classes: 3
              student_mean: ${mean}
              student_std: ${std}
              class_map:
                _target_: lightning_dist.teacher.match_classes
                student_names: [dog, cat]
                teacher_names: [cat, cow, dog]
            - _target_: lightning_dist.teacher.Teacher
              network:
                _target_: timm.create_model
                model_name: test_resnet
                num_classes: 2
              inputs:
                _target_: lightning_dist.teacher.InputBridge
                mean: [0.485, 0.456, 0.406]
                std: [0.229, 0.224, 0.225]
                student_mean: ${mean}
                student_std: ${std}
                size: [32, 32]
        """
    )
    teacher = instantiate(config.teacher)
    first, second = teacher.teachers
    assert first.class_map == [2, 0]
    assert (first.inputs.size, second.inputs.size) == ((160, 160), (32, 32))
    assert teacher(as_student(raw_images())).shape == (2, 2)
    assert torch.equal(
        pickle.loads(pickle.dumps(teacher))(torch.ones(1, 3, 8, 8)), teacher(torch.ones(1, 3, 8, 8))
    )


# The ensemble in a run


class Trains(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))

    def training_step(self, batch, batch_idx):
        return 0.0 * self.net(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_a_run_distils_from_an_ensemble_in_its_own_view_and_classes(make_trainer, mean):
    raw = raw_images()
    first, second = (nn.Sequential(nn.Flatten(), nn.Linear(n, 4)) for n in (48, 192))
    teacher = EnsembleTeacher(
        [
            Teacher(first, inputs=InputBridge(MEAN, STD, **OURS, size=4), class_map=[3, 1]),
            Teacher(second, class_map=[0, 2]),
        ],
        mean=mean,
    )
    student = Trains()
    expected = copy.deepcopy(student.net)

    small = v2.Resize(4, v2.InterpolationMode.BICUBIC)(raw)
    theirs = [
        first(v2.Normalize(MEAN, STD)(small))[:, [3, 1]],
        second(as_student(raw))[:, [0, 2]],
    ]
    if mean == "logits":
        target = (theirs[0] + theirs[1]) / 2
    else:
        target = ((theirs[0].softmax(1) + theirs[1].softmax(1)) / 2).log()
    loss = 2 * KDLoss(2.0)(expected(as_student(raw)), target)
    gradients = torch.autograd.grad(loss, list(expected.parameters()))

    callback = DistillationCallback(teacher, loss=KDLoss(2.0), weight=2.0)
    loader = DataLoader(TensorDataset(as_student(raw)), batch_size=2)
    make_trainer(max_steps=1, callbacks=[callback]).fit(student, loader)
    for after, before, gradient in zip(
        student.net.parameters(), expected.parameters(), gradients, strict=True
    ):
        torch.testing.assert_close(after, before - gradient, rtol=1e-4, atol=1e-6)


def test_a_term_taps_a_part_of_one_teacher_of_an_ensemble(make_trainer):
    teacher = EnsembleTeacher([nn.Sequential(nn.Flatten(), nn.Linear(192, 2)) for _ in range(2)])
    heard = []

    def loss(ours, theirs):
        heard.append(theirs)
        return (ours - theirs).square().mean()

    x = raw_images()
    callback = DistillationCallback(teacher, terms={"tap": Term(loss, teacher="1.1")})
    loader = DataLoader(TensorDataset(x), batch_size=2)
    make_trainer(max_steps=1, callbacks=[callback]).fit(Trains(), loader)
    assert torch.equal(heard[0], teacher.teachers[1].network(x))
