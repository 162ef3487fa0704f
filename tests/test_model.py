"""The thirteen points a HAVOC model must hold: initialisation to from_config, on the smallest shape with every part."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from havoc_core.config import HavocConfig
from havoc_core.model import GQAttention, GroupedQueryAttention, HavocModel, SigmaModel, VisionConfig


@pytest.fixture
def config() -> HavocConfig:
    return HavocConfig.pico(vision=VisionConfig(patch_size=2, image_token_id=3))


@pytest.fixture
def model(config: HavocConfig) -> HavocModel:
    torch.manual_seed(0)
    return HavocModel(config).eval()


@pytest.fixture
def input_ids(config: HavocConfig) -> Tensor:
    return torch.randint(4, config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))


class TestInitialization:
    """Point 1."""

    def test_layers_follow_the_config(self, model: HavocModel, config: HavocConfig) -> None:
        """The model has the layers, heads and widths that its config names."""
        assert len(model.layers) == config.num_layers
        attention = model.layers[0].self_attn
        assert attention.q_proj.weight.shape == (4 * 8, 32)
        assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (2 * 8, 32)
        assert model.layers[0].mlp.w1.weight.shape == model.layers[0].mlp.w2.weight.shape == (64, 32)
        assert model.layers[0].mlp.w3.weight.shape == (32, 64)

    def test_the_head_is_the_embedding(self, model: HavocModel) -> None:
        """Tied means one tensor, not two equal ones."""
        assert model.lm_head.weight is model.embed_tokens.weight

    def test_an_untied_head_is_its_own(self, config: HavocConfig) -> None:
        """Untied means two tensors."""
        model = HavocModel(dataclasses.replace(config, tie_word_embeddings=False))
        assert not torch.equal(model.lm_head.weight, model.embed_tokens.weight)

    def test_weights_are_normal_and_padding_is_zero(self) -> None:
        """GPT-NeoX: every matrix normal(0, 0.02), norms one, biases zero, the padding token's embedding zero."""
        config = HavocConfig.nano()
        config = config.replace(attention=dataclasses.replace(config.attention, qkv_bias=True))
        for name, parameter in HavocModel(config).named_parameters():
            if parameter.ndim > 1:
                assert parameter.mean().abs() < 1e-3, name
                assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            else:
                assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name
        assert (HavocModel(config).embed_tokens.weight[0] == 0).all()

    def test_the_initializer_range_is_the_std(self, config: HavocConfig) -> None:
        """Of every matrix, whatever it is set to."""
        for initializer_range in (0.005, 0.1):
            model = HavocModel(config.replace(initializer_range=initializer_range))
            values = torch.cat([parameter.flatten() for parameter in model.parameters() if parameter.ndim > 1])
            assert values.std().item() == pytest.approx(initializer_range, rel=0.05)

    def test_no_biases(self, model: HavocModel) -> None:
        """No projection has a bias."""
        assert [name for name, _ in model.named_parameters() if name.endswith("bias")] == []

    def test_the_7b_preset_has_its_size(self) -> None:
        """HAVOC-7B has exactly 5,957,685,248 parameters; on the meta device it takes no memory."""
        with torch.device("meta"):
            model = HavocModel(HavocConfig.havoc_7b())
        assert sum(parameter.numel() for parameter in model.parameters()) == 5_957_685_248
        assert model.num_parameters() == 5_957_685_248

    def test_aliases_are_the_same_classes(self) -> None:
        """Both names of a class are one class."""
        assert SigmaModel is HavocModel
        assert GroupedQueryAttention is GQAttention


class TestForward:
    """Point 2."""

    @torch.no_grad()
    def test_logits_for_every_token(self, model: HavocModel, config: HavocConfig, input_ids: Tensor) -> None:
        """`logits = model(input_ids)` is [batch, tokens, vocab], finite, fp32."""
        logits = model(input_ids)
        assert logits.shape == (2, 16, config.vocab_size)
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()

    @torch.no_grad()
    def test_with_cache_a_pair(self, model: HavocModel, input_ids: Tensor) -> None:
        """`logits, past_kv = model(input_ids, use_cache=True)` has the same logits."""
        logits, past_kv = model(input_ids, use_cache=True)
        assert torch.equal(logits, model(input_ids))
        assert len(past_kv) == 2

    @torch.no_grad()
    def test_last_only(self, model: HavocModel, input_ids: Tensor) -> None:
        """`last_only` gives the last column of the logits."""
        assert torch.allclose(model(input_ids, last_only=True), model(input_ids)[:, -1:], atol=1e-6)


