"""Parts of sweeps: start jobs as processes, check launchers, prune trials, print the report."""
