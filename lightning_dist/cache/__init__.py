"""A teacher cache: answers to a training set, computed once and read by all runs of a sweep."""

from lightning_dist.cache.cached_teacher import CachedTeacher, cached

__all__ = ["CachedTeacher", "cached"]
