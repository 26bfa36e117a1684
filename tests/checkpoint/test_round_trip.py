"""Releases of every layout: read, written again, converted, streamed, and loaded by transformers."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from abyssal.arch.presets import preset
from abyssal.arch.tensors import LAYOUTS, inventory, is_draft_copy
from abyssal.checkpoint.load import load_model
from abyssal.checkpoint.release import Release
from abyssal.checkpoint.save import convert, make_release, save_model
from abyssal.checkpoint.shards import Shards
from abyssal.checkpoint.stream import plan_stream, stream_logits
from abyssal.cli.models import bundled_folder
from abyssal.encoding.tokenizer import Tokenizer
from abyssal.kernels.linear import dequantise
from abyssal.model import Batch, Transformer
from abyssal.quant.numerics import Numerics
from tests.checkpoint.conftest import tiny_config
from tests.oracle import hf

README = Path(__file__).parents[2] / "README.md"
IDS = [random.Random(3).randrange(150) for _ in range(140)]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inventory_and_shards_as_the_safetensors_library_reads_them(layout: str, releases: dict[str, Path]) -> None:
    release = Release(releases[layout])
    assert release.layout == layout
    assert set(release.specs) == set(release.shards.tensors)
    index = json.loads((releases[layout] / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(s.nbytes for s in release.specs.values())
    files = sorted(releases[layout].glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    seen = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                theirs = opened.get_tensor(name)
                assert torch.equal(raw(theirs), raw(release.shards.read(name))), name
                assert index["weight_map"][name] == file.name
                if len(theirs) > 1:
                    assert torch.equal(raw(theirs[1:2]), raw(release.shards.read_rows(name, 1, 2)))
                seen += 1
    assert seen == len(release.specs)


def test_files_of_the_safetensors_library_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.zeros(0, 4), "c": torch.arange(6), "d": torch.randn(2).bfloat16()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shards = Shards(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(shards.read(name), tensor)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_converting_to_the_same_layout_changes_no_bit(layout: Any, releases: dict[str, Path], tmp_path: Path) -> None:
    convert(releases[layout], tmp_path / "again", layout)
    first, second = Release(releases[layout]), Release(tmp_path / "again")
    assert first.config == second.config
    for name in first.shards.tensors:
        assert torch.equal(raw(first.shards.read(name)), raw(second.shards.read(name))), name


@pytest.mark.parametrize("layout", ["flash", "base", "bf16", "fp32"])
def test_a_model_saved_and_loaded_is_the_same_model(layout: Any, releases: dict[str, Path], tmp_path: Path) -> None:
    """Quantising what was dequantised gives the stored values back."""
    model = load_model(releases[layout])
    save_model(model.state_dict(), model.config, layout, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("layout", ["flash", "base"])
def test_a_model_kept_quantised_is_saved_bit_for_bit(layout: Any, releases: dict[str, Path], tmp_path: Path) -> None:
    """Stored bytes go back as they came; read as numbers without their scale they would be fluent nonsense."""
    model = load_model(releases[layout], keep_stored=True)
    save_model(model.state_dict(), model.config, layout, tmp_path / "saved")
    first, second = Release(releases[layout]), Release(tmp_path / "saved")
    for name in first.specs:
        if not is_draft_copy(name):  # a model holds one embedding and one head
            assert torch.equal(raw(first.shards.read(name)), raw(second.shards.read(name))), name
    save_model(model.state_dict(), model.config, "fp32", tmp_path / "wide")
    ids = torch.tensor([IDS])
    assert torch.equal(load_model(tmp_path / "wide")(ids), model(ids))


def test_int32_routing_tables_and_unsigned_fp4_bytes(releases: dict[str, Path], tmp_path: Path) -> None:
    """Section 7: headers say I64, the reference's parameter is int32; readers without FP4 write U8."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(releases["flash"].glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                value = opened.get_tensor(name)
                if name.endswith("tid2eid"):
                    value = value.to(torch.int32)
                tensors[name] = value.view(torch.uint8) if value.dtype == torch.int8 else value
    tmp_path.joinpath("config.json").write_bytes(releases["flash"].joinpath("config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    assert Release(tmp_path).layout == "flash"
    ids = torch.tensor([IDS])
    assert torch.equal(load_model(tmp_path)(ids), load_model(releases["flash"])(ids))


def test_fp4_to_fp8_and_back_loses_nothing(releases: dict[str, Path], tmp_path: Path) -> None:
    convert(releases["flash"], tmp_path / "base", "base")
    convert(tmp_path / "base", tmp_path / "flash", "flash")
    first, middle, last = Release(releases["flash"]), Release(tmp_path / "base"), Release(tmp_path / "flash")
    assert middle.config.expert_dtype == "fp8" and middle.layout == "base"
    assert last.config == first.config
    assert sum(is_draft_copy(n) for n in middle.shards.tensors) == 2
    for name, spec in first.specs.items():
        if spec.scale:
            want = dequantise(*first.stored(name), torch.float64)
            assert torch.equal(dequantise(*middle.stored(name), torch.float64), want), name
            assert torch.equal(dequantise(*last.stored(name), torch.float64), want), name


@pytest.mark.parametrize("source", ["flash", "base", "0731"])
@pytest.mark.parametrize("target", ["bf16", "fp32"])
def test_expanding_keeps_the_logits(source: str, target: Any, releases: dict[str, Path], tmp_path: Path) -> None:
    """Every FP4 and FP8 value with its scale is a bfloat16 number."""
    convert(releases[source], tmp_path / "out", target)
    ids = torch.tensor([IDS])
    assert torch.equal(load_model(tmp_path / "out")(ids), load_model(releases[source])(ids))
    assert set(Release(tmp_path / "out").shards.tensors) == {
        s.name for s in inventory(Release(tmp_path / "out").config)
    }


@pytest.mark.parametrize("layout", ["flash", "base", "0731"])
def test_weights_kept_quantised_give_the_same_logits(layout: str, releases: dict[str, Path]) -> None:
    ids = torch.tensor([IDS])
    kept = load_model(releases[layout], keep_stored=True)
    assert kept.layers[1].attn.wq_b.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(kept(ids), load_model(releases[layout])(ids))


@pytest.mark.parametrize("mode", ["exact", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_streaming_equals_loading(layout: str, mode: Any, releases: dict[str, Path], tmp_path: Path) -> None:
    numerics = Numerics.of(mode)
    want = load_model(releases[layout], dtype=torch.float64, numerics=numerics)(torch.tensor([IDS]))[0]
    out = tmp_path / "logits.npy"
    for chunks in (None, [5, 1, 1, 100, 33]):
        stream_logits(releases[layout], IDS, out, dtype=torch.float64, numerics=numerics, chunks=chunks, silent=True)
        np.testing.assert_allclose(np.load(out), want.numpy(), rtol=0, atol=1e-12)


def test_streaming_the_mtp_head(releases: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(releases["flash"], dtype=torch.float64)
    ids = torch.tensor(IDS)
    cache = model.new_cache()
    streams = model.run(ids, [cache]).streams_TND[:-1]
    want = model.logits(model.draft(streams, ids[1:], Batch([cache], [len(IDS) - 1], [0]))[0])
    out = tmp_path / "mtp.npy"
    stream_logits(releases["flash"], IDS, out, dtype=torch.float64, mtp=True, chunks=[3, 100, 37], silent=True)
    np.testing.assert_allclose(np.load(out), want.detach().numpy(), rtol=0, atol=1e-12)


def test_a_smaller_limit_makes_smaller_chunks(releases: dict[str, Path]) -> None:
    release = Release(releases["flash"])
    free = plan_stream(release, 5000, torch.float32, None)
    tight = plan_stream(release, 5000, torch.float32, 600 * 2**20)
    assert tight.chunk < free.chunk and tight.need <= 600 * 2**20


def load_in_transformers(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice about devices
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options).eval()


@pytest.mark.parametrize("layout", ["bf16", "fp32"])
def test_transformers_loads_the_folder_and_gives_the_same_logits(layout: str, releases: dict[str, Path]) -> None:
    theirs = load_in_transformers(releases[layout], dtype=torch.float32, experts_implementation="eager")
    ours = load_model(releases[layout])
    torch.testing.assert_close(ours(torch.tensor([IDS]))[0], hf.logits(theirs, IDS), rtol=0, atol=1e-4)


def load_expanded(folder: Path) -> Any:
    """Its FP8 integration expands the weights on the CPU, FP4 experts included."""
    from transformers import FineGrainedFP8Config

    quantised = FineGrainedFP8Config(dequantize=True)
    options = {"dtype": torch.float32, "experts_implementation": "eager", "quantization_config": quantised}
    return load_in_transformers(folder, **options).float()


@pytest.mark.parametrize("layout", ["flash", "base", "0731"])
def test_transformers_loads_quantised_folders(layout: str, releases: dict[str, Path]) -> None:
    theirs, ours = load_expanded(releases[layout]), load_model(releases[layout])
    torch.testing.assert_close(ours(torch.tensor([IDS]))[0], hf.logits(theirs, IDS), rtol=0, atol=1e-4)


def test_transformers_gives_the_logits_of_the_bundled_model() -> None:
    """Scale tables of its partial blocks too, over ids enough for CSA to choose and HCA to have several blocks."""
    folder = bundled_folder()
    ids = Tokenizer(folder).encode(README.read_text(encoding="utf-8"))[:600]
    theirs, ours = load_expanded(folder), load_model(folder)
    assert ours.config.to_dict() == preset("nano").to_dict()
    assert len(ids) == 600 > 4 * ours.config.index_topk
    torch.testing.assert_close(ours(torch.tensor([ids]))[0], hf.logits(theirs, ids), rtol=0, atol=1e-4)


def test_equal_seeds_give_equal_bytes(releases: dict[str, Path], tmp_path: Path) -> None:
    make_release(tiny_config("flash"), 1, "flash", tmp_path / "same", shard_bytes=200_000)
    make_release(tiny_config("flash"), 2, "flash", tmp_path / "other", shard_bytes=200_000)
    for file in releases["flash"].iterdir():
        assert file.read_bytes() == (tmp_path / "same" / file.name).read_bytes()
    assert any(
        file.read_bytes() != (tmp_path / "other" / file.name).read_bytes()
        for file in releases["flash"].glob("*.safetensors")
    )


def test_names_of_the_state_are_the_checkpoints(releases: dict[str, Path]) -> None:
    names = {s.name for s in inventory(tiny_config("fp32"), "fp32") if ".experts." not in s.name}
    state = Transformer(tiny_config("fp32")).state_dict()
    assert {n for n in state if ".experts." not in n} == names
