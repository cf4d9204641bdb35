"""Experiments, one file each: grids of small trainings that end in a table, a figure and a summary."""

from experiments.shared.config import Contender, Experiment

__all__ = ["CONTINUAL", "EXPERIMENTS", "MODELS", "OPTIMIZERS", "Contender", "Experiment", "run_experiment"]

MODELS = ("quality", "cost", "stability")
OPTIMIZERS = ("surface", "orthogonal", "span", "vision", "language", "m3")  # in experiments.shared.optimizers
CONTINUAL = ("classes", "translation", "frequencies", "knowledge", "domains")  # in experiments.shared.continual
EXPERIMENTS = MODELS + OPTIMIZERS + CONTINUAL


def __getattr__(name: str):
    """Bring in what needs torch only when it is asked for."""
    if name == "run_experiment":
        from experiments.shared.run import run_experiment

        return run_experiment
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
