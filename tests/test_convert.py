"""Names of released checkpoints to ours and back, on every golden key list; the program around it;
files of another kind.
"""

import argparse
import dataclasses
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vidt import ViDTConfig
from vidt.convert import main
from vidt.images.preprocessing import Preprocessing
from vidt.model.vidt import build_detector
from vidt.weights.checkpoint import load_model, read_start
from vidt.weights.published import coco_rows
from vidt.weights.released import (
    imagenet_swin,
    name_in_released,
    our_name,
    released_config,
    released_vidt,
    to_released,
    unread_tensors,
)
from vidt.weights.weights_file import WeightsInfo, load_unread, load_weights, save_weights

VARIANTS = (
    "vidt_swin_nano",
    "vidt_swin_nano_nc3_norefine",
    "vidt_swin_tiny_epff_iou_token_300",
    "vidt_plus_swin_nano_300",
    "vidt_wo_neck_swin_nano",
    "vidt_coat_lite_tiny",
)
OTHER_SIZES = (
    *("vidt_swin_nano_dec4", "vidt_swin_tiny", "vidt_swin_small", "vidt_swin_base_win7_22k"),
    *("vidt_plus_swin_nano_300_dec4", "vidt_plus_swin_tiny_300", "vidt_plus_swin_small_300"),
    "vidt_plus_swin_base_win7_22k_300",
)
LISTS = {
    **{f"{variant}/keys.json": f"{variant}/meta.json" for variant in VARIANTS},
    **{f"keys/{name}.json": f"keys/{name}.json" for name in OTHER_SIZES},
}


def stored(path: str) -> dict[str, Tensor]:
    """A state dict of the released names and shapes; all zeros, without the memory for them."""
    keys = golden.read_json(path)["keys"]
    return {name: torch.zeros(()).expand(shape) for name, (_, shape, _) in keys.items()}


def filled(path: str) -> dict[str, Tensor]:
    """A state dict as the released code saves it: shared tensors are one."""
    keys = golden.read_json(path)["keys"]
    own = {name: facts for name, facts in keys.items() if facts[2] is None}
    tensors = {name: torch.from_numpy(array) for name, array in golden.fill().fill(own).items()}
    index = position_index()
    return {
        name: tensors[alias or name] if dtype == "float32" else index
        for name, (dtype, _, alias) in keys.items()
    }


def position_index() -> Tensor:
    """Of two places of a 7 x 7 window: 13 * (row difference + 6) + column difference + 6."""
    rows, columns = torch.arange(49) // 7, torch.arange(49) % 7
    return 13 * (rows[:, None] - rows + 6) + columns[:, None] - columns + 6


def settings(path: str) -> dict[str, object]:
    """What a key list's arguments ask for, by the names of our configuration."""
    words = [word for word in golden.read_json(LISTS[path])["arguments"] if word != "--masks"]
    flags = dict(zip(words[::2], words[1::2], strict=True))
    values: dict[str, object] = {"method": "vidt", "dec_layers": 6, "det_token_num": 100}
    switches = ("epff", "iou_aware", "token_label", "with_vector", "with_box_refine")
    values |= dict.fromkeys(switches, False)
    for flag, value in flags.items():
        number = value.isdecimal()
        values[flag.removeprefix("--")] = int(value) if number else {"True": True}.get(value, value)
    values["num_classes"] = golden.read_json(LISTS[path]).get("num_classes", 91)
    return values


@golden.present
@pytest.mark.parametrize("path", LISTS)
def test_configuration_is_read_off_the_tensors(path: str) -> None:
    found, expected = released_config(stored(path)), settings(path)
    if expected["method"] == "vidt_wo_neck":  # it has none of these
        expected |= {"with_box_refine": True}
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.token_label_shift is not found.token_label  # 91 columns for 91 classes
    assert (found.reduced_dim, found.pos_dim, found.dec_n_points) == (256, 256, 4)


@golden.present
@pytest.mark.parametrize("path", LISTS)
def test_every_released_tensor_finds_its_place(path: str) -> None:
    config = released_config(stored(path))
    with torch.device("meta"):
        model = build_detector(config)
    converted = released_vidt(stored(path), config)
    assert {name: tensor.shape for name, tensor in converted.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }


