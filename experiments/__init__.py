"""The laboratory: one folder per experiment, its code beside its results; `experiments.shared` is what several use."""

LABORATORY = "nestling"  # by this line `nestling eval` knows the folder from another project's `experiments`
