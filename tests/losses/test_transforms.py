"""Tests of the losses inside torch.func, and with tensors from inference mode."""

import pytest
import torch
from torch import Tensor, nn

from lightning_dist.functional import dist_loss, kd_loss
from lightning_dist.losses import FeatureMimic, streaming

LOSSES = [dist_loss, kd_loss]


def gradient(loss, student: Tensor, teacher: Tensor, **options) -> Tensor:
    student = student.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(student, teacher, **options), student)[0]


@pytest.fixture(params=[2**17, 30], ids=["one block", "many blocks"], autouse=True)
def block_size(request, monkeypatch):
    monkeypatch.setattr(streaming, "_BLOCK_CPU", request.param)
    monkeypatch.setattr(streaming, "_LEAST_ROWS", 1)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(12, 5), (3, 5, 4, 2)])
def test_func_grad_equals_autograd(loss, shape):
    student, teacher = torch.randn(2, *shape).double().unbind()
    found, value = torch.func.grad_and_value(loss)(student, teacher)
    torch.testing.assert_close(found, gradient(loss, student, teacher), rtol=1e-12, atol=0)
    assert value.item() == pytest.approx(loss(student, teacher).item(), rel=1e-12)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "identity"])
@pytest.mark.parametrize("batched", [(0, 0), (0, None), (None, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_vmap_equals_a_loop(activation, batched, masked):
    pairs = [torch.randn(4, 12, 5).double() for _ in batched]
    mask = torch.rand(12) > 0.3 if masked else None
    inputs = [x if dim == 0 else x[0] for x, dim in zip(pairs, batched, strict=True)]

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return dist_loss(student, teacher, activation=activation, mask=mask)

    losses = torch.func.vmap(loss, in_dims=batched)(*inputs)
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=batched)(*inputs)
    for index in range(4):
        student, teacher = (
            x if dim is None else x[index] for x, dim in zip(inputs, batched, strict=True)
        )
        assert losses[index].item() == pytest.approx(loss(student, teacher).item(), rel=1e-12)
        expected = gradient(loss, student, teacher)
        torch.testing.assert_close(gradients[index], expected, rtol=1e-10, atol=1e-14)


def test_functional_call_gives_the_gradients_of_the_parameters():
    module, features, teacher = nn.Linear(6, 5), torch.randn(16, 6), torch.randn(16, 5)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return dist_loss(torch.func.functional_call(module, parameters, features), teacher)

    found = torch.func.grad(loss)(dict(module.named_parameters()))
    dist_loss(module(features), teacher).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_a_second_derivative_is_refused_inside_func():
    student, teacher = torch.randn(2, 4, 3).unbind()

    def slope(x: Tensor) -> Tensor:
        return torch.func.grad(dist_loss)(x, teacher).square().sum()

    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(slope)(student)


def test_vmap_refuses_to_gather_over_ranks(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        student, teacher = torch.randn(2, 4, 6, 3).unbind()

        def loss(student: Tensor, teacher: Tensor) -> Tensor:
            return dist_loss(student, teacher, sync=True)

        with pytest.raises(RuntimeError, match=r"cannot gather inside torch\.func\.vmap"):
            torch.func.vmap(loss)(student, teacher)
        found = torch.func.grad(loss)(student[0], teacher[0])
        torch.testing.assert_close(found, gradient(dist_loss, student[0], teacher[0]))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_from_inference_mode_is_taken(loss, dtype):
    student, teacher = torch.randn(2, 8, 5, dtype=dtype).unbind()
    with torch.inference_mode():
        frozen = teacher * 1
        mask = torch.rand(8) > 0.3
        loss(student, frozen)
    torch.testing.assert_close(gradient(loss, student, frozen), gradient(loss, student, teacher))
    if loss is dist_loss:
        assert gradient(loss, student, teacher, mask=mask).isfinite().all()


def test_a_feature_map_from_inference_mode_is_taken():
    mimic, student = FeatureMimic(3, 4), torch.randn(2, 3, 5, 5)
    with torch.inference_mode():
        teacher = torch.randn(2, 4, 5, 5)
    mimic(student, teacher).backward()
    assert mimic.projection.weight.grad.isfinite().all()
