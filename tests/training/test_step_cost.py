"""Tests that the work of a step beside the losses does not grow with the terms."""

import collections

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from lightning_dist import DistillationCallback, Term
from lightning_dist.resume import ExactResume
from plain import Plain, data, fitted, teacher_net

BATCHES, EPOCHS = 4, 2


def named(terms: int) -> dict[str, Term]:
    return {f"term{index}": Term(F.mse_loss, 0.1 * (index + 1)) for index in range(terms)}


class Read(L.Callback):
    """A callback that keeps what Lightning has for other callbacks after each batch."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *args):
        metrics = trainer.callback_metrics.items()
        self.found.append({k: v.item() for k, v in metrics if k.startswith("train/distill/")})


class Losses:
    """A loss that keeps its values."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def __call__(self, student, teacher):
        value = F.mse_loss(student, teacher)
        self.values.append(value.item())
        return value


def run(make_trainer, terms, module=Plain):
    read = Read()
    callbacks = [DistillationCallback(teacher_net(), terms=terms), read]
    fitted(make_trainer(max_epochs=EPOCHS, callbacks=callbacks), module, data(BATCHES))
    return read.found


def test_lightning_prepares_an_entry_once_an_epoch_and_has_the_value_of_each_step(
    make_trainer, monkeypatch
):
    own, names = L.LightningModule.log, []

    def log(self, name, *args, **kwargs):
        names.append(name)
        return own(self, name, *args, **kwargs)

    monkeypatch.setattr(L.LightningModule, "log", log)
    losses = Losses()
    found = run(make_trainer, named(3) | {"kept": Term(losses)})
    counts = collections.Counter(names)
    assert counts["train/distill"] == counts["train/distill/kept"] == EPOCHS
    assert len(found) == len(losses.values) == BATCHES * EPOCHS
    assert len({*losses.values}) == BATCHES * EPOCHS
    assert [x["train/distill/kept"] for x in found] == pytest.approx(losses.values, rel=1e-6)


def test_a_module_that_overrides_log_gets_every_value(make_trainer):
    class Own(Plain):
        def log(self, name, *args, **kwargs):
            names.append(name)
            return super().log(name, *args, **kwargs)

    names: list[str] = []
    run(make_trainer, named(2), Own)
    assert collections.Counter(names)["train/distill/term1"] == BATCHES * EPOCHS


class Reads(TorchFunctionMode):
    """A mode that counts how often Python reads the value of a tensor, which waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.Tensor.__bool__, torch.Tensor.item, torch.Tensor.tolist)
        return func(*args, **(kwargs or {}))


def test_more_terms_read_no_more_numbers_from_the_device(make_trainer):
    counts = []
    for terms in (1, 8):
        with Reads() as reads:
            callback = DistillationCallback(teacher_net(), terms=named(terms))
            fitted(make_trainer(callbacks=[callback]), Plain, data(BATCHES))
        counts.append(reads.count)
    assert counts[0] == counts[1] >= BATCHES


def test_a_run_on_the_cpu_does_not_seed_gpus(make_trainer, monkeypatch):
    """torch.manual_seed keeps a stack trace for a GPU that is not used yet, which takes 1 ms."""
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    trainer = make_trainer(callbacks=[ExactResume()])
    before = torch.initial_seed()
    trainer.fit(Plain(), data(BATCHES))
    assert not seeds
    assert torch.initial_seed() != before
