import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from onnxq.errors import OnnxqError
from onnxq.samples import InputSpec, Samples, open_samples

F32 = np.dtype("float32")
NCHW = InputSpec("x", F32, ("batch", 3, "height", "width"))
RNG = np.random.default_rng(3)
NO_SETTINGS: dict[str, Any] = {}


def picture(height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, (height, width, channels)[: 2 + (channels > 1)], np.uint8)


def saved(path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def arrays(samples: Samples) -> list[NDArray[Any]]:
    return [feed["x"] for feed in samples]


def one(folder: Path, spec: InputSpec = NCHW, **settings: Any) -> NDArray[Any]:
    (array,) = arrays(open_samples(folder, [spec], preprocess=settings))
    return array


def refused(folder: Path, specs: list[InputSpec] | None = None, **options: Any) -> str:
    with pytest.raises(OnnxqError) as error:
        list(open_samples(folder, specs or [NCHW], **options))
    message = str(error.value)
    assert "\n" not in message
    return message


# What an image becomes


def test_an_image_is_resized_cropped_scaled_and_laid_out_as_the_settings_say(
    tmp_path: Path,
) -> None:
    pixels = picture(41, 67)
    saved(tmp_path / "a.png", pixels)
    (tmp_path / "preprocess.toml").write_text(
        "resize = 24\ncrop = [20, 21]\nscale = 0.01\nmean = [0.1, 0.2, 0.3]\n"
        'std = [0.5, 0.6, 0.7]\ncolor = "BGR"\n'
    )
    small = np.asarray(Image.fromarray(pixels).resize((39, 24), Image.Resampling.BILINEAR))
    crop = small[2:22, 9:30, ::-1].astype(np.float64)  # 24·67/41 = 39.2: 39 wide
    expected = (crop * 0.01 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    (array,) = arrays(open_samples(tmp_path, [NCHW]))
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, expected.transpose(2, 0, 1)[None], rtol=1e-6)
    nhwc = InputSpec("x", F32, (1, 20, 21, 3))
    (array,) = arrays(open_samples(tmp_path, [nhwc]))
    np.testing.assert_allclose(array, expected[None], rtol=1e-6)


def test_pixels_are_between_0_and_1_where_the_settings_are_silent(tmp_path: Path) -> None:
    pixels = picture(5, 6)
    saved(tmp_path / "a.png", pixels)
    expected = (pixels / 255.0).transpose(2, 0, 1)[None]
    np.testing.assert_allclose(one(tmp_path), expected, rtol=1e-6)


def test_a_number_holds_for_every_channel(tmp_path: Path) -> None:
    pixels = picture(5, 6)
    saved(tmp_path / "a.bmp", pixels)
    expected = ((pixels - 127.0) / 128).transpose(2, 0, 1)[None]
    np.testing.assert_allclose(one(tmp_path, scale=1, mean=127, std=128), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "to", "becomes"),
    [((30, 60), 10, (10, 20)), ((60, 30), 10, (20, 10)), ((30, 60), [7, 9], (7, 9))],
)
def test_a_number_is_the_shorter_side(
    tmp_path: Path, size: tuple[int, int], to: Any, becomes: tuple[int, int]
) -> None:
    saved(tmp_path / "a.png", picture(*size))
    assert one(tmp_path, resize=to).shape == (1, 3, *becomes)


def test_an_input_of_bytes_gets_the_pixels(tmp_path: Path) -> None:
    pixels = picture(8, 9)
    saved(tmp_path / "a.png", pixels)
    bytes_input = InputSpec("x", np.dtype("uint8"), ("n", "h", "w", 3))
    np.testing.assert_array_equal(one(tmp_path, bytes_input), pixels[None])
    message = refused(tmp_path, [bytes_input], preprocess={"mean": 0.5})
    assert "takes the pixels as they are; remove scale, mean and std" in message


