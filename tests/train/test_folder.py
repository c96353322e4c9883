import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from xnor_jax import data
from xnor_jax.train import folder as folders
from xnor_jax.train import recipe as recipes
from xnor_jax.train.folder import RunError, RunInfo, RunWarning

RECIPE = recipes.get("digits-lenet5")


def info(**fields):
    split = data.Split(np.zeros((100, 28, 28, 1), np.uint8), np.zeros(100, np.int32))
    dataset = data.Dataset(split, split, ("a", "b"), data.SOURCES["digits"])
    recipe = dataclasses.replace(RECIPE, **fields)
    return RunInfo.of("digits-lenet5", recipe, dataset)


def record(epoch):
    return {**dict.fromkeys(folders.METRICS, 0.5), "epoch": epoch, "flip_ratios": {}}


def written(path):
    """The fields of a recipe.json; without the checksum, as a user's edit is."""
    fields = json.loads(path.read_text())
    del fields["checksum"]
    return fields


def test_recipe_json_is_read_back(tmp_path):
    run = tmp_path / "deep" / "run"
    folders.open_folder(run, info(), resume=False)
    assert folders.read_info(run) == info()
    fields = written(run / "recipe.json")
    assert fields["name"] == "digits-lenet5" and fields["epochs"] == RECIPE.epochs
    assert not list(run.glob("*.tmp"))


def test_a_run_is_not_overwritten_but_resumed(tmp_path):
    folders.open_folder(tmp_path / "run", info(), resume=False)
    with pytest.raises(RunError, match="already holds .*; resume it with --resume"):
        folders.open_folder(tmp_path / "run", info(), resume=False)
    folders.open_folder(tmp_path / "run", info(), resume=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": 0.5}, "its learning_rate is 0.01, not 0.5"),
        ({"seed": 1}, "its seed is 0, not 1"),
        ({"epochs": 99}, "its epochs is 40, not 99"),
    ],
)
def test_different_recipe_is_refused_and_run_is_unchanged(tmp_path, fields, message):
    folders.open_folder(tmp_path / "run", info(), resume=False)
    before = (tmp_path / "run" / "recipe.json").read_bytes()
    with pytest.raises(RunError, match=message):
        folders.open_folder(tmp_path / "run", info(**fields), resume=True)
    assert (tmp_path / "run" / "recipe.json").read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "schedule cosine"),
        ({"schedule": lambda learning_rate, epochs: None}, "schedule .*lambda"),
        ({"schedule": "steps", "surrogate": "tanh"}, "temperature"),
        ({"schedule": "steps", "weight_method": "recu"}, "quantile"),
    ],
)
def test_a_run_of_a_fixed_length_is_not_extended(tmp_path, fields, reason):
    folders.open_folder(tmp_path, info(epochs=4, **fields), resume=False)
    with pytest.raises(RunError, match=f"epochs is 4, not 6, and .*{reason}.*number"):
        folders.open_folder(tmp_path, info(epochs=6, **fields), resume=True)
    assert folders.read_info(tmp_path, info(**fields).recipe).recipe.epochs == 4


def test_run_with_a_step_schedule_is_extended(tmp_path):
    fields = {"schedule": "steps", "decay_epochs": (3, 5)}
    folders.open_folder(tmp_path, info(epochs=4, **fields), resume=False)
    with pytest.raises(RunError, match="its epochs is 4, not 3"):
        folders.open_folder(tmp_path, info(epochs=3, **fields), resume=True)
    with pytest.raises(RunError, match="its seed is 0, not 1"):
        folders.open_folder(tmp_path, info(epochs=6, seed=1, **fields), resume=True)
    assert folders.read_info(tmp_path) == info(epochs=4, **fields)
    folders.open_folder(tmp_path, info(epochs=6, **fields), resume=True)
    assert folders.read_info(tmp_path) == info(epochs=6, **fields)


