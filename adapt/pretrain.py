"""Make a base from scratch: train the tokenizer and the decoder on the built-in corpus, and record how.

`havoc pretrain nano --out DIR` writes a Hugging Face directory whose `pretraining.json` holds the recipe, the seed, the
hashes of the data, the loss curve and the time. The loss is cross-entropy on the completions. `MuonGrokfast` trains
matrices with Muon, embeddings and vectors with AdamW, here without its gradient filter; both follow one schedule of
linear warm-up and linear decay. An interrupted run continues from its last checkpoint with the same steps.

Shapes: B sequences, T tokens, P patches, F values in a patch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch.nn import functional

from .. import storage
from ..errors import HavocError, MeasurementError
from ..model.config import HavocConfig
from ..model.device import made_on, open_device, place_of
from ..model.tokenizer import Tokenizer, train_tokenizer
from ..model.transformer import HavocModel
from ..model.vision import patchify
from ..progress import SILENT, Progress
from .base_card import write_base
from .optimizer import MuGrokConfig, MuonGrokfast
from .tasks import sources
from .tasks.names import DOMAINS
from .tasks.splits import generated_rows
from .tasks.task import Row, load_task

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from ..cores import TorchDevice

_IGNORED = -100
CHECKPOINT = "pretraining.safetensors"
_OPTIMIZER = "optimizer."
_NUM_CURVE_POINTS = 200
_PIECE_ROWS = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class DescentSettings:
    """Settings besides the data: `num_steps` of `batch_size` sequences, learning rates at their peak."""

    seed: int = 0
    num_steps: int = 2600
    batch_size: int = 64
    muon_learning_rate: float = 0.01
    adam_learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup_share: float = 0.02
    checkpoint_every: int = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainSettings(DescentSettings):
    """The recipe of a base on the built-in corpus: everything but the preset that the weights depend on.

    `rows_per_domain` rows of each domain's train split are cycled through the steps, an equal share from each domain,
    which also weighs the same in the loss. At the end the base answers `num_accuracy_rows` of each search split.
    """

    rows_per_domain: int = 30_000
    num_tokenizer_rows: int = 4_000
    num_accuracy_rows: int = 500


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Right-padded sequences of one domain: `ids` and `labels` int64 [B, T], `patches` float32 [P, F] or None."""

    ids: torch.Tensor
    labels: torch.Tensor
    patches: torch.Tensor | None

    def to(self, device: torch.device) -> TokenBatch:
        """Return the same batch on `device`."""
        patches = None if self.patches is None else self.patches.to(device)
        return TokenBatch(self.ids.to(device), self.labels.to(device), patches)


def pretrain(
    preset: str,
    out: Path,
    *,
    settings: PretrainSettings | None = None,
    tokenizer: Tokenizer | None = None,
    device: TorchDevice = "cpu",
    progress: Progress = SILENT,
) -> Path:
    """Train `preset` on the built-in corpus and write the base to `out`; return `out`.

    `tokenizer` reads and writes the texts; None trains one on them. The initial weights are the same on every `device`,
    and the record names the device. Raises `HavocError` for a preset that is not a vision model or whose vocabulary the
    corpus cannot fill, and for a tokenizer that does not fit the preset; `IdentityError` for a missing device; and
    `MeasurementError` if the loss is no longer finite.
    """
    settings, place = settings or PretrainSettings(), open_device(device)
    if (out / "model.safetensors").exists():
        raise HavocError(f"{out} holds a finished base; remove it or choose another --out")
    torch.manual_seed(settings.seed)
    config = HavocConfig.preset(preset)
    if config.vision is None:
        raise HavocError(
            f"preset {preset!r} reads no images and the built-in corpus has a vision domain: use nano, or give texts "
            "of your own (--text)"
        )
    if tokenizer is not None:
        require_fit(tokenizer, preset, config)
    rows = {domain: _train_rows(domain, settings, progress) for domain in DOMAINS}
    data = {domain: sources.rows_hash(domain_rows) for domain, domain_rows in rows.items()}
    given = {} if tokenizer is None else {"tokenizer": sha256_of(tokenizer)}
    tokenizer = tokenizer or _trained_tokenizer(rows, settings, config, progress)
    tokenizer.save(out)
    model = HavocModel(config).to(place)
    trainer = Trainer(model, settings, out / CHECKPOINT, key=run_key(preset, settings, data | given))
    trainer.run(_batches(rows, tokenizer, config, settings, trainer.num_done), preset, progress)
    record = trainer.record(preset, data) | given
    write_base(out, model, tokenizer, record, progress=progress)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return out


def run_key(preset: str, settings: DescentSettings, data: dict[str, str]) -> str:
    """Name everything the weights depend on, so that a checkpoint of anything else is refused."""
    return storage.sha256_json({"preset": preset, "settings": dataclasses.asdict(settings), "data": data})


