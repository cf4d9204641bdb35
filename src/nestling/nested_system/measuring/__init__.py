"""Measuring what really moves in a few steps, and comparing it with what was declared."""
