"""HAVOC: from one base checkpoint to a released edge model, every number measured on the device it is claimed for."""

import os as _os

__version__ = "0.1.0"

_os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# ONNX Runtime reads it when it is first imported, in this process or in a child. Without it, it keeps an id of the
# device and a database of events in the home folder and looks up a server of its maker, also while calls are timed.
