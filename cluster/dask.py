"""Dask, kept to its job: it carries messages, and what there is to say to a person HAVOC says itself."""

from __future__ import annotations

import logging


def quiet_dask() -> None:
    """Load Dask with its log silenced; where it is not installed, the `ModuleNotFoundError` names `distributed`."""
    import dask
    import distributed  # noqa: F401 - so that it sets its logging up now

    dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GB", "distributed.worker.daemon": False})
    for name in ("distributed", "tornado", "asyncio", "bokeh"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.CRITICAL + 1)
        logger.propagate = False
    for name in list(logging.Logger.manager.loggerDict):
        if name.startswith("distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