def _train_rows(domain: str, settings: PretrainSettings, progress: Progress) -> list[Row]:
    """The rows of `sources.rows`, made a piece at a time so that it can be seen how far that is."""
    rows: list[Row] = []
    made = generated_rows(load_task(domain), "train", settings.seed)
    with progress.stage(f"rows of {domain}", settings.rows_per_domain, unit="rows") as stage:
        while piece := list(itertools.islice(made, min(_PIECE_ROWS, settings.rows_per_domain - len(rows)))):
            rows += piece
            stage.advance(len(piece))
    return rows


def _trained_tokenizer(
    rows: dict[str, list[Row]], settings: PretrainSettings, config: HavocConfig, progress: Progress
) -> Tokenizer:
    rng = random.Random(settings.seed)
    texts = []
    num_texts = sum(min(len(domain_rows), settings.num_tokenizer_rows) for domain_rows in rows.values())
    with progress.stage("tokenizer", num_texts, unit="texts") as stage:
        for domain, domain_rows in rows.items():
            task = load_task(domain)
            for row in domain_rows[: settings.num_tokenizer_rows]:
                texts.append(task.prompt(row).text + task.corpus(row, rng))
                stage.advance()
        return train_tokenizer(texts, config.vocab_size)


def require_fit(tokenizer: Tokenizer, preset: str, config: HavocConfig) -> None:
    """Refuse a tokenizer with more ids than the preset has rows, or with other ids for special tokens."""
    if tokenizer.largest_id >= config.vocab_size:
        raise HavocError(
            f"the tokenizer has ids up to {tokenizer.largest_id}, and preset {preset!r} has {config.vocab_size}: train "
            f"one with --vocab-size {config.vocab_size} or less"
        )
    image_id = None if config.vision is None else config.vision.image_token_id
    found = (tokenizer.bos_id, tokenizer.eos_ids, None if config.vision is None else tokenizer.image_id)
    if found != (config.bos_token_id, config.eos_token_ids, image_id):
        raise HavocError(
            f"the tokenizer's <bos>, <eos> and <image> are not where preset {preset!r} has them "
            f"({config.bos_token_id}, {config.eos_token_id}, {image_id}): train one with `havoc tokenizer train`"
        )


def sha256_of(tokenizer: Tokenizer) -> str:
    """Hex SHA-256 of the tokenizer's own file."""
    return hashlib.sha256(tokenizer.files()["tokenizer.json"]).hexdigest()


def _batches(
    rows: dict[str, list[Row]], tokenizer: Tokenizer, config: HavocConfig, settings: PretrainSettings, num_done: int
) -> Iterator[list[TokenBatch]]:
    """Yield one batch per domain, with similar lengths, from step `num_done` on; step n depends only on seed and n."""
    share = settings.batch_size // len(rows)
    for step in range(num_done, settings.num_steps):
        rng = random.Random(f"{settings.seed}:{step}")
        yield [
            collate(
                [_document(domain, row, rng) for row in _slice(rows[domain], step * share, share)], tokenizer, config
            )
            for domain in rows
        ]


def _slice(rows: list[Row], start: int, size: int) -> list[Row]:
    start %= max(1, len(rows) - size + 1)
    return rows[start : start + size]


def _document(domain: str, row: Row, rng: random.Random) -> tuple[str, str, bytes | None]:
    task = load_task(domain)
    prompt = task.prompt(row)
    return prompt.text, task.corpus(row, rng), prompt.image_png


