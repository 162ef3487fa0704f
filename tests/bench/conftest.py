"""A real, tiny artifact for the bench: random weights, own tokenizer, text and vision, exported once per run."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from havoc_core.bench.judge.record import Record, Workload

SMALL_WORKLOAD = Workload(prompt_tokens=24, context_tokens=16, decode_tokens=5)


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported pico with 1,024 tokens of context; read it, do not change it."""
    import torch

    from havoc_core.export.package import export_artifact
    from havoc_core.model.config import HavocConfig, VisionConfig
    from havoc_core.model.tokenizer import train_tokenizer
    from havoc_core.model.transformer import HavocModel

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["one and one is two", "the red sign"], 280)
    vision = VisionConfig(patch_size=8, num_channels=3, image_token_id=3)
    config = dataclasses.replace(HavocConfig.pico(vision=vision), vocab_size=tokenizer.vocab_size, max_seq_len=1024)
    HavocModel(config).save_pretrained(folder / "base")
    tokenizer.save(folder / "base")
    return export_artifact(folder / "base", folder / "artifact")


@pytest.fixture
def own_artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    """A copy of the tiny artifact that a test may damage."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))


@pytest.fixture(scope="session")
def small_workload() -> Workload:
    """A few tokens, so that a test costs milliseconds."""
    return SMALL_WORKLOAD


@pytest.fixture(scope="session")
def tiny_record(tiny_artifact: Path) -> Record:
    """A record of the tiny artifact, measured with two short latency processes and one memory process."""
    assert "PYTEST_XDIST_WORKER" not in os.environ, "it would be measured beside other tests: mark the test `alone`"
    from havoc_core.bench.measure import run_session
    from havoc_core.bench.profiles import PROFILES, Series
    from havoc_core.bench.watched_run import open_session

    brief = dataclasses.replace(
        PROFILES["quick"],
        num_processes=2,
        warmup_window_s=0.0,
        warmup_max_s=0.1,
        prefill=Series(3, 0.0, 2.0),
        ttft=Series(2, 0.0, 2.0),
        decode=Series(2, 0.0, 2.0),
        memory=Series(2, 0.0, 2.0),
    )
    with open_session(tiny_artifact, profile=brief, workload=SMALL_WORKLOAD, num_threads=1) as session:
        return run_session(session, purpose="confirm")
