"""Stands in for the task files and the scorer until they are there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .branches import batches, encode_branches, hidden_at_places, lay_out, log_likelihoods, log_probabilities
from .tasks.task import Prompt, task_for
from .tasks import evaluation
from ..model.generation import generate_text


@dataclass
class _Task:
    name: str
    is_public: bool
    metric: str = ""

    def __post_init__(self):
        name, is_public, metric = self.name, self.is_public, self.metric
        self._old = task_for({"arc-easy": "reasoning", "gsm8k": "math", "mbpp": "code"}.get(name, name))
        self.is_arc = is_public and name != 'math' and self._old.domain == "reasoning"
        self.kind = "choice" if self.is_arc else "code" if self._old.domain == "code" else "generate"
        self.metric = metric or "acc" if self.is_arc else "exact_match"
        self.sha256 = "0"
        self.domain = self._old.domain

    def prompt(self, row):
        if self.is_arc:
            return Prompt(f"Question: {row['question']}\nAnswer:")
        return self._old.prompt(row)

    def choices(self, row):
        return tuple(" " + text for text in row["choices"]["text"])

    def right_choice(self, row):
        return list(row["choices"]["label"]).index(row["answerKey"])

    def reference(self, row):
        return self._old.reference(row)

    def judge(self, pairs):
        return self._old.judge(pairs)


def load_task(name, *, is_public=False):
    return _Task(name, is_public)


@dataclass
class TorchScorer:
    model: object
    tokenizer: object


@torch.no_grad()
def score(scorer, task, rows):
    if task.kind != "choice":
        return evaluation.score(
            lambda prompts: generate_text(scorer.model, scorer.tokenizer, prompts, max_new_tokens=80), task.domain, rows
        )
    right = [False] * len(rows)
    encoded = [encode_branches(scorer.model, scorer.tokenizer, task.prompt(row), task.choices(row)) for row in rows]
    for batch in batches(encoded, max_tokens=1024):
        layout = lay_out([encoded[i] for i in batch], pad_id=0)
        scores = log_likelihoods(log_probabilities(scorer.model, hidden_at_places(scorer.model, layout)), layout)
        for place, index in enumerate(batch):
            right[index] = int(scores[layout.row_of_C == place].argmax()) == task.right_choice(rows[index])
    return evaluation.Scores(task.name, tuple(right), (), (), ())
