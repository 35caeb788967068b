"""Options and settings of the whole suite."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from chrome import Page, chrome
from hypothesis import settings
from onnxq.passes.solve import spare_slow

from onnxq.report import Latency

settings.register_profile("onnxq", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("onnxq")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shared",
        type=Path,
        metavar="PATH",
        help="folder with models/, data/ and score/score.py: run the tests on full-size models too",
    )


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests neither read nor fill the user's cache."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNXQ_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def empty_cache(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test measured is not there in the next."""
    monkeypatch.setenv("ONNXQ_CACHE", str(own_cache / uuid4().hex))


@pytest.fixture
def shared(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--shared")
    if folder is None:
        pytest.skip("needs --shared PATH: full-size models and their data")
    return Path(folder)


@pytest.fixture(autouse=True, scope="session")
def stopped_clock() -> Iterator[None]:
    """No outcome hangs on what is faster at the moment: all forms of a model take as long."""

    def latency(sessions: list[Any], *arguments: Any, **options: Any) -> list[Latency]:
        return [Latency(1.0, 1.0, 1.0) for _ in sessions]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spare_slow, "latency", latency)
        yield


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chrome(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(browser: Page) -> Iterator[Page]:
    """A tab that must neither complain nor ask for anything but the page itself."""
    browser.problems.clear()
    browser.requests.clear()
    browser.media()
    browser.size(1200)
    yield browser
    assert browser.problems == []
    assert all(re.match(r"(file|data|blob):", url) for url in browser.requests), browser.requests
