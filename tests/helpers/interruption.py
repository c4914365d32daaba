"""A callback that sends a signal at a fixed place of a run."""

import os
import signal

from lightning.pytorch import Callback


class Send(Callback):
    """A callback that sends a signal to this process in the batch with the given index."""

    def __init__(self, number: signal.Signals, batch: int) -> None:
        self.number = number
        self.batch = batch

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), self.number)
