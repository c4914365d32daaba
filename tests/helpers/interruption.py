"""A run that is hard to resume, the comparison of two runs, and a callback that sends a signal."""

import json
import os
import signal
from pathlib import Path

import torch
from lightning.pytorch import Callback

# An exact resume has to restore the state or the random numbers of all these: random crops, mixup,
# a schedule, gradient accumulation and averaged weights.
OVERRIDES_OF_ANY_DATA = (
    "experiment=digits",
    "trainer.max_epochs=4",
    "trainer.accumulate_grad_batches=2",
    "trainer.log_every_n_steps=1",
    "data.drop_last=true",
    "data.num_workers=1",
    "callbacks=[default,ema]",
    "callbacks.ema.decay=0.9",
    "module.mixup={_target_:timm.data.Mixup,mixup_alpha:0.8,num_classes:10}",
    "test_teacher=false",
    "print_config=false",
    "callbacks.progress=null",
)
OVERRIDES = (*OVERRIDES_OF_ANY_DATA, "data.augment=true")


class Send(Callback):
    """A callback that sends a signal to its own process before the backward of a batch.

    `batch` is the index of this batch, counted from 0 over all epochs.
    """

    def __init__(self, number: signal.Signals, batch: int) -> None:
        self.number = number
        self.batch = batch

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), self.number)


def differences(whole: Path, resumed: Path) -> list[str]:
    """Return the differences between two runs: weights, optimizer, schedule, metrics, curves."""
    found = []
    for name in ("best.ckpt", "last.ckpt"):
        first, second = (
            torch.load(folder / "checkpoints" / name, weights_only=True)
            for folder in (whole, resumed)
        )
        keys = ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers")
        found += [f"{key} of {name}" for key in keys if not same(first[key], second[key])]
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, resumed)]
    if results[0]["metrics"] != results[1]["metrics"]:
        found.append("metrics")
    curves = [(folder / "logs" / "metrics.csv").read_text() for folder in (whole, resumed)]
    if curves[0] != curves[1]:
        found.append("curves")
    return found


def same(first: object, second: object) -> bool:
    """Return True if two values are bitwise equal, including tensors in containers."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second
