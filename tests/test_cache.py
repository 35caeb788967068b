"""What is kept is found again, whole or not at all, and never by mistake."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from awkward import conv_bn_relu6, if_body, matmul
from graphs import MODELS, feeds_of, model, normal, samples_of
from PIL import Image

import onnxq
from onnxq import cache
from onnxq import graph as g
from onnxq.calibrate import observe
from onnxq.errors import OnnxqError
from onnxq.observe import Extremes, Histogram, Loudness, MinMax, Moments
from onnxq.samples import input_specs, open_samples


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ONNXQ_CACHE", str(folder))
    return folder


@pytest.fixture
def inferences(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at each run of a session."""
    from onnxq.runtime import Session

    runs: list[int] = []
    original = Session.run

    def counted(self: Session, *args: Any) -> Any:
        runs.append(1)
        return original(self, *args)

    monkeypatch.setattr(Session, "run", counted)
    return runs


@dataclass
class Unknown:
    values: set[int]


def result_of(observer: Any) -> Any:
    for k in range(5):
        observer.update(normal(4, 6, seed=k))
    return observer.result()


# ── entries ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("observer", [MinMax(), Histogram(), Moments(1), Loudness()], ids=str)
def test_results_of_observers_come_back_as_they_were(observer: Any, place: Path) -> None:
    made = result_of(observer)
    cache.put("k", made)
    back = cache.get("k")
    assert type(back) is type(made)
    assert repr(back) == repr(made)
    if isinstance(made, Extremes):
        assert (back.loudest, back.others) == (made.loudest, made.others)
        assert made.others is not None


def test_numbers_keep_their_bits(place: Path) -> None:
    value = {"a": [0.1 + 0.2, float("inf"), -0.0], 3: (None, True, "x"), "b": np.float32(1) / 3}
    cache.put("k", value)
    assert repr(cache.get("k")) == repr(value)


def test_what_could_not_come_back_is_refused(place: Path) -> None:
    for wrong in (Unknown({1}), np.array([object()]), lambda: 0):
        with pytest.raises(TypeError, match="can be kept"):
            cache.put("k", wrong)
    assert cache.get("k") is None


@pytest.mark.parametrize(
    "tree",
    [
        {"class": "subprocess:Popen", "more": {}, "items": ["true"]},
        {"class": "onnxq.cache:put", "more": {}},
        {"class": "nowhere:Thing", "more": {}},
        {"class": "onnxq.observe:MinMax", "more": {"nonsense": 1}},
        {"array": "missing", "scalar": False},
        {},
    ],
)
def test_foreign_files_are_as_good_as_none(tree: Any, place: Path) -> None:
    place.mkdir()
    np.savez(place / "k.npz", tree=json.dumps(tree))
    assert cache.get("k") is None


def test_a_broken_file_is_as_good_as_none_and_is_replaced(place: Path) -> None:
    cache.put("k", normal(100))
    path = place / "k.npz"
    for broken in (path.read_bytes()[:200], b"", b"PK\x03\x04" + bytes(50)):
        path.write_bytes(broken)
        assert cache.get("k") is None
    cache.put("k", 7)
    assert cache.get("k") == 7


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ONNXQ_CACHE", str(tmp_path / "file" / "cache"))
    cache.put("k", 1)
    cache.prune()
    assert cache.get("k") is None


