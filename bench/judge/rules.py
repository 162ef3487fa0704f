"""All rules that must hold before any number of a record may decide, in the order in which they are checked.

Identity rules (I, exit code 5) check that the device, the artifact and the kind of evidence are those that the release
claims. Validity rules (V, exit code 4) check that the measurement measured what it says. For every rule the tests have
a known-bad record and its known-good twin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import coherence, identity, validity
from .case import Case, Rule

if TYPE_CHECKING:
    from .record import Cpu, Device
    from .targets import Target

RULES = tuple(
    sorted(
        (
            declared
            for module in (identity, validity, coherence)
            for declared in vars(module).values()
            if isinstance(declared, Rule)
        ),
        key=lambda declared: declared.id,
    )
)


def device_problem(device: Device, target: Target, *, this_cpu: Cpu) -> str | None:
    """Check the identity rules on a device before it is measured; None if records of it may decide."""
    from .record import Record as AnyRecord

    if device.is_simulated:
        return f"the device is simulated ({'; '.join(device.simulation_reasons)})"
    record = AnyRecord.model_construct(device=device, evidence="measured")
    case = Case(record=record, target=target, this_cpu=this_cpu)
    asked = (rule for rule in RULES if rule.blocks == "not_measured")
    return next((reason for rule in asked if (reason := rule.check(case)) is not None), None)
