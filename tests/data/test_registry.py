from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from xnor_jax import data

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_hub_layout(folder, *, labels=(0, 1, 2), shapes=((28, 28),) * 3, names="abc"):
    """A data set as the hub lays it out, with whatever labels, even impossible ones."""
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
        at = table.schema.get_field_index("label")
        column = pa.chunked_array([pa.array(labels, pa.int64())])
        table = table.set_column(at, table.schema.field("label"), column)
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return pixels


def test_hub_layout_is_read_pixel_for_pixel(tmp_path):
    pixels = write_hub_layout(tmp_path / "set", labels=(2, 0, 1))
    read = data.load("mnist", tmp_path / "set")
    np.testing.assert_array_equal(
        read.train.images, np.stack(pixels["train"])[..., None]
    )
    np.testing.assert_array_equal(read.test.images, np.stack(pixels["test"])[..., None])
    np.testing.assert_array_equal(read.train.labels, [2, 0, 1])
    assert read.train.images.dtype == np.uint8
    assert read.train.labels.dtype == np.int32
    assert read.class_names == ("a", "b", "c")


def test_digits_are_built_in_and_split_once():
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
    ("labels", "said"),
    [
        ((0, 1, 3), "label 3 in row 2; expected 0 to 2"),
        ((0, -1, 2), "label -1 in row 1"),
    ],
)
def test_label_out_of_range_is_named(tmp_path, labels, said):
    write_hub_layout(tmp_path / "set", labels=labels)
    with pytest.raises(data.DataError, match=said):
        data.load("mnist", tmp_path / "set")


def test_images_of_two_sizes_are_refused(tmp_path):
    write_hub_layout(tmp_path / "set", shapes=((28, 28), (28, 28), (27, 28)))
    with pytest.raises(data.DataError, match=r"\(27, 28, 1\) in row 2"):
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


def test_no_folder_and_no_such_set():
    with pytest.raises(data.DataError, match="no folder nowhere"):
        data.load("mnist", "nowhere")
    with pytest.raises(data.DataError, match="expected one of digits, mnist"):
        data.load("imagenet22k")


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
    read = data.load(name, SHARED / folder)
    assert read.test.images.shape == (10_000, *shape)
    assert len(read.class_names) == 10
    counts = np.bincount(read.train.labels)
    assert len(counts) == 10 and counts.min() > 4_900
    if first is not None:
        assert read.train.labels[0] == first
        mean = read.train.images.mean() / 255
        assert mean == pytest.approx(read.source.mean[0], abs=1e-3)
