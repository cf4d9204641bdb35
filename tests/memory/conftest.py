from contextlib import nullcontext

import pytest

from nestling.ops import compiled


@pytest.fixture(params=["compiled", "torch"], scope="module")
def form(request):
    """Both ways the chunk forms can run: the C++ library, and PyTorch where there is none."""
    if request.param == "compiled" and compiled.library() is None:
        pytest.skip("no C++ compiler here: the compiled forms are not tested")
    with compiled.disabled() if request.param == "torch" else nullcontext():
        yield request.param
