"""Tests of the callback with networks of Hugging Face Transformers, compared with a plain loop."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist import DistillationCallback, DISTLoss, KDLoss, Teacher, Term
from lightning_dist.cache import CachedTeacher
from lightning_dist.data.base import ImageDataModule
from lightning_dist.teacher import EnsembleTeacher

transformers = pytest.importorskip("transformers", reason="transformers is in the extra test")

LENGTH, VOCABULARY, PADDED_VOCABULARY = 7, 20, 24


def encoder(width: int) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": width, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, num_hidden_layers=1, num_labels=4, **sizes
    )
    return transformers.BertForSequenceClassification(config)


def decoder(width: int, vocabulary: int = VOCABULARY) -> nn.Module:
    sizes = {"n_embd": width, "n_layer": 1, "n_head": 2, "n_positions": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=vocabulary, **sizes, **ends)
    )


class Trained(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def samples(labels) -> list[dict[str, Tensor]]:
    """Return sentences of different lengths, padded to one length."""
    found = []
    for index in range(8):
        mask = (torch.arange(LENGTH) < 3 + index % 5).long()
        ids = torch.randint(1, VOCABULARY, (LENGTH,)) * mask
        sample = {"input_ids": ids, "attention_mask": mask}
        found.append(sample | {"labels": labels(index, ids, mask)})
    return found


def logits_in(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return network.eval()(**batch).logits


def fitted(make_trainer, net: nn.Module, callback, data) -> tuple[float, dict[str, Tensor]]:
    """Return the distillation loss of the one step that was trained, and its batch."""
    loader = DataLoader(data, batch_size=8)
    trainer = make_trainer(max_steps=1, callbacks=[callback])
    for module in net.modules():  # Without dropout, a plain call gives the same output as the step.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trainer.fit(Trained(net), loader)
    return trainer.callback_metrics["train/distill"].item(), next(iter(loader))


def test_an_encoder_is_distilled_from_a_wider_one(make_trainer, reference_dist_loss):
    student, teacher = encoder(8), encoder(16)
    before = copy.deepcopy(student)
    data = samples(lambda index, ids, mask: torch.tensor(index % 4))
    callback = DistillationCallback(teacher, loss=DISTLoss(), weight=1.0)
    found, batch = fitted(make_trainer, student, callback, data)
    expected = reference_dist_loss(logits_in(before, batch), logits_in(teacher, batch))
    assert found == pytest.approx(expected.item(), rel=1e-3)


def next_tokens(batch: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
    return {"mask": F.pad(batch["labels"][:, 1:] != -100, (0, 1))}


@pytest.mark.parametrize("kind", [KDLoss, DISTLoss])
def test_a_causal_model_is_distilled_from_one_with_more_columns(
    make_trainer, reference_dist_loss, kind
):
    student, network = decoder(8), decoder(16, PADDED_VOCABULARY)
    before = copy.deepcopy(student)
    data = samples(lambda index, ids, mask: ids.masked_fill(mask == 0, -100))
    teacher = Teacher(network, class_map=range(VOCABULARY), class_dim=-1)
    term = Term(kind(tau=1.0, class_dim=-1), from_batch=next_tokens)
    callback = DistillationCallback(teacher, terms={"tokens": term})
    found, batch = fitted(make_trainer, student, callback, data)

    kept = batch["labels"][:, 1:] != -100
    assert 0 < kept.sum() < kept.numel()
    rows = logits_in(before, batch)[:, :-1][kept]
    targets = logits_in(network, batch)[:, :-1][kept][:, :VOCABULARY]
    if kind is KDLoss:
        expected = F.kl_div(rows.log_softmax(1), targets.softmax(1), reduction="batchmean")
    else:
        expected = reference_dist_loss(rows, targets)
    assert found == pytest.approx(expected.item(), rel=1e-3)


class Tokens(ImageDataModule):
    """Sentences of one length; a cached teacher needs the indices of samples, not images."""

    location = "sentences"
    random_transforms = False

    def train_dataset(self):
        ids = torch.randint(1, VOCABULARY, (8, LENGTH), generator=torch.manual_seed(0))
        return TensorDataset(ids, ids.masked_fill(torch.arange(LENGTH) >= 5, -100))

    val_dataset = test_dataset = train_dataset


class TrainedOnTokens(Trained):
    def training_step(self, batch, batch_idx):
        ids, labels = batch
        logits = self.net(ids).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def next_of_pairs(batch, logits: Tensor) -> dict[str, Tensor]:
    return {"mask": F.pad(batch[1][:, 1:] != -100, (0, 1))}


@pytest.mark.parametrize("kind", ["live", "ensemble", "cached", "cached ensemble"])
def test_teachers_of_every_kind_leave_out_columns_that_the_student_lacks(
    make_trainer, tmp_path, kind
):
    """The teachers' vocabularies have 24 and 27 columns, and the student's has 20."""
    networks = [decoder(16, PADDED_VOCABULARY), decoder(8, PADDED_VOCABULARY + 3)]
    networks = networks if "ensemble" in kind else networks[:1]
    teachers = [Teacher(x, class_map=range(VOCABULARY), class_dim=-1) for x in networks]
    teacher = EnsembleTeacher(teachers, class_dim=-1) if "ensemble" in kind else teachers[0]
    teacher = CachedTeacher(teacher, tmp_path, dtype="float32") if "cached" in kind else teacher
    student, data = TrainedOnTokens(decoder(8).eval()), Tokens(global_batch_size=8)
    ids, labels = data.train_dataset().tensors
    kept = labels[:, 1:] != -100
    rows = logits_in(student.net, {"input_ids": ids})[:, :-1][kept]
    own = [logits_in(x, {"input_ids": ids})[:, :-1][kept][:, :VOCABULARY] for x in networks]
    mean = sum(x.softmax(1) for x in own) / len(own)
    expected = F.kl_div(rows.log_softmax(1), mean, reduction="batchmean")

    term = Term(KDLoss(tau=1.0, class_dim=-1), from_batch=next_of_pairs)
    callback = DistillationCallback(teacher, terms={"tokens": term})
    trainer = make_trainer(max_steps=1, callbacks=[callback], limit_val_batches=0)
    trainer.fit(student, data)
    found = trainer.callback_metrics["train/distill"].item()
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_a_cached_teacher_refuses_batches_that_are_dicts(make_trainer, tmp_path):
    data = Tokens(global_batch_size=8)
    data.train_dataset = lambda: samples(lambda index, ids, mask: ids)
    callback = DistillationCallback(CachedTeacher(decoder(16), tmp_path), loss=KDLoss(class_dim=-1))
    with pytest.raises(TypeError, match=r"a dict of input_ids, .* one tensor .*distill.cache=off"):
        make_trainer(callbacks=[callback]).fit(Trained(decoder(8)), data)


def test_logits_of_tokens_without_class_dim_are_refused_in_the_first_step(make_trainer):
    data = samples(lambda index, ids, mask: ids)
    for loss in (KDLoss(), DISTLoss()):
        callback = DistillationCallback(decoder(16), loss=loss)
        with pytest.raises(MisconfigurationException, match="or class_dim=-1 for"):
            fitted(make_trainer, decoder(8), callback, data)
    callback = DistillationCallback(
        Teacher(decoder(16), class_map=range(VOCABULARY)), loss=KDLoss(class_dim=-1)
    )
    with pytest.raises(ValueError, match="or class_dim=-1 for"):
        fitted(make_trainer, decoder(8), callback, data)
