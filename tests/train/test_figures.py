import dataclasses
import io
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from xnor_jax.train import figures
from xnor_jax.train import recipe as recipes
from xnor_jax.train.progress import Display
from xnor_jax.train.step import Metrics


def history(epochs):
    return [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "train_loss": 1 / epoch,
            "train_accuracy": 1 - 0.5 / epoch,
            "test_loss": 1.1 / epoch,
            "test_accuracy": 1 - 0.6 / epoch,
            "learning_rate": 0.01 / epoch,
            "flip_ratio": 0.1 / epoch,
            "images_per_second": 1000.0,
            "flip_ratios": {"a/kernel": 0.1 / epoch, "b/kernel": 0.0},
        }
        for epoch in range(1, epochs + 1)
    ]


def weights():
    rng = np.random.default_rng(0)
    return {
        "a/kernel": rng.uniform(-1, 1, (3, 100)),
        "b/kernel": rng.normal(0, 0.1, (2, 100)),
    }


def read_events(folder):
    """Yield TensorBoard events; each is stored as length, checksum, data, checksum."""
    for file in sorted(folder.glob("events*")):
        data = io.BytesIO(file.read_bytes())
        while header := data.read(12):
            event = Event()
            event.ParseFromString(data.read(int.from_bytes(header[:8], "little")))
            data.read(4)
            yield event


@pytest.mark.slow
def test_picture_is_drawn_for_one_epoch_and_for_many(tmp_path):
    for epochs in (1, 12):
        figure = figures.picture("a run", history(epochs), weights())
        figures.save(figure, tmp_path / "report.png")
        pixels = imread(tmp_path / "report.png")
        assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
        assert pixels[..., :3].std() > 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


def curves(axis):
    return [line for line in axis.get_lines() if len(set(line.get_xdata())) > 1]


@pytest.mark.parametrize("kernels", [1, 8, 9, 16])
def test_a_legend_has_at_most_eight_entries(kernels):
    names = [f"block{i}/layer/kernel" for i in range(2, kernels + 2)]
    rng = np.random.default_rng(0)
    latent = {name: rng.uniform(-1, 1, (3, 3, 20, 7)) for name in names}
    records = [
        record | {"flip_ratios": {name: rng.uniform() for name in names}}
        for record in history(4)
    ]
    axes = figures.picture("a run", records, latent).axes
    for axis in (axes[3], axes[4]):
        labels = axis.get_legend_handles_labels()[1]
        assert labels[0] == "block2/layer" and len(labels) == min(kernels, 8)
        if kernels > 8:
            assert labels[-1] == f"{kernels - 7} others,\nlowest to highest"
            band = axis.collections[0].get_paths()[0].vertices
            assert len(curves(axis)) == 7 and np.isfinite(band).all()
        assert labels[:7] == [name.removesuffix("/kernel") for name in names[:7]]


def test_zero_error_is_visible_and_few_epochs_have_markers():
    for epochs in (1, 3, 30):
        records = history(epochs)
        records[-1]["test_accuracy"] = 1.0
        axis = figures.picture("a run", records, weights()).axes[1]
        low, high = axis.get_ylim()
        assert low < 0 < high
        markers = [line.get_marker() for line in axis.get_lines()[:2]]
        assert markers == (["None"] * 2 if epochs == 30 else ["o"] * 2)
        first, last = axis.get_xlim()
        assert first < 1 and epochs < last
        shown = [tick for tick in axis.get_yticks() if low <= tick <= high]
        assert 0 in shown and len(shown) < 12


def test_sign_tiles_show_the_first_kernel():
    kernel = np.random.default_rng(0).normal(size=(2, 3, 5, 4))
    axes = figures.picture("a run", history(2), {"block10/kernel": -kernel}).axes
    (image,) = axes[5].get_images()
    tiles = np.asarray(image.get_array())
    for c_out, c_in in ((0, 0), (3, 4), (1, 2)):
        tile = tiles[3 * c_out : 3 * c_out + 2, 4 * c_in : 4 * c_in + 3]
        assert (tile == np.where(kernel[..., c_in, c_out] > 0, -1, 1)).all()


def test_title_names_the_main_settings():
    info = SimpleNamespace(name="n", recipe=recipes.get("mnist-lenet5"))
    title = "n: lenet5, rule corrected, surrogate ste, seed 0"
    assert figures.title(info) == title
    info.recipe = dataclasses.replace(info.recipe, binary=False, seed=7)
    assert figures.title(info) == "n: lenet5, float twin, seed 7"


@pytest.mark.parametrize("epochs", [1, 2, 8, 60])
def test_epoch_ticks_are_whole_numbers(epochs):
    figure = figures.picture("a run", history(epochs), weights())
    for axis in figure.axes[:4]:
        ticks = axis.get_xticks()
        assert (ticks == ticks.round()).all() and len(ticks) <= 12
        assert epochs > 8 or [*ticks] == [*range(1, epochs + 1)]


def test_events_hold_every_scalar_and_histogram(tmp_path):
    writer = figures.EventWriter(tmp_path, 0)
    for record in history(3):
        writer.write(record, weights())
    writer.close()
    found = {}
    for event in read_events(tmp_path / "tensorboard"):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value))
    scalars = {
        "loss/train": "train_loss",
        "accuracy/test": "test_accuracy",
        "learning_rate": "learning_rate",
    }
    for tag, key in scalars.items():
        read = [(step, value.simple_value) for step, value in found[tag]]
        expected = [(r["epoch"], np.float32(r[key])) for r in history(3)]
        np.testing.assert_allclose(read, expected, rtol=1e-6)
    assert len(found["flip_ratio/a/kernel"]) == 3
    assert found["latent/b/kernel"][0][1].histo.num == 200


def test_display_prints_lines_and_shows_the_time_left():
    out = io.StringIO()
    console = Console(file=out, width=200)
    display = Display(console, epochs=3, done=1, images_per_epoch=100, batch_size=10)
    with display:
        display.begin_epoch(2)
        display.on_steps(5, Metrics(0.25, 0.5))
        display.end_epoch(history(2)[1])
        display.end_epoch(history(2)[1] | {"data_wait": 0.04})
        display.end_epoch(history(2)[1] | {"data_wait": 0.07})  # of 0.1 s
        slow = {"data_wait": 0.07, "images_per_second": 5}
        display.end_epoch(history(2)[1] | slow)
    text = out.getvalue()
    line = (
        "epoch   2/3  train 0.5000  75.00%  test 0.5500  70.00%  flips 5e-02  1,000/s\n"
    )
    assert text == 3 * line + line.replace("1,000", "5") + (
        "  7.0% of the time waiting for data\n"
    )
    status = display._progress.tasks[0].fields["status"]
    assert "loss 0.2500" in status and "50.00%" in status and "left" in status
