import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import MODELS, Feeds, model, normal
from numpy.typing import NDArray

import onnxq
from onnxq import graph as g
from onnxq.calibrate import observe
from onnxq.errors import OnnxqError
from onnxq.observe import MinMax
from onnxq.runtime import Session
from onnxq.samples import Feed, Samples, input_specs, open_samples
from onnxq.states import States

Array = NDArray[Any]


def recurrent(into: str = "h", out: str = "h_out", batch: str = "n") -> onnx.ModelProto:
    text = f"""(float[{batch},4] x, float[{batch},6] {into}) => (float[{batch},2] y,
                                                                 float[{batch},6] {out}) {{
        a = MatMul (x, w)
        b = MatMul ({into}, u)
        c = Add (a, b)
        {out} = Tanh (c)
        y = MatMul ({out}, v)
    }}"""
    weights = {"w": normal(4, 6), "u": normal(6, 6, seed=1), "v": normal(6, 2, seed=2)}
    return model(text, **weights)


def stream(n: int = 7, rows: int = 1) -> Feeds:
    return [{"x": normal(rows, 4, seed=k)} for k in range(n)]


def unrolled(made: onnx.ModelProto, feeds: Feeds, into: str = "h", out: str = "h_out") -> Feeds:
    """Whole feeds, the states of which are what the model gave for the feed before."""
    session, whole = Session(made, threads=1), []
    state = np.zeros((len(feeds[0]["x"]), 6), np.float32)
    for feed in feeds:
        whole.append({**feed, into: feed.get(into, state)})
        state = session.run(whole[-1])[out]
    return whole


def opened(made: onnx.ModelProto, source: object, **declared: str) -> Samples:
    states = States(made, made, declared, threads=1)
    return states.carry(open_samples(source, states.specs))


def assert_same(found: Samples | Feeds, expected: Samples | Feeds) -> None:
    left, right = list(found), list(expected)
    assert len(left) == len(right) == len(found) == len(expected)
    for a, b in zip(left, right, strict=True):
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def refused(made: onnx.ModelProto, source: object, **declared: str) -> str:
    with pytest.raises(OnnxqError) as error:
        list(opened(made, source, **declared))
    message = str(error.value)
    assert "\n" not in message
    return message


# Streams: states of a fixed shape


def test_calibration_sees_what_a_run_unrolled_by_hand_sees() -> None:
    made = recurrent()
    graph = g.load(made)

    def ranges(samples: Samples) -> dict[str, Any]:
        return observe(graph, {name: MinMax() for name in "xhacy"}, samples, threads=1)

    whole = open_samples(unrolled(made, stream()), input_specs(made))
    found, expected = ranges(opened(made, stream())), ranges(whole)
    assert found == expected
    assert found["h"].low < 0 < found["h"].high


@pytest.mark.parametrize("kind", ["list", "dict", "iterator", "function", "folder", "npz"])
def test_states_may_be_left_out_of_any_source(kind: str, tmp_path: Path) -> None:
    feeds = stream()
    np.savez(tmp_path / "x.npz", x=np.concatenate([f["x"] for f in feeds]))
    (tmp_path / "folder").mkdir()
    for k, feed in enumerate(feeds):
        np.savez(tmp_path / "folder" / f"{k}.npz", **feed)  # type: ignore[arg-type]
    sources = {
        "list": feeds,
        "dict": {"x": np.concatenate([f["x"] for f in feeds])},
        "iterator": iter(feeds),
        "function": lambda: iter(feeds),
        "folder": tmp_path / "folder",
        "npz": tmp_path / "x.npz",
    }
    made = recurrent()
    samples = opened(made, sources[kind])
    whole = unrolled(made, feeds)
    assert_same(samples, whole)
    assert_same(samples, whole)
    assert samples.digest() == open_samples(whole, input_specs(made)).digest()
    assert samples.description.endswith(", 7 samples; h from h_out")


def test_a_state_that_is_given_is_taken_and_carried_on() -> None:
    made, feeds = recurrent(), stream()
    feeds[3]["h"] = normal(1, 6, seed=50)
    assert_same(opened(made, feeds), unrolled(made, feeds))


def test_given_everywhere_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made = recurrent()
    whole = unrolled(made, stream())
    monkeypatch.setattr("onnxq.runtime.Session.run", lambda *_: pytest.fail("it ran the model"))
    assert_same(opened(made, whole), whole)


