"""What exporting buys: decode speed, candidates without re-export, folds at the speed of memory; ratios in one run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from havoc_core.adapt.expert import Expert
from havoc_core.adapt.mixture import DenseMixture
from havoc_core.adapt.svf import compute_basis
from havoc_core.export.candidates import CandidateSessions
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.artifact import read_manifest
from havoc_core.export.runtime.completion import generate_ids
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.export.source import Source
from havoc_core.model.blocks import LayerCache
from havoc_core.model.config import HavocConfig
from havoc_core.model.generation import decode_one, prefill, sample_tokens
from havoc_core.model.structure import Structure
from havoc_core.model.transformer import HavocModel
from havoc_core.model.weights import RandomTensors

NUM_PROMPT, NUM_STEPS = 512, 64


@pytest.fixture(scope="module")
def source() -> Source:
    """The shape of the bundled model, random weights of trained scale."""
    config = HavocConfig.nano().replace(initializer_range=0.08)
    return Source("nano", config, RandomTensors(config), None)


@pytest.fixture(scope="module")
def session(source: Source, tmp_path_factory: pytest.TempPathFactory) -> DecoderSession:
    return DecoderSession.open(export_artifact(source, tmp_path_factory.mktemp("perf") / "a"))


def best_s(work: Callable[[], object], *, num_rounds: int = 5) -> float:
    """The shortest of a few runs: what the code costs when the machine leaves it alone."""
    times = []
    for _ in range(num_rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for torch, as for the session it is compared with: other work on the machine disturbs that least."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def test_decode_against_torch_eager(benchmark, row, source: Source, tmp_path: Path, one_thread: None) -> None:
    """One row at context 512, one thread, CPU time: the artifact's steps against `decode_one` of the same weights."""
    model = HavocModel.from_tensors(source.config, source.tensors, source="perf")
    session = DecoderSession.open(export_artifact(source, tmp_path / "a"), num_threads=1)
    ids = np.random.default_rng(0).integers(4, 512, (1, NUM_PROMPT))
    _, past = session.prefill(ids)

    def ours() -> float:
        after = past
        start = time.process_time()
        for _ in range(NUM_STEPS):
            _, after = session.decode(ids[:, :1], None, after)
        return time.process_time() - start

    @torch.inference_mode()
    def theirs() -> float:
        shape = (1, 2, NUM_PROMPT + NUM_STEPS, 32)
        cache = [LayerCache(torch.empty(shape), torch.empty(shape)) for _ in range(source.config.num_layers)]
        prefill(model, torch.from_numpy(ids), None, None, cache)
        start = time.process_time()
        for _ in range(NUM_STEPS):
            decode_one(model, torch.from_numpy(ids[:, 0]), None, cache)
        return time.process_time() - start

    benchmark.pedantic(ours, rounds=3, warmup_rounds=1)
    eager_s, ours_s = (min(work() for _ in range(6)) for work in (theirs, ours))
    detail = f"{NUM_STEPS / ours_s:,.0f} and {NUM_STEPS / eager_s:,.0f} tokens per CPU second"
    row("artifact against torch eager, nano, one thread: decode", eager_s / ours_s, goal=3, detail=detail)


def test_batched_greedy_against_torch(benchmark, row, source: Source, session: DecoderSession) -> None:
    """256 prompts of 40 to 70 tokens, 32 new ones each, in one batch: how the search scores a candidate."""
    model = HavocModel.from_tensors(source.config, source.tensors, source="perf")
    rng = np.random.default_rng(0)
    rows = [rng.integers(4, 512, rng.integers(40, 70)).tolist() for _ in range(256)]
    ids = torch.from_numpy(rng.integers(4, 512, (256, 55)))
    eager_s = best_s(lambda: sample_tokens(model, ids, max_new_tokens=32, temperature=0.0, eos_id=[]), num_rounds=2)
    benchmark.pedantic(
        lambda: generate_ids(session, rows, max_new_tokens=32, batch_size=256), rounds=2, warmup_rounds=1
    )
    ours_s = benchmark.stats["min"]
    detail = f"{256 * 32 / ours_s:,.0f} tokens a second"
    row("artifact against torch eager, nano: greedy text for 256 prompts", eager_s / ours_s, goal=1, detail=detail)


