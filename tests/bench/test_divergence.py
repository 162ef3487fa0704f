"""KL of two sides from a reference: the figure is the definition's, the difference is taken piece by piece."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy import special, stats

from havoc_core.bench import duel
from havoc_core.bench.contender import enter
from havoc_core.bench.divergence import FEWEST_PIECES, Divergence, compared, divergence
from havoc_core.cli import main
from havoc_core.errors import HavocError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

pytestmark = pytest.mark.alone


def drawn(seed: int, scale: float = 1.0) -> NDArray[np.float32]:
    """Logits [20, 50] of a seed."""
    return (scale * np.random.default_rng(seed).standard_normal((20, 50))).astype(np.float32)


def found(reference: NDArray[np.float32], old: NDArray[np.float32], new: NDArray[np.float32]) -> Divergence:
    return compared(reference, old, new, reference="base", num_untold=0, text_sha256="a" * 64)


def test_it_is_the_definitions() -> None:
    """KL(reference || side) in nats, the mean over pieces; Student's t of the pieces' differences at 99 %."""
    reference, old, new = drawn(0, 3.0), drawn(0, 3.0) + drawn(1, 0.1), drawn(0, 3.0) + drawn(2, 0.3)
    truth, before, after = (special.softmax(logits.astype(float), axis=1) for logits in (reference, old, new))
    old_kl, new_kl = (special.rel_entr(truth, side).sum(axis=1) for side in (before, after))
    row = found(reference, old, new)
    assert row.old_kl == pytest.approx(old_kl.mean())
    assert row.new_kl == pytest.approx(new_kl.mean())
    wanted = stats.ttest_1samp(new_kl - old_kl, 0).confidence_interval(0.99)
    assert (row.low, row.high) == (pytest.approx(wanted.low, rel=1e-6), pytest.approx(wanted.high, rel=1e-6))
    assert row.low > 0
    assert row.old_top1 == (before.argmax(axis=1) == truth.argmax(axis=1)).mean()


def test_logits_and_log_probabilities_are_the_same() -> None:
    """What one engine tells as logits, another as log-probabilities: a constant more or less changes nothing."""
    reference, old = drawn(0, 3.0), drawn(1)
    shifted = special.log_softmax(old.astype(float), axis=1).astype(np.float32)
    assert found(reference, old, shifted).difference == pytest.approx(0, abs=1e-5)
    assert found(reference, reference, reference).old_kl == pytest.approx(0, abs=1e-6)


def test_an_artifact_is_no_way_from_itself(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real processes and the bundled text: 0 nats, in the document and in the sentence."""
    proven = duel.DuelOutcome(verdict="equal", rows=[], num_blocks=9)
    monkeypatch.setattr(duel, "duel", lambda *_, **__: proven)
    artifact = str(tiny_artifact)
    words = [
        "duel",
        artifact,
        artifact,
        "--reference",
        artifact,
        "--prompt-tokens",
        "4",
        "--decode-tokens",
        "4",
        "--quiet",
    ]
    assert main([*words, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["divergence"]
    assert (row["old_kl"], row["new_kl"], row["difference"]) == (0.0, 0.0, 0.0)
    assert row["num_pieces"] >= FEWEST_PIECES
    assert len(row["text_sha256"]) == 64
    assert main(words) == 0
    assert "0 nats" in capsys.readouterr().out


def test_without_a_tokenizer_no_text_is_read(own_artifact: Path) -> None:
    """Random ids would tell nothing of the model's use: one line says what to name."""
    (own_artifact / "tokenizer.json").unlink()
    manifest = json.loads((own_artifact / "manifest.json").read_text())
    manifest["files"].pop("tokenizer.json")
    (own_artifact / "manifest.json").write_text(json.dumps(manifest))
    with enter(str(own_artifact)) as side, pytest.raises(HavocError, match="none .*has a tokenizer"):
        divergence(side, side, side, num_threads=1)
