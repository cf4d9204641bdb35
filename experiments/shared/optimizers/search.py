"""The search for a learning rate: a few trials, the same number and procedure for every contender."""

from __future__ import annotations

import functools
import warnings

STARTS = (1 / 6, 1 / 2, 5 / 6)  # places of the first trials in the logarithmic range


@functools.lru_cache(maxsize=512)
def propose(tried: tuple[tuple[float, float], ...], low: float, high: float) -> float:
    """The next learning rate to try, given (rate, loss) of the trials so far: three fixed places, then optuna's
    Gaussian process on log lr. A function of its arguments alone.

    Raises:
        ValueError: optuna or scipy is not installed.
    """
    if len(tried) < len(STARTS):
        return _rounded(low * (high / low) ** STARTS[len(tried)])
    try:
        import optuna
        import scipy  # noqa: F401 - the Gaussian process wants it
    except ImportError:
        raise ValueError("the search for a learning rate needs optuna and scipy: pip install optuna scipy") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the sampler is marked experimental
        sampler = optuna.samplers.GPSampler(seed=0, n_startup_trials=len(STARTS), deterministic_objective=False)
        study = optuna.create_study(sampler=sampler)
        space = {"lr": optuna.distributions.FloatDistribution(low, high, log=True)}
        for lr, loss in tried:
            params = {"lr": min(max(lr, low), high)}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=loss))
        return _rounded(study.ask(space).params["lr"])


def _rounded(lr: float) -> float:
    return float(f"{lr:.3g}")
