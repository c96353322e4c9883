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


def refused(error, words, function, *args, **options):
    with pytest.raises(error, match=words) as caught:
        function(*args, **options)
    assert len(str(caught.value).splitlines()) == 1


def test_a_network_of_the_zoo_goes_up_and_comes_back(hub, tmp_path):
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


def test_the_card_is_the_hubs_kind(hub):
    zoo.push(NAME, "me/digits")
    card = ModelCard(hub.files["me/digits"]["README.md"].decode())
    own = zoo.card(NAME)
    assert card.data.license == own.license
    assert card.data.pipeline_tag == "image-classification"
    (result,) = card.data.eval_results
    assert result.metric_value == own.test_accuracy
    assert (result.dataset_name, result.dataset_split) == ("digits", "test")
    assert str(own) in card.text and "xnor-jax pull me/digits -o" in card.text


def test_a_file_has_its_own_card_or_one_of_what_it_tells(hub, file, tmp_path):
    zoo.push(file, "me/plain", private=True)
    assert hub.private == {"me/plain"}
    text = hub.files["me/plain"]["README.md"].decode()
    assert "99.44%" in text and "Seed" not in text and "81,749 bytes" in text
    (tmp_path / "net.safetensors.md").write_text("# Mine: é\n", encoding="utf-8")
    zoo.push(file, "me/plain")
    assert hub.files["me/plain"]["README.md"] == "# Mine: é\n".encode()
    assert len(hub.commits) == 2
    wrong = "---\nlicense: none of the hub\n---\n"
    (tmp_path / "net.safetensors.md").write_text(wrong)
    words = "me/plain: the hub refused: Invalid metadata .* must be one of"
    refused(zoo.HubError, words, zoo.push, file, "me/plain")
    (tmp_path / "net.safetensors.md").write_bytes(b"\xff")
    words = "me/plain: the hub refused: .* can't decode"
    refused(zoo.HubError, words, zoo.push, file, "me/plain")


def test_a_path_wins_over_a_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).write_text("no network")
    refused(FormatError, NAME, zoo.push, NAME, "me/digits")
    assert not hub.files


def test_without_a_card_one_is_made_and_an_older_one_replaced(hub, tmp_path):
    hub.files["me/bare"] = {"model.safetensors": BYTES}
    card = tmp_path / "net.md"
    card.write_text("of another network")
    zoo.pull("me/bare", tmp_path / "net")
    assert "# digits-lenet5" in card.read_text()


@pytest.mark.parametrize(
    ("model", "words"),
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
def test_a_file_that_is_none_replaces_nothing(model, words, hub, file, tmp_path):
    hub.files["me/bad"] = {"model.safetensors": model, "README.md": b"new"}
    before = sorted(os.listdir(tmp_path))
    refused(FormatError, words, zoo.pull, "me/bad", file)
    assert open(file, "rb").read() == BYTES
    assert sorted(os.listdir(tmp_path)) == before
    local = tmp_path / "bad"
    local.write_bytes(model)
    refused(FormatError, str(local), zoo.push, local, "me/bad")
    assert not hub.commits


def test_what_the_hub_lacks_or_refuses_is_one_line(hub, file, tmp_path, monkeypatch):
    refused(zoo.HubError, "no repository me/gone, or your", zoo.pull, "me/gone", file)
    hub.files["me/empty"] = {"README.md": b"a"}
    words = "me/empty has no model.safetensors; expected the files that push uploads"
    refused(zoo.HubError, words, zoo.pull, "me/empty", file)
    hub.files["me/large"] = {"model.safetensors": BYTES}
    hub.sizes["model.safetensors"] = 2**31
    words = "me/large: model.safetensors: expected at most 1073741824 bytes"
    refused(FormatError, words, zoo.pull, "me/large", file)
    words = "you/net: the hub refused with status 403: You have no right"
    refused(zoo.HubError, words, zoo.push, NAME, "you/net")
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    words = "me/net: the hub refused with status 401: Invalid credentials"
    refused(zoo.HubError, words, zoo.push, NAME, "me/net")
    hub.files["me/own"] = {"model.safetensors": BYTES}
    hub.private.add("me/own")
    refused(zoo.HubError, "no repository me/own, or your", zoo.pull, "me/own", file)
    monkeypatch.delenv("HF_TOKEN")
    refused(zoo.HubError, "no token for the hub", zoo.push, NAME, "me/net")
    assert "me/net" not in hub.files and open(file, "rb").read() == BYTES


def test_a_hub_out_of_reach_is_one_line(hub, file, monkeypatch):
    fake_hub.point_at(monkeypatch, "http://127.0.0.1:1")  # where nothing listens
    words = "me/net: the hub cannot be reached"
    refused(zoo.HubError, words, zoo.pull, "me/net", file)
    refused(zoo.HubError, words, zoo.push, NAME, "me/net")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(zoo.HubError, words, zoo.pull, "me/net", file)
    refused(zoo.HubError, words, zoo.push, NAME, "me/net")


@pytest.mark.parametrize("name", ["net", "a/b/c", "https://hub/a", "", "me/n et"])
def test_a_wrong_repository_is_refused_before_anything_else(name, hub, tmp_path):
    words = "repository: expected OWNER/NAME"
    refused(ValueError, words, zoo.push, NAME, name)
    refused(ValueError, words, zoo.pull, name, tmp_path / "net")


def test_without_its_package_the_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    words = r"huggingface_hub is missing; .*xnor-jax\[train\]"
    refused(ModuleNotFoundError, words, zoo.push, NAME, "me/net")
    refused(ModuleNotFoundError, words, zoo.pull, "me/net", tmp_path / "net")


def test_an_unknown_name_names_the_zoo(hub):
    words = "no file digit-lenet5, and no network .* did you mean 'digits-lenet5'"
    refused(ValueError, words, zoo.push, "digit-lenet5", "me/net")
