"""Push and pull, with a fake hub on this machine."""

import os
import shutil
import sys

import fake_hub
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import ModelCard, constants

from xnor_jax import zoo
from xnor_jax.packing import FormatError, load

NAME = "digits-lenet5"
BYTES = zoo.find(NAME).read_bytes()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with fake_hub.running(monkeypatch, tmp_path / "home") as hub:
        yield hub


@pytest.fixture
def file(tmp_path):
    return shutil.copy(zoo.find(NAME), tmp_path / "net.safetensors")


def refused(error, message, function, *args, **options):
    with pytest.raises(error, match=message) as caught:
        function(*args, **options)
    assert len(str(caught.value).splitlines()) == 1


def test_zoo_network_round_trips_through_the_hub(hub, tmp_path):
    address = zoo.push(NAME, "me/digits")
    assert address.endswith("/me/digits") and not hub.private
    assert hub.files["me/digits"].keys() == {"model.safetensors", "README.md"}
    assert hub.files["me/digits"]["model.safetensors"] == BYTES
    assert hub.commits == [f"{NAME}, packed by xnor_jax"]
    output = tmp_path / "back.safetensors"
    packed = zoo.pull("me/digits", output)
    x = np.random.default_rng(0).normal(size=(2, 28, 28, 1)).astype(np.float32)
    np.testing.assert_array_equal(packed(x), load(output)(x))
    assert output.read_bytes() == BYTES
    card = tmp_path / "back.safetensors.md"
    assert card.read_bytes() == hub.files["me/digits"]["README.md"]
    assert {p.name for p in tmp_path.iterdir()} == {output.name, card.name}


def test_pushed_card_is_a_valid_model_card(hub):
    zoo.push(NAME, "me/digits")
    card = ModelCard(hub.files["me/digits"]["README.md"].decode())
    zoo_card = zoo.card(NAME)
    assert card.data.license == zoo_card.license
    assert card.data.pipeline_tag == "image-classification"
    (result,) = card.data.eval_results
    assert result.metric_value == zoo_card.test_accuracy
    assert (result.dataset_name, result.dataset_split) == ("digits", "test")
    assert str(zoo_card) in card.text and "xnor-jax pull me/digits -o" in card.text


def test_pushed_file_uses_its_own_or_a_generated_card(hub, file, tmp_path):
    zoo.push(file, "me/plain", private=True)
    assert hub.private == {"me/plain"}
    text = hub.files["me/plain"]["README.md"].decode()
    assert "99.44%" in text and "Seed" not in text and "81,749 bytes" in text
    (tmp_path / "net.safetensors.md").write_text("# Mine: é\n", encoding="utf-8")
    zoo.push(file, "me/plain")
    assert hub.files["me/plain"]["README.md"] == "# Mine: é\n".encode()
    assert len(hub.commits) == 2
    invalid = "---\nlicense: none of the hub\n---\n"
    (tmp_path / "net.safetensors.md").write_text(invalid)
    message = "me/plain: the hub refused: Invalid metadata .* must be one of"
    refused(zoo.HubError, message, zoo.push, file, "me/plain")
    (tmp_path / "net.safetensors.md").write_bytes(b"\xff")
    message = "me/plain: the hub refused: .* can't decode"
    refused(zoo.HubError, message, zoo.push, file, "me/plain")


def test_path_takes_precedence_over_zoo_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).write_text("no network")
    refused(FormatError, NAME, zoo.push, NAME, "me/digits")
    assert not hub.files


def test_pull_without_a_card_writes_a_generated_one(hub, tmp_path):
    hub.files["me/bare"] = {"model.safetensors": BYTES}
    card = tmp_path / "net.md"
    card.write_text("of another network")
    zoo.pull("me/bare", tmp_path / "net")
    assert "# digits-lenet5" in card.read_text()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (BYTES[:-100], "me/bad: model.safetensors: expected a complete file"),
        (BYTES[:-9] + b"\0" + BYTES[-8:], "me/bad: model.safetensors: .*damaged"),
        (b"hello", "me/bad: model.safetensors: expected a safetensors file"),
        (
            safetensors.numpy.save({"a": np.zeros(2)}),
            "me/bad: model.safetensors: expected a packed network",
        ),
    ],
)
def test_invalid_file_replaces_nothing(model, message, hub, file, tmp_path):
    hub.files["me/bad"] = {"model.safetensors": model, "README.md": b"new"}
    before = sorted(os.listdir(tmp_path))
    refused(FormatError, message, zoo.pull, "me/bad", file)
    assert open(file, "rb").read() == BYTES
    assert sorted(os.listdir(tmp_path)) == before
    local = tmp_path / "bad"
    local.write_bytes(model)
    refused(FormatError, str(local), zoo.push, local, "me/bad")
    assert not hub.commits


def test_hub_errors_are_one_line(hub, file, tmp_path, monkeypatch):
    refused(zoo.HubError, "no repository me/gone, or your", zoo.pull, "me/gone", file)
    hub.files["me/empty"] = {"README.md": b"a"}
    message = "me/empty has no model.safetensors; expected the files that push uploads"
    refused(zoo.HubError, message, zoo.pull, "me/empty", file)
    hub.files["me/large"] = {"model.safetensors": BYTES}
    hub.sizes["model.safetensors"] = 2**31
    message = "me/large: model.safetensors: expected at most 1073741824 bytes"
    refused(FormatError, message, zoo.pull, "me/large", file)
    message = "you/net: the hub refused with status 403: You have no right"
    refused(zoo.HubError, message, zoo.push, NAME, "you/net")
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    message = "me/net: the hub refused with status 401: Invalid credentials"
    refused(zoo.HubError, message, zoo.push, NAME, "me/net")
    hub.files["me/own"] = {"model.safetensors": BYTES}
    hub.private.add("me/own")
    refused(zoo.HubError, "no repository me/own, or your", zoo.pull, "me/own", file)
    monkeypatch.delenv("HF_TOKEN")
    refused(zoo.HubError, "no token for the hub", zoo.push, NAME, "me/net")
    assert "me/net" not in hub.files and open(file, "rb").read() == BYTES


def test_unreachable_hub_is_a_one_line_error(hub, file, monkeypatch):
    fake_hub.point_at(monkeypatch, "http://127.0.0.1:1")  # where nothing listens
    message = "me/net: the hub cannot be reached"
    refused(zoo.HubError, message, zoo.pull, "me/net", file)
    refused(zoo.HubError, message, zoo.push, NAME, "me/net")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(zoo.HubError, message, zoo.pull, "me/net", file)
    refused(zoo.HubError, message, zoo.push, NAME, "me/net")


@pytest.mark.parametrize("name", ["net", "a/b/c", "https://hub/a", "", "me/n et"])
def test_invalid_repository_names_are_refused(name, hub, tmp_path):
    message = "repository: expected OWNER/NAME"
    refused(ValueError, message, zoo.push, NAME, name)
    refused(ValueError, message, zoo.pull, name, tmp_path / "net")


def test_missing_huggingface_hub_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = r"huggingface_hub is missing; .*xnor-jax\[train\]"
    refused(ModuleNotFoundError, message, zoo.push, NAME, "me/net")
    refused(ModuleNotFoundError, message, zoo.pull, "me/net", tmp_path / "net")


def test_unknown_name_suggests_a_zoo_network(hub):
    message = "no file digit-lenet5, and no network .* did you mean 'digits-lenet5'"
    refused(ValueError, message, zoo.push, "digit-lenet5", "me/net")