def test_started_recipe_and_seeds_are_read_back(tmp_path):
    assert folders.read_started(tmp_path) is None
    folders.open_folder(tmp_path / "one", info(epochs=7), resume=False)
    started = folders.read_started(tmp_path / "one")
    assert started is not None
    name, recipe, seeds = started
    assert (name, recipe.epochs, seeds) == ("digits-lenet5", 7, ())
    folders.write_seeds(tmp_path / "many", [5, 3])
    assert folders.read_started(tmp_path / "many") is None
    folders.open_folder(tmp_path / "many" / "seed3", info(seed=3), resume=False)
    folders.write_seeds(tmp_path / "many", [3, 8])
    assert folders.read_started(tmp_path / "many")[2] == (5, 3, 8)
    (tmp_path / "many" / "seeds.json").write_text("[true]")
    with pytest.raises(RunError, match=r"seeds.json.*whole numbers.*give --seeds"):
        folders.read_started(tmp_path / "many")


def test_other_data_is_refused(tmp_path):
    folders.open_folder(tmp_path / "run", info(), resume=False)
    other = dataclasses.replace(info(), train_images=99)
    with pytest.raises(
        RunError, match="data set differs from this one in train images"
    ):
        folders.open_folder(tmp_path / "run", other, resume=True)


def test_changed_inputs_of_a_resumed_run_are_noted(tmp_path, recwarn):
    old = dataclasses.replace(info(), inputs={"training_images": 1, "teacher": 2})
    new = dataclasses.replace(info(), inputs={"training_images": 3, "teacher": 2})
    folders.open_folder(tmp_path / "run", old, resume=False)
    folders.open_folder(tmp_path / "run", old, resume=True)
    assert folders.read_info(tmp_path / "run") == old and not recwarn
    with pytest.warns(RunWarning, match="^the training images changed since the run"):
        folders.open_folder(tmp_path / "run", new, resume=True)


def dataset():
    """The name of a data set that is a function."""


def test_a_run_is_not_resumed_with_another_normalization(tmp_path):
    one = info(dataset=dataset)
    source = dataclasses.replace(one.source, mean=(0.25,))
    folders.open_folder(tmp_path / "run", one, resume=False)
    folders.open_folder(tmp_path / "run", one, resume=True)
    with pytest.raises(RunError, match="images have the mean 0.*, not 0.25, by which"):
        other = dataclasses.replace(one, source=source)
        folders.open_folder(tmp_path / "run", other, resume=True)


def test_missing_recipe_fields_take_their_defaults(tmp_path):
    folders.open_folder(tmp_path / "run", info(), resume=False)
    path = tmp_path / "run" / "recipe.json"
    fields = written(path)
    for name in ("surrogate", "optimizer", "warmup_epochs"):
        del fields[name]
    path.write_text(json.dumps(fields))
    assert folders.read_info(tmp_path / "run") == info()
    folders.open_folder(tmp_path / "run", info(), resume=True)
    with pytest.raises(RunError, match="its optimizer is adam, not sgd"):
        folders.open_folder(tmp_path / "run", info(optimizer="sgd"), resume=True)


def test_removed_option_average_is_ignored_if_off_and_refused_if_used(tmp_path):
    folders.open_folder(tmp_path, info(), resume=False)
    path = tmp_path / "recipe.json"
    fields = written(path)
    path.write_text(json.dumps(fields | {"average": 0.0}))
    assert folders.read_info(tmp_path) == info()
    folders.open_folder(tmp_path, info(), resume=True)
    path.write_text(json.dumps(fields | {"average": 0.999}))
    with pytest.raises(RunError, match="average 0.999, an option that was removed"):
        folders.read_info(tmp_path)
    with pytest.raises(RunError, match="average 0.999, an option that was removed"):
        folders.open_folder(tmp_path, info(), resume=True)


