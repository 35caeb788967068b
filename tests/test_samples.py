import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from onnxq.errors import OnnxqError
from onnxq.samples import Feed, InputSpec, Samples, input_specs, open_samples

F32, I64 = np.dtype("float32"), np.dtype("int64")
IMAGE = InputSpec("image", F32, ("batch", 2, 3))
FEEDS: list[Feed] = [{"image": np.full((1, 2, 3), k, np.float32)} for k in range(5)]


def rows(n: int, first: int = 0) -> np.ndarray:
    """(n, 2, 3), where row k holds k."""
    return np.broadcast_to(np.arange(first, first + n)[:, None, None], (n, 2, 3)).astype("f4")


def seen(samples: Samples) -> list[list[float]]:
    """What stands in the rows of each feed."""
    return [feed["image"][:, 0, 0].tolist() for feed in samples]


def refused(source: object, specs: list[InputSpec] | None = None, **options: Any) -> str:
    with pytest.raises(OnnxqError) as error:
        list(open_samples(source, specs or [IMAGE], **options))
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    path = tmp_path / "calib.npz"
    np.savez(path, image=rows(5), label=np.arange(5))
    return path


# What the model expects


def test_specs_leave_out_initializers_and_keep_symbols() -> None:
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", None, 3]),
        helper.make_tensor_value_info("w", TensorProto.FLOAT, [3]),
        helper.make_tensor_value_info("sr", TensorProto.INT64, []),
        helper.make_tensor_value_info("any", TensorProto.FLOAT16, None),
    ]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3], [1, 2, 3])
    model = helper.make_model(helper.make_graph([], "g", inputs, [], [weight]))
    assert [str(spec) for spec in input_specs(model)] == [
        "'x' float32 [batch,?,3]",
        "'sr' int64 []",
        "'any' float16 of any shape",
    ]


def test_specs_refuse_what_is_no_tensor() -> None:
    inputs = [helper.make_tensor_sequence_value_info("boxes", TensorProto.FLOAT, None)]
    model = helper.make_model(helper.make_graph([], "g", inputs, []))
    with pytest.raises(OnnxqError, match="'boxes' is a sequence; only tensors can be fed"):
        input_specs(model)


# Sources


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_cut_into_batches_and_other_arrays_are_ignored(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "calib.npz", image=rows(5), label=np.arange(5))
    samples = open_samples(tmp_path / "calib.npz", [IMAGE], batch_size=2)
    assert seen(samples) == [[0, 1], [2, 3], [4]]
    assert seen(samples) == [[0, 1], [2, 3], [4]]
    assert len(samples) == 3
    assert samples.description == "calib.npz, 5 samples"
    assert not samples.synthesised


def test_fixed_first_dimension_is_the_batch_and_the_rest_is_left_out(npz: Path) -> None:
    samples = open_samples(npz, [InputSpec("image", F32, (2, 2, 3))])
    assert seen(samples) == [[0, 1], [2, 3]]
    assert samples.description == "calib.npz, 4 samples"
    assert "fewer samples than the 8" in refused(npz, [InputSpec("image", F32, (8, 2, 3))])


def test_array_with_one_more_dimension_holds_a_feed_per_row() -> None:
    specs = [
        InputSpec("image", F32, (1, 2, 3)),
        InputSpec("state", F32, (2, "batch", 4)),
        InputSpec("sr", I64, ()),
    ]
    state = np.arange(5 * 8, dtype=np.float32).reshape(5, 2, 1, 4)
    arrays = {"image": rows(5), "state": state, "sr": np.array(16000)}
    samples = open_samples(arrays, specs, batch_size=4)
    assert len(samples) == 5
    for k, feed in enumerate(samples):
        np.testing.assert_array_equal(feed["state"], state[k])
        np.testing.assert_array_equal(feed["image"], rows(1, k))
        assert feed["sr"].shape == ()
        assert feed["sr"] == 16000


def test_npz_in_column_order_reads_the_same(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(5, 2, 3)).astype("f4")
    np.savez(tmp_path / "a.npz", image=np.asfortranarray(array))
    feeds = list(open_samples(tmp_path / "a.npz", [IMAGE]).slice(2, 4))
    np.testing.assert_array_equal(np.concatenate([f["image"] for f in feeds]), array[2:4])


def test_npz_is_never_in_memory_whole(tmp_path: Path) -> None:
    import tracemalloc

    wide = InputSpec("image", F32, ("batch", 100_000))
    np.savez(tmp_path / "big.npz", image=np.zeros((60, 100_000), np.float32))
    tracemalloc.start()
    for _ in open_samples(tmp_path / "big.npz", [wide]):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 400_000  # bytes of ten samples; the file holds sixty