def test_a_slice_has_the_states_of_a_run_from_the_start() -> None:
    made = recurrent()
    whole = unrolled(made, stream())
    states = States(made, made)
    samples = open_samples(stream(), states.specs)
    assert_same(states.carry(samples).slice(2, 5), whole[2:5])
    assert_same(states.carry(samples.slice(2, 5)), whole[2:5])
    assert_same(states.carry(samples.slice(1, 6)).slice(1, 3), whole[2:4])
    assert_same(states.carry(samples.slice(4, None)), whole[4:])
    assert states.carry(samples.slice(2, 5)).description.startswith("list, 3 samples")


def test_the_batch_of_a_state_is_that_of_the_data() -> None:
    made = recurrent()
    assert_same(opened(made, stream(rows=3)), unrolled(made, stream(rows=3)))
    message = refused(made, [*stream(2, rows=3), *stream(1, rows=2)])
    assert message.startswith("list, sample 2 (counted from 0): the state 'h' is [3, 6] after")
    assert "should be [2, 6] here; give samples of one batch size" in message


def test_rows_of_a_stream_share_no_batch() -> None:
    made = recurrent()
    states = States(made, made)
    arrays = {"x": np.concatenate([f["x"] for f in stream()])}
    with pytest.raises(OnnxqError, match=r"'h' is carried .* feed one at a time \(--batch-size 1"):
        states.carry(open_samples(arrays, states.specs, batch_size=2))
    whole = {name: np.concatenate([f[name] for f in unrolled(made, stream())]) for name in "xh"}
    assert len(states.carry(open_samples(whole, states.specs, batch_size=2))) == 4


def test_other_names_are_declared() -> None:
    made = recurrent("memory_a", "thoughts")
    declared = {"thoughts": "memory_a"}
    whole = unrolled(made, stream(), "memory_a", "thoughts")
    assert_same(opened(made, stream(), **declared), whole)
    message = refused(made, stream())
    assert "the model's input 'memory_a' float32 [n,6] is missing" in message
    assert message.endswith(
        "; if it is a state that an output carries on, say so: --state thoughts=memory_a"
    )
    assert "--state" not in refused(made, [{"memory_a": np.zeros((1, 6), np.float32)}])


def test_a_state_that_blows_up_names_the_sample() -> None:
    made = model(
        "(float[n,2] x, float[n,2] h) => (float[n,2] h_out) { s = Add (x, h)\n h_out = Log (s) }"
    )
    feeds = [{"x": np.full((1, 2), value, np.float32)} for value in (3, -9, 1)]
    message = refused(made, feeds)
    assert message.startswith("list, sample 2 (counted from 0): the feed before makes 'h_out'")
    assert "the state 'h', NaN or infinite; leave its sample out" in message


def test_memory_does_not_grow_with_the_stream() -> None:
    import tracemalloc

    made = model(
        "(float[1,100000] x, float[1,100000] h) => (float[1,100000] h_out)"
        "{ s = Add (x, h)\n h_out = Tanh (s) }"
    )

    def feeds(n: int) -> Iterator[Feed]:
        return ({"x": np.full((1, 100_000), k, np.float32)} for k in range(n))

    def peak(n: int) -> int:
        samples = opened(made, lambda: feeds(n))
        tracemalloc.start()
        for _ in samples:
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(3)
    assert peak(60) < peak(6) + 400_000  # bytes of one sample


# Past and present


def growing(ids: str = "b,s", mask: str = "b,t", positions: str = "b,s") -> onnx.ModelProto:
    """Its present is the past and what a table says of the new tokens."""
    text = f"""(int64[{ids}] input_ids, int64[{mask}] attention_mask, int64[{positions}] places,
                float[b,1,p,2] past_0) => (float[b,1,q,2] present_0, int64[m] m, int64[l] l) {{
        axis = Constant <value_ints = [1]> ()
        e = Gather (table, input_ids)
        k = Unsqueeze (e, axis)
        present_0 = Concat <axis = 2> (past_0, k)
        m = Shape (attention_mask)
        l = Shape (places)
    }}""".replace("places", "position_ids")
    return model(text, table=normal(9, 2))


