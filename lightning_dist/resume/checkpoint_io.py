"""``AtomicCheckpointIO``: a checkpoint writer that never leaves an incomplete checkpoint."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint writer that uses a temporary file and renames it when it is complete.

    Even if the run is interrupted while it saves, the file at the path is a complete checkpoint:
    the new one or the previous one. (The temporary file is in the same folder. Lightning's own
    writer uses the system's temporary folder, but that may be on another disk.)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: the entries of the checkpoint.
            path: the file to write. For a URL such as ``s3://...``, Lightning's own writer is used.
            storage_options: options for Lightning's own writer, which is used if they are given.

        Raises:
            OSError: if the checkpoint cannot be written; an existing file at the path is intact.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)  # A link there could lead to a file elsewhere.
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, RuntimeError) as error:
            before = path.is_file()
            if partial.parent.is_dir():
                partial.unlink(missing_ok=True)
            # If writing fails, torch.save fails a second time while it closes its file, and raises
            # the second error. The context of the second error contains the error of the disk.
            disk: BaseException = error
            while disk.__context__ is not None and not isinstance(disk, OSError):
                disk = disk.__context__
            if not isinstance(disk, OSError):
                raise
            raise OSError(
                f"cannot write the checkpoint {path}: {disk.strerror or disk}. "
                f"{'The previous checkpoint is intact' if before else 'There is no earlier one'}: "
                "delete other files or choose another folder, and resume"
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