def test_folder_feeds_each_file_as_it_is_sorted_by_name(tmp_path: Path) -> None:
    spec = InputSpec("ids", I64, ("batch", "length"))
    for name, length in (("b", 5), ("a", 3), ("c", 7)):
        np.savez(tmp_path / f"{name}.npz", ids=np.ones((1, length), np.int64), label=1)
    (tmp_path / "readme.txt").write_text("not a sample")
    samples = open_samples(str(tmp_path), [spec], batch_size=4)
    assert [feed["ids"].shape[1] for feed in samples] == [3, 5, 7]
    assert len(samples) == 3


@pytest.mark.parametrize(
    "source",
    [FEEDS, tuple(FEEDS), lambda: iter(FEEDS), lambda: FEEDS, iter(FEEDS), (f for f in FEEDS)],
    ids=["list", "tuple", "generator function", "function", "iterator", "generator"],
)
def test_python_objects_give_the_same_feeds_each_time(source: object) -> None:
    samples = open_samples(source, [IMAGE])
    for _ in range(2):
        assert seen(samples) == [[0], [1], [2], [3], [4]]
    assert len(samples) == 5


def test_iterable_object_is_read_anew() -> None:
    class Loader:
        def __iter__(self) -> Iterator[Feed]:
            return iter(FEEDS)

    samples = open_samples(Loader(), [IMAGE])
    assert seen(samples) == seen(samples) == [[0], [1], [2], [3], [4]]
    assert samples.description == "Loader, 5 samples"


def test_function_from_a_module_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.chdir(tmp_path)
    Path("my_samples.py").write_text(
        textwrap.dedent("""
        import numpy as np
        def feeds():
            for k in range(3):
                yield {"image": np.full((1, 2, 3), k, np.float32)}
        value = 3
        """)
    )
    samples = open_samples("my_samples:feeds", [IMAGE])
    assert seen(samples) == seen(samples) == [[0], [1], [2]]
    assert samples.description == "my_samples:feeds, 3 samples"
    assert "has no 'feed' to give samples; nearest: feeds" in refused("my_samples:feed")
    assert "is no function" in refused("my_samples:value")
    assert "importing 'no_such_module'" in refused("no_such_module:feeds")


def test_limit_counts_samples(npz: Path) -> None:
    assert seen(open_samples(npz, [IMAGE], batch_size=2, limit=3)) == [[0, 1], [2]]
    assert seen(open_samples(FEEDS, [IMAGE], limit=2)) == [[0], [1]]
    assert seen(open_samples(iter(FEEDS), [IMAGE], limit=2)) == [[0], [1]]


def test_limit_ends_an_endless_function() -> None:
    def endless() -> Iterator[Feed]:
        while True:
            yield FEEDS[1]

    samples = open_samples(endless, [IMAGE], limit=3)
    assert len(samples) == 3
    assert seen(samples) == [[1], [1], [1]]


@pytest.mark.parametrize("kind", ["npz", "list", "function", "iterator", "folder"])
def test_slice_of_a_slice(kind: str, npz: Path, tmp_path: Path) -> None:
    for k in range(5):
        (tmp_path / "folder").mkdir(exist_ok=True)
        np.savez(tmp_path / "folder" / f"{k}.npz", image=rows(1, k))
    sources: dict[str, object] = {
        "npz": npz,
        "list": FEEDS,
        "function": lambda: iter(FEEDS),
        "iterator": iter(FEEDS),
        "folder": tmp_path / "folder",
    }
    part = open_samples(sources[kind], [IMAGE]).slice(1, None)
    assert seen(part) == [[1], [2], [3], [4]]
    assert seen(part.slice(1, 3)) == [[2], [3]]
    assert len(part.slice(1, 3)) == 2
    assert seen(part.slice(2, 9)) == [[3], [4]]
    assert seen(part.slice(7, 9)) == []
    assert len(part.slice(7, 9)) == 0
    assert part.slice(1, 3).description.endswith(", 2 samples")
    with pytest.raises(ValueError, match="from 0 up"):
        part.slice(-1, None)


def test_digest_is_of_the_data_not_of_where_they_are(npz: Path) -> None:
    digest = open_samples(npz, [IMAGE]).digest()
    assert digest == open_samples(FEEDS, [IMAGE]).digest()
    assert digest != open_samples(FEEDS[::-1], [IMAGE]).digest()
    assert digest != open_samples(FEEDS, [IMAGE]).slice(0, 4).digest()
    renamed = [{"other": feed["image"]} for feed in FEEDS]
    assert digest != open_samples(renamed, [InputSpec("other", F32, (1, 2, 3))]).digest()