def sentence(length: int, rows: int = 1) -> dict[str, Array]:
    ids = np.arange(rows * length).reshape(rows, length) % 9
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.broadcast_to(np.arange(length), ids.shape),
    }


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("named", [True, False])
def test_a_sentence_becomes_two_steps(rows: int, named: bool) -> None:
    made = growing() if named else growing(positions="b,other")
    table = onnx.numpy_helper.to_array(made.graph.initializer[0])
    sentences = [sentence(n, rows) for n in (5, 1, 2)]
    samples = opened(made, sentences)
    assert len(samples) == 5
    assert samples.description == "list, 3 samples; past_0 from present_0"
    steps = [(5, 0, 2), (5, 2, 5), (1, 0, 1), (2, 0, 1), (2, 1, 2)]
    for feed, (length, start, stop) in zip(samples, steps, strict=True):
        whole = sentence(length, rows)
        for name in ("input_ids", "position_ids"):
            np.testing.assert_array_equal(feed[name], whole[name][:, start:stop])
        np.testing.assert_array_equal(feed["attention_mask"], whole["attention_mask"][:, :stop])
        past = table[whole["input_ids"][:, :start]][:, None]
        np.testing.assert_array_equal(feed["past_0"], past.reshape(rows, 1, start, 2))
    for start in range(5):
        assert_same(samples.slice(start, None), list(samples)[start:])
        assert_same(samples.slice(0, start), list(samples)[:start])
    assert samples.slice(2, 4).description.startswith("list, 2 samples")


def test_a_past_that_is_given_is_fed_as_it_is() -> None:
    made = growing()
    whole = sentence(4) | {"past_0": normal(1, 1, 3, 2)}
    assert_same(opened(made, [whole, whole]), [whole, whole])
    first, *others = opened(made, [whole, sentence(4)])
    np.testing.assert_array_equal(first["past_0"], whole["past_0"])
    assert [feed["past_0"].shape[2] for feed in others] == [0, 2]


def test_a_token_at_a_time_where_the_model_says_so() -> None:
    made = growing(ids="b,1", positions="b,1")
    samples = opened(made, [sentence(4), sentence(2)])
    assert [feed["input_ids"].tolist() for feed in samples] == [[[k]] for k in (0, 1, 2, 3, 0, 1)]
    assert [feed["position_ids"].item() for feed in samples] == [0, 1, 2, 3, 0, 1]
    assert [feed["attention_mask"].shape[1] for feed in samples] == [1, 2, 3, 4, 1, 2]
    assert [feed["past_0"].shape[2] for feed in samples] == [0, 1, 2, 3, 0, 1]
    assert len(samples) == 6
    message = refused(growing(ids="b,3", positions="b,3"), [sentence(4)])
    assert "'input_ids' has 4 tokens and the model takes 3 at a time; give a multiple" in message


def test_part_of_a_past() -> None:
    text = """(int64[b,s] ids, float[b,p,2] past_k, float[b,p,2] past_v)
        => (float[b,q,2] present_k, float[b,q,2] present_v) {
        e = Gather (table, ids)
        present_k = Concat <axis = 1> (past_k, e)
        present_v = Concat <axis = 1> (past_v, e)
    }"""
    made = model(text, table=normal(9, 2))
    message = refused(made, [{"ids": np.array([[1, 2]]), "past_v": normal(1, 3, 2)}])
    assert "gives 'past_v' and leaves 'past_k' out; give all of the past or none" in message


