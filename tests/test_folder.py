"""Folders as Hugging Face Optimum exports them, built by hand: in goes one, out comes one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from decoders import PAST, WIDTH, decoder, encoder
from graphs import model, normal
from test_text import SENTENCES, train
from typer.testing import CliRunner

import onnxq
from onnxq.cli import app
from onnxq.errors import OnnxqError
from onnxq.feeds import Feed
from onnxq.runtime import Session
from onnxq.seq2seq import CUTS, LENGTH, decoder_feeds

CONFIG = {"model_type": "llama", "bos_token_id": 2, "max_position_embeddings": 64}


def exported(folder: Path, **models: onnx.ModelProto) -> Path:
    """A folder with these models, a tokenizer and what else lies there."""
    train(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    (folder / "generation_config.json").write_text("{}", "utf-8")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("of no model", "utf-8")
    for name, made in models.items():
        onnx.save(made, folder / f"{name}.onnx")
    return folder


def speech(folder: Path, **more: onnx.ModelProto) -> Path:
    """Encoder and decoder in the files that Optimum makes of them."""
    return exported(
        folder,
        encoder_model=encoder(),
        decoder_model=decoder(past=False, crossed=True),
        decoder_with_past_model=decoder(crossed=True),
        **more,
    )


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_decoder_comes_out_as_it_went_in(tmp_path: Path) -> None:
    source = exported(tmp_path / "llama", model=decoder())
    (tmp_path / "text.txt").write_text("\n".join(6 * SENTENCES), "utf-8")
    command = ["quantize", str(source), "--data", str(tmp_path / "text.txt"), "--json"]
    done = CliRunner().invoke(app, [*command, "--preset", "int8-dynamic"])
    assert done.exit_code == 0, done.stderr
    out = tmp_path / "llama.int8-dynamic"
    assert files(out) == files(source)
    for name in files(source):
        same = (out / name).read_bytes() == (source / name).read_bytes()
        assert same == (name != "model.onnx"), name
    report = json.loads(done.stdout)
    assert report["output"] == str(out)
    made = report["reports"]["model.onnx"]
    assert made["verified"]
    assert made["output"] == str(out / "model.onnx")
    assert {m["name"] for m in made["metrics"]} == {"kl", "perplexity"}
    integers = {n.op_type for n in onnx.load(out / "model.onnx").graph.node}
    assert integers & {"MatMulInteger", "DynamicQuantizeMatMul"}
    assert not list(tmp_path.glob(".onnxq*"))


def test_without_text_the_models_write_their_own(tmp_path: Path) -> None:
    found = onnxq.quantize_folder(exported(tmp_path / "llama", model=decoder()))
    assert "text that the model wrote itself" in found.reports["model.onnx"].samples
    shown = CliRunner().invoke(
        app, ["quantize", str(tmp_path / "llama"), "-o", str(tmp_path / "again")]
    )
    assert shown.exit_code == 0, shown.stderr
    assert f"wrote {tmp_path / 'again'}" in shown.stdout
    assert "5 other files copied" not in shown.stdout  # 4: config, generation, notes, tokenizer
    assert "4 other files copied" in shown.stdout


def test_external_data_is_not_copied_beside_what_replaces_it(tmp_path: Path) -> None:
    source = exported(tmp_path / "big")
    onnx.save(
        decoder(), source / "model.onnx", save_as_external_data=True,
        location="model.onnx_data", size_threshold=100,
    )  # fmt: skip
    found = onnxq.quantize_folder(source, "int8-dynamic")
    out = Path(found.output)
    assert "model.onnx_data" in files(source)
    assert "model.onnx_data" not in found.copied
    assert "model.onnx_data" not in files(out)
    tokens = np.array([[4, 5, 6]])
    past = np.zeros((1, 1, 0, WIDTH), np.float32)
    feed = {"input_ids": tokens, "attention_mask": np.ones((1, 3), np.int64)}
    feed |= {"position_ids": np.arange(3)[None]}
    feed |= {f"{PAST}.key": past, f"{PAST}.value": past}
    said = [Session(f / "model.onnx").run(feed)["logits"] for f in (source, out)]
    assert np.abs(said[0] - said[1]).max() < 0.1 * np.abs(said[0]).max()


@pytest.mark.parametrize("preset", ["int8-static", "int8-dynamic"])
def test_a_decoder_is_fed_what_its_encoder_says(tmp_path: Path, preset: str) -> None:
    source = speech(tmp_path / "t5")
    (tmp_path / "text.txt").write_text("\n".join(12 * SENTENCES), "utf-8")
    found = onnxq.quantize_folder(source, preset, samples=tmp_path / "text.txt")
    assert set(found.reports) == {
        "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx",
    }  # fmt: skip
    assert files(Path(found.output)) == files(source)
    for name, report in found.reports.items():
        assert report.verified
        assert "text.txt" in report.samples
        assert ("through encoder_model.onnx" in report.samples) == (name != "encoder_model.onnx")
        assert min(o.cosine for o in report.outputs) > 0.98


def whole_text(feeds: list[Feed]) -> np.ndarray[Any, Any]:
    return np.concatenate([feed["input_ids"] for feed in feeds], axis=1)


def test_a_decoder_is_fed_as_generation_feeds_it(tmp_path: Path) -> None:
    """What it says with the past is what it says of the whole text."""
    source = speech(tmp_path / "t5")
    heard = [{"input_ids": np.array([[4, 5, 6, 7]]), "attention_mask": np.ones((1, 4), int)}]
    paths = [source / f"{n}.onnx" for n in ("decoder_model", "decoder_with_past_model")]
    plain, stepwise = (
        list(decoder_feeds(path, source / "encoder_model.onnx", heard, 0, 1)) for path in paths
    )
    assert len(plain) == 1
    assert plain[0]["input_ids"].shape == (1, LENGTH)
    assert plain[0]["input_ids"][0, 0] == CONFIG["bos_token_id"]
    expected = Session(source / "encoder_model.onnx").run(heard[0])["last_hidden_state"]
    np.testing.assert_array_equal(plain[0]["encoder_hidden_states"], expected)
    said = Session(paths[0]).run(plain[0])["logits"]
    for cut, step in zip(CUTS, stepwise, strict=True):
        assert step[f"{PAST}.key"].shape[2] == cut
        np.testing.assert_array_equal(step["input_ids"], plain[0]["input_ids"][:, cut : cut + 1])
        logits = Session(paths[1]).run(step)["logits"]
        np.testing.assert_allclose(logits[:, 0], said[:, cut], rtol=1e-3, atol=1e-4)


def merged() -> onnx.ModelProto:
    """Both decoders as the branches of an If, on the switch use_cache_branch."""
    with_past, without = decoder(crossed=True), decoder(past=False, crossed=True)
    branches = []
    for made in (with_past, without):
        graph = onnx.GraphProto()
        graph.CopyFrom(made.graph)
        graph.ClearField("initializer")
        graph.ClearField("input")
        prefix = f"b{len(branches)}_"
        given = {v.name for v in with_past.graph.input} | {
            t.name for t in with_past.graph.initializer
        }
        for node in graph.node:
            for row in (node.input, node.output):
                row[:] = [n if n in given or not n else prefix + n for n in row]
        for value in graph.output:
            value.name = prefix + value.name
        graph.name = prefix
        branches.append(graph)
    outputs = [value.name for value in with_past.graph.output]
    switch = onnx.helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, [1])
    node = onnx.helper.make_node(
        "If", ["use_cache_branch"], outputs, then_branch=branches[0], else_branch=branches[1]
    )
    graph = onnx.helper.make_graph(
        [node], "merged", [*with_past.graph.input, switch], list(with_past.graph.output),
        list(with_past.graph.initializer),
    )  # fmt: skip
    made = onnx.helper.make_model(graph, opset_imports=with_past.opset_import, ir_version=8)
    onnx.checker.check_model(made)
    return made


def test_a_merged_decoder_is_quantized_in_both_branches(tmp_path: Path) -> None:
    source = exported(tmp_path / "t5", encoder_model=encoder(), decoder_model_merged=merged())
    heard = [{"input_ids": np.array([[4, 5, 6, 7]]), "attention_mask": np.ones((1, 4), int)}]
    path = source / "decoder_model_merged.onnx"
    feeds = list(decoder_feeds(path, source / "encoder_model.onnx", heard, 0, 1))
    assert [bool(feed["use_cache_branch"][0]) for feed in feeds] == [False] + [True] * len(CUTS)
    said = Session(path).run(feeds[0])["logits"]
    for cut, step in zip(CUTS, feeds[1:], strict=True):
        logits = Session(path).run(step)["logits"]
        np.testing.assert_allclose(logits[:, 0], said[:, cut], rtol=1e-3, atol=1e-4)
    found = onnxq.quantize_folder(source, "int8-dynamic")
    made = onnx.load(Path(found.output) / path.name)
    choice = next(n for n in made.graph.node if n.op_type == "If")
    for branch in choice.attribute:
        assert any("Integer" in n.op_type or "Quantize" in n.op_type for n in branch.g.node)


def test_a_model_of_images_gets_images_of_the_size_in_its_config(tmp_path: Path) -> None:
    text = """(float[n,c,h,w] pixel_values) => (float[n,5] logits) {
        x = Conv <strides = [4, 4]> (pixel_values, kernel)
        y = Flatten (x)
        logits = MatMul (y, head)
    }"""
    vit = model(text, kernel=normal(4, 3, 4, 4), head=normal(4 * 3 * 3, 5))
    source = exported(tmp_path / "vit", model=vit)
    (source / "config.json").write_text(json.dumps({"image_size": 12}), "utf-8")
    found = onnxq.quantize_folder(source)
    assert "made-up images" in found.reports["model.onnx"].samples


def test_what_is_wrong_is_said_in_a_line_and_nothing_is_written(tmp_path: Path) -> None:
    source = exported(tmp_path / "llama", model=decoder())
    with pytest.raises(OnnxqError, match="there is no folder"):
        onnxq.quantize_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OnnxqError, match="holds no ONNX file; make one with `onnxq export`"):
        onnxq.quantize_folder(tmp_path / "empty")
    with pytest.raises(OnnxqError, match="empty' exists; remove it, or choose another"):
        onnxq.quantize_folder(source, output=tmp_path / "empty")
    with pytest.raises(OnnxqError, match="is within the input"):
        onnxq.quantize_folder(source, output=source / "out")
    with pytest.raises(OnnxqError, match="to write to; make it first"):
        onnxq.quantize_folder(source, output=tmp_path / "no" / "out")
    onnx.save(model("(float[n,4] x) => (float[n,4] y) { y = Relu (x) }"), source / "other.onnx")
    before = files(tmp_path)
    with pytest.raises(OnnxqError, match=r"^other\.onnx: "):
        onnxq.quantize_folder(source, "int8-dynamic")
    assert files(tmp_path) == before
    (source / "config.json").write_text("{", "utf-8")
    done = CliRunner().invoke(app, ["quantize", str(source)])
    assert done.exit_code == 1
    assert done.stderr.startswith("onnxq: error: ")
    assert "config.json' cannot be read" in done.stderr
    assert len(done.stderr.splitlines()) == 1
