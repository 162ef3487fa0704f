"""A run beyond one machine: workers that train, score and measure, reached through Dask's `distributed`."""
