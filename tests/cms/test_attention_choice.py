"""Which attention kernel runs while levels learn is torch's setting of the whole process: threads must not lose it."""

import torch

from nestling.cms.learner import _attention


def kernels():
    return torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()


def test_overlapping_calls_leave_the_choice_as_it_was():
    before, first, second = kernels(), _attention(True), _attention(True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert kernels() == (False, False)  # the second still differentiates twice
    second.__exit__(None, None, None)
    assert kernels() == before
