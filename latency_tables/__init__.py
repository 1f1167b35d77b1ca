"""Measured latency tables, one JSON file for each device, runtime and number of threads."""
