"""The signals that stop a run, and a handler that receives them from the start of `fit`."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(SystemExit):
    """The exception that ends a run after a signal.

    Args:
        number: the number of the signal.
        status: the exit status of the process: 128 + the number of the signal (143 for SIGTERM) in
            the first process, 0 in the others.
    """

    def __init__(self, number: int, status: int) -> None:
        super().__init__(status)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"


def install_handler(trainer: Trainer, handle: Callable[[Trainer, int], None]) -> None:
    """Install a handler of the signals, right after Lightning 2.6.6 has installed its own handlers.

    Lightning's handler stores SIGTERM for the training loop, which raises an exception with the
    exit status 0; a test ignores it. Lightning calls no hook after it has installed its handlers,
    so its private method that installs them is replaced. It is called in ``fit`` and ``test``, and
    Lightning restores the previous handlers at their ends.

    Args:
        trainer: the trainer.
        handle: the function that is called with the trainer and the number of the signal. It runs
            in the main thread of this process, and not in worker processes of a data loader.
    """
    connector = trainer._signal_connector
    remove_handler(trainer)
    register = connector.register_signal_handlers
    own = os.getpid()

    def on_signal(number: int, frame: Any) -> None:
        if os.getpid() == own:  # The workers of a data loader inherit the handler.
            handle(trainer, number)

    def register_and_handle() -> None:
        register()
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, on_signal)

    connector.__dict__["register_signal_handlers"] = register_and_handle


def remove_handler(trainer: Trainer) -> None:
    """Restore the private method, so that Lightning installs only its own handlers."""
    trainer._signal_connector.__dict__.pop("register_signal_handlers", None)


def keep_status(trainer: Trainer) -> None:
    """Let no error of Lightning's clean-up replace the exception that ends the run.

    A signal can end a stage while Lightning 2.6.6 starts or ends it. Then its private method
    ``_teardown``, which is called after each exception, can raise an error about loaders that are
    half set up. The run would end with the status 1 of that error.

    Args:
        trainer: the trainer, after :class:`Interrupted` was raised.
    """
    teardown = trainer._teardown

    def teardown_once() -> None:
        del trainer.__dict__["_teardown"]
        try:
            teardown()
        except Exception as error:
            rank_zero_info(f"after the signal, Lightning could not clean up: {error}")
            trainer._signal_connector.teardown()  # the last step of the clean-up

    trainer.__dict__["_teardown"] = teardown_once
