"""Tests of the callback together with other callbacks, in checkpoints, and in pytorch_lightning."""

import copy
import importlib
import pickle

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_dist import DistillationCallback, Term
from plain import Projection


def with_projection(teacher: nn.Module) -> DistillationCallback:
    terms = {"mimic": Term(Projection(2))}
    return DistillationCallback(teacher, student="layer", terms=terms)


def test_model_pruning_after_a_term_with_parameters_is_refused(make_trainer):
    def fit(*order):
        pruning = ModelPruning("l1_unstructured", amount=0.5)
        callbacks = {"pruning": pruning, "distillation": with_projection(nn.Linear(32, 2))}
        trainer = make_trainer(callbacks=[callbacks[name] for name in order], max_steps=1)
        trainer.fit(BoringModel())

    with pytest.raises(MisconfigurationException, match=r"ModelPruning would prune.*term 'mimic'"):
        fit("distillation", "pruning")
    fit("pruning", "distillation")


class KeepsCallbacks(BoringModel):
    """A module that keeps the Trainer's callbacks in its hyper-parameters."""

    def __init__(self, callbacks: list) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_checkpoint_with_the_callback_in_its_hyper_parameters_has_no_network(
    make_trainer, tmp_path
):
    callback = DistillationCallback(
        nn.Linear(32, 2), student="layer", loss=F.mse_loss, weight=lambda trainer: 1.0
    )
    module = KeepsCallbacks([callback])

    class Saving(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / "own.ckpt")

    # It is the object itself, not the copy that save_hyperparameters makes.
    module.hparams.callbacks[:] = [callback]
    make_trainer(callbacks=[callback, Saving()], max_steps=1).fit(module)
    saved = torch.load(tmp_path / "own.ckpt", weights_only=False)
    (loaded,) = saved["hyper_parameters"]["callbacks"]
    assert loaded.student == "layer"
    assert not any(isinstance(value, nn.Module) for value in vars(loaded).values())
    assert loaded.teacher is None
    with pytest.raises(MisconfigurationException, match="comes from a pickle or a checkpoint"):
        make_trainer(callbacks=[loaded]).fit(BoringModel())


def test_a_deep_copy_shares_the_teacher_and_copies_the_terms(make_trainer):
    callback = with_projection(nn.Linear(32, 2))
    copied = copy.deepcopy(callback)
    assert copied.teacher is callback.teacher
    assert copied.terms["mimic"].loss is not callback.terms["mimic"].loss
    make_trainer(callbacks=[copied], max_steps=1).fit(BoringModel())
    assert pickle.loads(pickle.dumps(callback)).teacher is None


def test_pytorch_lightning_distils_as_lightning_does(make_trainer, tmp_path):
    pl = importlib.import_module("pytorch_lightning")
    teacher = nn.Linear(32, 2)

    def fitted(package, boring, *others):
        torch.manual_seed(3)
        module = boring()
        trainer = package.Trainer(
            accelerator="cpu",
            max_epochs=1,
            limit_train_batches=3,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[*others, DistillationCallback(teacher, "layer", F.mse_loss)],
        )
        trainer.fit(module)
        return module, trainer

    theirs = importlib.import_module("pytorch_lightning.demos.boring_classes")
    (own, trainer), (other, other_trainer) = (
        fitted(L, BoringModel),
        fitted(pl, theirs.BoringModel),
    )
    torch.testing.assert_close(own.state_dict(), other.state_dict(), rtol=0, atol=0)
    distill = other_trainer.callback_metrics["train/distill"]
    assert distill == trainer.callback_metrics["train/distill"]
    assert "training_step" not in vars(other)


def test_an_averaging_of_pytorch_lightning_before_a_term_with_parameters_is_refused(tmp_path):
    callbacks = importlib.import_module("pytorch_lightning.callbacks")
    pl = importlib.import_module("pytorch_lightning")
    theirs = importlib.import_module("pytorch_lightning.demos.boring_classes")
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[callbacks.EMAWeightAveraging(), with_projection(nn.Linear(32, 2))],
    )
    message = "EMAWeightAveraging comes before.*list DistillationCallback first"
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(theirs.BoringModel())
