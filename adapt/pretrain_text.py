"""Make a base from scratch on the user's texts: any preset, any UTF-8 text.

`havoc pretrain PRESET --text FILE... --out DIR` trains a tokenizer on the texts, or uses a given one, joins their
tokens with the end token after each file, and trains the decoder to predict the next token in random windows. The last
part of every file is held out: `pretraining.json` has the finished base's nats per held-out token. Everything else is
as on the built-in corpus (`pretrain.py`): optimizer, checkpoints, files.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from .. import storage
from ..errors import HavocError, printable
from ..model.config import HavocConfig
from ..model.device import open_device
from ..model.tokenizer import train_tokenizer
from ..model.transformer import HavocModel
from ..progress import SILENT, Progress
from .pretrain import CHECKPOINT, DescentSettings, TokenBatch, Trainer, require_fit, run_key, sha256_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from ..cores import TorchDevice
    from ..model.tokenizer import Tokenizer

_LONGEST_TOLD = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSettings(DescentSettings):
    """The recipe of a base on texts: windows of `window_tokens`, and the share of every file that is held out."""

    batch_size: int = 32
    window_tokens: int = 256
    held_out_share: float = 0.05


def pretrain_text(
    preset: str,
    texts: Mapping[str, str],
    out: Path,
    *,
    settings: TextSettings | None = None,
    tokenizer: Tokenizer | None = None,
    device: TorchDevice = "cpu",
    progress: Progress = SILENT,
) -> Path:
    """Train `preset` on `texts`, by the names they are recorded under, and write the base to `out`; return `out`.

    Raises `HavocError` for texts with fewer tokens than a window and for a tokenizer that does not fit the preset,
    `IdentityError` for a device that is not there, and `MeasurementError` when the loss stops being finite.
    """
    settings, place = settings or TextSettings(), open_device(device)
    if (out / "model.safetensors").exists():
        raise HavocError(f"{out} holds a finished base; remove it or choose another --out")
    torch.manual_seed(settings.seed)
    config = HavocConfig.preset(preset)
    given = {} if tokenizer is None else {"tokenizer": sha256_of(tokenizer)}
    if tokenizer is None:
        with progress.stage("tokenizer", None):
            tokenizer = train_tokenizer(
                (line for text in texts.values() for line in text.splitlines(True)), config.vocab_size
            )
    require_fit(tokenizer, preset, config)
    train_ids, held_out_ids = _parted(_encoded(texts, tokenizer, progress), settings)
    window = min(settings.window_tokens, config.max_seq_len)
    if len(train_ids) <= window:
        raise HavocError(
            f"the texts have {len(train_ids)} tokens to train on, and one window takes {window}: give more text"
        )
    data = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    tokenizer.save(out)
    model = HavocModel(config).to(place)
    trainer = Trainer(model, settings, out / CHECKPOINT, key=run_key(preset, settings, data | given))
    trainer.run(_batches(train_ids, window, settings, trainer.num_done), preset, progress)
    model.eval().half().float()
    nats = held_out_nats(model, held_out_ids, window=window)
    held_out = {"num_tokens": len(held_out_ids), "nats_per_token": None if nats is None else round(nats, 4)}
    sizes = {"num_parameters": model.num_parameters(), "num_tokens": len(train_ids)}
    record = trainer.record(preset, data) | given | sizes | {"held_out": held_out}
    storage.write_json(out / "pretraining.json", record)
    storage.write_text(out / "README.md", text_card(record))
    model.half().save_pretrained(out)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return out


def _encoded(texts: Mapping[str, str], tokenizer: Tokenizer, progress: Progress) -> list[list[int]]:
    """Token ids of each text, with the end token after it."""
    encoded = []
    with progress.stage("tokens of the texts", len(texts), unit="texts") as stage:
        for name, text in texts.items():
            encoded.append([*tokenizer.encode(text), tokenizer.eos_ids[0]])
            stage.advance(note=name)
    return encoded


def _parted(encoded: list[list[int]], settings: TextSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids to train on, and the held-out end of every text: each int64 [T]."""
    ends = [len(ids) - math.ceil(settings.held_out_share * len(ids)) for ids in encoded]
    pairs = list(zip(encoded, ends, strict=True))
    train = [token for ids, end in pairs for token in ids[:end]]
    return torch.tensor(train), torch.tensor([token for ids, end in pairs for token in ids[end:]])


def _batches(ids: torch.Tensor, window: int, settings: TextSettings, num_done: int) -> Iterator[list[TokenBatch]]:
    """Yield a batch of windows [B, T] from step `num_done` on; step n depends only on the seed and n."""
    for step in range(num_done, settings.num_steps):
        rng = random.Random(f"{settings.seed}:{step}")
        starts = [rng.randrange(len(ids) - window + 1) for _ in range(settings.batch_size)]
        windows_BT = torch.stack([ids[start : start + window] for start in starts])
        yield [TokenBatch(windows_BT, windows_BT, None)]


@torch.inference_mode()
def held_out_nats(model: HavocModel, ids: torch.Tensor, *, window: int) -> float | None:
    """Mean cross-entropy in nats of each token given those before it in its window; None without tokens."""
    total, num_tokens = 0.0, 0
    for piece in ids.to(model.device).split(window):
        if len(piece) > 1:
            logits_1TV = model(piece[None, :-1])
            total += functional.cross_entropy(logits_1TV[0].float(), piece[1:], reduction="sum").item()
            num_tokens += len(piece) - 1
    return total / num_tokens if num_tokens else None


def text_card(record: Mapping[str, Any]) -> str:
    """Return the README of a base on texts: how it was made, and what is known about it."""
    settings, held_out, made_on = record["settings"], record["held_out"], record["made_on"]
    nats = held_out["nats_per_token"]
    known = (
        "No token was held out, so the quality of its predictions is unknown."
        if nats is None
        else f"A token of the held-out ends of the texts ({held_out['num_tokens']:,} tokens) costs it {nats:.3f} nats."
    )
    names = list(record["data"].items())
    rows = "\n".join(f"| {printable(name).replace('|', ' ')} | {sha[:16]} |" for name, sha in names[:_LONGEST_TOLD])
    more = f"\n{len(names) - _LONGEST_TOLD} more are in `pretraining.json`.\n" if len(names) > _LONGEST_TOLD else ""
    return f"""---
library_name: havoc-core
pipeline_tag: text-generation
---
# HAVOC {record["preset"]}, on texts

A decoder of {record["num_parameters"]:,} parameters, from scratch by `havoc pretrain {record["preset"]} --text`:
{settings["num_steps"]:,} steps of {settings["batch_size"]} windows of {settings["window_tokens"]} tokens, drawn from
{record["num_tokens"]:,}, seed {settings["seed"]}, on {made_on["name"]} ({made_on["device"]}, {made_on["dtype"]}) with
torch {record["torch"]}. The recipe and the loss curve are in `pretraining.json`.

{known} It was trained on no task: `havoc eval` says what it answers.

| text | SHA-256 |
|---|---|
{rows}
{more}"""
