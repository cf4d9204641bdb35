"""transformers' model tests on Hope: each mixer, a pattern of layers, and levels that learn while the model reads."""

from __future__ import annotations

import unittest

import torch
from torch.utils._pytree import tree_leaves

from nestling.models.hope import HopeCacheLayer, HopeConfig, HopeForCausalLM, HopeModel
from suites.listed import CHECKPOINTING, EMBEDDINGS, expect
from suites.others import EVERY, common
from suites.testers import ModelTester

theirs = common()

KINDS = {
    name: {"mixer": name}
    for name in ("selfmod", "selfmod_tracking", "gated_deltanet", "gated_deltanet_tracking", "deltanet", "attention")
} | {
    "hybrid": {"mixers": ["gated_deltanet", {"mixer": "attention", "window": 4}]},
    "levels": {"cms_levels": [{"chunk_size": 4, "lr": 0.1}, {"chunk_size": None}], "context_length": 64},
}


class HopeSuite(theirs.ModelTesterMixin, theirs.GenerationTesterMixin):
    all_model_classes = (HopeModel, HopeForCausalLM)
    has_attentions = False
    options: dict
    if not EVERY:
        test_bc_torch_dtype = None  # loads each class 28 times

    def setUp(self) -> None:
        self.model_tester = ModelTester(self, HopeConfig, **self.options)

    # the generation tests look into a cache: here is a state in place of keys and values
    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        assert len(past_key_values) == config.num_hidden_layers
        for layer in past_key_values.layers:
            assert isinstance(layer, HopeCacheLayer)
            assert (layer.tokens, layer.batch_size) == (seq_length, batch_size)

    def _check_caches_are_equal(self, cache1, cache2):
        for one, two in zip(cache1.layers, cache2.layers, strict=True):
            assert one.tokens == two.tokens
            torch.testing.assert_close(tree_leaves(one.state), tree_leaves(two.state))


# `make test` takes the one that has a bit of all
for kind, options in KINDS.items() if EVERY else [("levels", KINDS["levels"])]:
    name = "Test" + kind.title().replace("_", "")
    globals()[name] = type(name, (HopeSuite, unittest.TestCase), {"options": options, "__module__": __name__})

expect(globals()["TestLevels"], {**EMBEDDINGS, **CHECKPOINTING})
