"""What our recipes make of our model is what we reviewed: the goldens beside this file."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpass.passes import QuantizeKV, ShareLayers, SlideWindow

RECIPES = Path(__file__).parent.parent / "recipes"


def test_the_release_recipe(kv_regression, chat_model):
    kv_regression.check(chat_model, RECIPES / "release.toml")


@pytest.mark.parametrize("bits", [8, 4])
def test_long_chats_in_constant_memory(kv_regression, chat_model, bits):
    kv_regression.check(chat_model, [SlideWindow(16, 4), QuantizeKV(bits, layout="token")])


def test_what_the_server_loads(kv_regression, chat_model):
    pytest.importorskip("onnxruntime")
    kv_regression.check(chat_model, [ShareLayers("cla:2")], onnx=True)
