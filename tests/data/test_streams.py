"""Batches of pictures on disk, independent of workers, restarts and shards."""

import re
import shutil

import folders
import numpy as np
import pytest
from PIL import Image

from xnor_jax import data
from xnor_jax.data import BLANK, Augment, DataError, Fit, streams
from xnor_jax.data.streams import Shard

pytestmark = pytest.mark.usefixtures("own_cache")

FIT, CROP = Fit(16, 18), Augment(resize_crop=True, flip=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return folders.class_folders(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def dataset(root):
    return data.load("folder", root, FIT)


def read(batches, workers=0):
    with streams.reading(batches, workers) as iterator:
        return [tuple(map(np.array, batch)) for batch in iterator]


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])


def test_validation_images_are_in_path_order(root, dataset):
    assert dataset.class_names == folders.NAMES
    assert dataset.image_shape == (16, 16, 3)
    assert (dataset.train_images, dataset.test_images) == (20, 7)
    splits = list(dataset.test_splits())
    images = np.concatenate([split.images for split in splits])
    labels = np.concatenate([split.labels for split in splits])
    paths = sorted((root / "validation").rglob("*.jpg"))
    assert images.dtype == np.uint8 and labels.dtype == np.int32
    for image, label, path in zip(images, labels, paths, strict=True):
        assert folders.NAMES[label] == path.parent.name
        picture = Image.open(path)
        shorter = min(picture.size)
        size = [side * 18 // shorter for side in picture.size]
        picture = picture.resize(size, Image.Resampling.BILINEAR)
        left, top = (round((side - 16) / 2) for side in size)
        expected = picture.crop((left, top, left + 16, top + 16))
        np.testing.assert_array_equal(image, np.asarray(expected))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_batches(dataset, workers):
    batches = dataset.train_batches(6, seed=3, augment=CROP).repeat(3)
    assert len(batches) == 9
    assert_same(read(batches), read(batches, workers))


def test_restart_continues_with_the_same_batches(dataset):
    batches = dataset.train_batches(6, seed=3, augment=CROP).repeat(3)
    assert_same(read(batches)[4:], read(batches[4:]))


def test_shards_split_the_rows_of_each_batch(dataset):
    for make in (
        lambda shard: dataset.train_batches(6, seed=3, augment=CROP, shard=shard),
        lambda shard: dataset.calibration_batches(6, count=2, seed=3, shard=shard),
        lambda shard: dataset.test_batches(6, shard=shard),
    ):
        whole = read(make(Shard()).repeat(2))
        parts = zip(*(read(make(Shard(i, 3)).repeat(2)) for i in range(3)), strict=True)
        joined = [tuple(map(np.concatenate, zip(*p, strict=True))) for p in parts]
        assert_same(whole, joined)
    with pytest.raises(ValueError, match="a multiple of 4, .* got 6"):
        dataset.test_batches(6, shard=Shard(0, 4))


def test_epoch_visits_images_once_and_drops_a_random_rest(dataset):
    unaugmented = dataset.train_batches(6, seed=0, augment=Augment())
    all_images = {image.tobytes() for image in unaugmented_images(dataset)}
    assert len(all_images) == 20
    missing = []
    for epoch in range(3):
        images = np.concatenate(
            [x for x, _ in read(unaugmented.repeat(3)[3 * epoch :][:3])]
        )
        seen = {image.tobytes() for image in images}
        assert len(seen) == 18 and seen < all_images
        missing.append(all_images - seen)
    assert len({frozenset(rest) for rest in missing}) == 3


def unaugmented_images(dataset):
    rows = dataset.train_batches(1, seed=0, augment=Augment())
    return [x[0] for x, _ in read(rows)]


def test_epochs_and_seeds_draw_different_crops(dataset):
    once = read(dataset.train_batches(6, seed=3, augment=CROP).repeat(2))
    other = read(dataset.train_batches(6, seed=4, augment=CROP))
    seen = {x.tobytes() for x, _ in once} | {x.tobytes() for x, _ in other}
    assert len(seen) == 9


def test_padding_of_the_last_test_batch_is_marked(dataset):
    whole = read(dataset.test_batches(4))
    assert [x.shape for x, _ in whole] == [(4, 16, 16, 3)] * 2
    labels = np.concatenate([y for _, y in whole])
    assert (labels[:7] >= 0).all() and labels[7] == BLANK
    assert [len(y) for _, y in read(dataset.test_batches(7))] == [7]


def test_calibration_uses_training_images_with_test_crops(dataset):
    batches = dataset.calibration_batches(6, count=9, seed=0)
    assert len(batches) == 3  # all full batches of an epoch
    all_images = {image.tobytes() for image in unaugmented_images(dataset)}
    assert {image.tobytes() for x, _ in read(batches) for image in x} < all_images


def test_calibration_uses_the_same_images_in_each_epoch(dataset):
    batches = dataset.calibration_batches(6, count=2, seed=0)
    tests = dataset.test_batches(7)
    epochs = read(streams.grain.MapDataset.concatenate([batches, tests]).repeat(2))
    assert_same(epochs[:3], epochs[3:])
    other = dataset.calibration_batches(6, count=2, seed=1)
    assert not np.array_equal(read(other)[0][0], epochs[0][0])


def test_imagenet_is_evaluated_on_the_labelled_split(tmp_path):
    rows = [(folders.draw(i), i % 3) for i in range(4)]
    unlabelled = [(folders.draw(9), -1)]
    root = folders.parquet(
        tmp_path / "set", train=rows, validation=rows[::-1], test=unlabelled
    )
    dataset = data.load("imagenet", root, FIT)
    (split,) = dataset.test_splits()
    np.testing.assert_array_equal(split.labels, [0, 2, 1, 0])
    for image, (picture, _) in zip(split.images, rows[::-1], strict=True):
        picture = picture.resize((24, 18), Image.Resampling.BILINEAR)
        expected = np.asarray(picture.crop((4, 1, 20, 17)))
        np.testing.assert_array_equal(image, expected)
    (root / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match="no labels in test"):
        data.load("imagenet", root, FIT)
    (root / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match="no split validation or test; expected train"):
        data.load("imagenet", root, FIT)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
def test_image_modes_become_rgb(tmp_path, mode):
    picture = folders.draw(1, (18, 18)).convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    for number, split in enumerate(("train", "test")):
        path = tmp_path / split / "ant" / f"a.{kind.lower()}"
        path.parent.mkdir(parents=True)
        if split == "test":
            picture.save(path, kind)
        folders.draw(2 + 10 * number).save(path.with_name("b.jpg"))
        (tmp_path / split / "bee").mkdir()
        folders.draw(3 + 10 * number).save(path.parent.parent / "bee" / "c.jpg")
    (split,) = data.load("folder", tmp_path, Fit(18, 18)).test_splits()
    assert split.images.shape == (3, 18, 18, 3)
    np.testing.assert_array_equal(split.images[0], np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_named_during_training(root, tmp_path, workers):
    shutil.copytree(root, tmp_path / "set")
    bad = tmp_path / "set" / "train" / "bee" / "0004.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    dataset = data.load("folder", tmp_path / "set", FIT)
    with pytest.raises(DataError, match=re.escape(f"{bad}")) as error:
        read(dataset.train_batches(4, seed=0, augment=CROP), workers)
    assert "\n" not in str(error.value)


def break_picture(path, damage):
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[:-100], "text": b"hello"}[damage])


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_check_finds_broken_images_before_training(root, tmp_path, split, damage):
    shutil.copytree(root, tmp_path / "set")
    data.load("folder", tmp_path / "set", FIT).check()
    bad, *others = sorted((tmp_path / "set" / split).rglob("*.jpg"))
    break_picture(bad, damage)
    with pytest.raises(DataError, match=re.escape(f"{bad}")) as error:
        data.load("folder", tmp_path / "set", FIT).check()
    assert "\n" not in str(error.value) and "more" not in str(error.value)
    for other in others[:3]:
        break_picture(other, "cut")
    with pytest.raises(DataError, match=re.escape(f"{bad}") + r".* \(and 3 more\)"):
        data.load("folder", tmp_path / "set", FIT).check()


def test_missing_folder_size_or_split_is_refused(tmp_path):
    with pytest.raises(DataError, match="--data-dir"):
        data.load("folder", None, FIT)
    with pytest.raises(DataError, match="expected an image size"):
        data.load("folder", tmp_path)
    folders.class_folders(tmp_path / "set", names=("train", "other"))
    with pytest.raises(DataError, match="no split validation or test"):
        data.load("folder", tmp_path / "set", FIT)