def collate(documents: list[tuple[str, str, bytes | None]], tokenizer: Tokenizer, config: HavocConfig) -> TokenBatch:
    """Encode (prompt, completion, PNG or None) documents, right-padded; prompts carry no loss."""
    sequences, labels, patches = [], [], []
    for text, completion, image_png in documents:
        image = None if image_png is None or config.vision is None else patchify(image_png, config.vision)
        if image is not None:
            patches.append(torch.from_numpy(image))
        prompt = tokenizer.encode_prompt(text, num_patches=0 if image is None else len(image))
        answer = [*tokenizer.encode(completion), tokenizer.eos_id]
        sequences.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([_IGNORED] * len(prompt) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    return TokenBatch(
        ids=pad(sequences, batch_first=True, padding_value=tokenizer.pad_id),
        labels=pad(labels, batch_first=True, padding_value=_IGNORED),
        patches=torch.cat(patches) if patches else None,
    )


def optimizer_settings(settings: DescentSettings) -> MuGrokConfig:
    """Translate a recipe into the optimizer's settings: no filter, and Muon for groups that ask for it."""
    return MuGrokConfig(
        enable_muon=True,
        muon_lr=settings.muon_learning_rate,
        muon_weight_decay=settings.weight_decay,
        fallback_lr=settings.adam_learning_rate,
        fallback_betas=(0.9, 0.98),
        fallback_weight_decay=0.0,
        enable_grokfast=False,
        keep_last_good=False,
        phase_name="pretraining",
    )


class Trainer:
    """Weights, optimizer and the loss curve; the state that a checkpoint holds."""

    def __init__(self, model: HavocModel, settings: DescentSettings, checkpoint: Path, *, key: str) -> None:
        """Begin, or continue from `checkpoint`; one with another `key` or device is a `HavocError`."""
        matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name]
        matrix_ids = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in matrix_ids]
        self.model = model.train()
        self._settings = settings
        self._checkpoint = checkpoint
        self._key = key
        groups = [{"params": matrices, "enable_muon": True}, {"params": others, "enable_muon": False}]
        self._optimizer = MuonGrokfast(groups, optimizer_settings(settings))
        self.losses: list[float] = []
        self.seconds = 0.0
        self._resume()

    @property
    def num_done(self) -> int:
        """Steps taken so far, over all runs."""
        return len(self.losses)

    def run(self, steps: Iterable[Sequence[TokenBatch]], preset: str, progress: Progress) -> None:
        """Take the steps that are left."""
        with progress.stage(f"pretraining {preset}", self._settings.num_steps) as stage:
            stage.advance(self.num_done)
            for batches in steps:
                loss = self.step(batches)
                stage.advance(note=f"loss {loss:.3f}")

    def record(self, preset: str, data: dict[str, str]) -> dict[str, Any]:
        """Data, device and course of the training: the content of `pretraining.json`."""
        every = max(1, len(self.losses) // _NUM_CURVE_POINTS)
        return {
            "preset": preset,
            "settings": dataclasses.asdict(self._settings),
            "data": data,
            "torch": torch.__version__,
            "num_threads": torch.get_num_threads(),
            "seconds": round(self.seconds, 1),
            "loss": [round(loss, 4) for loss in self.losses[::every]],
            "made_on": made_on(self.model.device),
        }

    def step(self, batches: Sequence[TokenBatch]) -> float:
        """Take one optimizer step; return the mean over the batches of the cross-entropy in nats per token."""
        start = time.perf_counter()
        self._set_learning_rates()
        self._optimizer.zero_grad(set_to_none=True)
        value = 0.0
        for batch in batches:
            loss = self._loss(batch.to(self.model.device)) / len(batches)
            loss.backward()
            value += loss.item()
        if not math.isfinite(value):
            raise MeasurementError(
                f"loss is {value} at step {self.num_done}: lower the learning rates; the last checkpoint is kept"
            )
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self.losses.append(value)
        self.seconds += time.perf_counter() - start
        if self.num_done % self._settings.checkpoint_every == 0:
            self._save()
        return value

    def _loss(self, batch: TokenBatch) -> torch.Tensor:
        targets = batch.labels[:, 1:]
        is_scored = targets != _IGNORED
        logits = self.model(batch.ids[:, :-1], patches=batch.patches)
        return functional.cross_entropy(logits[is_scored], targets[is_scored])

    def _set_learning_rates(self) -> None:
        warmup = max(1, round(self._settings.warmup_share * self._settings.num_steps))
        left = (self._settings.num_steps - self.num_done) / max(1, self._settings.num_steps - warmup)
        scale = min((self.num_done + 1) / warmup, left, 1.0)
        config = self._optimizer.config
        for group in self._optimizer.param_groups:
            group["lr"] = scale * (config.muon_lr if group["route"] == "muon" else config.fallback_lr)

    def _save(self) -> None:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, state in self._optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"{_OPTIMIZER}{index}.{key}"] = torch.as_tensor(value)
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        unshared = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
        texts = {"key": self._key, "place": place_of(self.model.device)}
        storage.write_bytes(self._checkpoint, safetensors.torch.save(unshared, texts))

    def _resume(self) -> None:
        if not self._checkpoint.exists():
            return
        with safetensors.safe_open(self._checkpoint, "pt") as file:
            texts, place = file.metadata() or {}, place_of(self.model.device)
            if texts.get("key") != self._key:
                raise HavocError(
                    f"{self._checkpoint} is a run with other settings or data; remove it or choose another --out"
                )
            if (began_on := texts.get("place", "cpu")) != place:
                raise HavocError(
                    f"{self._checkpoint}: the run began on {began_on}, but this is {place}: continue there, or remove "
                    "the checkpoint to start again"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        self.model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            if name.startswith(_OPTIMIZER):
                index, key = name.removeprefix(_OPTIMIZER).split(".", 1)
                state.setdefault(int(index), {})[key] = tensor if tensor.ndim else tensor.item()
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
        self.losses = tensors["losses"].tolist()
        self.seconds = float(tensors["seconds"])
