"""Tests of detection with images that have no label, whose target is None."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FCOS, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

from lightning_dist.data.base import collate_as_lists
from lightning_dist.models.detection import SmallPyramid, small_faster_rcnn, small_retinanet
from lightning_dist.tasks.detection import DetectionModule

CLASSES, SIZE = 3, 32
FIXED = {"norm_eval": True, "measure_teacher": False}  # Statistics would depend on the batch.
all_kinds = pytest.mark.parametrize("kind", ["two", "one", "fcos"])


def build(kind: str, width: int) -> nn.Module:
    """Build a detector in float64 that samples all its proposals and anchors, so nothing by chance.

    Args:
        kind: "two" for Faster R-CNN, "one" for RetinaNet, or "fcos".
        width: the number of channels.
    """
    torch.manual_seed(width)
    widths = (width, width, width)
    if kind == "one":
        detector = small_retinanet(widths, width, CLASSES, SIZE)
    elif kind == "fcos":
        anchors = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
        body = SmallPyramid(widths, 32)
        detector = FCOS(body, CLASSES, anchor_generator=anchors, min_size=SIZE, max_size=2 * SIZE)
    else:
        detector = small_faster_rcnn(widths, width, 16, CLASSES, SIZE)
        for sampler in (detector.rpn.fg_bg_sampler, detector.roi_heads.fg_bg_sampler):
            sampler.batch_size_per_image, sampler.positive_fraction = 10**6, 0.5
    path = "roi_heads.box_predictor.cls_score" if kind == "two" else "head.classification_head"
    for name, x in detector.get_submodule(path).named_parameters():
        if "weight" in name and x.dim() > 1:
            nn.init.normal_(x, std=1.0)  # Nearly equal logits would round off.
    return detector.double()


def batch_of(labeled: list[bool]) -> tuple[list[Tensor], list[dict[str, Tensor] | None]]:
    """Return images, and targets that are None if an image has no label; the last has no box."""
    torch.manual_seed(7)
    boxes = torch.tensor([[4.0, 4.0, 18.0, 26.0], [10.0, 2.0, 30.0, 20.0]]).double()
    targets = [{"boxes": boxes, "labels": torch.tensor([0, 2])} for _ in labeled]
    targets[-1] = {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.int64)}
    images = [torch.rand(3, SIZE, SIZE, dtype=torch.float64) for _ in labeled]
    return images, [x if has else None for x, has in zip(targets, labeled, strict=True)]


def train(make_trainer, kind, batches, teacher=None, **options):
    """Train one epoch of SGD with rate 1; return the Trainer and each parameter's change."""
    student = build(kind, 4)
    before = {name: x.detach().clone() for name, x in student.named_parameters()}
    sgd = functools.partial(torch.optim.SGD, lr=1.0)
    module = DetectionModule(student, teacher, optimizer=sgd, **FIXED, **options)
    trainer = make_trainer(precision="64-true")
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return trainer, {name: before[name] - x.detach() for name, x in student.named_parameters()}


