"""A signal at a known place of a run."""

import os
import signal

from lightning.pytorch import Callback


class Send(Callback):
    """Send this process a signal once so many batches have begun."""

    def __init__(self, number: signal.Signals, batch: int) -> None:
        self.number = number
        self.batch = batch

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), self.number)
