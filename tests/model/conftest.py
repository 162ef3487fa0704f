from __future__ import annotations

import pytest

from havoc_core.model.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the quick brown fox 12 + 34"] * 4, 280)
