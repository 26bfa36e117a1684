"""Broken releases and failing saves: a clear error, and nothing written or lost."""

from __future__ import annotations

import json
import shutil
import struct
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.base.errors import AbyssalError, CheckpointError, ConfigError, InputError, SaveError, TokenError
from abyssal.checkpoint.load import load_model
from abyssal.checkpoint.release import Release
from abyssal.checkpoint.save import convert, make_release, save_model
from abyssal.checkpoint.stream import stream_logits
from tests.checkpoint.conftest import tiny_config
from tests.faults import kill_after, largest_file

INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(releases: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(releases["flash"], tmp_path / "copy"))


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a shard's header; `edit` may return text to take the place of the JSON."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = edit(header) or json.dumps(header)
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data[8 + length :])


def edit_index(folder: Path, name: str, file: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    if file is None:
        del index["weight_map"][name]
    else:
        index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def test_truncated_shard(copy: Path) -> None:
    path = shard_of(copy, "norm.weight")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{path.name} is truncated"):
        Release(copy)


@pytest.mark.parametrize("length", [2**40, 2**63, 10**7])
def test_header_too_long(copy: Path, length: int) -> None:
    path = shard_of(copy, "norm.weight")
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="announces a header"):
        Release(copy)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00\x01", '{"a":' * 5000])
def test_header_that_is_not_json(copy: Path, text: str) -> None:
    edit_header(shard_of(copy, "norm.weight"), lambda _: text)
    with pytest.raises(CheckpointError, match=r"not JSON|not an object"):
        Release(copy)


def test_tiny_file(copy: Path) -> None:
    shard_of(copy, "norm.weight").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="3 bytes"):
        Release(copy)


def test_missing_scale(copy: Path) -> None:
    """Traps 34 and 35: the scale is missing, or has the suffix of another layout."""
    name = "layers.0.attn.wq_a.scale"
    path = shard_of(copy, name)
    edit_header(path, lambda h: h.update({"layers.0.attn.wq_a.weight_scale_inv": h.pop(name)}))
    edit_index(copy, name, None)
    edit_index(copy, "layers.0.attn.wq_a.weight_scale_inv", path.name)
    with pytest.raises(CheckpointError, match=r"weight_scale_inv: releases call it layers\.0\.attn\.wq_a\.scale"):
        Release(copy)
    edit_header(path, lambda h: h.update({"layers.9.zzz": h.pop("layers.0.attn.wq_a.weight_scale_inv")}))
    edit_index(copy, "layers.0.attn.wq_a.weight_scale_inv", None)
    edit_index(copy, "layers.9.zzz", path.name)
    with pytest.raises(CheckpointError, match=r"lacks its scale layers\.0\.attn\.wq_a\.scale"):
        Release(copy)


def test_unknown_tensor(copy: Path) -> None:
    path = shard_of(copy, "norm.weight")
    size = path.stat().st_size

    def add(header: dict[str, Any]) -> None:
        end = max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
        header["layers.0.engram.weight"] = {"dtype": "U8", "shape": [4], "data_offsets": [end, end + 4]}

    edit_header(path, add)
    with path.open("ab") as file:
        file.write(b"1234")
    assert path.stat().st_size > size
    edit_index(copy, "layers.0.engram.weight", path.name)
    with pytest.raises(CheckpointError, match=r"layers\.0\.engram\.weight is not part of a V4 release"):
        Release(copy)


def test_unknown_dtype(copy: Path) -> None:
    edit_header(shard_of(copy, "norm.weight"), lambda h: h["norm.weight"].update(dtype="F6_E3M2"))
    with pytest.raises(CheckpointError, match="F6_E3M2"):
        Release(copy)


def test_wrong_dtype_for_its_name(copy: Path) -> None:
    edit_header(shard_of(copy, "hc_head_base"), lambda h: h["hc_head_base"].update(dtype="I32"))
    with pytest.raises(CheckpointError, match="hc_head_base has dtype I32, expected F32"):
        Release(copy)


def test_wrong_shape(copy: Path) -> None:
    edit_header(shard_of(copy, "norm.weight"), lambda h: h["norm.weight"].update(shape=[32, 2]))
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \[32, 2\], expected \[64\]"):
        Release(copy)
    edit_header(shard_of(copy, "norm.weight"), lambda h: h["norm.weight"].update(shape=[65]))
    with pytest.raises(CheckpointError, match="cannot have 128 bytes"):
        Release(copy)


