"""A teacher cache: files with a teacher's outputs for a training set, which many runs read."""

from lightning_dist.cache.cached_teacher import CachedTeacher, cached

__all__ = ["CachedTeacher", "cached"]
