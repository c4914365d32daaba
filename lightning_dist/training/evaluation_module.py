"""EvaluationModule: the part of DistillModule that validates, tests and predicts."""

from collections.abc import Callable, Mapping
from typing import Any, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_dist.training.batches import INPUT_KEYS, find_key, split_batch
from lightning_dist.training.evaluation import (
    EvaluationMetrics,
    Metrics,
    count_samples,
    without_repeats,
)


class EvaluationModule(LightningModule):
    """A LightningModule that evaluates a student, and other networks in addition.

    It logs ``val/loss``, ``val/METRIC``, ``test/loss`` and ``test/METRIC`` for the student, and the
    same with ``val/NAME`` and ``test/NAME`` before the names for each network of
    :meth:`evaluate_too`.

    Args:
        student: the network to evaluate.
        eval_loss: the loss of an output and the target.
        metrics: the metrics to update with an output and the target.
        batch_keys: the keys of the inputs and of the target, for batches that are mappings; see
            :class:`lightning_dist.DistillModule`.
        of_teacher: the metrics to update with the outputs of a network and of the teacher; they
            need no labels.
    """

    def __init__(
        self,
        student: nn.Module,
        eval_loss: nn.Module | Callable[[Any, Any], Tensor],
        metrics: Metrics = None,
        batch_keys: tuple[str, str] | None = None,
        of_teacher: MetricCollection | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"the student is a {type(student).__name__}: give a torch.nn.Module")
        self.student = student
        self.eval_loss = eval_loss
        self.batch_keys = batch_keys
        self.evaluated: dict[str, nn.Module] = {}  # Further networks, by the name of their metrics.
        splits = ("val/", "test/")
        self.metrics = nn.ModuleDict(
            {split: EvaluationMetrics(metrics, split, of_teacher) for split in splits}
        )

    def evaluate_too(self, name: str, network: nn.Module) -> None:
        """Evaluate another network in addition to the student in validation and test.

        Args:
            name: the first part of the names of its metrics: ``"ema_"`` gives ``val/ema_METRIC``.
            network: a network with the student's inputs and the student's kind of output.
        """
        self.evaluated[name] = network
        for prefix in (f"val/{name}", f"test/{name}"):
            of_teacher = cast(EvaluationMetrics, self.metrics["val/"]).of_teacher
            self.metrics[prefix] = EvaluationMetrics(self.val_metrics, prefix, of_teacher)
        self.metrics.to(self.device)

    def evaluate_only(self, network: nn.Module) -> None:
        """Evaluate a network instead of the student, and no other network.

        Args:
            network: a network with the student's inputs and the student's kind of output.
        """
        self.student, self.evaluated = network, {}

    def convert_evaluated(self, convert: Callable[[nn.Module], nn.Module]) -> None:
        """Replace every network that validation and test evaluate.

        Args:
            convert: a function that returns the new network for a network.
        """
        self.student = convert(self.student)
        self.evaluated = {name: convert(other) for name, other in self.evaluated.items()}

    @property
    def compares_teacher(self) -> bool:
        """Whether validation and test compare the student with the teacher."""
        return cast(EvaluationMetrics, self.metrics["val/"]).of_teacher is not None

    @property
    def val_metrics(self) -> MetricCollection:
        """The student's validation metrics."""
        return cast(EvaluationMetrics, self.metrics["val/"]).collection

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the student's output."""
        return self.student(*args, **kwargs)

    def split_batch(self, batch: Any) -> tuple[Any, Any]:
        """Return the inputs and the target of a batch; override it for batches of another form.

        Args:
            batch: a pair, or a mapping with the keys of ``batch_keys``.

        Raises:
            TypeError: if the batch is neither; the message describes it.
        """
        return split_batch(batch, self.batch_keys, f"{type(self).__name__}.split_batch")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update and log the metrics ``val/*``."""
        self._evaluate(batch, batch_idx, self.trainer.val_dataloaders, "val/")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update and log the metrics ``test/*``."""
        self._evaluate(batch, batch_idx, self.trainer.test_dataloaders, "test/")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the student's output for a batch of inputs, or of ``(inputs, target)``."""
        if isinstance(batch, Mapping):
            key = self.batch_keys[0] if self.batch_keys else find_key(batch, INPUT_KEYS)
            batch = batch.get(key, batch)
        return self.infer(self.student, batch[0] if isinstance(batch, (tuple, list)) else batch)

    def infer(self, network: nn.Module, inputs: Any) -> Any:
        """Return the output of a network in the form that validation, test and prediction use.

        Args:
            network: the student, or an average of it.
            inputs: the inputs of a batch.
        """
        return network(inputs)

    def _evaluate(self, batch: Any, batch_idx: int, loaders: Any, split: str) -> None:
        batch = self._without_repeats(self.split_batch(batch), batch_idx, loaders)
        for name, network in {"": self.student, **self.evaluated}.items():
            metrics = cast(EvaluationMetrics, self.metrics[f"{split}{name}"])
            self.update_metrics(batch, network, metrics)
            self._log_metrics_of_batch(metrics)

    def _without_repeats(self, batch: Any, batch_idx: int, loaders: Any) -> Any:
        return without_repeats(batch, batch_idx, loaders)

    def update_metrics(self, batch: Any, network: nn.Module, metrics: EvaluationMetrics) -> int:
        """Update the metrics of one network with a batch.

        Args:
            batch: the inputs and the target.
            network: the student, its average or the teacher.
            metrics: the metrics to update.

        Returns:
            The number of labels in the batch, which is the weight of its mean loss.
        """
        inputs, target = batch
        samples = count_samples(inputs, target)
        count = self.count_labels(target, samples) if samples else 0
        compared = metrics.of_teacher if samples else None
        if not count and compared is None:
            return 0
        output = self.infer(network, inputs)
        if compared is not None:
            teacher = self.teacher_network().to(self.device)
            compared.update(output, self.infer(teacher, inputs))
        if count:
            output, target = self.labeled(output, target)
            metrics.collection.update(output, target)
            metrics.mean_loss.update(self.eval_loss(output, target), weight=count)
        return count

    def teacher_network(self) -> nn.Module:
        """Return the teacher as a network with the same inputs and kind of output as the student.

        Raises:
            MisconfigurationException: if there is no teacher, or it has no such output.
        """
        raise MisconfigurationException("the module has no teacher: give it one")

    def labeled(self, output: Any, target: Any) -> tuple[Any, Any]:
        """Return an output and a target without the samples that have no label.

        Override it if a target can mark samples without a label.

        Args:
            output: the output of a network for a batch.
            target: the target of the batch.
        """
        return output, target

    def count_labels(self, target: Any, samples: int) -> int:
        """Return the number of labels over which ``eval_loss`` takes its mean.

        Override it if that is not the number of samples: the loss of a split is then the mean over
        all its labels, however they are divided into batches.

        Args:
            target: the target of a batch.
            samples: the number of samples in the batch.
        """
        return samples

    def _log_metrics_of_batch(self, metrics: EvaluationMetrics) -> None:
        metrics.log(self)
