"""A teacher that writes the size of each batch to a file, for tests with several processes."""

import os
import time
from pathlib import Path

from torch import Tensor

from lightning_dist.models.small import SmallCNN


class CountedCNN(SmallCNN):
    """A network that appends the size of each batch to the file COUNTED, after SLOWLY seconds."""

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(float(os.environ.get("SLOWLY", "0")))
        with Path(os.environ["COUNTED"]).open("a") as file:
            file.write(f"{len(images)}\n")
        return super().forward(images)
