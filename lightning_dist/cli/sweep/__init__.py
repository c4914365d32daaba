"""Sweeps: launch a run as its own process, check the launcher, prune trials, report at the end."""
