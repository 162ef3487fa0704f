"""HAVOC: from one base checkpoint to a released edge model, every number measured on the device it is claimed for."""

__version__ = "0.1.0"
