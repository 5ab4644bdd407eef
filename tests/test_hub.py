"""`vidt push` and hf://USER/NAME against a Hub on this machine: huggingface_hub's own code runs."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants
from PIL import Image
from simulated_hub import TOKEN, Hub, simulated_hub

import vidt
from trainer.commands.command_line import main
from trainer.commands.hub import BEGIN, END, card_part, merged_card
from trainer.loop.start import require_files
from trainer.settings.config import TrainConfig
from vidt.downloads import Unreachable
from vidt.errors import UserError
from vidt.images.preprocessing import Preprocessing
from vidt.model.vidt import ViDT
from vidt.weights.hub import HubAddress, hub_address
from vidt.weights.published import local_weights
from vidt.weights.weights_file import WeightsInfo, save_weights

TRAINING = {
    "version": "0.1.0",
    "epochs_done": 3.0,
    "data": {"training": {"source": "shapes.json", "images": 1200, "boxes": 3400}},
    "settings": {"learning_rate": 0.0001, "preset": "auto", "load_from": None},
}


@pytest.fixture
def weights(tiny_model: ViDT, tmp_path: Path) -> Path:
    names = ("disc", "<b>|square`", "star\n# Title")
    preprocessing = Preprocessing(96, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    info = WeightsInfo(tiny_model.config, names, preprocessing, {"map50": 0.25}, TRAINING)
    save_weights(tmp_path / "best.safetensors", tiny_model.state_dict(), info)
    return tmp_path / "best.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with simulated_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The line of a command that fails, which never holds the token."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    output = capsys.readouterr()
    (line,) = [each for each in output.err.splitlines() if each.startswith("error: ")]
    assert TOKEN not in output.out + output.err
    return line


def test_push_and_load(
    hub: Hub, weights: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert main(["push", str(weights), "ann/shapes"]) == 0
    output = capsys.readouterr()
    assert f"{hub.endpoint}/ann/shapes (private)" in output.out and "licence" in output.err
    pushed = hub.repositories["ann/shapes"]
    assert pushed.private and set(pushed.files) == {"model.safetensors", "README.md"}
    assert pushed.files["model.safetensors"] == weights.read_bytes()

    image = Image.new("RGB", (96, 96), "orange")
    here, there = vidt.load(weights, device="cpu"), vidt.load("hf://ann/shapes", device="cpu")
    assert torch.equal(here([image])[0].scores, there([image])[0].scores)
    cached = local_weights("hf://ann/shapes")
    assert cached.read_bytes() == weights.read_bytes()
    assert sum("GET /ann/shapes/resolve" in each for each in hub.requests) == 1
    # Nothing is told of this machine, and the token shows nowhere.
    assert not any("agent-harnesses" in each for each in hub.requests)
    assert not any("torch" in each for each in hub.agents)
    assert TOKEN not in output.out + output.err + caplog.text
    assert str(weights.parent) not in pushed.files["README.md"].decode()


@pytest.mark.slow
def test_the_commands_and_the_lines_of_the_card_take_the_address(
    hub: Hub,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add("ann/shapes", model_safetensors=weights.read_bytes())
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (96, 96), "orange").save("photo.jpg")
    code = card_part(weights, "ann/shapes").split("```")[1].removeprefix("python\n")
    names: dict[str, Any] = {}
    exec(code, names)
    assert isinstance(names["detections"], vidt.Detections)
    assert main(["predict", "hf://ann/shapes", "photo.jpg", "--device", "cpu"]) == 0
    assert main(["info", "hf://ann/shapes"]) == 0 and "disc" in capsys.readouterr().out
    require_files(TrainConfig(load_from="hf://ann/shapes"))


@pytest.mark.slow
def test_a_revision_is_that_one(hub: Hub, weights: Path) -> None:
    repository = hub.add("ann/shapes", model_safetensors=weights.read_bytes())
    first = repository.sha()
    repository.files["model.safetensors"] += b" "
    repository.commit()
    assert local_weights(f"hf://ann/shapes@{first}").read_bytes() == weights.read_bytes()
    assert local_weights("hf://ann/shapes").read_bytes() == weights.read_bytes() + b" "
    with pytest.raises(Unreachable, match="no revision v9; omit it"):
        local_weights("hf://ann/shapes@v9")


@pytest.mark.slow
def test_a_later_push_keeps_what_the_owner_wrote(hub: Hub, weights: Path) -> None:
    assert main(["push", str(weights), "ann/shapes", "--public"]) == 0
    files = hub.repositories["ann/shapes"].files
    assert not hub.repositories["ann/shapes"].private
    card = files["README.md"].decode()
    own = card.replace("---\n\n", "license: mit\n---\n\nMine.\n\n").replace("0.250", "0.111")
    files["README.md"] = own.encode()
    hub.repositories["ann/shapes"].commit()
    assert main(["push", str(weights), "ann/shapes", "--public"]) == 0
    assert files["README.md"].decode() == own.replace("0.111", "0.250")


def test_visibility_never_changes_unasked(
    hub: Hub, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("ann/open"), hub.add("ann/closed", private=True)
    assert "pass --public" in refusal(capsys, "push", weights, "ann/open")
    assert "omit --public" in refusal(capsys, "push", weights, "ann/closed", "--public")
    assert hub.repositories["ann/open"].files == hub.repositories["ann/closed"].files == {}


def test_what_the_hub_refuses_is_one_line(
    hub: Hub,
    weights: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add("ann/closed", private=True, model_safetensors=weights.read_bytes())
    hub.add("ann/other", best_safetensors=weights.read_bytes())
    assert "may write to bob/x" in refusal(capsys, "push", weights, "bob/x")
    assert "no such model" in refusal(capsys, "info", "hf://ann/missing")
    assert "hf://ann/other/FILE.safetensors" in refusal(capsys, "info", "hf://ann/other")
    assert local_weights("hf://ann/other/best.safetensors").is_file()
    hub.status = 503
    assert "status 503" in refusal(capsys, "push", weights, "ann/shapes")
    hub.status = None
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "refuses the token; log in" in refusal(capsys, "push", weights, "ann/shapes")
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\x01")  # no HTTP header
    refusal(capsys, "push", weights, "ann/shapes")
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refusal(capsys, "push", weights, "ann/shapes")
    assert "or it is private" in refusal(capsys, "info", "hf://ann/closed")
    assert set(hub.repositories) == {"ann/closed", "ann/other"}


def test_offline(
    hub: Hub, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("ann/shapes", model_safetensors=weights.read_bytes())
    cached = local_weights("hf://ann/shapes")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.utils.close_session()  # it holds the former setting
    assert local_weights("hf://ann/shapes") == cached
    assert "check the network" in refusal(capsys, "info", "hf://ann/missing")
    assert "check the network" in refusal(capsys, "push", weights, "ann/shapes")
    huggingface_hub.utils.close_session()


def test_a_file_that_the_hub_did_not_promise_is_refused(hub: Hub, weights: Path) -> None:
    hub.add("ann/shapes", model_safetensors=weights.read_bytes())
    hub.corrupt = True
    with pytest.raises(
        Unreachable, match=r"its SHA-256 is .*delete it to fetch it again"
    ) as caught:
        local_weights("hf://ann/shapes")
    hub.corrupt = False
    Path(str(caught.value).partition(": ")[0]).unlink()
    assert local_weights("hf://ann/shapes").read_bytes() == weights.read_bytes()


def test_a_pickle_under_the_name_is_not_read(hub: Hub, tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "released.pth")
    hub.add("ann/shapes", model_safetensors=(tmp_path / "released.pth").read_bytes())
    with pytest.raises(UserError, match="no safetensors file"):
        vidt.load("hf://ann/shapes")


def test_the_token_goes_over_no_plain_line(
    hub: Hub, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example")
    assert "unencrypted" in refusal(capsys, "push", weights, "ann/shapes")
    assert "unencrypted" in refusal(capsys, "info", "hf://ann/shapes")


def test_only_our_weights_are_pushed(
    hub: Hub, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": {}}, tmp_path / "released.pth")
    assert "vidt.convert" in refusal(capsys, "push", tmp_path / "released.pth", "ann/shapes")
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:200])
    assert "cannot be read" in refusal(capsys, "push", tmp_path / "cut.safetensors", "ann/shapes")
    assert "no/file" in refusal(capsys, "push", "no/file", "ann/shapes")
    assert "USER/NAME" in refusal(capsys, "push", weights, "shapes")
    assert "USER/NAME" in refusal(capsys, "push", weights, "ann/shapes@v1")
    assert hub.requests == []


def test_the_card(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(weights), "ann/shapes", "--dry_run"]) == 0
    card = capsys.readouterr().out
    _, front, text = card.split("---\n", 2)
    assert "license" not in yaml.safe_load(front) and "stated none" in text
    assert yaml.safe_load(front)["pipeline_tag"] == "object-detection"
    assert "vidt predict hf://ann/shapes photo.jpg" in text
    for row in ("| map50 | 0.250 |", "| training | shapes.json | 1,200 | 3,400 |"):
        assert row in text
    assert "| preset | auto |" in text and "load\\_from |" not in text
    # Names cannot end a table or a line, nor be HTML.
    assert "disc, &lt;b>\\|square\\`, star" in text and "\n# Title" not in text


def test_a_card_without_marks_stays(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = card_part(weights, "ann/shapes")
    assert part.startswith(BEGIN) and part.endswith(END)
    assert merged_card("# Mine\n", part) == "# Mine\n"
    assert "stays as it is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("hf://a/b", HubAddress("a/b")),
        ("hf://a/b@v1.0", HubAddress("a/b", "v1.0")),
        ("hf://a/b@refs/pr/3", HubAddress("a/b", "refs/pr/3")),
        ("hf://a/b/x/best.safetensors", HubAddress("a/b", None, "x/best.safetensors")),
        ("hf://a-1/b.c@0123abc/m.safetensors", HubAddress("a-1/b.c", "0123abc", "m.safetensors")),
    ],
)
def test_addresses(source: str, wanted: HubAddress) -> None:
    assert hub_address(source) == wanted


@pytest.mark.parametrize(
    "source",
    [
        "hf://",
        "hf://a",
        "hf://a/b@",
        "hf://a/b/best.pth",
        "hf://a/b/../c.safetensors",
        "hf://a/b c",
    ],
)
def test_no_addresses(source: str) -> None:
    with pytest.raises(Unreachable, match="write hf://USER/NAME"):
        local_weights(source)


@pytest.mark.slow
def test_the_environment_alone_sets_it_up(hub: Hub, weights: Path, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_TOKEN and HF_HOME, as a user sets them."""
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "trainer.commands.command_line"]
    done = subprocess.run(
        [*command, "push", str(weights), "ann/shapes"],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "(private)" in done.stdout and TOKEN not in done.stdout + done.stderr
    assert hub.repositories["ann/shapes"].files["model.safetensors"] == weights.read_bytes()
