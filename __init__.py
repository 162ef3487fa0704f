"""HAVOC: from one base checkpoint to a released edge model, every number measured on the device it is claimed for.

What people script with, loaded when it is first used (docs/api.md has an example of each):

    load_base  load_task  compute_basis  training_settings  train_expert  load_experts     train
    export_artifact  open_artifact                                                         export and run
    measure  load_record  load_target  judge  compare                                      measure and judge
"""

import os as _os
from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapt.basis import compute_basis
    from .adapt.expert import load_experts
    from .adapt.tasks.task import load_task
    from .adapt.training import train_expert
    from .bench.judge.compare import compare
    from .bench.judge.gate import judge
    from .bench.judge.record import load_record
    from .bench.judge.targets import load_target
    from .bench.measure import measure
    from .export.package import export_artifact
    from .export.runtime.session import open_artifact
    from .jobs import training_settings
    from .model.checkpoint import load_base

__version__ = "0.1.0"
__all__ = [
    "compare",
    "compute_basis",
    "export_artifact",
    "judge",
    "load_base",
    "load_experts",
    "load_record",
    "load_target",
    "load_task",
    "measure",
    "open_artifact",
    "train_expert",
    "training_settings",
]

_HOME = {
    "compare": "bench.judge.compare",
    "compute_basis": "adapt.basis",
    "export_artifact": "export.package",
    "judge": "bench.judge.gate",
    "load_base": "model.checkpoint",
    "load_experts": "adapt.expert",
    "load_record": "bench.judge.record",
    "load_target": "bench.judge.targets",
    "load_task": "adapt.tasks.task",
    "measure": "bench.measure",
    "open_artifact": "export.runtime.session",
    "train_expert": "adapt.training",
    "training_settings": "jobs",
}

_os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# ONNX Runtime reads it when it is first imported, in this process or in a child. Without it, it keeps an id of the
# device and a database of events in the home folder and looks up a server of its maker, also while calls are timed.


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f".{_HOME[name]}", __name__), name)
