"""Structures: weight formats, activation types, how blocks are chosen, how many directions are kept."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from havoc_core import arguments
from havoc_core.errors import HavocError
from havoc_core.model.structure import ACTIVATION_DTYPES, BLOCK_SIZES, COMPUTES, QUANTIZERS, WEIGHT_FORMATS, Structure

PROJECTION = "model.layers.0.mlp.up_proj.weight"


def test_every_combination_has_a_name() -> None:
    """Eight structures, eight names."""
    structures = [Structure(weights, activations) for weights in WEIGHT_FORMATS for activations in ACTIVATION_DTYPES]
    assert len({str(structure) for structure in structures}) == 8
    assert str(Structure("int4", "fp16")) == "int4-fp16"
    assert [structure.is_quantized for structure in structures] == [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int3",), "unknown weight format 'int3'; known are fp32, fp16, int8, int4 and keep"),
        (("int4", "bf16"), "unknown activation dtype 'bf16'; known are fp32, fp16"),
        (("int4", "fp32", 33), "block_size must be 16, 32, 64, 128 or 256, not 33"),
        (("fp16", "fp32", 64), "fp16 weights have no blocks: leave out block size 64, or take int8 or int4"),
        (("fp32", "fp32", 32, False), "fp32 weights have no blocks: leave out asymmetric blocks, or take"),
        (
            ("fp32", "fp32", 32, False, "hqq"),
            "no blocks: leave out asymmetric blocks and the quantizer hqq, or take int8",
        ),
        (("int4", "fp32", 32, False, "awq"), "unknown quantizer 'awq'; known are rtn, hqq, k_quant, gptq"),
        (("int8", "fp32", 32, False, "hqq"), "the quantizer hqq makes int4 weights, not int8; use rtn or k_quant"),
        (("int4", "fp32", 32, True, "k_quant"), "the quantizer k_quant chooses zero points: ask for asymmetric blocks"),
        (
            ("int4", "fp32", 32, True, "rtn", 0.0),
            "the share of the rank to keep must be above 0 and at most 1, not 0.0",
        ),
        (
            ("int4", "fp32", 32, True, "rtn", 1.5),
            "the share of the rank to keep must be above 0 and at most 1, not 1.5",
        ),
        (
            ("int4", "fp32", 32, True, "rtn", math.nan),
            "the share of the rank to keep must be above 0 and at most 1, not nan",
        ),
        (
            ("int4", "fp32", 32, True, "rtn", "half"),
            "the share of the rank to keep must be above 0 and at most 1, not 'half'",
        ),
        (("int4", "fp32", 32, True, "rtn", 1.0, "int4"), "compute in fp32, int8, w8a8, not 'int4'"),
        (
            ("fp16", "fp32", 32, True, "rtn", 1.0, "int8"),
            "fp16 weights compute in fp32: int8 compute needs integer weights",
        ),
        (("int8", "fp32", 32, True, "gptq"), "the quantizer gptq makes int4 weights, not int8; use rtn or k_quant"),
        (("int4", "fp32", 32, True, "gptq", 0.5), "gptq and mixed bits work on whole matrices: leave out the share"),
        (("int4", "fp32", 32, True, "rtn", 0.5, "auto", 6.0), "gptq and mixed bits work on whole matrices"),
        (("int8", "fp32", 32, True, "rtn", 1.0, "auto", 8.5), "int8 weights cannot be mixed: an average of bits needs"),
        (
            ("int4", "fp32", 32, True, "rtn", 1.0, "auto", 4.5),
            "4.5 bits per weight: these blocks take 5 with only int4 and 9 with only int8",
        ),
        (("int4", "fp32", 32, True, "gptq", 1.0, "auto", 8.6), "take 4.5 with only int4 and 8.5 with only int8"),
        (("int4", "fp32", 32, True, "gptq", 1.0, "auto", math.nan), "nan bits per weight"),
        (("keep", "fp32", 64), "leave out block size 64, or take int8 or int4"),
        (("keep", "fp32", 32, True, "rtn", 0.5), "leave out the share"),
        (("int8", "fp16", 32, True, "rtn", 1.0, "int8"), "int8 compute rounds fp32 activations: leave it out, or ask"),
        (("int8", "fp16", 32, True, "rtn", 1.0, "w8a8"), "w8a8 compute rounds fp32 activations"),
        (("fp32", "fp32", 32, True, "rtn", 1.0, "w8a8"), "w8a8 compute needs integer weights"),
        (("int4", "fp32", 32, True, "rtn", 1.0, "w8a8"), "w8a8 compute needs int8 weights in symmetric blocks"),
        (("int8", "fp32", 32, False, "rtn", 1.0, "w8a8"), "w8a8 compute needs int8 weights in symmetric blocks"),
        (("int8", "fp32", 32, True, "rtn", 0.5, "w8a8"), "w8a8 compute works on whole matrices"),
    ],
)
def test_others_are_refused(arguments: tuple[object, ...], message: str) -> None:
    """An unknown format is refused with the list of the known ones, an option that would do nothing by its name."""
    with pytest.raises(HavocError, match=message):
        Structure(*arguments)


def everything() -> list[Structure]:
    """Every structure there is but for most averages of bits, at three rank fractions."""
    formats = [
        *(("fp32", 32, True, "rtn"), ("fp16", 32, True, "rtn")),
        *(("int8", size, *how) for size in BLOCK_SIZES for how in ((True, "rtn"), (False, "rtn"), (False, "k_quant"))),
        *(("int4", size, True, "rtn") for size in BLOCK_SIZES),
        *(("int4", size, False, quantizer) for size in BLOCK_SIZES for quantizer in QUANTIZERS if quantizer != "gptq"),
    ]
    calibrated = [
        Structure("int4", activations, size, is_symmetric, quantizer, average_bits=bits)
        for activations in ACTIVATION_DTYPES
        for size in (32, 64)
        for is_symmetric, quantizer in ((True, "rtn"), (False, "k_quant"), (True, "gptq"), (False, "gptq"))
        for bits in (None, 5.125, 6.0)
        if quantizer == "gptq" or bits == 6.0
    ]
    kept = [Structure("keep", activations) for activations in ACTIVATION_DTYPES]
    plain = [
        Structure(weights, activations, *how, rank, compute)
        for weights, *how in formats
        for activations in ACTIVATION_DTYPES
        for rank in (1.0, 0.5, 0.505)
        for compute in (("fp32", "int8") if activations == "fp32" and weights in {"int8", "int4"} else ("fp32",))
    ]
    integers = [Structure("int8", block_size=size, compute="w8a8") for size in BLOCK_SIZES]
    return [*plain, *integers, *kept, Structure("keep", compute="fp32"), *calibrated]


def test_names_say_what_is_unusual() -> None:
    """Defaults keep the short name; every deviation is in it, and no two structures share one."""
    assert str(Structure("int4", "fp32", 64, False, "hqq")) == "int4a-hqq-b64-fp32"
    assert str(Structure("int8", "fp16", rank_fraction=0.5)) == "int8-fp16-r0.50"
    assert str(Structure("int8", is_symmetric=False)) == "int8a-fp32"
    assert str(Structure("int4", quantizer="gptq", average_bits=5)) == "int4-gptq-mix5.0-fp32"
    assert str(Structure("keep", compute="fp32")) == "keep-fp32-cfp32"
    assert str(Structure("int8", compute="w8a8")) == "int8-fp32-cw8a8"
    structures = everything()
    assert len({str(structure) for structure in structures}) == len(structures) == 367


def test_the_command_line_offers_what_there_is() -> None:
    """The parser names its choices itself, so that `--help` imports nothing; they are the same."""
    assert arguments.WEIGHT_FORMATS == WEIGHT_FORMATS
    assert arguments.BLOCK_SIZES == BLOCK_SIZES
    assert arguments.COMPUTES == COMPUTES
    assert tuple(name.replace("-", "_") for name in arguments.QUANTIZERS) == QUANTIZERS


def test_a_name_is_read_back() -> None:
    """Every name is its structure again; in a recipe the activations may be left out, and k-quant written so."""
    for structure in everything():
        assert Structure.named(str(structure)) == structure
    assert Structure.named("int4a-hqq-b64-r0.5", "fp16") == Structure("int4", "fp16", 64, False, "hqq", 0.5)
    assert Structure.named("int4-cfp32-r0.5") == Structure("int4", rank_fraction=0.5, compute="fp32")
    assert Structure.named("int8a-k-quant") == Structure("int8", "fp32", 32, False, "k_quant")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int3", "unknown structure 'int3'; a name is a weight format"),
        ("int4-b64-hqq", "unknown structure"),
        ("int4-b٦٤", "unknown structure"),
        ("int4 ", "unknown structure"),
        ("int4-b48", "block_size must be"),
        ("int4-hqq", "chooses zero points"),
        ("fp32a", "fp32 weights have no blocks"),
        ("fp32-r2", "the share of the rank to keep must be above 0 and at most 1, not 2.0"),
    ],
)
def test_other_names_are_refused(name: str, message: str) -> None:
    """What is no name, or names what cannot be, is one line."""
    with pytest.raises(HavocError, match=message):
        Structure.named(name)


def test_blocks_say_what_a_weight_takes() -> None:
    """Bits with the share of scale and zero; gptq's scales are fp16, so it stores a float minimum for what others
    spend on a wider scale.
    """
    bits = {name: Structure.named(name).blocks.bits_per_weight for name in ("int4", "int4a", "int4-gptq", "int4a-gptq")}
    assert bits == {"int4": 5.0, "int4a": 5.125, "int4-gptq": 4.5, "int4a-gptq": 5.0}
    assert Structure.named("int4-gptq-b16-fp16").blocks.bits_per_weight == 5.0
    for name in ("int4a-gptq", "int4a-b64", "int8"):
        blocks = Structure.named(name).blocks
        assert blocks.matrix_bytes(4, 256) * 8 == blocks.bits_per_weight * 4 * 256


def test_a_structure_is_described_in_words() -> None:
    """What a person reads in a summary: format, blocks, activations, rank."""
    assert Structure().description == "fp32 weights, fp32 activations"
    asked = Structure("int4", "fp16", 64, False, "hqq", 0.5)
    assert asked.description == "int4 weights (asymmetric blocks of 64, hqq), fp16 activations, 0.5 of the rank"
    mixed = Structure("int4", quantizer="gptq", average_bits=5)
    words = (
        "int4 weights (symmetric blocks of 32, gptq, int8 up to 5 bits per weight), fp32 activations computed in int8"
    )
    assert mixed.description == words
    assert Structure("keep", "fp16").description == "the weights of the file as they are, fp16 activations"


def test_fields_come_back() -> None:
    """What is written is read back, from JSON with its own types and from text alone; defaults write three keys."""
    assert list(Structure("fp16").to_fields()) == ["weight_format", "activation_dtype", "block_size"]
    assert list(Structure("int4").to_fields()) == ["weight_format", "activation_dtype", "block_size", "compute"]
    for structure in everything():
        written = json.loads(json.dumps(structure.to_fields()))
        assert Structure.from_fields(written) == structure
        assert Structure.from_fields({name: str(value) for name, value in written.items()}) == structure


def test_products_compute_in_the_fast_way_unless_asked() -> None:
    """int8 where weights are integers under fp32 activations, else fp32; names and words say what deviates."""
    fast = {str(s): s.compute for s in (Structure(w, a) for w in WEIGHT_FORMATS for a in ACTIVATION_DTYPES)}
    assert {name for name, compute in fast.items() if compute == "int8"} == {"int8-fp32", "int4-fp32"}
    exact = Structure("int4", compute="fp32")
    assert (str(exact), Structure.named("int4-cfp32")) == ("int4-fp32-cfp32", exact)
    assert Structure.named("int4-cint8") == Structure.named("int4") == Structure("int4")
    assert exact.description == "int4 weights (symmetric blocks of 32, rtn), fp32 activations computed in fp32"


def test_fields_of_an_older_version_mean_what_they_meant() -> None:
    """Without a word about it int8 weights computed in int8, int4 weights in fp32."""
    for weight_format, compute in (("int8", "int8"), ("int4", "fp32"), ("fp16", "fp32")):
        old = {"weight_format": weight_format, "activation_dtype": "fp32", "block_size": 32}
        assert Structure.from_fields(old).compute == compute


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compute": "int4"}, "compute in fp32, int8, w8a8, not 'int4'"),
        ({"weight_format": "int3"}, "unknown weight format 'int3'"),
        ({"block_size": "many"}, "cannot be read"),
        ({"is_symmetric": "maybe"}, "cannot be read"),
        ({"rank_fraction": "half"}, "cannot be read"),
        ({"kv_dtype": "int8"}, "a structure has no kv_dtype"),
    ],
)
def test_damaged_fields_are_refused(change: dict[str, str], message: str) -> None:
    """A value that cannot be read, or a choice this version does not know, is one line."""
    written = {"weight_format": "int4", "activation_dtype": "fp32", "block_size": "32"}
    with pytest.raises(HavocError, match=message):
        Structure.from_fields({**written, **change})
    with pytest.raises(HavocError, match="cannot be read"):
        Structure.from_fields({"weight_format": "int4"})


@given(num_rows=st.integers(1, 600), num_columns=st.integers(1, 600), fraction=st.floats(0.001, 1))
def test_factors_are_smaller_than_the_matrix(num_rows: int, num_columns: int, fraction: float) -> None:
    """r is ceil(fraction min(M, N)) below break-even; at or beyond it the matrix stays whole."""
    shape = (num_rows, num_columns)
    rank = Structure("fp32", rank_fraction=fraction).kept_rank(PROJECTION, shape)
    wanted = math.ceil(round(fraction * min(shape), 9))
    if fraction < 1 and wanted * (num_rows + num_columns) < num_rows * num_columns:
        assert rank == wanted
    else:
        assert rank is None


def test_only_projections_are_factored() -> None:
    """Tables, head, vision and norms stay whole; so does an integer matrix whose padded factors would be larger."""
    quarter = Structure("int4", rank_fraction=0.25)
    assert quarter.kept_rank(PROJECTION, (352, 128)) == 32
    assert quarter.kept_rank(PROJECTION, (32, 32)) is None
    assert Structure("fp16", rank_fraction=0.25).kept_rank(PROJECTION, (32, 32)) == 8
    for name in ("model.embed_tokens.weight", "lm_head.weight", "vision.projection.weight"):
        assert quarter.kept_rank(name, (352, 128)) is None
    assert quarter.kept_rank("model.norm.weight", (128,)) is None


def test_the_smallest_share_of_a_rank_keeps_one_direction() -> None:
    """However small, it is above none."""
    for fraction in (1e-320, 1e-12, 1e-3):
        assert Structure(rank_fraction=fraction).kept_rank("model.layers.0.mlp.up_proj.weight", (96, 32)) == 1
