"""One run of ``lightning-dist train``: its folder, its result, and the config in its checkpoint."""
