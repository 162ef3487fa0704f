"""Two-pass inference: the first pass chooses the expert of a prompt, or its mixture, and the second answers with it.

    prompt        the base itself is asked which expert a prompt belongs to (`first_pass.py`)
    classifier    the same question, asked of the base with scales trained for it (`classifier.py`)
    few-shot      a mixture for a whole task, found on a few of its solved rows (`few_shot.py`)

Every prompt gets exactly one mixture, and the scales of the one before never stay (`mixtures.py`). A first pass may
learn from train and search rows; `dispatch_table.py` holds it against others on rows it has not met.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ..errors import HavocError
from .basis import cached_basis
from .classifier import load_classifier
from .expert import experts_in, load_experts
from .first_pass import FirstPass
from .mixtures import Mixtures

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..model.checkpoint import Base
    from ..model.prompt import PromptLike
    from ..progress import Progress
    from .basis import Basis
    from .expert import Expert

Way = Literal["prompt", "classifier", "few-shot"]
WAYS: tuple[Way, ...] = get_args(Way)


@dataclass(frozen=True, slots=True)
class Chooser:
    """A first pass that reads the prompt: the names of `first_pass`, by the base or with the scales of `classifier`."""

    mixtures: Mixtures
    first_pass: FirstPass
    classifier: Expert | None = None

    def places(self, prompts: Sequence[PromptLike]) -> list[int]:
        """Return for each prompt the place of its expert among those of the mixtures."""
        mixtures, names = self.mixtures, self.first_pass.names
        base = mixtures.only(None)
        scorer = mixtures.scorer(base) if self.classifier is None else mixtures.expert_scorer(self.classifier)
        return [mixtures.names.index(names[place]) for place in self.first_pass.choose(scorer, prompts)]


def open_mixtures(base: Base, directory: Path, progress: Progress) -> tuple[Mixtures, Basis]:
    """Open the experts of a folder for dispatch; the basis is looked for in the folder and in the one above it.

    Raises `HavocError` for a folder without experts, and for experts of another base.
    """
    names = experts_in(directory)
    if not names:
        raise HavocError(f"--experts {directory}: holds no z_vectors_*.safetensors; train them with havoc train")
    load_experts(directory, names, base_hash=base.weight_hash)  # refused before the minutes that a basis may take
    basis = cached_basis(_basis_path(directory), base.tensors(), base_hash=base.weight_hash, progress=progress)
    return Mixtures(base, basis, load_experts(directory, names, basis=basis)), basis


def _basis_path(directory: Path) -> Path:
    """Where the basis lies: beside the experts, or where `havoc run` writes it, beside their folder."""
    own, above = (folder / "basis.safetensors" for folder in (directory, directory.parent))
    return above if above.exists() and not own.exists() else own


def open_chooser(way: Way, mixtures: Mixtures, directory: Path, basis: Basis) -> Chooser:
    """Return the first pass `prompt` or `classifier` over the experts of a folder.

    Raises `HavocError` where there is one expert only, and for a classifier that names an expert there is not.
    """
    if way == "prompt":
        return Chooser(mixtures, FirstPass(mixtures.names, is_calibrated=True))
    if way != "classifier":
        raise HavocError(f"{way} reads solved examples and not the prompt: it has no chooser")
    classifier, first_pass = load_classifier(directory, basis=basis, is_chat=mixtures.base.tokenizer.chat is not None)
    unknown = [name for name in first_pass.names if name not in mixtures.names]
    if unknown:
        raise HavocError(
            f"{directory}: the classifier chooses between {', '.join(first_pass.names)}, and there is no expert of "
            f"{', '.join(unknown)}: train it, or the classifier anew"
        )
    return Chooser(mixtures, first_pass, classifier)
