"""Hugging Face models; importing this package registers them with the Auto classes."""

from nestling.models.hope import HopeConfig, HopeForCausalLM, HopeModel, HopePreTrainedModel

__all__ = ["HopeConfig", "HopeForCausalLM", "HopeModel", "HopePreTrainedModel"]
