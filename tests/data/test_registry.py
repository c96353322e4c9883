import logging
import shutil
from pathlib import Path

import datasets
import folders
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from xnor_jax import data

pytestmark = pytest.mark.usefixtures("own_cache")

SHARED = Path(__file__).parents[3] / "shared" / "data"


def write_hub_layout(folder, *, labels=(0, 1, 2), shapes=((28, 28),) * 3, names="abc"):
    """Write a data set in the hub's layout, with any labels, even out of range."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    pixels = {}
    for split in ("train", "test"):
        pixels[split] = [rng.integers(0, 256, s).astype(np.uint8) for s in shapes]
        features = datasets.Features(
            image=datasets.Image(), label=datasets.ClassLabel(names=list(names))
        )
        table = datasets.Dataset.from_dict(
            {
                "image": [Image.fromarray(p) for p in pixels[split]],
                "label": [0] * len(labels),
            },
            features=features,
        ).data.table
        index = table.schema.get_field_index("label")
        column = pa.chunked_array([pa.array(labels, pa.int64())])
        table = table.set_column(index, table.schema.field("label"), column)
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return pixels


def test_hub_layout_is_read_pixel_for_pixel(tmp_path):
    pixels = write_hub_layout(tmp_path / "set", labels=(2, 0, 1))
    dataset = data.load("mnist", tmp_path / "set")
    np.testing.assert_array_equal(
        dataset.train.images, np.stack(pixels["train"])[..., None]
    )
    np.testing.assert_array_equal(
        dataset.test.images, np.stack(pixels["test"])[..., None]
    )
    np.testing.assert_array_equal(dataset.train.labels, [2, 0, 1])
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.labels.dtype == np.int32
    assert dataset.class_names == ("a", "b", "c")


def test_digits_are_built_in_with_a_fixed_split():
    first, second = data.load("digits"), data.load("digits")
    assert first.train.images.shape == (1437, 28, 28, 1)
    assert first.test.images.shape == (360, 28, 28, 1)
    assert first.train.images.max() == 255
    np.testing.assert_array_equal(first.test.images, second.test.images)
    counts = np.bincount(first.test.labels)
    assert counts.min() >= 34 and len(counts) == 10
    with pytest.raises(data.DataError, match="built in"):
        data.load("digits", "somewhere")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((0, 1, 3), "label 3 in row 2; expected 0 to 2"),
        ((0, -1, 2), "label -1 in row 1"),
    ],
)
def test_label_out_of_range_is_named(tmp_path, labels, message):
    write_hub_layout(tmp_path / "set", labels=labels)
    with pytest.raises(data.DataError, match=message):
        data.load("mnist", tmp_path / "set")


def test_images_of_two_sizes_are_refused(tmp_path):
    write_hub_layout(tmp_path / "set", shapes=((28, 28), (28, 28), (27, 28)))
    with pytest.raises(data.DataError, match=r"row 2 has shape \(27, 28, 1\)"):
        data.load("mnist", tmp_path / "set")


def test_grey_images_for_a_colour_set_are_refused(tmp_path):
    write_hub_layout(tmp_path / "set")
    with pytest.raises(data.DataError, match="3 channels"):
        data.load("cifar10", tmp_path / "set")


def test_missing_split_is_named(tmp_path):
    write_hub_layout(tmp_path / "set")
    (tmp_path / "set" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(data.DataError, match="no split test"):
        data.load("mnist", tmp_path / "set")


def test_damaged_file_is_one_line(tmp_path):
    write_hub_layout(tmp_path / "set")
    file = tmp_path / "set" / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(data.DataError, match="cannot read .*check the files") as error:
        data.load("mnist", tmp_path / "set")
    assert "\n" not in str(error.value)


def rewrite(path, change):
    """Change the rows of a Parquet file, and keep its metadata."""
    table = pq.read_table(path)
    pq.write_table(change(table), path)


def write_with(folder, label=None, picture=None, names=None):
    """Write a set whose test split has other labels, pictures or class names."""
    write_hub_layout(folder)
    if names:
        (folder / "test-00000-of-00001.parquet").unlink()
        other = folder.parent / "other"
        write_hub_layout(other, names=names)
        (other / "test-00000-of-00001.parquet").rename(
            folder / "test-00000-of-00001.parquet"
        )
    path = folder / "test-00000-of-00001.parquet"
    if label is not None:
        index = 1
        rewrite(
            path,
            lambda t: t.set_column(index, t.schema.field("label"), pa.array(label)),
        )
    if picture is not None:
        kind = pq.read_schema(path).field("image").type

        def change(table):
            rows = table["image"].to_pylist()
            rows[1:] = [{"bytes": b, "path": None} for b in picture]
            field = table.schema.field("image")
            return table.set_column(0, field, pa.array(rows, kind))

        rewrite(path, change)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": pa.array([0, None, 1], pa.int64())}, "test has no label in row 1"),
        ({"names": "acb"}, "other columns or class names than"),
        ({"names": "abcd"}, "other columns or class names than"),
        ({"picture": [b"", b""]}, "test, row 1 has no picture"),
        ({"picture": [b"x" * 99, b"y" * 99]}, r"test, row 1 is not an im.*and 1 more"),
    ],
)
def test_invalid_rows_and_columns_are_one_line_errors(tmp_path, changed, message):
    write_with(tmp_path / "set", **changed)
    with pytest.raises(data.DataError, match=message) as error:
        data.load("mnist", tmp_path / "set")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["none", "text", "plain integers"])
def test_missing_class_labels_are_a_one_line_error(tmp_path, kind):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        columns = {"image": [Image.fromarray(rng.integers(0, 9, (4, 4), np.uint8))] * 3}
        features = {"image": datasets.Image()}
        if kind != "none":
            columns["label"] = ["a", "b", "c"] if kind == "text" else [0, 1, 2]
            dtype = "string" if kind == "text" else "int64"
            features["label"] = datasets.Value(dtype)
        datasets.Dataset.from_dict(
            columns, features=datasets.Features(features)
        ).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    message = "has 0 class label columns; expected one, found columns image"
    with pytest.raises(data.DataError, match=message):
        data.load("mnist", tmp_path)


def test_split_is_the_file_prefix_or_folder(tmp_path):
    pixels = write_hub_layout(tmp_path / "set", labels=(2, 0, 1))
    source = tmp_path / "set"
    root = tmp_path / "test [v2] train" / ".x" / "mnist"
    (root / "train").mkdir(parents=True)
    (root / "test").mkdir()
    for split in ("train", "test"):
        (source / f"{split}-00000-of-00001.parquet").rename(
            root / split / "0000.parquet"
        )
    for folder in (root, root.parent):
        dataset = data.load("mnist", folder)
        for split in ("train", "test"):
            images = getattr(dataset, split).images[..., 0]
            np.testing.assert_array_equal(images, np.stack(pixels[split]))
    write_hub_layout(root.parent / "another")
    with pytest.raises(data.DataError, match="has two sets: t.* give one of these"):
        data.load("mnist", root.parent)


@pytest.mark.parametrize("mode", ["P", "1", "RGB", "RGBA", "I;16"])
def test_image_modes_are_decoded_or_refused(tmp_path, mode):
    grey = np.random.default_rng(0).integers(0, 2, (6, 28, 28)).astype(np.uint8) * 255
    for split, images in (("train", grey[:4]), ("test", grey[4:])):
        for number, pixels in enumerate(images):
            folder = tmp_path / split / str(number % 2)
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(pixels)
            if mode == "I;16":
                picture = Image.fromarray(pixels.astype(np.uint16) * 257)
            elif mode == "P":
                # Palette indices that are not the brightness.
                picture = Image.fromarray(1 - pixels // 255, "P")
                picture.putpalette([255] * 3 + [0] * 3)
            else:
                picture = picture.convert(mode)
            picture.save(folder / f"{number}.png")
    if mode.startswith("RGB"):
        with pytest.raises(data.DataError, match="expected 1 channel and"):
            data.load("mnist", tmp_path)
    else:
        dataset = data.load("mnist", tmp_path)
        order = [0, 2, 1, 3]
        np.testing.assert_array_equal(dataset.train.images[..., 0], grey[:4][order])
        np.testing.assert_array_equal(dataset.test.images[..., 0], grey[4:])


def test_missing_folder_and_unknown_name_are_refused(tmp_path):
    with pytest.raises(data.DataError, match="has no folder train; .* found nothing"):
        data.load("mnist", tmp_path)
    with pytest.raises(data.DataError, match="no folder nowhere"):
        data.load("mnist", "nowhere")
    with pytest.raises(data.DataError, match="expected one of digits, mnist"):
        data.load("imagenet22k")


def test_unreachable_hub_is_one_line(monkeypatch):
    warns = []

    def load(name):
        warns.append(logging.getLogger("huggingface_hub").isEnabledFor(logging.WARNING))
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(data.DataError, match="^cannot read ylecun/mnist .*--data-dir$"):
        data.load("mnist")
    assert warns == [False]  # huggingface_hub would warn of each retry


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folder", "shape", "first"),
    [
        ("mnist", "mnist", (28, 28, 1), 5),
        ("cifar10", "cifar10", (32, 32, 3), None),
    ],
)
def test_shared_sets(name, folder, shape, first):
    if not (SHARED / folder).is_dir():
        pytest.skip("the shared data sets are not beside this checkout")
    dataset = data.load(name, SHARED / folder)
    assert dataset.test.images.shape == (10_000, *shape)
    assert len(dataset.class_names) == 10
    counts = np.bincount(dataset.train.labels)
    assert len(counts) == 10 and counts.min() > 4_900
    if first is not None:
        assert dataset.train.labels[0] == first
        mean = dataset.train.images.mean() / 255
        assert mean == pytest.approx(dataset.source.mean[0], abs=1e-3)


def without_train(every, only):
    """Check a set that was loaded without its training split."""
    assert (every.train_images > 0, only.train_images) == (True, 0)
    assert (only.class_names, only.image_shape) == (
        every.class_names,
        every.image_shape,
    )
    assert (only.source, only.test_images) == (every.source, every.test_images)
    for one, other in zip(only.test_splits(), every.test_splits(), strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)


def test_only_the_test_split_is_read_where_asked(tmp_path):
    fit, root = data.Fit(16, 18), tmp_path / "set"
    write_hub_layout(root, labels=(2, 0, 1))
    every = data.load("mnist", root)
    (root / "train-00000-of-00001.parquet").write_text("damaged")
    without_train(every, data.load("mnist", root, train=False))
    (root / "train-00000-of-00001.parquet").unlink()
    without_train(every, data.load("mnist", root, train=False))
    (root / "test-00000-of-00001.parquet").rename(root / "other.parquet")
    message = "has no split test; expected test, found other.parquet$"
    with pytest.raises(data.DataError, match=message):
        data.load("mnist", root, train=False)

    grey = np.random.default_rng(1).integers(0, 256, (8, 28, 28)).astype(np.uint8)
    for at, pixels in enumerate(grey):
        folder = tmp_path / "grey" / ("train", "test")[at > 4] / "ab"[at % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{at}.png")
    every = data.load("mnist", tmp_path / "grey")
    for path in (tmp_path / "grey" / "train").rglob("*.png"):
        path.write_text("damaged")
    without_train(every, data.load("mnist", tmp_path / "grey", train=False))

    root = folders.class_folders(tmp_path / "folders")
    every = data.load("folder", root, fit)
    holdout = data.Holdout(0.3, 5)
    unsplit = data.load("folder", root / "validation", fit, holdout)
    part = data.load("folder", root / "validation", fit, holdout, train=False)
    without_train(unsplit, part)
    without_train(every, data.load("folder", root, fit, train=False))
    shutil.rmtree(root / "train")
    without_train(every, data.load("folder", root, fit, train=False))
    with pytest.raises(data.DataError, match="has no folder train"):
        data.load("folder", root, fit)
    message = "no folder validation; .*, found ant, .* give --validation-share and --se"
    with pytest.raises(data.DataError, match=message):
        data.load("folder", root / "validation", fit, train=False)

    images = np.repeat(grey[..., None], 3, -1)
    for dataset in ("digits", lambda: (images, range(8), images[:3], range(3))):
        without_train(data.load(dataset), data.load(dataset, train=False))
