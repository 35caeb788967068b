"""Samples from text, through tokenizers trained here on a few sentences."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from decoders import decoder, encoder
from graphs import model, normal
from typer.testing import CliRunner

import onnxq
from onnxq.cli import app
from onnxq.errors import OnnxqError
from onnxq.sampling import Sampling

tokenizers = pytest.importorskip("tokenizers")

SENTENCES = [
    "the cat sat on the mat",
    "a dog saw the cat",
    "the dog and the cat sat",
    "a cat saw a dog on a mat and sat on the dog",
]


def train(folder: Path, special: bool = False) -> Any:
    """A word-level tokenizer in the folder; `special` puts [CLS] and [SEP] around."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=names, show_progress=False)
    made.train_from_iterator(SENTENCES, trainer)
    if special:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return made


def fed(source: onnx.ModelProto, folder: Path, text: str, **options: Any) -> list[Any]:
    path = folder / "model.onnx"
    onnx.save(source, path)
    (folder / "text.txt").write_text(text, "utf-8")
    sampling = Sampling(path, source, None, None, **options)
    return list(sampling.given(folder / "text.txt", None))


def test_a_line_is_a_sample_with_all_that_the_model_wants(tmp_path: Path) -> None:
    tokenizer = train(tmp_path)
    found = fed(decoder(), tmp_path, "\n".join(SENTENCES) + "\n\n")
    assert len(found) == 4
    for feed, sentence in zip(found, SENTENCES, strict=True):
        ids = tokenizer.encode(sentence).ids
        assert set(feed) == {"input_ids", "attention_mask", "position_ids"}  # the past is carried
        np.testing.assert_array_equal(feed["input_ids"], [ids])
        np.testing.assert_array_equal(feed["attention_mask"], [[1] * len(ids)])
        np.testing.assert_array_equal(feed["position_ids"], [range(len(ids))])
        assert feed["input_ids"].dtype == np.int64


def test_blank_lines_part_samples_that_run_over_lines(tmp_path: Path) -> None:
    tokenizer = train(tmp_path)
    text = "\n\n".join(s.replace(" sat", "\nsat") for s in SENTENCES)
    found = fed(decoder(), tmp_path, text)
    assert [f["input_ids"][0].tolist() for f in found] == [
        tokenizer.encode(s).ids for s in SENTENCES
    ]


def test_long_texts_are_cut_into_windows_with_their_special_tokens(tmp_path: Path) -> None:
    tokenizer = train(tmp_path, special=True)
    text = " ".join(SENTENCES)
    found = fed(encoder(), tmp_path, text, max_tokens=8)
    rows = [f["input_ids"][0].tolist() for f in found]
    assert len(rows) == -(-len(text.split()) // 6)
    assert all(row[0] == 2 and row[-1] == 3 and len(row) <= 8 for row in rows)
    words = [i for row in rows for i in row[1:-1]]
    assert words == tokenizer.encode(text, add_special_tokens=False).ids


def test_windows_are_no_longer_than_the_model_has_positions(tmp_path: Path) -> None:
    train(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 5}), "utf-8")
    found = fed(decoder(), tmp_path, " ".join(SENTENCES))
    assert max(f["input_ids"].shape[1] for f in found) == 5


def test_a_fixed_length_is_padded_where_a_mask_hides_it(tmp_path: Path) -> None:
    train(tmp_path)
    text = """(int64[1,8] input_ids, int64[1,8] attention_mask, int64[1,8] token_type_ids)
              => (float[1,8,4] y) {
        words = Gather (table, input_ids)
        types = Gather (table, token_type_ids)
        seen = Gather (table, attention_mask)
        x = Sum (words, types, seen)
        y = MatMul (x, w)
    }"""
    fixed = model(text, table=normal(24, 4), w=normal(4, 4))
    found = fed(fixed, tmp_path, "\n".join(SENTENCES))
    assert [f["attention_mask"].sum() for f in found] == [6, 5, 6, 8, 5]
    assert all(f["input_ids"].shape == (1, 8) and not f["token_type_ids"].any() for f in found)
    assert not found[0]["input_ids"][0, 6:].any()


def test_a_model_of_past_and_present_is_quantized_on_text(tmp_path: Path) -> None:
    train(tmp_path)
    fed(decoder(), tmp_path, "\n".join(8 * SENTENCES))
    command = ["quantize", str(tmp_path / "model.onnx"), "--data", str(tmp_path / "text.txt")]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["samples"].startswith("text.txt, 28 samples; past_key_values.0.key from")
    assert [m["name"] for m in report["metrics"]] == ["kl", "perplexity"]
    folder = tmp_path / "elsewhere"
    train(folder)
    (tmp_path / "tokenizer.json").unlink()
    both = [tmp_path / "model.onnx", tmp_path / "model.int8-static.onnx"]
    options: dict[str, Any] = {"samples": tmp_path / "text.txt"}
    with pytest.raises(OnnxqError, match=r"no tokenizer\.json lies beside"):
        onnxq.validate(*both, **options)
    found = onnxq.validate(*both, tokenizer=folder / "tokenizer.json", **options)
    assert found.samples.startswith("text.txt, 32 samples")


def test_the_tokenizer_above_a_sub_folder_is_found(tmp_path: Path) -> None:
    train(tmp_path)
    (tmp_path / "onnx").mkdir()
    assert len(fed(decoder(), tmp_path / "onnx", SENTENCES[0])) == 1


def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path)
    with pytest.raises(OnnxqError, match="the model knows 4 tokens; it is not the model's own"):
        fed(decoder(vocabulary=4), tmp_path, SENTENCES[0])
    with pytest.raises(OnnxqError, match="does not tell the model's input 'encoder_hidden_states'"):
        fed(decoder(crossed=True), tmp_path, SENTENCES[0])
    image = model("(float[n,3,8,8] x) => (float[n,3,8,8] y) { y = Relu (x) }")
    with pytest.raises(OnnxqError, match="is text, and the model takes no tokens but 'x' float32"):
        fed(image, tmp_path, SENTENCES[0])
    with pytest.raises(OnnxqError, match="holds no sample"):
        fed(decoder(), tmp_path, "\n \n")
    with pytest.raises(OnnxqError, match="fed one sample at a time"):
        fed(decoder(), tmp_path, SENTENCES[0], batch_size=2)
    with pytest.raises(OnnxqError, match="there is no tokenizer"):
        fed(decoder(), tmp_path, SENTENCES[0], tokenizer=tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{", "utf-8")
    with pytest.raises(OnnxqError, match=r"bad.json' is no tokenizer.json"):
        fed(decoder(), tmp_path, SENTENCES[0], tokenizer=tmp_path / "bad.json")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    sampling = Sampling(tmp_path / "model.onnx", decoder(), None, None)
    with pytest.raises(OnnxqError, match="is no text in UTF-8"):
        sampling.given(tmp_path / "latin.txt", None)
    named = {"tokenizer": tmp_path / "tokenizer.json"}
    sampling = Sampling(tmp_path / "model.onnx", decoder(), None, None, **named)
    with pytest.raises(OnnxqError, match="a tokenizer is for samples in a text file"):
        sampling.given([{}], None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(OnnxqError, match=r"pip install 'onnxq\[text\]'"):
        fed(decoder(), tmp_path, SENTENCES[0])