def test_folder_with_other_files_is_refused_and_unchanged(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="other files and no run"):
        folders.open_folder(tmp_path, info(), resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("resume", [False, True])
def test_temporary_file_of_a_killed_start_is_replaced(tmp_path, resume):
    (tmp_path / "recipe.json.tmp").write_text('{"na')
    folders.open_folder(tmp_path, info(), resume=resume)
    assert folders.read_info(tmp_path) == info()
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_a_folder_of_several_seeds_is_named_as_one(tmp_path):
    folders.write_seeds(tmp_path, [3, 5])
    folders.open_folder(tmp_path / "seed3", info(seed=3), resume=False)
    with pytest.raises(RunError, match="holds the runs of 2 seeds; resume them with"):
        folders.open_folder(tmp_path, info(), resume=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed3", "seeds.json"]


def test_resuming_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="no run in"):
        folders.open_folder(tmp_path / "run", info(), resume=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match="no run in"):
        folders.open_folder(tmp_path, info(), resume=True)
    assert not any(tmp_path.iterdir())


def test_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write to .*--output"):
        folders.open_folder(tmp_path / "file" / "run", info(), resume=False)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"name": "x", "data": {}}', "[" * 100_000]
)
def test_damaged_recipe_json_is_one_line(tmp_path, text):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(RunError, match="cannot read") as error:
        folders.read_info(tmp_path)
    assert "\n" not in str(error.value)
    if text == "{}":
        assert "recipe.json: it has no field 'data'; restore" in str(error.value)


def test_every_flipped_bit_in_recipe_json_is_found(tmp_path):
    folders.open_folder(tmp_path, info(), resume=False)
    path = tmp_path / "recipe.json"
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            found = folders.read_info(tmp_path)
        except RunError as error:
            assert "\n" not in str(error)
        else:  # another space
            assert found == info() and content[position : position + 1].isspace()


def test_an_edited_recipe_json_is_refused_until_its_checksum_is_removed(tmp_path):
    folders.open_folder(tmp_path, info(), resume=False)
    path = tmp_path / "recipe.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(RunError, match="edited; to keep an edit, remove checksum;"):
        folders.open_folder(tmp_path, info(seed=1), resume=True)
    path.write_text(json.dumps(written(path)))
    assert folders.read_info(tmp_path) == info(seed=1)


def test_recipe_json_that_is_no_recipe_is_refused(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text('{"name": 1, "epochs": 1, "dataset": "digits", "model": "lenet5"}')
    with pytest.raises(RunError, match="cannot read"):
        folders.read_info(tmp_path)


@pytest.mark.parametrize("value", [None, "x", -1, 1.5, [], [1], ["x"], {}, True])
def test_invalid_data_description_is_one_line(value, tmp_path):
    path = tmp_path / "recipe.json"
    folders.open_folder(tmp_path, info(), resume=False)
    fields = written(path)
    for key in ("image_shape", "class_names", "train_images", "mean", "std"):
        if (key, value) == ("class_names", ["x"]):
            continue
        changed = {
            **fields,
            "dataset": "math:sqrt",
            "data": {"mean": [0.5], "std": [0.5], **fields["data"], key: value},
        }
        path.write_text(json.dumps(changed))
        with pytest.raises(RunError, match=f"cannot read .*{key}") as error:
            folders.read_info(tmp_path)
        assert "\n" not in str(error.value)
    path.write_text(json.dumps({**fields, "modules": value}))
    if value != {}:
        with pytest.raises(RunError, match="cannot read .*modules"):
            folders.read_info(tmp_path)


def test_metrics_are_exactly_the_named_keys(tmp_path):
    folders.write_metrics(tmp_path, [record(1), record(2)])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    assert all(tuple(json.loads(line)) == folders.METRICS for line in lines)


def test_run_folders_are_numbered(tmp_path):
    base = tmp_path / "run"
    for expected in ("run", "run-2", "run-3"):
        free = folders.free_folder(base)
        assert free.name == expected
        free.mkdir()
        assert folders.newest_folder(base) == free


def test_data_folder_is_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders.write_seeds(tmp_path / "many", [3, 5])
    for run in (tmp_path / "one", tmp_path / "many" / "seed5"):
        run.mkdir()
        assert folders.read_data_dir(run) is None
        folders.write_data_dir(run, Path("my\n\udcff"))
    wanted = tmp_path / "my\n\udcff"
    assert folders.read_data_dir(tmp_path / "one") == wanted
    assert folders.read_data_dir(tmp_path / "many") == wanted
    for text in ("", "{", "3", "[]"):
        (tmp_path / "one" / "data_dir.json").write_text(text)
        with pytest.raises(
            folders.RunError, match="one/data_dir.json: .*; remove it, "
        ):
            folders.read_data_dir(tmp_path / "one")
