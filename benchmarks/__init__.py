"""Benchmarks that compare with other libraries in the same run and print tables of ratios."""
