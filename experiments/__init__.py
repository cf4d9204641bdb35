"""The laboratory: one folder per experiment, its code beside its results; `experiments.shared` is what several use."""
