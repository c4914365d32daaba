"""`CachedTeacher`: a teacher whose outputs are computed once for each image and stored in files."""

import functools
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_dist.cache.digest import digest
from lightning_dist.cache.files import Claim, ViewFiles
from lightning_dist.cache.filling import end_if_signalled, fill
from lightning_dist.cache.reading import AnswerReader
from lightning_dist.cache.refusals import (
    image_data_module,
    refuse_functions,
    refuse_other_images,
    refuse_other_inputs,
)
from lightning_dist.cache.rows import TeacherRows, name_of, row_in_file
from lightning_dist.cache.samples import check_answers
from lightning_dist.data.views import VIEW_SEED, KeyedBatch
from lightning_dist.files.card import Card
from lightning_dist.files.writing import naming
from lightning_dist.taps import check_part, tap
from lightning_dist.teacher import Teacher
from lightning_dist.teacher.base import Inputs, Tap, TeacherBase
from lightning_dist.teacher.calls import refuse_shared_parts

if TYPE_CHECKING:  # Imported where it is used, because it imports scikit-learn and torchvision.
    from lightning_dist.data.base import ImageDataModule

T = TypeVar("T")
AUTO = "data/teacher_cache"
FORMAT = 2  # The version of the files' format, which is part of the folder's digest.
# The number of samples whose pixels are part of the folder's digest. Each run also compares the
# teacher's outputs for these samples with the stored ones.
SAMPLES = 16
POLL_SECONDS = 1.0  # A waiting run looks at signals after this time.
_NO_FOLDERS = ("", "false", "no", "none", "null", "on", "true", "yes")
# The packages that load and augment images. Their versions are part of the folder's digest.
_DRAWN_BY = ("lightning-dist", "numpy", "pillow", "timm", "torch", "torchvision")


