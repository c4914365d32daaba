"""A network that writes the size of each batch to a file, for tests with several processes."""

import os
import time
from pathlib import Path

from torch import Tensor

from lightning_dist.models.small import SmallCNN


class CountedCNN(SmallCNN):
    """A network that waits, then appends the size of each batch to a file.

    Two environment variables set it up: COUNTED is the path of the file, and SLOWLY is the number
    of seconds to wait before each batch (0 by default).
    """

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(float(os.environ.get("SLOWLY", "0")))
        with Path(os.environ["COUNTED"]).open("a") as file:
            file.write(f"{len(images)}\n")
        return super().forward(images)
