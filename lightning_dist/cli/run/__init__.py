"""Modules for one run of ``lightning-dist train``: its folder, result, callbacks and config."""
