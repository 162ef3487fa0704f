"""A live artifact answers for any alpha as an artifact that was exported for it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from havoc_core.adapt.expert import Expert
from havoc_core.adapt.svf import compute_basis
from havoc_core.errors import HavocError, MeasurementError
from havoc_core.export import live as live_module
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.artifact import read_manifest
from havoc_core.export.runtime.live import LiveWeights
from havoc_core.export.runtime.live_table import EXPERTS_FILE
from havoc_core.export.runtime.options import GraphOptions
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.export.source import Source
from havoc_core.model.structure import Structure

IDS = np.arange(20, 50)[None]
ALPHAS = [(1.0, 0.0), (0.0, 1.0), (1.2, 0.5), (-0.3, 0.0), (0.0, 0.0)]
MAX_ULPS = 8
"""How far a mixture's weight may be from a fresh fold's, in fp32's rounding of the largest of the base and the fold."""


@pytest.fixture(scope="module")
def text_source(source_with, configs) -> Source:
    return source_with(configs["text"])


@pytest.fixture(scope="module")
def two_experts(text_source: Source, experts_for) -> list[Expert]:
    return experts_for(text_source)


@pytest.fixture(scope="module")
def live(text_source: Source, two_experts: list[Expert], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("live") / "artifact"
    return export_artifact(text_source, out, experts=two_experts, alpha=(0, 0), is_live=True)


def logits(session: DecoderSession) -> np.ndarray[Any, Any]:
    return session.prefill(IDS)[0]


def named(alpha: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(("math", "code"), alpha, strict=True))


def stored_weights(artifact: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The matrices of the weight file as fp32 arrays, by initializer."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(artifact / "model.onnx"))
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


def live_weights(artifact: Path) -> LiveWeights:
    manifest = read_manifest(artifact)
    assert manifest.live is not None
    return LiveWeights(artifact, manifest.live, alpha=manifest.alpha, rule=manifest.rule, num_threads=1)


@pytest.mark.parametrize("rule", ["delta", "literal", "renorm"])
def test_every_alpha_answers_as_a_fresh_export(
    text_source: Source, two_experts: list[Expert], tmp_path: Path, rule: str
) -> None:
    """An expert alone has the very weights of a fresh export; a mixture is within rounding, and so are the logits."""
    out = export_artifact(text_source, tmp_path / "live", experts=two_experts, alpha=(1, 0.5), rule=rule, is_live=True)
    session, weights = DecoderSession.open(out, num_threads=1), live_weights(out)
    for alpha in ALPHAS:
        if rule == "renorm" and not any(alpha):
            continue
        fresh_out = export_artifact(text_source, tmp_path / "f", experts=two_experts, alpha=alpha, rule=rule)
        session.set_alpha(named(alpha))
        weights.switch(named(alpha))
        theirs, fresh = stored_weights(fresh_out), logits(DecoderSession.open(fresh_out, num_threads=1))
        assert weights.arrays
        for name, ours in weights.arrays.items():
            peak = max(np.abs(theirs[name]).max(), float(text_source.tensors[name].abs().max()))
            bound = MAX_ULPS * np.finfo(np.float32).eps * peak
            is_alone = rule == "delta" and set(alpha) <= {0.0, 1.0}
            np.testing.assert_allclose(ours, theirs[name], rtol=0, atol=0 if is_alone else bound)
        np.testing.assert_allclose(logits(session), fresh, rtol=0, atol=2e-5 * fresh.std())


def test_experts_answer_differently(live: Path) -> None:
    """Each expert, and the base, has answers of its own, and a second switch leads back to the first."""
    session = DecoderSession.open(live, num_threads=1)
    answers = []
    for alpha in ({}, {"math": 1}, {"code": 1}, {"math": 0.5, "code": 0.5}, {}):
        session.set_alpha(alpha)
        answers.append(logits(session))
    base, *others, again = answers
    assert all(np.abs(other - base).max() > 0.01 for other in others)
    assert (again == base).all()


def test_bound_calls_follow_a_switch(live: Path) -> None:
    """Buffers that were bound before a switch read the new weights, as does a past without buffers."""
    session, opened = DecoderSession.open(live, num_threads=1), DecoderSession.open(live, alpha={"code": 1})
    empty = session.empty_past(1, capacity=IDS.shape[1] + 1)
    session.extend(IDS, None, empty)
    session.set_alpha({"code": 1})
    np.testing.assert_allclose(session.extend(IDS, None, empty)[0], opened.prefill(IDS)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("capacity", [None, 64])
def test_a_past_of_another_mixture_is_refused(live: Path, capacity: int | None) -> None:
    """Keys and values that one mixture computed are not gone on with by another, nor are rows kept of them."""
    session = DecoderSession.open(live, num_threads=1)
    _, past = session.extend(IDS, None, session.empty_past(1, capacity=capacity))
    session.set_alpha({"math": 1})
    for old in (past, session.keep_rows(past, np.array([0]))):
        with pytest.raises(HavocError, match="read the prompt again"):
            session.extend(IDS[:, :1], None, old)
    session.set_alpha({"math": 1})
    _, past = session.extend(IDS, None, session.empty_past(1, capacity=capacity))
    session.set_alpha({"math": 1, "code": 0})
    session.extend(IDS[:, :1], None, past)


def test_it_opens_at_the_alpha_of_its_manifest(text_source: Source, two_experts: list[Expert], tmp_path: Path) -> None:
    """Without a choice the mixture is the exported one, bit for bit the weights of the file that others read."""
    out = export_artifact(text_source, tmp_path / "a", experts=two_experts, alpha=(1.2, 0.5), is_live=True)
    plain = export_artifact(text_source, tmp_path / "b", experts=two_experts, alpha=(1.2, 0.5))
    session = DecoderSession.open(out, num_threads=1)
    assert session.alpha == {"math": 1.2, "code": 0.5}
    assert (out / "model.onnx.data").read_bytes() == (plain / "model.onnx.data").read_bytes()
    weights, stored = live_weights(out), stored_weights(plain)
    assert all((array == stored[name]).all() for name, array in weights.arrays.items())
    assert DecoderSession.open(plain).alpha is None


def test_an_expert_alone_is_not_copied(live: Path) -> None:
    """Its weights are the mapped file; room for a sum is taken at the first mixture only."""
    weights = live_weights(live)
    weights.switch({"math": 1})
    assert all(isinstance(array.base, np.memmap) or isinstance(array, np.memmap) for array in weights.arrays.values())
    weights.switch({"math": 0.5})
    assert not any(isinstance(array, np.memmap) for array in weights.arrays.values())


def test_mixtures_that_are_kept_are_not_summed_again(live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last two sums stay as they are, a third takes the room of the oldest, and each has the weights it had."""
    manifest, sums = read_manifest(live), []
    assert manifest.live is not None
    weights = LiveWeights(live, manifest.live, alpha=manifest.alpha, rule="delta", num_threads=1, num_kept=2)
    summed = LiveWeights._sum
    monkeypatch.setattr(LiveWeights, "_sum", lambda *given: (sums.append(1), summed(*given)))
    found = {}
    for alpha in (0.25, 0.5, 0.25, 0.75, 0.25, 0.5):
        weights.switch({"math": alpha})
        arrays = {name: array.copy() for name, array in weights.arrays.items()}
        assert all((arrays[name] == array).all() for name, array in found.setdefault(alpha, arrays).items())
    assert len(sums) == 4
    with pytest.raises(HavocError, match="0 mixtures cannot be kept"):
        DecoderSession.open(live, num_mixtures=0)


def test_an_interrupted_switch_is_made_again(live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that were half summed are nobody's: the same alpha is summed anew."""
    weights, fresh = live_weights(live), live_weights(live)
    weights.switch({"math": 0.5})

    def interrupted(_self: object, _rows: object, sums: dict[str, Any]) -> None:
        for array in sums.values():
            array[:] = 0
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LiveWeights, "_sum", interrupted)
        with pytest.raises(KeyboardInterrupt):
            weights.switch({"math": 0.25})
    weights.switch({"math": 0.5})
    fresh.switch({"math": 0.5})
    assert all((array == fresh.arrays[name]).all() for name, array in weights.arrays.items())


def test_only_what_was_trained_is_kept_again(text_source: Source, two_experts: list[Expert], tmp_path: Path) -> None:
    """With alpha 0 the base is not stored twice, and a matrix that no expert moved is not stored again at all."""
    names = sorted(two_experts[0].deltas)
    last = [name for name in names if ".1." in name]
    experts = [
        dataclasses.replace(expert, deltas={name: expert.deltas[name] * (name in last) for name in names})
        for expert in two_experts
    ]
    out = export_artifact(text_source, tmp_path / "a", experts=experts, alpha=(0, 0), is_live=True)
    table = read_manifest(out).live
    assert table is not None
    assert sorted(table.names) == last
    pages = sum(-(-matrix.num_bytes // 4096) * 4096 for matrix in table.matrices)
    assert (out / EXPERTS_FILE).stat().st_size <= 2 * pages
    one = dataclasses.replace(experts[1], deltas={last[0]: experts[1].deltas[last[0]]})
    fewer = export_artifact(text_source, tmp_path / "b", experts=[experts[0], one], alpha=(0, 0), is_live=True)
    assert (fewer / EXPERTS_FILE).stat().st_size < (out / EXPERTS_FILE).stat().st_size


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen2", GraphOptions(cache="static")),
        ("untied", GraphOptions(dialect="contrib", logits="all")),
        ("vision", GraphOptions()),
    ],
)
def test_every_graph_can_be_live(
    source_with, experts_for, configs, with_wide_heads, tmp_path: Path, kind: str, options: GraphOptions
) -> None:
    """A static cache, biases, the contrib dialect, pictures: switching is the same."""
    source = source_with(with_wide_heads(configs[kind]))
    experts = experts_for(source)
    out = export_artifact(source, tmp_path / "a", experts=experts, alpha=(0, 0), options=options, is_live=True)
    fresh = export_artifact(source, tmp_path / "b", experts=experts, alpha=(1, 1), options=options)
    session, theirs = DecoderSession.open(out, alpha={"math": 1, "code": 1}), DecoderSession.open(fresh)
    ours, expected = (opened.extend(IDS, None, opened.empty_past(1))[0] for opened in (session, theirs))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * expected.std())


def test_every_switch_is_proved(live: Path) -> None:
    """The manifest holds the cases of each expert alone and of an even mixture beside the artifact's own."""
    manifest = read_manifest(live)
    names = {case["name"] for case in manifest.parity["cases"]}
    assert {"prefill", "live math, prefill", "live code, single steps", "live even mixture, left-padded batch"} <= names
    assert manifest.live is not None
    assert set(manifest.live.fingerprints) == {"math", "code"}


def test_a_graph_that_keeps_its_own_weights_is_not_shipped(
    text_source: Source, two_experts: list[Expert], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a switch changes nothing, the proof of the switches fails and no artifact appears."""

    class Deaf(DecoderSession):
        def set_alpha(self, alpha: Any) -> None:
            live = self._live
            values = dict(live.values)
            live.switch(alpha)
            live.values = values

    monkeypatch.setattr(live_module, "DecoderSession", Deaf)
    with pytest.raises(MeasurementError, match="live math"):
        export_artifact(text_source, tmp_path / "a", experts=two_experts, alpha=(0, 0), is_live=True)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        ({"vision": 1.0}, "no expert is called vision; it holds math, code"),
        ({"math": float("nan")}, "alpha holds a weight that is not finite"),
        ({"math": 1e308, "code": 1e308}, "alpha holds a weight that is not finite"),
    ],
)
def test_an_impossible_alpha_changes_nothing(live: Path, alpha: dict[str, float], message: str) -> None:
    """One line says what is wrong, and the session answers as before."""
    session = DecoderSession.open(live, num_threads=1)
    before = logits(session)
    with pytest.raises(HavocError, match=message):
        session.set_alpha(alpha)
    assert (logits(session) == before).all()


def test_renorm_refuses_weights_that_cancel(text_source: Source, two_experts: list[Expert], tmp_path: Path) -> None:
    """Weights whose singular values sum to nothing have no scale, as in a fresh export."""
    out = export_artifact(text_source, tmp_path / "a", experts=two_experts, alpha=(1, 0), rule="renorm", is_live=True)
    with pytest.raises(HavocError, match="renorm needs more"):
        DecoderSession.open(out, alpha={})


def test_an_artifact_of_one_mixture_has_no_alpha_to_choose(
    text_source: Source, two_experts: list[Expert], tmp_path: Path
) -> None:
    """Asking it for another is an error that says how to get one."""
    out = export_artifact(text_source, tmp_path / "a", experts=two_experts, alpha=(1, 0))
    with pytest.raises(HavocError, match="export it with --live"):
        DecoderSession.open(out, alpha={"math": 1})


@pytest.mark.parametrize("structure", [Structure("int8"), Structure("fp16"), Structure("int4")])
def test_other_weight_formats_are_refused(
    text_source: Source, two_experts: list[Expert], tmp_path: Path, structure: Structure
) -> None:
    """Formats that would be rounded again at every switch are refused before any work."""
    with pytest.raises(HavocError, match=re.escape(structure.description)):
        export_artifact(
            text_source, tmp_path / "a", experts=two_experts, alpha=(0, 0), structure=structure, is_live=True
        )
    assert not (tmp_path / "a").exists()


def test_experts_that_are_the_base_are_refused(text_source: Source, two_experts: list[Expert], tmp_path: Path) -> None:
    """No experts, and experts that moved nothing, leave nothing to switch."""
    with pytest.raises(HavocError, match="give them with --experts"):
        export_artifact(text_source, tmp_path / "a", is_live=True)
    still = dataclasses.replace(two_experts[0], deltas={name: d * 0 for name, d in two_experts[0].deltas.items()})
    with pytest.raises(HavocError, match="nothing to switch"):
        export_artifact(text_source, tmp_path / "a", experts=[still], alpha=(0,), is_live=True)


def _first(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["live"]["matrices"][0]
    return found


DAMAGE = {
    "a place beyond the file": lambda d: _first(d)["places"].update({"expert/math": [EXPERTS_FILE, 1 << 40]}),
    "a negative place": lambda d: _first(d)["places"].update({"expert/math": [EXPERTS_FILE, -4]}),
    "a place in another file": lambda d: _first(d)["places"].update({"expert/math": ["../x", 0]}),
    "an odd byte": lambda d: _first(d)["places"].update({"expert/math": [EXPERTS_FILE, 2]}),
    "a place that is no pair": lambda d: _first(d)["places"].update({"expert/math": 7}),
    "an expert without a place": lambda d: _first(d)["places"].pop("expert/math"),
    "a shape of text": lambda d: _first(d).update(shape=["x"]),
    "no shape": lambda d: _first(d).update(shape=[]),
    "a matrix twice": lambda d: d["live"]["matrices"].append(_first(d)),
    "no matrices": lambda d: d["live"].update(matrices=[]),
    "no list": lambda d: d.update(live=3),
    "fingerprints of others": lambda d: d["live"].update(fingerprints={"x": {}}),
    "a norm that is no number": lambda d: _first(d).update(norm_shares={"math": "1", "code": 1}),
    "a rule that is none": lambda d: d["mixture"].update(rule="sum"),
    "renorm without norms": lambda d: d["mixture"].update(rule="renorm"),
    "the norm of one": lambda d: _first(d).update(norm_shares={"math": 1}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_table_is_refused(live: Path, tmp_path: Path, damage: Any) -> None:
    """Whatever the manifest says of places and shapes is checked before a byte is mapped."""
    document = json.loads((live / "manifest.json").read_text())
    damage(document)
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(HavocError, match="damaged manifest"):
        read_manifest(tmp_path)


def test_a_table_of_another_graph_is_refused(live: Path, tmp_path: Path) -> None:
    """Matrices that the graph does not take, or takes in another shape, are found when it is opened."""
    import shutil

    for number, change in enumerate((("name", "other"), ("shape", [4]))):
        copy = Path(shutil.copytree(live, tmp_path / str(number)))
        document = json.loads((copy / "manifest.json").read_text())
        _first(document)[change[0]] = change[1]
        (copy / "manifest.json").write_text(json.dumps(document))
        with pytest.raises(HavocError, match="in place of its own"):
            DecoderSession.open(copy)


def test_a_basis_at_hand_gives_the_same_file(
    text_source: Source, two_experts: list[Expert], live: Path, tmp_path: Path
) -> None:
    """Whether the basis is computed here or given does not change a byte."""
    basis = compute_basis(text_source.tensors, base_hash=text_source.hash)
    out = export_artifact(text_source, tmp_path / "a", experts=two_experts, alpha=(0, 0), basis=basis, is_live=True)
    assert (out / EXPERTS_FILE).read_bytes() == (live / EXPERTS_FILE).read_bytes()