@golden.present
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if "base" in path else ()) for path in LISTS],
)
def test_there_and_back_is_the_identity(path: str) -> None:
    tensors = filled(path)
    config = released_config(tensors)
    ours = released_vidt(tensors, config)
    back = to_released(ours, config, unread_tensors(tensors))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    again = released_vidt(back, released_config(back))
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.items())


@golden.present
@pytest.mark.parametrize("path", LISTS)
def test_the_released_key_list_is_written_from_a_fresh_detector(path: str) -> None:
    """Types, shapes and which names share a tensor, with nothing kept from a released file."""
    with torch.device("meta"):
        config = released_config(stored(path))
        model = build_detector(config)
    written = to_released(model.state_dict(), config)
    first: dict[int, str] = {}
    for name in sorted(written):  # as in the list, the first name by the alphabet stands for all
        first.setdefault(id(written[name]), name)
    found = {
        name: [
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            None if first[id(tensor)] == name else first[id(tensor)],
        ]
        for name, tensor in written.items()
    }
    assert found == golden.read_json(path)["keys"]


@golden.present
@pytest.mark.parametrize("variant", ["vidt_plus_swin_nano_300", "vidt_coat_lite_tiny"])
def test_the_program_goes_there_and_back(variant: str, tmp_path: Path) -> None:
    tensors = filled(f"{variant}/keys.json")
    epff = argparse.Namespace(cross_scale_fusion=True, lr=1e-4)  # as the first release named it
    names = ("in.pth", "our.safetensors", "back.pth")
    first, ours, back = (str(tmp_path / name) for name in names)
    torch.save({"model": tensors, "args": epff, "epoch": 49, "optimizer": {"state": {}}}, first)
    assert main([first, ours]) == 0
    model, info = load_model(ours)
    assert info.class_names == coco_rows() and info.config == released_config(tensors)
    assert load_unread(ours).keys() == unread_tensors(tensors).keys()
    assert main([ours, back]) == 0
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(back, weights_only=True)
    assert content["args"].cross_scale_fusion is content["args"].epff is info.config.epff
    assert content["model"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(content["model"][name], tensor), name
    assert (tmp_path / "back.pth").stat().st_size < 1.01 * (tmp_path / "in.pth").stat().st_size
    again, config, class_names = read_start(back)
    assert config == info.config and class_names == coco_rows()
    assert all(torch.equal(again[name], t) for name, t in model.state_dict().items())


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A released file of three classes."""
    config = ViDTConfig(num_classes=3, det_token_num=5, dec_layers=1, dim_feedforward=64)
    released = to_released(build_detector(config).state_dict(), config)
    torch.save({"model": released}, tmp_path / "small.pth")
    return tmp_path / "small.pth"


def test_the_program_asks_for_class_names(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = small.with_suffix(".safetensors")
    assert main([str(small), str(ours)]) == 2
    assert "has 3 classes and no class names; pass --class_names" in capsys.readouterr().err
    assert main([str(small), str(ours), "--class_names", "a,b"]) == 2
    assert main([str(small), str(ours), "--class_names", "a, b,c"]) == 0
    assert load_weights(ours)[1].class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    "changes",
    [
        {"nheads": 4, "dec_n_points": 2, "cross_indices": (2, 3), "aux_loss": False},
        {"with_vector": True, "gt_mask_len": 32, "n_keep": 16, "token_label": True},
        {"token_label": True, "token_label_shift": False, "with_box_refine": False},
        {"method": "vidt_wo_neck", "dropout": 0.3},
    ],
)
def test_ours_comes_back_as_it_was(tiny_config: ViDTConfig, tmp_path: Path, changes: dict) -> None:
    """Configuration, size, names and scores, whether tensors tell of them or not."""
    config = dataclasses.replace(tiny_config, **changes)
    preprocessing = Preprocessing(112, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    info = WeightsInfo(config, ("disc", "square", "star"), preprocessing, {"map50": 0.25})
    tensors = build_detector(config).state_dict()
    first, between, last = (tmp_path / name for name in ("a.safetensors", "b.pth", "c.safetensors"))
    save_weights(first, tensors, info)
    for source, target in ((first, between), (between, last)):
        assert main([str(source), str(target)]) == 0
    back, found = load_weights(last)
    assert found == info
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert load_model(between)[1] == info


def test_what_tensors_tell_wins_over_what_is_said(tiny_config: ViDTConfig) -> None:
    """And what is said is believed only where it can be one of our settings."""
    tensors = to_released(build_detector(tiny_config).state_dict(), tiny_config)
    found = released_config(tensors, vars(argparse.Namespace(epff=True, dec_layers=6, method=None)))
    assert found == released_config(tensors)
    assert released_config(tensors, {"cross_indices": [2, 3]}).cross_indices == (2, 3)
    for wrong in ({"cross_indices": "3"}, {"dropout": None}, {"nheads": True}):
        assert released_config(tensors, wrong) == found
    with pytest.raises(ValueError, match="its 128 attention weights do not fit 3 heads"):
        released_config(tensors, {"nheads": 3})


def ours(folder: Path) -> Path:
    config = ViDTConfig(num_classes=3, det_token_num=5, dec_layers=0, reduced_dim=32, pos_dim=8)
    info = WeightsInfo(config, ("a", "b", "c"), Preprocessing())
    save_weights(folder / "ours.safetensors", build_detector(config).state_dict(), info)
    return folder / "ours.safetensors"


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-1000])
    return path


MISUSE = {
    "nothing": ("", "missing arguments: source, target"),
    "an unknown flag": (
        "small.pth x.safetensors --class a,b,c",
        "unknown flag --class; see python -m vidt.convert",
    ),
    "no file": ("nowhere.pth x.safetensors", "nowhere.pth does not exist; give the path"),
    "a folder": ("folder x.safetensors", "folder is a folder; give the path of a weights file"),
    "another ending": ("small.pth x.pth", "x.pth: small.pth converts to a .safetensors file; name"),
    "another ending back": ("ours.safetensors x.bin", "converts to a .pth file; name it so"),
    "itself": ("ours.pth ours.pth", "ours.pth is the source file"),
    "names too few": ("small.pth x.safetensors --class_names a", "has 3 classes and 1 class names"),
    "names twice": ("small.pth x.safetensors --class_names a,b,a", "each class a name of its own"),
    "a name that is none": (
        "small.pth x.safetensors --class_names a,,b",
        "each class a name of its own",
    ),
    "names of ours": ("ours.safetensors x.pth --class_names a,b,c", "has its own; leave the flag"),
    "a torn file": ("torn.pth x.safetensors", "torn.pth cannot be read safely as PyTorch weights"),
    "a torn file of ours": ("torn.safetensors x.pth", "torn.safetensors cannot be read as ViDT"),
    "a foreign file": ("foreign.safetensors x.pth", "not a ViDT weights file"),
    "names and heads apart": ("apart.pth x.safetensors", "it names 2 classes and has 3"),
    "no room": ("full small.pth x.safetensors --class_names a,b,c", "x.safetensors cannot be writ"),
    "no room back": ("full ours.safetensors x.pth", "x.pth cannot be written ("),
    "a file for a folder": ("ours.safetensors small.pth/x.pth", "x.pth cannot be written ("),
    "a folder for a file": ("ours.safetensors folder/x.pth", "x.pth cannot be written ("),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the misuse is of."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "folder" / "x.pth").mkdir(parents=True)
    config = ViDTConfig(num_classes=3, det_token_num=5, dec_layers=0)
    model = to_released(build_detector(config).state_dict(), config)
    torch.save({"model": model}, folder / "small.pth")
    torch.save({"model": model, "class_names": ["a", "b"]}, folder / "apart.pth")
    shutil.copy(ours(folder), folder / "ours.pth")
    cut(Path(shutil.copy(folder / "small.pth", folder / "torn.pth")))
    cut(Path(shutil.copy(folder / "ours.pth", folder / "torn.safetensors")))
    save_file({"weight": torch.zeros(2)}, folder / "foreign.safetensors")
    return folder


@pytest.mark.parametrize(("words", "reason"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_one_line_and_leaves_nothing(
    files: Path,
    words: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    before = files_of(files)
    limits, room = resource.getrlimit(resource.RLIMIT_FSIZE), words.removeprefix("full ")
    if room != words:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code = main(room.split())
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr()
    assert code == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and reason in said.err
    assert "--load_from" not in said.err
    assert files_of(files) == before


def files_of(folder: Path) -> dict[Path, int]:
    """When each was last written to; of folders only that they are there."""
    return {p: p.stat().st_mtime_ns if p.is_file() else 0 for p in folder.rglob("*")}


@pytest.mark.slow
def test_the_program_starts_and_fails_in_one_line(tmp_path: Path) -> None:
    """As a person starts it: nothing else is said, no file is left."""
    (tmp_path / "in.pth").write_bytes(b"no weights")
    command = [sys.executable, "-m", "vidt.convert", "in.pth", "out.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: in.pth cannot be read safely as PyTorch weights")
    assert done.stderr.endswith("it is of another kind\n")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


@golden.present
def test_untied_heads_cannot_become_shared_ones() -> None:
    tensors = stored("vidt_swin_nano/keys.json")
    tensors["class_embed.3.bias"] = torch.ones(91)
    config = ViDTConfig(num_classes=91, with_box_refine=False)
    with pytest.raises(ValueError, match=r"class_embed\.3\.bias differs .* with_box_refine=True"):
        released_vidt(tensors, config)


@golden.present
@pytest.mark.parametrize(
    "path, alias, first",
    [
        ("vidt_swin_nano", "transformer.decoder.bbox_embed.2.layers.0.bias", "bbox_embed.2"),
        ("vidt_plus_swin_nano_300", "vector_embed.4.layers.1.bias", "vector_embed.0"),
        ("vidt_coat_lite_tiny", "backbone.serial_blocks2.1.cpe.proj.bias", "backbone.cpe2"),
    ],
)
def test_names_of_one_tensor_with_two_contents_are_refused(
    path: str, alias: str, first: str
) -> None:
    tensors = stored(f"{path}/keys.json")
    tensors[alias] = torch.ones(tensors[alias].shape)
    with pytest.raises(ValueError, match=rf"{re.escape(alias)} differs from {first}.*damaged"):
        released_vidt(tensors, released_config(tensors))


@golden.present
def test_a_tensor_too_many_is_refused(tmp_path: Path) -> None:
    tensors = stored("vidt_wo_neck_swin_nano/keys.json")
    tensors["backbone.layers.0.extra.weight"] = torch.zeros(1)
    torch.save({"model": {name: t.contiguous() for name, t in tensors.items()}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth .*layers\.0\.extra\.weight"):
        load_model(tmp_path / "a.pth")


def test_only_what_the_forward_pass_never_reads_is_dropped() -> None:
    assert our_name("transformer.level_embed") is None
    assert our_name("backbone.norm2.weight") is None
    assert our_name("backbone.layers.1.downsample.norm2.bias") is None
    assert our_name("backbone.layers.0.blocks.1.attn.relative_position_index") is None
    assert our_name("fusion.multi_scaler.refinenet_3.smoothing.bias") is None
    for kept in ("backbone.layers.0.blocks.0.norm2.weight", "backbone.patch_embed.norm.bias"):
        assert our_name(kept) == name_in_released(kept) == kept
    ours = "decoder.layers.5.norm2.weight"
    assert our_name("transformer." + ours) == ours
    assert name_in_released(ours) == "transformer." + ours


def test_detr_is_not_a_vidt() -> None:
    detr = {
        "class_embed.weight": torch.zeros(92, 256),
        "bbox_embed.layers.0.weight": torch.zeros(1),
    }
    with pytest.raises(ValueError, match=re.escape("it holds no backbone.det_token")):
        released_config(detr)


def test_timms_merging_moves_to_the_end_of_the_stage_before() -> None:
    timm = {
        "layers.1.downsample.norm.weight": 1,
        "layers.1.blocks.0.norm1.weight": 2,
        "norm.bias": 3,
    }
    assert imagenet_swin(timm) == {
        "layers.0.downsample.norm.weight": 1,
        "layers.1.blocks.0.norm1.weight": 2,
    }
    microsoft = {"layers.0.downsample.norm.weight": 1, "layers.1.blocks.0.norm1.weight": 2}
    assert imagenet_swin({**microsoft, "head.weight": 3}) == microsoft
