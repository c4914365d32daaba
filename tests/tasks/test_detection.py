"""Tests of the detection task: losses on the class logits, inputs of the teacher's parts, mAP."""

import contextlib
import copy
import functools
import io
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from interruption import Send
from lightning_dist import DISTLoss, KDLoss
from lightning_dist.data.base import collate_as_lists
from lightning_dist.data.scenes import SceneDetectionDataModule
from lightning_dist.losses import FeatureMimic
from lightning_dist.models.detection import TimmPyramid, small_faster_rcnn, small_retinanet
from lightning_dist.resume import ExactResume, Interrupted
from lightning_dist.tasks.detection import DetectionModule
from lightning_dist.teacher import Teacher

CLASSES = 10
SMALL = {"num_classes": CLASSES, "image_size": 48}


def sure(detector, path, std=0.3):
    """Increase the weights of a new detector, so that its scores are high, as after training."""
    nn.init.normal_(detector.get_submodule(path).weight, std=std)
    return detector


BUILD = {
    "two": lambda *widths: sure(
        small_faster_rcnn(widths, widths[-1], 24, **SMALL), "roi_heads.box_predictor.cls_score"
    ),
    "one": lambda *widths: sure(
        small_retinanet(widths, widths[-1], **SMALL), "head.classification_head.cls_logits"
    ),
}
both = pytest.mark.parametrize("kind", ["two", "one"])


@pytest.fixture(scope="module")
def data():
    data = SceneDetectionDataModule(
        train_size=8, val_size=5, test_size=6, scene_size=48, global_batch_size=4, eval_batch_size=2
    )
    data.setup()
    return data


