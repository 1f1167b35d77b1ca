"""Latency tables: what operators cost on one device, how far a sum of such costs can be trusted, and their files."""

from .keys import OpKey
from .table import SCHEMA, Alignment, Calibration, Entry, LatencyTable, NetTiming, Setting

__all__ = ["SCHEMA", "Alignment", "Calibration", "Entry", "LatencyTable", "NetTiming", "OpKey", "Setting"]
