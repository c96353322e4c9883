import io

import numpy as np
from matplotlib.image import imread
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from xnor_jax.train import report
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
    return {"a/kernel": rng.uniform(-1, 1, 300), "b/kernel": rng.normal(0, 0.1, 200)}


def read_events(folder):
    """The events of a TensorBoard file: length, its checksum, data, its checksum."""
    for file in sorted(folder.glob("events*")):
        data = io.BytesIO(file.read_bytes())
        while header := data.read(12):
            event = Event()
            event.ParseFromString(data.read(int.from_bytes(header[:8], "little")))
            data.read(4)
            yield event


def test_picture_is_drawn_for_one_epoch_and_for_many(tmp_path):
    for epochs in (1, 12):
        report.draw(tmp_path / "report.png", "a run", history(epochs), weights())
        pixels = imread(tmp_path / "report.png")
        assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
        assert pixels[..., :3].std() > 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


def test_events_hold_every_scalar_and_histogram(tmp_path):
    writer = report.EventWriter(tmp_path, 0)
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


def test_lines_without_a_terminal_and_time_left():
    out = io.StringIO()
    console = Console(file=out, width=200)
    display = Display(console, epochs=3, done=1, images_per_epoch=100, batch_size=10)
    with display:
        display.begin_epoch(2)
        display.on_steps(5, Metrics(0.25, 0.5))
        display.end_epoch(history(2)[1])
    text = out.getvalue()
    assert text.startswith("epoch   2/3  train loss 0.5000  accuracy  75.00%")
    assert text.count("\n") == 1
    status = display._progress.tasks[0].fields["status"]
    assert "loss 0.2500" in status and "50.00%" in status and "left" in status