def calibrated(detector, data):
    """Set the statistics of the batch norms from the data, as after training."""
    norms = [m for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # None selects the plain mean.
    images, targets = next(iter(data.train_dataloader()))
    with torch.no_grad():
        detector.train()(images, targets)
    for norm in norms:
        norm.momentum = 0.1
    return detector


def make_module(kind, teacher=None, student=None, **options):
    sgd = functools.partial(torch.optim.SGD, lr=0.01)
    return DetectionModule(
        student or BUILD[kind](4, 8, 8), teacher, **({"optimizer": sgd} | options)
    )


class Inputs(Callback):
    """A callback that stores the first step's class logits of the student and its parts' inputs."""

    def __init__(self, *paths):
        self.paths = paths
        self.inputs, self.outputs = {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for path in self.paths if batch_idx == 0 else ():
            module = pl_module.student.get_submodule(path)

            def keep(_, args, output, path=path):
                self.inputs.setdefault(path, []).append(args)
                self.outputs.setdefault(path, []).append(output)

            module.register_forward_hook(keep)


def test_two_stages_learn_from_the_teachers_logits_of_the_students_proposals(
    data, make_trainer, reference_dist_loss
):
    teacher = BUILD["two"](6, 12, 12)
    for norm in (m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.1, 0.1)
    seen = Inputs("backbone", "roi_heads.box_roi_pool", "roi_heads.box_predictor")
    trainer = make_trainer(max_steps=1, callbacks=[seen])
    trainer.fit(make_module("two", copy.deepcopy(teacher)), data)

    ((images,),) = seen.inputs["backbone"]
    ((_, proposals, sizes),) = seen.inputs["roi_heads.box_roi_pool"]
    ((logits, _),) = seen.outputs["roi_heads.box_predictor"]
    assert len(logits) == sum(map(len, proposals)) == 4 * 32, "the sampled boxes"
    teacher.eval()
    with torch.no_grad():
        heads = teacher.roi_heads
        features = heads.box_roi_pool(teacher.backbone(images), proposals, sizes)
        theirs, _ = heads.box_predictor(heads.box_head(features))
    expected = reference_dist_loss(logits, theirs)
    found = trainer.callback_metrics
    assert found["train/distill/class"].item() == pytest.approx(expected.item(), rel=1e-4)
    parts = ("classifier", "box_reg", "objectness", "rpn_box_reg")
    task = sum(found[f"train/loss_{part}"] for part in parts)
    assert found["train/task"].item() == pytest.approx(task.item(), rel=1e-5)
    total = found["train/task"] + found["train/distill/class"]
    assert found["train/loss"].item() == pytest.approx(total.item(), rel=1e-5)


def test_one_stage_learns_from_the_teachers_class_maps_level_by_level(
    data, make_trainer, reference_dist_loss
):
    teacher = BUILD["one"](6, 12, 12)
    path = "head.classification_head.cls_logits"
    seen = Inputs("backbone", path)
    trainer = make_trainer(max_steps=1, callbacks=[seen])
    trainer.fit(make_module("one", copy.deepcopy(teacher)), data)
    ((images,),) = seen.inputs["backbone"]
    head = teacher.eval().head.classification_head
    with torch.no_grad():
        theirs = [head.cls_logits(head.conv(level)) for level in teacher.backbone(images).values()]
    assert [x.shape[1:] for x in theirs] == [(40, 12, 12), (40, 6, 6)]
    expected = sum(
        reference_dist_loss(ours, their, activation="sigmoid")
        for ours, their in zip(seen.outputs[path], theirs, strict=True)
    )
    found = trainer.callback_metrics["train/distill/class"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


@both
def test_dist_takes_the_activation_of_the_head_unless_one_is_chosen(kind):
    own = "softmax" if kind == "two" else "sigmoid"
    for given, expected in [(None, own), ("softmax", "softmax"), ("identity", "identity")]:
        loss = DISTLoss(tau=2.0, activation=given)
        module = make_module(kind, BUILD[kind](6, 12, 12), distill_loss=loss)
        used = module.configure_distillation().terms["class"].loss
        assert (used.tau, used.activation) == (2.0, expected)
        assert loss.activation == (given or "softmax"), "the user's own stays as it is"


@both
def test_kd_takes_the_activation_of_the_head(kind):
    own = "softmax" if kind == "two" else "sigmoid"
    module = make_module(kind, BUILD[kind](6, 12, 12), distill_loss=KDLoss(2.0, activation=None))
    used = module.configure_distillation().terms["class"].loss
    assert (used.tau, used.activation) == (2.0, own)


def test_a_softmax_over_one_vs_all_logits_is_refused_for_kd():
    module = make_module("one", BUILD["one"](6, 12, 12), distill_loss=KDLoss())
    with pytest.raises(ValueError, match=r"use KDLoss\(activation='sigmoid'\)"):
        module.configure_distillation()


@both
def test_a_student_that_is_its_teacher_has_no_distillation_loss(kind, data, make_trainer):
    student = calibrated(BUILD[kind](4, 8, 8), data)
    if kind == "two":  # The logits differ so much that the eps of the formula is negligible.
        sure(student, "roi_heads.box_predictor.cls_score", std=3.0)
    module = make_module(
        kind,
        copy.deepcopy(student),
        student,
        norm_eval=True,
        optimizer=functools.partial(torch.optim.SGD, lr=0.0),
    )
    trainer = make_trainer(max_steps=2)
    trainer.fit(module, data)
    assert abs(trainer.callback_metrics["train/distill/class"].item()) < 1e-6
    assert trainer.callback_metrics["train/task"] > 0


@both
def test_only_the_asked_parts_of_the_teacher_run(kind, data, make_trainer):
    teacher = BUILD[kind](6, 12, 12)

    def refuse(*_):
        raise AssertionError("this part has no part in distillation")

    unneeded = {"two": ["rpn", "roi_heads.box_predictor"], "one": ["head.regression_head"]}[kind]
    for path in unneeded:
        teacher.get_submodule(path).register_forward_pre_hook(refuse)
    make_trainer(max_steps=1).fit(make_module(kind, teacher), data)


@both
def test_mimic_projects_the_students_maps_and_stays_out_of_the_student(kind, data, make_trainer):
    teacher = BUILD[kind](6, 12, 12)
    module = make_module(kind, copy.deepcopy(teacher), mimic=["0", "1"], mimic_weight=3.0)
    projections = []

    class Keep(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            (callback,) = [c for c in trainer.callbacks if hasattr(c, "terms")]
            assert len(callback.terms) == 3
            projections.append(
                [p.clone() for t in list(callback.terms.values())[1:] for p in t.loss.parameters()]
            )

    seen = Inputs("backbone")
    trainer = make_trainer(max_steps=2, callbacks=[seen, Keep()])
    trainer.fit(module, data)
    first, second = projections
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "they train"
    assert all(name.startswith("student.") for name in module.state_dict())
    found = trainer.callback_metrics
    total = found["train/task"] + found["train/distill/class"]
    total += 3 * (found["train/distill/mimic_0"] + found["train/distill/mimic_1"])
    assert found["train/loss"].item() == pytest.approx(total.item(), rel=1e-5)
    (images,), ours = seen.inputs["backbone"][1], seen.outputs["backbone"][1]["1"]
    with torch.no_grad():
        theirs = teacher.eval().backbone(images)["1"]
        projected = F.conv2d(ours, second[2], second[3])
    expected = ((projected - theirs) ** 2).mean().item()
    assert found["train/distill/mimic_1"].item() == pytest.approx(expected, rel=1e-4)


def test_maps_of_unlike_size_are_refused():
    loss = FeatureMimic(4, 8)
    with pytest.raises(ValueError, match=r"\(1, 8, 6, 6\).*\(1, 8, 5, 5\)"):
        loss(torch.zeros(1, 4, 6, 6), torch.zeros(1, 8, 5, 5))


@both
def test_the_teachers_classes_can_be_in_another_order(kind, data, make_trainer):
    teacher = BUILD[kind](6, 12, 12)
    count = CLASSES + (kind == "two")
    order = torch.randperm(count)
    shuffled = copy.deepcopy(teacher)
    with torch.no_grad():
        if kind == "two":
            layer, own = shuffled.roi_heads.box_predictor.cls_score, teacher.roi_heads.box_predictor
            layer.weight[order], layer.bias[order] = own.cls_score.weight, own.cls_score.bias
        else:
            layer = shuffled.head.classification_head.cls_logits
            own = teacher.head.classification_head.cls_logits
            for mine, others in ((layer.weight, own.weight), (layer.bias, own.bias)):
                by_class = others.unflatten(0, (-1, CLASSES))
                mine.unflatten(0, (-1, CLASSES))[:, order] = by_class
    values = []
    for network, class_map in ((teacher, None), (shuffled, order.tolist())):
        torch.manual_seed(2)
        trainer = make_trainer(max_steps=1)
        trainer.fit(make_module(kind, network, class_map=class_map), data)
        values.append(trainer.callback_metrics["train/distill/class"].item())
    assert values[1] == pytest.approx(values[0], rel=1e-5)


def test_a_teacher_of_another_normalisation_sees_its_own(data, make_trainer):
    teacher = BUILD["one"](6, 12, 12)
    teacher.transform.image_mean, teacher.transform.image_std = [0.3] * 3, [0.1] * 3
    asked = []
    teacher.backbone.register_forward_pre_hook(lambda _, args: asked.append(args[0]))
    seen = Inputs("backbone")
    make_trainer(max_steps=1, callbacks=[seen]).fit(make_module("one", teacher), data)
    ((images,),) = seen.inputs["backbone"]
    torch.testing.assert_close(asked[-1], (images * 0.25 + 0.5 - 0.3) / 0.1)


@both
def test_a_teacher_in_half_precision_finds_the_students_boxes_all_the_same(
    kind, data, make_trainer
):
    teacher = calibrated(BUILD[kind](6, 12, 12), data)
    values = []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(4)
        trainer = make_trainer(max_steps=1)
        trainer.fit(make_module(kind, Teacher(copy.deepcopy(teacher), dtype=dtype)), data)
        values.append(trainer.callback_metrics["train/distill/class"].item())
    assert values[1] == pytest.approx(values[0], rel=0.02)
    assert values[1] != values[0]


def test_a_class_map_of_the_teachers_own_is_refused():
    with pytest.raises(ValueError, match="DetectionModule's class_map"):
        make_module("one", Teacher(BUILD["one"](6, 12, 12), class_map=[1, 0]))


def reference_map(predictions, targets):
    """Compute COCO's mAP with pycocotools, from plain lists."""
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    annotations, results = [], []
    for image, (found, target) in enumerate(zip(predictions, targets, strict=True), start=1):
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            x1, y1, x2, y2 = box
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": label, "iscrowd": 0}
                | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            )
        for box, label, score in zip(
            *(found[name].tolist() for name in ("boxes", "labels", "scores")), strict=True
        ):
            x1, y1, x2, y2 = box
            bbox = [x1, y1, x2 - x1, y2 - y1]
            results.append({"image_id": image, "category_id": label, "bbox": bbox, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": image} for image in range(1, len(targets) + 1)],
            "annotations": annotations,
            "categories": [{"id": label} for label in range(CLASSES)],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


class Oracle(nn.Module):
    """A detector that finds the true boxes, with noise that depends on its input."""

    def __init__(self, targets_of):
        super().__init__()
        self.roi_heads = nn.Module()
        self.roi_heads.box_predictor = nn.Linear(1, 1)
        self.targets_of = targets_of

    def forward(self, images):
        found = []
        for image in images:
            target = self.targets_of[image.sum().item()]
            noise = torch.Generator().manual_seed(len(target["labels"]))
            shift = 4 * torch.randn(target["boxes"].shape, generator=noise)
            scores = torch.rand(len(target["labels"]), generator=noise)
            found.append(
                {"boxes": target["boxes"] + shift, "labels": target["labels"] + 1, "scores": scores}
            )
        return found


def test_map_is_that_of_pycocotools_over_the_whole_set(data, make_trainer):
    samples = [data.test_dataset()[index] for index in range(6)]
    oracle = Oracle({image.sum().item(): target for image, target in samples})
    module = DetectionModule(oracle)
    scores = make_trainer().test(module, data.test_dataloader(), verbose=False)[0]
    images, targets = zip(*samples, strict=True)
    expected = reference_map(module.infer(oracle, images), targets)
    names = ["map", "map_50", "map_75", "map_small"]
    for name, value in zip(names, expected, strict=False):
        assert scores[f"test/{name}"] == pytest.approx(value, abs=1e-6)
    assert 0 < scores["test/map"] < 1
    assert "test/map_large" not in scores, "there is no large box"


def test_a_relabelled_detector_scores_alike_on_data_that_numbers_its_classes_anew(
    data, make_trainer
):
    """The oracle has a background class, as a two-stage detector."""
    samples = [data.test_dataset()[index] for index in range(6)]
    oracle = Oracle({image.sum().item(): target for image, target in samples})
    new = torch.tensor([3, 0, 5, 1, 2, 4, 9, 7, 8, 6])  # the new number of each class
    renumbered = [(image, {**t, "labels": new[t["labels"]]}) for image, t in samples]
    scores = []
    for some, class_map in ((samples, range(10)), (renumbered, new.argsort().tolist())):
        module = DetectionModule(oracle)
        module.convert_evaluated(lambda x, m=module, c=class_map: m.relabel(x, c))
        loader = DataLoader(some, batch_size=3, collate_fn=collate_as_lists)
        scores.append(make_trainer().test(module, loader, verbose=False)[0]["test/map"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert scores[0] > 0


@both
def test_images_without_boxes_are_trained_on_and_evaluated(kind, data, make_trainer):
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    samples = [(image, empty) for image, _ in (data.train_dataset()[i] for i in range(4))]
    loader = DataLoader(samples, batch_size=2, collate_fn=collate_as_lists)
    trainer = make_trainer()
    trainer.fit(make_module(kind, BUILD[kind](6, 12, 12)), loader, loader)
    metrics = trainer.callback_metrics
    assert metrics["train/loss"].isfinite()
    assert metrics["val/map"] == 0


def test_batch_norms_and_frozen_parts_stay_as_they_are(data, make_trainer):
    module = make_module("two", norm_eval=True, frozen=["backbone.stem"])
    before = {name: value.clone() for name, value in module.student.state_dict().items()}
    make_trainer(max_epochs=2, limit_train_batches=1).fit(module, data)
    after = module.student.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("running" in name or "backbone.stem" in name for name in moved)
    assert "backbone.stage1.0.0.weight" in moved


def test_batch_norms_stay_as_they_are_in_a_run_that_resumes_within_an_epoch(
    data, make_trainer, tmp_path
):
    def fit(*callbacks, **options):
        module = make_module("two", norm_eval=True)
        saver = ModelCheckpoint(tmp_path, save_last=True)
        settings = {"enable_checkpointing": True, "limit_train_batches": 2, "limit_val_batches": 0}
        trainer = make_trainer(callbacks=[saver, ExactResume(), *callbacks], **settings)
        trainer.fit(module, data, **options)
        return module.student.state_dict()

    with pytest.raises(Interrupted):
        fit(Send(signal.SIGTERM, 0))
    before = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    after = fit(ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    norms = [name for name in after if "running" in name]
    assert norms
    assert all(torch.equal(before[f"student.{name}"], after[name]) for name in norms)


def test_fcos_is_a_one_stage_student(data, make_trainer):
    def fcos(width):
        backbone = BUILD["one"](4, width, width).backbone
        sizes = torchvision.models.detection.anchor_utils.AnchorGenerator(
            ((8,), (16,)), ((1.0,),) * 2
        )
        return torchvision.models.detection.FCOS(
            backbone,
            CLASSES,
            min_size=48,
            max_size=96,
            anchor_generator=sizes,
            head=torchvision.models.detection.fcos.FCOSHead(width, 1, CLASSES, num_convs=1),
        )

    trainer = make_trainer(max_steps=1)
    trainer.fit(make_module("one", fcos(64), fcos(32)), data)
    assert trainer.callback_metrics["train/distill/class"] > 0


@pytest.mark.parametrize(
    ("extra", "levels"),
    [("pool", (1, 2, 3, 4)), ("p6p7", (2, 3, 4))],
    ids=["faster-rcnn", "retinanet"],
)
def test_timms_backbones_serve_torchvisions_detectors(extra, levels, data, make_trainer):
    def detector(name):
        backbone = TimmPyramid(name, levels, 16, extra)
        size = {"min_size": 64, "max_size": 64}
        if extra == "pool":
            return torchvision.models.detection.FasterRCNN(backbone, CLASSES + 1, **size)
        anchors = torchvision.models.detection.retinanet._default_anchorgen()
        return torchvision.models.detection.RetinaNet(
            backbone, CLASSES, anchor_generator=anchors, **size
        )

    student, teacher = detector("resnet10t"), detector("resnet18")
    strides = [64 // x.shape[2] for x in student.backbone(torch.zeros(1, 3, 64, 64)).values()]
    assert strides == ([4, 8, 16, 32, 64] if extra == "pool" else [8, 16, 32, 64, 64])
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(make_module("one", teacher, student, mimic=["0"]), data)
    assert trainer.callback_metrics["train/distill/mimic_0"] > 0
    assert trainer.callback_metrics["train/distill/class"].isfinite()


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        pytest.param("two", "one", "a FasterRCNN and the teacher a RetinaNet without 'roi_heads'"),
        pytest.param("one", "two", "a RetinaNet and the teacher a FasterRCNN without 'head'"),
    ],
)
def test_detectors_of_unlike_kinds_are_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        make_module(student, BUILD[teacher](6, 12, 12))


def test_a_classifier_is_no_detector():
    with pytest.raises(Exception, match="a detector's head"):
        DetectionModule(nn.Linear(2, 2))


def test_a_teacher_given_as_a_teacher_stays_what_it_was(data):
    teacher = Teacher(BUILD["one"](6, 12, 12))
    make_module("one", teacher)
    assert type(teacher.network).__name__ == "RetinaNet"


@pytest.mark.slow
@both
def test_training_teaches_the_student(kind, make_trainer):
    data = SceneDetectionDataModule(
        train_size=8, val_size=2, scene_size=48, global_batch_size=8, texture=0.1
    )
    losses = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, *_):
            losses.append(trainer.callback_metrics["train/distill/class"].item())

    adam = functools.partial(torch.optim.Adam, lr=0.01)
    teacher = calibrated(BUILD[kind](6, 12, 12), data)
    module = make_module(kind, teacher, optimizer=adam, task_weight=0.0)
    make_trainer(max_epochs=25, callbacks=[Keep()], check_val_every_n_epoch=25).fit(module, data)
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    assert isinstance(module.configure_distillation().terms["class"].loss, DISTLoss)


@both
def test_a_teacher_is_tested_with_its_class_map_and_in_half_precision(kind, data):
    """The tested network is the one that teaches, so its detections have the student's labels."""
    detector = BUILD[kind](8, 16, 16).eval()
    images, _ = next(iter(data.test_dataloader()))
    with torch.no_grad():
        plain = detector(images)
    background = int(kind == "two")
    chosen = [*range(background), *(background + c for c in (3, 1, 4))]  # Four classes are left.
    teacher = Teacher(copy.deepcopy(detector), dtype="bfloat16")
    module = make_module(kind, teacher, class_map=chosen)
    with torch.no_grad():
        found = module.teacher_network()(images)
    assert sum(len(one["boxes"]) for one in found) > 0
    for one, before in zip(found, plain, strict=True):
        assert one["boxes"].dtype == torch.float32
        assert set(one["labels"].tolist()) <= set(range(background, len(chosen)))
        assert len(one["labels"]) <= len(before["labels"])
    module = make_module(kind, detector, class_map=chosen)
    with torch.no_grad():
        found = module.teacher_network()(images)
    for one, before in zip(found, plain, strict=True):
        kept = [i for i, label in enumerate(before["labels"].tolist()) if label in chosen]
        assert [chosen[label] for label in one["labels"].tolist()] == before["labels"][
            kept
        ].tolist()
        torch.testing.assert_close(one["boxes"], before["boxes"][kept])
