"""What transformers has to know of our models: in this process, and in one that has not imported nestling."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from nestling.utils.files import write_text

CODE = "nestling_model"
# `trust_remote_code=True` runs this file where nestling was not imported; where it is not installed either,
# transformers names it and says "pip install nestling"
TEXT = '''"""This model belongs to nestling (pip install nestling): transformers finds its classes here."""

from nestling.cms import StackedConfig, StackedForCausalLM
from nestling.models import HopeConfig, HopeForCausalLM, HopeModel

__all__ = ["HopeConfig", "HopeForCausalLM", "HopeModel", "StackedConfig", "StackedForCausalLM"]
'''


def register(config: Any, causal_lm: type, base: type | None = None) -> None:
    """Let the Auto classes find a model, and everyone who asks whether it is a causal language model."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
    if base is not None:
        AutoModel.register(config, base, exist_ok=True)
    # by the class's name: Trainer shifts the labels of label smoothing only for models listed here
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = causal_lm.__name__
    found = {"AutoConfig": config, "AutoModelForCausalLM": causal_lm, "AutoModel": base}
    config.auto_classes = {auto: kind.__name__ for auto, kind in found.items() if kind is not None}


class KnownByFile:
    """A configuration whose folder also says where its classes are (`auto_map`, and the file that imports them)."""

    auto_classes: ClassVar[dict[str, str]] = {}  # by `register`

    def to_dict(self) -> dict[str, Any]:
        """As Hugging Face's, with the `auto_map`."""
        found = super().to_dict()
        return found | {"auto_map": {auto: f"{CODE}.{kind}" for auto, kind in self.auto_classes.items()}}

    def save_pretrained(self, save_directory: str | os.PathLike, **options: Any) -> None:
        """Write the file beside the configuration."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_text(Path(save_directory) / f"{CODE}.py", TEXT)
        super().save_pretrained(save_directory, **options)


class NeverCopied:
    """A class whose source transformers must not copy into a saved folder: that imports the installed one."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """What transformers does to a class that it loaded through `auto_map`: nothing here."""
