"""Parts of sweeps: run a job in its own process, check the launcher, prune trials, report."""
