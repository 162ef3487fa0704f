"""What goes with the weights of a pretrained base: the record of its training, its accuracy and a model card.

Accuracy is that of the fp16 weights that are shipped, greedy, on the search split: the gate split stays closed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import storage
from ..model.scorer import TorchScorer
from ..progress import SILENT, Progress
from .tasks.evaluation import Scoring, evaluate
from .tasks.names import DOMAINS
from .tasks.task import load_task

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..model.tokenizer import Tokenizer
    from ..model.transformer import HavocModel


def write_base(
    out: Path, model: HavocModel, tokenizer: Tokenizer, record: Mapping[str, Any], *, progress: Progress = SILENT
) -> None:
    """Score the model, then write record and card, and last the fp16 weights: they are the mark of a finished base."""
    model.eval().half().float()
    num_rows = record["settings"]["num_accuracy_rows"]
    accuracy = search_accuracy(model, tokenizer, num_rows=num_rows, progress=progress)
    whole = {**record, "num_parameters": model.num_parameters(), "accuracy": accuracy}
    storage.write_json(out / "pretraining.json", whole)
    storage.write_text(out / "README.md", model_card(whole))
    model.half().save_pretrained(out)


def search_accuracy(
    model: HavocModel, tokenizer: Tokenizer, *, num_rows: int, progress: Progress = SILENT
) -> dict[str, dict[str, float]]:
    """Greedy accuracy on rows of the search split by domain, with exact 95 % intervals."""
    found, scoring = {}, Scoring(split="search", num_rows=num_rows)
    with progress.stage("accuracy of the base", len(DOMAINS)) as stage:
        for domain in DOMAINS:
            _, scores = evaluate(TorchScorer(model, tokenizer), load_task(domain), scoring)
            counts = scores.accuracy.document()
            found[domain] = {**counts, "low": round(counts["low"], 4), "high": round(counts["high"], 4)}
            stage.advance(note=domain)
    return found


def model_card(record: Mapping[str, Any]) -> str:
    """Return the README of a base: what it is, how it was made, what it can do and what it is not for."""
    settings, first, last = record["settings"], record["loss"][0], record["loss"][-1]
    scores = "\n".join(_score_line(domain, counts) for domain, counts in record["accuracy"].items())
    data = "\n".join(
        f"| {domain} | {load_task(domain, is_public=True).definition.data.hub} | {sha[:16]} |"
        for domain, sha in record["data"].items()
    )
    return f"""---
license: apache-2.0
library_name: havoc-core
pipeline_tag: image-text-to-text
---
# HAVOC {record["preset"]}

A text and vision decoder of {record["num_parameters"]:,} parameters, small enough that a laptop trains, searches,
exports and measures it in minutes. It exists to run all of HAVOC for real; it knows only four procedural tasks.

## How it was made

`havoc pretrain {record["preset"]} --out DIR`: {settings["num_steps"]:,} steps of {settings["batch_size"]} sequences,
seed {settings["seed"]}, Muon for matrices and AdamW for the rest, {record["seconds"] / 60:.1f} minutes of training on
{_where(record)} with torch {record["torch"]}; loss {first:.2f} to {last:.3f} nats a token. The
recipe, the hashes of the data and the loss curve are in `pretraining.json`.

The corpus is the train split of the built-in tasks. Like real corpora, it mixes sources that show their steps with
sources that do not (answer keys, Python 2 pages), so the base can solve a problem step by step, but often does not.
An expert changes that.

| domain | columns of | SHA-256 of the rows |
|---|---|---|
{data}

## What it can do

Greedy, on rows of the search split, with exact 95 % intervals:

| domain | accuracy | interval | rows |
|---|---|---|---|
{scores}

## What it is not for

Anything but these tasks. It has seen no natural text, no photographs and no code beyond the built-in families.
"""


def _where(record: Mapping[str, Any]) -> str:
    """The device that trained it; older records do not name it."""
    made_on = record.get("made_on", {"device": "cpu"})
    if made_on["device"] == "cpu":
        return f"{record['num_threads']} CPU thread(s)"
    return f"{made_on['name']} ({made_on['device']}, {made_on['dtype']})"


def _score_line(domain: str, counts: Mapping[str, float]) -> str:
    share = counts["num_right"] / counts["num_rows"]
    return f"| {domain} | {share:.1%} | {counts['low']:.1%} to {counts['high']:.1%} | {counts['num_rows']} |"
