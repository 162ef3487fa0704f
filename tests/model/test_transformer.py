"""The whole decoder where the thirteen points end: padding, positions, images, context, other types."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from havoc_core.errors import HavocError
from havoc_core.model import HavocConfig, HavocModel, VisionConfig

VISION = VisionConfig(patch_size=2, image_token_id=3)


@pytest.fixture
def model() -> HavocModel:
    torch.manual_seed(0)
    return HavocModel(HavocConfig.pico(vision=VISION).replace(initializer_range=0.3)).eval()


def text_ids(num_tokens: int, num_rows: int = 1) -> Tensor:
    return torch.randint(4, 64, (num_rows, num_tokens), generator=torch.Generator().manual_seed(num_tokens))


@torch.no_grad()
def test_left_padded_rows_agree_with_single_prompts(model: HavocModel) -> None:
    """Every real token of a padded batch has the logits it has alone."""
    prompts = [text_ids(length) for length in (3, 11, 7, 1)]
    ids = torch.cat([torch.nn.functional.pad(prompt, (11 - prompt.shape[1], 0)) for prompt in prompts])
    logits = model(ids, (ids != 0).long())
    for row, prompt in zip(logits, prompts, strict=True):
        assert torch.allclose(row[-prompt.shape[1] :], model(prompt)[0], atol=1e-5)


@torch.no_grad()
def test_padded_steps_agree_with_single_prompts(model: HavocModel) -> None:
    """A cache of padded rows goes on as each prompt alone: positions count real tokens."""
    short, long, step = text_ids(4), text_ids(9), text_ids(2, num_rows=2)
    ids = torch.cat([torch.nn.functional.pad(short, (5, 0)), long])
    mask = (ids != 0).long()
    _, past = model(ids, mask, use_cache=True)
    logits = model(step, torch.nn.functional.pad(mask, (0, 2), value=1), past_key_values=past)
    for row, prompt in enumerate((short, long)):
        alone = model(torch.cat([prompt, step[row : row + 1]], dim=1))
        assert torch.allclose(logits[row], alone[0, -2:], atol=1e-5)


def test_positions_count_real_tokens(model: HavocModel) -> None:
    """Padding takes no position, so a padded prompt meets the very angles it meets alone."""
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions, _ = model._positions_and_mask(torch.zeros(2, 2, dtype=torch.long), mask, num_past=4)
    assert positions.tolist() == [[1, 2], [4, 5]]


@torch.no_grad()
def test_a_full_mask_changes_nothing(model: HavocModel) -> None:
    """A mask of ones gives the logits of no mask."""
    ids = text_ids(12, num_rows=3)
    assert torch.allclose(model(ids, torch.ones_like(ids)), model(ids), atol=1e-5)


@torch.no_grad()
def test_patches_stand_where_image_tokens_stand(model: HavocModel) -> None:
    """A patch is one linear projection in the place of one image token; row by row, in order."""
    patches = torch.randn(3, VISION.patch_dim)
    ids = torch.tensor([[1, 3, 3, 8, 9], [0, 1, 3, 5, 7]])
    embedded = model.embed(ids, patches)
    projected = patches @ model.vision_projection.weight.T
    assert torch.allclose(embedded[0, 1:3], projected[:2], atol=1e-6)
    assert torch.allclose(embedded[1, 2], projected[2], atol=1e-6)
    assert torch.equal(embedded[1, 3], model.embed_tokens.weight[5])
    changed = patches.clone()
    changed[2] += 1.0
    before, after = model(ids, patches=patches), model(ids, patches=changed)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1, 2:], after[1, 2:])


def test_patches_and_image_tokens_must_match(model: HavocModel) -> None:
    """Too few, too many or no patches for the image tokens are refused with both numbers."""
    ids = torch.tensor([[1, 3, 3, 8]])
    with pytest.raises(HavocError, match="1 patches for 2 image tokens"):
        model(ids, patches=torch.randn(1, VISION.patch_dim))
    with pytest.raises(HavocError, match="0 patches for 2 image tokens"):
        model(ids)
    with pytest.raises(HavocError, match="3 patches for 0 image tokens"):
        model(torch.tensor([[1, 8]]), patches=torch.randn(3, VISION.patch_dim))
    with pytest.raises(HavocError, match=r"patches are \[2, 7\], .*\[num_patches, 12\]"):
        model(ids, patches=torch.randn(2, 7))
    with pytest.raises(HavocError, match="no vision part"):
        HavocModel(HavocConfig.pico())(ids, patches=torch.randn(2, VISION.patch_dim))


def test_the_context_has_an_end(model: HavocModel) -> None:
    """One token more than the context, past included, is refused with both numbers."""
    with pytest.raises(HavocError, match="129 tokens .*context of 128"):
        model(text_ids(129))
    _, past = model(text_ids(128), use_cache=True)
    with pytest.raises(HavocError, match="129 tokens exceed"):
        model(text_ids(1), past_key_values=past)


def test_a_mask_of_another_size_is_refused(model: HavocModel) -> None:
    """The mask covers past and new tokens; anything else is refused with both shapes."""
    with pytest.raises(HavocError, match=r"attention_mask is \[1, 4\], not \[1, 5\]"):
        model(text_ids(5), torch.ones(1, 4))


@torch.no_grad()
def test_half_precision_follows(model: HavocModel) -> None:
    """A model in bfloat16 computes in bfloat16 and lands near the fp32 logits."""
    ids, mask = text_ids(9, num_rows=2), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    expected = model(ids, mask)
    logits = model.to(torch.bfloat16)(ids, mask)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.std()


def test_masked_tokens_neither_count_nor_predict(model: HavocModel) -> None:
    """Whatever tokens pad a batch, on the left or the right, its loss is that of the real tokens alone."""
    short, long = text_ids(5), text_ids(9)
    expected = (4 * model.compute_loss(short)[0] + 8 * model.compute_loss(long)[0]) / 12
    for left in (4, 0, 1):
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[0, :left], mask[0, left + 5 :] = 0, 0
        ids = torch.cat([torch.nn.functional.pad(short, (left, 4 - left), value=9), long])
        assert model.compute_loss(ids, attention_mask=mask)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_of_a_sequence_of_one_is_zero(model: HavocModel) -> None:
    """With nothing to predict the loss is 0, not NaN."""
    assert model.compute_loss(text_ids(1))[0].item() == 0.0


def test_few_operations_a_layer() -> None:
    """A decode step stays lean: at most 22 operations a layer besides views (transformers: 37)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    names: list[str] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view:
                names.append(str(func))
            return func(*args, **(kwargs or {}))

    def count(num_layers: int) -> int:
        model = HavocModel(HavocConfig.pico().replace(num_layers=num_layers)).eval()
        with torch.inference_mode():
            _, past = model(text_ids(4), use_cache=True)
            names.clear()
            with Counting():
                model(text_ids(1), past_key_values=past, use_cache=True)
        return len(names)

    assert count(3) - count(2) <= 22
