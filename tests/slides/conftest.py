import pytest
from synthetic import make_slide, tissue

from stainnorm_transform import NormalizeStain


@pytest.fixture(scope="module")
def normalize():
    return NormalizeStain.pretrained()


@pytest.fixture(scope="module")
def pixels():
    return tissue(1100, 1500)


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory, pixels):
    return make_slide(tmp_path_factory.mktemp("slides") / "a.svs", pixels)
