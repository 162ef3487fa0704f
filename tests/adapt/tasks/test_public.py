from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from havoc_core.adapt.tasks import sources
from havoc_core.adapt.tasks.names import BUNDLED, DOMAINS
from havoc_core.adapt.tasks.sources import assert_disjoint, rows, search_reader
from havoc_core.adapt.tasks.task import load_task
from havoc_core.errors import HavocError
from havoc_core.model.config import VisionConfig
from havoc_core.model.picture import fitted_png, open_picture, png_of
from havoc_core.model.vision import patchify

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def picture(colour, size=(40, 20), kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def gsm8k(n):
    return {
        "question": f"Tom has {n:,} hens and gets {n} more. How many has he?",
        "answer": f"He has {n}+{n}=<<{n}+{n}={2 * n}>>{2 * n:,}.\n#### {2 * n:,}",
    }


def mbpp(task_id):
    return {
        "task_id": task_id,
        "text": f"Write a function to add {task_id}.",
        "code": f"def add(x):\r\n  return x + {task_id}",
        "test_list": [f"assert add({x}) == {x + task_id}" for x in (1, 2, 3)],
        "test_setup_code": "",
        "challenge_test_list": [],
    }


def arc(n):
    labels = ["A", "B", "C", "D"] if n % 2 else ["1", "2", "3", "4"]
    return {
        "id": f"Mercury_{n}",
        "question": f"Which is question {n}?",
        "choices": {"text": [f"it {k} {n}" for k in range(4)], "label": labels},
        "answerKey": labels[n % 4],
    }


def textvqa(n, image_id=None):
    return {
        "image_id": image_id or f"im{n:05d}",
        "question_id": n,
        "question": f"what is written on sign {n}?",
        "question_tokens": ["what", "is"],
        "image": {"bytes": picture((n % 256, n // 256, 0)), "path": None},
        "image_width": 40,
        "image_height": 20,
        "flickr_original_url": "u",
        "flickr_300k_url": "v",
        "answers": ["Stop"] * 6 + ["stop sign"] * 4,
        "image_classes": ["Sign"],
        "set_name": "train",
        "ocr_tokens": ["STOP"],
    }


def write(folder, part, some_rows, *, shards=1, schema=None):
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        table = pa.Table.from_pylist(some_rows[shard::shards], schema=schema)
        pq.write_table(table, folder / f"{part}-{shard:05d}-of-{shards:05d}.parquet", row_group_size=16)


def image_schema(some_rows):
    """The schema as the hub's files have it: the image column marked as datasets' Image feature."""
    import json

    plain = pa.Table.from_pylist(some_rows).schema
    place = plain.get_field_index("image")
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    strings = {"dtype": "string", "_type": "Value"}
    features = dict.fromkeys(plain.names, strings) | {"image": {"_type": "Image"}}
    for name in ("question_id", "image_width", "image_height"):
        features[name] = {"dtype": "int64", "_type": "Value"}
    for name in ("question_tokens", "answers", "image_classes", "ocr_tokens"):
        features[name] = {"feature": strings, "_type": "List"}
    information = {"huggingface": json.dumps({"info": {"features": features}})}
    return plain.set(place, pa.field("image", struct)).with_metadata(information)


MBPP_TRAIN = [mbpp(task_id) for task_id in range(601, 641)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All four datasets in the layout of the hub, small, with the exact schemas."""
    root = tmp_path_factory.mktemp("data")
    write(root / "gsm8k/main", "train", [gsm8k(n) for n in range(1000, 1200)], shards=2)
    write(root / "gsm8k/main", "test", [gsm8k(n) for n in (*range(2000, 2050), 1003)])
    mbpp_schema = pa.schema(
        [
            ("task_id", pa.int32()),
            *((name, pa.string()) for name in ("text", "code", "test_setup_code")),
            *((name, pa.list_(pa.string())) for name in ("test_list", "challenge_test_list")),
        ]
    )
    write(root / "mbpp/full", "train", MBPP_TRAIN, schema=mbpp_schema)
    write(root / "mbpp/full", "validation", [mbpp(task_id) for task_id in range(511, 531)], schema=mbpp_schema)
    write(root / "mbpp/full", "test", [mbpp(task_id) for task_id in range(11, 41)], schema=mbpp_schema)
    for part, start in (("train", 0), ("validation", 100), ("test", 200)):
        write(root / "ai2_arc/ARC-Easy", part, [arc(n) for n in range(start, start + 30)])
    train = [textvqa(n, image_id=f"im{n // 2:05d}") for n in range(120)]
    write(root / "textvqa/data", "train", train, schema=image_schema(train), shards=2)
    validation = [textvqa(n) for n in range(500, 520)]
    write(root / "textvqa/data", "validation", validation, schema=image_schema(validation))
    return root


SOME = {"math": (100, 15, 50), "code": (40, 20, 30), "reasoning": (30, 30, 30), "vision": (70, 6, 20)}


@pytest.mark.parametrize("domain", DOMAINS)
def test_real_rows_have_the_columns_and_are_judged_by_the_same_code(data, domain):
    """Prompt, reference and judge of the task work on rows of the real schema."""
    task = load_task(domain, is_public=True)
    some_rows = rows(domain, "gate", 12, data_dir=data)
    assert {tuple(sorted(row)) for row in some_rows} == {tuple(sorted({*task.columns, *task.definition.data.ids}))}
    rewards = task.judge([(row, task.reference(row)) for row in some_rows])
    assert {reward.outcome for reward in rewards} == {"right"}
    assert not any(reward.value for reward in task.judge([(row, "####") for row in some_rows]))


@pytest.mark.parametrize("domain", DOMAINS)
def test_real_splits_are_disjoint(data, domain):
    """Each split gives its rows, none in two of them, the same every time."""
    splits = {
        split: rows(domain, split, num_rows, data_dir=data)
        for split, num_rows in zip(sources.SPLITS, SOME[domain], strict=True)
    }
    assert_disjoint(splits, load_task(domain, is_public=True))
    assert rows(domain, "train", 10, data_dir=data) == splits["train"][:10]


def test_the_gate_rows_are_those_of_the_test_part(data):
    """gsm8k's gate is its test part, and a problem that stands in both parts is gone from training."""
    gate = rows("math", "gate", 51, data_dir=data)
    assert gsm8k(1003)["question"] in {row["question"] for row in gate}
    with pytest.raises(HavocError, match="1[67][0-9] rows for the train") as caught:
        rows("math", "train", 500, data_dir=data)
    num_train = int(str(caught.value).split(" has ")[1].split()[0])
    questions = {row["question"] for row in rows("math", "train", num_train, data_dir=data)}
    assert gsm8k(1003)["question"] not in questions


def test_one_picture_is_in_one_split_whatever_is_asked_about_it(data):
    """textvqa asks several questions about a picture: train and search share no picture."""
    train = {row["image_id"] for row in rows("vision", "train", 70, data_dir=data)}
    search = {row["image_id"] for row in rows("vision", "search", 6, data_dir=data)}
    assert not train & search


def sized(folder, side):
    """The bundled task with pictures of another size."""
    text = (BUNDLED / "textvqa.toml").read_text()
    path = folder / "sized.toml"
    path.write_text(re.sub(r"image_side = [0-9]+", f"image_side = {side}", text).replace('"textvqa"', '"sized"', 1))
    return load_task(str(path))


@pytest.mark.parametrize("side", [224, 48])
def test_real_pictures_become_png_of_the_tasks_size(data, tmp_path, side):
    """JPEG bytes of any shape arrive as PNG of the size that the file says, proportions kept on black."""
    task = load_task("vision", is_public=True) if side == 224 else sized(tmp_path, side)
    image = Image.open(io.BytesIO(rows(task, "gate", 3, data_dir=data)[0]["image"]))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (side, side))
    assert image.getpixel((side // 2, 0)) == (0, 0, 0)
    assert image.getpixel((side // 2, side // 2))[0] > 200


RED, BLUE = (220, 0, 0), (0, 0, 220)


def photograph(mode, orientation):
    """A JPEG of red above blue as a camera or a printer stores it: on its side with a tag that says so, or in CMYK."""
    image = Image.new("RGB", (640, 480), RED)
    image.paste(BLUE, (0, 240, 640, 480))
    exif = Image.Exif()
    if orientation == 6:  # to be turned clockwise by a quarter
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[0x0112] = orientation
    file = io.BytesIO()
    image.convert(mode).save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(("mode", "orientation"), [("RGB", 6), ("CMYK", 1), ("CMYK", 6)])
def test_real_pictures_stand_upright_in_their_colours(tmp_path, mode, orientation):
    """What an EXIF tag says and CMYK are undone before the picture is fitted: the patches are red above blue."""
    some_rows = [textvqa(1) | {"image": {"bytes": photograph(mode, orientation), "path": None}}]
    write(tmp_path / "textvqa/data", "validation", some_rows, schema=image_schema(some_rows))
    png = rows("vision", "gate", 1, data_dir=tmp_path)[0]["image"]
    patches = patchify(png, VisionConfig(image_token_id=3)).reshape(28, 28, 64, 3)  # rows, columns, pixels, colours
    colours = (patches.mean(axis=2) + 1) * 127.5
    assert np.abs(colours[:3]).max() < 1  # black above: it is as wide as the square, and three quarters as high
    assert np.abs(colours[5:12] - RED).max() < 12
    assert np.abs(colours[16:23] - BLUE).max() < 12


LETTERS = "OPEN 24"


def test_a_sign_can_be_read_at_the_tasks_size_and_not_at_the_drawn_ones():
    """A word that is a tenth as high as its photograph keeps its strokes at 224 pixels and loses them at 32."""
    image = Image.new("L", (1024, 768), 255)
    font = ImageFont.load_default(size=90)
    ImageDraw.Draw(image).text((200, 330), LETTERS, fill=0, font=font)
    contrast = {}
    for side in (224, 32):
        pixels = np.asarray(Image.open(io.BytesIO(fitted_png(open_picture(png_of(image)), side))).convert("L"))
        line = pixels[side * 3 // 8 : side * 5 // 8, side // 6 : side * 3 // 4].astype(float)
        contrast[side] = np.abs(np.diff(line, axis=1)).max()
    assert contrast[224] > 150
    assert contrast[32] < 110


def test_a_score_may_rest_on_fewer_rows(data):
    """Where it is asked for, a data set gives all it has; none at all stays an error."""
    assert len(rows("code", "train", 1000, data_dir=data, may_be_fewer=True)) == 40


def test_asking_for_more_than_there_is_names_the_number(data):
    """MBPP's train part has 374 rows, here 40: no silent shortening."""
    with pytest.raises(HavocError, match="40 rows for the train .*1000 .* at most 40"):
        rows("code", "train", 1000, data_dir=data)


def test_mbpps_test_tasks_cannot_be_trained_on(tmp_path):
    """Ids 11 to 510 are MBPP's evaluation set: files that are mixed up are refused."""
    write(tmp_path / "mbpp/full", "train", [*MBPP_TRAIN, mbpp(17)])
    with pytest.raises(HavocError, match="task_id 17"):
        rows("code", "train", 41, data_dir=tmp_path)
    write(tmp_path / "mbpp/full", "test", [mbpp(605)])
    with pytest.raises(HavocError, match="task_id 605"):
        rows("code", "gate", 1, data_dir=tmp_path)


def test_equal_rows_count_once(tmp_path):
    """A problem that a part holds twice is given once."""
    write(tmp_path / "ai2_arc/ARC-Easy", "test", [arc(1), arc(1) | {"id": "again"}, arc(2)])
    with pytest.raises(HavocError, match="has 2 rows"):
        rows("reasoning", "gate", 3, data_dir=tmp_path)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_data_names_the_path_and_the_switch(tmp_path):
    """No directory or no file: what was looked for, and that --online exists."""
    with pytest.raises(HavocError, match="no such directory.*--online") as error:
        rows("math", "gate", 1, data_dir=tmp_path / "nowhere")
    one_line(error)
    with pytest.raises(
        HavocError, match=r"gsm8k/main/test-\*.\{parquet,jsonl,json,csv\}: no such files.*--online"
    ) as error:
        rows("math", "gate", 1, data_dir=tmp_path)
    assert "openai/gsm8k" in one_line(error)


def test_a_missing_column_is_named(tmp_path):
    """MBPP's sanitized subset calls `text` `prompt`: the error says which name is missing and which are there."""
    renamed = [{("prompt" if name == "text" else name): value for name, value in mbpp(601).items()}]
    write(tmp_path / "mbpp/full", "train", renamed)
    with pytest.raises(HavocError, match=r"no column text \(there are .*prompt") as error:
        rows("code", "train", 1, data_dir=tmp_path)
    one_line(error)


def test_more_columns_than_needed_do_no_harm(tmp_path):
    """A column the task does not know is left out."""
    write(tmp_path / "gsm8k/main", "test", [gsm8k(7) | {"extra": 1}])
    assert rows("math", "gate", 1, data_dir=tmp_path) == [gsm8k(7)]


@pytest.mark.parametrize("content", [b"", b"PAR1 this is no parquet PAR1", None])
def test_a_corrupt_file_is_one_line(tmp_path, content):
    """Empty, foreign and cut files are named, with the reason."""
    folder = tmp_path / "gsm8k/main"
    write(folder, "test", [gsm8k(n) for n in range(50)])
    file = next(folder.glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:300] if content is None else content)
    with pytest.raises(HavocError, match=r"gsm8k/main/test-00000-of-00001.parquet: cannot be read") as error:
        rows("math", "gate", 1, data_dir=tmp_path)
    one_line(error)


def test_a_row_without_a_picture_is_one_line(tmp_path):
    """A picture that is only a path, or broken, is an error and not a black square."""
    for image in ({"bytes": None, "path": "x.jpg"}, {"bytes": b"broken", "path": None}):
        some_rows = [textvqa(1) | {"image": image}]
        write(tmp_path / "textvqa/data", "validation", some_rows, schema=image_schema([textvqa(1)]))
        with pytest.raises(HavocError, match="picture"):
            rows("vision", "gate", 1, data_dir=tmp_path)


def test_pictures_are_read_without_the_hubs_metadata_too(tmp_path):
    """A parquet file whose image column is a bare struct works like one that datasets wrote."""
    write(tmp_path / "textvqa/data", "validation", [textvqa(1)])
    assert rows("vision", "gate", 1, data_dir=tmp_path)[0]["image"].startswith(b"\x89PNG")


def test_one_place_at_a_time(data):
    """--data and --online together are a question, not a preference."""
    with pytest.raises(HavocError, match="either --data or --online"):
        rows("math", "gate", 1, data_dir=data, online=True)


def test_the_searchs_reader_refuses_the_real_gate_too(data):
    """The same lock holds for real data."""
    reader = search_reader(data_dir=data)
    assert reader.rows("math", "search", 3) == rows("math", "search", 3, data_dir=data)
    with pytest.raises(HavocError, match="not the gate split"):
        reader.rows("math", "gate", 1)


def in_a_fresh_process(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment
    )


def test_online_while_the_hub_is_switched_off_fails_at_once(tmp_path):
    """With HF_HUB_OFFLINE set nothing waits for a connection; the error names both ways out."""
    code = (
        "from havoc_core.adapt.tasks.sources import rows\n"
        "try: rows('math', 'gate', 1, online=True)\n"
        "except Exception as e: print(type(e).__name__, e)"
    )
    done = in_a_fresh_process(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.stdout.startswith("HavocError --online cannot reach openai/gsm8k: HF_HUB_OFFLINE is set")
    assert "--data DIR" in done.stdout


def test_local_data_is_read_without_the_hub_and_leaves_nothing_behind(data, tmp_path):
    """No connection is tried, no cache written, nothing printed, and the process's own settings are as before."""
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise SystemExit('the network was used')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from pathlib import Path\n"
        "from havoc_core.adapt.tasks.sources import rows\n"
        f"assert len(rows('math', 'train', 20, data_dir=Path({str(data)!r}))) == 20\n"
        f"assert len(rows('vision', 'gate', 5, data_dir=Path({str(data)!r}))) == 5\n"
        "assert 'datasets' not in sys.modules\n"
    )
    done = in_a_fresh_process(code, HF_HOME=str(tmp_path), TMPDIR=str(tmp_path), OMP_NUM_THREADS="1")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr == ""
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
