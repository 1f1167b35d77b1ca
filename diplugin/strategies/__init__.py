"""Ways to combine scoring, search, surgery and recovery."""

from .one_shot import OneShot, first_images

__all__ = ["OneShot", "first_images"]
