"""Log-likelihoods and stop strings of an artifact: what torch says of the same weights, whatever the graph."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from havoc_core.adapt.tasks.task import Prompt
from havoc_core.errors import HavocError
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime import likelihood
from havoc_core.export.runtime.completion import generate_ids
from havoc_core.export.runtime.options import GraphOptions
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.model.checkpoint import load_base
from havoc_core.model.generation import generate_text
from havoc_core.model.likelihood import Continuation
from havoc_core.model.scorer import TorchScorer

GRAPHS = [
    GraphOptions(),
    GraphOptions(logits="all"),
    GraphOptions(dialect="contrib"),
    GraphOptions(cache="static", cache_len=220),
    GraphOptions(dialect="contrib", cache="static", cache_len=220),
]
SHOTS = "What is 12 + 30? 42. the quick brown fox jumps over the lazy dog. " * 2


@pytest.fixture(scope="module", params=GRAPHS, ids=str)
def session(
    request: pytest.FixtureRequest, text_base_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> DecoderSession:
    folder = tmp_path_factory.mktemp("artifacts") / "reader"
    return DecoderSession.open(export_artifact(text_base_directory, folder, options=request.param), num_threads=1)


@pytest.fixture(scope="module")
def scorer(text_base_directory: Path) -> TorchScorer:
    base = load_base(text_base_directory)
    return TorchScorer(base.model, base.tokenizer)


def requests(num_rows: int, shots: str = "") -> list[tuple[Prompt, list[str]]]:
    rng = random.Random(2)
    found = []
    for _ in range(num_rows):
        text = shots + "".join(rng.choice("the quick brown ") for _ in range(rng.randint(1, 40)))
        choices = [" " + "".join(rng.choice("ab c") for _ in range(rng.randint(1, 6))) for _ in range(3)]
        found.append((Prompt(text + "."), [*choices, choices[0] + " and more", choices[0], " "]))
    return found


def require_same(ours: list[list[Continuation]], theirs: list[list[Continuation]]) -> None:
    for row, other in zip(ours, theirs, strict=True):
        assert [item.log_likelihood for item in row] == pytest.approx([item.log_likelihood for item in other], abs=3e-4)
        assert [(i.num_tokens, i.is_greedy) for i in row] == [(i.num_tokens, i.is_greedy) for i in other]


@pytest.mark.parametrize("shots", ["", SHOTS], ids=["0-shot", "shared beginning"])
def test_every_graph_says_what_torch_says(session: DecoderSession, scorer: TorchScorer, shots: str) -> None:
    """Any dialect, cache and kind of logits; prompts of many lengths, with and without a common beginning."""
    asked = requests(20, shots)
    require_same(session.log_likelihoods(asked), scorer.log_likelihoods(asked))


@pytest.mark.parametrize("limit", ["TOKENS_PER_BATCH", "LOGITS_PER_BATCH", "CACHE_BYTES_PER_BATCH"])
def test_small_limits_make_small_batches_and_the_same_scores(
    session: DecoderSession, scorer: TorchScorer, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Memory is bounded by tokens, logits and cache; a row that alone is more than a limit is still scored."""
    asked = requests(5)
    monkeypatch.setattr(likelihood, limit, 1)
    seen = []
    score_batch = likelihood._score_batch
    monkeypatch.setattr(likelihood, "_score_batch", lambda *words: (seen.append(len(words[1])), score_batch(*words)))
    require_same(session.log_likelihoods(asked), scorer.log_likelihoods(asked))
    assert seen == [1] * 5


def test_rows_can_be_repeated_from_one(session: DecoderSession) -> None:
    """A past repeated to more rows continues as each row would alone; a cache in buffers was told how many."""
    ids = np.array([[5, 9, 11, 20]])
    _, past = session.extend(ids, None, session.empty_past(1, num_rows_later=3))
    logits, _ = session.decode(np.array([[30], [31], [32]]), None, session.keep_rows(past, np.zeros(3, np.int64)))
    for row, token in enumerate((30, 31, 32)):
        alone, _ = session.prefill(np.array([[5, 9, 11, 20, token]]))
        assert logits[row] == pytest.approx(alone[0], abs=1e-4)


def test_a_picture_and_an_artifact_without_tokenizer_are_refused(session: DecoderSession) -> None:
    """Before anything is read."""
    with pytest.raises(HavocError, match="prompt 1 has a picture"):
        session.log_likelihoods([(Prompt("what?", b"png"), [" a"])])
    session.tokenizer, kept = None, session.tokenizer
    try:
        with pytest.raises(HavocError, match="no tokenizer.json"):
            session.log_likelihoods(requests(1))
    finally:
        session.tokenizer = kept


def test_written_answers_take_bounded_memory(
    session: DecoderSession, text_base_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows whose keys and values would be too large together are written one after another, with the same texts."""
    base = load_base(text_base_directory)
    prompts = [Prompt("the quick brown " * num) for num in (1, 3, 2, 5, 4)]
    whole = session.generate_text(prompts, max_new_tokens=6)
    per_row = (len(base.tokenizer.encode_prompt(prompts[3].text)) + 6) * session.cache_bytes_per_token
    sizes = []
    prefill = session.extend
    monkeypatch.setattr(
        session,
        "extend",
        lambda ids, *words: (sizes.append(len(ids)) if ids.shape[1] > 1 else 0, prefill(ids, *words))[1],
    )
    monkeypatch.setattr("havoc_core.export.runtime.completion.CACHE_BYTES", 2 * max(per_row, cache_bytes(session)))
    assert session.generate_text(prompts, max_new_tokens=6) == whole
    assert max(sizes) <= 3
    assert sum(sizes) == 5
    monkeypatch.setattr("havoc_core.model.generation.CACHE_BYTES", 2 * per_row)
    assert generate_text(base.model, base.tokenizer, prompts, max_new_tokens=6) == whole


def cache_bytes(session: DecoderSession) -> int:
    return (session.options.cache_len or 0) * session.cache_bytes_per_token


def test_answers_end_at_stop_strings(
    session: DecoderSession, text_base_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Artifact and torch cut the same texts at the same places, and write no further than there."""
    base = load_base(text_base_directory)
    prompts = [Prompt(text) for text in ("What is 12 + 30?", "the quick brown", "def f(x):", "x", "over the lazy")]
    whole = session.generate_text(prompts, max_new_tokens=24)
    stop = [whole[0][5:8], whole[1][9:10], whole[2][3:7]]
    assert all(stop)
    expected = [text[: min([text.find(word) for word in stop if word in text], default=len(text))] for text in whole]
    assert expected != whole
    steps = []
    decode = session.decode
    monkeypatch.setattr(session, "decode", lambda *words: (steps.append(len(words[0])), decode(*words))[1])
    assert session.generate_text(prompts, max_new_tokens=24, stop=stop) == expected
    assert sum(steps) < 23 * len(prompts)
    assert generate_text(base.model, base.tokenizer, prompts, max_new_tokens=24, stop=stop) == expected
    assert generate_ids(session, [[5, 6]], max_new_tokens=3, stops=None)[0]
