"""Tests that a teacher converts the images and classes of the data by its card."""

import dataclasses

import pytest
import torch
from torch import nn

from lightning_dist.cache import CachedTeacher
from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.files.card import Card
from lightning_dist.models.detection import small_faster_rcnn
from lightning_dist.models.small import SmallCNN
from lightning_dist.tasks.detection_heads import TwoStageClassifier
from lightning_dist.teacher import EnsembleTeacher, InputBridge, Teacher
from lightning_dist.teacher.matching import bridge_between, class_map_between

RGB = Card(size=(32, 32), mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.25), channels="rgb")
OWN = dataclasses.replace(RGB, origin="run", source="runs/1")


def test_the_packaged_teacher_knows_digits_in_any_normalisation():
    teacher = Teacher(
        SmallCNN([32, 64, 128]), weights="pkg://lightning_dist/assets/digits_teacher.safetensors"
    )
    data = DigitsDataModule(mean=(0.5,), std=(0.2,), eval_batch_size=360)
    images, labels = next(iter(data.test_dataloader()))
    teacher.adapt(data.card())
    assert (teacher(images).argmax(1) == labels).float().mean() > 0.99


def test_blue_first_images_are_turned_for_a_teacher_of_red_first_ones():
    data = dataclasses.replace(RGB, mean=RGB.mean[::-1], std=RGB.std[::-1], channels="bgr")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(bridge_between(RGB, data)(images), images.flip(1))


def test_nothing_is_converted_where_nothing_differs():
    assert bridge_between(RGB, RGB) is None
    assert bridge_between(RGB, Card()) is None
    assert bridge_between(Card(), RGB) is None


def test_images_are_resized_for_classification_only():
    small = dataclasses.replace(RGB, size=(16, 16))
    fixed = dataclasses.replace(RGB, crop_mode="squash")
    assert bridge_between(fixed, small)(torch.rand(1, 3, 16, 16)).shape[2:] == (32, 32)
    assert bridge_between(dataclasses.replace(fixed, task="segmentation"), small) is None


def named(card: Card, *names: str) -> Card:
    return dataclasses.replace(card, class_names=names, num_classes=len(names))


def test_classes_are_matched_by_name():
    own, data = named(OWN, "cat", "dog", "elk"), named(RGB, "Elk", "cat")
    assert class_map_between(own, data) == [2, 0]
    assert class_map_between(own, named(RGB, "cat", "dog", "elk")) is None
    assert class_map_between(own, RGB) is None


def test_other_classes_are_refused_for_an_own_teacher_and_accepted_for_a_librarys():
    """The words of a library may be other names of the same classes, such as WordNet's ids."""
    data = named(RGB, "n01", "n02")
    with pytest.raises(ValueError, match=r"runs/1 was trained on the classes 'cat', 'dog'.*'n01'"):
        class_map_between(named(OWN, "cat", "dog"), data)
    library = dataclasses.replace(named(OWN, "cat", "dog"), origin="torchvision")
    assert class_map_between(library, data) is None


def test_what_is_given_explicitly_stays():
    inputs = InputBridge([0.5] * 3, [1.0] * 3, [0.5] * 3, [1.0] * 3)
    teacher = Teacher(nn.Identity(), inputs=inputs, class_map=[0], card=named(OWN, "cat", "dog"))
    teacher.adapt(named(dataclasses.replace(RGB, mean=(0.0,) * 3), "fox"))
    assert (teacher.inputs, teacher.class_map) == (inputs, [0])


def test_an_ensemble_adapts_each_of_its_teachers():
    gray = Card(mean=(0.5,), std=(0.5,), channels="gray")
    teachers = [Teacher(nn.Identity(), card=gray), Teacher(nn.Identity())]
    ensemble = EnsembleTeacher(teachers, mean="logits")
    ensemble.adapt(Card(mean=(0.0,), std=(1.0,), channels="gray"))
    assert (teachers[0].inputs is None, teachers[1].inputs is None) == (False, True)


def test_a_cached_teacher_adapts_the_teacher_whose_outputs_it_stores(tmp_path):
    teacher = CachedTeacher(Teacher(nn.Identity(), card=named(OWN, "cat", "dog")), tmp_path)
    teacher.adapt(named(dataclasses.replace(RGB, mean=(0.0,) * 3), "dog"))
    assert teacher.class_map == [1]
    assert teacher.teacher.inputs is not None


def test_a_two_stage_detector_keeps_its_background_where_its_classes_are_matched():
    detector = small_faster_rcnn([4, 8, 8], 8, width=8, num_classes=3, image_size=32)
    teacher = Teacher(TwoStageClassifier(detector), card=named(OWN, "cat", "dog", "elk"))
    teacher.adapt(named(RGB, "elk", "cat"))
    assert teacher.network.class_map.tolist() == [0, 3, 1]
