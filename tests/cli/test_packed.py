"""The commands for packed networks, on one short run on the digits."""

import io
import json
import os
import re

import numpy as np
import pytest
from commands import run_cli, run_failing, run_ok
from folders import draw
from PIL import Image
from safetensors import safe_open

import xnor_jax as xnor
from xnor_jax import cli, data
from xnor_jax.ops import backends
from xnor_jax.packing import bench


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "run"
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--epochs", "2", "--output", str(folder)])
    assert stop.value.code == 0
    return folder


@pytest.fixture(scope="module")
def file(run):
    path = run.with_name("digits.safetensors")
    with pytest.raises(SystemExit) as stop:
        cli.main(["pack", str(run), "-o", str(path)])
    assert stop.value.code == 0
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten digits of the test split as files, and their labels."""
    folder = tmp_path_factory.mktemp("pictures")
    images, labels = data.load("digits").test
    paths = [folder / f"{index}.png" for index in range(10)]
    for path, image in zip(paths, images, strict=False):
        Image.fromarray(image[..., 0]).save(path)
    return paths, [str(label) for label in labels[:10]]


def accuracies(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["test_accuracy"] for line in lines]


def test_pack_prints_layers_and_saves_metadata(run, tmp_path, capsys):
    path = tmp_path / "net"
    path.write_text("what was there")
    out = run_ok(capsys, "pack", run, "--output", path)
    layers = dict(re.findall(r"^(\w\S+) +(1|32) ", out, re.MULTILINE))
    assert layers == {
        "conv1": "32",
        "block2/layer": "1",
        "block3/layer": "1",
        "dense4": "32",
    }
    assert "2 of 4 binary" in out and "2,000,000" in out and "293,000" in out
    size, accuracy = path.stat().st_size, accuracies(run)[-1]
    assert f"{path}: {size:,} bytes" in out and f"{accuracy:.2%}" in out
    assert max(len(line) for line in out.splitlines() if str(path) not in line) <= 80
    ratio = re.search(r"1/([\d.]+) of the ([\d,]+) in float32", out)
    before = int(ratio[2].replace(",", ""))
    assert before == 4 * 431_220 and float(ratio[1]) == round(before / size, 1) > 18
    assert os.listdir(tmp_path) == ["net"]
    info = xnor.load(path).info
    source = data.SOURCES["digits"]
    assert info.name == "digits-lenet5" and info.dataset == "digits"
    assert info.test_accuracy == accuracy
    assert info.class_names == tuple("0123456789")
    assert (info.preprocessing.mean, info.preprocessing.std) == (
        source.mean,
        source.std,
    )
    with safe_open(path, "numpy") as tensors:
        assert tensors.metadata()


@pytest.mark.slow
def test_pack_best_uses_the_best_epoch(run, file, tmp_path, capsys):
    best = tmp_path / "best"
    out = run_ok(capsys, "pack", run, "-o", best, "--best")
    assert f"{max(accuracies(run)):.2%}" in out
    assert xnor.load(best).info.test_accuracy == max(accuracies(run))


def test_evaluate_reports_the_accuracy_of_the_run(run, file, capsys):
    packed = run_ok(capsys, "evaluate", file)
    assert packed.startswith("digits-lenet5, packed: 360 test images")
    pattern = r"loss ([\d.]+), test accuracy ([\d.]+)%"
    loss, accuracy = map(float, re.search(pattern, packed).groups())
    unpacked = re.search(pattern, run_ok(capsys, "evaluate", run))
    assert float(unpacked[2]) == accuracy == round(100 * accuracies(run)[-1], 2)
    assert abs(float(unpacked[1]) - loss) < 2e-4


def test_predict_prints_one_line_per_image(file, pictures, capsys):
    paths, labels = pictures
    lines = run_ok(capsys, "predict", file, *paths).splitlines()
    assert len(lines) == len(paths)
    correct = 0
    for line, path, label in zip(lines, paths, labels, strict=True):
        found = re.fullmatch(r"(.+): (\d) (\d+\.\d\d)%", line)
        assert found and found[1] == str(path) and 10 <= float(found[3]) <= 100
        correct += found[2] == label
    assert correct >= 8


def test_predict_converts_images_to_the_input_format(file, pictures, tmp_path, capsys):
    paths, _ = pictures
    plain = run_ok(capsys, "predict", file, paths[0]).split(": ")[1]
    pixels = np.asarray(Image.open(paths[0]))
    dark = tmp_path / "dark.bmp"
    Image.fromarray(255 - pixels).convert("RGB").save(dark)
    out = run_ok(capsys, "predict", file, dark, "--invert")
    assert out == f"{dark}: {plain}"
    large = tmp_path / "large.jpg"
    Image.fromarray(pixels).resize((112, 84)).save(large)
    code, out, err = run_cli(capsys, "predict", file, large)
    assert code == 0 and out.split()[1] == plain.split()[0]
    note = f"note: {large}: resized from 112×84 to 28×28"
    assert err == f"xnor-jax: {note}\n"
    code, out, err = run_cli(capsys, "predict", file, large, paths[0], large, large)
    assert code == 0 and len(out.splitlines()) == 4
    assert err == f"xnor-jax: {note} (and 2 more)\n"
    blue = tmp_path / "blue.png"
    Image.fromarray(np.stack([pixels, pixels, pixels // 2], -1)).save(blue)
    for count, noun in ((1, "1 colour image"), (3, "3 colour images")):
        code, out, err = run_cli(capsys, "predict", file, *[blue] * count, dark)
        assert code == 0 and len(out.splitlines()) == count + 1
        words = f"{noun} converted to grey, which the network takes"
        assert err == f"xnor-jax: note: {words}\n"


def test_predict_notes_grey_images_of_a_colour_network(tmp_path, capsys):
    paths = [tmp_path / f"{at}.png" for at in range(3)]
    draw(0, (32, 32)).save(paths[0])
    for path, mode in zip(paths[1:], ("L", "1"), strict=True):
        draw(1, (32, 32), mode).save(path)
    run_ok(capsys, "predict", "cifar10-resnet20", paths[0])
    code, out, err = run_cli(capsys, "predict", "cifar10-resnet20", *paths)
    assert code == 0 and len(out.splitlines()) == 3
    note = "note: 2 grey images converted to colour, which the network takes"
    assert err == f"xnor-jax: {note}\n"


def test_predict_continues_after_a_broken_image(file, pictures, tmp_path, capsys):
    paths, _ = pictures
    expected = run_ok(capsys, "predict", file, *paths[:3]).splitlines()
    text, truncated = tmp_path / "text.png", tmp_path / "halved.png"
    text.write_text("hello")
    truncated.write_bytes(paths[0].read_bytes()[:-60])
    mixed = (text, paths[0], paths[1], truncated, paths[2])
    code, out, err = run_cli(capsys, "predict", file, *mixed)
    assert code == 1 and out.splitlines() == expected
    first, second = err.splitlines()
    assert str(text) in first
    assert str(truncated) in second
    code, err = run_failing(capsys, "predict", file, text)
    assert code == 1 and f"{text} is not an image" in err


def test_predict_reads_folders_and_standard_input(
    file, pictures, tmp_path, capsys, monkeypatch
):
    paths, _ = pictures
    plain = run_ok(capsys, "predict", file, *paths).splitlines()
    folder = tmp_path / "pictures" / "deep"
    folder.mkdir(parents=True)
    for path in paths[:3]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder.parent / "notes.txt").write_text("no picture")
    found = run_ok(capsys, "predict", file, folder.parent).splitlines()
    assert [line.split(": ")[1] for line in found] == [
        line.split(": ")[1] for line in plain[:3]
    ]
    stream = io.TextIOWrapper(io.BytesIO(paths[4].read_bytes()))
    monkeypatch.setattr("sys.stdin", stream)
    out = run_ok(capsys, "predict", file, "-")
    assert out == f"-: {plain[4].split(': ')[1]}\n"
    (tmp_path / "none").mkdir()
    code, err = run_failing(capsys, "predict", file, tmp_path / "none")
    assert code == 2 and "no pictures in" in err


def test_predict_escapes_control_characters_of_names(file, pictures, tmp_path, capsys):
    path = tmp_path / "a\nb\x1b[31m é.png"
    path.write_bytes(pictures[0][0].read_bytes())
    plain = run_ok(capsys, "predict", file, pictures[0][0])
    name = str(tmp_path / r"a\nb\x1b[31m é.png")
    assert run_ok(capsys, "predict", file, path) == f"{name}: {plain.split(': ')[1]}"


def test_predict_prints_top_classes_and_json(file, pictures, capsys):
    paths, _ = pictures
    plain = run_ok(capsys, "predict", file, *paths[:2]).splitlines()
    lines = run_ok(capsys, "predict", file, *paths[:2], "--top", 3).splitlines()
    for line, best in zip(lines, plain, strict=True):
        assert line.startswith(best) and len(line.split(", ")) == 3
    command = ("predict", file, *paths[:2], "--json", "--top", "10")
    for line, path, best in zip(
        run_ok(capsys, *command).splitlines(), paths, plain, strict=False
    ):
        found = json.loads(line)
        probabilities = [entry["probability"] for entry in found["classes"]]
        assert found["image"] == str(path) and len(probabilities) == 10
        assert (
            sum(probabilities) == pytest.approx(1)
            and probabilities == sorted(probabilities)[::-1]
        )
        top = found["classes"][0]
        assert best == f"{path}: {top['class']} {top['probability']:.2%}"
    code, err = run_failing(capsys, "predict", file, paths[0], "--top", 0)
    assert code == 2 and "--top: expected a number of at least 1" in err


@pytest.mark.slow
def test_evaluate_reports_a_confusion_matrix(run, file, capsys):
    totals = []
    for source, plot in (
        (run, run / "confusion.png"),
        (file, file.with_name(f"{file.name}.confusion.png")),
    ):
        out = run_ok(capsys, "evaluate", source, "--report")
        rows = re.findall(r"^(\d) +((?:(?:\d+|·) +){10})", out, re.MULTILINE)
        counts = [[int(c.replace("·", "0")) for c in row.split()] for _, row in rows]
        correct = sum(counts[index][index] for index in range(10))
        assert [name for name, _ in rows] == [*"0123456789"]
        assert sum(map(sum, counts)) == 360
        assert f"test accuracy {correct / 360:.2%}" in out
        signs = plot.with_name(plot.name.replace("confusion", "signs"))
        for path in (plot, signs):
            assert f"drawn in {path}" in out and path.exists()
        totals.append(counts)
    assert totals[0] == totals[1]


def test_predict_classifies_the_paths_that_exist(file, pictures, tmp_path, capsys):
    paths, _ = pictures
    expected = run_ok(capsys, "predict", file, *paths[:2]).splitlines()
    gone, none = tmp_path / "gone.png", tmp_path / "none"
    none.mkdir()
    for mixed, messages in (
        ((paths[0], gone, paths[1]), [f"no file {gone}"]),
        ((none, *paths[:2]), [f"no pictures in {none}"]),
        ((gone, *paths[:2], none), [f"no file {gone}", f"no pictures in {none}"]),
    ):
        code, out, err = run_cli(capsys, "predict", file, *mixed)
        assert code == 1 and out.splitlines() == expected
        assert err.splitlines() == [f"xnor-jax: {words}" for words in messages]
    code, err = run_failing(capsys, "predict", file, gone, none)
    assert code == 2 and err == f"xnor-jax: no file {gone} (and 1 more)\n"
    code, err = run_failing(capsys, "predict", file)
    assert code == 2 and "no image" in err


@pytest.mark.slow
def test_bench_prints_backend_and_timings(file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out = run_ok(capsys, "bench", file, "--batch-sizes", 3, "--rounds", 2)
    assert f"packed ({bench.describe_backend()}) against" in out
    assert bench.describe_cpu() in out
    said = re.findall(
        r"^timing calls of 3 images on (\d+) threads?…$", out, re.MULTILINE
    )
    assert tuple(map(int, said)) == bench.thread_numbers() and "\x1b" not in out
    spread = r" +[\d.]+ \([\d.]+–[\d.]+\)"
    row = rf"^ *(\d+) +(\d+){spread}{spread} +[\d,]+{spread} *$"
    numbers = [tuple(map(int, r)) for r in re.findall(row, out, re.MULTILINE)]
    assert numbers == [(threads, 3) for threads in bench.thread_numbers()]


def test_damaged_file_is_a_one_line_error(file, pictures, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    damaged.write_bytes(file.read_bytes()[:-100])
    paths, _ = pictures
    for args in (("evaluate",), ("predict",), ("bench",)):
        command = (*args, damaged, *(paths[:1] if args == ("predict",) else ()))
        code, err = run_failing(capsys, *command)
        assert code == 1 and str(damaged) in err
    code, err = run_failing(capsys, "predict", paths[0], paths[0])
    assert code == 1 and str(paths[0]) in err


def test_pack_writes_atomically(run, tmp_path, capsys, monkeypatch):
    code, err = run_failing(capsys, "pack", run, "-o", tmp_path / "no" / "net")
    assert code == 2 and "a folder that exists" in err
    code, err = run_failing(capsys, "pack", run, "-o", tmp_path)
    assert code == 2
    code, err = run_failing(capsys, "pack", tmp_path / "gone", "-o", tmp_path / "net")
    assert code == 2 and "no run in" in err
    path = tmp_path / "net"
    path.write_text("what was there")

    def raise_no_space(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", raise_no_space)
    code, err = run_failing(capsys, "pack", run, "-o", path)
    assert code == 1 and f"cannot write {path}: No space left" in err
    assert path.read_text() == "what was there"
    assert os.listdir(tmp_path) == ["net"]


def test_pack_refuses_a_float_twin(run, tmp_path, capsys):
    twin = tmp_path / "twin"
    twin.mkdir()
    recipe = json.loads((run / "recipe.json").read_text())
    del recipe["checksum"]
    (twin / "recipe.json").write_text(json.dumps(recipe | {"binary": False}))
    code, err = run_failing(capsys, "pack", twin, "-o", tmp_path / "net")
    assert code == 1 and "float twin" in err and not (tmp_path / "net").exists()


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (("evaluate", "FILE", "--best"), 2, "--best"),
        (("evaluate", "FILE", "--data-dir", "."), 2, "--data-dir: expected none"),
        (
            ("evaluate", "FILE", "--validation-share", "0.2"),
            2,
            "--validation-share: expected none for digits, which has a test split",
        ),
        (("evaluate", "RUN", "--data-dir", "."), 2, "--data-dir: expected none"),
        (("evaluate", "FILE", "--data-dir", "gone"), 2, "no folder gone"),
        (("pack", "."), 2, "missing: --output PATH"),
        (("pack", ".", "-o", "net"), 2, "no run in ."),
        (("pack", "RUN", "-o", ""), 2, "--output: expected a path, got ''"),
        (("pack", "RUN", "--ouput", "net"), 2, "--ouput; did you mean --output?"),
        (("pack", "RUN", "-o", "net", "--data-dir", "."), 2, "expected none"),
        (("predict",), 2, "missing: FILE"),
        (("predict", "FILE", "FILE", "--inverse"), 2, "did you mean --invert?"),
        (("predict", "gone", "also"), 2, "no file gone"),
        (("predict", ".", "also"), 2, "no file ."),
        (("predict", "RUN", "also"), 2, "a run's folder; write its packed file with"),
        (("bench", "RUN"), 2, "a run's folder; write its packed file with xnor-jax p"),
        (("pack", "SEEDS", "-o", "net"), 2, "no run in"),
        (("evaluate", "SEEDS"), 2, "; did you mean"),
        (("train", "--teacher", "gone"), 2, "--teacher: no run in gone; expected"),
        (("train", "--initial", "."), 2, "--initial: no run in .; expected a folder"),
        (("train", "--seeds", "1", "--seed=2"), 2, "--seed: expected none with --se"),
        (("bench", "gone"), 2, "no file gone"),
        (("bench", "FILE", "--batch-sizes"), 2, "--batch-sizes"),
        (("bench", "FILE", "--batch-sizes", "x"), 2, "expected a whole number"),
        (("bench", "FILE", "--rounds", "x"), 2, "--rounds: expected a whole number"),
        (("bench", "FILE", "--batch-sizes", "0"), 2, "--batch-sizes"),
        (("bench", "FILE", "--rounds", "0"), 2, "--rounds"),
        (("bench", "FILE", "--backend", "tpu"), 2, "--backend"),
    ],
)
def test_usage_errors_are_one_line(
    args, status, message, run, file, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    seeds = file.parent / "seeds"
    (seeds / "seed0").mkdir(parents=True, exist_ok=True)
    (seeds / "seed0" / "recipe.json").touch()
    paths = {"FILE": file, "RUN": run, "SEEDS": seeds}
    code, err = run_failing(capsys, *(paths.get(arg, arg) for arg in args))
    assert code == status and message in err
    assert not list(tmp_path.iterdir())


def test_unavailable_backend_is_a_one_line_error(file, capsys, monkeypatch):
    def resolve(*_):
        raise RuntimeError("the backend 'cpu' is not available")

    monkeypatch.setattr(backends, "resolve", resolve)
    code, err = run_failing(capsys, "bench", file, "--backend", "cpu")
    assert code == 2 and "not available" in err
