"""Every family in the table of the docs, and decoders that no library has; `properties` says what must hold."""

import pytest

import decoders
import families
import properties

# what is refused, and the words of the reason
MHA_ONLY = "config cannot express 2 KV heads"
JOINT_NORM = "normalised over all heads together"
LATENT = "it comes from 2 projections"
OPAQUE = "the mask of layer 0 is kept as a table"
REFUSED = {
    "biogpt": {"checkpoint": MHA_ONLY},
    "bitnet": {"grouped": "read in several places before its output projection"},
    "bloom": {"checkpoint": MHA_ONLY},
    "codegen": {"checkpoint": MHA_ONLY},
    "cohere_qk_norm": {"grouped": "heads are rotated differently"},
    "deepseek_v2": {"split": LATENT, "grouped": LATENT},
    "deepseek_v3": {"split": LATENT, "grouped": LATENT},
    "falcon_mha_alibi": {"checkpoint": "falcon cannot be built with the rewritten number of KV heads"},
    "gpt2": {"checkpoint": MHA_ONLY},
    "gpt2_layer_scale": {"checkpoint": MHA_ONLY},
    "gpt_neo": {"checkpoint": MHA_ONLY},
    "gpt_neox": {"checkpoint": MHA_ONLY},
    "gpt_neox_sequential": {"checkpoint": MHA_ONLY},
    "gptj": {"checkpoint": MHA_ONLY},
    "hunyuan_v1_dense": {"grouped": "in another way than a rotation"},
    "llama4_text": {"pruned": OPAQUE},
    "mpt": {"checkpoint": MHA_ONLY},
    "olmo": {"grouped": "pass through a norm or a clamp"},
    "olmo2": {"grouped": JOINT_NORM},
    "olmo3": {"grouped": JOINT_NORM},
    "olmoe": {"grouped": JOINT_NORM},
    "opt": {"checkpoint": MHA_ONLY},
    "persimmon": {"checkpoint": MHA_ONLY},
    "stablelm_qk_norm": {"grouped": "heads are rotated differently"},
    "xglm": {"checkpoint": MHA_ONLY},
}


def check(name, examination):
    expected = REFUSED.get(name, {})
    for kind, cell in examination.cells.items():
        if kind in expected:
            assert expected[kind] in cell.refused, f"{name}: {kind} was to be refused, and gave {cell}"
        else:
            assert not cell.refused, f"{name}: {kind} was refused: {cell.refused}"
        assert cell.error <= properties.TOLERANCE, f"{name}: {kind} is off by {cell.error:.1e}"


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_a_family_of_transformers(name):
    check(name, properties.examine(families.build(name)))


@pytest.mark.parametrize("name", sorted(decoders.DECODERS))
def test_a_decoder_that_no_library_has(name):
    check(name, properties.examine(decoders.DECODERS[name](), family=False))


def test_the_table_is_as_large_as_promised():
    assert len(families.FAMILIES) >= 33
    assert len(decoders.DECODERS) >= 5
    assert set(REFUSED) <= set(families.FAMILIES)