def test_half_precision(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", picture(8, 9))
    assert one(tmp_path, InputSpec("x", np.dtype("float16"), (1, 3, 8, 9))).dtype == np.float16


def test_one_channel_is_greyscale(tmp_path: Path) -> None:
    pixels = picture(8, 9)
    saved(tmp_path / "a.png", pixels)
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    array = one(tmp_path, InputSpec("x", F32, ("n", 1, 8, 9)))
    np.testing.assert_allclose(array, grey[None, None] / 255.0, rtol=1e-6)


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    pixels = picture(8, 12)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    saved(tmp_path / "a.png", pixels, exif=exif)
    expected = np.rot90(pixels, -1).transpose(2, 0, 1)[None] / 255.0
    np.testing.assert_allclose(one(tmp_path), expected, rtol=1e-6)


def test_alpha_palette_and_greyscale_become_rgb(tmp_path: Path) -> None:
    rgb = np.full((4, 4, 3), (200, 100, 50), np.uint8)
    rgba = np.concatenate([rgb, np.full((4, 4, 1), 128, np.uint8)], axis=2)
    saved(tmp_path / "a.png", rgba)
    palette = Image.fromarray(rgb).quantize(4)
    palette.save(tmp_path / "b.png", transparency=0)
    saved(tmp_path / "c.png", np.full((4, 4), 100, np.uint8))
    saved(tmp_path / "d.png", np.full((4, 4), 100 * 256 + 99, np.uint16))
    found = arrays(open_samples(tmp_path, [NCHW], preprocess={"scale": 1}))
    for array, expected in zip(
        found, [(200, 100, 50), (200, 100, 50), (100,) * 3, (100,) * 3], strict=True
    ):
        assert array.shape == (1, 3, 4, 4)
        np.testing.assert_array_equal(array[0, :, 1, 2], expected)


# Which images, and how many at a time


def shades(folder: Path, n: int, size: int = 4) -> None:
    for k in range(n):
        saved(folder / f"{k}.png", np.full((size, size, 3), k, np.uint8))


def seen(samples: Samples) -> list[list[float]]:
    return [array[:, 0, 0, 0].tolist() for array in arrays(samples)]


def test_subfolders_are_read_in_the_order_of_the_paths(tmp_path: Path) -> None:
    paths = ["b/0.PNG", "a.webp", "a/z.bmp", "a/k/0.jpeg", "c.jpg", ".hidden/a.png", "a/._z.bmp"]
    for k, path in enumerate(paths):
        saved(tmp_path / path, np.full((4, 4, 3), 10 * k, np.uint8), quality=100)
    (tmp_path / "labels.csv").write_text("no image")
    samples = open_samples(tmp_path, [NCHW], preprocess={"scale": 1})
    assert len(samples) == 5
    np.testing.assert_allclose(np.ravel(seen(samples)), [30, 20, 10, 0, 40], atol=2)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_batches(tmp_path: Path, batch: int) -> None:
    shades(tmp_path, 5)
    samples = open_samples(tmp_path, [NCHW], preprocess={"scale": 1}, batch_size=batch)
    expected = [list(range(k, min(k + batch, 5))) for k in range(0, 5, batch)]
    assert seen(samples) == seen(samples) == expected
    assert len(samples) == len(expected)
    assert samples.description == f"{tmp_path.name}, 5 samples"
    assert seen(samples.slice(1, None)) == expected[1:]


def test_a_fixed_batch_overrides_and_leaves_the_rest_out(tmp_path: Path) -> None:
    shades(tmp_path, 5)
    fixed = InputSpec("x", F32, (2, 3, 4, 4))
    samples = open_samples(tmp_path, [fixed], preprocess={"scale": 1}, batch_size=4)
    assert seen(samples) == [[0, 1], [2, 3]]
    assert samples.description.endswith(", 4 samples")
    many = InputSpec("x", F32, (8, 3, 4, 4))
    assert "fewer images than the 8" in refused(tmp_path, [many], preprocess=NO_SETTINGS)


def test_of_more_images_than_the_limit_those_at_even_distances_are_taken(tmp_path: Path) -> None:
    shades(tmp_path, 6)
    samples = open_samples(tmp_path, [NCHW], preprocess={"scale": 1}, limit=3, batch_size=2)
    assert seen(samples) == [[0, 2], [4]]
    assert samples.description.endswith(", 3 samples")


def test_images_are_in_memory_one_at_a_time(tmp_path: Path) -> None:
    import tracemalloc

    for k in range(24):
        saved(tmp_path / f"{k}.bmp", np.full((200, 200, 3), k, np.uint8))

    def peak(limit: int) -> int:
        samples = open_samples(tmp_path, [NCHW], preprocess=NO_SETTINGS, limit=limit)
        tracemalloc.start()
        for _ in samples:
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(2)  # imports
    assert peak(24) < peak(2) + 200 * 200 * 3 * 4


def test_settings_in_a_file_elsewhere(tmp_path: Path) -> None:
    shades(tmp_path / "images", 2)
    (tmp_path / "images" / "preprocess.toml").write_text("scale = 7\n")
    (tmp_path / "mine.toml").write_text("scale = 2\n")
    samples = open_samples(tmp_path / "images", [NCHW], preprocess=tmp_path / "mine.toml")
    assert seen(samples) == [[0], [2]]


def test_npz_files_go_first_unless_settings_speak_of_images(tmp_path: Path) -> None:
    shades(tmp_path, 2)
    np.savez(tmp_path / "a.npz", x=np.full((1, 3, 4, 4), 9, np.float32))
    assert seen(open_samples(tmp_path, [NCHW])) == [[9]]
    assert len(open_samples(tmp_path, [NCHW], preprocess=NO_SETTINGS)) == 2
    (tmp_path / "preprocess.toml").touch()
    assert len(open_samples(tmp_path, [NCHW])) == 2


# What is refused, and in which words


def test_missing_settings_come_with_what_to_write(tmp_path: Path) -> None:
    shades(tmp_path, 1)
    fixed = InputSpec("x", F32, (1, 3, 224, 224))
    message = refused(tmp_path, [fixed])
    assert "holds images and no preprocess.toml; write there how the model's training" in message
    settings = message.split("such as: ")[1].split("; ")
    assert settings[:2] == ["resize = 256", "crop = 224"]
    (tmp_path / "preprocess.toml").write_text("\n".join(settings))
    assert arrays(open_samples(tmp_path, [fixed]))[0].shape == (1, 3, 224, 224)
    wide = InputSpec("x", F32, (1, 240, 320, 1))
    (tmp_path / "preprocess.toml").unlink()
    assert "such as: resize = [240, 320]; mean = 0.5; std = 0.5" in refused(tmp_path, [wide])
    pixels = InputSpec("x", np.dtype("uint8"), (1, 240, 320, 1))
    assert refused(tmp_path, [pixels]).endswith("such as: resize = [240, 320]")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reszie": 3}, "there is no setting 'reszie'; nearest: resize"),
        ({"resize": "big"}, "resize is 'big'; give the shorter side in pixels, or [height, width]"),
        ({"resize": [1, 2, 3]}, "resize is [1, 2, 3]; give the shorter"),
        ({"resize": [224]}, "resize is [224]; give the shorter"),
        ({"crop": 0}, "crop is 0; give the side in pixels"),
        ({"crop": True}, "crop is True; give the side"),
        ({"crop": 2.5}, "crop is 2.5; give the side"),
        ({"scale": 0}, "scale is 0; give a number other than 0"),
        ({"scale": "1/255"}, "scale is '1/255'; give a number"),
        ({"scale": float("nan")}, "scale is nan; give a number"),
        ({"mean": []}, "mean is []; give a number, or one for each channel"),
        ({"mean": [1, "a", 2]}, "mean is [1, 'a', 2]; give a number"),
        ({"mean": [1, 2]}, "mean has 2 numbers and the images have 3 channels; give one for each"),
        ({"std": [1, 0, 1]}, "std is [1, 0, 1]; give a number above 0"),
        ({"color": "rgb"}, 'color is \'rgb\'; give one of "RGB", "BGR", "L"'),
        ({"color": "L"}, "color is \"L\", 1 channel, and the model's input 'x' float32"),
        ({"layout": "HWC"}, 'layout is \'HWC\'; give one of "NCHW", "NHWC"'),
        ({"layout": "NHWC"}, 'layout is "NHWC" and the model\'s input'),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, settings: Any, words: str) -> None:
    shades(tmp_path, 1)
    assert refused(tmp_path, preprocess=settings).startswith(f"preprocess: {words}")


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    shades(tmp_path, 1)
    (tmp_path / "preprocess.toml").write_text("mean = [1,")
    assert "cannot read the preprocessing" in refused(tmp_path)
    assert "preprocess.toml': " in refused(tmp_path)
    message = refused(tmp_path, preprocess="nowhere.toml")
    assert "cannot read the preprocessing 'nowhere.toml': No such file" in message


