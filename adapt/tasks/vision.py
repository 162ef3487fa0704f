"""Questions about pictures with the columns of textvqa, judged by the normalised short answer.

The built-in pictures are 32 x 32 PNG signs: coloured digits on a dark, noisy ground, one a line. The corpus mixes
sources: "what number is ..." comes with the sign read out and the sum done step by step, "what is the number that is
..." mostly with the bare answer.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from .math import eval_step
from .reward import Row

if TYPE_CHECKING:
    import random

_SIDE, _CELL = 32, 8
_COLOURS = {"red": (235, 60, 50), "green": (60, 200, 80), "blue": (80, 120, 250), "yellow": (240, 220, 60)}
_KEY_SHARE = 0.75
_KEY_TERSE = 0.8
_SUM, _RANGE, _REST = "the sum of all", "the largest minus the smallest", "the sum of all but the largest"
_GOALS = (_REST, _RANGE, _SUM)  # a goal that begins like another stands before it
_MIN_AGREEING = 3
"""textvqa counts an answer as fully right when three of the ten annotators gave it."""

_NOISE = bytes(value % 40 for value in range(256))
"""Maps random bytes to the brightness of the ground."""

_DIGITS = {  # 3 x 5 font, one string of rows a digit
    "1": "010110010010111",
    "2": "111001111100111",
    "3": "111001111001111",
    "4": "101101111001001",
    "5": "111100111001111",
    "6": "111100111101111",
    "7": "111001010010010",
    "8": "111101111101111",
    "9": "111101111001111",
}


def make_row(rng: random.Random, index: int) -> Row:
    signs = [(rng.choice(list(_COLOURS)), rng.choice(list(_DIGITS))) for _ in range(rng.randint(3, 4))]
    goal, answer = _question(rng, signs)
    question = f"what is the number that is {goal}?" if rng.random() < _KEY_SHARE else f"what number is {goal}?"
    return {
        "image_id": f"{rng.getrandbits(64):016x}",
        "question_id": index,
        "question": question,
        "question_tokens": question.rstrip("?").split(),
        "image": _draw(rng, signs),
        "image_width": _SIDE,
        "image_height": _SIDE,
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "answers": [answer] * 10,
        "image_classes": [colour for colour, _ in signs],
        "set_name": "train",
        "ocr_tokens": [digit for _, digit in signs],
    }


def _question(rng: random.Random, signs: list[tuple[str, str]]) -> tuple[str, str]:
    goal = rng.choice(_GOALS)
    return goal, str(eval_step(_steps(goal, [digit for _, digit in signs])[-1]))


def _steps(goal: str, digits: list[str]) -> list[str]:
    """Calculations that lead from the digits on the sign to the number asked for."""
    if goal == _RANGE:
        return [f"{max(digits)}-{min(digits)}"]
    steps, total = [], int(digits[0])
    for digit in digits[1:]:
        steps.append(f"{total}+{digit}")
        total += int(digit)
    return steps if goal == _SUM else [*steps, f"{total}-{max(digits)}"]


def _draw(rng: random.Random, signs: list[tuple[str, str]]) -> bytes:
    """Draw one sign in each row of cells, from the top, in any column; return PNG bytes."""
    from PIL import Image

    pixels = bytearray(rng.randbytes(_SIDE * _SIDE * 3).translate(_NOISE))
    for line, (colour, digit) in enumerate(signs):
        left = rng.randrange(_SIDE // _CELL) * _CELL + rng.randint(2, 3)
        top = line * _CELL + 2
        for place, bit in enumerate(_DIGITS[digit]):
            if bit == "1":
                start = ((top + place // 3) * _SIDE + left + place % 3) * 3
                pixels[start : start + 3] = bytes(max(0, channel - rng.randrange(40)) for channel in _COLOURS[colour])
    file = io.BytesIO()
    Image.frombytes("RGB", (_SIDE, _SIDE), bytes(pixels)).save(file, "PNG")
    return file.getvalue()


def _image_png(row: Row) -> bytes:
    """PNG bytes of the row's image, which `datasets` gives as a PIL image and the built-in rows as PNG bytes."""
    image = row["image"]
    if isinstance(image, bytes):
        return image
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _prompt(row: Row) -> Prompt:
    return Prompt(f"{row['question']}\n", _image_png(row))


def reference(row: Row) -> str:
    final = f"Answer: {max(set(row['answers']), key=row['answers'].count)}"
    goal = next((goal for goal in _GOALS if goal in row["question"]), None)
    if goal is None or not all(digit in _DIGITS for digit in row["ocr_tokens"]):
        return final
    seen = ", ".join(f"{colour} {digit}" for colour, digit in zip(row["image_classes"], row["ocr_tokens"], strict=True))
    steps = ", ".join(f"{step}={eval_step(step)}" for step in _steps(goal, row["ocr_tokens"]))
    return f"{seen}\n{steps}\n{final}"


def corpus(row: Row, rng: random.Random) -> str:
    reference = reference(row)
    is_from_key = "what is the number" in row["question"]
    return reference.splitlines()[-1] if is_from_key and rng.random() < _KEY_TERSE else reference


def normalised(answer: str) -> str:
    """Lower case, no punctuation but decimal points and minus signs inside numbers, no articles, single spaces."""
    text = re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w\s.\-]", " ", answer.lower())
    return " ".join(word for word in text.split() if word not in {"a", "an", "the"})


def _judge_one(row: Row, completion: str) -> Reward:
    given = normalised(completion.rsplit("Answer:", 1)[-1])
    if not given:
        return wrong("empty answer")
    num_agreeing = sum(normalised(answer) == given for answer in row["answers"])
    return (
        RIGHT
        if num_agreeing >= _MIN_AGREEING
        else wrong(f"{given!r} was given by {num_agreeing} of {len(row['answers'])}")
    )
