"""A script that trains a run without interruption, and a second run that is interrupted twice.

After each interruption, the second run is resumed. The first interruption is a signal to the last
rank only. The second is an error on all ranks; like SIGKILL, it saves nothing.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback

from lightning_dist import cli


class Interrupt(Callback):
    """A callback that interrupts its run before the backward of a batch.

    `signal_in` and `fail_in` are the indices of two batches, counted from 0 over all epochs. They
    are attributes of the class and not arguments: arguments would be part of the config, and a run
    resumes only if its config has not changed.
    """

    signal_in: int | None = None
    fail_in: int | None = None

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        batch = trainer.fit_loop.total_batch_idx
        if batch == self.signal_in and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if batch == self.fail_in:
            raise RuntimeError("the run fails")


class Fail(Callback):
    """A callback that raises an error on one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_start(self, trainer, pl_module) -> None:
        if trainer.global_rank == self.rank:
            raise RuntimeError("the rank fails")


def main(out: str, overrides: list[str], signal_in: int, fail_in: int) -> None:
    """Run the command in `out`/whole, and with interruptions in `out`/resumed.

    Each rank saves, for each run of the command, its exit status or error, and the step of its last
    checkpoint.

    Args:
        out: the folder of the runs.
        overrides: the overrides of the command.
        signal_in: the index of the batch in which the last rank gets SIGTERM.
        fail_in: the index of the batch in which all ranks raise an error.
    """
    ended = []
    command = ["train", *overrides, "+callbacks.interrupt._target_=interrupt.Interrupt"]
    for name, *batches in [
        ("whole", None, None),
        ("resumed", signal_in, None),
        ("resumed", None, fail_in),
        ("resumed", None, None),
    ]:
        Interrupt.signal_in, Interrupt.fail_in = batches
        folder = Path(out, name)
        sys.argv[1:] = [*command, "resume=true", f"hydra.run.dir={folder}"]
        status = 0
        try:
            cli.main()
        except SystemExit as stopped:
            status = stopped.code
        except RuntimeError as error:
            status = str(error)
        last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        ended.append((status, last["global_step"]))
    rank = torch.distributed.get_rank()
    Path(out, f"rank{rank}.json").write_text(json.dumps(ended))
