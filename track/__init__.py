"""Metrics of a run: one catalogue, one file that always holds them, and trackers that receive the file's content."""
