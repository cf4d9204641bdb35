"""transformers' model tests on a Llama with levels: while they learn, and with learning off."""

from __future__ import annotations

import json
import unittest
from pathlib import Path
from typing import Any

from transformers import GenerationMixin, LlamaConfig

from nestling import Level
from nestling.cms.stacked_model import StackedConfig
from nestling.cms.stacked_model import StackedForCausalLM as Stacked
from suites.listed import CHECKPOINTING, EMBEDDINGS, expect
from suites.others import EVERY, common
from suites.testers import ModelTester

theirs = common()
RECIPE = {"levels": [Level(4, lr=0.1).to_dict(), Level(8, lr=0.1).to_dict()]}


def stacked(config: LlamaConfig) -> StackedConfig:
    """What the folder of such a Llama with levels would say."""
    made = StackedConfig(original=config.to_diff_dict(), levels=RECIPE)
    made._attn_implementation_internal = config._attn_implementation_internal
    return made


class StackedForCausalLM(Stacked, GenerationMixin):
    """Made of a Llama's configuration, as the tests make a model: the levels stand here."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(stacked(config))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **options: Any) -> Any:
        if config is None and pretrained_model_name_or_path:
            folder = Path(pretrained_model_name_or_path)
            if json.loads((folder / "config.json").read_text())["model_type"] == "llama":
                config = LlamaConfig.from_pretrained(folder)
        if isinstance(config, LlamaConfig):
            config = stacked(config)
        loaded = Stacked.from_pretrained(pretrained_model_name_or_path, *args, config=config, **options)
        (loaded[0] if isinstance(loaded, tuple) else loaded).learning = cls.learning
        return loaded


class Still(StackedForCausalLM, GenerationMixin):
    learning = False


Still.__name__ = "StackedForCausalLM"


class LlamaSuite(theirs.ModelTesterMixin, theirs.GenerationTesterMixin):
    if not EVERY:
        test_bc_torch_dtype = None  # loads each class 28 times

    def setUp(self) -> None:
        self.model_tester = ModelTester(self, LlamaConfig)


class TestLearning(LlamaSuite, unittest.TestCase):
    all_model_classes = (StackedForCausalLM,)
    has_attentions = (
        False  # a map is put together from its parts, so outside the graph: tests/cms/test_forward.py has them
    )


expect(TestLearning, {**EMBEDDINGS, **CHECKPOINTING})

if EVERY:

    class TestStill(LlamaSuite, unittest.TestCase):
        all_model_classes = (Still,)
