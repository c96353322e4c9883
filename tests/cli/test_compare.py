"""The `compare` command."""

import json
import os
import subprocess
import sys

import pytest
from commands import run_failing, run_ok
from matplotlib.image import imread

from xnor_jax.train import compare
from xnor_jax.train import folder as folders
from xnor_jax.train import recipe as recipes


def write(folder, accuracies, *, recipe="digits-lenet5", **fields):
    """Write the folder of a run with these test accuracies, one per epoch."""
    folder.mkdir(parents=True)
    data = {
        "image_shape": [28, 28, 1],
        "class_names": ["a", "b"],
        "train_images": 9,
    }
    settings = recipes.to_json(recipes.get(recipe)) | fields
    text = json.dumps({"name": recipe, **settings, "data": data})
    (folder / "recipe.json").write_text(text)
    epochs = [
        dict.fromkeys(folders.METRICS, 0.25)
        | {"epoch": epoch, "test_accuracy": accuracy}
        for epoch, accuracy in enumerate(accuracies, 1)
    ]
    folders.write_metrics(folder, epochs)
    return folder


def test_seeds_share_a_row_labelled_by_its_settings(tmp_path, capsys):
    seeds = tmp_path / "many"
    for seed, last in ((0, 0.9), (4, 0.92), (7, 0.97)):
        write(seeds / f"seed{seed}", [0.95, last], seed=seed)
    folders.write_seeds(seeds, [0, 4, 7, 9])  # the last has not started
    other = write(tmp_path / "other", [0.5, 0.6, 0.7], rule="paper")
    plot = tmp_path / "curves.png"
    out = run_ok(capsys, "compare", seeds, other, "-o", plot)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "corrected 3 2 93.00 ± 3.61 95.67 ± 1.15 25.00 ± 0.00" in lines
    assert "paper 1 3 70.00 70.00 25.00" in lines
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert imread(plot).shape[1] > 1000
    labels = [group.label for group in compare.read([seeds, other])]
    assert labels == ["corrected", "paper"]
    axis = compare.picture(compare.read([seeds, other])).axes[0]
    errors = axis.get_lines()[0].get_ydata()
    assert errors == pytest.approx([5, 7])  # means over the seeds


def test_long_labels_leave_the_legend_to_folders(tmp_path):
    others = {"learning_rate": 0.125, "weight_decay": 0.25, "label_smoothing": 0.5}
    runs = [
        write(tmp_path / "a", [0.5, 0.6]),
        write(tmp_path / "long $ name $", [0.5] * 12, **others),
        write(tmp_path / "float", [0.5, 0.9], binary=False),
    ]
    groups = compare.read(runs)
    figure = compare.picture(groups)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    names = ["a", r"long \$ name \$", "float"]
    assert [text.get_text() for text in legend.get_texts()] == names
    box, whole = legend.get_window_extent(), figure.bbox
    assert box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0
    assert all(tick == int(tick) for tick in figure.axes[0].get_xticks())
    # The signs of the float twin do not count; the others keep their colours.
    curves = [axis.get_lines() for axis in figure.axes]
    assert [len(lines) for lines in curves] == [3, 3, 2]
    assert curves[0][1].get_color() == curves[2][1].get_color()
    assert compare.picture(groups[2:]).axes[2].get_lines() == []
    (row, *_) = compare.table(groups).columns[0].cells
    assert (
        row == "a: binary, learning_rate 0.01, weight_decay 1e-05, no label_smoothing"
    )


def test_a_name_stands_for_the_settings_of_its_recipe(tmp_path):
    runs = [
        write(tmp_path / "a", [0.5], epochs=9),
        write(tmp_path / "b", [0.5], recipe="cifar10-resnet20", mixup=True),
        write(tmp_path / "c", [0.5], recipe="cifar10-resnet20", mixup=True, seed=3),
    ]
    groups = compare.read(runs)
    assert [group.label for group in groups] == [
        "digits-lenet5, epochs 9",
        "cifar10-resnet20, mixup",
    ]
    assert [group.place for group in groups] == ["a", "b and 1 more"]


def test_runs_with_unknown_options_and_parts_are_compared(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "120")
    plain = write(tmp_path / "plain", [0.5], seed=1)
    off = write(tmp_path / "off", [0.7], seed=2, average=0.0)
    averaged = write(tmp_path / "averaged", [0.9], average=0.999)
    custom = write(tmp_path / "custom", [0.8], rule="not_here:rule")
    plot = tmp_path / "curves.png"
    out = run_ok(capsys, "compare", plain, averaged, off, custom, "-o", plot)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "corrected 2 1 60.00 ± 14.14 60.00 ± 14.14 25.00 ± 0.00" in lines
    assert "corrected, average 0.999 1 1 90.00 90.00 25.00" in lines
    assert "not_here:rule 1 1 80.00 80.00 25.00" in lines
    labels = [group.label for group in compare.read([plain, averaged])]
    assert labels == [str(plain), "average 0.999"]
    code, err = run_failing(capsys, "evaluate", averaged)
    assert code == 1 and f"{averaged} holds a run with average 0.999, an option" in err


def test_figures_do_not_need_a_notebooks_backend(tmp_path):
    # Jupyter gives commands its kernel's backend, which may not be installed here.
    run, plot = write(tmp_path / "run", [0.5]), tmp_path / "curves.png"
    done = subprocess.run(
        [sys.executable, "-m", "xnor_jax.cli", "compare", run, "-o", plot],
        env=os.environ | {"MPLBACKEND": "module://not_here.backend"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr
    assert imread(plot).shape[1] > 1000


def test_two_runs_of_one_seed_are_noted(tmp_path):
    runs = [write(tmp_path / name, [0.5], seed=7) for name in "ab"]
    with pytest.warns(folders.RunWarning, match="a and .*b have the same seed, 7;"):
        compare.read(runs)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ((), 2, "no run"),
        (("gone",), 2, "no run in gone; expected"),
        (("run", "-o", "curves.txt"), 2, "--output: expected a .png"),
        (("run", "-o", "gone/curves.png"), 2, "--output: expected a .png"),
        (("run", "run"), 1, "run is given twice"),
        (("empty",), 1, "empty has no completed epoch"),
        (("run", "damaged"), 1, "cannot read damaged/metrics.jsonl"),
    ],
)
def test_invalid_runs_are_one_line_errors(
    words, status, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run", [0.5])
    write(tmp_path / "empty", [])
    (write(tmp_path / "damaged", [0.5]) / "metrics.jsonl").write_text('{"epoch": 1}')
    code, err = run_failing(capsys, "compare", *words)
    assert code == status and message in err
    assert not list(tmp_path.glob("*.png"))
