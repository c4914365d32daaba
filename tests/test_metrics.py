"""Tests of the metrics of student and teacher against NumPy and SciPy."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from lightning_dist.metrics import (
    InterClassCorrelation,
    IntraClassCorrelation,
    PredictionEntropy,
    TeacherAgreement,
    teacher_metrics,
)

CLASSES = 5
TAU = 2.0


def logits(*shape: int, seed: int = 0, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Return logits of a student and a teacher that resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(shape, generator=generator, dtype=dtype)
    return teacher + torch.randn(shape, generator=generator, dtype=dtype), teacher


def probabilities(z: Tensor) -> np.ndarray:
    """Return probabilities of shape (samples, classes) of logits (N, C) or (N, C, H, W)."""
    rows = z.double().movedim(1, -1).reshape(-1, CLASSES).numpy()
    return scipy.special.softmax(rows / TAU, axis=1)


def metrics() -> dict[str, object]:
    return {
        "agreement": TeacherAgreement(),
        "inter": InterClassCorrelation(tau=TAU),
        "intra": IntraClassCorrelation(CLASSES, tau=TAU),
    }


def expected(student: Tensor, teacher: Tensor) -> dict[str, float]:
    s, t = probabilities(student), probabilities(teacher)
    return {
        "agreement": (s.argmax(1) == t.argmax(1)).mean(),
        "inter": np.mean([scipy.stats.pearsonr(a, b)[0] for a, b in zip(s, t, strict=True)]),
        "intra": np.mean([scipy.stats.pearsonr(a, b)[0] for a, b in zip(s.T, t.T, strict=True)]),
    }


@pytest.mark.parametrize("name", ["agreement", "inter", "intra"])
@pytest.mark.parametrize("shape", [(23, CLASSES), (6, CLASSES, 4, 3)])
def test_a_metric_of_uneven_batches_is_that_of_all_samples(name, shape):
    metric, pair = metrics()[name], logits(*shape)
    last = len(pair[0]) - 4
    for part in zip(*(x.split([1, 3, 0, last]) for x in pair), strict=True):
        metric.update(*part)
    assert float(metric.compute()) == pytest.approx(expected(*pair)[name], abs=1e-7)


@pytest.mark.parametrize("name", ["agreement", "inter", "intra"])
def test_a_metric_merges_processes_one_of_which_has_no_sample(name):
    metric, pair = metrics()[name], logits(23, CLASSES)
    ranks = [metrics()[name] for _ in range(3)]
    ranks[0].update(*(x[:20] for x in pair))
    ranks[2].update(*(x[20:] for x in pair))
    gathered = {state: [getattr(rank, state) for rank in ranks] for state in metric._defaults}
    states = iter(gathered.values())
    metric._sync_dist(dist_sync_fn=lambda *_, **__: next(states))
    metric._update_count = 1
    assert float(metric.compute()) == pytest.approx(expected(*pair)[name], abs=1e-7)


@pytest.mark.parametrize("name", ["agreement", "inter", "intra"])
def test_a_mask_leaves_out_pixels_and_whole_batches(name):
    metric, (student, teacher) = metrics()[name], logits(3, CLASSES, 4, 6)
    mask = torch.arange(4 * 6).reshape(4, 6).expand(3, 4, 6) % 3 != 0
    metric.update(student, teacher, mask)
    metric.update(teacher, student, torch.zeros_like(mask))
    kept = [x.movedim(1, -1)[mask] for x in (student, teacher)]
    assert float(metric.compute()) == pytest.approx(expected(*kept)[name], abs=1e-7)


def test_the_dimension_of_the_classes_can_be_chosen():
    student, teacher = logits(4, 7, CLASSES)
    found = teacher_metrics(CLASSES, class_dim=-1)
    found.update(student, teacher)
    rows = teacher_metrics(CLASSES)
    rows.update(student.reshape(-1, CLASSES), teacher.reshape(-1, CLASSES))
    assert {k: float(v) for k, v in found.compute().items()} == pytest.approx(
        {k: float(v) for k, v in rows.compute().items()}
    )


def test_values_far_from_zero_keep_their_intra_class_correlation():
    student, teacher = (1e6 + x for x in logits(2000, CLASSES))
    metric = IntraClassCorrelation(CLASSES, activation="identity")
    for part in zip(student.split(7), teacher.split(7), strict=True):
        metric.update(*part)
    pairs = zip(student.T, teacher.T, strict=True)
    reference = np.mean([scipy.stats.pearsonr(a - 1e6, b - 1e6)[0] for a, b in pairs])
    assert float(metric.compute()) == pytest.approx(reference, abs=1e-6)


def test_a_class_that_is_constant_up_to_rounding_counts_as_zero():
    student, teacher = logits(64, CLASSES, dtype=torch.float32)
    student[:, 2] = 1 + torch.finfo(torch.float32).eps * (torch.arange(64) % 2)
    metric = IntraClassCorrelation(CLASSES, activation="identity")
    metric.update(student, teacher)
    others = [i for i in range(CLASSES) if i != 2]
    rho = [scipy.stats.pearsonr(student[:, i], teacher[:, i])[0] for i in others]
    assert float(metric.compute()) == pytest.approx(sum(rho) / CLASSES, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_of_low_precision_are_compared_in_higher_precision(dtype):
    student, teacher = (x.to(dtype) for x in logits(500, CLASSES))
    for name, metric in metrics().items():
        metric.update(student, teacher)
        assert float(metric.compute()) == pytest.approx(expected(student, teacher)[name], abs=1e-5)


def test_the_entropy_is_the_mean_over_the_samples_that_the_mask_keeps():
    z, _ = logits(6, CLASSES, 4, 3)
    metric, mask = PredictionEntropy(tau=TAU), torch.rand(6, 4, 3) > 0.3
    for part in zip(z.split([1, 5]), mask.split([1, 5]), strict=True):
        metric.update(*part)
    kept = probabilities(z.movedim(1, -1)[mask])
    assert float(metric.compute()) == pytest.approx(scipy.stats.entropy(kept, axis=1).mean())


def test_a_metric_moves_to_a_device_without_float64():
    """This stands for Apple's MPS, which raises a TypeError for such tensors."""

    def move(x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise TypeError("no float64")
        return x.clone()

    pair = logits(50, CLASSES, dtype=torch.float32)
    for name in ("inter", "intra"):
        metric = metrics()[name]._apply(move)
        metric.update(*pair)
        assert float(metric.compute()) == pytest.approx(expected(*pair)[name], abs=1e-5)
        metric.reset()
        assert not any(state.dtype == torch.float64 for state in metric._defaults.values())


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (TeacherAgreement(), "softmax over one class"),
        (PredictionEntropy(), "softmax over one class"),
        (IntraClassCorrelation(4), "have 1 classes and num_classes is 4"),
    ],
)
def test_logits_of_another_number_of_classes_are_refused(metric, message):
    z = torch.zeros(4, 1)
    with pytest.raises(ValueError, match=message):
        metric.update(*[z] * (1 if isinstance(metric, PredictionEntropy) else 2))
