"""Checkpoints that are written whole or not at all."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its path and renames it once it is complete.

    Whatever interrupts it, a file of this name is a whole checkpoint, the new one or the one
    before. (Lightning's own passes through the system's temporary folder, which may be on another
    disk.)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write it.

        Args:
            checkpoint: what to save.
            path: where.
            storage_options: there are none.

        Raises:
            OSError: if it cannot be written; what was there before is intact.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, RuntimeError) as error:
            before = path.is_file()
            if partial.parent.is_dir():
                partial.unlink(missing_ok=True)
            disk: BaseException = error  # torch closes its file, and raises what that raises
            while disk.__context__ is not None and not isinstance(disk, OSError):
                disk = disk.__context__
            if not isinstance(disk, OSError):
                raise
            raise OSError(
                f"cannot write the checkpoint {path}: {disk.strerror or disk}. "
                f"{'The one saved there before is intact' if before else 'None was there before'}: "
                "make room or choose another folder, and resume"
            ) from error


def refuse_unwritable(folder: Path) -> None:
    """Make a folder for checkpoints; raise an OSError where nothing can be written to it."""
    trial = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"?")
        trial.unlink()
    except OSError as error:
        raise OSError(
            f"cannot write checkpoints to {folder}: {error.strerror}. Choose another folder"
        ) from error
