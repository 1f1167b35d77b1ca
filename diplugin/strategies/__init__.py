"""Ways to combine scoring, search, surgery and recovery."""

from .clock import search_by_clock
from .one_shot import OneShot, first_images

__all__ = ["OneShot", "first_images", "search_by_clock"]
