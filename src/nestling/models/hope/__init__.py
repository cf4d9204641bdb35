"""Hope and its relatives as Hugging Face models."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from nestling.models.hope.cache import HopeCacheLayer
from nestling.models.hope.configuration import HopeConfig
from nestling.models.hope.modeling import HopeForCausalLM, HopeModel, HopePreTrainedModel

AutoConfig.register(HopeConfig.model_type, HopeConfig, exist_ok=True)
AutoModel.register(HopeConfig, HopeModel, exist_ok=True)
AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM, exist_ok=True)

__all__ = ["HopeCacheLayer", "HopeConfig", "HopeForCausalLM", "HopeModel", "HopePreTrainedModel"]
