"""Tests of the callback on modules of other packages, unchanged; `make test-foreign` runs them."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from chemprop import data as chemistry
from chemprop import models
from chemprop import nn as chemprop_nn
from pytorch_forecasting import DecoderMLP, TimeSeriesDataSet

from lightning_dist import DistillationCallback, Term


def chemprop():
    """Return an MPNN, whose step calls a method of its predictor, and its loader."""
    smiles = ["CCO", "CCN", "CCC", "CC(=O)O", "c1ccccc1", "CCCl", "CCBr", "CNC"]
    points = [chemistry.MoleculeDatapoint.from_smi(s, [float(i)]) for i, s in enumerate(smiles)]
    dataset = chemistry.MoleculeDataset(points)
    passing = chemprop_nn.BondMessagePassing(d_h=16, depth=2)
    predictor = chemprop_nn.RegressionFFN(input_dim=16, hidden_dim=16)
    module = models.MPNN(passing, chemprop_nn.MeanAggregation(), predictor)
    loader = chemistry.build_dataloader(dataset, batch_size=4, shuffle=False)
    term = Term(F.mse_loss, student="predictor.train_step")
    return module, loader, {"inputs": lambda batch: tuple(batch[:3]), "terms": {"a": term}}


def pytorch_forecasting():
    """Return a network of time series, whose step calls the module itself, and its loader."""
    rows = {"time": np.tile(np.arange(20), 2), "series": np.repeat(["a", "b"], 20)}
    table = pd.DataFrame(rows | {"value": np.sin(np.arange(40))})
    dataset = TimeSeriesDataSet(
        table,
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=6,
        max_prediction_length=2,
        time_varying_known_reals=["time"],
    )
    module = DecoderMLP.from_dataset(dataset, hidden_size=8, dropout=0.0, norm=False)
    loader = dataset.to_dataloader(train=False, batch_size=8)
    return module, loader, {"terms": {"a": Term(F.mse_loss, output="prediction")}}


PACKAGES = [chemprop, pytorch_forecasting]


def fitted(make_trainer, package, callback=None, **options):
    torch.manual_seed(1)
    module, loader, _ = package()
    torch.manual_seed(2)
    callbacks = [] if callback is None else [callback]
    trainer = make_trainer(callbacks=callbacks, max_epochs=1, limit_val_batches=0, **options)
    trainer.fit(module, loader)
    return module, trainer


@pytest.mark.parametrize("package", PACKAGES)
def test_weight_0_changes_no_weight(make_trainer, package):
    torch.manual_seed(5)
    teacher, _, options = package()
    options["terms"]["a"].weight = lambda trainer: torch.zeros(())
    before = copy.deepcopy(teacher.state_dict())
    callback = DistillationCallback(teacher, student="", **options)
    distilled, _ = fitted(make_trainer, package, callback)
    alone, _ = fitted(make_trainer, package)
    torch.testing.assert_close(distilled.state_dict(), alone.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_copy_of_the_student_scores_0(make_trainer, package):
    torch.manual_seed(1)
    teacher, _, options = package()
    teacher.eval()
    callback = DistillationCallback(teacher, student="", **options)
    _, trainer = fitted(make_trainer, package, callback, max_steps=1)
    assert trainer.callback_metrics["train/distill"].item() == pytest.approx(0, abs=1e-5)
