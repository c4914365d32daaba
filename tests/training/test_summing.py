"""Tests of the sum of distillation terms, which is computed from recorded outputs only."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_dist import DistillationCallback, DISTLoss, Term
from lightning_dist.taps import Recording
from lightning_dist.terms import refuse_unmapped
from lightning_dist.training.summing import current_weights, sum_terms

TRAINER = SimpleNamespace(
    global_step=7,
    current_epoch=2,
    world_size=1,
    is_last_batch=False,
    fit_loop=SimpleNamespace(batch_idx=0, total_batch_idx=0),
)


def summed(terms, student, teacher, nonfinite="raise"):
    weights = current_weights(terms, TRAINER)
    recorded = Recording(nn.ModuleDict({"head": nn.Linear(3, 3)}), student)
    options = {
        "place": "net",
        "nonfinite": nonfinite,
        "to_student_classes": lambda logits, part: logits,
    }
    return sum_terms(terms, weights, recorded, teacher, TRAINER, **options)


def test_the_sum_weights_the_terms_and_includes_all_calls():
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    terms = {
        "a": Term(F.mse_loss, 2.0),
        "b": Term(F.l1_loss, lambda trainer: 0.5, student="head", teacher="head"),
    }
    found = summed(terms, {"": [x, 2 * x], "head": [x]}, {"": [y, y + 1], "head": [y]})
    expected = {
        "a": ((x - y) ** 2).mean() + ((2 * x - y - 1) ** 2).mean(),
        "b": (x - y).abs().mean(),
    }
    torch.testing.assert_close(found.values, expected)
    torch.testing.assert_close(found.total, 2.0 * expected["a"] + 0.5 * expected["b"])


def test_a_term_that_is_not_finite_is_an_error_that_names_the_side_or_is_skipped():
    x = torch.randn(4, 3, requires_grad=True)
    bad = torch.full((4, 3), float("nan"))
    terms = {"a": Term(F.mse_loss), "b": Term(F.l1_loss)}
    with pytest.raises(
        FloatingPointError, match=r"'a' .* step 7 \(epoch 2, batch 0\).*the teacher's output"
    ):
        summed(terms, {"": [x]}, {"": [bad]})
    found = summed(terms, {"": [x]}, {"": [bad]}, nonfinite="skip")
    assert found.skipped == 2
    assert found.total == 0


def test_dist_refuses_a_batch_of_one_sample_in_one_process():
    x = torch.randn(1, 3, requires_grad=True)
    for sync in (False, True):  # sync=True adds no samples, because there is only one process.
        with pytest.raises(MisconfigurationException, match="the batch has one sample"):
            summed({"a": Term(DISTLoss(sync=sync))}, {"": [x]}, {"": [x.detach()]})


def test_a_part_that_was_not_called_adds_0_and_is_named():
    loss = nn.Bilinear(3, 3, 1)
    found = summed({"a": Term(loss, student="head")}, {"head": []}, {"": []})
    assert "term 'a': 'net.head' was not called" in found.unused["a"]
    assert found.total == 0
    found.total.backward()  # DDP waits for a gradient of each parameter of the loss.
    assert all(parameter.grad.eq(0).all() for parameter in loss.parameters())


ROWS = {"tiled": lambda y: torch.cat([y, y]), "interleaved": lambda y: y.repeat_interleave(2, 0)}


@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_the_teacher_belong_to_several_of_the_student(rows):
    y = torch.randn(4, 3)
    x = ROWS[rows](y).requires_grad_()
    crops = [x, x[:4].detach().requires_grad_()]
    found = summed({"a": Term(DISTLoss(), rows=rows)}, {"": [x]}, {"": [y]})
    assert found.total.item() == pytest.approx(0, abs=1e-5)
    found = summed({"a": Term(F.mse_loss, rows=rows)}, {"": crops}, {"": [y]})
    expected = F.mse_loss(x[:4], y)
    torch.testing.assert_close(found.total, expected)
    with pytest.raises(MisconfigurationException, match=r"8 rows and the teacher 4.*'tiled'"):
        summed({"a": Term(DISTLoss())}, {"": [x]}, {"": [y]})
    with pytest.raises(ValueError, match=r"rows of term 'a' is 'twice'"):
        DistillationCallback(nn.Linear(3, 3), terms={"a": Term(DISTLoss(), rows="twice")})


def test_an_iterator_that_ends_in_a_function_of_a_term_is_an_error_and_not_the_end_of_the_epoch():
    x, ended = torch.randn(4, 3, requires_grad=True), iter(())
    term = Term(F.mse_loss, from_batch=lambda batch, logits: next(ended))
    with pytest.raises(MisconfigurationException, match=r"term 'a' of 'net'.*StopIteration\(\)"):
        summed({"a": term}, {"": [x]}, {"": [x.detach()]})
    with pytest.raises(MisconfigurationException, match=r"term 'a': StopIteration\(\)"):
        current_weights({"a": Term(F.mse_loss, lambda trainer: next(ended))}, None)


def test_a_message_about_an_output_names_the_tap_and_the_mode():
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    terms = {"a": Term(F.mse_loss, student="head", output="main")}
    message = (
        r"term 'a' of 'net\.head' and the teacher: the teacher's output in eval mode: .*'main'"
    )
    with pytest.raises(MisconfigurationException, match=message):
        summed(terms, {"head": [{"main": x}]}, {"": [{"aux": y}]})


def test_an_output_of_another_structure_in_eval_mode_is_taken_by_a_function():
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)

    def main(output):
        return output[0][-1] if isinstance(output, tuple) else output

    found = summed({"a": Term(F.mse_loss, output=main)}, {"": [([y, x], "aux")]}, {"": [y]})
    torch.testing.assert_close(found.total, F.mse_loss(x, y))
    with pytest.raises(MisconfigurationException, match=r"class_map, and the output of term 'a'"):
        refuse_unmapped({"a": Term(DISTLoss(), output=main)}, lambda part: [1, 0])
