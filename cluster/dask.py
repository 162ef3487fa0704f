"""Settings of Dask: it only carries messages. HAVOC itself tells the user what happens, so Dask's log is off."""

from __future__ import annotations

import logging


def quiet_dask() -> None:
    """Load Dask with its log off; if it is not installed, the `ModuleNotFoundError` names `distributed`."""
    import dask

    dask.config.set(
        {
            "distributed.admin.large-graph-warning-threshold": "1GB",
            "distributed.diagnostics.nvml": False,  # reading the card every few seconds would disturb measurements
            "distributed.worker.daemon": False,
        }
    )
    import distributed  # noqa: F401 - so that it sets its logging up now

    for name in ("distributed", "tornado", "asyncio", "bokeh"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.CRITICAL + 1)
        logger.propagate = False
    for name in list(logging.Logger.manager.loggerDict):
        if name.startswith("distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
