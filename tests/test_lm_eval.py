"""The same rows right as in lm-evaluation-harness: by likelihood and by what is written, with and without a template.

A stand-in runs everywhere: a small Llama that was trained, here, on half of its rows, so that it is right on some. In
full, `make real` holds a real model on real rows against it.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from havoc_core.adapt.tasks import sources
from havoc_core.adapt.tasks.evaluation import Scorer, Scores, score
from havoc_core.adapt.tasks.task import Task, load_task
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.options import GraphOptions
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.model.checkpoint import load_base
from havoc_core.model.config import AttentionConfig, HavocConfig, MLPConfig
from havoc_core.model.generation import left_padded
from havoc_core.model.scorer import TorchScorer
from havoc_core.model.transformer import HavocModel

GENAI = os.environ.get("HAVOC_GENAI_PYTHON") or None
NUM_REAL_ROWS = int(os.environ.get("HAVOC_REAL_ROWS") or 200)
NEAR = 1e-3
"""How far two sums of log-likelihoods may be apart."""
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SOUNDS = {
    "dog": "barks at the gate",
    "cat": "meows",
    "cow": "moos in the field",
    "duck": "quacks",
    "lion": "roars out loud",
    "bee": "buzzes",
    "owl": "hoots at night",
    "pig": "grunts",
    "horse": "neighs",
    "sheep": "bleats on the hill",
    "snake": "hisses",
    "crow": "caws",
    "frog": "croaks by the pond",
    "wolf": "howls",
    "mouse": "squeaks",
    "hen": "clucks in the yard",
    "bear": "growls",
    "goat": "baas",
    "dove": "coos on the roof",
    "donkey": "brays",
}

CHOICE = """
name = "sounds"
kind = "choice"
metric = "acc"
[data]
path = "sounds"
problem = ["question"]
[data.splits]
train = "train"
gate = "test"
[prompt]
template = "Question: {{ question }}\\nAnswer:"
[choice]
choices = "choices"
label = "label"
"""
GENERATE = """
name = "sums"
kind = "generate"
metric = "strict"
[data]
path = "sums"
problem = ["question"]
[data.splits]
train = "train"
gate = "test"
[prompt]
template = "Question: {{ question }}\\nAnswer:"
[generate]
answer = "{{ answer }}"
delimiter = " "
[[generate.metrics]]
name = "strict"
extract = '#### (\\-?[0-9\\.\\,]+)'
ignore = [',', '\\$', '(?s).*#### ', '\\.$']
ignore_case = true
[[generate.metrics]]
name = "flexible"
extract = '(-?[$0-9.,]{2,})|(-?[0-9]+)'
which = "last"
ignore = [',', '\\$', '(?s).*#### ', '\\.$']
ignore_case = true
[limits]
max_new_tokens = 40
stop = ["Question:", "</s>", "<|im_end|>"]
"""


def sounds() -> list[dict[str, Any]]:
    """Forty questions with two to five choices of many lengths."""
    names, found = list(SOUNDS), []
    for place, name in enumerate(names):
        others = [SOUNDS[names[(place + step) % len(names)]] for step in (3, 7, 11, 13)][: 1 + place % 4]
        choices = [*others[: place % 3], SOUNDS[name], *others[place % 3 :]]
        for question in (f"What is it that a {name} does?", f"A {name} is heard from afar. What happens?"):
            found.append({"question": question, "choices": choices, "label": choices.index(SOUNDS[name])})
    return found


def sums() -> list[dict[str, Any]]:
    """Forty sums with their working and the answer behind `####`, as gsm8k has them."""
    found = []
    for place in range(40):
        a, b = 1 + place * 7 % 10, 2 + place % 9
        question = f"Ann has {a} pens and buys {b} in shop {place}. How many are there?"
        found.append({"question": question, "answer": f"{a} + {b} = {a + b}\n#### {a + b}"})
    return found


def write_rows(folder: Path, rows: list[dict[str, Any]], shots: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    for part, some in (("train", shots), ("test", rows)):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def few_shots() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Solved rows of either task that are no rows of its test."""
    ours = [
        {"question": f"What is it that a {name} does?", "choices": [said, "sleeps"], "label": 0}
        for name, said in (
            ("fox", "yaps"),
            ("gull", "screams"),
            ("rook", "caws"),
            ("seal", "barks"),
            ("bull", "snorts"),
        )
    ]
    numbers = [
        {"question": f"Ben has {a} eggs and finds {a}. How many?", "answer": f"{a} + {a} = {2 * a}\n#### {2 * a}"}
        for a in range(3, 8)
    ]
    return ours, numbers


