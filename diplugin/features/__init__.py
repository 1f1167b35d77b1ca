"""Watching feature maps go by: scores are computed inside the forward hook, and no map outlives it.

`score_points` runs a model over chunks of images and returns one vector of scores for every tapped tensor; alone or
with other processes (`sharing`), to the end of the data or until the ranking is reliable (`stability`), with a note of
what it cost (`profile`) if one is wanted.
"""

from __future__ import annotations

from .batches import (
    CHUNK_SIZE,
    Forward,
    GetLabels,
    batch_length,
    chunks,
    device_of,
    first_images,
    forward_inputs,
    has_rows,
    images_in,
    labels_of,
    move_to,
    to_device,
)
from .observe import Observation, score_points
from .profile import LayerProfile, ScoreProfile
from .scene import Scene, observing
from .stability import UntilStable, reliability

__all__ = [
    "CHUNK_SIZE",
    "Forward",
    "GetLabels",
    "LayerProfile",
    "Observation",
    "Scene",
    "ScoreProfile",
    "UntilStable",
    "batch_length",
    "chunks",
    "device_of",
    "first_images",
    "forward_inputs",
    "has_rows",
    "images_in",
    "labels_of",
    "move_to",
    "observing",
    "reliability",
    "score_points",
    "to_device",
]
