"""Text artifacts run in onnxruntime-genai unchanged, with the same greedy tokens.

Its package needs `onnxruntime`, which overwrites `onnxruntime-gpu` in one environment. So it lives in one of its own,
and HAVOC_GENAI_PYTHON names that environment's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.completion import generate_ids
from havoc_core.export.runtime.options import GraphOptions
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.model.structure import Structure

PYTHON = os.environ.get("HAVOC_GENAI_PYTHON") or None
NUM_NEW = 24
GENERATE = """
import json, sys
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
rows = json.loads(sys.argv[2])
found = []
for row in rows:
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(row) + int(sys.argv[3]))
    generator = og.Generator(model, parameters)
    generator.append_tokens(row)
    while not generator.is_done():
        generator.generate_next_token()
    found.append([int(token) for token in generator.get_sequence(0)][len(row):])
tokenizer = og.Tokenizer(model)
prompt = [int(token) for token in tokenizer.encode("the quick 12 + 30")]
print(json.dumps({"ids": found, "prompt": prompt, "text": tokenizer.decode(prompt)}))
"""


@pytest.mark.skipif(PYTHON is None, reason="no environment with onnxruntime-genai: `make genai` makes one")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fp32", GraphOptions()),
        ("int8", GraphOptions()),
        ("int4", GraphOptions()),
        ("int4a-hqq-b16", GraphOptions()),
        ("int8a-k_quant-r0.40", GraphOptions()),
        ("int4a-k_quant-b16-r0.40", GraphOptions(dialect="contrib")),
        ("fp32", GraphOptions(logits="all")),
        ("fp32", GraphOptions(cache="static", cache_len=64)),
        ("fp32", GraphOptions(dialect="contrib")),
        ("int4", GraphOptions(dialect="contrib", cache="static", cache_len=64)),
    ],
    ids=str,
)
def test_the_same_greedy_tokens(text_base_directory: Path, tmp_path: Path, name: str, options: GraphOptions) -> None:
    """genai opens the folder as it is and continues every prompt as the session does; its tokenizer reads the text."""
    artifact = export_artifact(text_base_directory, tmp_path / "a", structure=Structure.named(name), options=options)
    rows = [[1, 20, 30, 40], [1, 99, 98, 97, 96, 95, 94], [1, 250]]
    session = DecoderSession.open(artifact)
    ours = generate_ids(session, rows, max_new_tokens=NUM_NEW, eos_ids=session.config.eos_token_ids)
    command = [str(PYTHON), "-c", GENERATE, str(artifact), json.dumps(rows), str(NUM_NEW)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = json.loads(subprocess.run(command, capture_output=True, check=True, text=True, env=environment).stdout)
    assert found["ids"] == ours
    assert session.tokenizer is not None
    assert found["prompt"] == session.tokenizer.encode("the quick 12 + 30")
    assert found["text"] == "the quick 12 + 30"