@pytest.fixture(scope="module", params=["plain", "chat"])
def stand_in(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained Llama in Hugging Face's layout, beside its tasks: plain with a beginning of text, chat without one."""
    is_chat = request.param == "chat"
    folder = tmp_path_factory.mktemp(request.param)
    shots, numbers = few_shots()
    write_rows(folder / "sounds", sounds(), shots)
    write_rows(folder / "sums", sums(), numbers)
    (folder / "sounds.toml").write_text(CHOICE)
    (folder / "sums.toml").write_text(GENERATE)
    texts = [f"Question: {row['question']}\nAnswer: {row['choices'][row['label']]}\n\n" for row in sounds()[::2]]
    texts += [f"Question: {row['question']}\nAnswer: {row['answer']}\n\nQuestion: and" for row in sums()[::2]]
    base = folder / "base"
    base.mkdir()
    backend = write_tokenizer(base, texts, is_chat=is_chat)
    trained(backend, texts).save_pretrained(base)
    return folder


def write_tokenizer(folder: Path, texts: list[str], *, is_chat: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    if not is_chat:
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": special[0], "eos_token": special[2 if is_chat else 0], "pad_token": special[0]}
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    fields |= {"chat_template": CHATML} if is_chat else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return backend


def trained(backend: tokenizers.Tokenizer, texts: list[str]) -> HavocModel:
    """A model of three layers, a few seconds after its birth."""
    torch.manual_seed(0)
    config = HavocConfig(
        vocab_size=backend.get_vocab_size(),
        d_model=64,
        num_layers=3,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
        mlp=MLPConfig(hidden_dim=128),
        max_seq_len=640,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = HavocModel(config)
    ids_BT, mask_BT = left_padded([backend.encode(text).ids for text in texts], pad_id=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(140):
        loss, _ = model.compute_loss(ids_BT, attention_mask=mask_BT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


Oracle = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    """`lm_eval(model, config, ...)`: what lm-evaluation-harness says of each row, with its own backend."""
    import warnings

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # of its own libraries, none of ours
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield functools.partial(asked_of_lm_eval, cache=tmp_path_factory.mktemp("cache"))


def asked_of_lm_eval(
    model: Any, config: dict[str, Any], *, cache: Path, num_rows: int, chat: bool = False, num_shots: int = 0
) -> list[dict[str, Any]]:
    """One dict a row, in order; of a task with filters one list of rows behind the other."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if isinstance(model, Path):
        where = {"pretrained": str(model)}
        if model.suffix == ".gguf":
            where = {"pretrained": str(model.parent), "gguf_file": model.name}
        model = HFLM(**where, device="cpu", dtype="float32", batch_size=8)
    config = {
        **config,
        "task": "asked",
        "num_fewshot": num_shots,
        "fewshot_split": config["training_split"],
        "fewshot_config": {"sampler": "first_n"},
        "dataset_kwargs": {**config["dataset_kwargs"], "cache_dir": str(cache)},
    }
    found = simple_evaluate(
        model=model,
        tasks=[config],
        limit=num_rows,
        log_samples=True,
        apply_chat_template=chat,
        fewshot_as_multiturn=False,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),  # the thousands it comes with take seconds to index
    )
    return list(found["samples"]["asked"])


def choice_config(**where: Any) -> dict[str, Any]:
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "metric_list": metrics,
        **where,
    }


def generate_config(**where: Any) -> dict[str, Any]:
    """gsm8k's own rules, as lm-evaluation-harness writes them in `gsm8k.yaml`."""
    return {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"],
            }
        ],
        "filter_list": [
            {"name": "strict", "filter": [_regex("#### (\\-?[0-9\\.\\,]+)"), {"function": "take_first"}]},
            {
                "name": "flexible",
                "filter": [_regex("(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1), {"function": "take_first"}],
            },
        ],
        **where,
    }


def _regex(pattern: str, **more: Any) -> dict[str, Any]:
    return {"function": "regex", "regex_pattern": pattern, **more}


def files(folder: Path, kind: str, name: str = "{part}.jsonl") -> dict[str, Any]:
    data_files = {part: str(folder / name.format(part=part)) for part in ("train", "test")}
    return {
        "dataset_path": kind,
        "dataset_kwargs": {"data_files": data_files},
        "training_split": "train",
        "test_split": "test",
    }


def require_same_choices(scorer: Scorer, task: Task, rows: list, theirs: list[dict[str, Any]]) -> Scores:
    """Sums of log-likelihoods within `NEAR`, and the same rows right by both metrics."""
    found = scorer.log_likelihoods([(task.prompt(row), task.choices(row)) for row in rows])
    for ours, sample in zip(found, theirs, strict=True):
        sums_there = [float(value) for value, _ in sample["filtered_resps"]]
        assert [item.log_likelihood for item in ours] == pytest.approx(sums_there, abs=NEAR)
        assert [item.is_greedy for item in ours] == [bool(is_greedy) for _, is_greedy in sample["filtered_resps"]]
    scores = score(scorer, task, rows)
    for metric in ("acc", "acc_norm"):
        assert scores.right_by[metric] == tuple(sample[metric] == 1 for sample in theirs), metric
    return scores


def require_same_texts(scorer: Scorer, task: Task, rows: list, theirs: list[dict[str, Any]]) -> Scores:
    """The same text of every row, and the same rows right by both extractions."""
    scores = score(scorer, task, rows)
    for metric in ("strict", "flexible"):
        samples = [sample for sample in theirs if sample["filter"] == metric]
        assert list(scores.completions) == [sample["resps"][0][0] for sample in samples]
        assert scores.right_by[metric] == tuple(sample["exact_match"] == 1 for sample in samples), metric
    return scores


@pytest.mark.parametrize("num_shots", [0, 5])
def test_choices_are_right_on_the_same_rows(stand_in: Path, lm_eval: Oracle, num_shots: int) -> None:
    """Forty rows, 0-shot and 5-shot: torch and the artifact say of every choice what lm-evaluation-harness says."""
    is_chat = stand_in.name.startswith("chat")
    task = load_task(stand_in / "sounds.toml", few_shot=num_shots)
    rows = sources.rows(task, "gate", 40)
    config = choice_config(**files(stand_in / "sounds", "json"), doc_to_target="{{label}}", doc_to_choice="{{choices}}")
    theirs = lm_eval(stand_in / "base", config, num_rows=40, chat=is_chat, num_shots=num_shots)
    base = load_base(stand_in / "base")
    scores = require_same_choices(TorchScorer(base.model, base.tokenizer), task, rows, theirs)
    artifact = DecoderSession.open(export_artifact(stand_in / "base", stand_in / f"a{num_shots}"), num_threads=1)
    require_same_choices(artifact, task, rows, theirs)
    assert scores.right_by["acc"] != scores.right_by["acc_norm"]
    assert 8 < sum(scores.right) < 40


def test_the_template_can_be_left_out(stand_in: Path, lm_eval: Oracle) -> None:
    """Without the chat template, as lm-evaluation-harness scores by default."""
    task = load_task(stand_in / "sounds.toml")
    config = choice_config(**files(stand_in / "sounds", "json"), doc_to_target="{{label}}", doc_to_choice="{{choices}}")
    theirs = lm_eval(stand_in / "base", config, num_rows=40)
    base = load_base(stand_in / "base", is_chat=False)
    require_same_choices(TorchScorer(base.model, base.tokenizer), task, sources.rows(task, "gate", 40), theirs)


def test_written_answers_are_right_on_the_same_rows(stand_in: Path, lm_eval: Oracle) -> None:
    """The same greedy text up to the same stop string, strict and flexible extraction right on the same rows."""
    is_chat = stand_in.name.startswith("chat")
    task = load_task(stand_in / "sums.toml")
    rows = sources.rows(task, "gate", 40)
    until = {"until": list(task.stop), "do_sample": False, "temperature": 0.0, "max_gen_toks": task.max_new_tokens}
    config = generate_config(**files(stand_in / "sums", "json"), generation_kwargs=until)
    theirs = lm_eval(stand_in / "base", config, num_rows=40, chat=is_chat)
    base = load_base(stand_in / "base")
    scores = require_same_texts(TorchScorer(base.model, base.tokenizer), task, rows, theirs)
    artifact = DecoderSession.open(export_artifact(stand_in / "base", stand_in / "writer"), num_threads=1)
    require_same_texts(artifact, task, rows, theirs)
    if not is_chat:
        assert 5 < sum(scores.right) < 40


def require_no_bos(stand_in: Path) -> None:
    if not stand_in.name.startswith("chat"):
        pytest.skip("lm-eval's ONNX backends put no beginning of text in front, which this base's prompts have")


def test_the_artifact_runs_in_lm_evals_onnx_runtime(stand_in: Path, lm_eval: Oracle) -> None:
    """The folder as it is, exported with all logits: its backend `onnxruntime` gives the same rows right."""
    from lm_eval.models.onnxruntime_ort import ONNXRuntimeLM

    require_no_bos(stand_in)
    artifact = export_artifact(stand_in / "base", stand_in / "all", options=GraphOptions(logits="all"))
    config = choice_config(**files(stand_in / "sounds", "json"), doc_to_target="{{label}}", doc_to_choice="{{choices}}")
    theirs = lm_eval(ONNXRuntimeLM(str(artifact), execution_provider="cpu"), config, num_rows=40)
    task = load_task(stand_in / "sounds.toml")
    session = DecoderSession.open(artifact, num_threads=1, is_chat=False)
    require_same_choices(session, task, sources.rows(task, "gate", 40), theirs)


IN_GENAI = """
import json, sys
sys.path.append(sys.argv[1])  # lm-eval and what it needs; onnxruntime is this environment's own
from lm_eval.api.instance import Instance
from lm_eval.models.onnxruntime_genai import ONNXRuntimeGenAILM
model = ONNXRuntimeGenAILM(sys.argv[2])
asked = [Instance(request_type="loglikelihood", doc={}, arguments=tuple(pair), idx=0) for pair in json.load(sys.stdin)]
print(json.dumps([float(value) for value, _ in model.loglikelihood(asked)]))
"""


@pytest.mark.skipif(GENAI is None, reason="no environment with onnxruntime-genai: `make genai` makes one")
def test_the_artifact_runs_in_lm_evals_genai(stand_in: Path) -> None:
    """The folder as it is, exported with all logits: its backend `onnxruntime-genai` gives the same sums."""
    require_no_bos(stand_in)
    artifact = export_artifact(stand_in / "base", stand_in / "genai", options=GraphOptions(logits="all"))
    task = load_task(stand_in / "sounds.toml")
    asked = [(task.prompt(row), task.choices(row)) for row in sources.rows(task, "gate", 10)]
    pairs = [(prompt.text, choice) for prompt, choices in asked for choice in choices]
    command = [str(GENAI), "-W", "ignore", "-c", IN_GENAI, sysconfig.get_paths()["purelib"], str(artifact)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, input=json.dumps(pairs), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    session = DecoderSession.open(artifact, num_threads=1, is_chat=False)
    ours = [item.log_likelihood for items in session.log_likelihoods(asked) for item in items]
    assert ours == pytest.approx(json.loads(done.stdout.splitlines()[-1]), abs=NEAR)


def arc(data: Path) -> dict[str, Any]:
    where = files(data / "ai2_arc" / "ARC-Easy", "parquet", "{part}-00000-of-00001.parquet")
    return choice_config(**where, doc_to_target="{{choices.label.index(answerKey)}}", doc_to_choice="{{choices.text}}")


@pytest.mark.real
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("num_shots", "is_chat"), [(0, False), (0, True), (5, False), (5, True)])
def test_a_real_model_on_real_rows(
    real_model: Path, real_data: Path, lm_eval: Oracle, num_shots: int, is_chat: bool
) -> None:
    """ARC-Easy, 200 rows or HAVOC_REAL_ROWS: every sum, and the same rows right for acc and acc_norm."""
    task = load_task("arc-easy", data_dir=real_data, few_shot=num_shots)
    rows = sources.rows(task, "gate", NUM_REAL_ROWS, data_dir=real_data)
    theirs = lm_eval(real_model, arc(real_data), num_rows=NUM_REAL_ROWS, chat=is_chat, num_shots=num_shots)
    base = load_base(str(real_model), is_chat=is_chat)
    require_same_choices(TorchScorer(base.model, base.tokenizer), task, rows, theirs)


@pytest.mark.real
@pytest.mark.timeout(3600)
def test_a_real_model_writes_on_real_rows(real_model: Path, real_data: Path, lm_eval: Oracle) -> None:
    """gsm8k, a fifth as many rows, greedy: the same rows right for strict and flexible extraction."""
    task = load_task("gsm8k", data_dir=real_data)
    rows = sources.rows(task, "gate", NUM_REAL_ROWS // 5, data_dir=real_data)
    until = {"until": list(task.stop), "do_sample": False, "temperature": 0.0, "max_gen_toks": task.max_new_tokens}
    where = files(real_data / "gsm8k" / "main", "parquet", "{part}-00000-of-00001.parquet")
    theirs = lm_eval(real_model, generate_config(**where, generation_kwargs=until), num_rows=len(rows))
    base = load_base(str(real_model), is_chat=False)
    require_same_texts(TorchScorer(base.model, base.tokenizer), task, rows, theirs)
