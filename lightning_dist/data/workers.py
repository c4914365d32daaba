"""`start_worker`, the first call in each worker process of a loader."""

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.queues import Queue
from typing import Any

from torch._utils import ExceptionWrapper

from lightning_dist.data.shared_memory import with_advice

_SECONDS = 1.0  # between two checks whether the process of the loader still exists


def start_worker(worker: int = 0) -> None:
    """Ignore SIGINT and SIGTERM in this process, but end with the process of the loader.

    A terminal and SLURM send these signals to every process, but the main process decides when to
    stop, and it needs its workers until then. Only a SIGTERM from the main process ends a worker:
    `multiprocessing` sends it when the main process exits, and then waits for the worker without a
    time limit. A worker also ends, within a second, if the main process was killed. torch's own
    check misses this while the worker loads a batch, or waits to hand one over.

    A batch that cannot be passed to the main process, such as because the shared memory is full,
    raises an error there. `multiprocessing` only prints the error, and the main process would wait
    for the batch without end.

    Args:
        worker: the number of the worker, which a DataLoader passes to its `worker_init_fn`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        # The thread takes the signal instead of its handler, because a handler of Python does not
        # get to know who sent it. macOS and Windows have no sigtimedwait. There, the handler of
        # torch remains, and any SIGTERM ends a worker.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()
    # A private hook of multiprocessing, as of Python 3.10 to 3.14. The queue calls it from the
    # thread that it starts with the first batch.
    Queue._on_queue_feeder_error = _report_lost_batch  # type: ignore[attr-defined]


def _end_with_the_main_process() -> None:
    """End this process when the main process has sent SIGTERM or does not exist any more."""
    main = multiprocessing.parent_process()
    assert main is not None
    parent = os.getppid()  # It is another process than `main` with the start method forkserver.
    while os.getppid() == parent and main.is_alive():
        if not hasattr(signal, "sigtimedwait"):
            time.sleep(_SECONDS)
            continue
        received = signal.sigtimedwait({signal.SIGTERM}, _SECONDS)
        if received is not None and received.si_pid == main.pid:
            break
    # The status 0 keeps torch from reporting a failed worker in a main process that exits.
    os._exit(0)


def _report_lost_batch(queue: Queue, error: Exception, item: tuple[Any, Any]) -> None:
    """Put an error in the place of a batch that cannot be sent.

    Args:
        queue: the queue to the main process.
        error: the error that sending the batch raised.
        item: the number of the batch, and the batch.
    """
    try:
        raise ValueError(f"a worker cannot pass on a batch: {with_advice(str(error))}") from error
    except ValueError:
        queue.put((item[0], ExceptionWrapper(where="in DataLoader worker process")))
