"""Tests of the losses beside DIST and KD against NumPy, SciPy and torchdistill."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn
from torchdistill.losses import mid_level

from lightning_dist import functional
from lightning_dist.functional import (
    at_loss,
    cka_loss,
    cwd_loss,
    dist_feature_loss,
    dkd_loss,
    jeffreys_loss,
    jsd_loss,
    mimic_loss,
    reverse_kd_loss,
    rkd_loss,
    sp_loss,
    standardise,
)
from lightning_dist.losses import (
    ATLoss,
    CKALoss,
    CWDLoss,
    DISTFeatureLoss,
    DISTLoss,
    DKDLoss,
    FeatureMimic,
    JeffreysLoss,
    JSDLoss,
    KDLoss,
    ReverseKDLoss,
    RKDLoss,
    SPLoss,
    StandardisedLogits,
    from_torchdistill,
)

TAU, LABELS = 2.5, [0, 3, 1, 2, 3, 4]


def lskd_loss(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    mask = {name: options.pop(name) for name in ("mask",) if name in options}
    return StandardisedLogits(KDLoss(**options))(student, teacher, **mask)


def dkd_loss_of_labels(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    """Return DKD with labels that depend only on the position in the batch."""
    axis = options.get("class_dim") or 1
    shape = student.select(axis, 0).shape
    labels = torch.arange(shape.numel()).reshape(shape) % student.shape[axis]
    return dkd_loss(student, teacher, labels, **options)


OF_LOGITS = [reverse_kd_loss, jeffreys_loss, jsd_loss, dkd_loss_of_labels, lskd_loss, cwd_loss]
OF_FEATURES = [at_loss, sp_loss, rkd_loss, cka_loss, mimic_loss, dist_feature_loss]
RELATIONS = [sp_loss, rkd_loss, cka_loss]
every_loss = pytest.mark.parametrize("loss", [*OF_LOGITS, *OF_FEATURES])


def shape_for(loss: Callable[..., Tensor]) -> tuple[int, ...]:
    return (6, 5) if loss in OF_LOGITS and loss is not cwd_loss else (6, 5, 4, 3)


def pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    student, teacher = (2 * torch.randn(2, *shape).double()).unbind()
    return student, teacher


def value_and_grad(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor, **options: Any):
    student = student.detach().requires_grad_()
    value = loss(student, teacher, **options)
    return value.detach(), torch.autograd.grad(value, student)[0]


# The same losses once more, from NumPy, SciPy or torchdistill


def softmax(x: np.ndarray) -> np.ndarray:
    return scipy.special.softmax(x / TAU, axis=-1)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return TAU**2 * float(np.mean(scipy.stats.entropy(p, q, axis=-1)))


def numpy_dkd(s: np.ndarray, t: np.ndarray) -> float:
    total = 0.0
    for p, q, label in zip(softmax(t), softmax(s), np.arange(len(s)) % s.shape[1], strict=True):
        binary = scipy.stats.entropy([p[label], 1 - p[label]], [q[label], 1 - q[label]])
        among_others = scipy.stats.entropy(np.delete(p, label), np.delete(q, label))
        total += 1.0 * binary + 8.0 * among_others
    return TAU**2 * total / len(s)


def numpy_lskd(s: np.ndarray, t: np.ndarray) -> float:
    return kl(*(softmax(scipy.stats.zscore(x, axis=1, ddof=1)) for x in (t, s)))


def numpy_cwd(s: np.ndarray, t: np.ndarray) -> float:
    return kl(*(softmax(x.reshape(*x.shape[:2], -1)) for x in (t, s)))


def numpy_sp(s: np.ndarray, t: np.ndarray) -> float:
    s, t = (x.reshape(len(x), -1) for x in (s, t))
    s, t = (x @ x.T for x in (s, t))
    s, t = (x / np.sqrt((x**2).sum(1, keepdims=True)) for x in (s, t))
    return float(((s - t) ** 2).sum() / len(s) ** 2)


def numpy_cka(s: np.ndarray, t: np.ndarray) -> float:
    """Return 1 - CKA from the features, not from the similarities of the samples."""
    s, t = (x.reshape(len(x), -1) for x in (s, t))
    s, t = (x - x.mean(0) for x in (s, t))
    norms = np.linalg.norm(s.T @ s) * np.linalg.norm(t.T @ t)
    return float(1 - np.linalg.norm(t.T @ s) ** 2 / norms)


def numpy_dist_feature(s: np.ndarray, t: np.ndarray) -> float:
    def correlation(x: np.ndarray, y: np.ndarray) -> float:
        pairs = zip(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), strict=True)
        return float(np.mean([scipy.stats.pearsonr(*one).statistic for one in pairs]))

    places = correlation(*(x.reshape(*x.shape[:2], -1) for x in (s, t)))
    return 2 - correlation(*(np.moveaxis(x, 1, -1) for x in (s, t))) - places


def torchdistill_at(s: np.ndarray, t: np.ndarray) -> float:
    io = {"io": "output", "path": "."}
    loss = mid_level.ATLoss({"pair": {"student": io, "teacher": io}})
    return loss(*({".": {"output": torch.from_numpy(x)}} for x in (s, t))).item()


def torchdistill_rkd(s: np.ndarray, t: np.ndarray) -> float:
    loss = mid_level.RKDLoss(".", ".", dist_factor=25.0, angle_factor=50.0, reduction="mean")
    return loss(*({".": {"output": torch.from_numpy(x)}} for x in (s, t))).item()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (reverse_kd_loss, lambda s, t: kl(softmax(s), softmax(t))),
        (
            jeffreys_loss,
            lambda s, t: kl(softmax(s), softmax(t)) + kl(softmax(t), softmax(s)),
        ),
        (
            jsd_loss,
            lambda s, t: (
                TAU**2
                * np.mean(scipy.spatial.distance.jensenshannon(softmax(s), softmax(t), axis=1) ** 2)
            ),
        ),
        (dkd_loss_of_labels, numpy_dkd),
        (lskd_loss, numpy_lskd),
        (cwd_loss, numpy_cwd),
        (at_loss, torchdistill_at),
        (sp_loss, numpy_sp),
        (rkd_loss, torchdistill_rkd),
        (cka_loss, numpy_cka),
        (mimic_loss, lambda s, t: np.mean((s - t) ** 2)),
        (dist_feature_loss, numpy_dist_feature),
    ],
)
def test_a_loss_equals_an_independent_computation(loss, expected):
    student, teacher = pair(shape_for(loss))
    options = {"tau": TAU} if loss in OF_LOGITS else {}
    found = loss(student, teacher, **options).item()
    assert found == pytest.approx(expected(student.numpy(), teacher.numpy()), rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "reverse", "middle"),
    [(reverse_kd_loss, 1, 0), (jeffreys_loss, 1, 1), (jsd_loss, 0, 0.5)],
)
def test_with_sigmoid_each_class_is_a_binary_decision(loss, reverse, middle):
    student, teacher = pair((6, 5))
    p, q = (
        torch.stack([x.sigmoid(), 1 - x.sigmoid()], -1).numpy()
        for x in (teacher / TAU, student / TAU)
    )
    if loss is jsd_loss:
        m = (p + q) / 2
        expected = (scipy.stats.entropy(p, m, axis=-1) + scipy.stats.entropy(q, m, axis=-1)) / 2
    else:
        expected = reverse * scipy.stats.entropy(q, p, axis=-1)
        expected = expected + middle * scipy.stats.entropy(p, q, axis=-1)
    found = loss(student, teacher, tau=TAU, activation="sigmoid").item()
    assert found == pytest.approx(TAU**2 * expected.sum(1).mean(), rel=1e-9)


# Gradients, precision, degenerate input


@every_loss
def test_gradcheck(loss):
    student, teacher = pair(shape_for(loss))
    options = {}
    if loss in OF_LOGITS:
        mask = torch.rand(student.select(1, 0).shape) > 0.3
        options = {"mask": mask, "tau": TAU}
    assert torch.autograd.gradcheck(
        functools.partial(loss, teacher=teacher, **options), student.requires_grad_()
    )


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_computation_is_in_float32(loss, dtype):
    student, teacher = (x.to(dtype) for x in pair(shape_for(loss)))
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(student, teacher)
    expected = loss(student.float(), teacher.float())
    assert found.dtype == expected.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@every_loss
@pytest.mark.parametrize("kind", ["zero", "constant", "equal", "constant teacher", "one sample"])
def test_degenerate_input_gives_a_finite_value_and_a_bounded_gradient(loss, kind):
    student, teacher = (x.float() for x in pair(shape_for(loss)))
    if kind == "zero":
        student = torch.zeros_like(student)
    elif kind == "constant":
        student = torch.full_like(student, 0.3)
    elif kind == "equal":
        student = teacher
    elif kind == "constant teacher":
        teacher = torch.full_like(teacher, 0.3)
    else:
        student, teacher = student[:1], teacher[:1]
    value, grad = value_and_grad(loss, student, teacher)
    assert value.isfinite()
    assert grad.isfinite().all()
    assert grad.abs().max() < 100
    if kind == "equal" or (kind == "one sample" and loss in (sp_loss, rkd_loss)):
        assert value.item() == pytest.approx(0, abs=1e-5)


@every_loss
@pytest.mark.parametrize("side", [0, 1])
def test_nan_is_not_hidden(loss, side):
    tensors = list(pair(shape_for(loss)))
    tensors[side][1] = float("nan")
    assert loss(*tensors).isnan()


@every_loss
def test_no_gradient_flows_to_the_teacher_which_may_come_from_inference_mode(loss):
    student, teacher = pair(shape_for(loss))
    with torch.inference_mode():
        fixed = teacher.clone()
    value, grad = value_and_grad(loss, student, fixed)
    teacher.requires_grad_()
    expected = loss(student, teacher)
    assert not expected.requires_grad
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert grad.any()


def test_samples_at_one_place_get_no_gradient_from_rkd():
    student, teacher = pair((4, 3))
    student[1] = student[0]
    _, grad = value_and_grad(rkd_loss, student, teacher)
    assert grad.isfinite().all()


# Classes that are ruled out, masks, labels


def test_ruled_out_classes():
    student, teacher = pair((6, 5))
    teacher[:, 2] = -torch.inf
    assert reverse_kd_loss(student, teacher) == torch.inf
    assert jeffreys_loss(student, teacher) == torch.inf
    assert jsd_loss(student, teacher).isfinite()
    student[:, 2] = -torch.inf
    kept = [x[:, [0, 1, 3, 4]] for x in (student, teacher)]
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    of_five = torch.tensor([0, 1, 3, 4, 0, 1])
    for loss in (reverse_kd_loss, jeffreys_loss, jsd_loss, lskd_loss):
        value, grad = value_and_grad(loss, student, teacher)
        assert value.item() == pytest.approx(loss(*kept).item(), rel=1e-9)
        assert grad.isfinite().all()
    value, grad = value_and_grad(
        lambda x, y: dkd_loss(x, y, of_five),
        student,
        teacher,
    )
    assert value.item() == pytest.approx(dkd_loss(*kept, labels).item(), rel=1e-9)
    assert grad.isfinite().all()


@pytest.mark.parametrize("loss", [reverse_kd_loss, jeffreys_loss, jsd_loss, lskd_loss])
@pytest.mark.parametrize("class_dim", [1, -1])
def test_masked_samples_may_hold_anything(loss, class_dim):
    student, teacher = pair((6, 5))
    mask = torch.tensor([True, True, False, True, False, True])
    expected, expected_grad = value_and_grad(loss, student[mask], teacher[mask])
    student[2], teacher[4] = float("nan"), float("inf")
    folded = [x.view(2, 3, 5).movedim(-1, class_dim) for x in (student, teacher)]
    options = {"mask": mask.view(2, 3), "class_dim": class_dim}
    value, grad = value_and_grad(loss, *folded, **options)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    grad = grad.movedim(class_dim, -1).reshape(6, 5)
    torch.testing.assert_close(grad[mask], expected_grad)
    assert not grad[~mask].any()
    assert loss(*folded, mask=torch.zeros(2, 3, dtype=torch.bool), class_dim=class_dim) == 0


def test_dkd_leaves_out_samples_without_a_label_and_masked_ones():
    student, teacher = pair((6, 5))
    labels = torch.tensor(LABELS)
    expected = dkd_loss(student[:4], teacher[:4], labels[:4])
    labels[5], student[5], teacher[4] = -100, float("nan"), float("nan")
    mask = torch.arange(6) != 4
    value, grad = value_and_grad(lambda x, y: dkd_loss(x, y, labels, mask=mask), student, teacher)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    assert grad.isfinite().all()
    assert dkd_loss(student, teacher, torch.full((6,), -100)) == 0


def test_cwd_leaves_out_masked_places():
    student, teacher = pair((2, 5, 1, 4))
    mask = torch.tensor([[[True, False, True, True]], [[False] * 4]])
    expected = cwd_loss(*(x[:1][..., [0, 2, 3]] for x in (student, teacher)))
    student[1], teacher[0, :, 0, 1] = float("nan"), float("inf")
    value, grad = value_and_grad(cwd_loss, student, teacher, mask=mask)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    assert grad.isfinite().all()
    assert not grad[1].any()


@pytest.mark.parametrize(
    "target",
    [torch.zeros(6), torch.zeros(6, 5).long(), torch.zeros(5).long()],
    ids=lambda x: x.shape,
)
def test_dkd_refuses_a_target_that_is_not_one_label_for_each_sample(target):
    with pytest.raises(ValueError, match=r"give one label for each sample, torch.int64 \(6,\)"):
        dkd_loss(*pair((6, 5)), target)


@pytest.mark.parametrize("loss", [lskd_loss, dkd_loss_of_labels, cwd_loss])
def test_ambiguous_and_single_classes_are_refused(loss):
    with pytest.raises(ValueError, match="class_dim=1"):
        loss(*pair((6, 5, 4)))
    if loss is not cwd_loss:
        with pytest.raises(ValueError, match="one class"):
            loss(*pair((6, 1)))


# Sizes of student and teacher


@pytest.mark.parametrize("loss", [at_loss, *RELATIONS])
def test_widths_may_differ(loss):
    student, teacher = pair((6, 5, 4, 3))
    wide = torch.cat([teacher, teacher], 1)
    assert loss(student, wide).isfinite()
    if loss is cka_loss:  # All similarities are doubled.
        assert loss(student, wide).item() == pytest.approx(loss(student, teacher).item())


@pytest.mark.parametrize("larger", ["student", "teacher", "height of one"])
def test_at_averages_the_larger_map(larger):
    student, teacher = pair((6, 5, 4, 2))
    doubled = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in (student, teacher)]
    maps = {
        "student": (doubled[0], teacher),
        "teacher": (student, doubled[1]),
        "height of one": (student.repeat_interleave(2, 2), teacher.repeat_interleave(3, 3)),
    }[larger]
    assert at_loss(*maps).item() == pytest.approx(at_loss(student, teacher).item(), rel=1e-9)


def test_a_mimic_of_another_size_is_refused_or_resized():
    small, large = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 8, 8)
    with pytest.raises(ValueError, match="resize=True"):
        FeatureMimic(3, 5)(small, large)
    for loss in (FeatureMimic(3, 5, resize=True), DISTFeatureLoss(3, 5, resize=True)):
        pooled = nn.functional.avg_pool2d(large, 2)
        function = mimic_loss if isinstance(loss, FeatureMimic) else dist_feature_loss
        expected = function(loss.projection(small), pooled)
        assert loss(small, large).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_mimic_takes_embeddings():
    loss = FeatureMimic(3, 5)
    student, teacher = torch.randn(4, 3), torch.randn(4, 5)
    weight, bias = loss.projection.weight[..., 0, 0], loss.projection.bias
    expected = (student @ weight.T + bias - teacher).square().mean()
    assert loss(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "shapes", "message"),
    [
        (cwd_loss, [(4, 3), (4, 3)], "compares the places of a map"),
        (cwd_loss, [(4, 3, 1, 1), (4, 3, 1, 1)], "compares the places of a map"),
        (cwd_loss, [(4, 3, 2, 2), (4, 3, 4, 4)], "differ in shape"),
        (at_loss, [(4, 3), (4, 3)], r"\(N, C, H, W\)"),
        (at_loss, [(4, 3, 5), (4, 3, 5)], r"\(N, C, H, W\)"),
        (at_loss, [(4, 3, 1, 1), (4, 3, 2, 2)], "before its pooling"),
        (dist_feature_loss, [(4, 3, 2, 2), (4, 5, 2, 2)], "project the student's channels"),
        (dist_feature_loss, [(4, 1, 2, 2), (4, 1, 2, 2)], "one channel"),
        (dist_feature_loss, [(4, 3, 1, 1), (4, 3, 1, 1)], "before its pooling"),
        (mimic_loss, [(4, 3), (4, 5)], "project the student's channels"),
        *((loss, [(4, 3), (5, 3)], r"student \(4, 3\), teacher \(5, 3\)") for loss in RELATIONS),
        *((loss, [(4,), (4,)], r"shape \(4,\)") for loss in RELATIONS),
    ],
)
def test_features_that_cannot_be_compared_are_refused(loss, shapes, message):
    with pytest.raises(ValueError, match=message):
        loss(*map(torch.randn, shapes))
    with pytest.raises(ValueError, match="int64"):
        loss(torch.zeros(shapes[0]).long(), torch.zeros(shapes[0]))


# Modules


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (ReverseKDLoss(TAU), functools.partial(reverse_kd_loss, tau=TAU)),
        (JeffreysLoss(TAU), functools.partial(jeffreys_loss, tau=TAU)),
        (JSDLoss(TAU, "sigmoid"), functools.partial(jsd_loss, tau=TAU, activation="sigmoid")),
        (CWDLoss(TAU), functools.partial(cwd_loss, tau=TAU)),
        (ATLoss(), at_loss),
        (SPLoss(), sp_loss),
        (RKDLoss(1.0, 2.0), functools.partial(rkd_loss, distance=1.0, angle=2.0)),
        (CKALoss(), cka_loss),
        (DISTFeatureLoss(5, 5, channels=2.0), functools.partial(dist_feature_loss, channels=2.0)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_module_gives_its_options_to_its_function(module, function):
    student, teacher = pair((6, 5, 4, 3))
    assert module(student, teacher).item() == function(student, teacher).item()


def test_dkd_and_its_standardisation_take_labels_and_a_mask():
    student, teacher = pair((6, 5))
    labels, mask = torch.tensor(LABELS), torch.arange(6) < 4
    options = {"alpha": 0.5, "beta": 2.0, "tau": TAU}
    expected = dkd_loss(student, teacher, labels, mask=mask, **options)
    module = DKDLoss(**options)
    assert module(student, teacher, target=labels, mask=mask).item() == expected.item()
    wrapped = StandardisedLogits(module)
    assert wrapped.needs_target
    standardised = [standardise(x) for x in (student, teacher)]
    expected = dkd_loss(*standardised, labels, mask=mask, **options)
    assert wrapped(student, teacher, target=labels, mask=mask).item() == expected.item()


def test_dist_of_standardised_logits_ignores_scale_and_shift():
    student, teacher = pair((6, 5))
    loss = StandardisedLogits(DISTLoss())
    changed = 3 * student + torch.arange(6)[:, None]
    assert loss(changed, teacher).item() == pytest.approx(loss(student, teacher).item(), rel=1e-6)


def test_every_function_of_a_loss_is_public():
    assert {x.__name__ for x in (*OF_FEATURES, dkd_loss, standardise, jsd_loss)} <= {
        *functional.__all__
    }


# Losses of torchdistill

PATHS = [".", "output", ".", "output"]
IO = {"io": "output", "path": "."}
IO_PAIR = {"pair": {"student": IO, "teacher": IO}}
# The losses that take one tensor of each network: their arguments, and the shape that they take.
OF_PEERS: dict[str, tuple[tuple[Any, ...], tuple[int, ...]]] = {
    "KDLoss": ((*PATHS, 2.0, 0.5), (6, 5)),
    "LogitStdKDLoss": ((*PATHS, 2.0, 1e-7, 0.5, 9), (6, 5)),
    "DISTLoss": (tuple(PATHS), (6, 5)),
    "PKTLoss": (tuple(PATHS), (6, 5)),
    "CCKDLoss": ((".", ".", {"type": "bilinear"}, "batchmean"), (6, 5)),
    "SKDInstanceLoss": (tuple(PATHS), (6, 5)),
    "SKDDirectionLoss": (tuple(PATHS), (6, 5)),
    "RegularizationLoss": ((".",), (6, 5)),
    "ATLoss": ((IO_PAIR,), (6, 5, 4, 3)),
    "AltActTransferLoss": ((IO_PAIR, 1.0, "mean"), (6, 5, 4, 3)),
    "ChSimLoss": ((IO_PAIR,), (6, 5, 4, 3)),
    "SPKDLoss": ((".", ".", "batchmean"), (6, 5, 4, 3)),
    "RKDLoss": ((".", ".", 1.0, 2.0, "mean"), (6, 5, 4, 3)),
    "AffinityLoss": ((".", "."), (6, 5, 4, 3)),
    "FTLoss": ((), (6, 5, 4, 3)),
    "KTALoss": ((), (6, 5, 4, 3)),
}
# The losses that need more, and words of the reason.
REFUSED = {
    "AuxSSKDLoss": "four rotations",
    "CRDLoss": "index of each sample",
    "DISTPlusLoss": "two terms",
    "FSPLoss": "two feature maps",
    "HierarchicalContextLoss": "fusion modules",
    "PADL2Loss": "predicts variances",
    "SRDLoss": "features and logits",
    "SSKDLoss": "four rotations",
    "VIDLoss": "means and variances",
}


def peer(name: str, arguments: tuple[Any, ...]) -> nn.Module:
    if not hasattr(mid_level, name):
        pytest.skip(f"this version of torchdistill has no {name}")
    return getattr(mid_level, name)(*arguments)


@pytest.mark.parametrize("name", OF_PEERS)
def test_a_loss_of_torchdistill_compares_two_tensors(name):
    arguments, shape = OF_PEERS[name]
    student, teacher = (x.float() for x in pair(shape))
    labels = torch.tensor(LABELS)
    loss = peer(name, arguments)
    paths = [".", "paraphraser", "translator", "feature_adapter"]
    expected = loss(
        *({path: {"output": x.clone()} for path in paths} for x in (student, teacher)), labels
    )
    adapted = from_torchdistill(loss)
    further = {"target": labels} if adapted.needs_target else {}
    assert adapted.needs_target == (name in ("KDLoss", "LogitStdKDLoss"))
    value, grad = value_and_grad(adapted, student, teacher, **further)
    assert value.item() == pytest.approx(float(expected), rel=1e-6)
    assert grad.any()
    if adapted.needs_target:
        with pytest.raises(ValueError, match="needs the labels"):
            adapted(student, teacher)


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_of_torchdistill_that_needs_more_says_what(name):
    if not hasattr(mid_level, name):
        pytest.skip(f"this version of torchdistill has no {name}")
    kind = getattr(mid_level, name)
    loss = kind.__new__(kind)  # Skip the constructors, which need many settings.
    nn.Module.__init__(loss)
    with pytest.raises(ValueError, match=REFUSED[name]):
        from_torchdistill(loss)


def test_every_loss_of_torchdistill_is_tested():
    found = {
        name
        for name, value in vars(mid_level).items()
        if isinstance(value, type) and value.__module__ == mid_level.__name__
    }
    assert found - {"SimpleLossWrapper", "DictLossWrapper"} <= {*OF_PEERS, *REFUSED}


def test_a_loss_that_reads_two_paths_is_refused():
    class Two(nn.Module):
        def forward(self, student, teacher, targets):
            return (student["a"]["output"] - student["b"]["input"]).mean()

    class Nothing(nn.Module):
        def forward(self, student, teacher, targets):
            return teacher["a"]["output"].mean()

    with pytest.raises(ValueError, match=r"several tensors of one network \(a.output, b.input\)"):
        from_torchdistill(Two())(*pair((2, 3)))
    with pytest.raises(ValueError, match="reads nothing of the student"):
        from_torchdistill(Nothing())(*pair((2, 3)))
    with pytest.raises(TypeError, match="give an instance"):
        from_torchdistill(Two)
