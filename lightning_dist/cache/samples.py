"""A check with a few samples, whose stored outputs show whether the teacher has changed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_dist.cache.files import read_rows, write_rows
from lightning_dist.cache.filling import kept_generators
from lightning_dist.cache.rows import FINGERPRINT, TeacherRows
from lightning_dist.data.views import KeyedBatch
from lightning_dist.files.locking import file_lock

TOLERANCE = "(tolerance)"  # The entry of a row that contains the result of `_tolerance`.
# The machine epsilon of TensorFloat-32, in which GPUs compute float32 convolutions by default.
_TF32_EPS = 2.0**-10


def check_answers(
    folder: Path, answers: TeacherRows, batches: Sequence[KeyedBatch], device: torch.device
) -> np.dtype:
    """Compare a teacher's outputs for some samples with the outputs that a folder contains.

    The first run with a folder stores its outputs there. The teacher runs without autocast and
    without torch.compile. The states of the global random generators are restored afterwards.

    Args:
        folder: the folder of a cache; it is created if it does not exist.
        answers: the object that computes the teacher's outputs, in float32.
        batches: batches of the samples, which are the same in all runs.
        device: the device on which the teacher runs.

    Returns:
        The dtype of a row of these outputs.

    Raises:
        MisconfigurationException: if the outputs differ from the stored ones by more than rounding,
            if the teacher draws random numbers, or if :meth:`TeacherRows.rows` refuses a batch.
        ValueError: if the file of the stored outputs is damaged.
    """
    path = folder / "samples.npy"
    with answers.on_device(device), kept_generators(device) as drawn:
        rows = _rows(answers, batches, device)
        row, found = _without_tolerance(rows.dtype), path.exists()
        if found and not drawn() and not _differences(_read(path, rows), rows):
            return row  # This is the usual case: the teacher gets each sample once.
        again = _rows(answers, batches, device)
        if drawn() or _differences(rows, again):
            raise MisconfigurationException(
                f"{answers.teacher} draws random numbers, or its outputs for the same images "
                "differ between two calls for another reason, but a CachedTeacher stores the "
                "outputs of one call. Switch this off in the teacher, or use the teacher without a "
                "cache (distill.cache=off)"
            )
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(path.with_suffix(".lock")):
        if not path.exists():
            write_rows(path, rows)
        different = _differences(_read(path, rows), rows)
    if different:
        raise MisconfigurationException(
            f"the teacher's outputs differ from those stored in {folder} ({', '.join(different)} "
            "of some samples): its code, or a file or object that it uses, has changed. Delete the "
            "folder, or choose another one (distill.cache=PATH)"
        )
    return row


def _rows(answers: TeacherRows, batches: Sequence[KeyedBatch], device: torch.device) -> np.ndarray:
    # Do not compile: that takes longer than calling the teacher with a few images.
    with torch.compiler.set_stance("force_eager"):
        rows = np.concatenate([answers.rows(batch, device) for batch in batches])
    with_tolerance = np.empty(len(rows), np.dtype([*rows.dtype.descr, (TOLERANCE, np.float64)]))
    for name in rows.dtype.names or ():
        with_tolerance[name] = rows[name]
    with_tolerance[TOLERANCE] = _tolerance(answers, device)
    return with_tolerance


def _without_tolerance(row: np.dtype) -> np.dtype:
    return np.dtype([field for field in row.descr if field[0] != TOLERANCE])


def _tolerance(answers: TeacherRows, device: torch.device) -> float:
    """Return the difference that counts as rounding, as a fraction of the largest output."""
    dtypes = {p.dtype for p in answers.teacher.network.parameters() if p.is_floating_point()}
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    if device.type != "cpu":
        eps = max(eps, _TF32_EPS)
    return max(8 * eps, 1e-4)


def _read(path: Path, like: np.ndarray) -> np.ndarray:
    return read_rows(path, len(like), like.dtype.names or (), delete=path.parent)


def _differences(stored: np.ndarray, rows: np.ndarray) -> list[str]:
    """Return the names of the entries in which two sets of rows differ by more than rounding."""
    if stored.dtype != rows.dtype:
        return [name for name in rows.dtype.names or () if stored.dtype[name] != rows.dtype[name]]
    tolerance = max(stored[TOLERANCE].max(), rows[TOLERANCE].max())
    different = []
    for name in set(rows.dtype.names or ()) - {FINGERPRINT, TOLERANCE}:
        one, other = stored[name], rows[name]
        scale = np.abs(one[np.isfinite(one)]).max(initial=0.0) or 1.0
        if not np.isclose(one, other, rtol=0.0, atol=tolerance * scale).all():
            different.append(name)
    return sorted(different)
