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
def place(tmp_path_factory):
    return folders.class_folders(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def found(place):
    return data.load("folder", place, FIT)


def read(batches, workers=0):
    with streams.reading(batches, workers) as iterator:
        return [tuple(map(np.array, batch)) for batch in iterator]


def assert_same(first, second):
    assert len(first) == len(second)
    for here, there in zip(first, second, strict=True):
        np.testing.assert_array_equal(here[0], there[0])
        np.testing.assert_array_equal(here[1], there[1])


def test_class_folders_become_the_test_images_in_order(place, found):
    assert found.class_names == folders.NAMES
    assert found.image_shape == (16, 16, 3)
    assert (found.train_images, found.test_images) == (20, 7)
    splits = list(found.test_splits())
    images = np.concatenate([split.images for split in splits])
    labels = np.concatenate([split.labels for split in splits])
    paths = sorted((place / "validation").rglob("*.jpg"))
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
def test_worker_processes_change_nothing(found, workers):
    batches = found.train_batches(6, seed=3, augment=CROP).repeat(3)
    assert len(batches) == 9
    assert_same(read(batches), read(batches, workers))


def test_a_restart_goes_on_with_the_same_batches(found):
    batches = found.train_batches(6, seed=3, augment=CROP).repeat(3)
    assert_same(read(batches)[4:], read(batches[4:]))


def test_shards_are_the_rows_of_each_batch(found):
    for make in (
        lambda shard: found.train_batches(6, seed=3, augment=CROP, shard=shard),
        lambda shard: found.calibration_batches(6, count=2, seed=3, shard=shard),
        lambda shard: found.test_batches(6, shard=shard),
    ):
        whole = read(make(Shard()).repeat(2))
        parts = zip(*(read(make(Shard(i, 3)).repeat(2)) for i in range(3)), strict=True)
        joined = [tuple(map(np.concatenate, zip(*p, strict=True))) for p in parts]
        assert_same(whole, joined)
    with pytest.raises(ValueError, match="a multiple of 4, .* got 6"):
        found.test_batches(6, shard=Shard(0, 4))


def test_an_epoch_sees_a_picture_once_and_drops_another_rest_each_time(found):
    still = found.train_batches(6, seed=0, augment=Augment())
    every = {image.tobytes() for image in still_images(found)}
    assert len(every) == 20
    missing = []
    for epoch in range(3):
        images = np.concatenate([x for x, _ in read(still.repeat(3)[3 * epoch :][:3])])
        seen = {image.tobytes() for image in images}
        assert len(seen) == 18 and seen < every
        missing.append(every - seen)
    assert len({frozenset(rest) for rest in missing}) == 3


def still_images(found):
    rows = found.train_batches(1, seed=0, augment=Augment())
    return [x[0] for x, _ in read(rows)]


def test_each_epoch_and_each_seed_draws_anew(found):
    once = read(found.train_batches(6, seed=3, augment=CROP).repeat(2))
    other = read(found.train_batches(6, seed=4, augment=CROP))
    seen = {x.tobytes() for x, _ in once} | {x.tobytes() for x, _ in other}
    assert len(seen) == 9


def test_what_fills_the_last_test_batch_is_marked(found):
    whole = read(found.test_batches(4))
    assert [x.shape for x, _ in whole] == [(4, 16, 16, 3)] * 2
    labels = np.concatenate([y for _, y in whole])
    assert (labels[:7] >= 0).all() and labels[7] == BLANK
    assert [len(y) for _, y in read(found.test_batches(7))] == [7]


def test_calibration_sees_training_pictures_as_the_test_sees_pictures(found):
    batches = found.calibration_batches(6, count=9, seed=0)
    assert len(batches) == 3  # all full batches of an epoch
    every = {image.tobytes() for image in still_images(found)}
    assert {image.tobytes() for x, _ in read(batches) for image in x} < every


def test_the_hubs_imagenet_is_evaluated_where_labels_are(tmp_path):
    rows = [(folders.draw(i), i % 3) for i in range(4)]
    secret = [(folders.draw(9), -1)]
    place = folders.parquet(
        tmp_path / "set", train=rows, validation=rows[::-1], test=secret
    )
    found = data.load("imagenet", place, FIT)
    (split,) = found.test_splits()
    np.testing.assert_array_equal(split.labels, [0, 2, 1, 0])
    for image, (picture, _) in zip(split.images, rows[::-1], strict=True):
        picture = picture.resize((24, 18), Image.Resampling.BILINEAR)
        expected = np.asarray(picture.crop((4, 1, 20, 17)))
        np.testing.assert_array_equal(image, expected)
    (place / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match="no labels in test"):
        data.load("imagenet", place, FIT)
    (place / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match="no split validation or test; expected train"):
        data.load("imagenet", place, FIT)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
def test_every_kind_of_picture_becomes_colour(tmp_path, mode):
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
def test_a_file_that_is_no_picture_is_named(place, tmp_path, workers):
    shutil.copytree(place, tmp_path / "set")
    bad = tmp_path / "set" / "train" / "bee" / "0004.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    found = data.load("folder", tmp_path / "set", FIT)
    with pytest.raises(DataError, match=re.escape(f"{bad}")) as error:
        read(found.train_batches(4, seed=0, augment=CROP), workers)
    assert "\n" not in str(error.value)


def break_picture(path, how):
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[:-100], "text": b"hello"}[how])


@pytest.mark.parametrize("how", ["empty", "cut", "text"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_broken_picture_is_found_before_training(place, tmp_path, split, how):
    shutil.copytree(place, tmp_path / "set")
    data.load("folder", tmp_path / "set", FIT).check()
    bad, *others = sorted((tmp_path / "set" / split).rglob("*.jpg"))
    break_picture(bad, how)
    with pytest.raises(DataError, match=re.escape(f"{bad}")) as error:
        data.load("folder", tmp_path / "set", FIT).check()
    assert "\n" not in str(error.value) and "more" not in str(error.value)
    for other in others[:3]:
        break_picture(other, "cut")
    with pytest.raises(DataError, match=re.escape(f"{bad}") + r".* \(and 3 more\)"):
        data.load("folder", tmp_path / "set", FIT).check()


def test_what_is_no_such_folder_is_told(tmp_path):
    with pytest.raises(DataError, match="--data-dir"):
        data.load("folder", None, FIT)
    with pytest.raises(DataError, match="expected an image size"):
        data.load("folder", tmp_path)
    folders.class_folders(tmp_path / "set", names=("train", "other"))
    with pytest.raises(DataError, match="no split validation or test"):
        data.load("folder", tmp_path / "set", FIT)
