"""Hope and its relatives as Hugging Face models."""

from nestling.models.hope.cache import HopeCacheLayer
from nestling.models.hope.configuration import HopeConfig
from nestling.models.hope.modeling import HopeForCausalLM, HopeModel, HopePreTrainedModel
from nestling.utils.auto_classes import register

register(HopeConfig, HopeForCausalLM, HopeModel)

__all__ = ["HopeCacheLayer", "HopeConfig", "HopeForCausalLM", "HopeModel", "HopePreTrainedModel"]
