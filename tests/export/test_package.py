"""An artifact appears whole or not at all, and only from input that is right."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from havoc_core.adapt.expert import Expert
from havoc_core.adapt.svf import Basis
from havoc_core.errors import HavocError, MeasurementError
from havoc_core.export import parity
from havoc_core.export.package import export_artifact
from havoc_core.export.rederive import rederive
from havoc_core.export.runtime.artifact import read_manifest
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.export.source import Source
from havoc_core.export.verify import verify_artifact
from havoc_core.model.config import HavocConfig
from havoc_core.model.structure import Structure

SLOW_EXPORT = """
import sys, time
from pathlib import Path
from havoc_core.export import package
from havoc_core.export.source import open_source
prove = package._prove
def slow(*args):
    print("writing", flush=True)
    time.sleep(30)
    return prove(*args)
package._prove = slow
package.export_artifact(open_source(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_manifest_says_what_it_was_made_from(source: Source, experts: list[Expert], tmp_path: Path) -> None:
    """Base hash, expert hashes, alpha, rule, structure, opset, versions, parity and the hash of every file."""
    out = export_artifact(source, tmp_path / "a", experts=experts, alpha=(1.2, 0.5), structure=Structure("int8"))
    manifest = read_manifest(out)
    assert manifest.base_hash == source.hash
    assert manifest.expert_hashes == {expert.domain: expert.hash for expert in experts}
    assert manifest.alpha == {"math": 1.2, "code": 0.5}
    assert (manifest.rule, manifest.structure["weight_format"]) == ("delta", "int8")
    assert manifest.graph["accuracy_level"] == 4
    assert (manifest.graph["opset"], manifest.graph["ir_version"]) == (23, 11)
    assert {"havoc", "onnxruntime", "torch"} <= set(manifest.versions)
    assert not manifest.has_random_weights
    assert {case["name"] for case in manifest.parity["cases"]} >= {"prefill", "single steps"}
    assert {"experts/z_vectors_math.safetensors", "tokenizer.json", "config.json", "README.md"} <= set(manifest.files)
    assert "math 1.2, code 0.5 (rule delta)" in (out / "README.md").read_text()


def test_random_weights_are_marked(source_with, tmp_path: Path) -> None:
    """A preset's random weights are called so in the manifest, the mixture and the model card."""
    out = export_artifact("pico", tmp_path / "a")
    assert read_manifest(out).has_random_weights
    assert json.loads((out / "mixture.json").read_text())["base"]["random_weights"]
    assert "weights are random" in (out / "README.md").read_text()


@pytest.mark.parametrize("rule", ["delta", "literal", "renorm"])
@pytest.mark.parametrize("weight_format", ["fp32", "int8", "int4"])
def test_the_weights_can_be_derived_again(
    source: Source, experts: list[Expert], base_directory: Path, tmp_path: Path, rule: str, weight_format: str
) -> None:
    """Base + experts + alpha + rule give the shipped bytes, bit for bit on the same machine."""
    structure = Structure(weight_format)
    out = export_artifact(source, tmp_path / "a", experts=experts, alpha=(0.7, 0.4), rule=rule, structure=structure)
    (check,) = rederive(out, read_manifest(out), base_directory)
    assert "largest difference 0.0e+00" in check.finding


def test_a_forged_weight_is_found_by_deriving_again(
    source: Source, experts: list[Expert], base_directory: Path, tmp_path: Path
) -> None:
    """An artifact of another alpha whose manifest claims this one has right hashes and wrong weights."""
    out = export_artifact(source, tmp_path / "a", experts=experts, alpha=(0.7, 0.4))
    path = out / "manifest.json"
    document = json.loads(path.read_text())
    document["mixture"]["alpha"]["math"] = 0.8
    mixture = json.loads((out / "mixture.json").read_text())
    next(expert for expert in mixture["experts"] if expert["domain"] == "math")["alpha"] = 0.8
    forged = json.dumps(mixture).encode()
    (out / "mixture.json").write_bytes(forged)
    document["files"]["mixture.json"] = {"sha256": hashlib.sha256(forged).hexdigest(), "num_bytes": len(forged)}
    path.write_text(json.dumps(document))
    manifest, _ = verify_artifact(out)
    with pytest.raises(HavocError, match=r"proj.* off base \+ experts \+ alpha") as caught:
        rederive(out, manifest, base_directory)
    assert caught.value.exit_code == 5
    with pytest.raises(HavocError, match="its hash is") as caught:
        rederive(out, manifest, "pico")
    assert caught.value.exit_code == 5


def test_alpha_zero_is_the_base_bit_for_bit(source: Source, experts: list[Expert], tmp_path: Path) -> None:
    """A mixture that changes nothing writes the base's bytes."""
    plain = export_artifact(source, tmp_path / "plain")
    mixed = export_artifact(source, tmp_path / "mixed", experts=experts, alpha=(0.0, 0.0))
    assert (plain / "model.onnx.data").read_bytes() == (mixed / "model.onnx.data").read_bytes()
    assert (plain / "model.onnx").read_bytes() == (mixed / "model.onnx").read_bytes()


def test_an_existing_artifact_is_replaced_whole_or_kept(source: Source, tmp_path: Path, monkeypatch) -> None:
    """Failing parity leaves the old artifact untouched and nothing beside it; success replaces it."""
    out = export_artifact(source, tmp_path / "a")
    before = snapshot(out)
    with monkeypatch.context() as patch:
        patch.setattr(parity, "MAX_RATIO", 0.0)
        with pytest.raises(MeasurementError, match="its weights, prefill"):
            export_artifact(source, out, structure=Structure("int8"))
    assert snapshot(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    export_artifact(source, out, structure=Structure("int8"))
    assert read_manifest(out).structure["weight_format"] == "int8"


def test_a_folder_of_somebody_else_is_not_replaced(source: Source, tmp_path: Path) -> None:
    """An output directory that holds anything but an artifact is refused and kept."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(HavocError, match="choose another --out"):
        export_artifact(source, tmp_path / "mine")
    assert snapshot(tmp_path / "mine") == {"thesis.txt": b"all of it"}


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_export_leaves_no_artifact(base_directory: Path, tmp_path: Path, sign: signal.Signals) -> None:
    """Killed after the weights were written: nothing at --out, and what lies beside it is no artifact."""
    out = tmp_path / "a"
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW_EXPORT, str(base_directory), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    os.kill(child.pid, sign)
    child.wait(20)
    child.stdout.close()
    assert not out.exists()
    assert not list(tmp_path.rglob("manifest.json"))
    if sign == signal.SIGINT:
        assert not list(tmp_path.iterdir())
    export_artifact(base_directory, out)
    verify_artifact(out)


def test_a_full_disk_is_one_line(base_directory: Path, tmp_path: Path) -> None:
    """The limit on a file's size stands in for a full disk: no artifact, no leftover, exit code 2."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from havoc_core.export.package import export_artifact; from havoc_core.errors import HavocError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try: export_artifact(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "except HavocError as error: print(error); sys.exit(error.exit_code)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, str(base_directory), str(tmp_path / "a")], capture_output=True, text=True
    )
    assert child.returncode == 2, child.stderr
    assert len(child.stdout.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    configs: dict[str, HavocConfig], source_with, tmp_path: Path, value: float
) -> None:
    """One NaN in one matrix: its name, and nothing written."""
    source = source_with(configs["text"])
    source.tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    with pytest.raises(HavocError, match=r"model.layers.1.mlp.down_proj.weight: holds NaN or Inf"):
        export_artifact(source, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_weight_beyond_fp16_is_refused_there_and_fine_in_fp32(
    configs: dict[str, HavocConfig], source_with, tmp_path: Path
) -> None:
    """1e5 does not silently become infinity."""
    source = source_with(configs["untied"])
    source.tensors["model.embed_tokens.weight"][5, 0] = 1e5
    with pytest.raises(HavocError, match=r"embed_tokens.weight: .*100000 is beyond fp16"):
        export_artifact(source, tmp_path / "half", structure=Structure("fp16", "fp16"))
    export_artifact(source, tmp_path / "full")


def test_an_expert_of_another_base_is_refused(
    source: Source, basis: Basis, experts: list[Expert], source_with, tmp_path: Path
) -> None:
    """Both hashes are named; nothing is written."""
    other = source_with(source.config, seed=9)
    with pytest.raises(HavocError, match="z vectors fit only the base"):
        export_artifact(other, tmp_path / "a", experts=experts, alpha=(1, 1))
    with pytest.raises(HavocError, match="alpha has 1 weights for 2 experts"):
        export_artifact(source, tmp_path / "a", experts=experts, alpha=(1,))
    assert not list(tmp_path.iterdir())


def test_progress_counts_the_bytes(source: Source, tmp_path: Path) -> None:
    """The bar of the weights ends at the size of the data file."""

    class Recorder:
        def __init__(self) -> None:
            self.totals: dict[str, list[int]] = {}

        def stage(self, name: str, total: int | None, *, unit: str = ""):
            self.totals[name] = [total or 0, 0]
            return self._Stage(self.totals[name])

        class _Stage:
            def __init__(self, counts: list[int]) -> None:
                self.counts = counts

            def __enter__(self):
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def advance(self, n: int = 1, note: str = "") -> None:
                self.counts[1] += n

    recorder = Recorder()
    out = export_artifact(source, tmp_path / "a", progress=recorder)
    size = (out / "model.onnx.data").stat().st_size
    assert recorder.totals["write weights"] == [size, size]


def test_weights_are_asked_for_one_at_a_time(configs: dict[str, HavocConfig], source_with, tmp_path: Path) -> None:
    """No more than two tensors of the base are alive at once while the data file is written."""
    import weakref

    from havoc_core.export.datafile import write_data_file
    from havoc_core.export.fold import FoldedTensors
    from havoc_core.export.layout import plan_layout

    config = configs["text"]
    stored = source_with(config).tensors
    alive: list[weakref.ref] = []
    most = 0

    class Lazy(dict):
        def __getitem__(self, name: str) -> torch.Tensor:
            nonlocal most
            tensor = stored[name].clone()
            alive.append(weakref.ref(tensor))
            most = max(most, sum(reference() is not None for reference in alive))
            return tensor

    folded = FoldedTensors(Lazy(stored), {})
    layout = plan_layout(config, Structure())
    write_data_file(tmp_path / "data", folded, config=config, structure=Structure(), layout=layout)
    assert most <= 2


def test_the_session_reads_what_was_folded(source: Source, basis: Basis, experts: list[Expert], tmp_path: Path) -> None:
    """Another alpha gives other logits; the same alpha by a cached basis the same ones."""
    ids = np.array([[5, 6, 7, 8]])
    logits = {}
    for name, alpha, known in (("a", (1, 0), None), ("b", (1, 0), basis), ("c", (0, 1), None)):
        out = export_artifact(source, tmp_path / name, experts=experts, alpha=alpha, basis=known)
        logits[name], _ = DecoderSession.open(out).prefill(ids)
    assert np.array_equal(logits["a"], logits["b"])
    assert np.abs(logits["a"] - logits["c"]).max() > 0.01
