"""Log-likelihoods with torch: batches, trees and shared beginnings change nothing but speed."""

from __future__ import annotations

import random

import pytest
import torch

from havoc_core.adapt.tasks.task import Prompt
from havoc_core.model import HavocConfig, HavocModel
from havoc_core.model.config import VisionConfig
from havoc_core.model.likelihood import Continuation
from havoc_core.model.scorer import TorchScorer
from havoc_core.model.tokenizer import Tokenizer

SHOTS = "the quick brown fox 12 + 34 = 46. the lazy dog 5 + 6 = 11. " * 3


@pytest.fixture(scope="module")
def model() -> HavocModel:
    torch.manual_seed(0)
    return HavocModel(HavocConfig.pico().replace(initializer_range=0.35, vocab_size=300, max_seq_len=256)).eval()


def requests(num_rows: int, shots: str = "") -> list[tuple[Prompt, list[str]]]:
    """Prompts of many lengths, with choices that begin alike, are equal, or are one token."""
    rng = random.Random(0)
    found = []
    for _ in range(num_rows):
        text = shots + "".join(rng.choice("the quick brown ") for _ in range(rng.randint(1, 40)))
        choices = [" " + "".join(rng.choice("ab c") for _ in range(rng.randint(1, 6))) for _ in range(3)]
        found.append((Prompt(text + "."), [*choices, choices[0] + " and more", choices[0], " "]))
    return found


@torch.no_grad()
def one_by_one(model: HavocModel, tokenizer: Tokenizer, prompt: str, choice: str) -> Continuation:
    """The definition: the whole text in one pass, nothing shared, nothing padded."""
    prompt_ids, ids = tokenizer.encode_continuation(prompt, choice)
    log_p = model(torch.tensor([[*prompt_ids, *ids][:-1]]))[0, -len(ids) :].double().log_softmax(-1)
    taken = log_p[torch.arange(len(ids)), torch.tensor(ids)]
    return Continuation(float(taken.sum()), len(ids), bool((log_p.argmax(-1) == torch.tensor(ids)).all()))


@pytest.mark.parametrize("shots", ["", SHOTS], ids=["0-shot", "shared beginning"])
@pytest.mark.parametrize("tokens_per_batch", [1, 300, 4000])
def test_batches_give_what_each_text_gives_alone(
    model: HavocModel, tokenizer: Tokenizer, shots: str, tokens_per_batch: int
) -> None:
    """Whatever the batch, a choice's log-likelihood is that of its text read alone, and so is whether it is greedy."""
    asked = requests(20, shots)
    found = TorchScorer(model, tokenizer, tokens_per_batch=tokens_per_batch).log_likelihoods(asked)
    for (prompt, choices), items in zip(asked, found, strict=True):
        for choice, item in zip(choices, items, strict=True):
            expected = one_by_one(model, tokenizer, prompt.text, choice)
            assert item.log_likelihood == pytest.approx(expected.log_likelihood, abs=2e-4)
            assert (item.num_tokens, item.is_greedy) == (expected.num_tokens, expected.is_greedy)


def test_the_likeliest_text_is_greedy(model: HavocModel, tokenizer: Tokenizer) -> None:
    """What the model itself writes is greedy, and one other token in it is not."""
    scorer = TorchScorer(model, tokenizer)
    prompt = Prompt("the quick")
    prompt_ids = tokenizer.encode_prompt(prompt.text)
    new = model.generate(torch.tensor([prompt_ids]), 1)[0, len(prompt_ids) :].tolist()
    likeliest = tokenizer.decode(new)
    assert tokenizer.encode_continuation(prompt.text, likeliest)[1] == new
    (found,) = scorer.log_likelihoods([(prompt, [likeliest, " brown"])])
    assert [item.is_greedy for item in found] == [True, False]
    assert found[0].log_likelihood > found[1].log_likelihood / found[1].num_tokens


def test_bounded_logits_change_nothing(
    model: HavocModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is computed a few places at a time, across rows and inside one."""
    asked = requests(6)
    whole = TorchScorer(model, tokenizer).log_likelihoods(asked)
    monkeypatch.setattr("havoc_core.model.scorer.LOGITS_PER_CHUNK", 2 * model.config.vocab_size)
    pieces = TorchScorer(model, tokenizer).log_likelihoods(asked)
    for ours, theirs in zip(pieces, whole, strict=True):
        assert [item.log_likelihood for item in ours] == pytest.approx([i.log_likelihood for i in theirs], abs=1e-5)
        assert [item.is_greedy for item in ours] == [item.is_greedy for item in theirs]


def test_a_prompt_longer_than_the_context_loses_its_beginning(model: HavocModel, tokenizer: Tokenizer) -> None:
    """The end of the prompt counts, and the number of tokens left out is told."""
    long = Prompt("lazy dog " * 60 + "the quick brown fox")
    (found,) = TorchScorer(model, tokenizer).log_likelihoods([(long, [" the"])])
    prompt_ids, ids = tokenizer.encode_continuation(long.text, " the")
    kept = [*prompt_ids, *ids][-(model.config.max_seq_len + 1) :]
    with torch.no_grad():
        log_p = model(torch.tensor([kept[:-1]]))[0, -len(ids) :].log_softmax(-1)
    expected = float(log_p[torch.arange(len(ids)), torch.tensor(ids)].sum())
    assert found[0].num_dropped == len(prompt_ids) + len(ids) - 1 - model.config.max_seq_len > 0
    assert found[0].log_likelihood == pytest.approx(expected, abs=2e-4)


def test_a_model_that_also_sees_scores_text(tokenizer: Tokenizer) -> None:
    """Pictures are not needed to be asked; the training mode the model was in is put back."""
    torch.manual_seed(1)
    model = HavocModel(HavocConfig.pico(vision=VisionConfig(patch_size=2, image_token_id=3)).replace(vocab_size=300))
    assert model.training
    (found,) = TorchScorer(model, tokenizer).log_likelihoods([(Prompt("the"), [" fox", " quick"])])
    assert len(found) == 2
    assert model.training


def test_nothing_asked_is_nothing_scored(model: HavocModel, tokenizer: Tokenizer) -> None:
    """No request, and a request without a choice, are no error."""
    scorer = TorchScorer(model, tokenizer)
    assert scorer.log_likelihoods([]) == []
    assert scorer.log_likelihoods([(Prompt("the"), [])]) == [[]]
