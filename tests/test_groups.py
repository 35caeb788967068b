"""What each group of samples loses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import MODELS, Array, model, normal
from PIL import Image
from typer.testing import CliRunner

import onnxq
from onnxq.cli import app
from onnxq.errors import OnnxqError
from onnxq.report import Report
from onnxq.runtime import Session
from onnxq.verify import Comparison

N, QUIET = 200, 0.3  # samples, the share of quiet ones
DIGITS, DIGITS_TEST = MODELS / "digits_cnn.onnx", MODELS / "digits_cnn.test.npz"


def classifier() -> onnx.ModelProto:
    text = "(float[n,16] x) => (float[n,6] y) { h = MatMul (x, w) r = Relu (h) y = MatMul (r, v) }"
    return model(text, w=normal(16, 32), v=normal(32, 6, seed=1))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "m.onnx"
    onnx.save(classifier(), file)
    return file


def planted(seed: int = 0) -> tuple[Array, Array]:
    """Samples, of which a few are so quiet that the scale of the loud ones swallows them."""
    rng = np.random.default_rng(seed)
    group = np.where(rng.uniform(size=N) < QUIET, "quiet", "loud")
    loudness = np.where(group == "quiet", 0.01, 1)[:, None]
    return (rng.standard_normal((N, 16)) * loudness).astype(np.float32), group


def quantized(path: Path, samples: Any, **options: Any) -> Report:
    options = {"limit": 64, "latency_check": False, "write": False, "threads": 1} | options
    return onnxq.quantize(path, samples=samples, **options).report


def warnings(report: Report) -> list[str]:
    return [w for w in report.warnings if "loses much more" in w]


# ── what is measured ─────────────────────────────────────────────────────────────────────────────


def test_the_group_that_quantization_hurts_is_named(path: Path) -> None:
    x, group = planted()
    report = quantized(path, {"x": x, "group": group}, group_by="group")
    found = {r.group: r for r in report.groups}
    assert found["quiet"].drop > 0.2 > 10 * found["loud"].drop
    assert [r.group for r in report.groups if r.stands_out] == ["quiet"]
    (warning,) = warnings(report)
    assert warning.startswith("group 'quiet' loses much more than the rest: 1 − top-1 agreement")
    assert f"on its {found['quiet'].samples} samples" in warning
    assert found["quiet"].samples + found["loud"].samples == N - 64  # all that calibration left
    assert report.verification_samples == 16
    assert Report.from_json(report.to_json()) == report


def test_random_groups_raise_no_warning(path: Path) -> None:
    x, _ = planted()
    for seed in range(5):
        labels = np.random.default_rng(seed).integers(0, 6, N)
        assert not warnings(quantized(path, {"x": x, "who": labels}, group_by="who"))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_figures_are_those_of_the_group_by_itself(
    path: Path, tmp_path: Path, batch_size: int
) -> None:
    x, group = planted()
    out = tmp_path / "q.onnx"
    quantized(path, {"x": x}, write=True, output=out)
    report = onnxq.validate(
        path, out, samples={"x": x, "group": group}, limit=150, group_by="group",
        batch_size=batch_size,
    )  # fmt: skip
    a, b = (Session(model).run({"x": x[:150]})["y"] for model in (path, out))
    assert len(report.groups) == 2
    for record in report.groups:
        mine = group[:150] == record.group
        whole = Comparison()
        whole.update(a[mine], b[mine])
        differ = a[mine].argmax(1) != b[mine].argmax(1)
        assert record.samples == mine.sum()
        assert record.drop == pytest.approx(differ.mean())
        assert record.error == pytest.approx(differ.std(ddof=1) / np.sqrt(mine.sum()))
        assert record.agreement == whole.agreement
        assert record.cosine == pytest.approx(whole.cosine)
        assert record.sqnr_db == pytest.approx(whole.sqnr_db)


def test_outputs_that_are_no_scores_lose_cosine(tmp_path: Path) -> None:
    made = classifier()
    made.graph.output[0].name = made.graph.node[-1].output[0] = "embedding"
    onnx.save(made, tmp_path / "m.onnx")
    x, group = planted()
    report = quantized(tmp_path / "m.onnx", {"x": x, "g": group}, group_by="g")
    found = {r.group: r for r in report.groups}
    assert found["quiet"].agreement is None
    assert found["quiet"].drop > 0.01
    assert found["quiet"].stands_out
    assert "1 − cosine of 'embedding'" in warnings(report)[0]


def test_grouping_changes_no_byte_of_the_model(path: Path, tmp_path: Path) -> None:
    x, group = planted()
    files = [tmp_path / name for name in ("a.onnx", "b.onnx")]
    for file, by in zip(files, (None, "g"), strict=True):
        quantized(path, {"x": x, "g": group}, group_by=by, write=True, output=file)
    assert files[0].read_bytes() == files[1].read_bytes()


# ── where the groups come from ───────────────────────────────────────────────────────────────────

ALL = {"loud", "quiet"}


def loud_or_quiet(feed: dict[str, Array]) -> str:
    assert feed["x"].shape == (1, 16)
    return "quiet" if np.abs(feed["x"]).max() < 0.1 else "loud"


def counts(report: Report) -> dict[str, int]:
    return {r.group: r.samples for r in report.groups}


def unseen(group: Array, calibrated: int = 64) -> dict[str, int]:
    return {label: int((group[calibrated:] == label).sum()) for label in sorted(ALL)}


@pytest.mark.parametrize(("batch_size", "calibrated"), [(1, 64), (7, 56)])
def test_a_function_or_a_list_groups_as_the_array_does(
    path: Path, batch_size: int, calibrated: int
) -> None:
    x, group = planted()
    for by in (loud_or_quiet, list(group), group, "test_groups:loud_or_quiet"):
        report = quantized(path, {"x": x}, group_by=by, batch_size=batch_size)
        assert report.samples == f"arrays, {calibrated} samples"
        assert counts(report) == unseen(group, calibrated)


def test_one_shot_iterators_and_lists_of_feeds(path: Path) -> None:
    x, group = planted()
    feeds = [{"x": row[None]} for row in x]
    for source in (feeds, iter(feeds)):
        assert counts(quantized(path, source, group_by=list(group))) == unseen(group)


def test_labels_are_told_in_a_file_or_in_each_of_a_folder(path: Path, tmp_path: Path) -> None:
    x, group = planted()
    np.savez(tmp_path / "s.npz", x=x, who=group.astype("S5")[:, None])
    assert counts(quantized(path, tmp_path / "s.npz", group_by="who")) == unseen(group)
    folder = tmp_path / "folder"
    folder.mkdir()
    for k in range(80):
        np.savez(folder / f"{k:03}.npz", x=x[k : k + 1], who=group[k])
    assert counts(quantized(path, folder, group_by="who")) == {
        label: int((group[64:80] == label).sum()) for label in sorted(ALL)
    }


def test_few_samples_are_all_compared(path: Path) -> None:
    x, group = planted()
    report = quantized(path, {"x": x[:3], "g": group[:3]}, group_by="g")
    assert sum(counts(report).values()) == 3


def images(folder: Path) -> Path:
    """Thirty greyscale images in three sub-folders, one of them deeper."""
    for name, count in (("a", 15), ("b", 10), ("c/d", 5)):
        (folder / name).mkdir(parents=True)
        for k in range(count):
            pixels = np.random.default_rng([len(name), k]).integers(0, 255, (8, 8), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k:02}.png")
    (folder / "preprocess.toml").write_text('color = "L"\n', "utf-8")
    return folder


def test_images_are_grouped_by_their_folder(tmp_path: Path) -> None:
    """Those that calibration saw, at even distances among all, are left out."""
    folder = images(tmp_path / "images")
    report = quantized(DIGITS, folder, group_by="folder", limit=4)
    total = counts(report)
    assert set(total) == {"a", "b", "c/d"}
    assert sum(total.values()) == 30 - 4
    order = sorted([*(["a"] * 15), *(["b"] * 10), *(["c/d"] * 5)])
    seen = [order[k * 30 // 20] for k in range(4)]  # 4 and 16 to verify on are drawn of 30
    assert total == {label: order.count(label) - seen.count(label) for label in set(order)}
    listed = quantized(DIGITS, folder, group_by=order, limit=4)
    assert counts(listed) == total


def test_validate_groups_the_images_it_draws(tmp_path: Path) -> None:
    folder = images(tmp_path / "images")
    report = onnxq.validate(DIGITS, DIGITS, samples=folder, group_by="folder", limit=6)
    assert counts(report) == {"a": 3, "b": 2, "c/d": 1}
    assert all(r.drop == 0 for r in report.groups)


def test_a_state_is_carried_through_all_groups(tmp_path: Path) -> None:
    """Of a fixed shape, through samples that are left out too; and the past of each sample."""
    text = "(float[1,4] x, float[1,4] a) => (float[1,4] b) { s = Add (x, a) b = MatMul (s, w) }"
    onnx.save(model(text, w=normal(4, 4, scale=0.2)), tmp_path / "m.onnx")
    who = ["me", "you"] * 20
    report = quantized(
        tmp_path / "m.onnx", {"x": normal(40, 4)}, states={"b": "a"}, group_by=who, limit=30
    )
    assert counts(report) == {"me": 5, "you": 5}
    tokens = dict(np.load(MODELS / "decoder_lm.calib.npz"))
    tokens = {name: array[:30] for name, array in tokens.items()}
    report = quantized(MODELS / "decoder_lm_kv.onnx", tokens, group_by=who[:30], limit=20)
    first = {r.group: r.samples for r in report.groups if r.output == report.outputs[0].name}
    assert first == {"me": 10, "you": 10}  # each sample is fed in two steps


# ── on the command line ──────────────────────────────────────────────────────────────────────────


def test_the_table_has_the_worst_groups_and_says_how_many_more(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "s.npz", **np.load(DIGITS_TEST), who=rng.integers(0, 14, 400))
    data = ["--data", str(tmp_path / "s.npz"), "--samples", "400"]
    command = ["validate", str(DIGITS), str(DIGITS), *data]
    done = CliRunner().invoke(app, [*command, "--group-by", "who"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("Groups of samples"))
    assert lines[start].endswith("14 groups")
    assert lines[start + 1].split() == ["group", "samples", "loses", "±", "SQNR"]
    assert lines[start + 12].strip().startswith("and 4 more rows")
    assert "Groups" not in CliRunner().invoke(app, command).stdout


def test_one_line_says_what_is_wrong(tmp_path: Path) -> None:
    for arguments, said in (
        (["quantize", DIGITS, "--group-by", "label"], "give them with --data"),
        (["quantize", DIGITS, "--data", DIGITS_TEST, "--group-by", "lable"], "nearest: label"),
        (["validate", DIGITS, DIGITS, "--group-by", "label"], "give them with --data"),
    ):
        done = CliRunner().invoke(app, [*map(str, arguments)])
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert said in done.stderr


def complaint(by: Any, path: Path, samples: Any, **options: Any) -> str:
    with pytest.raises(OnnxqError) as error:
        quantized(path, samples, group_by=by, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def failing(feed: dict[str, Array]) -> str:
    raise KeyError("speaker")


def late(feed: dict[str, Array]) -> str:
    return "a" if feed["x"][0, 0] > -1 else failing(feed)


X, GROUP = planted()
BAD: list[tuple[Any, Callable[[Path], Any], dict[str, Any], str]] = [
    ("lable", lambda p: {"x": X, "label": GROUP}, {}, "by; nearest: label"),
    ("speaker", lambda p: p / "s.npz", {}, "names nothing to group s.npz by; known: x"),
    ("speaker", lambda p: [{"x": X[:1]}] * 9, {}, "give the name of an array with an entry per"),
    ("folder", lambda p: p / "npz", {}, "names nothing to group npz by; known: x"),
    ("label", lambda p: p / "images", {}, "known: folder"),
    ("label", lambda p: {"x": X, "label": GROUP[:-1]}, {}, "has 199 entries, and arrays 200"),
    ("label", lambda p: {"x": X, "label": X}, {}, "has the shape [200, 16]; give one entry per"),
    (GROUP[:5], lambda p: {"x": X}, {}, "the list of groups to group by has 5 entries"),
    (failing, lambda p: {"x": X}, {}, "failing failed on sample 0 of arrays with KeyError"),
    (late, lambda p: {"x": X}, {}, "late failed on sample"),
    ("test_groups:nothing", lambda p: {"x": X}, {}, "has no 'nothing' to group samples"),
    ("no_such:f", lambda p: {"x": X}, {}, "importing 'no_such' to group samples failed"),
    ("test_groups:N", lambda p: {"x": X}, {}, "name one that takes a feed and returns a label"),
    ("label", lambda p: None, {}, "give them with --data"),
    ("label", lambda p: {"x": X, "label": GROUP}, {"check": False}, "--no-verify leaves out"),
    (list(range(2000)), lambda p: {"x": normal(2000, 16)}, {}, "more than 1000 groups"),
    (lambda feed: feed["x"][0, 0], lambda p: {"x": normal(2000, 16)}, {}, "more than 1000 groups"),
]


@pytest.mark.parametrize(("by", "source", "options", "said"), BAD)
def test_what_names_no_groups(
    by: Any, source: Callable[[Path], Any], options: dict[str, Any], said: str,
    path: Path, tmp_path: Path,
) -> None:  # fmt: skip
    np.savez(tmp_path / "s.npz", x=X)
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "0.npz", x=X[:1])
    images(tmp_path / "images")
    given = source(tmp_path)
    chosen = DIGITS if given == tmp_path / "images" else path
    assert said in complaint(by, chosen, given, **options)


def test_a_file_without_its_label_is_named(path: Path, tmp_path: Path) -> None:
    for k in range(20):
        np.savez(tmp_path / f"{k:02}.npz", x=X[k : k + 1], **({"who": "me"} if k < 19 else {}))
    assert "19.npz' has no array 'who' of one entry" in complaint("who", path, tmp_path, limit=9)


def test_outputs_that_cannot_be_told_apart_by_sample(tmp_path: Path) -> None:
    text = "(float[n,16] x) => (float[1,6] y) { h = MatMul (x, w) y = ReduceMean <axes = [0]> (h) }"
    onnx.save(model(text, w=normal(16, 6)), tmp_path / "m.onnx")
    said = complaint(list(GROUP), tmp_path / "m.onnx", {"x": X}, batch_size=4)
    assert "output 'y' is [1, 6] for 4 samples fed at once" in said
    assert "--batch-size 1" in said
