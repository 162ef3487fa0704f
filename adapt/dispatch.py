"""Two-pass inference: the first pass chooses an expert or a mixture for a prompt, the second pass answers with it.

    prompt        the base itself says which expert a prompt belongs to (`first_pass.py`)
    classifier    the base says it with scales that were trained for this question (`classifier.py`)
    few-shot      one mixture for a whole task, found on a few of its solved rows (`few_shot.py`)

Every prompt gets exactly one mixture; no scales of an earlier prompt remain (`mixtures.py`). A first pass may learn
from train and search rows; `dispatch_table.py` compares it with other systems on rows that it has not seen.
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
    """A first pass that reads the prompt: it chooses a name of `first_pass` with the base, or with `classifier`."""

    mixtures: Mixtures
    first_pass: FirstPass
    classifier: Expert | None = None

    def places(self, prompts: Sequence[PromptLike]) -> list[int]:
        """Return the index of each prompt's expert among the experts of the mixtures."""
        mixtures, names = self.mixtures, self.first_pass.names
        base = mixtures.only(None)
        scorer = mixtures.scorer(base) if self.classifier is None else mixtures.expert_scorer(self.classifier)
        return [mixtures.names.index(names[place]) for place in self.first_pass.choose(scorer, prompts)]


def open_mixtures(base: Base, directory: Path, progress: Progress) -> tuple[Mixtures, Basis]:
    """Open the experts of a folder for dispatch; the basis is searched in the folder and in its parent folder.

    Raises `HavocError` for a folder without experts, and for experts of another base.
    """
    names = experts_in(directory)
    if not names:
        raise HavocError(f"--experts {directory}: has no z_vectors_*.safetensors; train experts with havoc train")
    load_experts(directory, names, base_hash=base.weight_hash)  # first, because a basis may take minutes
    basis = cached_basis(_basis_path(directory), base.tensors(), base_hash=base.weight_hash, progress=progress)
    return Mixtures(base, basis, load_experts(directory, names, basis=basis)), basis


def _basis_path(directory: Path) -> Path:
    """The path of the basis: in the folder of the experts, or in its parent folder, where `havoc run` writes it."""
    own, above = (folder / "basis.safetensors" for folder in (directory, directory.parent))
    return above if above.exists() and not own.exists() else own


def open_chooser(way: Way, mixtures: Mixtures, directory: Path, basis: Basis) -> Chooser:
    """Return the first pass `prompt` or `classifier` for the experts of a folder.

    Raises `HavocError` if there is only one expert, or if the classifier names an expert that does not exist.
    """
    if way == "prompt":
        return Chooser(mixtures, FirstPass(mixtures.names, is_calibrated=True))
    if way != "classifier":
        raise HavocError(f"{way} reads solved examples, not the prompt, so it has no chooser")
    classifier, first_pass = load_classifier(directory, basis=basis, is_chat=mixtures.base.tokenizer.chat is not None)
    unknown = [name for name in first_pass.names if name not in mixtures.names]
    if unknown:
        raise HavocError(
            f"{directory}: the classifier chooses between {', '.join(first_pass.names)}, but there is no expert of "
            f"{', '.join(unknown)}: train it, or train the classifier again"
        )
    return Chooser(mixtures, first_pass, classifier)
