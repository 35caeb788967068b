from typing import Any

import numpy as np
import pytest

from onnxq.errors import OnnxqError
from onnxq.feeds import Feed, InputSpec, Shape
from onnxq.tokens import Tokens

I64, F32 = np.dtype("int64"), np.dtype("float32")


def ints(name: str, *shape: int | str | None) -> InputSpec:
    return InputSpec(name, I64, shape)


def floats(name: str, *shape: int | str | None) -> InputSpec:
    return InputSpec(name, F32, shape)


IDS = ints("input_ids", "batch", "seq")


def steps(given: list[InputSpec], feed: Feed) -> list[dict[str, Any]]:
    tokens = Tokens.find(given)
    assert tokens
    return tokens.steps(feed, "sample 0")


@pytest.mark.parametrize(
    ("given", "name", "axis"),
    [
        ([ints("attention_mask", "b", "t"), ints("position_ids", "b", "s"), IDS], "input_ids", 1),
        ([ints("length", "b", "s"), IDS], "input_ids", 1),
        ([ints("words", "b", "s"), floats("speaker", "b", 8)], "words", 1),
        ([ints("tokens", "s")], "tokens", 0),
        ([floats("x", "b", 3), floats("inputs_embeds", "b", "s", 8)], "inputs_embeds", 1),
        ([floats("frames", "b", "time", 80)], "frames", 1),
    ],
)
def test_the_input_of_tokens(given: list[InputSpec], name: str, axis: int) -> None:
    tokens = Tokens.find(given)
    assert tokens
    assert (tokens.spec.name, tokens.axis) == (name, axis)


@pytest.mark.parametrize("shape", [("b", 80, "time"), ("b",), (), None])
def test_what_cannot_be_cut(shape: Shape | None) -> None:
    assert Tokens.find([InputSpec("frames", F32, shape)]) is None


def test_a_mask_of_four_dimensions_is_cut_along_the_new_and_covers_all() -> None:
    mask = floats("attention_mask", "batch", 1, "seq", "total")
    values = np.arange(25, dtype=np.float32).reshape(1, 1, 5, 5)
    first, second = steps([IDS, mask], {"input_ids": np.ones((1, 5)), "attention_mask": values})
    np.testing.assert_array_equal(first["attention_mask"], values[..., :2, :2])
    np.testing.assert_array_equal(second["attention_mask"], values[..., 2:, :5])


def test_an_encoders_inputs_stay_whole_though_as_long() -> None:
    given = [
        IDS,
        ints("encoder_attention_mask", "batch", "source"),
        ints("cross_mask", "batch", "source"),
        floats("memory", "batch", "source", 8),
    ]
    feed = {
        "input_ids": np.ones((4, 4)),
        "encoder_attention_mask": np.ones((4, 4)),
        "cross_mask": np.ones((4, 4)),
        "memory": np.ones((4, 4, 8)),
    }
    for step in steps(given, feed):
        assert {name: a.shape for name, a in step.items()} == {
            "input_ids": (4, 2),
            "encoder_attention_mask": (4, 4),
            "cross_mask": (4, 4),
            "memory": (4, 4, 8),
        }


def test_unnamed_dimensions_go_by_size() -> None:
    given = [
        ints("input_ids", None, None),
        ints("attention_mask", None, None),
        ints("token_type_ids", None, None),
        ints("position_ids", None),
        floats("style", None, 8),
    ]
    feed = {
        "input_ids": np.arange(8)[None],
        "attention_mask": np.ones((1, 8)),
        "token_type_ids": np.ones((1, 8)),
        "position_ids": np.arange(8),
        "style": np.ones((1, 8)),
    }
    second = steps(given, feed)[1]
    assert {name: a.shape for name, a in second.items()} == {
        "input_ids": (1, 4),
        "attention_mask": (1, 8),
        "token_type_ids": (1, 4),
        "position_ids": (4,),
        "style": (1, 8),
    }


def test_the_number_that_the_model_takes() -> None:
    given = [ints("input_ids", "batch", 2), ints("attention_mask", "batch", "total")]
    feed = {"input_ids": np.arange(6)[None], "attention_mask": np.ones((1, 6))}
    made = steps(given, feed)
    assert [step["input_ids"].tolist() for step in made] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert [step["attention_mask"].shape[1] for step in made] == [2, 4, 6]
    tokens = Tokens.find(given)
    assert tokens
    assert tokens.loosened(given[0]).shape == ("batch", None)
    for n in (0, 5):
        with pytest.raises(OnnxqError, match=f"sample 0: 'input_ids' has {n} tokens and the"):
            steps(given, {"input_ids": np.ones((1, n)), "attention_mask": np.ones((1, n))})


def test_a_switch_says_whether_there_is_a_past() -> None:
    switch = InputSpec("use_cache_branch", np.dtype(bool), (1,))
    feed = {"input_ids": np.ones((1, 4), int), "use_cache_branch": np.array([False])}
    first, second = steps([IDS, switch], feed)
    assert not first["use_cache_branch"].any()
    assert second["use_cache_branch"].all()
