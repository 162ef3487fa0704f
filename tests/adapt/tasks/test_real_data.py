"""On every public row the right answer is right, however it is written; gsm8k's rules are lm-evaluation-harness's."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from havoc_core.adapt.tasks.sources import SPLITS, rows
from havoc_core.adapt.tasks.task import Row, load_task

COUNTS = {"gsm8k": 8_400, "arc-easy": 4_100, "mbpp": 950}
"""Fewer than the public parts hold together, and more than any one of them."""

WORDINGS = (
    "{text}",
    " {text}",
    "Answer: {text}",
    "answer: {bare}",
    "Answer: {label}",
    "The answer is ({label}).",
    "Answer: **{label}**",
    "Answer: ${label}$",
    "Answer: {label}. {text}",
    "({label}) {text}",
    "Answer: {text}\n\nQuestion: Which is next?\nAnswer: {other}",
    "Answer: {label}\nBecause it is.",
)


def choice_wordings(row: Row) -> list[str]:
    """Ways in which a model names the right choice of a row of ARC."""
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    place = labels.index(row["answerKey"])
    text, other = texts[place], texts[place - 1]
    bare = text.rstrip(".").lower()
    return [wording.format(text=text, bare=bare, label=labels[place], other=other) for wording in WORDINGS]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.timeout(1200)
def test_the_reference_of_every_public_row_is_right(real_data: Path, name: str) -> None:
    """All parts of the data, by every metric; and again with more text behind it."""
    if name == "mbpp" and sys.platform != "linux":
        pytest.skip("code runs in the sandbox on Linux only")
    task = load_task(name)
    found = [row for split in SPLITS for row in rows(task, split, 10_000, data_dir=real_data, may_be_fewer=True)]
    assert len(found) > COUNTS[name]
    after = (task.stop[0] + " and more: 7 of 8.") if name != "arc-easy" else "\n\nQuestion: what is A?\nAnswer: B"
    for text in ("", after):
        pairs = [(row, task.reference(row) + text) for row in found]
        judged = task.judge(pairs) if task.kind == "choice" else None
        rewards = [[reward] for reward in judged] if judged else [list(by.values()) for by in task.judge_all(pairs)]
        wrong = [
            (row, reward.reason)
            for row, some in zip(found, rewards, strict=True)
            for reward in some
            if not reward.value
        ]
        assert wrong == []


def test_every_wording_of_the_right_choice_is_right(real_data: Path) -> None:
    """Text, label, brackets, emphasis, and both with a next question behind: of every row of ARC-Easy."""
    task = load_task("arc-easy")
    found = [row for split in SPLITS for row in rows(task, split, 10_000, data_dir=real_data, may_be_fewer=True)]
    pairs = [(row, text) for row in found for text in choice_wordings(row)]
    wrong = [
        (text, row["choices"]) for (row, text), reward in zip(pairs, task.judge(pairs), strict=True) if not reward.value
    ]
    assert wrong == []


ARC = {
    "id": "x",
    "question": "Which is inherited?",
    "choices": {
        "text": ["A dog has spots.", "None of the above", "A dog is named Rex.", "The answer of the dog"],
        "label": ["A", "B", "C", "D"],
    },
}


@pytest.mark.parametrize("key", ["A", "B", "C", "D"])
def test_a_stand_in_of_every_wording(key: str) -> None:
    """Choices that begin with an article, end in a full stop, or speak of an answer themselves."""
    task, row = load_task("arc-easy"), ARC | {"answerKey": key}
    texts = choice_wordings(row)
    assert [reward.outcome for reward in task.judge([(row, text) for text in texts])] == ["right"] * len(texts)
    others = [text for other in "ABCD" if other != key for text in choice_wordings(ARC | {"answerKey": other})]
    assert {reward.outcome for reward in task.judge([(row, text) for text in others])} == {"wrong"}


GOLDS = ("5", "1/2", "1 000", "1e3", "\u22125", "\u20ac5", "1,00,000", "1,234", "$70", "2.50", "-3", "0")


@pytest.mark.parametrize("gold", GOLDS)
def test_a_gold_answer_is_read_however_it_is_written(gold: str) -> None:
    """The row's own answer is right by both metrics, another number is wrong."""
    task, row = load_task("gsm8k"), {"question": "How many?", "answer": f"So it is.\n#### {gold}"}
    task.check(row)
    for text, is_right in (
        (task.reference(row), True),
        (f"#### {gold}\n\nQuestion: x #### 9", True),
        ("#### 77", False),
    ):
        assert {reward.value for reward in task.judge_all([(row, text)])[0].values()} == {float(is_right)}, text


COMPLETIONS = (
    "#### 5",
    "5",
    "The answer is $5.",
    "#### 5.",
    "#### 5.0",
    "It is 5, not 6",
    "6\n#### 5\n#### 7",
    "$1,000",
    "#### -5",
    "",
    "none",
    "5 5 5",
    "5%",
    "....",
    "2+3=<<2+3=5>>5",
    " 5 ",
    "#### $5",
    "####5",
    "\u00bd",
)


def lm_eval_judgement(row: Row, text: str) -> dict[str, bool]:
    """What lm-evaluation-harness's own filters and metric say, by the rules of its gsm8k.yaml."""
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    metrics = pytest.importorskip("lm_eval.api.metrics")
    yaml = (Path(extraction.__file__).parents[1] / "tasks" / "gsm8k" / "gsm8k.yaml").read_text()
    config: dict[str, Any] = pytest.importorskip("yaml").safe_load(yaml)
    rules = {rule["name"]: rule["filter"][0] for rule in config["filter_list"]}
    found = {}
    for name, rule in rules.items():
        options = {key: value for key, value in rule.items() if key != "function"}
        answer = extraction.RegexFilter(**options).apply([[text]], [row])
        (metric,) = config["metric_list"]
        options = {key: metric[key] for key in ("regexes_to_ignore", "ignore_case", "ignore_punctuation")}
        score = metrics.exact_match_hf_evaluate([next(iter(answer))[0]], [row["answer"]], **options)
        found[name.split("-")[0]] = bool(score["exact_match"])
    return found


@pytest.mark.parametrize("gold", ["5", "1,000", "-5"])
def test_gsm8ks_rules_are_those_of_lm_eval(gold: str) -> None:
    """Strict and flexible extraction agree with the harness's own code on every completion, odd ones too."""
    task, row = load_task("gsm8k"), {"question": "How many?", "answer": f"So.\n#### {gold}"}
    for text in COMPLETIONS:
        (rewards,) = task.judge_all([(row, text)])
        assert {name: bool(reward.value) for name, reward in rewards.items()} == lm_eval_judgement(row, text), text


def test_prompts_are_those_of_lm_eval() -> None:
    """The templates of its arc_easy.yaml and gsm8k.yaml, word for word."""
    lm_eval = pytest.importorskip("lm_eval")
    folder = Path(lm_eval.__file__).parent / "tasks"
    for name, file in (("arc-easy", "arc/arc_easy.yaml"), ("gsm8k", "gsm8k/gsm8k.yaml"), ("mbpp", "mbpp/mbpp.yaml")):
        theirs = pytest.importorskip("yaml").safe_load(re.sub(r"!function", "", (folder / file).read_text()))
        row = {"question": "Why?\n ", "text": "Do.", "test_list": ["assert 1", "assert 2", "assert 3"]}
        from jinja2 import Environment

        expected = Environment(keep_trailing_newline=True).from_string(theirs["doc_to_text"]).render(row)
        assert load_task(name).prompt(row).text == expected
        assert set(theirs.get("generation_kwargs", {}).get("until", [])) <= set(load_task(name).stop)
