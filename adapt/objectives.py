"""The loss of a training step: the settings, the three methods by name, and the result of a method.

    expected-reward   answers that can be listed: E[r] over the choices and its gradient, exact
    reinforce         answers that must be sampled: a policy gradient over judged completions
    next-token        a right answer is known: cross-entropy of the reference after the prompt

Each adds beta * KL(policy || base) at the places where it predicts, so that other behaviour stays unchanged. `auto`
takes the method that the task's file names; without one, expected-reward for a task of choices and reinforce for other
tasks.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import HavocError
from .optimizer import MuGrokConfig

if TYPE_CHECKING:
    from .tasks.names import Method
    from .tasks.task import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    """All settings that one expert's training depends on, besides the base, the basis and the task.

    Their defaults are in the recipe: `commands.training_settings` makes these settings from its section `[experts]`.
    `trained_layers` is the number of last layers whose matrices are trained, None for all: the others keep delta = 0.
    `optimizer` defaults to seed 003's `MuGrokConfig.from_phase(7)`; its `kl_coefficient` is beta. `rows` are drawn from
    the train split (all rows if it has fewer). `num_validation_rows` of the search split are scored every
    `validate_every` steps; the expert is the best state with a KL divergence from the base below `max_kl`, in nats per
    predicted token. `samples_per_prompt`, `temperature`, `signal_prompts` and `max_draws` are only for reinforce: it
    draws prompts until `signal_prompts` of them have samples with different rewards, at most `max_draws` times
    `prompts_per_step`.
    """

    method: Method
    trained_layers: int | None
    seed: int
    num_steps: int
    prompts_per_step: int
    samples_per_prompt: int
    temperature: float = 1.0
    signal_prompts: int
    max_draws: int
    max_new_tokens: int
    num_train_rows: int
    num_validation_rows: int
    validate_every: int
    max_grad_norm: float = 1.0
    max_kl: float
    optimizer: MuGrokConfig = field(default_factory=lambda: MuGrokConfig.from_phase(7))

    def __post_init__(self) -> None:
        """Refuse settings that cannot train, with the numbers."""
        if self.samples_per_prompt < 2:  # noqa: PLR2004
            raise HavocError(
                f"samples_per_prompt is {self.samples_per_prompt}: the leave-one-out baseline needs at least 2"
            )
        for name in ("num_steps", "prompts_per_step", "validate_every", "max_new_tokens", "max_draws"):
            if getattr(self, name) < 1:
                raise HavocError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.trained_layers is not None and self.trained_layers < 1:
            raise HavocError(f"trained_layers is {self.trained_layers}: at least one layer must be trained")
        if not 0 <= self.signal_prompts <= self.prompts_per_step:
            raise HavocError(
                f"signal_prompts is {self.signal_prompts}: expected 0 to prompts_per_step, {self.prompts_per_step}"
            )
        if not self.temperature > 0:
            raise HavocError(f"temperature is {self.temperature}: completions must be sampled, so it must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodDefaults:
    """Defaults of a method, if neither recipe nor command line sets a value."""

    num_steps: int
    prompts_per_step: int
    learning_rate: float
    validate_every: int


METHOD_DEFAULTS: dict[Method, MethodDefaults] = {
    "expected-reward": MethodDefaults(num_steps=80, prompts_per_step=48, learning_rate=1e-3, validate_every=10),
    "reinforce": MethodDefaults(num_steps=30, prompts_per_step=24, learning_rate=1e-2, validate_every=5),
    "next-token": MethodDefaults(num_steps=60, prompts_per_step=16, learning_rate=1e-3, validate_every=20),
}
"""From trials that docs/log.md lists: reinforce on the bundled base, expected-reward on a public one of 135 million
parameters. Those of next-token are a first choice: no trial has found better ones, and validation of written answers
takes as long as many steps."""


@dataclass(frozen=True, slots=True)
class Descent:
    """The result of a step; the gradients are in the deltas. `loss` is None if no row had a signal.

    `figures` are the step's line in the trace, besides its number and loss: `kl` in nats per predicted token, `reward`
    or `nats_per_token`, and counts.
    """

    loss: float | None
    figures: dict[str, Any]

    @property
    def is_finite(self) -> bool:
        """Whether the loss is finite or None."""
        return self.loss is None or math.isfinite(self.loss)


class Objective(Protocol):
    """A method bound to a base, a task and its train rows."""

    def descend(self, step: int) -> Descent:
        """Add the gradients of step number `step` (0 is the first) to the deltas; depends on seed and step alone."""


def method_for(task: Task, method: Method) -> Method:
    """Return the method that `auto` means: the one in the task's file, or the one that fits its kind.

    A method that does not fit the kind of the task's answers is a `HavocError`.
    """
    is_choice = task.kind == "choice"
    if method == "auto":
        method = task.definition.training.method
    if method == "auto":
        return "expected-reward" if is_choice else "reinforce"
    if method == "expected-reward" and not is_choice:
        raise HavocError(
            f"expected-reward needs a task of choices, and {task.name} is of kind {task.kind}: "
            "use reinforce or next-token"
        )
    if method == "reinforce" and is_choice:
        raise HavocError(
            f"reinforce samples free text, and {task.name} is a task of choices: use expected-reward or next-token"
        )
    return method


def rows_of_step(num_rows: int, num_chosen: int, *, seed: str, step: int) -> list[int]:
    """Indices of the rows of a step: each epoch has its own order, so all rows are used equally often.

    They depend only on the arguments, so a resumed training uses the same rows. A step never has a row twice. If
    `num_chosen` is above `num_rows`, a step has all rows once.
    """
    num_chosen = min(num_chosen, num_rows)
    steps_per_epoch = num_rows // num_chosen
    epoch, place = divmod(step, steps_per_epoch)
    order = list(range(num_rows))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order[place * num_chosen : (place + 1) * num_chosen]
