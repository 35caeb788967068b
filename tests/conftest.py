"""Options and settings of the whole suite."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("onnxq", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("onnxq")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shared",
        type=Path,
        metavar="PATH",
        help="folder with models/, data/ and score/score.py: run the tests on full-size models too",
    )


@pytest.fixture
def shared(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--shared")
    if folder is None:
        pytest.skip("needs --shared PATH: full-size models and their data")
    return Path(folder)