@pytest.mark.parametrize("offsets", [[5, 3], [-1, 3], "x", [0]])
def test_bad_offsets(copy: Path, offsets: Any) -> None:
    edit_header(shard_of(copy, "norm.weight"), lambda h: h["norm.weight"].update(data_offsets=offsets))
    with pytest.raises(CheckpointError, match="data_offsets"):
        Release(copy)


def test_overlapping_tensors(copy: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        first, second = list(header.values())[1:3]
        size = second["data_offsets"][1] - second["data_offsets"][0]
        second["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][0] + size]

    edit_header(shard_of(copy, "norm.weight"), overlap)
    with pytest.raises(CheckpointError, match="start at"):
        Release(copy)


def test_duplicated_tensor_in_one_header_and_in_two_shards(copy: Path) -> None:
    path = shard_of(copy, "norm.weight")
    original = path.read_bytes()
    edit_header(path, lambda h: json.dumps(h)[:-1] + f', "norm.weight": {json.dumps(h["norm.weight"])}}}')
    with pytest.raises(CheckpointError, match=r"norm\.weight is listed twice"):
        Release(copy)
    path.write_bytes(original)
    (copy / INDEX).unlink()
    shutil.copy(path, copy / "zz.safetensors")
    with pytest.raises(CheckpointError, match=r"is in .* and in zz\.safetensors"):
        Release(copy)


@pytest.mark.parametrize("target", ["../outside.safetensors", "/etc/passwd", "a/../../b"])
def test_index_that_points_outside_the_folder(copy: Path, target: str) -> None:
    edit_index(copy, "norm.weight", target)
    with pytest.raises(CheckpointError, match="points outside"):
        Release(copy)


def test_index_that_names_what_is_not_there(copy: Path) -> None:
    edit_index(copy, "norm.weight", "gone.safetensors")
    with pytest.raises(CheckpointError, match=r"gone\.safetensors, which is missing"):
        Release(copy)


def test_index_that_is_garbage_or_forgets_a_tensor(copy: Path) -> None:
    edit_index(copy, "norm.weight", None)
    with pytest.raises(CheckpointError, match=r"norm\.weight is in a shard but not in"):
        Release(copy)
    (copy / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        Release(copy)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"weight_map": null}', '{"weight_map": [1]}', "[]", "\x00"])
def test_index_that_is_garbage(copy: Path, text: str) -> None:
    (copy / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        Release(copy)


@pytest.mark.parametrize("dtype", [["F32"], {}, None, 3])
def test_dtype_that_is_no_text(copy: Path, dtype: Any) -> None:
    edit_header(shard_of(copy, "norm.weight"), lambda h: h["norm.weight"].update(dtype=dtype))
    with pytest.raises(CheckpointError, match=r"norm\.weight has dtype"):
        Release(copy)


@pytest.mark.parametrize("entry", [3, None, "x", [1, 2], {"dtype": "F32", "shape": [4]}])
def test_header_entry_that_is_no_tensor(copy: Path, entry: Any) -> None:
    edit_header(shard_of(copy, "norm.weight"), lambda h: h.update({"norm.weight": entry}))
    with pytest.raises(CheckpointError, match=r"norm\.weight has no valid data_offsets"):
        Release(copy)


def test_shards_that_cannot_be_read(copy: Path) -> None:
    (copy / INDEX).unlink()
    (copy / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.safetensors cannot be read"):
        Release(copy)
    (copy / "folder.safetensors").rmdir()
    (copy / "link.safetensors").symlink_to(copy / "gone")
    with pytest.raises(CheckpointError, match=r"link\.safetensors cannot be read"):
        Release(copy)


def test_rows_that_are_not_there(releases: dict[str, Path]) -> None:
    shards = Release(releases["flash"]).shards
    for first, last in ((0, 151), (-1, 2), (3, 2)):
        with pytest.raises(CheckpointError, match=r"embed\.weight has 150 rows"):
            shards.read_rows("embed.weight", first, last)


def test_shape_of_the_copies_in_a_base_release(releases: dict[str, Path], tmp_path: Path) -> None:
    """Their spelling is free, their shape is not."""
    folder = Path(shutil.copytree(releases["base"], tmp_path / "base"))
    path = shard_of(folder, "mtp.0.emb.weight")
    edit_header(path, lambda h: h.update({"mtp.0.embed_tokens.weight": h.pop("mtp.0.emb.weight")}))
    edit_index(folder, "mtp.0.emb.weight", None)
    edit_index(folder, "mtp.0.embed_tokens.weight", path.name)
    Release(folder)
    edit_header(path, lambda h: h["mtp.0.embed_tokens.weight"].update(shape=[64, 150]))
    with pytest.raises(CheckpointError, match=r"mtp\.0\.embed_tokens\.weight has shape \[64, 150\]"):
        Release(folder)


def test_folder_without_shards(copy: Path) -> None:
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        Release(copy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"model_type": "deepseek_v41"}, "V4.1"),
        ({"model_type": "deepseek_v3"}, "DeepSeek-V3"),
        ({"model_type": "llama"}, "llama"),
        ({"vision_config": {}}, "vision"),
        ({"kv_lora_rank": 512}, "V3"),
        ({"compress_ratios": [0, 2, 1, 0]}, "V4.1"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_config_of_another_model(copy: Path, edit: dict[str, Any], message: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | edit))
    with pytest.raises(ConfigError, match=message):
        Release(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", "[" * 100_000])
def test_config_that_is_garbage(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        Release(copy)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    with largest_file(100_000):
        yield


def test_no_space_left_while_saving(releases: dict[str, Path], copy: Path, tmp_path: Path, small_disk: None) -> None:
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    model = load_model(releases["flash"])
    for attempt in (
        lambda: save_model(model.state_dict(), model.config, "flash", copy),
        lambda: convert(releases["flash"], copy, "base"),
        lambda: make_release(tiny_config("flash"), 9, "flash", copy),
        lambda: stream_logits(releases["flash"], [1] * 300, copy / "config.json", silent=True),
    ):
        with pytest.raises(SaveError, match="unchanged"):
            attempt()
        assert {p.name: p.read_bytes() for p in copy.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_interrupt_while_saving(
    releases: dict[str, Path], copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import abyssal.checkpoint.save as save

    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    real, count = save._random, 0

    def interrupted(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 100:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(save, "_random", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_release(tiny_config("flash"), 9, "flash", copy)
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_kill_while_saving_leaves_the_old_release_whole(copy: Path, tmp_path: Path) -> None:
    """SIGKILL at some moment of writing: the destination is the old release or the new one, never a mix."""
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from abyssal.checkpoint.save import make_release
        from tests.checkpoint.conftest import tiny_config
        print("ready", flush=True)
        for seed in range(1000):
            make_release(tiny_config("flash"), seed, "flash", Path(sys.argv[1]))
    """)
    for delay in (0.05, 0.31, 0.77):
        kill_after(delay, script, str(copy))
        if copy.exists():  # between two renames the old folder may be parked beside
            load_model(copy)
        else:
            parked = list(tmp_path.glob(".copy.old.*/copy"))
            assert parked
            parked[0].rename(copy)


def test_existing_folders_that_are_no_release_are_not_replaced(releases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(SaveError, match="not a release"):
        convert(releases["flash"], tmp_path / "mine", "base")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(CheckpointError, match="source itself"):
        convert(releases["flash"], releases["flash"], "base")
    with pytest.raises(SaveError, match="cannot write"):
        convert(releases["flash"], tmp_path / "no" / "such" / "place", "base")


def test_source_and_destination_inside_each_other(releases: dict[str, Path], tmp_path: Path) -> None:
    """Replacing the outer folder would delete the source; writing into the source would copy itself."""
    outer = Path(shutil.copytree(releases["flash"], tmp_path / "outer"))
    inner = Path(shutil.copytree(releases["base"], outer / "inner"))
    before = {p: p.read_bytes() for p in outer.rglob("*") if p.is_file()}
    model = load_model(releases["flash"])
    for source, target in ((inner, outer), (outer, outer / "new"), (outer, inner / "deep")):
        with pytest.raises(CheckpointError, match="inside each other"):
            convert(source, target, "bf16")
        with pytest.raises(CheckpointError, match="inside each other"):
            save_model(model.state_dict(), model.config, "flash", target, files_from=source)
    assert {p: p.read_bytes() for p in outer.rglob("*") if p.is_file()} == before


def overwrite(folder: Path, name: str, data: bytes) -> None:
    info = Release(folder).shards.info(name)
    with info.file.open("r+b") as file:
        file.seek(info.start)
        file.write(data)


@pytest.mark.parametrize(
    ("layout", "target", "name", "data", "message"),
    [
        ("flash", "base", "layers.0.ffn.experts.0.w1.scale", bytes([90]), r"experts\.0\.w1\.weight: FP4 scales spread"),
        ("flash", "base", "layers.0.ffn.experts.0.w1.scale", bytes([255]), r"experts\.0\.w1\.weight: .* is NaN"),
        (
            "base",
            "flash",
            "layers.0.attn.wq_a.scale",
            struct.pack("<f", 0.3),
            r"wq_a\.weight: scale 0\.3.* power of two",
        ),
    ],
)
def test_weights_that_the_other_layout_cannot_hold(
    layout: str, target: Any, name: str, data: bytes, message: str, releases: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(releases[layout], tmp_path / "copy"))
    overwrite(folder, name, data)
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "out", target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


@pytest.mark.parametrize("size", ["hidden_size", "moe_intermediate_size"])
def test_fp4_needs_groups_of_32_inputs(size: str, tmp_path: Path) -> None:
    config = replace(tiny_config("flash"), **{size: 40})
    with pytest.raises(ConfigError, match=f"{size} is 40"):
        make_release(config, 1, "flash", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    make_release(config, 1, "base", tmp_path / "out")
    load_model(tmp_path / "out")


def test_saving_quantised_weights_without_their_scales(releases: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(releases["base"], keep_stored=True)
    for name in ("layers.1.attn.wq_b", "layers.1.ffn.experts.w2"):
        state = {n: t for n, t in model.state_dict().items() if n not in (f"{name}.scale", f"{name}_scale")}
        with pytest.raises(SaveError, match=f"{name}.* its scale is not in the state"):
            save_model(state, model.config, "base", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_saving_a_state_that_lacks_a_tensor(releases: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(releases["flash"])
    state = {n: t for n, t in model.state_dict().items() if n != "norm.weight"}
    with pytest.raises(SaveError, match=r"norm\.weight"):
        save_model(state, model.config, "flash", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["0731", "q4_k"])
def test_layouts_that_do_not_fit(layout: Any, releases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=layout):
        convert(releases["flash"], tmp_path / "out", layout)


def test_streaming_refuses_what_it_cannot_do(releases: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "logits.npy"
    cases: list[tuple[dict[str, Any], type[AbyssalError], str]] = [
        ({"ids": []}, TokenError, "no tokens"),
        ({"ids": [1, 150]}, TokenError, "150"),
        ({"ids": [1, 2], "chunks": [1]}, InputError, "add up"),
        ({"ids": [1, 2], "chunks": [3, -1]}, InputError, "add up"),
        ({"ids": [1], "mtp": True}, TokenError, "two"),
        ({"ids": [1, 2], "max_memory": 2**20}, InputError, "GiB"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind, match=message):
            stream_logits(releases["flash"], out=out, silent=True, **options)
    with pytest.raises(InputError, match="no MTP"):
        stream_logits(releases["0731"], [1, 2], out, mtp=True, silent=True)
    assert not out.exists()


def test_dtype_of_a_release_is_read_from_its_headers(releases: dict[str, Path], tmp_path: Path) -> None:
    """The April config lacks expert_dtype; Base says ue8m0 and holds F32 scales (trap 33)."""
    folder = Path(shutil.copytree(releases["base"], tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    del config["expert_dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    release = Release(folder)
    assert release.layout == "base" and release.config.expert_dtype == "fp8"
    assert release.shards.read("layers.0.attn.wq_a.scale").dtype == torch.float32


def test_hash_routing_to_an_expert_that_does_not_exist(copy: Path) -> None:
    name = "layers.0.ffn.gate.tid2eid"
    path = shard_of(copy, name)
    info = Release(copy).shards.info(name)
    data = bytearray(path.read_bytes())
    data[info.start : info.start + 8] = (4).to_bytes(8, "little")  # the release has experts 0..3
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"tid2eid has expert numbers outside 0\.\.3"):
        load_model(copy)
