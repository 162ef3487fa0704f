"""Metrics of a run: one catalogue, one file that always holds them, and trackers that are told what is in the file."""