def test_the_oldest_go_when_there_are_too_many(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        cache.put(f"k{number}", np.zeros(1000))
        os.utime(place / f"k{number}.npz", (number, number))
    assert cache.get("k0") is not None  # and has been used just now
    monkeypatch.setattr(cache, "LIMIT", 20_000)
    cache.prune()
    assert sorted(path.stem for path in place.iterdir()) == ["k0", "k3"]


def test_what_is_too_large_is_not_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LARGEST", 100)
    cache.put("k", np.zeros(1000))
    assert cache.get("k") is None


def test_nothing_is_kept_where_it_is_off(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cache.disabled():
        cache.put("k", 1)
        assert cache.get("k") is None
    assert not place.exists()
    monkeypatch.setenv("ONNXQ_CACHE", "off")
    assert cache.folder() is None


def test_the_folder_is_where_the_system_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONNXQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.folder() == Path("/x/onnxq")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache" / "onnxq"


# ── calibration ──────────────────────────────────────────────────────────────────────────────────


def test_a_second_calibration_makes_no_inference(place: Path, inferences: list[int]) -> None:
    for case in (conv_bn_relu6(), if_body()):
        found = []
        for _ in range(2):
            inferences.clear()
            graph = g.load(case.model)
            tensors = [t for t in g.tensors(graph).values() if not g.is_constant(t)]
            observers = {t.name: MinMax() for t in tensors if g.is_float(t)}
            samples = samples_of(case.model, case.feeds)
            found.append((observe(graph, observers, samples, threads=1), len(inferences)))
        assert repr(found[0][0]) == repr(found[1][0])
        assert list(found[0][0]) == list(found[1][0])
        assert (found[0][1], found[1][1]) == (len(case.feeds), 0)


def test_quantizing_twice_calibrates_once_and_gives_the_same_bytes(
    place: Path, tmp_path: Path, inferences: list[int]
) -> None:
    data = str(MODELS / "digits_cnn.calib.npz")
    made = []
    for name in "ab":
        inferences.clear()
        onnxq.quantize(
            MODELS / "digits_cnn.onnx", samples=data, output=tmp_path / name, check=False
        )
        made.append(((tmp_path / name).read_bytes(), len(inferences)))
    assert made[0][0] == made[1][0]
    assert made[0][1] > 0
    assert made[1][1] == 0


def test_only_what_is_new_is_measured(place: Path, inferences: list[int]) -> None:
    case = matmul()
    samples = samples_of(case.model, case.feeds)
    observe(g.load(case.model), {"a": MinMax()}, samples)
    inferences.clear()
    found = observe(g.load(case.model), {"y": Histogram(), "a": MinMax()}, samples)
    assert list(found) == ["y", "a"]
    assert len(inferences) == len(case.feeds)
    inferences.clear()
    observe(g.load(case.model), {"y": Histogram(), "a": MinMax()}, samples)
    assert not inferences


def chain(w: Any, u: Any, activation: str = "Relu") -> Any:
    return model(
        f"(float[n,4] x) => (float[n,4] y) {{ a = MatMul (x, w) r = {activation} (a) "
        "y = MatMul (r, u) }",
        w=w, u=u,
    )  # fmt: skip


def test_whatever_a_result_depends_on_is_in_its_key(place: Path, inferences: list[int]) -> None:
    w, u, feeds = normal(4, 4), normal(4, 4, seed=1), feeds_of(3, x=(2, 4))

    def runs(source: Any, key: str = "r", observer: Any = None, given: Any = feeds) -> int:
        inferences.clear()
        observe(g.load(source), {key: observer or MinMax()}, samples_of(source, given))
        return len(inferences)

    assert runs(chain(w, u)) == 3
    assert runs(chain(w, u + 1)) == 0  # r is the same
    assert runs(chain(w + 1, u)) == 3
    assert runs(chain(w, u, "Sigmoid")) == 3
    assert runs(chain(w, u), "y") == 3
    assert runs(chain(w, u), "r#moments", Moments(0)) == 3
    assert runs(chain(w, u), "r#moments", Moments(1)) == 3
    assert runs(chain(w, u), given=feeds[:2]) == 2
    assert runs(chain(w, u), given=[feeds[0], feeds[2], feeds[1]]) == 3
    assert runs(chain(w, u)) == 0


def test_an_observer_that_is_no_record_is_asked_again(place: Path, inferences: list[int]) -> None:
    class Largest:
        value = 0.0

        def update(self, x: Any) -> None:
            self.value = max(self.value, float(np.abs(x).max()))

        def merge(self, other: Any) -> None: ...

        def result(self) -> float:
            return self.value

    case = matmul()
    for _ in range(2):
        inferences.clear()
        observe(g.load(case.model), {"a": Largest()}, samples_of(case.model, case.feeds))
        assert inferences


def test_images_are_told_apart_without_decoding_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model("(float[n,3,4,4] x) => (float[n,3,4,4] y) { y = Relu (x) }")
    rng = np.random.default_rng(0)
    for k in range(3):
        Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8)).save(tmp_path / f"{k}.png")
    (tmp_path / "preprocess.toml").write_text("scale = 1.0\n")

    def identity(**options: Any) -> str:
        return open_samples(tmp_path, input_specs(made), **options).identity()

    first = identity()
    assert identity() == first
    assert identity(limit=2) != first
    assert identity(batch_size=2) != first
    assert identity(preprocess={"scale": 2.0}) != first
    Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8)).save(tmp_path / "1.png")
    assert identity() != first


def test_the_same_node_in_two_branches_is_not_the_same(place: Path, inferences: list[int]) -> None:
    text = """(float[n,4] x, bool choice) => (float[n,4] y) {
        y = If (choice) <
            then_branch = t () => (float[n,4] a) { p = Relu (x) a = MatMul (p, w) },
            else_branch = e () => (float[n,4] b) { q = Relu (x) b = MatMul (q, w) }
        >
    }"""
    made = model(text, w=normal(4, 4))
    feeds = [{**feed, "choice": np.array(k < 2)} for k, feed in enumerate(feeds_of(6, x=(2, 4)))]
    both = [
        observe(g.load(made), dict.fromkeys(["p"], MinMax()), samples_of(made, feeds))["p"],
        observe(g.load(made), dict.fromkeys(["q"], MinMax()), samples_of(made, feeds))["q"],
    ]
    seen = [max(float(f["x"].max()) for f in part) for part in (feeds[:2], feeds[2:])]
    assert [found.high for found in both] == pytest.approx(seen)


def test_errors_are_not_kept(place: Path) -> None:
    made = model(
        "(float[n,4] x) => (float[n,4] y) { l = Log (x) y = MatMul (l, w) }", w=normal(4, 4)
    )
    for _ in range(2):
        with pytest.raises(OnnxqError, match="makes 'l' NaN"):
            observe(
                g.load(made),
                {"l": MinMax()},
                samples_of(made, [{"x": -np.ones((2, 4), np.float32)}]),
            )
