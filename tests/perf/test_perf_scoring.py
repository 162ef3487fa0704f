"""Rows a second of choices scored by likelihood: HAVOC with torch and its artifact over lm-evaluation-harness.

The same weights, rows and CPU, one thread each, in turns within one run; lm-evaluation-harness with its hf backend.
With HAVOC_REAL_MODEL and HAVOC_REAL_DATA model and rows are real; else edge-135m has random weights and the rows are
those that HAVOC makes, with the columns of ARC-Easy.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from havoc_core.adapt.tasks import sources
from havoc_core.adapt.tasks.task import load_task
from havoc_core.export.huggingface import export_huggingface
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.model.checkpoint import BUNDLED_NANO, load_base
from havoc_core.model.scorer import TorchScorer
from tests.perf.turns import best_times_s

NUM_ROWS, NUM_ROUNDS, LEAST, GOAL = 40, 3, 1.0, 2.0
LM_EVAL_BATCHES = (4, 16)
"""Sizes of batch that lm-evaluation-harness may choose from; the faster one counts."""


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real base as a Hugging Face directory, or random weights of the same shape; any tokenizer will do then."""
    if given := os.environ.get("HAVOC_REAL_MODEL"):
        if Path(given).is_dir():
            return Path(given)
        return export_huggingface(given, tmp_path_factory.mktemp("scoring") / "base")
    directory = export_huggingface("edge-135m", tmp_path_factory.mktemp("scoring") / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED_NANO / file, directory / file)
    return directory


def requests(num_shots: int) -> list[tuple[Any, Sequence[str]]]:
    """Prompts and choices of ARC-Easy's form."""
    if data := os.environ.get("HAVOC_REAL_DATA"):
        task = load_task("arc-easy", data_dir=Path(data), few_shot=num_shots)
        rows = sources.rows(task, "gate", NUM_ROWS, data_dir=Path(data))
    else:
        task, rows = load_task("arc-easy"), sources.rows("reasoning", "gate", NUM_ROWS)
    return [(task.prompt(row), task.choices(row)) for row in rows]


def lm_eval_backend(base: Path, batch_size: int) -> Callable[[Sequence[Any]], object]:
    """Its own measure of the same pairs, with everything but its loading inside."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(base), device="cpu", dtype="float32", batch_size=batch_size)

    def scored(asked: Sequence[Any]) -> object:
        pairs = [(prompt.text, choice) for prompt, choices in asked for choice in choices]
        instances = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
        return model.loglikelihood(instances, disable_tqdm=True)

    return scored


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_shots", [0, 5])
def test_rows_a_second(one_thread: None, base: Path, tmp_path: Path, benchmark: Any, row: Any, num_shots: int) -> None:
    """At least as many as lm-evaluation-harness's hf backend, and twice as many for the goal."""
    if num_shots and not os.environ.get("HAVOC_REAL_DATA"):
        pytest.skip("HAVOC_REAL_DATA is not set: the solved rows are read from it")
    asked = requests(num_shots)
    loaded = load_base(str(base), is_chat=False)
    torch_scorer = TorchScorer(loaded.model, loaded.tokenizer)
    session = DecoderSession.open(export_artifact(base, tmp_path / "a"), num_threads=1, is_chat=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lm-eval's libraries
        theirs = [lm_eval_backend(base, size) for size in LM_EVAL_BATCHES]
        found = best_times_s(
            lambda: torch_scorer.log_likelihoods(asked),
            lambda: session.log_likelihoods(asked),
            *(lambda way=way: way(asked) for way in theirs),
            num_rounds=NUM_ROUNDS,
        )
    ours_s, artifact_s, theirs_s = found[0], found[1], min(found[2:])
    benchmark.pedantic(torch_scorer.log_likelihoods, args=(asked,), rounds=1)
    what = f"rows a second, choices, {num_shots}-shot"
    detail = f"{NUM_ROWS / theirs_s:.2f} rows/s there, {len(asked)} rows, one thread"
    row(f"{what}, torch over lm-eval hf", theirs_s / ours_s, goal=GOAL, detail=detail)
    row(f"{what}, artifact over lm-eval hf", theirs_s / artifact_s, goal=GOAL, detail=detail)
    assert theirs_s / ours_s > LEAST
    assert theirs_s / artifact_s > LEAST
