"""A search beyond one machine: workers that score and workers that measure, reached through Dask's `distributed`."""
