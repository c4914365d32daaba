"""``AtomicCheckpointIO``: writes a checkpoint completely or not at all."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint writer that uses a temporary file and renames it when it is complete.

    Whenever the run is interrupted, the file at the path is a complete checkpoint: the new one or
    the one before. (The temporary file lies in the same folder. Lightning's own writer uses the
    system's temporary folder, which may be on another disk.)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: the entries of the checkpoint.
            path: the file to write. Lightning itself writes to a URL such as ``s3://...``.
            storage_options: options for Lightning's own writer, which is used if there are any.

        Raises:
            OSError: if the checkpoint cannot be written; a file that was there before is intact.
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
            # When writing fails, torch.save fails again while it closes its file and raises that
            # second error. The error of the disk is in its context.
            disk: BaseException = error
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
    """Create a folder for checkpoints, and check that files can be written to it.

    Args:
        folder: the folder; its parents are created too.

    Raises:
        OSError: if the folder cannot be created, or no file can be written to it.
    """
    trial = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"?")
        trial.unlink()
    except OSError as error:
        raise OSError(
            f"cannot write checkpoints to {folder}: {error.strerror}. Choose another folder"
        ) from error
