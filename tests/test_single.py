import numpy as np
import onnx
import pytest

from onnxq.devices import Job, Place, ask
from onnxq.devices.single import OPSET, Single, difference, make_single, singles, table, verdicts

CPU = Place("CPUExecutionProvider")
NOT_TENSORS = {
    "ConcatFromSequence", "ImageDecoder", "Optional", "OptionalGetElement", "OptionalHasElement",
    "RegexFullMatch", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase",
    "SequenceInsert", "SequenceLength", "SequenceMap", "SplitToSequence", "StringConcat",
    "StringNormalizer", "StringSplit", "TfIdfVectorizer",
}  # fmt: skip
RANDOM = {
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike",
}  # fmt: skip
LEFT_OUT = {  # training, integer forms that onnxq does not write, or newer than any runtime
    "Constant", "MelWeightMatrix", "NegativeLogLikelihoodLoss", "QLinearConv", "QLinearMatMul",
    "Scatter", "SoftmaxCrossEntropyLoss", "Upsample", "CausalConvWithState", "LinearAttention",
    "SwiGLU",
}  # fmt: skip


def typical(op: str) -> Single:
    made = make_single(op, table()[op][0])
    assert made is not None
    return made


def test_the_table_has_every_operator_that_computes_on_tensors() -> None:
    standard = {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""}
    assert standard - set(table()) == NOT_TENSORS | RANDOM | LEFT_OUT


def test_every_operator_runs_on_the_cpu_in_float32() -> None:
    models = [made for op in table() if (made := make_single(op, table()[op][0])) is not None]
    assert len(models) > 150
    answers = ask(CPU, [Job(m.model, (m.feed,), threads=1) for m in models])
    failed = [f"{m}: {a.error}" for m, a in zip(models, answers, strict=True) if a.error]
    assert not failed


def test_models_have_the_type_and_the_opset_that_were_asked_for() -> None:
    for made in singles(["Add", "Swish"], ("float16", "int8")):
        assert {a.dtype.name for a in made.feed.values()} == {made.type}
        assert made.model.opset_import[0].version == (24 if made.op == "Swish" else OPSET)
    assert not singles(["Sigmoid"], ("int8",))  # which its schema does not take


def test_one_call_stands_for_all_in_other_types_than_the_first() -> None:
    made = singles(["Conv"], ("float32", "float16"))
    assert sum(single.type == "float16" for single in made) == 1
    assert sum(single.type == "float32" for single in made) == len(table()["Conv"])


def test_a_verdict_says_why_an_operator_does_not_run() -> None:
    good, bad = verdicts(CPU, [typical("Asin"), singles(["Asin"], ("float64",))[0]])
    assert good.runs
    assert good.error == 0
    assert not bad.runs
    assert "Asin" in bad.reason


def test_difference_is_relative_to_the_range_and_infinite_for_other_shapes() -> None:
    one = {"y": np.array([0.0, 10.0])}
    assert difference(one, {"y": np.array([1.0, 10.0])}) == pytest.approx(0.1)
    assert difference(one, {"y": np.array([[0.0, 10.0]])}) == float("inf")
    assert difference(one, {"y": np.array([0.0, np.nan])}) == float("inf")