def test_a_layout_that_nothing_tells(tmp_path: Path) -> None:
    shades(tmp_path, 1)
    free = InputSpec("x", F32, ("n", "a", "b", "c"))
    assert 'set layout to "NCHW" or "NHWC"' in refused(tmp_path, [free], preprocess=NO_SETTINGS)
    assert one(tmp_path, free, layout="NHWC").shape == (1, 4, 4, 3)


def test_images_that_cannot_be_decoded_are_named(tmp_path: Path) -> None:
    shades(tmp_path, 2, size=64)
    data = saved(tmp_path / "2.jpg", picture(64, 64)).read_bytes()
    (tmp_path / "2.jpg").write_bytes(data[: len(data) // 2])
    message = refused(tmp_path, preprocess=NO_SETTINGS)
    assert message.startswith("cannot decode '")
    assert "2.jpg': image file is truncated" in message
    assert message.endswith("; mend or remove the file")
    (tmp_path / "2.jpg").write_text("no image")
    assert "2.jpg': what it holds is no image" in refused(tmp_path, preprocess=NO_SETTINGS)
    (tmp_path / "2.jpg").unlink()
    png = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(png[:40] + b"\0\0\0\0" + png[44:])
    assert "cannot decode" in refused(tmp_path, preprocess=NO_SETTINGS)


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    fixed = InputSpec("x", F32, (1, 3, 224, 224))
    saved(tmp_path / "a.png", picture(224, 224))
    saved(tmp_path / "b.png", picture(200, 300))
    message = refused(tmp_path, [fixed], preprocess=NO_SETTINGS)
    assert "b.png' is 200×300 pixels (height × width) and the model takes 224×224" in message
    assert message.endswith("; set resize = 256 and crop = 224 in preprocess")
    message = refused(tmp_path, [fixed], preprocess={"crop": 224})
    assert "b.png' is 200×300 pixels" in message
    assert "before the crop to 224×224; set resize in" in message
    free = InputSpec("x", F32, ("n", 3, "h", "w"))
    assert [a.shape[2:] for a in arrays(open_samples(tmp_path, [free], preprocess={}))] == [
        (224, 224),
        (200, 300),
    ]
    message = refused(tmp_path, [free], preprocess={}, batch_size=2)
    assert "b.png' differ in size and cannot share a batch; set resize or crop" in message


def test_models_that_take_more_or_other_than_images(tmp_path: Path) -> None:
    shades(tmp_path, 1)
    ids = InputSpec("ids", np.dtype("int64"), ("n", "length"))
    for specs in ([NCHW, ids], [ids], [InputSpec("x", F32, None)], [InputSpec("x", F32, (1, 8))]):
        message = refused(tmp_path, specs, preprocess=NO_SETTINGS)
        assert "can feed only a model whose one input is float or uint8" in message
        assert message.endswith("give an .npz file, a folder of .npz files, or module:function")


def test_preprocessing_without_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3, 4, 4), np.float32))
    for source in (tmp_path, tmp_path / "a.npz"):
        message = refused(source, preprocess=NO_SETTINGS)
        assert message.startswith("preprocessing is for a folder of images, and ")


