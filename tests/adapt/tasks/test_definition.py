"""A user's own task file: what it may say, and that every mistake in it, or in its data, is one line."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest

from havoc_core.adapt.tasks import sources
from havoc_core.adapt.tasks.names import bundled_tasks
from havoc_core.adapt.tasks.sources import data_hash, rows
from havoc_core.adapt.tasks.task import load_task
from havoc_core.errors import HavocError

CHOICE = """
kind = "choice"
metric = "acc"

[data]
path = "rows.jsonl"
problem = ["q"]

[prompt]
template = "Q: {{ q }}\\nA:"

[choice]
choices = "options"
label = "right"
"""
WRITTEN = """
kind = "generate"
metric = "exact"

[data]
path = "."
problem = ["q"]
splits = { train = "train", gate = "test" }

[prompt]
template = "{{ q }} ="

[few_shot]
separator = "; "

[generate]
answer = "{{ a }}"
delimiter = " "

[[generate.metrics]]
name = "exact"
extract = '-?\\d+'

[limits]
stop = [";"]
max_new_tokens = 8
"""


def choice_rows(num: int) -> list[dict[str, object]]:
    return [{"q": f"{n} + 1?", "options": [str(n), str(n + 1), "none"], "right": 1} for n in range(num)]


def sums(numbers: range) -> list[dict[str, object]]:
    return [{"q": f"{n} + 1", "a": n + 1} for n in numbers]


def write_rows(path: Path, some: list[dict[str, object]]) -> Path:
    """Rows in the format that the name ends in."""
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in some))
        case ".json":
            path.write_text(json.dumps(some))
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(some[0]))
                writer.writeheader()
                writer.writerows(
                    {name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()} for row in some
                )
        case ".parquet":
            pa = pytest.importorskip("pyarrow")
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(some), path)
    return path


@pytest.fixture
def choice(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows.jsonl", choice_rows(200))
    return written(tmp_path / "mine.toml", CHOICE)


@pytest.fixture
def sums_task(tmp_path: Path) -> Path:
    write_rows(tmp_path / "train.jsonl", sums(range(100, 130)))
    write_rows(tmp_path / "test.jsonl", sums(range(20)))
    return written(tmp_path / "sums.toml", WRITTEN)


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refusal(path: Path, split: str = "gate", **options: object) -> str:
    """The one line that loading the task, or reading its rows, ends in."""
    with pytest.raises(HavocError) as caught:
        rows(load_task(path, **options), split, 1000, may_be_fewer=True)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_task_of_ones_own_asks_and_judges(choice: Path) -> None:
    """Its name is the file's, its splits are shares of the one file, and choices stand behind the delimiter."""
    task = load_task(choice)
    assert (task.name, task.kind, task.metrics) == ("mine", "choice", ("acc", "acc_norm"))
    splits = {split: rows(task, split, 500, may_be_fewer=True) for split in sources.SPLITS}
    sources.assert_disjoint(splits, task)
    assert sum(map(len, splits.values())) == 200
    assert len(splits["train"]) > 3 * len(splits["gate"]) > 0
    row = splits["gate"][0]
    assert task.prompt(row).text == f"Q: {row['q']}\nA:"
    assert task.choices(row)[task.right_choice(row)] == f" {row['options'][1]}" == task.reference(row)
    assert task.judge([(row, task.reference(row)), (row, "none"), (row, "B"), (row, "C")]) == [
        task.judge([(row, text)])[0] for text in (row["options"][1], "(c)", "Answer: B", "none")
    ]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    """jsonl, json, csv and parquet hold one and the same table."""
    write_rows(tmp_path / f"rows.{ending}", choice_rows(20))
    text = CHOICE.replace("rows.jsonl", f"rows.{ending}").replace(
        'problem = ["q"]',
        'problem = ["q"]\ncolumns = { options = "texts", right = "number" }\nsplits = { gate = "data" }',
    )
    found = rows(load_task(written(tmp_path / "mine.toml", text)), "gate", 20)
    assert [{"q": r["q"], "options": r["options"], "right": r["right"]} for r in found] == choice_rows(20)


