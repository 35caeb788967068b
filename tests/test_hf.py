"""Small Hugging Face models, exported, quantized as folders, loaded by optimum.onnxruntime.

They need the extra hf: scripts/hf-check installs it and runs these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import onnxq
from onnxq.cli import app
from onnxq.recipe import preset_names

pytest.importorskip("optimum.onnxruntime", reason="needs the extra hf: scripts/hf-check")
torch = pytest.importorskip("torch")
ort_models: Any = pytest.importorskip("optimum.onnxruntime")
hf: Any = pytest.importorskip("transformers")

from test_text import SENTENCES, train  # noqa: E402 (after the skips: it needs tokenizers)

WORDS = 24
PRESETS = [name for name in ("int8-dynamic", "int4-rtn") if name in preset_names()]
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
TEXT = {"vocab_size": WORDS, "max_position_embeddings": 64, "pad_token_id": 0}
TOKENS = {"bos_token_id": 2, "eos_token_id": 3}
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}


def llama() -> Any:
    config = hf.LlamaConfig(**SMALL, **TEXT, **TOKENS, **WIDTHS, num_key_value_heads=2)
    return hf.LlamaForCausalLM(config)


def qwen() -> Any:
    config = hf.Qwen2Config(**SMALL, **TEXT, **TOKENS, **WIDTHS, num_key_value_heads=2)
    return hf.Qwen2ForCausalLM(config)


def bert() -> Any:
    return hf.BertForSequenceClassification(hf.BertConfig(**SMALL, **TEXT, **WIDTHS))


def vit() -> Any:
    config = hf.ViTConfig(**SMALL, **WIDTHS, image_size=32, patch_size=8)
    return hf.ViTForImageClassification(config)


def whisper() -> Any:
    halves = ("layers", "attention_heads", "ffn_dim")
    sizes = {
        f"{half}_{what}": size
        for half in ("encoder", "decoder")
        for what, size in zip(halves, (1, 4, 128), strict=True)
    }
    config = hf.WhisperConfig(
        vocab_size=WORDS, d_model=64, num_mel_bins=16, max_target_positions=32, init_std=0.2,
        pad_token_id=0, decoder_start_token_id=2, suppress_tokens=None,
        begin_suppress_tokens=None, **TOKENS, **sizes,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config)


def exported(make: Any, folder: Path) -> Path:
    """The model, saved by transformers with its tokenizer, exported by the command line."""
    torch.manual_seed(0)
    made = make().eval()
    source = folder / "source"
    made.save_pretrained(source)
    train(source)
    if made.main_input_name == "pixel_values":
        hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(source)
        (source / "tokenizer.json").unlink()
    else:
        tokenizer = hf.PreTrainedTokenizerFast(
            tokenizer_file=str(source / "tokenizer.json"), unk_token="[UNK]", pad_token="[PAD]"
        )
        tokenizer.save_pretrained(source)
    if made.main_input_name == "input_features":
        hf.WhisperFeatureExtractor(feature_size=16).save_pretrained(source)
    done = CliRunner().invoke(app, ["export", str(source), str(folder / "float")])
    assert done.exit_code == 0, done.output
    (folder / "text.txt").write_text("\n".join(6 * SENTENCES), "utf-8")
    return folder / "float"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The exported folder of a model, made once."""
    known: dict[Any, Path] = {}

    def folder(make: Any) -> Path:
        if make not in known:
            known[make] = exported(make, tmp_path_factory.mktemp(make.__name__))
        return known[make]

    return folder


def both(folder: Path, kind: Any, preset: str, **options: Any) -> tuple[Any, Any]:
    """The float and the quantized folder, loaded by optimum."""
    found = onnxq.quantize_folder(
        folder, preset, output=folder.parent / f"{preset}{len(options)}", latency_check=False,
        limit=8, **options,
    )  # fmt: skip
    assert all(report.verified for report in found.reports.values())
    return kind.from_pretrained(folder), kind.from_pretrained(found.output)


def cosine(a: Any, b: Any) -> float:
    left, right = (np.asarray(x.detach(), np.float64).ravel() for x in (a, b))
    return float(left @ right / np.sqrt(left @ left * (right @ right)))


LEAST = {"int8-dynamic": 0.99, "int4-rtn": 0.9}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("make", [llama, qwen])
def test_decoders_generate(folders: Any, make: Any, preset: str, with_text: bool) -> None:
    folder = folders(make)
    options = {"samples": folder.parent / "text.txt"} if with_text else {}
    plain, quantized = both(folder, ort_models.ORTModelForCausalLM, preset, **options)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(SENTENCES[3], return_tensors="pt", return_token_type_ids=False)
    said = [loaded(**given).logits for loaded in (plain, quantized)]
    assert cosine(*said) > LEAST[preset]
    torch.testing.assert_close(said[0], make_again(make)(**given).logits, rtol=1e-2, atol=1e-2)
    text = quantized.generate(**given, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert text.shape == (1, given["input_ids"].shape[1] + 6)
    # The past that it made itself tells it as much as the whole text.
    start = given["input_ids"].shape[1] - 1
    again = quantized(input_ids=text, attention_mask=torch.ones_like(text)).logits[0, start:-1]
    chosen = again.gather(1, text[0, start + 1 :, None])[:, 0]
    best = again[:, [k for k in range(WORDS) if k != TOKENS["eos_token_id"]]].max(-1).values
    assert (best - chosen < 0.05 * again.std()).all()


def make_again(make: Any) -> Any:
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize("preset", PRESETS)
def test_encoders_classify_text(folders: Any, preset: str) -> None:
    folder = folders(bert)
    models = both(
        folder,
        ort_models.ORTModelForSequenceClassification,
        preset,
        samples=folder.parent / "text.txt",
    )
    tokenizer = hf.AutoTokenizer.from_pretrained(models[1].model_save_dir)
    given = tokenizer(SENTENCES, return_tensors="pt", padding=True)
    assert cosine(*(loaded(**given).logits for loaded in models)) > LEAST[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_image_models_classify(folders: Any, preset: str) -> None:
    models = both(folders(vit), ort_models.ORTModelForImageClassification, preset)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert cosine(*(loaded(pixel_values=pixels).logits for loaded in models)) > LEAST[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_encoder_decoders_generate(folders: Any, preset: str) -> None:
    folder = folders(whisper)
    models = both(folder, ort_models.ORTModelForSpeechSeq2Seq, preset)
    sound = torch.randn(1, 16, 3000, generator=torch.Generator().manual_seed(0))
    start = torch.tensor([[2, 5, 6, 7]])
    said = [loaded(input_features=sound, decoder_input_ids=start).logits for loaded in models]
    assert cosine(*said) > LEAST[preset]
    text = models[1].generate(sound, max_new_tokens=6, do_sample=False)
    assert text.shape[0] == 1
    assert text.shape[1] > 1
