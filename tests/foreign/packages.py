"""Tests of the callback on modules of other packages, unchanged; `make test-foreign` runs them.

Each function below returns a module with new weights, its loader, a function that takes the teacher
from a second such module, and the arguments of the callback.
"""

import copy
from operator import attrgetter

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
import torch.nn.functional as F
from anomalib.data import ImageBatch
from anomalib.models import Fastflow, Ganomaly
from anomalib.pre_processing import PreProcessor
from chemprop import data as chemistry
from chemprop import models
from chemprop import nn as chemprop_nn
from pytorch_forecasting import DecoderMLP, TimeSeriesDataSet
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch_uncertainty.methods import deep_ensembles
from torch_uncertainty.models.classification import lenet
from torch_uncertainty.routines import ClassificationRoutine
from torch_uncertainty.transforms import RepeatTarget
from torchvision.transforms.v2 import Resize

from lightning_dist import DistillationCallback, Term


def itself(module: nn.Module) -> nn.Module:
    return module


def chemprop():
    """Return an MPNN, whose step calls a method of its predictor."""
    smiles = ["CCO", "CCN", "CCC", "CC(=O)O", "c1ccccc1", "CCCl", "CCBr", "CNC"]
    points = [chemistry.MoleculeDatapoint.from_smi(s, [float(i)]) for i, s in enumerate(smiles)]
    dataset = chemistry.MoleculeDataset(points)
    passing = chemprop_nn.BondMessagePassing(d_h=16, depth=2)
    predictor = chemprop_nn.RegressionFFN(input_dim=16, hidden_dim=16)
    module = models.MPNN(passing, chemprop_nn.MeanAggregation(), predictor)
    loader = chemistry.build_dataloader(dataset, batch_size=4, shuffle=False)
    term = Term(F.mse_loss, student="predictor.train_step")
    options = {"student": "", "inputs": lambda batch: tuple(batch[:3]), "terms": {"a": term}}
    return module, loader, itself, options


def pytorch_forecasting():
    """Return a network of time series, whose step calls the module itself."""
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
    terms = {"a": Term(F.mse_loss, output="prediction")}
    return module, loader, itself, {"student": "", "terms": terms}


def torch_uncertainty():
    """Return an ensemble of two classifiers with equal weights, which trains on repeated rows."""
    members = [lenet(1, 4, dropout_rate=0.2), lenet(1, 4, dropout_rate=0.2)]
    members[1].load_state_dict(members[0].state_dict())
    module = ClassificationRoutine(
        model=deep_ensembles(members),
        num_classes=4,
        loss=nn.CrossEntropyLoss(),
        is_ensemble=True,
        format_batch_fn=RepeatTarget(2),
        optim_recipe=lambda network: torch.optim.SGD(network.parameters(), lr=0.1),
    )
    loader = DataLoader([(images(1, 28), torch.arange(4))] * 3, batch_size=None)
    terms = {"a": Term(F.mse_loss, rows="tiled")}
    return module, loader, attrgetter("model.core_models.0"), {"student": "model", "terms": terms}


def anomalib_ganomaly():
    """Return an adversarial module, which optimizes manually; its first backward trains the net."""
    module = Ganomaly(4, n_features=8, latent_vec_size=8, **without_extras())
    term = Term(F.mse_loss, student="generator", teacher="generator")
    options = {"student": "model", "terms": {"a": term}, "backward": 0}
    return module, anomaly_loader(), attrgetter("model"), options


def anomalib_fastflow():
    """Return a module whose network returns lists in a tuple in training mode only."""
    module = Fastflow(pre_trained=False, flow_steps=2, **without_extras())
    part = "fast_flow_blocks.2"
    terms = {"a": Term(F.mse_loss, student=part, teacher=part)}
    return module, anomaly_loader(), attrgetter("model"), {"student": "model", "terms": terms}


def scvi_tools():
    """Return a variational autoencoder in a training plan, which draws numbers in eval mode too."""
    counts = np.random.default_rng(1).poisson(3.0, (24, 12)).astype(np.float32)
    cells = anndata.AnnData(counts)
    scvi.model.SCVI.setup_anndata(cells)
    model = scvi.model.SCVI(cells, n_hidden=16, n_latent=4)
    loader = model._make_data_loader(cells, batch_size=8)
    terms = {"a": Term(F.mse_loss, output="0.qz.loc")}
    options = {"student": "module", "terms": terms}
    return scvi.train.TrainingPlan(model.module), loader, attrgetter("module"), options


def images(channels: int, size: int) -> Tensor:
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(4))


def anomaly_loader() -> DataLoader:
    return DataLoader([images(3, 32)] * 3, batch_size=None, collate_fn=lambda x: ImageBatch(x))


def without_extras() -> dict[str, object]:
    resize = PreProcessor(transform=Resize((32, 32)))
    return {
        "pre_processor": resize,
        "post_processor": False,
        "evaluator": False,
        "visualizer": False,
    }


PACKAGES = [
    chemprop,
    pytorch_forecasting,
    torch_uncertainty,
    anomalib_ganomaly,
    anomalib_fastflow,
    scvi_tools,
]


def fitted(make_trainer, package, callback=None, deterministic=False, **options):
    torch.manual_seed(1)
    module, loader, *_ = package()
    if deterministic:
        make_deterministic(module)
    torch.manual_seed(2)
    callbacks = [] if callback is None else [callback]
    trainer = make_trainer(callbacks=callbacks, max_epochs=1, limit_val_batches=0, **options)
    trainer.fit(module, loader)
    return module, trainer


def make_deterministic(module: nn.Module) -> None:
    """Let layers in training mode compute as in eval mode."""
    layers = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd
    for part in module.modules():
        if isinstance(part, layers):
            part.eval()


@pytest.mark.parametrize("package", PACKAGES)
def test_weight_0_changes_no_weight(make_trainer, package, tmp_path):
    torch.manual_seed(5)
    second, _, teacher_of, options = package()
    teacher = teacher_of(second)
    options["terms"]["a"].weight = lambda trainer: torch.zeros(())
    before, calls = copy.deepcopy(teacher.state_dict()), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    distilled, trainer = fitted(make_trainer, package, DistillationCallback(teacher, **options))
    alone, other = fitted(make_trainer, package)
    assert len(calls) == trainer.fit_loop.total_batch_idx + 1
    torch.testing.assert_close(distilled.state_dict(), alone.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    for name, each in (("distilled", trainer), ("alone", other)):
        each.save_checkpoint(tmp_path / name)
    sizes = [(tmp_path / name).stat().st_size for name in ("distilled", "alone")]
    # The difference is the state of the callback, and no teacher.
    assert sizes[0] < sizes[1] + 2000


@pytest.mark.parametrize("package", PACKAGES)
def test_a_copy_of_the_student_scores_0(make_trainer, package):
    torch.manual_seed(1)
    module, _, teacher_of, options = package()
    callback = DistillationCallback(teacher_of(module).eval(), **options)
    _, trainer = fitted(make_trainer, package, callback, deterministic=True, max_steps=1)
    assert trainer.callback_metrics["train/distill"].item() == pytest.approx(0, abs=1e-5)