def test_data_lies_beside_the_file_or_under_data(choice: Path, tmp_path: Path) -> None:
    """--data DIR comes first; what is not there is looked for beside the task file."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert len(rows(load_task(choice), "gate", 500, data_dir=elsewhere, may_be_fewer=True)) > 0
    write_rows(elsewhere / "rows.jsonl", [row | {"q": f"other {row['q']}"} for row in choice_rows(200)])
    found = rows(load_task(choice), "gate", 1, data_dir=elsewhere)
    assert found[0]["q"].startswith("other")


def test_solved_rows_stand_in_front(sums_task: Path) -> None:
    """The first rows of the train part, each with its answer; a row is never shown its own."""
    task = load_task(sums_task, few_shot=2)
    row = rows(task, "gate", 1)[0]
    assert task.prompt(row).text == "100 + 1 = 101; 101 + 1 = 102; 0 + 1 ="
    first = rows(task, "train", 1)[0]
    assert task.prompt(first).text == "101 + 1 = 102; 102 + 1 = 103; 100 + 1 ="
    assert load_task(sums_task).prompt(row).text == "0 + 1 ="
    sampled = written(sums_task, WRITTEN.replace("[few_shot]", '[few_shot]\nnumber = 3\nchoose = "sample"\nseed = 4'))
    assert load_task(sampled).prompt(row) == load_task(sampled).prompt(row)
    assert len(load_task(sampled).examples) == 4
    assert task.sha256 != load_task(sums_task, few_shot=1).sha256


@pytest.mark.parametrize(
    ("completion", "is_right"), [(" 1", True), ("1; 5 + 1 = 7", True), ("It is 1.", True), ("2; 1", False), ("", False)]
)
def test_an_answer_ends_at_a_stop_string(sums_task: Path, completion: str, is_right: bool) -> None:
    """What follows neither helps nor harms."""
    task = load_task(sums_task)
    row = rows(task, "gate", 1)[0]
    assert (task.judge([(row, completion)])[0].outcome == "right") is is_right


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('metric = "acc"', 'metrik = "acc"', "unknown key metrik; did you mean metric?"),
        ('metric = "acc"', 'metric = "f1"', "metric = 'f1': this task has acc, acc_norm"),
        ('kind = "choice"', 'kind = "choise"', "kind = 'choise': input should be 'choice'"),
        ('kind = "choice"', 'kind = "code"', "has a section [choice]"),
        ("[prompt]", "[promt]", "unknown key promt; did you mean prompt?"),
        ("label = ", "lable = ", "unknown key choice.lable; did you mean label?"),
        ('template = "Q: {{ q }}', 'template = "Q: {{ q ', "is not a Jinja template"),
        ("{{ q }}", "{{ question }}", "no column question"),
        ('"options"', '"option"', "no column option"),
        ('"options"', '"options[0]"', "expected a list of at least two texts"),
        ('label = "right"', 'label = "q"', "is not a position from 0 to 2"),
        ('"rows.jsonl"', '"nowhere.jsonl"', "nowhere.jsonl: no such file"),
        ('path = "rows.jsonl"\n', "", "does not say where the rows come from"),
        ('path = "rows.jsonl"', 'path = "rows.jsonl"\ngenerator = "math"', "a generator and files"),
        ('problem = ["q"]', "problem = []", "data.problem = []"),
        ('problem = ["q"]', 'problem = ["q"]\nsplits = { test = "x" }', "data.splits.test"),
        (
            'problem = ["q"]',
            'problem = ["q"]\nsplits = { train = "data", gate = "data" }',
            "gives train and gate the same rows of 'data'",
        ),
        ("[choice]", '[few_shot]\nsplit = "gate"\nnumber = 2\n[choice]', "(a leak)"),
        ("[choice]", "[limits]\nmax_new_tokens = 0\n[choice]", "limits.max_new_tokens = 0"),
        ("[choice]", "[choice]\nextra = 1970-01-01", "not JSON serializable"),
        ('kind = "choice"', 'kind = "choice"\nname = "../x"', "'../x': a name has small letters"),
        ('kind = "choice"', 'kind = "choice"\nname = "mixture"', "must not be base, classifier, mean, mixture"),
        ('kind = "choice"', "kind = ", "not valid TOML"),
        ('kind = "choice"', "a" + ".a" * 5000 + " = 1", "dots in its key"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(choice: Path, old: str, new: str, said: str) -> None:
    """The key or value, the nearest right one, exit code 2."""
    text = CHOICE.replace(old, new)
    assert text != CHOICE
    assert said in refusal(written(choice, text))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"right": None}, "right is null"),
        ({"right": 3}, "the label 3 is not a position from 0 to 2"),
        ({"right": True}, "the label True is not a position"),
        ({"options": ["a", None, "b"]}, "the choices are ['a', None, 'b']"),
        ({"options": ["a"]}, "expected a list of at least two texts"),
        ({"options": "abc"}, "expected a list of at least two texts"),
        ({"q": None}, "q is null"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(choice: Path, change: dict[str, object], said: str) -> None:
    """File, row and what is wrong with it."""
    some = choice_rows(6)
    some[4] |= change
    write_rows(choice.parent / "rows.jsonl", some)
    written(choice, CHOICE.replace('problem = ["q"]', 'problem = ["q"]\nsplits = { gate = "data" }'))
    line = refusal(choice)
    assert "rows.jsonl, row 5: " in line
    assert said in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"q": "x", "options": ["a", "b"], "right": 0}\n{"q": ', "rows.jsonl, row 2: not valid JSON"),
        ('{"q": "x", "options": ["a", "b"]}', "rows.jsonl, row 1: no column right (there are q, options)"),
        ('{"q": "\\ud800", "options": ["a", "b"], "right": 0}', "rows.jsonl, row 1: has half of a surrogate pair"),
        ("[1]", "rows.jsonl, row 1: holds list, expected an object"),
        ("", "has 0 rows"),
        ('"' + "x" * (1 << 24) + '"', "a line of more than"),
        ("[" * 100_000, "not valid JSON"),
        ("\udcff", "cannot be read"),
    ],
)
def test_a_broken_file_is_named(choice: Path, text: str, said: str) -> None:
    """Neither a cut line nor a hostile one surprises."""
    (choice.parent / "rows.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    assert said in refusal(choice)


def test_labels_outside_the_choices_are_named(tmp_path: Path) -> None:
    """The row whose key is none of its labels, and the labels there are."""
    some = [{"q": "x", "c": {"t": ["a", "b"], "l": ["1", "2"]}, "key": key} for key in ("1", "E")]
    some[1]["q"] = "y"
    write_rows(tmp_path / "rows.jsonl", some)
    text = CHOICE.replace('"options"', '"c.t"\nlabels = "c.l"').replace('"right"', '"key"')
    task = written(tmp_path / "t.toml", text.replace('["q"]', '["q"]\nsplits = { gate = "data" }'))
    assert refusal(task).endswith("rows.jsonl, row 2: the label 'E' is not among 1, 2")


def test_a_solved_row_of_the_gate_is_a_leak(sums_task: Path) -> None:
    """A row written in the file that the test asks is refused when the test is read; so is one without its answer."""
    shots = '[few_shot]\nnumber = 1\nrows = [{ q = "7 + 1", a = 8 }]'
    assert "row 8: is a row of the gate" in refusal(written(sums_task, WRITTEN.replace("[few_shot]", shots)))
    text = WRITTEN.replace("[few_shot]", shots.replace(", a = 8", ""))
    assert "few_shot.rows, row 1: a is null" in refusal(written(sums_task, text))
    assert "2 solved rows are asked for, but its file has 1" in refusal(
        written(sums_task, WRITTEN.replace("[few_shot]", shots)), few_shot=2
    )


def test_a_solved_row_that_the_gate_holds_is_left_out(sums_task: Path) -> None:
    """The train part's first row is a test row: the next ones are shown."""
    write_rows(sums_task.parent / "train.jsonl", [*sums(range(3, 4)), *sums(range(100, 103))])
    task = load_task(sums_task, few_shot=1)
    assert task.prompt(rows(task, "gate", 1)[0]).text == "100 + 1 = 101; 0 + 1 ="


