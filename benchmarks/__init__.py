"""Benchmarks against other libraries in the same run; each module prints one table of ratios."""
