import pytest

from nestling.ops import compiled


@pytest.fixture(params=["compiled", "torch"], scope="module")
def form(request):
    """Both ways the chunk forms can run: the C++ library, and PyTorch where there is none."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(compiled, "library", lambda: None)
        elif compiled.library() is None:
            pytest.skip("no C++ compiler here: the compiled forms are not tested")
        yield request.param