class CachedTeacher(TeacherBase):
    """A teacher whose outputs for a training set are computed once and stored in files.

    Use it instead of a teacher in a DistillModule or a DistillationCallback. The training set then
    has ``views`` fixed augmentations, called views, and each epoch loads the next one. The student
    gets exactly the images that the teacher got. The views do not depend on the run's seed (which
    still shuffles the samples), so that all runs of a sweep share one cache. The first run that
    needs a view computes it with all of its processes, and later epochs and runs read it. If that
    run is stopped, the next one that needs the view computes only the rest. If two runs need a
    missing view at the same time, one of them computes it and the other one waits.

    Each cache has a folder in ``path``. The name of the folder is a digest of the teacher (weights,
    settings, input bridge, class map, dtype), of the parts that the distillation terms compare, and
    of the data module's training set (settings, size and the pixels of 16 samples). The folder also
    contains the teacher's outputs for those samples. Before a run trains, it calls the teacher with
    the samples and raises an error if the outputs differ from the stored ones by more than
    rounding: something that is not in the digest has changed, such as the network's code, a hook or
    a file. A change that affects only other images is not noticed. The files also contain a
    fingerprint of each image. Training compares it with the fingerprint of the student's image and
    raises an error if they differ.

    The Trainer needs an :class:`lightning_dist.data.base.ImageDataModule` whose images all have the
    same size. The module must call the student with these images unchanged: no Mixup, no
    augmentation on the device. The outputs are computed in the teacher's own dtype, without
    autocast.

    Args:
        teacher: the network, or any Teacher.
        path: the folder that contains all caches; ``"auto"`` is ``data/teacher_cache``.
        views: the number of fixed augmentations. It has no effect on a training set without random
            augmentation, which always has one view.
        dtype: the dtype of the stored outputs, ``"float16"`` or ``"float32"``.

    Raises:
        ValueError: if ``views`` is below 1, or ``dtype`` is not one of the two.

    Example:
        >>> teacher = CachedTeacher(nn.Linear(4, 3), path="caches", views=4)
        >>> teacher(torch.ones(5, 4)).shape  # a direct call goes to the teacher itself
        torch.Size([5, 3])
    """

    def __init__(
        self,
        teacher: nn.Module | Teacher,
        path: str | Path = "auto",
        *,
        views: int = 8,
        dtype: Literal["float16", "float32"] = "float16",
    ) -> None:
        if views < 1:
            raise ValueError(f"views is {views}: give at least one")
        if dtype not in ("float16", "float32"):
            raise ValueError(f"dtype is {dtype!r}: use 'float16' or 'float32'")
        self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        self.root = Path(AUTO if str(path) == "auto" else path).expanduser()
        self.views = views
        self.stored = np.dtype(dtype)
        self._taps: list[Tap] = []
        self._trainer: Trainer | None = None
        self._data: ImageDataModule | None = None
        self._files: ViewFiles | None = None
        self._reader: AnswerReader | None = None
        self._view: int | None = None  # The view that is complete and open.

    @property
    def network(self) -> nn.Module:  # type: ignore[override]
        """The network of the wrapped teacher."""
        return self.teacher.network

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped teacher, as in :class:`lightning_dist.Teacher`."""
        return self.teacher(*args, **kwargs)

    @property
    def class_map(self) -> list[int] | None:  # type: ignore[override]
        """The class map of the wrapped teacher."""
        return self.teacher.class_map

    def class_map_of(self, part: str) -> list[int] | None:
        """Return the class map of a part of the wrapped teacher."""
        return self.teacher.class_map_of(part)

    def to_student_classes(self, logits: Tensor, part: str = "") -> Tensor:
        """Map the teacher's logits to the student's classes, as the wrapped teacher does."""
        return self.teacher.to_student_classes(logits, part)

    @property
    def card(self) -> Card | None:  # type: ignore[override]
        """The card of the wrapped teacher."""
        return self.teacher.card

    def adapt(self, data: Card | None) -> None:
        """Convert the images and classes of the data, as the wrapped teacher does."""
        self.teacher.adapt(data)

    def describe(self) -> str:
        """Return the line of the wrapped teacher."""
        return f"{self.teacher.describe()}, stored in {self.root}"

    def fingerprint(self) -> str:
        """Return the fingerprint of the wrapped teacher, which does not depend on the cache."""
        return self.teacher.fingerprint()

    def as_network(self) -> nn.Module:
        """Return the wrapped teacher as an ordinary network."""
        return self.teacher.as_network()

    def release(self) -> None:
        """Restore the network's ``requires_grad`` flags and modes from before it was frozen."""
        self.teacher.release()

    # The methods that DistillationCallback calls, in this order

    def attach(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        taps: Sequence[Tap],
        inputs: Inputs,
    ) -> None:
        """Make the Trainer's data module load fixed views, and choose the folder of the cache.

        All processes call this method. The first process chooses the folder, and compares the
        teacher's outputs for some samples with the stored ones.

        Args:
            trainer: the Trainer, before it has created its data loaders.
            pl_module: the module that is trained.
            taps: the part of the teacher and the entry of its output that each term compares.
            inputs: the callback's dict from parts of the student to the parts of the teacher that
                get the same inputs. A cache supports only ``{"": ""}``: student and teacher get the
                whole images.

        Raises:
            MisconfigurationException: if the module, its data module or its terms need more than
                the outputs for whole images; or if the teacher shares tensors with the module,
                draws random numbers, or if its outputs differ from those in the folder.
        """
        try:
            refuse_shared_parts(self.network, pl_module)
        except MisconfigurationException:
            self.release()  # Teacher() froze the shared tensors, but the student trains them.
            raise
        refuse_other_inputs(pl_module, inputs)
        self.teacher.expect(taps)
        refuse_functions(taps)
        for part, _ in taps:
            check_part(self.network, part, "the teacher", "the teacher path of a term")
        self._taps = sorted(set(taps), key=str)
        self._trainer, self._data = trainer, image_data_module(trainer)
        # Store the default dtype of the data loaders now: during a training step the Trainer's
        # precision may set another default dtype.
        self._dtype = torch.get_default_dtype()
        try:
            self._data.views = self.views
            choose = functools.partial(self._choose_folder, trainer)
            name, row = _on_first_process(trainer, choose)
            self._files = ViewFiles(self.root / name, len(self._data.train_views()))
            # The loaders are made later, and their processes read the outputs with the images.
            self._reader = self._data.add_answers = AnswerReader(self._files, row)
        except BaseException:
            self.detach()
            raise

    @contextmanager
    def answers(
        self, student: nn.Module, batch: Any, parts: Sequence[str], inputs: Inputs
    ) -> Iterator[dict[str, list[Any]]]:
        """Read the teacher's outputs for a batch, and refuse other inputs of the student.

        All processes call this method, because they compute a missing view together.

        Args:
            student: the student, which is called within the context.
            batch: the training batch.
            parts: the dotted paths of the teacher's parts; ``""`` is the teacher itself.
            inputs: the same dict as in :meth:`attach`.

        Returns:
            A context manager. Its value is a dict from each part to a list of one output, which
            contains the entries that the terms compare, in float32 on the batch's device.

        Raises:
            MisconfigurationException: if the batch, or the tensor with which the student is called,
                is not the one that the data module has loaded.
            ValueError: if the stored outputs belong to other images than those of the batch.
        """
        if not isinstance(batch, KeyedBatch):
            raise MisconfigurationException(
                f"the training batch is a {type(batch).__name__} without the indices of its "
                f"samples: a hook of {type(self._attached_to().lightning_module).__name__} that "
                "transfers batches has replaced it. A CachedTeacher needs the images that the data "
                "module loaded: augment them in the data module, or use the teacher without a "
                "cache (distill.cache=off)"
            )
        self._provide(batch)
        outputs = self._recall(batch, parts)
        check = functools.partial(refuse_other_images, batch, batch.inputs._version, student)
        remove = tap(student, "", before=check)
        try:
            yield outputs
        finally:
            remove()

    def detach(self) -> None:
        """Make the data module draw new augmentations again, and close the files."""
        if self._data is not None:
            self._data.views = self._data.add_answers = None
        if self._reader is not None:
            self._reader.close()  # The loaders may keep it.
        self.teacher.expect(())
        self._trainer, self._data, self._files = None, None, None
        self._reader, self._view = None, None

    # Helpers of attach and answers

    def _choose_folder(self, trainer: Trainer) -> tuple[str, np.dtype]:
        """Return the name of the folder for this teacher and data, after checking the teacher.

        The second value is the dtype of a row of the folder's files.
        """
        assert self._data is not None
        views, size = self._data.train_views(), self._data.batch_size
        some = np.linspace(0, len(views) - 1, min(SAMPLES, len(views))).astype(int).tolist()
        batches = [some[start : start + size] for start in range(0, len(some), size)]
        samples = list(self._data.view_dataloader(0, batches))
        about = {
            "format": FORMAT,
            "teacher": digest(self.teacher),
            "parts": [name_of(tap) for tap in self._taps],
            "data": digest([type(self._data), self._data.sample_settings()]),
            "samples": len(views),
            "pixels_of_some": digest([batch.inputs for batch in samples]),
            "view_seed": VIEW_SEED,
            "dtype": str(self.stored),
            "versions": {name: importlib.metadata.version(name) for name in _DRAWN_BY},
        }
        folder = self.root / digest(about)
        if folder.is_symlink():
            raise MisconfigurationException(
                f"{folder} is a link, perhaps out of the cache: remove it"
            )
        rows = TeacherRows(self.teacher, self._taps, np.dtype(np.float32))
        row = check_answers(folder, rows, samples, trainer.strategy.root_device)
        described = folder / "about.json"  # Only for people: no code reads this file.
        if not os.path.lexists(described):  # A link there could lead to a file elsewhere.
            with naming(described):
                described.write_text(json.dumps(about, indent=2) + "\n")
        return folder.name, row_in_file(row, self.stored)

    def _provide(self, batch: KeyedBatch) -> None:
        """Open the file of a batch's view; compute it, or wait for it, if it does not exist."""
        if batch.view == self._view:
            return
        assert self._data is not None
        assert self._files is not None
        assert self._reader is not None
        trainer, files = self._attached_to(), self._files
        try:
            # Wait in short rounds: a broadcast that blocks for minutes hits the process group's
            # timeout, and a signal must not wait.
            while (claim := self._claim(batch.view)) is Claim.WAIT:
                end_if_signalled(trainer)
            if claim is Claim.WRITE:
                rows = TeacherRows(self.teacher, self._taps, self.stored)
                with _outside_of_precision(trainer.strategy.root_device, self._dtype):
                    fill(batch.view, files, self._data, rows, self._reader.row, trainer)
        finally:
            if trainer.is_global_zero:
                files.release(batch.view)
        try:
            self._reader.open(batch.view)
        except FileNotFoundError as error:
            raise MisconfigurationException(
                f"{error.filename} exists on the machine of the first process, but not on this "
                "machine: choose a folder that all machines share (distill.cache=PATH)"
            ) from error
        self._view = batch.view

    def _claim(self, view: int) -> Claim:
        """Let the first process claim a view, and return the result in all processes."""
        assert self._files is not None
        claim, trainer = Claim.WAIT, self._attached_to()
        if trainer.is_global_zero:
            claim = self._files.claim(view, POLL_SECONDS)
        return trainer.strategy.broadcast(claim)

    def _recall(self, batch: KeyedBatch, parts: Sequence[str]) -> dict[str, list[Any]]:
        """Return the outputs that the batch was loaded with, or read them if it has none."""
        assert self._reader is not None
        answers = batch.answers
        if answers is None:  # Its view was not complete yet when the batch was loaded.
            answers = self._reader.read(batch)
        outputs: dict[str, dict[str | int, Tensor]] = {part: {} for part in parts}
        for part, entry in self._taps:
            if part in outputs:
                stored = self._reader.numbers(name_of((part, entry)), answers)
                assert not callable(entry), "refused in attach"
                key = "logits" if entry is None else entry
                outputs[part][key] = stored.to(batch.inputs.device).float()
        return {part: [output] for part, output in outputs.items()}

    def _attached_to(self) -> Trainer:
        assert self._trainer is not None, "call attach first"
        return self._trainer

    # Copies of a module share the teacher, and a pickle contains no open file.

    def __deepcopy__(self, memo: dict[int, Any]) -> "CachedTeacher":
        return self

    def __getstate__(self) -> dict[str, Any]:
        idle = dict.fromkeys(("_trainer", "_data", "_files", "_reader", "_view"))
        return vars(self) | idle

    def __repr__(self) -> str:
        return f"CachedTeacher({self.teacher!r}, {str(self.root)!r})"