def test_an_answer_that_the_rule_cannot_read_refuses_the_row(sums_task: Path) -> None:
    """A gold answer that no completion could match would score every model 0."""
    write_rows(sums_task.parent / "test.jsonl", [*sums(range(2)), {"q": "x", "a": "many"}])
    assert "test.jsonl, row 3: the row's own answer" in refusal(sums_task)


def test_pinned_data_is_that_data(sums_task: Path) -> None:
    """The hash of the files' bytes; another byte is one line that names both hashes."""
    found = data_hash(load_task(sums_task), "gate")
    pinned = written(sums_task, WRITTEN.replace('problem = ["q"]', f'problem = ["q"]\ndata_sha256 = "{found}"'))
    assert len(rows(load_task(pinned), "gate", 20)) == 20
    assert load_task(pinned).sha256 == load_task(written(sums_task.parent / "again.toml", WRITTEN)).sha256
    data = sums_task.parent / "test.jsonl"
    data.write_text(data.read_text() + "\n")
    assert f"data_sha256 pins the gate split to {found}" in refusal(pinned)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% for a in q %}{% for b in q %}{% for c in q %}x{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' * 1000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000d}'.format(1) }}",
        "{{ q.ljust(1000000000) }}",
        "{{ q.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{% include '/etc/passwd' %}",
        "{{ cycler }}",
        "{% for a in q recursive %}{{ loop(q) }}{% endfor %}",
        "{{ q|attr('__class__') }}",
        "{{ options.append('x') }}{{ options }}",
    ],
)
def test_a_hostile_template_ends_at_once(choice: Path, template: str) -> None:
    """No loop, no text and no attribute that a prompt does not need; one line, well within a second or two."""
    start = time.monotonic()
    text = CHOICE.replace('"Q: {{ q }}\\nA:"', f"'''{template} {{{{ q }}}}'''")
    assert refusal(written(choice, text))
    assert time.monotonic() - start < 5


def test_unknown_names_say_what_is_near() -> None:
    """A bundled task, or the path of a file."""
    with pytest.raises(HavocError, match="'gsm8'.*gsm8k"):
        load_task("gsm8")
    with pytest.raises(HavocError, match=r"nowhere.toml: No such file"):
        load_task("nowhere.toml")
    with pytest.raises(HavocError, match="gsm8k/main: .*--data DIR or --online"):
        rows("gsm8k", "gate", 1)


@pytest.mark.parametrize("name", bundled_tasks())
def test_every_bundled_task_loads_and_has_its_own_name(name: str) -> None:
    """The files that come with HAVOC are as valid as they ask of others."""
    task = load_task(name)
    assert task.name == task.definition.name == name
    assert task.metric in task.metrics
    assert len(task.sha256) == 64
