"""Questions about pictures with the columns of textvqa; `files/vision.toml` says how they are asked and judged.

The built-in pictures are 32 x 32 PNG signs: coloured digits on a dark, noisy ground, one per line. The corpus mixes
sources: "what number is ..." comes with the numbers of the sign and the steps of the sum, "what is the number that is
..." mostly with only the answer.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from .math import eval_step

if TYPE_CHECKING:
    import random

    from .reward import Row

SIDE = 32
"""Width and height of a drawn picture, in pixels."""
_CELL = 8
_COLOURS = {"red": (235, 60, 50), "green": (60, 200, 80), "blue": (80, 120, 250), "yellow": (240, 220, 60)}
_KEY_SHARE = 0.75
_KEY_TERSE = 0.8
_SUM, _RANGE, _REST = "the sum of all", "the largest minus the smallest", "the sum of all but the largest"
_GOALS = (_REST, _RANGE, _SUM)  # "the sum of all" comes after the longer goal that begins with it

_NOISE = bytes(value % 40 for value in range(256))
"""Maps random bytes to the brightness of the background."""

_DIGITS = {  # 3 x 5 font, one string of rows per digit
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
    """Draw one sign and ask about its numbers."""
    signs = [(rng.choice(list(_COLOURS)), rng.choice(list(_DIGITS))) for _ in range(rng.randint(3, 4))]
    goal, answer = _question(rng, signs)
    question = f"what is the number that is {goal}?" if rng.random() < _KEY_SHARE else f"what number is {goal}?"
    return {
        "image_id": f"{rng.getrandbits(64):016x}",
        "question_id": index,
        "question": question,
        "question_tokens": question.rstrip("?").split(),
        "image": _draw(rng, signs),
        "image_width": SIDE,
        "image_height": SIDE,
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
    """Calculations from the digits on the sign to the asked number."""
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

    pixels = bytearray(rng.randbytes(SIDE * SIDE * 3).translate(_NOISE))
    for line, (colour, digit) in enumerate(signs):
        left = rng.randrange(SIDE // _CELL) * _CELL + rng.randint(2, 3)
        top = line * _CELL + 2
        for place, bit in enumerate(_DIGITS[digit]):
            if bit == "1":
                start = ((top + place // 3) * SIDE + left + place % 3) * 3
                pixels[start : start + 3] = bytes(max(0, channel - rng.randrange(40)) for channel in _COLOURS[colour])
    file = io.BytesIO()
    Image.frombytes("RGB", (SIDE, SIDE), bytes(pixels)).save(file, "PNG")
    return file.getvalue()


def reference(row: Row) -> str:
    """Return the numbers of the sign, the steps of the sum, then the answer."""
    final = f"Answer: {max(set(row['answers']), key=row['answers'].count)}"
    goal = next((goal for goal in _GOALS if goal in row["question"]), None)
    if goal is None or not all(digit in _DIGITS for digit in row["ocr_tokens"]):
        return final
    seen = ", ".join(f"{colour} {digit}" for colour, digit in zip(row["image_classes"], row["ocr_tokens"], strict=True))
    steps = ", ".join(f"{step}={eval_step(step)}" for step in _steps(goal, row["ocr_tokens"]))
    return f"{seen}\n{steps}\n{final}"


def corpus(row: Row, rng: random.Random) -> str:
    """Return the answer with or without its steps."""
    worked = reference(row)
    is_from_key = "what is the number" in row["question"]
    return worked.splitlines()[-1] if is_from_key and rng.random() < _KEY_TERSE else worked
