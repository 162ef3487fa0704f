"""Greedy text is that of transformers, token for token, from the base and from its artifact, chat template included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from havoc_core import cli
from havoc_core.adapt.tasks.task import Prompt
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.completion import generate_ids
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.model.checkpoint import Base, load_base
from havoc_core.model.config_file import is_gguf
from havoc_core.model.generation import encode_prompts, left_padded, sample_tokens
from tests import gguf_files as files

NUM_NEW, NEAR_TIE = 128, 1e-4
TOPICS = "the sea, a bicycle, bread, winter, the moon, a library, music, rain, chess, a garden".split(", ")
PROMPTS = [
    form.format(topic=topic)
    for topic in TOPICS
    for form in (
        "What is {topic}?",
        "Write one sentence about {topic}.",
        "Name three things that go with {topic}, and say why.",
        "def describe():\n    return '{topic}",
        "12 + 30 = 42. Now explain {topic} to a child:",
    )
]


def theirs_of(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer as transformers loads them, in fp32."""
    folder, settings = (path.parent, {"gguf_file": path.name}) if is_gguf(path) else (path, {})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder, **settings)


def their_ids(model: Any, tokenizer: Any, prompts: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompt ids and greedy new ids of each prompt, in one left-padded batch."""
    rows = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in prompts
    ]
    ids, mask = left_padded(rows, pad_id=tokenizer.pad_token_id)
    with torch.inference_mode():
        whole = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NUM_NEW)
    return rows, [ended(row, (tokenizer.eos_token_id,)) for row in whole[:, ids.shape[1] :].tolist()]


def base_ids(base: Base, prompts: list[str]) -> list[list[int]]:
    ids_BT, mask_BT, _ = encode_prompts(base.model, base.tokenizer, [Prompt(text) for text in prompts])
    new_BN = sample_tokens(
        base.model, ids_BT, mask_BT, max_new_tokens=NUM_NEW, temperature=0, eos_id=base.tokenizer.eos_ids
    )
    return [ended(row, base.tokenizer.eos_ids) for row in new_BN.tolist()]


def ended(row: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    ends = [index for index, token_id in enumerate(row) if token_id in eos_ids]
    return row[: ends[0] + 1] if ends else row


def num_near_ties(model: Any, rows: list[list[int]], theirs: list[list[int]], ours: list[list[int]]) -> int:
    """How many rows part where the two likeliest tokens lie nearer than `NEAR_TIE`; any other difference fails."""
    count = 0
    for prompt, expected, found in zip(rows, theirs, ours, strict=True):
        if expected == found:
            continue
        step = next(i for i in range(NUM_NEW) if expected[i : i + 1] != found[i : i + 1])
        with torch.inference_mode():
            top = model(torch.tensor([prompt + expected[:step]])).logits[0, -1].topk(2).values
        assert (top[0] - top[1]).item() < NEAR_TIE, f"{prompt}: parts at new token {step}, no near-tie"
        count += 1
    return count


def assert_greedy_is_the_same(path: Path, artifact: Path, prompts: list[str]) -> None:
    model, tokenizer = theirs_of(path)
    rows, theirs = their_ids(model, tokenizer, prompts)
    base, session = load_base(path), DecoderSession.open(artifact)
    assert [base.tokenizer.encode_prompt(text) for text in prompts] == rows
    assert [session.tokenizer.encode_prompt(text) for text in prompts] == rows
    exported = generate_ids(session, rows, max_new_tokens=NUM_NEW, eos_ids=session.tokenizer.eos_ids)
    for name, ours in (("base", base_ids(base, prompts)), ("artifact", exported)):
        near = num_near_ties(model, rows, theirs, ours)
        lengths = sorted(len(row) for row in ours)
        print(
            f"{name}: {len(rows) - near} of {len(rows)} texts equal, {near} part at a near-tie; {sum(lengths)} tokens"
        )
        assert near <= len(rows) // 10
    texts = session.generate_text([Prompt(prompts[0])], max_new_tokens=NUM_NEW)
    assert texts == [tokenizer.decode(exported[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)]


def test_greedy_text_is_that_of_transformers(tmp_path: Path) -> None:
    """50 prompts of 128 new tokens through a chat template, from a GGUF file of random weights."""
    path = tmp_path / "model.gguf"
    files.write_gguf(path, block="Q8_0")
    assert_greedy_is_the_same(path, export_artifact(path, tmp_path / "artifact"), PROMPTS)


@pytest.mark.real
@pytest.mark.timeout(3 * 3600)
def test_greedy_text_of_the_real_model(real_model: Path, tmp_path: Path) -> None:
    """50 prompts of 128 new tokens on the base of `make real`."""
    assert_greedy_is_the_same(real_model, export_artifact(real_model, tmp_path / "artifact"), PROMPTS)


def test_generate_answers_through_the_template_and_plainly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`havoc generate` on base and artifact: the same text, another one with --no-chat, no torch needed to tell."""
    path, out = tmp_path / "model.gguf", tmp_path / "artifact"
    files.write_gguf(path, block="Q8_0")
    assert cli.main(["export", str(path), "--out", str(out), "--quiet"]) == 0
    capsys.readouterr()
    said = {}
    for model in (path, out):
        for flag in ([], ["--no-chat"]):
            assert cli.main(["generate", str(model), "--prompt", "Hello", "--max-new-tokens", "12", *flag]) == 0
            said[model, bool(flag)] = capsys.readouterr().out
    assert said[path, False] == said[out, False] != said[path, True] == said[out, True]
    assert {file.name for file in out.iterdir()} >= {"tokenizer.json", "tokenizer_config.json", "genai_config.json"}
    assert cli.main(["verify", str(out), "--base", str(path)]) == 0
