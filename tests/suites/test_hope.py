"""transformers' model tests on Hope: each mixer, a pattern of layers, and levels that learn while the model reads."""

from __future__ import annotations

import unittest

from nestling.models.hope import HopeConfig, HopeForCausalLM, HopeModel
from suites.listed import Listed, expect
from suites.others import common
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

    def setUp(self) -> None:
        self.model_tester = ModelTester(self, HopeConfig, **self.options)


for kind, options in KINDS.items():
    name = "Test" + kind.title().replace("_", "")
    globals()[name] = type(name, (HopeSuite, unittest.TestCase), {"options": options, "__module__": __name__})

TOKENS = Listed("reads input_ids, not inputs_embeds", "a level learns by predicting tokens: it needs their ids")
RECOMPUTED = Listed(
    "0 not greater than 1", "while levels learn whole pieces are computed again, not single blocks, which drops a cache"
)

expect(
    globals()["TestLevels"],
    {
        "test_inputs_embeds": TOKENS,
        "test_training_gradient_checkpointing": RECOMPUTED,
        "test_training_gradient_checkpointing_use_reentrant_false": RECOMPUTED,
        "test_training_gradient_checkpointing_use_reentrant_true": RECOMPUTED,
    },
)
