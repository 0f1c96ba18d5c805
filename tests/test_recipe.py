"""Recipes: what is written is what runs, and what is not understood is an error that says where."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpass import Recipe
from kvpass.errors import RequestError
from kvpass.passes import GroupHeads, SplitProjections
from kvpass.recipe import PASSES

heads = st.integers(-3, 64)
group_heads = st.builds(
    GroupHeads,
    kv_heads=heads | st.lists(heads, min_size=1, max_size=5).map(tuple),
    method=st.sampled_from(["mean", "first", "procrustes", "pca"]),
    refit=st.sampled_from(["none", "o_proj", "distill"]),
    grouping=st.sampled_from(["auto", "search", "contiguous"]),
    steps=st.integers(1, 10_000),
    swap_windows=st.integers(0, 64),
)
recipes = st.lists(group_heads | st.just(SplitProjections()), max_size=4).map(lambda p: Recipe(tuple(p)))


@settings(max_examples=80, deadline=None)
@given(recipe=recipes)
def test_a_recipe_that_is_written_and_read_is_the_same(recipe):
    text = recipe.dump()
    assert Recipe.parse(text) == recipe
    assert Recipe.parse(text).dump() == text
    for entry, step in zip(tomllib.loads(text).get("pass", []), recipe.passes, strict=True):
        written = {k: list(v) if isinstance(v, tuple) else v for k, v in step.options().items()}
        assert entry == {"name": step.key()} | written


def test_a_recipe_names_only_what_it_changes():
    text = STEP + '[[pass]]\nname = "group-heads"\nkv_heads = [1, 2]\nmethod = "mean"\n'
    assert Recipe.parse(text).passes == (GroupHeads(2), GroupHeads((1, 2), method="mean"))
    assert Recipe.parse("").passes == ()


def test_a_recipe_comes_from_many_things(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(Recipe((GroupHeads(2),)).dump(), encoding="utf-8")
    wanted = Recipe((GroupHeads(2),))
    for source in (path, str(path), GroupHeads(2), [GroupHeads(2)], (p for p in [GroupHeads(2)]), wanted):
        assert Recipe.of(source) == wanted
    assert Recipe.of(None) == Recipe.of([]) == Recipe()


STEP = '[[pass]]\nname = "group-heads"\nkv_heads = 2\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[pass]\n", "no valid TOML"),
        (STEP + "kv_heads = 4\n", "no valid TOML"),
        ("passes = []\n", "unknown key 'passes'"),
        (STEP + "[other]\nx = 1\n", "unknown key 'other'"),
        ("[pass]\nname = 'group-heads'\nkv_heads = 2\n", "two brackets"),
        ("pass = 3\n", "two brackets"),
        ("pass = [3]\n", "pass 1"),
        ("[[pass]]\nkv_heads = 2\n", "there is no pass None"),
        ("[[pass]]\nname = 'group_heads'\nkv_heads = 2\n", "there is no pass 'group_heads'"),
        ("[[pass]]\nname = 3\n", "there is no pass 3"),
        ("[[pass]]\nname = ['group-heads']\n", "there is no pass"),
        (STEP + "window = 4\n", "group-heads has no key 'window'"),
        (STEP + "KV_HEADS = 4\n", "group-heads has no key 'KV_HEADS'"),
        ("[[pass]]\nname = 'group-heads'\n", "kv_heads"),
        ("[[pass]]\nname = 'group-heads'\nkv_heads = '2'\n", "kv_heads"),
        ("[[pass]]\nname = 'group-heads'\nkv_heads = 2.0\n", "kv_heads"),
        ("[[pass]]\nname = 'group-heads'\nkv_heads = true\n", "kv_heads"),
        ("[[pass]]\nname = 'group-heads'\nkv_heads = [2, '4']\n", "kv_heads"),
        ("[[pass]]\nname = 'group-heads'\nkv_heads = {layer = 2}\n", "kv_heads"),
        (STEP + "method = 'best'\n", "method"),
        (STEP + "method = 3\n", "method"),
        (STEP + "steps = 1.5\n", "steps"),
        (STEP + "steps = '10'\n", "steps"),
        ("[[pass]]\nname = 'split-projections'\nkv_heads = 2\n", "split-projections has no key 'kv_heads'"),
    ],
)
def test_what_is_not_understood_is_an_error_that_says_what_and_where(text, words):
    with pytest.raises(RequestError) as found:
        Recipe.parse(text, "r.toml")
    assert words in str(found.value), str(found.value)
    assert "r.toml" in found.value.where
    assert found.value.exit_status == 2


def test_the_pass_at_fault_is_numbered():
    with pytest.raises(RequestError, match=r"r.toml, pass 2"):
        Recipe.parse(STEP + STEP + "window = 4\n", "r.toml")


def test_an_unknown_pass_or_key_comes_with_those_that_are_known():
    with pytest.raises(RequestError, match="'evict-kv', 'group-heads', 'page-kv', 'prune-pyramid', 'quantize-kv'"):
        Recipe.parse('[[pass]]\nname = "gqa"\n')
    with pytest.raises(RequestError, match="'kv_heads', 'method', 'refit'"):
        Recipe.parse(STEP + "heads = 3\n")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(RequestError) as found:
            Recipe.load(path)
        assert found.value.where == str(path)
    bad = tmp_path / "latin.toml"
    bad.write_bytes(b'# caf\xe9\n[[pass]]\nname = "group-heads"\nkv_heads = 2\n')
    with pytest.raises(RequestError):
        Recipe.load(bad)


@pytest.mark.parametrize("steps", [[GroupHeads], ["group-heads"], [GroupHeads(2), 3]])
def test_a_list_of_something_else_is_no_recipe(steps):
    with pytest.raises(RequestError, match="a recipe holds passes, not"):
        Recipe.of(steps)


def test_every_pass_has_the_name_by_which_it_is_found():
    assert {name: kind.key() for name, kind in PASSES.items()} == {name: name for name in PASSES}
    assert GroupHeads(2, method="mean").describe() == "GroupHeads(kv_heads=2, method='mean')"
