"""Recipes: read, refused with the key named, and turned into trainers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from abyssal.base.errors import AbyssalError, ConfigError, DataError
from abyssal.encoding.tokenizer import Tokenizer
from abyssal.train import checkpoint
from abyssal.train.data.corpora import PIP
from abyssal.train.data.prepare import prepare
from abyssal.train.generated import Conversations, Passages
from abyssal.train.recipe import names, read_recipe, trainer_of
from abyssal.train.run import run
from tests.train.small import MODEL

SMALL = f"""{MODEL}vocab_size = 800

[pretrain]
tokens = 600
muon = 0.01

[pretrain.schedule]
steps = 2

[pretrain.sources.prose]
kind = "tokens"
file = "prose"
weight = 1
length = 128

[pretrain.sources.passages]
kind = "passages"
weight = 1
length = 300
domains = {{ retrieval = 1, copying = 1 }}
lengths = [128, 256]
questions = [1, 9]

[sft]
start = "pretrain"
tokens = 600

[sft.schedule]
steps = 1

[sft.sources.talk]
kind = "conversations"
weight = 1
length = 600
domains = {{ conversation = 1, arithmetic = 1 }}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare(folder, PIP[:2], vocab_size=800, examples=100)
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", names())
def test_recipes_of_the_package_are_whole(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.name == name
    assert "pretrain" in recipe.stages


def test_changes_take_the_place_of_the_files_values(recipe: Path) -> None:
    told = read_recipe(recipe, ["pretrain.schedule.steps=7", "pretrain.sources.prose.file=code", "model.index_topk=4"])
    stage = told.stage("pretrain")
    assert stage.rules.schedule.steps == 7
    assert stage.rules.muon == 0.01
    assert stage.sources["prose"].file == "code"
    assert told.model.index_topk == 4
    assert told.model.compress_ratios == (0, 4, 128, 0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("pretrain.speed=3", "pretrain: unknown key speed"),
        ("pretrain.schedule.step=3", "pretrain.schedule: unknown key step"),
        ("pretrain.sources.prose.weights=3", "pretrain.sources.prose: unknown key weights"),
        ("other.x=3", "unknown key other"),
        ("model.hidden=3", "model has no hidden"),
        ("pretrain.tokens=many", "pretrain.tokens is 'many'"),
        ("pretrain.tokens=1.5", "pretrain.tokens is 1.5"),
        ("pretrain.bfloat16_muon=1", "pretrain.bfloat16_muon is 1"),
        ("pretrain.sources.prose.kind=books", "kind is 'books'"),
        ("pretrain.sources.passages.lengths=[3]", "lengths is"),
        ("pretrain.sources.passages.lengths=[3, true]", "lengths is True"),
        ("pretrain.sources.passages.kinds=[3]", "kinds is 3"),
        ("pretrain.sources.passages.kinds=pairs", "kinds is 'pairs'"),
        ("sft.start=middle", "start = 'middle'"),
        ("pretrain.tokens.x=3", "tokens is a value"),
        ("pretrain.tokens", "write it as"),
    ],
)
def test_what_a_recipe_says_wrongly_is_named(recipe: Path, change: str, named: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_recipe(recipe, [change])
    assert named in str(error.value)


def test_sources_have_kinds_and_times(recipe: Path) -> None:
    told = read_recipe(
        recipe, ["pretrain.sources.passages.kinds=['single', 'pairs']", "pretrain.sources.prose.begin=1_000"]
    ).stage("pretrain")
    assert told.sources["passages"].kinds == ("single", "pairs")
    assert (told.sources["prose"].begin, told.sources["prose"].end) == (1000, None)


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe giant: use .*nano"):
        read_recipe("giant")
    (tmp_path / "bad.toml").write_text("[model", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.toml is no recipe"):
        read_recipe(tmp_path / "bad.toml")
    (tmp_path / "none.toml").write_text("[pretrain]\n[pretrain.schedule]\nsteps = 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="has no sources"):
        read_recipe(tmp_path / "none.toml")


def test_missing_or_damaged_data_is_named(recipe: Path, data: Path, tmp_path: Path) -> None:
    told = read_recipe(recipe)
    with pytest.raises(AbyssalError, match=r"tokenizer\.json does not exist"):
        trainer_of(told, "pretrain", tmp_path)
    with pytest.raises(DataError, match=r"books\.bin does not exist"):
        trainer_of(read_recipe(recipe, ["pretrain.sources.prose.file=books"]), "pretrain", data)
    with pytest.raises(DataError, match="tokenizer of 800 ids, the model 900"):
        trainer_of(read_recipe(recipe, ["model.vocab_size=900"]), "pretrain", data)
    copy = tmp_path / "data"
    copy.mkdir()
    for file in data.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    os.truncate(copy / "prose.bin", 1000)
    with pytest.raises(DataError, match=r"prose\.bin has 1000 bytes"):
        trainer_of(read_recipe(recipe, ["pretrain.sources.passages.domains={ copying = 1 }"]), "pretrain", copy)


def test_stages_follow_each_other_and_refuse_what_is_not_theirs(recipe: Path, data: Path, tmp_path: Path) -> None:
    told = read_recipe(recipe)
    with pytest.raises(ConfigError, match="begins with the weights of pretrain"):
        trainer_of(told, "sft", data, tmp_path / "pretrain")
    assert run(trainer_of(told, "pretrain", data), tmp_path / "pretrain")
    folder = checkpoint.latest(tmp_path / "pretrain")
    assert folder is not None
    saved = checkpoint.load(folder)
    assert saved.state["sources"]["prose"]["bin_sha256"]
    second = trainer_of(told, "sft", data, tmp_path / "pretrain")
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, saved.model[name])
    assert run(second, tmp_path / "sft")

    other = read_recipe(recipe, ["pretrain.sources.prose.weight=2"])
    with pytest.raises(ConfigError, match=r"other sources \(prose\.weight\)"):
        run(trainer_of(other, "pretrain", data), tmp_path / "pretrain")
    faster = read_recipe(recipe, ["pretrain.muon=0.02"])
    with pytest.raises(ConfigError, match=r"other rules \(muon\)"):
        run(trainer_of(faster, "pretrain", data), tmp_path / "pretrain")
    wider = read_recipe(recipe, ["model.index_topk=4"])
    with pytest.raises(ConfigError, match="another model than recipe small"):
        trainer_of(wider, "sft", data, tmp_path / "pretrain")
    # a window is no weight
    narrow = read_recipe(recipe, ["pretrain.sliding_window=8"])
    assert narrow.model.sliding_window == 16
    assert trainer_of(narrow, "pretrain", data).model.config.sliding_window == 8
    assert trainer_of(narrow, "sft", data, tmp_path / "pretrain").model.config.sliding_window == 16
    again = checkpoint.latest(tmp_path / "pretrain")  # nothing of this changed the run
    assert again == folder
    checkpoint.load(folder)


def test_generated_documents_are_the_same_whenever_they_are_asked_for(recipe: Path, data: Path) -> None:
    stage = trainer_of(read_recipe(recipe), "pretrain", data)
    passages = stage.data.sources["passages"].documents
    assert isinstance(passages, Passages)
    late = passages[7]
    assert passages[3].ids.tolist() != late.ids.tolist() == passages[7].ids.tolist()
    assert late.learned is not None
    answers = passages.mixture.passage(7)
    told = Tokenizer(data).decode(late.ids[late.learned].tolist())
    assert told.replace(" ", "") == "".join(answers.text[a:b] for a, b in answers.answers).replace(" ", "")


def test_a_conversation_of_several_samples_gives_one_of_them(recipe: Path, data: Path, tmp_path: Path) -> None:
    told = read_recipe(recipe)
    run(trainer_of(told, "pretrain", data), tmp_path / "pretrain")
    documents = trainer_of(told, "sft", data, tmp_path / "pretrain").data.sources["talk"].documents
    assert isinstance(documents, Conversations)
    for number in range(30):
        sample = documents[number]
        assert sample.learned is not None and sample.learned.any() and not sample.learned[0]
