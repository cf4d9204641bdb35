"""What every commit is checked with, and what only who sets NESTLING_SLOW_TESTS=1 asks for."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest

ASKED = "NESTLING_SLOW_TESTS" in os.environ

# tests, or their cases, that wait for it too: others of the same kind, or of the same path through the code, stay
LONG = (
    "bench/test_bench.py::test_a_wrong_fast_form_is_caught[nan]",
    "bench/test_bench.py::test_a_wrong_fast_form_is_caught[crash]",
    "cli/test_main.py::test_elsewhere_importing_the_package_registers_its_models",
    "cms/test_arguments.py::test_threads_read_as_if_one_after_the_other[width",
    "cms/test_arguments.py::test_threads_read_as_if_one_after_the_other[depth",
    "cms/test_rows.py::test_a_cache_of_rows_at_different_places[nested hybrid]",
    "cms/test_trainer.py::test_two_by_four_accumulated_is_a_batch_of_eight[hope",
    "experiments/demo/test_report.py::test_figures_have_room_wherever_the_losses_end[1.0]",
    "experiments/demo/test_report.py::test_figures_have_room_wherever_the_losses_end[7.9]",
    "experiments/demo/test_run.py::test_interrupt_reports_what_there_is_and_a_second_run_starts_afresh",
    "experiments/test_experiment.py::test_worker_processes_give_what_this_process_gives",
    "experiments/test_plans.py::test_every_contender_has_the_parameters_of_the_others[cost]",
    "models/test_compile.py::test_a_training_step_is_one_graph[hybrid]",
    "models/test_compile.py::test_inductor[hybrid",
    "optim/test_memory_optimizers.py::test_a_compiled_step_is_the_step[deep]",
    "sessions/test_session.py::test_a_hope_model_that_was_killed_goes_on_bit_for_bit[selfmod]",
    "sessions/test_session.py::test_a_hope_model_that_was_killed_goes_on_bit_for_bit[attention]",
    "sessions/test_session.py::test_killed_anywhere_and_resumed_is_bit_for_bit_the_same[1]",
    "test_examples.py::test_the_reader_knows_what_it_read",
    "training/test_loop.py::test_a_resumed_run_ends_bit_for_bit_the_same[4]",
    "training/test_parallel.py::test_a_run_goes_on_at_another_number_of_processes[m3",
)


def examples(count: int) -> int:
    """How many examples hypothesis draws: so many, or half of them."""
    return count if ASKED else -(-count // 2)


def some(names: str, chosen: list, *others: Any) -> pytest.MarkDecorator:
    """Parametrizes with these cases; with all of `others`, or their product, where slow tests are asked for."""
    every = list(itertools.product(*others)) if len(others) > 1 else list(*others)
    return pytest.mark.parametrize(names, every if ASKED else chosen)
