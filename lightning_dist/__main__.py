"""Run the command: ``python -m lightning_dist`` is ``lightning-dist``."""

from lightning_dist.cli import main

if __name__ == "__main__":
    main()
