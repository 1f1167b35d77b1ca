"""Ways to combine scoring, search, surgery and recovery."""

from .clock import search_by_clock
from .job import Job, Shrunk
from .one_shot import OneShot, first_images

__all__ = ["Job", "OneShot", "Shrunk", "first_images", "search_by_clock"]
