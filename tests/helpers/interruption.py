"""A callback that sends a signal in a given batch of a run."""

import os
import signal

from lightning.pytorch import Callback


class Send(Callback):
    """A callback that sends a signal to its own process before the backward of a batch.

    `batch` counts the batches of all epochs from 0.
    """

    def __init__(self, number: signal.Signals, batch: int) -> None:
        self.number = number
        self.batch = batch

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), self.number)
