"""The results page says what the records say, good and bad, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from havoc_core.bench.report.results import experts_against_base, mixture_against, score_markdown, write_results
from havoc_core.bench.report.search_files import ScoreFile
from havoc_core.errors import HavocError

ROOT = Path(__file__).parents[2]
NANO = ROOT / "reports" / "2026-11-26-nano-host"


def _row(name: str, kind: str, num_right: int) -> dict[str, object]:
    share = num_right / 100
    accuracy = {"num_right": num_right, "num_rows": 100, "low": share - 0.1, "high": share + 0.1}
    return {"name": name, "kind": kind, "accuracy": {"quiz": accuracy}}


def _scores(expert: int, *, low: float = -0.1) -> ScoreFile:
    return ScoreFile.model_validate(
        {
            "rows": [_row("base", "base", 50), _row("quiz", "expert", expert), _row("mixture", "mixture", 60)],
            "paired": [{"against": "quiz", "margin": 0.0, "low": low, "high": 0.1, "is_proven": low > 0}],
        }
    )


def test_kept_page_is_what_the_records_give(tmp_path):
    """docs/results.md is never written by hand: the command writes the same bytes from reports/."""
    write_results(ROOT / "reports", tmp_path / "results.md")
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs" / "results.md").read_text()


@pytest.mark.parametrize(
    ("num_right", "said"),
    [(71, "it is better"), (29, "it is worse"), (70, "the intervals overlap"), (50, "the intervals overlap")],
)
def test_expert_is_called_better_only_with_disjoint_intervals(num_right, said):
    """50 of 100 with 40 to 60 against 70 with 60 to 80 touch: neither is shown to be better."""
    (sentence,) = experts_against_base(_scores(num_right))
    assert said in sentence
    assert f"{num_right - 50:+.1f} points" in sentence


@pytest.mark.parametrize(("low", "said"), [(0.01, "; better."), (-0.1, "not shown to differ")])
def test_mixture_is_called_better_only_when_its_interval_is_above_0(low, said):
    """A paired interval that holds 0 proves nothing."""
    (sentence,) = mixture_against(_scores(60, low=low))
    assert said in sentence


def test_the_bundled_bases_experts_are_proven_above_85_percent():
    """Each on its own task, and the mixture on all of them: the lower end of the exact interval."""
    rows = {row["name"]: row["accuracy"] for row in json.loads((NANO / "scores.json").read_text())["rows"]}
    domains = ("math", "code", "reasoning", "vision")
    assert all(rows[domain][domain]["low"] > 0.85 for domain in domains)
    assert all(rows["mixture"][domain]["low"] > 0.85 for domain in domains)


def test_the_bundled_bases_mixture_is_proven_above_each_expert():
    """By the mean of the tasks, row by row."""
    paired = {pair["against"]: pair for pair in json.loads((NANO / "scores.json").read_text())["paired"]}
    assert all(paired[domain]["low"] > 0 for domain in ("math", "code", "reasoning", "vision"))


def test_table_shows_counts_and_intervals():
    """Each cell carries the share, its interval and n."""
    assert "| base | 50.0 % (40.0 to 60.0; 50 of 100) | 50.0 % |" in score_markdown(_scores(60))


def test_scores_of_another_artifact_are_refused(tmp_path):
    """A score table beside the record of another artifact is not a result."""
    kept = next((ROOT / "reports").glob("*/scores.json")).parent
    shutil.copytree(kept, tmp_path / "reports" / "run")
    scores = tmp_path / "reports" / "run" / "scores.json"
    scores.write_text(
        scores.read_text()
        .replace('"artifact_sha256": "', '"artifact_sha256": "0')
        .replace('"artifact_sha256":"', '"artifact_sha256":"0')
    )
    with pytest.raises(HavocError, match=r"scores\.json"):
        write_results(tmp_path / "reports", tmp_path / "results.md")
    assert not (tmp_path / "results.md").exists()


def test_folder_without_runs_is_refused(tmp_path):
    """No record, no page."""
    with pytest.raises(HavocError, match="no folder with"):
        write_results(tmp_path, tmp_path / "results.md")
