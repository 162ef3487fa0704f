"""Train an expert: REINFORCE on singular values with a verifiable reward and a KL term to the base.

A step samples S completions for each of P prompts from the folded policy, judges them, and descends

    L = - 1/N sum_n A_n sum_t log pi(y_t | y_<t, x)  +  beta * 1/N sum_n mean_t KL(pi(. | y_<t, x) || base(. | y_<t, x))

with the leave-one-out baseline A_n = r_n - mean of the other S - 1 rewards of the same prompt (RLOO, arXiv 2402.14740),
over the generated token ids, end token included. The KL is summed over the vocabulary at each sampled prefix, which has
the expectation of the single-sample estimate and less variance. Groups in which every reward is equal carry no
policy gradient and are left out of the backward pass (and counted). Training keeps the state that did best on the
search split; it resumes from a checkpoint step for step, because every random choice of step n depends on the seed
and n alone.

Legend: B rows (P prompts x S samples), T prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from .. import storage
from ..errors import HavocError, MeasurementError
from ..model.generation import completions, encode_prompts, generate_text, sample_tokens
from ..progress import SILENT, Progress
from .expert import Expert
from .optimizer import MuGrokConfig, MuonGrokfast
from .svf import Basis, SingularValueAdapter, attach
from .tasks import sources
from .tasks.evaluation import Scores, score
from .tasks.task import Row, task_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..model.checkpoint import Base

_MIN_PROBABILITY_OF_SIGNAL = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class ReinforceSettings:
    """What one expert's training depends on, beside the base, the basis and the domain.

    `optimizer` defaults to seed 003's `MuGrokConfig.from_phase(7)`; its `kl_coefficient` is beta. `rows` are drawn
    from the train split, all it has where they are fewer; `num_validation_rows` of the search split are answered
    greedily every `validate_every` steps.
    """

    seed: int = 0
    num_steps: int = 30
    prompts_per_step: int = 24
    samples_per_prompt: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 80
    num_train_rows: int = 2000
    num_validation_rows: int = 200
    validate_every: int = 5
    max_grad_norm: float = 1.0
    optimizer: MuGrokConfig = field(default_factory=lambda: MuGrokConfig.from_phase(7))

    def __post_init__(self) -> None:
        """Refuse settings that cannot train, with the numbers."""
        if self.samples_per_prompt < 2:  # noqa: PLR2004
            msg = f"samples_per_prompt is {self.samples_per_prompt}: the leave-one-out baseline needs at least 2"
            raise HavocError(msg)
        if min(self.num_steps, self.prompts_per_step, self.validate_every, self.max_new_tokens) < 1:
            msg = "num_steps, prompts_per_step, validate_every and max_new_tokens must be at least 1"
            raise HavocError(msg)
        if not self.temperature > 0:
            msg = f"temperature is {self.temperature}: completions must be sampled, so it must be above 0"
            raise HavocError(msg)


@dataclass(frozen=True, slots=True)
class Rollout:
    """Sampled completions of one step: ids and mask int64 [B, T + N], rewards and advantages float32 [B]."""

    ids: torch.Tensor
    mask: torch.Tensor
    patches: torch.Tensor | None
    num_prompt_tokens: int
    rewards: torch.Tensor
    advantages: torch.Tensor
    num_failed: int
    num_flat_groups: int


def train_expert(
    base: Base,
    basis: Basis,
    domain: str,
    *,
    settings: ReinforceSettings,
    checkpoint_dir: Path,
    data_dir: Path | None = None,
    online: bool = False,
    progress: Progress = SILENT,
) -> Expert:
    """Train the expert of `domain` and return it; `base.model` is given back unchanged.

    `checkpoint_dir` receives `training_<domain>.safetensors` (state) and `training_<domain>.jsonl` (one line a step).
    Raises `HavocError` when every sampled reward of the first steps is equal, since there is nothing to learn from,
    and `MeasurementError` when gradients stay non-finite.
    """
    train_rows = sources.rows(
        domain,
        "train",
        settings.num_train_rows,
        seed=settings.seed,
        data_dir=data_dir,
        online=online,
        may_be_fewer=True,  # mbpp has 374
    )
    validation_rows = sources.rows(
        domain, "search", settings.num_validation_rows, seed=settings.seed, data_dir=data_dir, online=online
    )
    with attach(base.model, basis) as adapter:
        run = _Run(base, adapter, domain, settings, checkpoint_dir, basis)
        with progress.stage(f"train {domain}", settings.num_steps) as stage:
            stage.advance(run.num_done, run.summary())
            if run.num_done == 0:
                run.validate(validation_rows)
            while run.num_done < settings.num_steps:
                run.step(train_rows)
                if run.num_done % settings.validate_every == 0 or run.num_done == settings.num_steps:
                    run.validate(validation_rows)
                run.save()
                stage.advance(note=run.summary())
        return run.expert()


def forget_training(checkpoint_dir: Path, domain: str) -> None:
    """Remove the state of a finished training, once its expert file is written."""
    _state_path(checkpoint_dir, domain).unlink(missing_ok=True)


def _state_path(checkpoint_dir: Path, domain: str) -> Path:
    return checkpoint_dir / f"training_{domain}.safetensors"


class _Run:
    """The state of one training: deltas, optimizer, best validation, and the trace of every step."""

    def __init__(
        self,
        base: Base,
        adapter: SingularValueAdapter,
        domain: str,
        settings: ReinforceSettings,
        checkpoint_dir: Path,
        basis: Basis,
    ) -> None:
        self._base, self._adapter, self._domain, self._settings = base, adapter, domain, settings
        self._basis = basis
        self._optimizer = MuonGrokfast(adapter.parameters(), settings.optimizer)
        self._state_path = _state_path(checkpoint_dir, domain)
        self._key = storage.sha256_json(
            {
                "base": base.weight_hash,
                "basis": basis.hash,
                "domain": domain,
                "settings": {**dataclasses.asdict(settings), **_prompting(base)},
            }
        )
        self.num_done = 0
        self._num_skipped = 0
        self._best = adapter.snapshot()
        self._best_score: dict[str, Any] = {"num_right": -1, "num_rows": 0, "step": 0}
        self._trace: list[dict[str, Any]] = []
        self._resume()

    def summary(self) -> str:
        """Return the few numbers that are shown beside the bar."""
        if not self._trace:
            return ""
        last = self._trace[-1]
        return f"reward {last['reward']:.2f} kl {last['kl'] or 0.0:.3f} best {self._best_share():.1%}"

    def _best_share(self) -> float:
        return float(self._best_score["num_right"] / max(1, self._best_score["num_rows"]))

    def validate(self, rows: Sequence[Row]) -> None:
        """Answer the validation rows greedily; keep the deltas if they are the best so far."""
        scores = self._scores(rows)
        num_right = sum(scores.right)
        if self._trace:
            self._trace[-1]["validation"] = num_right / len(scores.right)
        if num_right > self._best_score["num_right"]:
            self._best = self._adapter.snapshot()
            self._best_score = {"num_right": num_right, "num_rows": len(scores.right), "step": self.num_done}

    def _scores(self, rows: Sequence[Row]) -> Scores:
        return score(
            lambda prompts: generate_text(
                self._base.model, self._base.tokenizer, prompts, max_new_tokens=self._settings.max_new_tokens
            ),
            self._domain,
            rows,
        )

    def step(self, rows: Sequence[Row]) -> None:
        """Sample, judge, and take one optimizer step."""
        settings = self._settings
        rng = random.Random(f"{settings.seed}:{self._domain}:{self.num_done}")
        chosen = rng.sample(rows, min(settings.prompts_per_step, len(rows)))
        rollout = sample_rollout(self._base, self._domain, chosen, settings, seed=rng.getrandbits(48))
        if self.num_done == 0 and bool(rollout.rewards.min() == rollout.rewards.max()):
            share = rollout.rewards.mean().item()
            msg = (
                f"every sampled {self._domain} reward is equal ({share:.0%} right in {len(rollout.rewards)}): "
                "there is nothing to learn from; use another base or easier rows"
            )
            raise HavocError(msg)
        loss, kl = policy_loss(self._base, self._adapter, rollout, kl_coefficient=settings.optimizer.kl_coefficient)
        self._optimizer.zero_grad(set_to_none=True)
        is_finite = loss is None or bool(torch.isfinite(loss))
        self._count_skip(is_finite=is_finite)
        if loss is not None and is_finite:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._adapter.parameters(), settings.max_grad_norm)
            self._optimizer.step()
            self._adapter.refold()
        self.num_done += 1
        self._trace.append(
            {
                "step": self.num_done,
                "reward": rollout.rewards.mean().item(),
                "kl": kl if is_finite else None,
                "loss": None if loss is None or not is_finite else loss.item(),
                "flat_groups": rollout.num_flat_groups,
                "failed": rollout.num_failed,
            }
        )

    def _count_skip(self, *, is_finite: bool) -> None:
        """Never step on NaN or Inf: count such losses, and stop after too many in a row with the deltas as they are."""
        self._num_skipped = 0 if is_finite else self._num_skipped + 1
        if self._num_skipped >= self._settings.optimizer.max_consecutive_skips:
            msg = (
                f"the policy loss was not finite {self._num_skipped} times in a row: lower the learning rate; "
                "the last good state is kept"
            )
            raise MeasurementError(msg)

    def expert(self) -> Expert:
        """Return the best state as an expert file's content."""
        return Expert(
            domain=self._domain,
            deltas=self._best,
            base_hash=self._base.weight_hash,
            basis_hash=self._basis.hash,
            settings={**dataclasses.asdict(self._settings), **_prompting(self._base), "trace": self._trace},
            seed=self._settings.seed,
            score={**self._best_score, "split": "search"},
        )

    def save(self) -> None:
        """Write the state of training atomically."""
        tensors = {f"delta.{name}": value for name, value in self._adapter.snapshot().items()}
        tensors |= {f"best.{name}": value for name, value in self._best.items()}
        state = self._optimizer.state_dict()
        plain, flat = _flattened(state)
        tensors |= {f"optimizer.{name}": value for name, value in flat.items()}
        metadata = {
            "key": self._key,
            "progress": json.dumps({"done": self.num_done, "best": self._best_score, "trace": self._trace}),
            "optimizer": json.dumps(plain),
        }
        storage.write_bytes(self._state_path, safetensors.torch.save(tensors, metadata))

    def _resume(self) -> None:
        if not self._state_path.exists():
            return
        try:
            with safetensors.safe_open(self._state_path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (safetensors.SafetensorError, OSError) as error:
            msg = f"{self._state_path}: not a training state ({error}); remove it to start again"
            raise HavocError(msg) from error
        if metadata.get("key") != self._key:
            msg = (
                f"{self._state_path} is a training of another base or other settings; remove it or choose another --out"
            )
            raise HavocError(msg)
        progress = json.loads(metadata["progress"])
        self.num_done, self._best_score, self._trace = progress["done"], progress["best"], progress["trace"]
        self._adapter.load({n.removeprefix("delta."): t for n, t in tensors.items() if n.startswith("delta.")})
        self._best = {n.removeprefix("best."): t for n, t in tensors.items() if n.startswith("best.")}
        flat = {n.removeprefix("optimizer."): t for n, t in tensors.items() if n.startswith("optimizer.")}
        self._optimizer.load_state_dict(_unflattened(json.loads(metadata["optimizer"]), flat))


def _flattened(value: Any, prefix: str = "") -> tuple[Any, dict[str, torch.Tensor]]:  # noqa: ANN401 - a state dict
    """Split a nested state dict into JSON with tensor references and the tensors themselves."""
    if isinstance(value, torch.Tensor):
        return {"tensor": prefix}, {prefix: value.detach().clone().contiguous()}
    if isinstance(value, dict):
        parts = {key: _flattened(item, f"{prefix}/{key}") for key, item in value.items()}
        plain = {"dict": [[key, part[0]] for key, part in parts.items()]}
        return plain, {name: tensor for part in parts.values() for name, tensor in part[1].items()}
    if isinstance(value, list | tuple):
        items = [_flattened(item, f"{prefix}/{index}") for index, item in enumerate(value)]
        plain = {"tuple" if isinstance(value, tuple) else "list": [item[0] for item in items]}
        return plain, {name: tensor for item in items for name, tensor in item[1].items()}
    return {"value": value}, {}


def _unflattened(plain: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:  # noqa: ANN401 - a state dict
    ((kind, content),) = plain.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflattened(item, tensors) for key, item in content}
    if kind in {"list", "tuple"}:
        items = [_unflattened(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    return content


def _prompting(base: Base) -> dict[str, Any]:
    """What an expert's settings say of its prompts where they went through the base's chat template."""
    return {} if base.tokenizer.chat is None else {"chat": True}


def sample_rollout(base: Base, domain: str, rows: Sequence[Row], settings: ReinforceSettings, *, seed: int) -> Rollout:
    """Sample S completions for each row from the current policy and judge them; failed judgements get advantage 0."""
    task, num_samples = task_for(domain), settings.samples_per_prompt
    ids_BT, mask_BT, patches = encode_prompts(base.model, base.tokenizer, [task.prompt(row) for row in rows])
    new_BN = sample_tokens(
        base.model,
        ids_BT,
        mask_BT,
        patches,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        generator=torch.Generator().manual_seed(seed),
        eos_id=base.tokenizer.eos_ids,
        num_samples=num_samples,
    ).clone()
    repeated = torch.arange(len(rows)).repeat_interleave(num_samples)
    texts = completions(base.tokenizer, ids_BT[repeated], mask_BT[repeated], new_BN)
    pairs = [(rows[index // num_samples], text) for index, text in enumerate(texts)]
    rewards = task.judge(pairs)
    is_judged = torch.tensor([reward.outcome != "failed" for reward in rewards])
    values = torch.tensor([reward.value for reward in rewards])
    advantages, num_flat = leave_one_out(values.view(-1, num_samples), is_judged.view(-1, num_samples))
    return Rollout(
        ids=torch.cat((ids_BT[repeated], new_BN), dim=1),
        mask=torch.cat((mask_BT[repeated], _generated_mask(new_BN, base.tokenizer.eos_ids)), dim=1),
        patches=None if patches is None else patches.view(len(rows), -1, patches.shape[-1])[repeated],
        num_prompt_tokens=ids_BT.shape[1],
        rewards=values[is_judged] if is_judged.any() else values,
        advantages=advantages.flatten(),
        num_failed=int((~is_judged).sum()),
        num_flat_groups=num_flat,
    )


def _generated_mask(new_BN: torch.Tensor, eos_ids: Sequence[int]) -> torch.Tensor:
    """1 for generated tokens up to and with the first end token, 0 for the padding behind it: int64 [B, N]."""
    is_end = torch.isin(new_BN, torch.tensor(eos_ids)).long()
    return ((is_end.cumsum(dim=1) - is_end) == 0).long()


def leave_one_out(rewards_PS: torch.Tensor, is_judged_PS: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Advantages [P, S]: each reward less the mean of the prompt's others judged; and the number of flat prompts.

    A completion that was not judged, or has no judged neighbour, gets 0.
    """
    judged = is_judged_PS.float()
    total = (rewards_PS * judged).sum(dim=1, keepdim=True)
    num_others = judged.sum(dim=1, keepdim=True) - judged
    others = (total - rewards_PS * judged) / num_others.clamp(min=1)
    advantages = torch.where((num_others > 0) & is_judged_PS, rewards_PS - others, 0.0)
    return advantages, int((advantages.abs().amax(dim=1) < _MIN_PROBABILITY_OF_SIGNAL).sum())


def policy_loss(
    base: Base, adapter: SingularValueAdapter, rollout: Rollout, *, kl_coefficient: float
) -> tuple[torch.Tensor | None, float]:
    """Loss of the module docstring over the rows that carry signal, and their mean KL in nats a token.

    Returns (None, 0.0) when no row does. Both terms are divided by the number of all sampled rows, so that a batch with
    little signal takes a small step.
    """
    kept = rollout.advantages.nonzero()[:, 0]
    if len(kept) == 0:
        return None, 0.0
    ids, mask, start = rollout.ids[kept], rollout.mask[kept], rollout.num_prompt_tokens
    patches = None if rollout.patches is None else rollout.patches[kept].flatten(0, 1)
    weight_BN = mask[:, start:].float()
    log_p_BNV = _log_probabilities(base, ids, mask, patches, start)
    with torch.no_grad(), adapter.disabled():
        log_base_BNV = _log_probabilities(base, ids, mask, patches, start)
    log_taken_BN = log_p_BNV.gather(2, ids[:, start:].unsqueeze(2)).squeeze(2)
    policy = -(rollout.advantages[kept] * (log_taken_BN * weight_BN).sum(dim=1)).sum()
    kl_BN = (log_p_BNV.exp() * (log_p_BNV - log_base_BNV)).sum(dim=2)
    kl_B = (kl_BN * weight_BN).sum(dim=1) / weight_BN.sum(dim=1)
    loss = (policy + kl_coefficient * kl_B.sum()) / len(rollout.advantages)
    return loss, kl_B.mean().item()


def _log_probabilities(
    base: Base, ids: torch.Tensor, mask: torch.Tensor, patches: torch.Tensor | None, start: int
) -> torch.Tensor:
    """Log-probabilities [B, N, V] of the next token at every position that precedes a generated one."""
    logits = base.model(ids, mask, patches=patches)
    return torch.log_softmax(logits[:, start - 1 : -1].float(), dim=-1)
