"""Experiments with optimisers, one file each (`nestling eval surface|orthogonal|span|vision|language|m3`)."""