def by_hand(kind, batch, teacher, dist) -> dict[str, Tensor]:
    """Return the gradient of the loss of the labelled images plus DIST of all images."""
    student, (images, targets) = build(kind, 4).train(), batch
    for norm in (m for m in student.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    offset = int(kind == "two")
    rows = [i for i, target in enumerate(targets) if target is not None]
    loss = torch.zeros((), dtype=torch.float64)
    if rows:
        shifted = [{**targets[i], "labels": targets[i]["labels"] + offset} for i in rows]
        loss = sum(student([images[i] for i in rows], shifted).values())
    empty = batch_of([True])[1][0]
    calls: dict[str, list] = {"pool": [], "logits": [], "images": []}

    def keep(name, value):
        calls[name].append(value)

    student.backbone.register_forward_hook(lambda _, args, __: keep("images", args[0]))
    if kind == "two":
        heads = student.roi_heads
        heads.box_roi_pool.register_forward_hook(lambda _, args, __: keep("pool", args))
        heads.box_predictor.register_forward_hook(lambda _, __, output: keep("logits", output[0]))
    else:
        head = student.head.classification_head.cls_logits
        head.register_forward_hook(lambda _, __, output: keep("logits", output))
    all_targets = [x or empty for x in targets]
    student(images, [{**x, "labels": x["labels"] + offset} for x in all_targets])
    with torch.no_grad():
        maps = teacher.eval().backbone(calls["images"][0])
        if kind == "two":
            ((_, boxes, sizes),) = calls["pool"]
            pooled = teacher.roi_heads.box_roi_pool(maps, boxes, sizes)
            logits = [teacher.roi_heads.box_predictor(teacher.roi_heads.box_head(pooled))[0]]
        else:
            head = teacher.head.classification_head
            logits = [head.cls_logits(head.conv(level)) for level in maps.values()]
    activation = "softmax" if kind == "two" else "sigmoid"
    for ours, theirs in zip(calls["logits"], logits, strict=True):
        loss = loss + dist(ours, theirs, activation=activation)
    names, weights = zip(*student.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return {
        name: torch.zeros_like(x) if g is None else g
        for name, x, g in zip(names, weights, found, strict=True)
    }


@all_kinds
@pytest.mark.parametrize("labeled", [[True, False, True], [False, False]])
def test_the_loss_is_that_of_the_labelled_images_and_the_terms_of_all(
    make_trainer, reference_dist_loss, kind, labeled
):
    batch, teacher = batch_of(labeled), build(kind, 8)
    _, found = train(make_trainer, kind, [batch], copy.deepcopy(teacher))
    expected = by_hand(kind, batch, teacher, reference_dist_loss)
    wrong, length = (
        torch.cat([x.flatten() for x in all_of_them]).norm()
        for all_of_them in ([found[name] - expected[name] for name in expected], expected.values())
    )
    assert wrong < 1e-12 * length


@all_kinds
def test_a_batch_without_any_label_trains_nothing_but_gives_each_parameter_a_gradient(
    make_trainer, kind
):
    seen = {}

    class Student(DetectionModule):
        def on_before_optimizer_step(self, optimizer):
            seen.update((name, x.grad) for name, x in self.student.named_parameters())

    student = build(kind, 4)
    module = Student(student, **FIXED)
    trainer = make_trainer(precision="64-true", max_steps=1)
    trainer.fit(module, DataLoader([batch_of([False, False])], batch_size=None))
    assert trainer.callback_metrics["train/loss"] == 0
    assert seen
    assert all(grad is not None and not grad.any() for grad in seen.values())


@pytest.mark.parametrize("kind", ["two", "one"])
def test_an_image_without_a_label_is_not_background(make_trainer, kind):
    images, (first, *_) = batch_of([True, True])
    nothing = {"boxes": first["boxes"][:0], "labels": first["labels"][:0]}
    as_background, without, alone = (
        train(make_trainer, kind, [batch])[1]
        for batch in (
            (images, [first, nothing]),
            (images, [first, None]),
            (images[:1], [first]),
        )
    )
    torch.testing.assert_close(without, alone, rtol=0, atol=1e-12)
    name = next(reversed(as_background))
    assert not torch.allclose(as_background[name], alone[name], atol=1e-6)


def test_metrics_leave_out_what_has_no_label(make_trainer):
    class Sees(nn.Module):
        """A detector that finds the boxes of every image, one of them in the wrong class."""

        def forward(self, images):
            found = batch_of([True, True])[1][0]
            wrong = {"labels": torch.tensor([1, 3]), "scores": torch.tensor([0.9, 0.8])}
            right = {"labels": torch.tensor([1, 2]), "scores": torch.tensor([0.9, 0.8])}
            boxes = {"boxes": found["boxes"]}
            return [boxes | (right if x.mean() < 0.5 else wrong) for x in images]

    images, targets = batch_of([True, True, True])
    dark, bright = images[0] * 0.1, images[0] * 0.1 + 0.9
    module = DetectionModule(build("two", 4))
    module.student = Sees()

    def scores(pairs):
        loader = DataLoader(pairs, batch_size=2, collate_fn=collate_as_lists)
        return make_trainer().validate(module, loader, verbose=False)[0]

    labelled = [(bright, targets[0]), (dark, targets[1])]
    alone = scores(labelled)
    assert 0 < alone["val/map"] < 1
    assert scores([labelled[0], (bright, None), (dark, None), labelled[1]]) == alone


def test_a_label_of_minus_one_is_not_no_label(make_trainer):
    images, (first, other) = batch_of([True, False])
    wrong = {**first, "labels": torch.tensor([-1, 0])}
    with pytest.raises(ValueError, match="a target has the label -1"):
        train(make_trainer, "one", [(images, [wrong, other])])


def test_detectors_whose_losses_cannot_be_restricted_are_refused(make_trainer):
    class Own(nn.Module):
        """A detector that computes its loss elsewhere."""

        def __init__(self, roi_heads):
            super().__init__()
            self.rpn, self.roi_heads = nn.Module(), roi_heads
            self.rpn.compute_loss = nn.Identity()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, images, targets):
            return {"loss": self.weight.abs()}

    heads = build("two", 4).roi_heads
    mask = MaskRCNN(SmallPyramid((4, 4, 4), 4), 4, min_size=SIZE, max_size=SIZE).double()
    for student, why in (
        (mask, "it has a loss of masks"),
        (Own(heads), "it did not call box_predictor, compute_loss, select_training_samples"),
    ):
        module = DetectionModule(student)
        loader = DataLoader([batch_of([True, False])], batch_size=None)
        with pytest.raises(ValueError, match=why):
            make_trainer(precision="64-true").fit(module, loader)
    assert "box_predictor" not in heads.__dict__
