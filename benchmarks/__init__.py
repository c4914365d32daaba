"""Benchmarks against peers, side by side in one run: each module prints one table of ratios."""
