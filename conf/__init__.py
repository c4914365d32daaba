"""Hydra configs of lightning-dist; installed as ``lightning_dist.conf``."""