def test_a_decoder_with_past_says_what_it_says_without() -> None:
    """The same tokens through both models: in two steps with states, and at once without."""
    cached, plain = (onnx.load(MODELS / f"decoder_lm{kv}.onnx") for kv in ("_kv", ""))
    with np.load(MODELS / "decoder_lm.calib.npz") as file:
        ids = file["input_ids"][:6]
    samples = opened(cached, {"input_ids": ids})
    assert len(samples) == 2 * len(ids)
    session, whole = Session(cached, threads=1), Session(plain, threads=1)
    logits = [session.run(feed)["logits"] for feed in samples]
    for k, row in enumerate(ids):
        together = np.concatenate(logits[2 * k : 2 * k + 2], axis=1)
        np.testing.assert_allclose(
            together, whole.run({"input_ids": row[None]})["logits"], atol=1e-3
        )
    past = "past_key_values.0.value"
    keys = {name: MinMax() for name in ("logits", past, "present.0.value")}
    found = observe(g.load(cached), keys, samples, threads=1)
    expected = observe(
        g.load(plain), {"logits": MinMax()}, open_samples({"input_ids": ids}, input_specs(plain))
    )
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-4)
    halves = [{"input_ids": row[None, : len(row) // 2]} for row in ids]
    empty = {s.name: np.zeros((1, 2, 0, 16), np.float32) for s in input_specs(cached)[1:]}
    presents = [session.run(half | empty)["present.0.value"] for half in halves]
    assert found[past] == (min(p.min() for p in presents), max(p.max() for p in presents))


# In one piece


def test_quantize_validate_and_bench(tmp_path: Path) -> None:
    onnx.save(recurrent("memory_a", "thoughts"), tmp_path / "m.onnx")
    common: dict[str, Any] = {
        "samples": {"x": np.concatenate([f["x"] for f in stream(40)])},
        "states": {"thoughts": "memory_a"},
    }
    result = onnxq.quantize(tmp_path / "m.onnx", output=tmp_path / "q.onnx", **common)
    assert result.report.samples == "arrays, 36 samples; memory_a from thoughts"
    assert result.report.outputs[0].cosine > 0.99
    report = onnxq.validate(tmp_path / "m.onnx", tmp_path / "q.onnx", **common)
    assert report.outputs[0].cosine > 0.99
    assert len(onnxq.api.bench([tmp_path / "m.onnx"], seconds=0.1, **common)) == 1
    with pytest.raises(OnnxqError, match="no output 'thought'; nearest: thoughts"):
        onnxq.quantize(tmp_path / "m.onnx", states={"thought": "memory_a"})


def test_made_up_samples_leave_states_to_the_model(tmp_path: Path) -> None:
    onnx.save(recurrent("hidden", "hidden_out"), tmp_path / "m.onnx")
    report = onnxq.quantize(tmp_path / "m.onnx", write=False).report
    assert report.samples.endswith("; hidden from hidden_out")


def test_made_up_samples_hold_what_may_be_data(tmp_path: Path) -> None:
    """`noisy` and `noisy_out` may be a state, and may be what a filter is for."""
    onnx.save(recurrent("noisy", "noisy_out"), tmp_path / "m.onnx")
    assert "noisy" not in onnxq.quantize(tmp_path / "m.onnx", write=False).report.samples


def test_made_up_text_has_a_past() -> None:
    report = onnxq.quantize(MODELS / "decoder_lm_kv.onnx", write=False).report
    expected = "; past_key_values.0.key from present.0.key and 7 more states"
    assert report.samples.endswith(expected)


# Real streams


def spoken(path: Path, size: int) -> Array:
    """Pieces (n, size) float32 of a recording."""
    with wave.open(str(path)) as file:
        raw = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    return (raw[: len(raw) // size * size].reshape(-1, size) / 32768).astype(np.float32)


def test_speech_through_silero_is_one_stream(shared: Path) -> None:
    path = shared / "models" / "silero_vad_16k.onnx"
    made = onnx.load(path)
    pieces = spoken(shared / "data" / "audio" / "silero_test_16k.wav", 512)[:60]
    context = np.concatenate([np.zeros((1, 64), np.float32), pieces[:-1, -64:]])
    feeds = [
        {"input": row[None], "sr": np.array(16000)} for row in np.concatenate([context, pieces], 1)
    ]
    session, state, expected = Session(path), np.zeros((2, 1, 128), np.float32), []
    for feed in feeds:
        expected.append({**feed, "state": state})
        state = session.run(expected[-1])["stateN"]
    samples = opened(made, feeds)
    for a, b in zip(samples, expected, strict=True):
        np.testing.assert_allclose(a["state"], b["state"], atol=1e-6)
    arrays = {"input": np.concatenate([f["input"] for f in feeds]), "sr": np.array(16000)}
    assert opened(made, arrays).digest() == samples.digest()


def test_gtcrn_made_up_is_a_stream(shared: Path) -> None:
    path = shared / "models" / "gtcrn_stream.onnx"
    report = onnxq.quantize(path, write=False, check=False).report
    names = [f"{k}_cache from {k}_cache_out" for k in ("conv", "tra", "inter")]
    assert report.samples.endswith("; " + ", ".join(names))