class TestCache:
    """Points 3 and 4."""

    @torch.no_grad()
    def test_shapes(self, model: HavocModel, config: HavocConfig, input_ids: Tensor) -> None:
        """One (key, value) a layer, each [batch, kv heads, tokens, head dim]."""
        _, past_kv = model(input_ids, use_cache=True)
        assert len(past_kv) == config.num_layers
        for key, value in past_kv:
            assert key.shape == value.shape == (2, 2, 16, 8)

    @torch.no_grad()
    def test_grows_and_leaves_the_old_one_alone(self, model: HavocModel, input_ids: Tensor) -> None:
        """A step appends one token to the cache it returns; the cache it was given can be used again."""
        _, past_kv = model(input_ids[:, :10], use_cache=True)
        first, longer = model(input_ids[:, 10:11], past_key_values=past_kv, use_cache=True)
        assert longer[0][0].shape[2] == 11
        assert past_kv[0][0].shape[2] == 10
        again, _ = model(input_ids[:, 10:11], past_key_values=past_kv, use_cache=True)
        assert torch.equal(first, again)

    @pytest.mark.parametrize("sizes", [[1] * 16, [10, 6], [5, 1, 7, 3], [15, 1]], ids=str)
    @torch.no_grad()
    def test_pieces_give_the_whole(self, model: HavocModel, input_ids: Tensor, sizes: list[int]) -> None:
        """Read token by token or in chunks, the logits are those of one pass."""
        past, pieces = None, []
        for piece in input_ids.split(sizes, dim=1):
            logits, past = model(piece, past_key_values=past, use_cache=True)
            pieces.append(logits)
        assert torch.allclose(torch.cat(pieces, dim=1), model(input_ids), atol=1e-5)


class TestAttentionMask:
    """Point 5."""

    def test_causal(self, model: HavocModel) -> None:
        """Shape [batch, 1, new, all]; 0 on and below the diagonal, -inf above."""
        mask = model.build_attention_mask(torch.zeros(1, 4, dtype=torch.long))
        assert mask.shape == (1, 1, 4, 4)
        assert mask[0, 0].tolist() == [[0.0 if key <= query else -torch.inf for key in range(4)] for query in range(4)]

    def test_offset_by_the_past(self, model: HavocModel) -> None:
        """With three tokens in the cache, new token i sees keys up to 3 + i."""
        mask = model.build_attention_mask(torch.zeros(1, 2, dtype=torch.long), num_past=3)
        assert (mask[0, 0] == 0).tolist() == [[True] * 4 + [False], [True] * 5]

    def test_padding_is_hidden(self, model: HavocModel) -> None:
        """Padding on the left is seen by nothing but itself, so no row is empty."""
        attention_mask = torch.tensor([[0, 0, 1, 1]])
        mask = model.build_attention_mask(torch.zeros(1, 4, dtype=torch.long), attention_mask)
        is_visible = [[True, False, False, False], [False, True, False, False]]
        is_visible += [[False, False, True, False], [False, False, True, True]]
        assert (mask[0, 0] == 0).tolist() == is_visible

    @torch.no_grad()
    def test_the_future_changes_nothing(self, model: HavocModel, input_ids: Tensor) -> None:
        """Changing a token leaves every logit before it as it was, bit for bit."""
        changed = input_ids.clone()
        changed[:, 9] = (changed[:, 9] + 1) % 64
        before, after = model(input_ids), model(changed)
        assert torch.equal(before[:, :9], after[:, :9])
        assert not torch.allclose(before[:, 9:], after[:, 9:])