def test_strings_go_through_every_source(tmp_path: Path) -> None:
    spec = InputSpec("text", np.dtype(object), ("n",))
    feeds = [{"text": np.array(["one", "two"])}, {"text": np.array(["three"], object)}]
    from_list, from_iterator = open_samples(feeds, [spec]), open_samples(iter(feeds), [spec])
    assert [feed["text"].tolist() for feed in from_iterator] == [["one", "two"], ["three"]]
    assert from_list.digest() == from_iterator.digest()


@pytest.mark.parametrize(
    ("came", "expected"),
    [("int32", "int64"), ("float64", "float32"), ("float16", "float32"), (">f4", "float32")],
)
def test_safe_casts_are_silent(came: str, expected: str) -> None:
    spec = InputSpec("x", np.dtype(expected), (None,))
    feed = next(iter(open_samples([{"x": np.arange(3).astype(came)}], [spec])))
    assert feed["x"].dtype == np.dtype(expected)
    assert feed["x"].tolist() == [0, 1, 2]


def test_feeds_run(npz: Path) -> None:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Neg", ["image"], ["y"])],
        "g",
        [info("image", TensorProto.FLOAT, ["batch", 2, 3])],
        [info("y", TensorProto.FLOAT, ["batch", 2, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    out = [session.run(None, feed)[0] for feed in open_samples(npz, input_specs(model))]
    np.testing.assert_array_equal(np.concatenate(out), -rows(5))


# What is refused, and in which words


def test_missing_input_names_what_is_expected_and_what_came(npz: Path) -> None:
    message = refused(npz, [InputSpec("images", F32, ("batch", 3, 224, 224))])
    assert message.startswith("calib.npz: the model's input 'images' float32 [batch,3,224,224] is")
    assert "what came is 'image' float32 [5,2,3], 'label' int64 [5]; nearest: image" in message


def test_missing_input_in_a_later_feed() -> None:
    message = refused([FEEDS[0], {}])
    assert "list, sample 1 (counted from 0): the model's input 'image'" in message
    assert message.endswith("what came is nothing")


def test_missing_input_in_a_folder_names_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "0.npz", image=rows(1))
    np.savez(tmp_path / "1.npz", imaeg=rows(1))
    assert "1.npz: the model's input 'image'" in refused(tmp_path)


def test_unexpected_name() -> None:
    message = refused([FEEDS[0] | {"imagge": rows(1)}])
    assert "'imagge', which is no input of the model" in message
    assert "expects 'image' float32 [batch,2,3]; nearest: image" in message


@pytest.mark.parametrize(
    "array",
    [rows(1).astype(np.uint8), rows(1).astype(np.int64), rows(1)[..., None, None], rows(1)[:, :1]],
    ids=["uint8", "int64", "rank", "dimension"],
)
@pytest.mark.parametrize("wrap", [lambda a: [{"image": a}], lambda a: {"image": a}])
def test_wrong_type_or_shape(array: np.ndarray, wrap: Any) -> None:
    message = refused(wrap(array))
    assert "the model expects 'image' float32 [batch,2,3], what came is " in message
    assert array.dtype.name in message
    assert message.endswith("; change the samples to fit")


def test_every_feed_is_checked_while_streaming() -> None:
    samples = open_samples([FEEDS[0], FEEDS[1], {"image": rows(1)[:, :, :2]}], [IMAGE])
    stream = iter(samples)
    next(stream), next(stream)
    with pytest.raises(OnnxqError, match=r"sample 2 .*what came is float32 \[1,2,2\]"):
        next(stream)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_names_sample_and_tensor(value: float, tmp_path: Path) -> None:
    array = rows(5)
    array[3, 1, 2] = value
    np.savez(tmp_path / "calib.npz", image=array)
    for batch in (1, 2):
        message = refused(tmp_path / "calib.npz", batch_size=batch)
        assert message.startswith(
            f"calib.npz, sample 3 (counted from 0): tensor 'image' holds {value}"
        )
    assert "sample 1 (counted from 0)" in refused([FEEDS[0], {"image": array[3:4]}])


def test_cast_that_overflows_is_not_finite() -> None:
    assert "holds inf" in refused([{"image": np.full((1, 2, 3), 1e300)}])


def test_empty_sources(tmp_path: Path) -> None:
    np.savez(tmp_path / "empty.npz", image=rows(0))
    (tmp_path / "folder").mkdir()
    sources: list[object] = [tmp_path / "empty.npz", [], iter(()), {"image": rows(0)}]
    for source in sources:
        assert "holds no samples; give at least one" in refused(source)
    assert "holds no .npz file" in refused(tmp_path / "folder")
    assert "<lambda> gives no samples" in refused(lambda: [])


def test_function_that_hands_out_one_iterator() -> None:
    iterator = iter(FEEDS)
    assert "cannot be read twice; make it start anew on each call" in refused(lambda: iterator)
    feeds = list(FEEDS[:1])
    assert "cannot be read twice" in refused(lambda: (feeds.pop() for _ in range(len(feeds))))


def test_function_that_gives_fewer_when_read_again() -> None:
    lengths = iter([5, 5, 5, 3])

    def feeds() -> list[Feed]:
        return FEEDS[: next(lengths)]

    samples = open_samples(feeds, [IMAGE], limit=None)
    # Opening takes two calls to probe and one to check the first feed.
    lengths = iter([5, 3])
    assert len(samples) == 5
    with pytest.raises(OnnxqError, match="feeds gave 5 samples at first and 3 when read again"):
        list(samples)


def test_function_that_fails_is_named() -> None:
    def feeds() -> Iterator[Feed]:
        yield FEEDS[0]
        raise KeyError("photo.jpg")

    assert "feeds failed with KeyError: 'photo.jpg'; it must return or yield" in refused(feeds)
    assert "failed with TypeError: 'int' object is not iterable" in refused(lambda: 3)


def test_feed_that_is_no_dict() -> None:
    message = refused([rows(1)])
    assert "sample 0 (counted from 0) is a ndarray; give a dict {input name: array}" in message
    assert "'image' float32 [batch,2,3]" in message


def test_files_that_cannot_be_read(tmp_path: Path, npz: Path) -> None:
    assert "do not exist; give an .npz or .txt file" in refused(tmp_path / "nowhere.npz")
    assert "do not exist" in refused("nowhere")
    (tmp_path / "calib.csv").write_text("1,2,3")
    assert "calib.csv' is no .npz file; give" in refused(tmp_path / "calib.csv")
    (tmp_path / "text.npz").write_text("1,2,3")
    assert "text.npz': File is not a zip file; save it anew with" in refused(tmp_path / "text.npz")
    np.savez(tmp_path / "pickle.npz", image=np.array([{}, None]))
    with_objects = InputSpec("image", F32, ("batch",))
    assert "pickle.npz'" in refused(tmp_path / "pickle.npz", [with_objects])
    assert "samples cannot come from a int" in refused(3)


def test_damaged_npz_is_told_while_streaming(npz: Path) -> None:
    data = bytearray(npz.read_bytes())
    position = data.find(np.float32(3).tobytes() * 6)
    data[position] ^= 1
    npz.write_bytes(data)
    assert "calib.npz': Bad CRC-32 for file 'image.npy'; save it anew" in refused(npz)


def test_arrays_that_disagree() -> None:
    specs = [IMAGE, InputSpec("ids", I64, ("batch",))]
    message = refused({"image": rows(5), "ids": np.arange(4)}, specs)
    assert "differ in their number of samples: 'image' 5, 'ids' 4" in message
    fixed = [InputSpec("image", F32, (1, 2, 3)), InputSpec("state", F32, (2, 3))]
    message = refused({"image": rows(6), "state": np.zeros((6, 3), "f4")}, fixed)
    assert "takes 1 rows of 'image' and 2 of 'state' at a time; give one with a leading" in message


def test_rows_of_differing_length() -> None:
    ragged = [[[1, 2, 3]], [[1, 2]]]
    advice = "; give an array of one shape, and samples of differing shapes one by one"
    message = refused([FEEDS[0], {"image": ragged}])
    assert message.startswith("list, sample 1 (counted from 0): 'image' makes no array (setting")
    assert message.endswith(advice)
    assert refused({"image": ragged}).endswith(advice)


def test_objects_and_strings_for_numbers(tmp_path: Path) -> None:
    ragged = np.empty(3, object)
    ragged[:] = [np.ones((1, k)) for k in range(3)]
    np.savez(tmp_path / "ragged.npz", image=ragged)
    message = refused(tmp_path / "ragged.npz")
    assert "what came is object [3]; samples of differing shapes go into a folder" in message
    assert "what came is string [1]; change the samples" in refused([{"image": np.array(["a"])}])


def test_sample_without_values() -> None:
    message = refused([FEEDS[0], {"image": rows(0)}])
    assert message.startswith("list, sample 1 (counted from 0) holds no values: every tensor is")
    past = InputSpec("past", F32, ("batch", "past"))
    feed = FEEDS[0] | {"past": np.zeros((1, 0), np.float32)}
    assert len(list(open_samples([feed], [IMAGE, past]))) == 1


def test_messages_of_others_become_one_line() -> None:
    def feeds() -> Iterator[Feed]:
        yield FEEDS[0]
        raise RuntimeError("first line\n  second line")

    assert "RuntimeError: first line second line; it must return or yield" in refused(feeds)


def test_counts_that_make_no_sense(npz: Path) -> None:
    assert refused(npz, batch_size=0) == "the batch size is 0; give 1 or more"
    assert refused(npz, limit=0) == "the limit of samples is 0; give 1 or more"
