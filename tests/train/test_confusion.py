import io

import numpy as np
import pytest
from rich.console import Console

from xnor_jax.data import Dataset, Source, Split
from xnor_jax.train import confusion, figures
from xnor_jax.train.folder import RunWarning

NAMES = ("ant", "a bee", "cat")


def rendered_lines(table):
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    lines = console.file.getvalue().splitlines()
    return [" ".join(line.split()) for line in lines]


def test_rows_are_labels_and_columns_are_predictions():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (101, 4, 5, 1)).astype(np.uint8)
    labels = rng.integers(0, 3, 101).astype(np.int32)
    guesses = rng.integers(0, 3, 101)
    dataset = Dataset(
        Split(pixels, labels),
        Split(pixels, labels),
        NAMES,
        Source("x", (0.5,), (0.5,), (4, 5, 1)),
    )

    def logits(images):
        assert (images == pixels).all()
        return np.eye(3)[guesses]

    counts = confusion.matrix(logits, dataset)
    for true in range(3):
        for predicted in range(3):
            count = ((labels == true) & (guesses == predicted)).sum()
            assert counts[true, predicted] == count


def test_table_shows_a_matrix_or_the_worst_pairs():
    counts = np.array([[3, 1, 0], [0, 0, 0], [2, 0, 6]])
    lines = rendered_lines(confusion.table(counts, NAMES))
    assert lines[0] == "class ant a bee cat right, %"
    assert lines[2:] == ["ant 3 1 · 75.0", "a bee · · ·", "cat 2 · 6 75.0"]
    alike = [f"one long name, {name}" for name in NAMES]
    lines = rendered_lines(confusion.table(counts, alike))
    assert lines[0] == "class 1 2 3 right, %"
    assert lines[2] == "1 one long name, ant 3 1 · 75.0"
    many = np.diag(np.full(40, 9))
    many[7, 11], many[2, 3] = 5, 1
    lines = rendered_lines(confusion.table(many, [f"c{i}" for i in range(40)]))
    assert lines[2:] == ["c7 c11 5 35.7", "c2 c3 1 10.0"]


def test_picture_fits_any_names(tmp_path):
    counts = np.eye(3, dtype=int)
    names = ["n" * 60, "$5 or 10$ and $", "蝶"]
    figure = confusion.picture(counts, names, "a $ b $")
    with pytest.warns(RunWarning, match="font lacks characters") as caught:
        figures.save(figure, tmp_path / "confusion.png")
    assert len(caught) == 1
    window, whole = figure.axes[0].get_tightbbox(), figure.bbox
    assert window.x0 >= whole.x0 and window.y0 >= whole.y0


@pytest.mark.parametrize("classes", [3, 40])
def test_picture_shows_percentages_of_each_row(classes):
    counts = np.random.default_rng(0).integers(0, 9, (classes, classes))
    counts[1] = 0  # a class without test images
    figure = confusion.picture(counts, [str(i) for i in range(classes)], "title")
    (image,) = figure.axes[0].get_images()
    percentages = np.asarray(image.get_array())
    assert percentages[1].max() == 0 and np.allclose(
        np.delete(percentages, 1, 0).sum(1), 100
    )