def test_without_pillow(tmp_path: Path) -> None:
    shades(tmp_path, 1)
    code = (
        "import sys; sys.modules['PIL'] = None; import numpy as np\n"
        "from onnxq.samples import InputSpec, open_samples\n"
        "spec = InputSpec('x', np.dtype('float32'), (1, 3, 4, 4))\n"
        "try: open_samples(sys.argv[1], [spec], preprocess={})\n"
        "except Exception as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("pip install 'onnxq[images]'")


# A real data set


def test_imagenet_as_the_score_reads_it(shared: Path, tmp_path: Path) -> None:
    script, data = shared / "score" / "score.py", shared / "data" / "imagenet"
    arguments = ["samples", "imagenet", tmp_path / "score.npz", "--n", "12"]
    subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True)
    rows = [r for r in csv.DictReader((data / "labels.csv").open()) if r["split"] == "calib"][:12]
    for k, row in enumerate(rows):
        (tmp_path / f"{k:02}.jpg").symlink_to(data / row["file"])
    (tmp_path / "mine.toml").write_text("crop = 224\nscale = 0.00784313725490196\nmean = 1\n")
    spec = InputSpec("x", F32, ("batch", 3, 224, 224))
    samples = open_samples(tmp_path, [spec], preprocess=tmp_path / "mine.toml", batch_size=5)
    expected = np.load(tmp_path / "score.npz")["input"]
    np.testing.assert_allclose(np.concatenate(arrays(samples)), expected, atol=2e-7)
