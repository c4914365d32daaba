"""A teacher cache: stores a teacher's outputs for a training set, so that many runs read them."""

from lightning_dist.cache.cached_teacher import CachedTeacher, cached

__all__ = ["CachedTeacher", "cached"]
