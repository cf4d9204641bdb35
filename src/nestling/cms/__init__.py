"""The continuum memory: levels of weights, each with a clock of its own, that learn while a model reads (NL Sec. 7).

The forward is `blocks.py` (Eqs. 70-74), the learning `learner.py` (Eq. 71 on the next-token loss). Read on with
`fast_linear.py` (W + D of every stream), `state.py` (what a stream learned), `inner_optimizers.py` (the rules of a
step), `surprise.py` (adaptive levels), `cache.py`, and `stack.py`, which gives levels to a pre-trained model.
"""

from nestling.cms.blocks import ContinuumMemory, LevelBlock
from nestling.cms.cache import LevelsCache
from nestling.cms.files import load_stacked, save_stacked
from nestling.cms.learner import Learner
from nestling.cms.learning_model import LearningMixin, merge
from nestling.cms.stack import stack_levels
from nestling.cms.stacked_model import StackedConfig, StackedForCausalLM
from nestling.cms.state import LevelState, StreamState

__all__ = [
    "ContinuumMemory", "Learner", "LearningMixin", "LevelBlock", "LevelState", "LevelsCache", "StackedConfig",
    "StackedForCausalLM", "StreamState", "load_stacked", "merge", "save_stacked", "stack_levels",
]  # fmt: skip