def _on_first_process(trainer: Trainer, compute: Callable[[], T]) -> T:
    """Call `compute` in the first process; all processes return its value or raise its error."""
    value: Any = None
    error = None
    if trainer.is_global_zero:
        try:
            value = compute()
        except Exception as caught:
            value, error = str(caught), caught
    failed, value = trainer.strategy.broadcast((error is not None, value))
    if error is not None:
        raise error
    if failed:
        raise MisconfigurationException(value)
    return value


@contextmanager
def _outside_of_precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Turn off the autocast and default dtype that the Trainer sets for a training step."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(before)


def cached(
    teacher: nn.Module | Teacher,
    cache: str | Path | bool = "auto",
    views: int = 8,
    dtype: Literal["float16", "float32"] = "float16",
) -> nn.Module | Teacher | CachedTeacher:
    """Return the teacher, or a CachedTeacher of it, as the setting ``distill.cache`` requires.

    Args:
        teacher: the network, or any Teacher.
        cache: ``"off"``, ``"auto"`` or a folder. False means ``"off"`` and True means ``"auto"``,
            because YAML reads ``off`` and ``on`` as False and True.
        views: the number of fixed augmentations, as in :class:`CachedTeacher`.
        dtype: the dtype of the stored outputs, as in :class:`CachedTeacher`.

    Returns:
        The teacher itself, or a CachedTeacher.

    Raises:
        ValueError: if ``cache`` is a word such as ``"yes"`` or ``"none"``, which is probably not
            meant as the name of a folder.
    """
    if not isinstance(cache, bool) and str(cache).lower() in _NO_FOLDERS:
        raise ValueError(f"distill.cache is {cache!r}: use auto, off or a folder")
    if cache in ("off", False):
        return teacher
    return CachedTeacher(teacher, "auto" if cache is True else str(cache), views=views, dtype=dtype)
