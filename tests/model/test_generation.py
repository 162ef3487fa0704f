"""Generation: the cache changes nothing but time, batches change nothing but speed, seeds decide everything else."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from torch import Tensor

from havoc_core.adapt.tasks.task import Prompt
from havoc_core.errors import HavocError
from havoc_core.model import HavocConfig, HavocModel, VisionConfig, generate_text, sample_tokens
from havoc_core.model.generation import encode_prompts, left_padded, pick
from havoc_core.model.tokenizer import Tokenizer

EOS = 2
VISION = VisionConfig(patch_size=2, image_token_id=3)


@pytest.fixture(scope="module")
def model() -> HavocModel:
    """Large random weights, so that the likeliest token is far ahead of the next; it ends often."""
    torch.manual_seed(0)
    model = HavocModel(HavocConfig.pico(vision=VISION).replace(initializer_range=0.35, vocab_size=300)).eval()
    with torch.no_grad():
        model.embed_tokens.weight[EOS] *= 2.5
    return model


def prompt_rows(num_rows: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 20, (num_rows,), generator=generator).tolist()
    return [torch.randint(4, 300, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def greedy_without_cache(model: HavocModel, row: list[int], max_new_tokens: int) -> list[int]:
    new: list[int] = []
    while len(new) < max_new_tokens and (not new or new[-1] != EOS):
        logits_V = model(torch.tensor([row + new]))[0, -1]
        logits_V[VISION.image_token_id] = -torch.inf
        new.append(int(logits_V.argmax()))
    return new


def without_padding(row: Tensor) -> list[int]:
    ids = row.tolist()
    return ids[: ids.index(EOS) + 1] if EOS in ids else ids


def test_cached_and_uncached_agree_in_batches_that_shrink(model: HavocModel) -> None:
    """Forty padded prompts, some ending early and dropped, write the tokens each writes alone without a cache."""
    rows = prompt_rows(40)
    new_BN = sample_tokens(model, *left_padded(rows, pad_id=0), max_new_tokens=24, temperature=0.0)
    expected = [greedy_without_cache(model, row, 24) for row in rows]
    assert [without_padding(row) for row in new_BN] == expected
    num_written = [len(row) for row in expected]
    assert sum(length < 8 for length in num_written) > 10
    assert max(num_written) == 24


def test_rows_are_padded_after_their_end(model: HavocModel) -> None:
    """Behind the end token stands padding only."""
    new_BN = sample_tokens(model, *left_padded(prompt_rows(40), pad_id=0), max_new_tokens=24, temperature=0.0)
    for row in new_BN:
        length = len(without_padding(row))
        assert (row[length:] == 0).all()


def test_behind_the_prompt_one_token_is_read_at_a_time(model: HavocModel) -> None:
    """The prompt is read once and whole; each step reads the newest token alone, however long the text is by then."""
    seen: list[int] = []
    hook = model.embed_tokens.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    ids = torch.tensor([prompt_rows(3)[0]])
    model.generate(ids, 5, eos_token_id=())
    hook.remove()
    assert seen == [ids.shape[1], 1, 1, 1, 1]


def test_stops_when_every_row_has_ended(model: HavocModel) -> None:
    """The result is as wide as the longest row, not as the limit."""
    rows = [row for row in prompt_rows(40) if len(greedy_without_cache(model, row, 24)) < 10][:3]
    new_BN = sample_tokens(model, *left_padded(rows, pad_id=0), max_new_tokens=24, temperature=0.0)
    assert new_BN.shape[1] == max(len(greedy_without_cache(model, row, 24)) for row in rows) < 10


def test_generate_stops_at_the_end_token_it_is_given(model: HavocModel) -> None:
    """`eos_token_id` may be any token, or several."""
    ids = torch.tensor([prompt_rows(3)[0]])
    free = model.generate(ids, 12, eos_token_id=())[0, ids.shape[1] :].tolist()
    assert len(free) == 12
    stop = free[4]
    stopped = model.generate(ids, 12, eos_token_id=[stop, 299])[0, ids.shape[1] :].tolist()
    assert stopped == free[: free.index(stop) + 1]


def test_sampling_follows_the_distribution(model: HavocModel) -> None:
    """Shares of the first token in 4000 samples are the softmax of logits / temperature, within 4 sigma."""
    ids, num_samples, temperature = torch.tensor([prompt_rows(3)[1]]), 4000, 2.0
    drawn = sample_tokens(
        model,
        ids,
        max_new_tokens=1,
        temperature=temperature,
        num_samples=num_samples,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        logits_V = model(ids)[0, -1].double() / temperature
        logits_V[VISION.image_token_id] = -torch.inf
        expected_V = logits_V.softmax(dim=-1)
    share_V = drawn[:, 0].bincount(minlength=300).double() / num_samples
    sigma_V = (expected_V * (1 - expected_V) / num_samples).sqrt()
    assert ((share_V - expected_V).abs() <= 4 * sigma_V + 1e-3).all()


def test_samples_of_one_prompt_are_neighbours(model: HavocModel) -> None:
    """Row i * num_samples + j is sample j of prompt i, and sharing the prefill changes no token."""
    rows = prompt_rows(5)
    ids, mask = left_padded(rows, pad_id=0)
    shared = sample_tokens(model, ids, mask, max_new_tokens=12, temperature=0.0, num_samples=3)
    single = sample_tokens(model, ids, mask, max_new_tokens=12, temperature=0.0)
    assert torch.equal(shared, single.repeat_interleave(3, dim=0))


def test_the_generator_decides(model: HavocModel) -> None:
    """The same seed draws the same tokens, another seed others."""
    ids, mask = left_padded(prompt_rows(6), pad_id=0)

    def draw(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return sample_tokens(model, ids, mask, max_new_tokens=12, temperature=1.5, generator=generator).tolist()

    assert draw(3) == draw(3) != draw(4)


def test_top_k_draws_from_the_top(model: HavocModel) -> None:
    """Only the k likeliest tokens are drawn; k = 1 is greedy."""
    logits_BV = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    drawn_B = pick(logits_BV, temperature=5.0, top_k=3, generator=generator)
    assert (logits_BV.topk(3).indices == drawn_B[:, None]).any(dim=-1).all()
    assert torch.equal(pick(logits_BV, temperature=5.0, top_k=1), logits_BV.argmax(dim=-1))


def test_image_tokens_are_never_written() -> None:
    """Even a model that wants nothing else writes no image token: there is no patch it could stand for."""
    model = HavocModel(HavocConfig.pico(vision=VISION))
    with torch.no_grad():
        model.norm.weight.copy_(100 * model.embed_tokens.weight[VISION.image_token_id].sign())
    for temperature in (0.0, 1.0):
        new_BN = sample_tokens(model, torch.randint(4, 64, (20, 5)), max_new_tokens=8, temperature=temperature)
        assert not (new_BN == VISION.image_token_id).any()


def test_results_can_be_trained_on(model: HavocModel) -> None:
    """Sampled tokens go through a forward with gradients, and the model's mode is what it was."""
    model.train()
    new_BN = sample_tokens(
        model, torch.tensor([[5, 6, 7]]), max_new_tokens=6, generator=torch.Generator().manual_seed(0)
    )
    assert model.training
    model.compute_loss(new_BN)[0].backward()
    model.zero_grad()
    model.eval()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 126}, "3 prompt tokens and max_new_tokens 126 exceed the model's context of 128"),
        ({"max_new_tokens": 5, "temperature": -1.0}, "temperature must be"),
        ({"max_new_tokens": 5, "temperature": float("nan")}, "temperature must be"),
        ({"max_new_tokens": 5, "top_k": 0}, "top_k must be at least 1"),
        ({"max_new_tokens": 5, "num_samples": 0}, "num_samples must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(model: HavocModel, settings: dict[str, float], message: str) -> None:
    """One line names the setting and its bound."""
    with pytest.raises(HavocError, match=message):
        sample_tokens(model, torch.tensor([[5, 6, 7]]), **settings)


def test_an_empty_prompt_is_refused(model: HavocModel) -> None:
    """There must be a token to go on from."""
    with pytest.raises(HavocError, match="the prompt is empty"):
        model.generate(torch.empty(1, 0, dtype=torch.long), 4)


def png(seed: int, width: int = 4, height: int = 2) -> bytes:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def mixed_questions() -> list[Prompt]:
    texts = ["the fox", "12 + 34", "a", "quick brown", "", "the quick brown fox 1"]
    return [Prompt(text, png(number) if number % 2 else None) for number, text in enumerate(texts)]


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_texts_do_not_depend_on_the_batch(model: HavocModel, tokenizer: Tokenizer, batch_size: int) -> None:
    """Text and image prompts, alone or together, get the same greedy text, in the order asked."""
    questions = mixed_questions()
    texts = generate_text(model, tokenizer, questions, max_new_tokens=10, batch_size=batch_size)
    for question, text in zip(questions, texts, strict=True):
        ids, mask, patches = encode_prompts(model, tokenizer, [question])
        assert (patches is None) == (question.image_png is None)
        new_BN = sample_tokens(model, ids, mask, patches, max_new_tokens=10, temperature=0.0)
        assert text == tokenizer.decode(new_BN[0].tolist())
    assert len(set(texts)) > 3


def test_sampled_texts_repeat_with_the_seed(model: HavocModel, tokenizer: Tokenizer) -> None:
    """The same seed gives the same texts, whatever torch's own generator did before."""
    questions = mixed_questions()
    first = generate_text(model, tokenizer, questions, max_new_tokens=10, temperature=2.0, seed=7)
    torch.randn(3)
    assert generate_text(model, tokenizer, questions, max_new_tokens=10, temperature=2.0, seed=7) == first
    assert generate_text(model, tokenizer, questions, max_new_tokens=10, temperature=2.0, seed=8) != first


def test_every_end_ends_a_text(model: HavocModel, tokenizer: Tokenizer) -> None:
    """The tokenizer's end token and all the config names end a text; transformers' generate does the same."""
    question = Prompt("the fox")
    ids, mask, _ = encode_prompts(model, tokenizer, [question])
    free = sample_tokens(model, ids, mask, max_new_tokens=10, temperature=0.0, eos_id=())[0].tolist()
    other = HavocModel(model.config.replace(eos_token_id=(EOS, free[3])))
    other.load_state_dict(model.state_dict())
    expected = tokenizer.decode(free[: free.index(free[3]) + 1])
    assert generate_text(other, tokenizer, [question], max_new_tokens=10) == [expected]


def test_no_prompts_no_texts(model: HavocModel, tokenizer: Tokenizer) -> None:
    """Nothing asked, nothing written."""
    assert generate_text(model, tokenizer, [], max_new_tokens=4) == []


def test_an_image_for_a_text_model_is_refused(tokenizer: Tokenizer) -> None:
    """A text model says that it cannot see."""
    model = HavocModel(HavocConfig.pico().replace(vocab_size=300))
    with pytest.raises(HavocError, match="this model reads text only"):
        generate_text(model, tokenizer, [Prompt("what is it?", png(0))], max_new_tokens=4)
