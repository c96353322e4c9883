"""Class folders: splits, classes, pictures, and errors that name the cause."""

import os
import re
import shutil

import folders
import numpy as np
import pytest

from xnor_jax import data
from xnor_jax.data import DataError, Fit

FIT = Fit(16, 18)


def load(root):
    return data.load("folder", root, FIT)


def paths(rows):
    return [row.name for row in rows]


@pytest.fixture
def root(tmp_path):
    return folders.class_folders(tmp_path / "set")


def fill(folder, *numbers, suffix="jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        folders.draw(number).save(folder / f"{number}.{suffix}")


@pytest.mark.parametrize(
    "classes",
    [
        ("train", "bullet_train", "cat"),
        ("val", "test", "validation"),
        ("test-tube", "dev", "eval", "training"),
        ("__background__", "a b", "ä", "x.y", "v[2]*"),
    ],
)
@pytest.mark.parametrize("held_out", ["validation", "val", "test"])
def test_top_folder_determines_the_split(tmp_path, classes, held_out):
    root, number = tmp_path / "train [v2] test" / ".hidden" / "set*", 0
    for split, count in (("train", 3), (held_out, 2)):
        for name in classes:
            fill(root / split / name, *range(number, number := number + count))
    found = load(root)
    assert found.class_names == tuple(sorted(classes))
    for split, rows in (("train", found.train), (held_out, found.test)):
        assert paths(rows) == sorted(map(str, (root / split).rglob("*.jpg")))
        for row in rows:
            assert (
                os.path.basename(os.path.dirname(row.name))
                == sorted(classes)[row.label]
            )
    assert len(found.train) == 3 * len(classes) and len(found.test) == 2 * len(classes)
    (split,) = found.test_splits()
    np.testing.assert_array_equal(split.labels, found.test.labels)


def test_pillow_suffixes_are_accepted(tmp_path):
    expected = []
    for split, first in (("train", 0), ("validation", 100)):
        for number, suffix in enumerate(
            ("avif", "jfif", "tif", "JPG", "Jpeg", "TIFF", "jp2", "webp", "tga", "ppm")
        ):
            fill(tmp_path / split / "ant", first + number, suffix=suffix)
            expected.append(tmp_path / split / "ant" / f"{first + number}.{suffix}")
        fill(tmp_path / split / "bee", first + 50)
    found = load(tmp_path)
    found.check()
    assert len(found.train) == len(found.test) == 11
    assert set(map(str, expected)) < {*paths(found.train), *paths(found.test)}
    (split,) = found.test_splits()
    assert split.images.std((1, 2, 3)).min() > 10


def test_links_are_followed_and_hidden_files_ignored(root, tmp_path):
    before = load(root)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(root / "train" / "bee", elsewhere / "bees")
    (root / "train" / "bee").symlink_to(elsewhere / "bees", target_is_directory=True)
    picture = root / "train" / "ant" / "0003.jpg"
    shutil.move(picture, elsewhere / "3.jpg")
    picture.symlink_to(elsewhere / "3.jpg")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0003.jpg"):
        (picture.parent / name).write_text("left behind")
    fill(root / "train" / ".ipynb_checkpoints", 5)
    fill(picture.parent / ".ipynb_checkpoints", 5)
    for name in ("metadata.csv", "README.md"):
        (root / name).write_text("file_name,label\n")
        (root / "train" / name).write_text("file_name,label\n")
    found = load(root)
    assert found.class_names == before.class_names
    for rows, expected in ((found.train, before.train), (found.test, before.test)):
        assert paths(rows) == paths(expected)
        np.testing.assert_array_equal(rows.labels, expected.labels)


def test_empty_folder_marks_an_untested_class(root):
    shutil.rmtree(root / "validation" / "cat")
    with pytest.raises(DataError, match="class cat, which is missing in .*validation;"):
        load(root)
    (root / "validation" / "cat").mkdir()
    found = load(root)
    assert found.class_names == folders.NAMES and 2 not in found.test.labels


def deeper(root):
    fill(root / "train" / "ant" / "more", 70)
    return "ant/more is nested too deep; expected train/CLASS/PICTURE"


def too_high(root):
    fill(root / "train", 70)
    return "train/70.jpg is not in a class folder; expected train/CLASS/PICTURE"


def foreign_suffix(root):
    (root / "train" / "ant" / "1.heic").write_bytes(b"ftypheic")
    return "ant/1.heic: expected the suffix of a picture .*, got '.heic'"


def a_table_among_pictures(root):
    (root / "validation" / "ant" / "metadata.csv").write_text("a,b\n")
    return "validation/ant/metadata.csv: expected the suffix of a picture"


def dangling(root):
    (root / "train" / "ant" / "1.jpg").symlink_to(root / "nowhere.jpg")
    return "ant/1.jpg is a broken symbolic link"


def dangling_class(root):
    (root / "train" / "dog").symlink_to(root / "nowhere")
    return "train/dog is a broken symbolic link"


def pipe(root):
    os.mkfifo(root / "train" / "ant" / "1.jpg")
    return "ant/1.jpg is not a regular file"


def empty_class(root):
    (root / "train" / "dog").mkdir()
    (root / "validation" / "dog").mkdir()
    return "train/dog has no pictures"


def a_class_of_one_split(root):
    fill(root / "validation" / "dog", 70)
    return "validation has a class dog, which is missing in .*train"


def one_class(root):
    for split in ("train", "validation"):
        for name in ("bee", "cat"):
            shutil.rmtree(root / split / name)
    return r"train has 1 class folder \(ant\); expected at least two"


def no_class(root):
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    return "train has 0 class folders; expected at least two"


def no_test_pictures(root):
    for path in (root / "validation").rglob("*.jpg"):
        path.unlink()
    return "validation has no pictures"


def two_words_for_one(root):
    shutil.copytree(root / "validation", root / "val")
    return "has both validation and val; expected one"


def another_word(root):
    (root / "train").rename(root / "training")
    return "has no folder train; .* found training, validation"


def a_name_that_is_no_text(root):
    fill(root / "train" / os.fsdecode(b"caf\xe9"), 70)
    return r"caf.udce9'; expected a name of at most 200 printable characters in UTF-8"


def a_name_of_two_lines(root):
    fill(root / "train" / "a\nb", 70)
    return r"a class folder 'a.nb'; expected a name"


def the_same_bytes(root):
    picture = next((root / "train" / "bee").iterdir())
    shutil.copy(picture, root / "validation" / "ant" / "other.jpg")
    return f"{re.escape(str(picture))} and .*ant/other.jpg are the same picture;"


def the_same_file(root):
    picture = root / "train" / "bee" / "0004.jpg"
    (root / "validation" / "bee" / "0004.jpg").symlink_to(picture)
    return "train/bee/0004.jpg and .*validation/bee/0004.jpg are the same picture;"


def the_same_folder(root):
    shutil.rmtree(root / "validation")
    (root / "validation").symlink_to(root / "train")
    return r"are the same picture \(and 19 more\)"


@pytest.mark.parametrize(
    "change",
    [
        deeper,
        too_high,
        foreign_suffix,
        a_table_among_pictures,
        dangling,
        dangling_class,
        pipe,
        empty_class,
        a_class_of_one_split,
        one_class,
        no_class,
        no_test_pictures,
        two_words_for_one,
        another_word,
        a_name_that_is_no_text,
        a_name_of_two_lines,
        the_same_bytes,
        the_same_file,
        the_same_folder,
    ],
    ids=lambda change: change.__name__,
)
def test_invalid_folders_are_named_in_one_line(root, change):
    message = change(root)
    with pytest.raises(DataError, match=message) as error:
        load(root)
    assert "\n" not in str(error.value)


def test_files_of_equal_size_and_middle_are_distinct(tmp_path):
    number = 0
    for split in ("train", "validation"):
        for name in ("ant", "bee"):
            for _ in range(3):
                fill(tmp_path / split / name, number, suffix="bmp")
                path = tmp_path / split / name / f"{number}.bmp"
                content = bytearray(path.read_bytes())
                content[500:-20] = bytes(len(content) - 520)
                path.write_bytes(content)
                number += 1
    found = load(tmp_path)
    assert (found.train_images, found.test_images) == (6, 6)


def test_in_memory_data_set_reads_class_folders(tmp_path):
    expected = {}
    for split, first in (("train", 0), ("test", 10)):
        for label, name in enumerate(("one", "two")):
            for number in range(first + 4 * label, first + 4 * label + 2):
                picture = folders.draw(number, (28, 28), "L")
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                picture.save(tmp_path / split / name / f"{number}.png")
                expected.setdefault(split, []).append((np.asarray(picture), label))
    found = data.load("mnist", tmp_path)
    for split in ("train", "test"):
        images, labels = getattr(found, split)
        assert labels.tolist() == [label for _, label in expected[split]]
        for image, (pixels, _) in zip(images, expected[split], strict=True):
            np.testing.assert_array_equal(image[..., 0], pixels)


def unsplit(folder, counts):
    """Class folders without a split; `counts` has the number of pictures per class."""
    first = 0
    for name, count in counts.items():
        fill(folder / name, *range(first, first + count))
        first += count
    return folder


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_holdout_is_a_seeded_share_of_each_class(tmp_path, share):
    counts = {"ant": 11, "train": 2, "val": 7}
    root = unsplit(tmp_path, counts)

    def load_seed(seed):
        return data.load("folder", root, FIT, data.Holdout(share, seed))

    found, again, other = load_seed(3), load_seed(3), load_seed(4)
    assert found.class_names == tuple(counts)
    train, test = paths(found.train), paths(found.test)
    assert sorted(train + test) == sorted(map(str, root.rglob("*.jpg")))
    for label, (name, count) in enumerate(counts.items()):
        held = [path for path in test if os.path.dirname(path) == str(root / name)]
        assert len(held) == min(max(round(share * count), 1), count - 1)
        assert (found.test.labels == label).sum() == len(held)
    assert (paths(again.train), paths(again.test)) == (train, test)
    if share == 0.2:
        assert paths(other.test) != test


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: None, None),
        (
            lambda root: (root / "note.txt").write_text(""),
            None,
        ),
        (lambda root: fill(root / "bee", 50), r"bee has 1 picture; .*at least two"),
        (lambda root: (root / "bee").mkdir(), r"bee has 0 pictures"),
        (lambda root: fill(root, 50), r"50.jpg is not in a cl.* CLASS/PICTURE$"),
        (lambda root: fill(root / "ant" / "deep", 50), "deep is nested too deep"),
        (lambda root: shutil.rmtree(root / "cat"), "1 class folder; .*at least two"),
        (
            lambda root: shutil.copy(root / "ant" / "0.jpg", root / "cat" / "a.jpg"),
            "the same picture",
        ),
    ],
)
def test_invalid_unsplit_folders_are_refused(tmp_path, change, message):
    root = unsplit(tmp_path, {"ant": 2, "cat": 2})
    change(root)
    holdout = data.Holdout(0.5)
    if message is None:
        assert len(data.load("folder", root, FIT, holdout).train) == 2
        return
    if message == "the same picture":
        # Whether the two fall into one split depends on the seed.
        seeds, refusals = range(12), 0
        for seed in seeds:
            try:
                data.load("folder", root, FIT, data.Holdout(0.5, seed))
            except DataError as error:
                assert message in str(error)
                refusals += 1
        assert 0 < refusals < 12
        return
    with pytest.raises(DataError, match=message):
        data.load("folder", root, FIT, holdout)


def test_holdout_of_a_split_data_set_is_refused(root):
    with pytest.raises(DataError, match="already has a split: .*train .*none with"):
        data.load("folder", root, FIT, data.Holdout(0.2))
    with pytest.raises(DataError, match="mnist has a test split"):
        data.load("mnist", root, holdout=data.Holdout(0.2))
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="expected 0 < share < 1"):
            data.Holdout(share)


def test_error_suggests_the_intended_folder(tmp_path, root):
    with pytest.raises(DataError, match=rf"; did you mean {root}\?$"):
        load(root.parent)
    plain = unsplit(tmp_path / "up" / "pictures", {"ant": 2, "cat": 2})
    with pytest.raises(DataError, match=r"--validation-share 0\.2"):
        load(plain)
    with pytest.raises(DataError, match=rf"; did you mean {plain}\?$"):
        data.load("folder", plain.parent, FIT, data.Holdout(0.2))
    with pytest.raises(DataError, match=rf"; did you mean {plain}\?$"):
        load(plain.parent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found nothing$"):
        load(tmp_path / "empty")
