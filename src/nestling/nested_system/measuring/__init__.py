"""Measuring what really moves in a few steps, and comparing it with what was declared.

copying: copies, so that the originals stay as they are.  watch: tensors compared after each step.  probes: layers that
learn inside a context, run token by token.  measure: the steps, and the findings.
"""
