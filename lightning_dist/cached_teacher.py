"""CachedTeacher: a teacher that is asked once about each view of each sample, for many runs."""

import importlib.metadata
import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_dist.data.views import VIEW_SEED, KeyedBatch, Views
from lightning_dist.digest import digest
from lightning_dist.taps import find, record, select
from lightning_dist.teacher import Teacher
from lightning_dist.view_files import ViewFiles

if TYPE_CHECKING:  # imported where it is needed: it brings scikit-learn and torchvision along
    from lightning_dist.data.base import ImageDataModule

AUTO = "data/teacher_cache"
FORMAT = 1
PRINTS = "(images)"  # the entry of a row that tells its image from others
SAMPLES = 16  # of which the pixels are part of the cache's key
POLL_SECONDS = 30.0
_DRAWN_BY = ("lightning-dist", "numpy", "pillow", "timm", "torch", "torchvision")

Tap = tuple[str, str | int | None]  # a part of the teacher, and the entry of its output


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
                self._fill(trainer, batch.view)
        finally:
            if trainer.is_global_zero:
                files.release(batch.view)
        try:
            self._open[batch.view] = files.open(batch.view, [PRINTS, *map(_name, self._taps)])
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
            column = np.ascontiguousarray(rows[_name((part, entry))])
            answer = torch.from_numpy(column).to(batch.inputs.device).float()
            outputs.setdefault(part, {})["logits" if entry is None else entry] = answer
        return {part: [output] for part, output in outputs.items()}

    def detach(self) -> None:
        """Let the data module draw as ever."""
        if self._data is not None:
            self._data.views = None
        self._data, self._files, self._open = None, None, {}

    # Filling

    def _about(self, data: "ImageDataModule", views: Views) -> dict[str, Any]:
        """What decides the answers: the folder's name is a digest of it."""
        some = np.linspace(0, len(views) - 1, min(SAMPLES, len(views))).astype(int).tolist()
        pixels = [batch.inputs for batch in data.view_dataloader(0, some)]
        return {
            "format": FORMAT,
            "teacher": digest(self.teacher),
            "parts": [_name(tap) for tap in self._taps],
            "data": digest([type(data), data.sample_settings()]),
            "samples": len(views),
            "pixels_of_some": digest(pixels),
            "view_seed": VIEW_SEED,
            "dtype": str(self.stored),
            "versions": {name: importlib.metadata.version(name) for name in _DRAWN_BY},
        }

    def _fill(self, trainer: Trainer, view: int) -> None:
        """Compute a view, each process its share."""
        assert self._data is not None
        assert self._files is not None
        data, files, strategy = self._data, self._files, trainer.strategy
        share = np.array_split(np.arange(files.rows), trainer.world_size)[trainer.global_rank]
        begun, seconds = None, time.monotonic()
        self.network.to(strategy.root_device)
        self.freeze()
        try:
            for batch in data.view_dataloader(view, share.tolist()):
                rows = self._rows(batch, strategy.root_device)
                if begun is None:
                    begun = self._begin(trainer, view, rows.dtype)
                if rows.dtype != begun:
                    raise MisconfigurationException(
                        f"the teacher's answers differ in shape: {begun} and {rows.dtype}. A "
                        "CachedTeacher needs images of one size (distill.cache=off asks the "
                        "teacher itself)"
                    )
                files.write(view, int(batch.indices[0]), rows)
        finally:
            self.network.to("cpu")
        if begun is None:  # more processes than samples
            self._begin(trainer, view, np.dtype("V"))
        files.flush(view)
        strategy.barrier()
        if trainer.is_global_zero:
            files.commit(view)
        strategy.barrier()
        rank_zero_info(f"teacher cache: view {view} took {time.monotonic() - seconds:.1f} s")

    def _begin(self, trainer: Trainer, view: int, row: np.dtype) -> np.dtype:
        """Say how much is to come, and make the file; the first process's kind of row."""
        assert self._data is not None
        assert self._files is not None
        files = self._files
        if trainer.is_global_zero:
            views = self._data.train_views().count
            rank_zero_info(
                f"teacher cache: filling view {view} in {files.folder}; {views} views of "
                f"{files.rows:,} samples take {views * files.rows * row.itemsize / 1e6:,.1f} MB, "
                f"of which {files.missing_bytes(views, row) / 1e6:,.1f} MB are still to be written"
            )
            files.create(view, row)
        return trainer.strategy.broadcast(row)

    def _rows(self, batch: KeyedBatch, device: torch.device) -> np.ndarray:
        """The rows of a batch, one a sample."""
        columns = {PRINTS: batch.prints}
        for tap, answer in self._answers(batch.inputs.to(device)).items():
            if answer.shape[:1] != (len(batch.prints),):
                raise MisconfigurationException(
                    f"the teacher's {_name(tap)} gives {tuple(answer.shape)} for "
                    f"{len(batch.prints)} images: a CachedTeacher needs one answer an image "
                    "(distill.cache=off asks the teacher itself)"
                )
            column = answer.float().cpu().numpy()
            with np.errstate(over="ignore"):
                columns[_name(tap)] = column.astype(self.stored)
            if not np.isfinite(columns[_name(tap)]).all():
                raise MisconfigurationException(
                    f"the teacher's {_name(tap)} has values up to {np.abs(column).max():.3g}, "
                    f"which {self.stored} cannot hold: give CachedTeacher dtype='float32' "
                    "(distill.cache_dtype=float32), or a teacher whose outputs are finite"
                )
        kinds = [(name, column.dtype, column.shape[1:]) for name, column in columns.items()]
        rows = np.empty(len(batch.prints), np.dtype(kinds))
        for name, column in columns.items():
            rows[name] = column
        return rows

    @torch.no_grad()
    def _answers(self, images: Tensor) -> dict[Tap, Tensor]:
        """What the teacher itself says of a batch."""
        outputs: dict[str, list[Any]] = {part: [] for part, _ in self._taps}
        with ExitStack() as hooks:
            for part in outputs:
                if part:
                    hooks.callback(record(self.network.get_submodule(part), outputs[part]))
            whole = self.teacher(images)
        if "" in outputs:
            outputs[""].append(whole)
        for part, calls in outputs.items():
            if len(calls) != 1:
                raise MisconfigurationException(
                    f"the teacher's {part!r} was called {len(calls)} times for one batch: a "
                    "CachedTeacher keeps one answer (distill.cache=off asks the teacher itself)"
                )
        return {tap: select(outputs[tap[0]][0], tap[1]) for tap in self._taps}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_data": None, "_files": None, "_open": {}}

    def __repr__(self) -> str:
        return f"CachedTeacher({self.teacher!r}, {str(self.root)!r})"


def cached(
    teacher: nn.Module | Teacher,
    cache: str | Path | bool | None = "auto",
    views: int = 8,
    dtype: Literal["float16", "float32"] = "float16",
) -> nn.Module | Teacher:
    """The teacher as ``distill.cache`` asks for it: itself, or cached.

    Args:
        teacher: the network, or any Teacher.
        cache: ``"off"``, ``"auto"`` or a folder.
        views: see :class:`CachedTeacher`.
        dtype: likewise.
    """
    if cache in ("off", False, None):
        return teacher
    return CachedTeacher(teacher, "auto" if cache is True else str(cache), views=views, dtype=dtype)


def _name(tap: Tap) -> str:
    """The entry of a row that holds a tap."""
    part, entry = tap
    return (part or "(output)") + ("" if entry is None else f"[{entry!r}]")
