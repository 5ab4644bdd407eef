"""Weights files: whole, or refused in one line that names the file."""

import argparse
import dataclasses
import hashlib
import json
import os
import resource
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from served import Served, served
from tiny_runs import ROOT, blurred, cpu
from torch import Tensor

import vidt
from trainer.commands.command_line import main
from trainer.loop.agreement import Agreement
from trainer.loop.start import load_start, require_files
from trainer.settings.config import TrainConfig
from trainer.settings.flags import ConfigError
from trainer.settings.parsing import parse
from vidt import ViDT, ViDTConfig
from vidt.downloads import SameSchemes
from vidt.images.preprocessing import Preprocessing
from vidt.model.vidt import build_detector
from vidt.weights import published
from vidt.weights.checkpoint import load_model, matching_classes, read_start, start_from
from vidt.weights.published import (
    LEAST_BYTES,
    PUBLISHED,
    TEACHERS,
    Published,
    Unreachable,
    local_weights,
    published_for,
)
from vidt.weights.released import to_released
from vidt.weights.weights_file import WeightsInfo, load_weights, read_pickled, save_weights

NAMES = ("disc", "square", "star")


def info_of(model: ViDT, names: tuple[str, ...] = NAMES) -> WeightsInfo:
    preprocessing = Preprocessing(96, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    return WeightsInfo(model.config, names, preprocessing, {"map50": 0.25})


@pytest.fixture
def saved(tiny_model: ViDT, tmp_path: Path) -> Path:
    save_weights(tmp_path / "tiny.safetensors", tiny_model.state_dict(), info_of(tiny_model))
    return tmp_path / "tiny.safetensors"


@contextmanager
def refused(path: Path, reason: str | None = None) -> Iterator[None]:
    """A ValueError of one line that names the file."""
    with pytest.raises(ValueError, match=reason) as caught:
        yield
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_round_trip(tiny_model: ViDT, saved: Path) -> None:
    model, info = load_model(saved)
    assert info == info_of(tiny_model)
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert os.listdir(saved.parent) == [saved.name]


def test_saving_makes_folders_and_replaces(tiny_model: ViDT, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "first" / "best.safetensors"
    save_weights(path, tiny_model.state_dict(), info_of(tiny_model, ("a", "b", "c")))
    os.link(path, tmp_path / "old")  # like somebody who is reading it
    save_weights(path, tiny_model.state_dict(), info_of(tiny_model))
    assert load_weights(path)[1].class_names == NAMES
    assert load_weights(tmp_path / "old")[1].class_names == ("a", "b", "c")


def test_a_failed_write_leaves_the_old_file_alone(tiny_model: ViDT, saved: Path) -> None:
    before = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as on a full disk
    try:
        with pytest.raises(Exception, match="File too large"):
            save_weights(saved, tiny_model.state_dict(), info_of(tiny_model, ("x", "y", "z")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("read", [load_weights, load_model, read_start])
@pytest.mark.parametrize("length", [0, 5, 9, 200, -100_000, -1])
def test_truncated_files_are_refused(saved: Path, length: int, read: Callable) -> None:
    saved.write_bytes(saved.read_bytes()[:length])
    with refused(saved):
        read(saved)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 but no archive", b"\x80\x02."])
def test_damaged_pickles_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with refused(path):
        read_start(path)


def test_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    for read in (load_weights, load_model, read_start):
        with refused(path, "not a ViDT weights file"):
            read(path)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    for read in (load_weights, load_model, read_start):
        with refused(tmp_path / "nowhere.safetensors"):
            read(tmp_path / "nowhere.safetensors")


def test_a_header_that_promises_more_than_the_tensors(tiny_model: ViDT, tmp_path: Path) -> None:
    tensors = dict(tiny_model.state_dict())
    del tensors["tgt_proj.0.bias"]
    path = tmp_path / "part.safetensors"
    save_weights(path, tensors, info_of(tiny_model))
    with refused(path, r"tgt_proj\.0\.bias"):
        load_model(path)
    with refused(path, r"tgt_proj\.0\.bias"):
        start_from(tiny_model, path, NAMES)


class Trap:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"model": {}, "args": Trap(tmp_path / "trapped")}, path)
    for read in (read_pickled, read_start):
        with refused(path, f"cannot be read safely .* holds a {os.name}.mkdir; only tensors"):
            read(path)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    "content", [[1], {"model": 5}, {"model": {"fc.weight": torch.ones(1)}}, {}]
)
def test_other_peoples_files_are_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with refused(path):
        read_start(path)


def released_names(model: ViDT) -> dict[str, Tensor]:
    """As the published code would save the model: other names, aliases, unread tensors."""
    released = {
        "transformer.level_embed": torch.zeros(4, 256),
        "backbone.norm1.weight": torch.ones(96),
    }
    for name, tensor in model.state_dict().items():
        theirs = name.replace("decoder.reference_points", "reference_points")
        theirs = f"transformer.{theirs}" if name.startswith("decoder.") else name
        released[theirs] = tensor
        if name.startswith("bbox_embed."):
            released[f"transformer.decoder.{name}"] = tensor
    return released


def test_released_checkpoints_load(tmp_path: Path) -> None:
    config = ViDTConfig(num_classes=3, det_token_num=5, dec_layers=1, dim_feedforward=64)
    model, fresh = ViDT(config), ViDT(config)
    path = tmp_path / "vidt_nano_50.pth"
    settings = argparse.Namespace(backbone_name="swin_nano", lr=1e-4)
    torch.save({"model": released_names(model), "args": settings, "epoch": 49}, path)
    transfer = start_from(fresh, path, NAMES)
    assert transfer.kept == NAMES and not transfer.new
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name
    fewer = ViDT(dataclasses.replace(config, num_classes=2))
    assert start_from(fewer, path, NAMES[:2]).new == NAMES[:2]  # rows of unknown classes


def test_head_rows_go_by_class_name(tiny_model: ViDT, saved: Path) -> None:
    wanted = ("star", "cross", "disc", "heart")
    config = dataclasses.replace(tiny_model.config, num_classes=4, dropout=0.3, aux_loss=False)
    model = ViDT(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    transfer = start_from(model, saved, wanted)
    assert transfer.kept == ("star", "disc")
    assert transfer.dropped == ("square",) and transfer.new == ("cross", "heart")
    assert str(transfer) == "kept 2: star, disc; dropped 1: square; new 2: cross, heart"
    after, theirs = model.state_dict(), tiny_model.state_dict()
    for name in after:
        if not name.startswith("class_embed."):
            assert torch.equal(after[name], theirs[name]), name
        else:
            assert torch.equal(after[name][[0, 2]], theirs[name][[2, 0]]), name
            assert torch.equal(after[name][[1, 3]], before[name][[1, 3]]), name


def test_class_names_match_apart_from_case_and_blanks(tiny_model: ViDT, saved: Path) -> None:
    """As the platform of YMIR compares them: equal names first."""
    wanted = ("star ", "cross", "DISC", "disc")
    model = ViDT(dataclasses.replace(tiny_model.config, num_classes=4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    transfer = start_from(model, saved, wanted)
    assert transfer.kept == ("star ", "disc") and transfer.new == ("cross", "DISC")
    assert transfer.dropped == ("square",)
    assert "kept 2: star  (as 'star', apart from case and blanks), disc;" in str(transfer)
    after, theirs = model.state_dict(), tiny_model.state_dict()
    for name in (name for name in after if name.startswith("class_embed.")):
        assert torch.equal(after[name][[0, 3]], theirs[name][[2, 0]]), name
        assert torch.equal(after[name][[1, 2]], before[name][[1, 2]]), name


@pytest.mark.parametrize(
    ("class_names", "known", "pairs"),
    [
        (("RBC", "rbc "), ("rbc ", "RBC"), {0: 1, 1: 0}),
        (("RBC", "wbc"), (" WBC", "rbc"), {0: 1, 1: 0}),
        (("a", "A"), ("A ",), {0: 0}),  # no row serves two classes
        (("x",), ("y",), {}),
    ],
)
def test_matching_classes(class_names: tuple, known: tuple, pairs: dict) -> None:
    assert matching_classes(class_names, known) == pairs


def test_a_warning_if_no_class_matches(
    tiny_model: ViDT, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ViDT(dataclasses.replace(tiny_model.config, num_classes=1))
    start_from(model, saved, ("hexagon",))
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    lines = warning.getMessage().splitlines()
    assert "WARNING: no class" in lines[1] and str(saved) in lines[1]
    assert lines[2].endswith(", ".join(NAMES)) and lines[3].endswith("hexagon")


@pytest.mark.parametrize(
    "field, value", [("det_token_num", 9), ("dec_layers", 3), ("with_box_refine", False)]
)
def test_another_architecture_names_the_flag(
    tiny_model: ViDT, saved: Path, field: str, value: object
) -> None:
    model = ViDT(dataclasses.replace(tiny_model.config, **{field: value}))
    theirs = getattr(tiny_model.config, field)
    with refused(saved, f"{field} {theirs}, this run {value}; pass --{field} {theirs}"):
        start_from(model, saved, NAMES)


@pytest.mark.parametrize("refine", [True, False])
def test_fewer_decoder_layers_load_by_name(
    tiny_config: ViDTConfig, tmp_path: Path, refine: bool, caplog: pytest.LogCaptureFixture
) -> None:
    whole = blurred(ViDT(dataclasses.replace(tiny_config, with_box_refine=refine))).eval()
    path = tmp_path / "whole.safetensors"
    save_weights(path, whole.state_dict(), info_of(whole))
    with caplog.at_level("INFO"):
        model, info = load_model(path, dec_layers=1)
    said = "left out decoder layers 2 to 2 and the heads above them, "
    assert f"{path}: {said}" in caplog.text
    assert info.config == model.config == dataclasses.replace(whole.config, dec_layers=1)
    tuned = ViDT(info.config).eval()
    transfer = start_from(tuned, path, NAMES)
    assert transfer.kept == NAMES and said in str(transfer)
    images, padding = torch.randn(1, 3, 48, 64), torch.zeros(1, 48, 64, dtype=torch.bool)
    with torch.no_grad():
        wanted = whole(images, padding)["aux_outputs"][1]  # of the levels 0, 1 and 2
        for found in (model.eval()(images, padding), tuned(images, padding)):
            for name in ("pred_logits", "pred_boxes"):
                assert torch.equal(found[name], wanted[name]), name
    with refused(path, "2 decoder layers, not 3; pass --dec_layers 2"):
        load_model(path, dec_layers=3)


PLUS = {"iou_aware": True, "token_label": True, "with_vector": True, "n_keep": 16}


def test_heads_that_find_no_boxes_may_be_left_out_or_start_afresh(
    tiny_config: ViDTConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, **PLUS, gt_mask_len=32)
    plus, plain = blurred(ViDT(config)), blurred(ViDT(tiny_config))
    path = tmp_path / "weights.safetensors"
    for source, target, words in ((plus, plain, "left out the"), (plain, plus, "afresh")):
        save_weights(path, source.state_dict(), info_of(source))
        before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
        notes = start_from(target, path, NAMES).notes
        assert len(notes) == 3 and all(words in note for note in notes)
        theirs = source.state_dict()
        for name, tensor in target.state_dict().items():
            assert torch.equal(tensor, theirs.get(name, before[name])), name
    save_weights(path, plus.state_dict(), info_of(plus))
    with refused(path, "n_keep 16, this run 8; pass --n_keep 16"):
        start_from(ViDT(dataclasses.replace(config, n_keep=8)), path, NAMES)


QUERIES = {"label_embedding": True, "query_groups": 3, "look_forward_twice": True}


def test_parts_for_training_alone_need_not_agree(tiny_config: ViDTConfig, tmp_path: Path) -> None:
    """Embedded labels go by class name; groups and labels are left out or start afresh."""
    more = blurred(ViDT(dataclasses.replace(tiny_config, **QUERIES)))
    path = tmp_path / "weights.safetensors"
    save_weights(path, more.state_dict(), info_of(more))
    for changes, names, notes in (
        (QUERIES, ("star", "cross", "disc"), 0),
        ({**QUERIES, "num_classes": 2}, ("cross", "square"), 0),
        ({**QUERIES, "query_groups": 2}, NAMES, 2),  # left out, and afresh
        ({}, NAMES, 2),
    ):
        model = ViDT(dataclasses.replace(tiny_config, **changes))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert len(start_from(model, path, names).notes) == notes
        if model.label_enc is not None and more.label_enc is not None:
            for row, name in enumerate(names):
                old = before["label_enc.weight"][row]
                theirs = more.label_enc.weight[NAMES.index(name)] if name in NAMES else old
                assert torch.equal(model.label_enc.weight[row], theirs), name
        if model.group_pos is not None and model.config.query_groups == 3:
            assert torch.equal(model.group_pos, more.group_pos)
    plain = ViDT(tiny_config)
    save_weights(path, plain.state_dict(), info_of(plain))
    assert len(start_from(more, path, NAMES).notes) == 2


def test_without_decoder_layers_no_training_queries(
    tiny_config: ViDTConfig, tmp_path: Path
) -> None:
    whole = ViDT(dataclasses.replace(tiny_config, **QUERIES))
    path = tmp_path / "weights.safetensors"
    save_weights(path, whole.state_dict(), info_of(whole))
    model, info = load_model(path, dec_layers=0)
    assert info.config == dataclasses.replace(tiny_config, dec_layers=0)
    assert start_from(model, path, NAMES).kept == NAMES


def test_token_columns_go_by_class_name(tiny_config: ViDTConfig, tmp_path: Path) -> None:
    """From a released file, whose indicator stands in class 0's place."""
    names = ("nothing", "disc", "square")
    theirs = dataclasses.replace(tiny_config, token_label=True, token_label_shift=False)
    released, ours = (
        blurred(ViDT(theirs)),
        ViDT(dataclasses.replace(theirs, token_label_shift=True)),
    )
    path = tmp_path / "weights.safetensors"
    save_weights(path, released.state_dict(), info_of(released, names))
    assert ours.token_head.token_embed.weight.shape[0] == 4
    before = ours.token_head.token_embed.weight.detach().clone()
    assert start_from(ours, path, ("square", "nothing", "star")).kept == ("square", "nothing")
    found, wanted = ours.token_head.token_embed.weight, released.token_head.token_embed.weight
    assert torch.equal(found[:2], wanted[[0, 2]])  # the indicator, and "square"
    assert torch.equal(found[2:], before[2:])  # the file has no column for its class 0


def test_released_coco_heads_have_coco_names(tmp_path: Path) -> None:
    config = ViDTConfig(num_classes=91, det_token_num=5, dec_layers=1, dim_feedforward=64)
    model = blurred(ViDT(config))
    path = tmp_path / "vidt_nano_50.pth"
    torch.save({"model": to_released(model.state_dict(), config)}, path)
    loaded, info = load_model(path)
    assert info.config == config and info.preprocessing == Preprocessing(800)
    assert (info.class_names[1], info.class_names[90]) == ("person", "toothbrush")
    assert len(set(info.class_names)) == 91 and loaded.config.num_classes == 91
    wanted = ("toothbrush", "disc", "stop sign")
    tuned = ViDT(dataclasses.replace(config, num_classes=3))
    assert start_from(tuned, path, wanted).kept == ("toothbrush", "stop sign")
    assert torch.equal(tuned.class_embed[1].weight[[0, 2]], model.class_embed[1].weight[[90, 13]])


def test_without_neck_the_background_stays_last(tiny_config: ViDTConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config, method="vidt_wo_neck")
    source = build_detector(config)
    path = tmp_path / "weights.safetensors"
    save_weights(path, source.state_dict(), WeightsInfo(config, NAMES, Preprocessing()))
    tuned = build_detector(dataclasses.replace(config, num_classes=1, dec_layers=6))
    assert start_from(tuned, path, ("star",)).kept == ("star",)
    found, wanted = tuned.state_dict(), source.state_dict()
    for name, tensor in found.items():
        rows = [2, 3] if name.startswith("class_embed.layers.2.") else slice(None)
        assert torch.equal(tensor, wanted[name][rows]), name


def test_weights_from_an_address(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two addresses may end in the same name; each is fetched once."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    assert local_weights(str(saved)) == saved
    other = tmp_path / "other" / saved.name
    other.parent.mkdir()
    other.write_bytes(b"another file")
    for source in (saved, other):
        content = source.read_bytes()
        with served(content) as server:
            first = local_weights(server.address, allow_http=True)
            assert first.read_bytes() == content
        assert local_weights(server.address, allow_http=True) == first  # without the server
        with pytest.raises(Unreachable, match="no https address; give the path of a file"):
            local_weights(source.as_uri())


def test_an_address_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    address = "http://127.0.0.1:9/gone.safetensors"
    with pytest.raises(ValueError, match="fetch it by hand and pass --load_from FILE") as caught:
        local_weights(address, allow_http=True)
    assert address in str(caught.value) and "\n" not in str(caught.value)


def test_a_download_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 40
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    good, bad = hashlib.sha256(content).hexdigest(), "0" * 64
    with served(content) as server:
        address = server.address
        for source, reason in (
            (f"{address}?cut", "after 10240 of 10340"),
            (f"{address}#sha256={bad}", good),
        ):
            with pytest.raises(Unreachable, match=f"{reason}.*pass --load_from FILE"):
                local_weights(source, allow_http=True)
            assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []
        for fragment in (f"SHA256={good}", f"sha256:{good}", "sha256=12", "md5=0"):
            with pytest.raises(Unreachable, match="is no hash; write #sha256="):
                local_weights(f"{address}#{fragment}", allow_http=True)
        path = local_weights(f"{address}#sha256={good}", allow_http=True)
        assert path.read_bytes() == content and local_weights(address, allow_http=True) == path
        assert len(server.requests) == 3  # the last is not fetched again
        path.write_bytes(b"something else")
        with pytest.raises(Unreachable, match="SHA-256"):
            local_weights(f"{address}#sha256={good}", allow_http=True)
        # Without a hash in the address, the one that was noted counts.
        with pytest.raises(Unreachable, match=f"delete {path} and {path.name}.sha256"):
            local_weights(address, allow_http=True)
        path.write_bytes(content)
        assert local_weights(address, allow_http=True) == path


def test_only_https_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with served(b"weights") as server:
        with pytest.raises(Unreachable, match="its https address, or pass --allow_http"):
            local_weights(server.address)
        for source in ("ftp://127.0.0.1/w.pth", "data://text/plain,w", "x://y"):
            with pytest.raises(Unreachable, match="is no https address"):
                local_weights(source, allow_http=True)
        assert server.requests == []
    assert not (tmp_path / "hub").exists()
    # Nor does an https address lead to an http one.
    follow = SameSchemes(allow_http=False).redirect_request
    request = urllib.request.Request("https://127.0.0.1/w.pth")
    with pytest.raises(Unreachable, match="unencrypted"):
        follow(request, None, 302, "Found", {}, "http://127.0.0.1/w.pth")
    assert follow(request, None, 302, "Found", {}, "https://127.0.0.2/w.pth") is not None


@contextmanager
def no_superuser() -> Iterator[None]:
    """Permissions do not hold one back."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def assert_unreachable(reason: str) -> None:
    """In one line, and before anything is asked of the server."""
    with served(b"weights") as server:
        with pytest.raises(Unreachable, match=rf"{reason}.*pass --load_from FILE") as caught:
            local_weights(server.address, allow_http=True)
        assert "\n" not in str(caught.value) and server.requests == []


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which is its owner's alone
        os.chmod(folder, 0o755)
        cache = Path(folder) / "hub" / "checkpoints"
        cache.mkdir(parents=True)
        cache.chmod(0o555)
        monkeypatch.setenv("TORCH_HOME", folder)
        with no_superuser():
            assert_unreachable("Permission denied")
        cache.rmdir()
        cache.touch()  # a file in its place
        assert_unreachable("File exists")


def test_coco_starts_from_the_published_detector(
    tiny_config: ViDTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetched once; a file that is in the cache, as in an image, is not fetched."""
    source = blurred(ViDT(dataclasses.replace(tiny_config, num_classes=91)))
    file, fetched = tmp_path / "published.pth", []
    torch.save({"model": to_released(source.state_dict(), source.config)}, file)

    def fetch(url: str, path: Path, *rest: object) -> None:
        fetched.append(url)
        shutil.copyfile(file, path)

    url = PUBLISHED["vidt_nano_150"].url
    ours = Published(tiny_config.backbone_name, url, None)
    monkeypatch.setitem(PUBLISHED, "vidt_nano_150", ours)
    monkeypatch.setattr(published, "_download", fetch)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    names = ("stop sign", "hexagon", "Person ")
    for _ in range(2):
        model = ViDT(dataclasses.replace(tiny_config, num_classes=3))
        fresh = model.class_embed[0].weight[1].clone()
        load_start(model, TrainConfig(pre_trained="coco"), names, Agreement(cpu()))
        assert torch.equal(
            model.class_embed[0].weight[[0, 2]], source.class_embed[0].weight[[13, 1]]
        )
        assert torch.equal(model.class_embed[0].weight[1], fresh)
        assert torch.equal(model.backbone.det_token, source.backbone.det_token)
    assert fetched == [url]


def test_coco_needs_a_published_detector() -> None:
    assert published_for("swin_nano").url.endswith("vidt_nano_150.pth")
    assert published_for("swin_tiny", epff=True).url.endswith("vidt_plus_tiny_det300.pth")
    for flags in ("--backbone_name coat_lite_tiny", "--method vidt_wo_neck"):
        with pytest.raises(ConfigError, match=r"pre_trained is coco; .* swin_nano, swin_tiny"):
            parse(["--pre_trained", "coco", *flags.split()])
    parse(["--pre_trained", "coco", "--backbone_name", "coat_lite_tiny", "--load_from", "x.pth"])


@pytest.fixture
def served_model(
    tiny_config: ViDTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Served]:
    """vidt_plus_tiny of the table is a small released file at an address of this machine."""
    source = blurred(ViDT(dataclasses.replace(tiny_config, num_classes=91)))
    torch.save(
        {"model": to_released(source.state_dict(), source.config)}, tmp_path / "released.pth"
    )
    content = (tmp_path / "released.pth").read_bytes()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with served(content) as server:
        ours = Published("swin_test", server.address, 49.7, len(content) // LEAST_BYTES)
        monkeypatch.setitem(PUBLISHED, "vidt_plus_tiny", ours)
        monkeypatch.setattr(published, "require_scheme", lambda *_: None)  # it is http
        yield server


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """What `vidt models --json` says, by name."""
    capsys.readouterr()
    assert main(["models", "--json"]) == 0
    return {model["name"]: model for model in json.loads(capsys.readouterr().out)}


def test_a_published_model_by_its_name(
    served_model: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert listed(capsys)["vidt_plus_tiny"]["file"] is None
    first, again = vidt.load("vidt_plus_tiny", device="cpu"), local_weights("vidt_plus_tiny")
    assert first.class_names[1] == "person" and len(served_model.requests) == 1
    shown = listed(capsys)["vidt_plus_tiny"]
    assert shown["file"] == str(again) and shown["bytes"] == again.stat().st_size
    assert set(listed(capsys)) == set(PUBLISHED)
    assert main(["models"]) == 0 and "49.7" in capsys.readouterr().out
    # Its hash was noted.
    again.write_bytes(again.read_bytes() + b"x")
    with pytest.raises(Unreachable, match=r"^vidt_plus_tiny .*SHA-256 is .*delete .* its path$"):
        vidt.load("vidt_plus_tiny", device="cpu")


def test_a_file_of_a_published_name_wins(
    served_model: Served, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved.rename("vidt_plus_tiny")
    assert local_weights("vidt_plus_tiny") == Path("vidt_plus_tiny")
    assert parse(["--load_from", "vidt_plus_tiny"])[1] == parse([])[1]
    assert served_model.requests == []


def test_a_page_in_place_of_a_model_is_refused(
    served_model: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Such as that of a proxy, which comes with a length of its own."""
    large = dataclasses.replace(PUBLISHED["vidt_plus_tiny"], parameters=10**9)
    monkeypatch.setitem(PUBLISHED, "vidt_plus_tiny", large)
    with pytest.raises(Unreachable, match="needs 2,000,000,000 or more"):
        local_weights("vidt_plus_tiny")
    assert list((tmp_path / "cache" / "hub" / "checkpoints").iterdir()) == []


def test_a_name_sets_the_architecture_and_flags_override_it() -> None:
    _, model = parse(["--load_from", "vidt_plus_tiny"])
    wanted = ViDTConfig(backbone_name="swin_tiny", epff=True, det_token_num=300)
    assert ViDTConfig(**{**model, "num_classes": 80}) == wanted
    _, model = parse(["--load_from", "vidt_tiny_150", "--dec_layers", "2"])
    assert (model["backbone_name"], model["dec_layers"], model["epff"]) == ("swin_tiny", 2, False)


def test_a_misspelt_name_is_told_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vidt_plus_tinny.*nearest name is vidt_plus_tiny"):
        require_files(TrainConfig(load_from="vidt_plus_tinny"))
    with pytest.raises(ValueError, match=r"vidt_plus_tinny.*nearest name is vidt_plus_tiny"):
        vidt.load("vidt_plus_tinny")
    require_files(TrainConfig(load_from="vidt_plus_tiny"))


def test_the_page_and_the_table_of_published_models_agree() -> None:
    page = (ROOT / "docs/published-models.md").read_text(encoding="utf-8")
    for name, model in PUBLISHED.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
        assert model.url in line and f"| {'-' if model.ap is None else model.ap} |" in line
        assert model.parameters is None or f"| {model.parameters:,} (" in line


def test_the_table_of_published_models() -> None:
    assert len(PUBLISHED) == 18 and len({model.url for model in PUBLISHED.values()}) == 18
    base = "https://github.com/naver-ai/vidt/releases/download/"
    assert PUBLISHED["vidt_nano_150"].url == base + "v0.1-vidt/vidt_nano_150.pth"
    assert TEACHERS["vidt_plus_base"].backbone_name == "swin_base_win7_22k"
