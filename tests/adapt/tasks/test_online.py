"""Rows that `--online` fetches with `datasets`, from a hub on this machine: those of the same files on the disk."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from havoc_core.adapt.tasks.sources import rows, rows_hash
from tests import local_hub as hubs

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")

ASKED = (("math", "gate"), ("vision", "gate"), ("code", "gate"))
NUM_ROWS = 8
ASK = """
import json, sys
from havoc_core.adapt.tasks.sources import rows, rows_hash
from havoc_core.errors import HavocError
for task, split in json.loads(sys.argv[1]):
    try:
        print(rows_hash(rows(task, split, int(sys.argv[2]), online=True)))
    except HavocError as error:
        print(error)
"""


def gsm8k(n: int) -> dict[str, Any]:
    return {"question": f"Tom has {n} hens and gets {n} more. How many has he?", "answer": f"#### {2 * n}"}


def textvqa(n: int) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (40, 20), (n, 200 - n, 90)).save(file, "JPEG")
    return {
        "image_id": f"i{n}",
        "question_id": n,
        "question": "what does the sign say?",
        "image": {"bytes": file.getvalue(), "path": None},
        "answers": ["Stop"] * 10,
    }


def parquet(some_rows: list[dict[str, Any]], *, pictures: str | None = None) -> bytes:
    """A parquet file as `datasets` writes it: its columns of pictures are marked."""
    table, file = pa.Table.from_pylist(some_rows), io.BytesIO()
    if pictures is not None:
        features = {"info": {"features": {pictures: {"_type": "Image"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, file)
    return file.getvalue()


def card(config: str, folder: str, *parts: str) -> bytes:
    files = "".join(f"  - split: {part}\n    path: {folder}/{part}-*\n" for part in parts)
    return f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n".encode()


MATH = {
    f"main/{part}-00000-of-00001.parquet": parquet([gsm8k(n) for n in numbers])
    for part, numbers in (("train", range(1, 40)), ("test", range(40, 60)))
}
VISION = {
    "data/train-00000-of-00001.parquet": parquet([textvqa(n) for n in range(30)], pictures="image"),
    "data/validation-00000-of-00001.parquet": parquet([textvqa(n) for n in range(30, 40)], pictures="image"),
}
REPOSITORIES = {
    "openai/gsm8k": {"README.md": card("main", "main", "train", "test"), **MATH},
    "lmms-lab/textvqa": {"README.md": card("default", "data", "train", "validation"), **VISION},
}


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a fresh process makes of each task: the hash of its rows, or why there are none."""
    own = {"HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    env = {**{name: value for name, value in os.environ.items() if name not in offline}, **own}
    command = [sys.executable, "-c", ASK, json.dumps(ASKED), str(NUM_ROWS)]
    with hubs.LocalHub(REPOSITORIES) as hub:
        env["HF_ENDPOINT"] = hub.url
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=env, check=True)
    assert any(path.endswith(".parquet") for _, path in hub.asked)
    return dict(zip((task for task, _ in ASKED), done.stdout.splitlines(), strict=True))


def on_disk(folder: Path) -> Path:
    """The same files where `--data` looks for them."""
    for place, files in (("gsm8k", MATH), ("textvqa", VISION)):
        for name, content in files.items():
            path = folder / place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder


@pytest.mark.parametrize("task", ["math", "vision"])
def test_rows_of_the_hub_are_those_of_its_files(fetched: dict[str, str], tmp_path: Path, task: str) -> None:
    """Numbers and pictures, in their order, fetched by `datasets` itself."""
    assert fetched[task] == rows_hash(rows(task, "gate", NUM_ROWS, data_dir=on_disk(tmp_path)))


def test_a_data_set_that_the_hub_lacks_is_one_line(fetched: dict[str, str]) -> None:
    """By the names of the data set and its part."""
    assert fetched["code"].startswith("google-research-datasets/mbpp (test): cannot be read (")
