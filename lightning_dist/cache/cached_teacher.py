"""CachedTeacher: a teacher that is asked once about each view of each sample, for many runs."""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_dist.cache.digest import digest
from lightning_dist.cache.files import ViewFiles
from lightning_dist.cache.filling import PRINTS, Answers, Tap, fill, name_of
from lightning_dist.data.views import VIEW_SEED, KeyedBatch, Views
from lightning_dist.taps import find_submodule as find
from lightning_dist.teacher import Teacher

if TYPE_CHECKING:  # imported where it is needed: it brings scikit-learn and torchvision along
    from lightning_dist.data.base import ImageDataModule

AUTO = "data/teacher_cache"
FORMAT = 1
SAMPLES = 16  # of which the pixels are part of the cache's key
POLL_SECONDS = 30.0
_NO_FOLDERS = ("", "false", "no", "none", "null", "on", "true", "yes")
_DRAWN_BY = ("lightning-dist", "numpy", "pillow", "timm", "torch", "torchvision")


class CachedTeacher(Teacher):
    """A teacher whose answers to a training set are computed once and kept in files.

    Where a teacher goes, in a DistillModule or a DistillationCallback, this one goes too. The
    training set is then shown in ``views`` fixed augmentations in turn, epoch by epoch, and the
    student sees exactly the image that the teacher saw. They are the same whatever the run's seed,
    which still shuffles, so that all runs of a sweep share one cache. A view is computed when the
    first run needs it, by all of its processes together, and read from then on; runs that need the
    same view at the same time wait for the one that computes it.

    A folder below ``path`` is chosen by a digest of the teacher (weights, code, bridge, class map,
    dtype), of what the distillation terms take from it, and of the data module's training set
    (settings, code, size and the pixels of some samples). Each row also knows a fingerprint of its
    image, which training compares with the student's: other images end the run.

    Needs a :class:`lightning_dist.data.base.ImageDataModule` whose images are of one size, and a
    module that hands them to the student as they are: no Mixup, no augmentation on the device. It
    is computed in the teacher's own dtype, without autocast.

    Args:
        teacher: the network, or any Teacher.
        path: folder of all caches; ``"auto"`` is ``data/teacher_cache``.
        views: number of augmentations; where the training set draws nothing at random it is 1.
        dtype: what is stored, ``"float16"`` or ``"float32"``.

    Raises:
        ValueError: if ``views`` or ``dtype`` are out of range.

    Example:
        >>> teacher = CachedTeacher(nn.Linear(4, 3), path="caches", views=4)
        >>> teacher(torch.ones(5, 4)).shape  # asked directly, it is the teacher itself
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
        super().__init__(self.teacher.network)
        # Nothing here uses them: they say what the teacher is.
        self.dtype, self.inputs = self.teacher.dtype, self.teacher.inputs
        self.class_map = self.teacher.class_map
        self.root = Path(AUTO if str(path) == "auto" else path).expanduser()
        self.views = views
        self.stored = np.dtype(dtype)
        self._taps: list[Tap] = []
        self._data: ImageDataModule | None = None
        self._files: ViewFiles | None = None
        self._open: dict[int, np.ndarray] = {}

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Ask the teacher itself, as in :class:`Teacher`."""
        return self.teacher(*args, **kwargs)

    def as_network(self) -> nn.Module:
        """The teacher itself as any network."""
        return self.teacher.as_network()

    def to(self, device: torch.device | str) -> "CachedTeacher":
        """Stay where it is: the network moves when a view is computed, and back."""
        return self

    def release(self) -> None:
        """Give the network back as it was given."""
        self.teacher.release()

    def shard(self, mesh: DeviceMesh) -> None:
        """Refuse: a network that is hardly ever asked is whole, and on the CPU.

        Raises:
            MisconfigurationException: always.
        """
        raise MisconfigurationException(
            "shard_teacher has no use for a CachedTeacher, which leaves the device when a view is "
            "computed: leave out shard_teacher, or the cache (distill.cache=off)"
        )

    # What DistillationCallback calls, in this order

    def attach(self, trainer: Trainer, taps: list[Tap], inputs: Mapping[str, str]) -> None:
        """Have the Trainer's data module show its views.

        Args:
            trainer: before it has made its loaders.
            taps: what the distillation terms take from the teacher.
            inputs: the callback's.

        Raises:
            MisconfigurationException: if the teacher is asked about other than whole images, or
                there is no ImageDataModule.
        """
        if dict(inputs) != {"": ""}:
            raise MisconfigurationException(
                f"the teacher is asked about what the student hands over within ({dict(inputs)}), "
                "as in detection, and a CachedTeacher knows whole images only: give the teacher "
                "itself (distill.cache=off)"
            )
        from lightning_dist.data.base import ImageDataModule

        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ImageDataModule):
            raise MisconfigurationException(
                f"a CachedTeacher needs to know which samples a batch holds, and the Trainer has "
                f"{f'a {type(data).__name__}' if data is not None else 'no data module'}: give "
                "fit(datamodule=...) a subclass of lightning_dist.data.base.ImageDataModule, which "
                "needs train_dataset, val_dataset and test_dataset, or give the teacher itself "
                "(distill.cache=off)"
            )
        for part, _ in taps:
            find(self.network, part, "the teacher", "the teacher path of a term")
        self._taps, self._data = sorted(set(taps), key=str), data
        data.views = self.views

    def locate(self, trainer: Trainer) -> None:
        """Find the folder of this teacher and this data; all processes take the first one's."""
        assert self._data is not None
        views = self._data.train_views()
        about = self._about(self._data, views) if trainer.is_global_zero else {}
        about = trainer.strategy.broadcast(about)
        self._files = ViewFiles(self.root / digest(about), len(views))
        described = self._files.folder / "about.json"  # for people: nothing reads it
        if trainer.is_global_zero and not described.exists():
            described.parent.mkdir(parents=True, exist_ok=True)
            described.write_text(json.dumps(about, indent=2) + "\n")

    def provide(self, trainer: Trainer, batch: Any) -> None:
        """Have the view of a batch at hand: compute it, or wait for it, where it is not there.

        Raises:
            MisconfigurationException: if the batch does not know its samples.
        """
        if not isinstance(batch, KeyedBatch):
            raise MisconfigurationException(
                f"the training batch is a {type(batch).__name__} that does not know its samples: "
                f"a hook of {type(trainer.lightning_module).__name__} that transfers batches has "
                "replaced it. A CachedTeacher needs the images as the data module made them: "
                "augment there, or give the teacher itself (distill.cache=off)"
            )
        if batch.view in self._open:
            return
        assert self._files is not None
        files, strategy = self._files, trainer.strategy
        try:
            state = "theirs"
            while state == "theirs":  # in short turns, or the other processes' patience would end
                claimed = files.claim(batch.view, POLL_SECONDS) if trainer.is_global_zero else ""
                state = strategy.broadcast(claimed)
            if state == "ours":
                assert self._data is not None
                answers = Answers(self.teacher, self._taps, self.stored)
                fill(batch.view, files, self._data, answers, trainer)
        finally:
            if trainer.is_global_zero:
                files.release(batch.view)
        try:
            self._open[batch.view] = files.open(batch.view, [PRINTS, *map(name_of, self._taps)])
        except FileNotFoundError as error:
            raise MisconfigurationException(
                f"{error.filename} is on the first process's machine and not on this one: choose a "
                "folder that all machines share (distill.cache=PATH)"
            ) from error

    def recall(self, batch: KeyedBatch) -> dict[str, list[Any]]:
        """The answers to a batch, in float32 on its device.

        Returns:
            For each part the output of its one call, as far as the terms take something from it.

        Raises:
            ValueError: if the teacher saw other images.
        """
        rows = self._open[batch.view][batch.indices]
        same = np.isclose(rows[PRINTS], batch.prints, rtol=1e-6, atol=1e-4)
        if not same.all():
            assert self._files is not None
            raise ValueError(
                f"sample {batch.indices[~same][0]} in view {batch.view} is another image than the "
                f"teacher saw when {self._files.path(batch.view)} was filled: the data, or the "
                f"code that draws the views, has changed. Delete {self._files.folder}, to fill it "
                "anew"
            )
        outputs: dict[str, dict[str | int, Tensor]] = {}
        for part, entry in self._taps:
            column = np.ascontiguousarray(rows[name_of((part, entry))])
            answer = torch.from_numpy(column).to(batch.inputs.device).float()
            outputs.setdefault(part, {})["logits" if entry is None else entry] = answer
        return {part: [output] for part, output in outputs.items()}

    def detach(self) -> None:
        """Let the data module draw as ever."""
        if self._data is not None:
            self._data.views = None
        self._data, self._files, self._open = None, None, {}

    def _about(self, data: "ImageDataModule", views: Views) -> dict[str, Any]:
        """What decides the answers: the folder's name is a digest of it."""
        some = np.linspace(0, len(views) - 1, min(SAMPLES, len(views))).astype(int).tolist()
        pixels = [batch.inputs for batch in data.view_dataloader(0, some)]
        return {
            "format": FORMAT,
            "teacher": digest(self.teacher),
            "parts": [name_of(tap) for tap in self._taps],
            "data": digest([type(data), data.sample_settings()]),
            "samples": len(views),
            "pixels_of_some": digest(pixels),
            "view_seed": VIEW_SEED,
            "dtype": str(self.stored),
            "versions": {name: importlib.metadata.version(name) for name in _DRAWN_BY},
        }

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_data": None, "_files": None, "_open": {}}

    def __repr__(self) -> str:
        return f"CachedTeacher({self.teacher!r}, {str(self.root)!r})"


def cached(
    teacher: nn.Module | Teacher,
    cache: str | Path | bool = "auto",
    views: int = 8,
    dtype: Literal["float16", "float32"] = "float16",
) -> nn.Module | Teacher:
    """The teacher as ``distill.cache`` asks for it: itself, or cached.

    Args:
        teacher: the network, or any Teacher.
        cache: ``"off"``, ``"auto"`` or a folder; False and True, as which YAML reads ``off`` and
            ``on``, are ``"off"`` and ``"auto"``.
        views: see :class:`CachedTeacher`.
        dtype: likewise.

    Raises:
        ValueError: if ``cache`` is a word for yes or no that would become a folder's name.
    """
    if not isinstance(cache, bool) and str(cache).lower() in _NO_FOLDERS:
        raise ValueError(f"distill.cache is {cache!r}: use auto, off or a folder")
    if cache in ("off", False):
        return teacher
    return CachedTeacher(teacher, "auto" if cache is True else str(cache), views=views, dtype=dtype)