@pytest.mark.parametrize("weight_format", ["fp32", "int8"])
def test_candidate_switch_against_export(benchmark, row, source: Source, tmp_path: Path, weight_format: str) -> None:
    """Another alpha in a live session against exporting it: fold, encode and open, parity and files left out."""
    structure = Structure(weight_format)
    basis = compute_basis(source.tensors, base_hash=source.hash)
    experts = [
        _expert(source, basis, domain, seed) for seed, domain in enumerate(("math", "code", "reasoning", "vision"))
    ]
    alpha = (1.2, 0.8, 1.5, 0.9)
    export_s = best_s(
        lambda: export_artifact(source, tmp_path / "a", experts=experts, alpha=alpha, structure=structure), num_rounds=3
    )
    sessions = CandidateSessions(source, basis, experts)
    benchmark.pedantic(lambda: sessions.open(alpha, structure), rounds=10, warmup_rounds=2)
    switch_s = benchmark.stats["min"]
    detail = f"{switch_s * 1e3:.1f} ms, {export_s * 1e3:.0f} ms"
    row(f"another alpha against an export, nano, {weight_format}", export_s / switch_s, goal=50, detail=detail)


def test_fold_against_memory_bandwidth(benchmark, row) -> None:
    """Folding four experts reads five rows and writes one: share of the speed at which the same bytes are copied."""
    config = HavocConfig.nano().replace(d_model=512, mlp=HavocConfig.nano().mlp.__class__(hidden_dim=1408))
    source = Source("wide", config, RandomTensors(config), None)
    basis = compute_basis(source.tensors, base_hash=source.hash, precision=torch.float32)
    experts = [
        _expert(source, basis, domain, seed) for seed, domain in enumerate(("math", "code", "reasoning", "vision"))
    ]
    mixture = DenseMixture(source.tensors, basis, experts)
    benchmark.pedantic(lambda: mixture.fold((1.2, 0.8, 1.5, 0.9)), rounds=8, warmup_rounds=2)
    num_values = mixture.num_bytes // 4 // 2
    origin, target = torch.ones(num_values), torch.empty(num_values)
    copy_s = best_s(lambda: target.copy_(origin), num_rounds=8)
    share = copy_s / benchmark.stats["min"]
    row(
        "fold of four experts against a copy of the same bytes",
        share,
        goal=0.5,
        detail=f"{mixture.num_bytes / 1e6:.0f} MB",
    )


def test_switching_a_live_artifact(benchmark, row, tmp_path: Path, one_thread: None) -> None:
    """A mixture of four experts reads five folds and writes one; an expert alone is handed over as it lies."""
    nano = HavocConfig.nano()
    config = nano.replace(d_model=512, mlp=nano.mlp.__class__(hidden_dim=1408), vision=None)
    source = Source("wide", config, RandomTensors(config), None)
    basis = compute_basis(source.tensors, base_hash=source.hash, precision=torch.float32)
    domains = ("math", "code", "reasoning", "vision")
    experts = [_expert(source, basis, domain, seed) for seed, domain in enumerate(domains)]
    out = export_artifact(source, tmp_path / "a", experts=experts, alpha=(0,) * 4, basis=basis, is_live=True)
    open_s = best_s(lambda: DecoderSession.open(out, num_threads=1))
    session, table = DecoderSession.open(out, num_threads=1), read_manifest(out).live
    assert table is not None
    turns = itertools.count()

    def switch_mixture() -> None:
        session.set_alpha(dict.fromkeys(domains, 0.5 + next(turns) % 2))

    def switch_expert() -> None:
        session.set_alpha({domains[next(turns) % 2]: 1.0})

    switch_expert_s = best_s(switch_expert, num_rounds=20)
    benchmark.pedantic(switch_mixture, rounds=10, warmup_rounds=2)
    origin, target = (np.ones(table.num_bytes // 4 * 3, np.float32) for _ in range(2))
    copy_s = best_s(lambda: np.copyto(target, origin), num_rounds=8)
    share, detail = copy_s / benchmark.stats["min"], f"{6 * table.num_bytes / 1e6:.0f} MB"
    row("a mixture of a live artifact against a copy of the same bytes", share, goal=0.4, detail=detail)
    detail = f"{switch_expert_s * 1e3:.2f} ms, {open_s * 1e3:.0f} ms"
    row("an expert of a live artifact against opening another", open_s / switch_expert_s, goal=20, detail=detail)


def _expert(source: Source, basis, domain: str, seed: int) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    deltas = {name: torch.randn(size, generator=generator) * 0.1 for name, size in basis.num_directions().items()}
    return Expert(domain=domain, deltas=deltas, base_hash=source.hash, basis_hash=basis.hash)
