"""From a model with its optimiser to a nested system.

inventory: the tensors and modules by name.  modules: what each module is as memories.  trainers: who trains what.
optimizer_memories: what the optimisers keep.  order: levels by Def. 2.  assemble: all of these as one system.
"""