class TestLoss:
    """Points 6 and 7."""

    def test_is_shifted_cross_entropy(self, model: HavocModel, input_ids: Tensor) -> None:
        """The loss is the mean negative log likelihood of each token given those before."""
        loss, logits = model.compute_loss(input_ids)
        log_probabilities = logits.log_softmax(dim=-1)[:, :-1].gather(-1, input_ids[:, 1:, None])
        assert loss.item() == pytest.approx(-log_probabilities.mean().item(), rel=1e-6)

    def test_labels_may_be_given(self, model: HavocModel, input_ids: Tensor) -> None:
        """Labels equal to the input give the same loss; -100 takes a position out."""
        loss, _ = model.compute_loss(input_ids)
        assert torch.equal(model.compute_loss(input_ids, labels=input_ids)[0], loss)
        labels = input_ids.clone()
        labels[:, 8:] = -100
        assert model.compute_loss(input_ids, labels)[0].item() == pytest.approx(
            model.compute_loss(input_ids[:, :8])[0].item(), rel=1e-5
        )

    @pytest.mark.parametrize("with_mask", [False, True])
    def test_padding_does_not_count(self, model: HavocModel, input_ids: Tensor, with_mask: bool) -> None:
        """A padded batch has the loss of its real tokens."""
        padded = torch.nn.functional.pad(input_ids, (0, 5), value=0)
        mask = (padded != 0).long() if with_mask else None
        expected, _ = model.compute_loss(input_ids)
        assert model.compute_loss(padded, attention_mask=mask)[0].item() == pytest.approx(expected.item(), rel=1e-6)

    def test_only_padding_is_zero_not_nan(self, model: HavocModel) -> None:
        """A batch in which nothing counts has loss 0 and gradient 0."""
        loss, _ = model.compute_loss(torch.zeros(2, 5, dtype=torch.long))
        loss.backward()
        assert loss.item() == 0.0
        assert all(parameter.grad is None or (parameter.grad == 0).all() for parameter in model.parameters())


class TestGeneration:
    """Points 8 and 9; depth in tests/model/test_generation.py."""

    def test_continues_the_prompt(self, model: HavocModel, input_ids: Tensor) -> None:
        """The result begins with the prompt and is at most max_new_tokens longer."""
        generated = model.generate(input_ids, max_new_tokens=10)
        assert torch.equal(generated[:, :16], input_ids)
        assert 16 < generated.shape[1] <= 26

    def test_is_repeatable(self, model: HavocModel, input_ids: Tensor) -> None:
        """Greedy generation repeats itself; so does sampling from the same seed."""
        assert torch.equal(model.generate(input_ids, 10), model.generate(input_ids, 10))
        runs = [model.generate(input_ids, 10, 0.7, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
        assert torch.equal(*runs)


class TestSaveAndLoad:
    """Point 10; depth in tests/model/test_checkpoint.py."""

    @pytest.mark.parametrize("use_safetensors", [True, False])
    def test_round_trip(self, model: HavocModel, tmp_path: Path, use_safetensors: bool) -> None:
        """Config and every weight come back bit for bit, in either form."""
        model.save_pretrained(tmp_path, use_safetensors=use_safetensors)
        loaded = HavocModel.load_pretrained(tmp_path, device="cpu")
        assert loaded.config == model.config
        weights = dict(loaded.named_parameters())
        assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
        assert loaded.lm_head.weight is loaded.embed_tokens.weight


class TestTraining:
    """Points 11 and 12."""

    def test_gradients_reach_every_parameter(self, model: HavocModel, config: HavocConfig) -> None:
        """A text with an image gives every parameter a gradient that is finite and not zero."""
        input_ids = torch.tensor([[1, 3, 3, 9, 10, 11]])
        loss, _ = model.compute_loss(input_ids, patches=torch.rand(2, config.vision.patch_dim))
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name

    def test_a_step_lowers_the_loss(self, model: HavocModel, input_ids: Tensor) -> None:
        """Twenty steps on one batch learn it a little."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss, _ = model.train().compute_loss(input_ids)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]

    @torch.no_grad()
    def test_dropout_in_training_only(self, config: HavocConfig, input_ids: Tensor) -> None:
        """In training two passes differ; in eval they agree, with each other and with a model without dropout."""
        torch.manual_seed(0)
        model = HavocModel(dataclasses.replace(config, dropout=0.3))
        assert not torch.equal(model.train()(input_ids), model(input_ids))
        assert torch.equal(model.eval()(input_ids), model(input_ids))
        without = HavocModel(config).eval()
        without.load_state_dict(model.state_dict())
        assert torch.equal(without(input_ids), model(input_ids))


def test_from_config(config: HavocConfig) -> None:
    """Point 13: `HavocModel.from_config(config)` is `HavocModel(config)`."""
    torch.manual_seed(3)
    built = HavocModel.from_config(config)
    torch.manual_seed(3)
    same = HavocModel(config)
    assert isinstance(built, HavocModel)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(built.parameters(), same.parameters(), strict=True))
