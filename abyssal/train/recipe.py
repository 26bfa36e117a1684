"""Recipes: what a run trains, on what and how, as a TOML file.

    [model]                        preset = "nano", and other values of config.json to change
    [pretrain], [sft]              a stage: the fields of `Stage`; its rules are those of `trainer.Rules`
    [pretrain.schedule]            the fields of `schedule.Schedule`
    [pretrain.sources.NAME]        the fields of `SourceRecipe`

The recipes that come with the package lie in `recipes/`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tokenizers

from abyssal.arch.config import ModelConfig
from abyssal.arch.presets import preset
from abyssal.base.errors import ConfigError, DataError
from abyssal.encoding.tokenizer import Tokenizer
from abyssal.model import Transformer
from abyssal.model.init import initialise
from abyssal.train import checkpoint
from abyssal.train.data.bpe import load_tokenizer
from abyssal.train.data.corpora import read_corpus
from abyssal.train.data.echoes import Echoes
from abyssal.train.data.example import MODES, ThinkingMode
from abyssal.train.data.mixture import Mixture as Generators
from abyssal.train.data.pairs import Pairs
from abyssal.train.data.retrieval import sentences_of
from abyssal.train.data.token_file import TokenFile
from abyssal.train.generated import Conversations, Learn, Lookups, Passages
from abyssal.train.order import Documents, Mixture, Share, Source
from abyssal.train.schedule import Schedule
from abyssal.train.trainer import Rules, Trainer
from abyssal.train.world import World

FOLDER = Path(__file__).parent / "recipes"
STAGES = ("pretrain", "sft")
T = TypeVar("T")


@dataclass(frozen=True)
class SourceRecipe:
    """Where documents of one kind come from.

    Attributes:
        kind: a token file, generated running text, generated conversations, or plain ids: pairs, or stretches that
            come again.
        weight: share of the tokens, against the other sources of that time.
        begin, end: tokens of the stage after which this source starts and stops.
        length: tokens that a longer document is cut into.
        file: name of the token file.
        domains: weights of the generators.
        kinds: of what is generated for retrieval and copying; all by default.
        lengths, questions: of generated retrieval, in tokens and how many, both ends included; lengths also of plain
            ids.
        rounds: how often what is generated for retrieval asks each of its questions.
        requests: of a generated conversation with tools at least, both ends included.
        offered: tools of such a conversation, both ends included.
        modes: thinking modes of generated conversations.
        ids, roles: of plain ids, see `data.pairs` and `data.echoes`; by default all ids of the model.
        learn: of what is generated, every token or only answers.
        seed: of order and generators.
    """

    kind: Literal["tokens", "passages", "conversations", "pairs", "echoes"]
    weight: float
    begin: int = 0
    end: int | None = None
    length: int = 4096
    file: str = ""
    domains: Mapping[str, float] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    lengths: tuple[int, int] = (256, 2048)
    questions: tuple[int, int] = (1, 4)
    rounds: int = 1
    requests: tuple[int, int] = (1, 1)
    offered: tuple[int, int] = (1, 6)
    modes: tuple[ThinkingMode, ...] = MODES
    ids: tuple[int, int] | None = None
    roles: Literal["fixed", "drawn"] = "drawn"
    learn: Learn = "answers"
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """One run of a recipe.

    Attributes:
        rules: of the trainer.
        sources: by name.
        start: the stage whose last weights it begins with; none for fresh ones.
        seed: of fresh weights.
        embedding_std: of a fresh embedding; None for the model's `initializer_range`.
        turned_head: whether a fresh head is the embedding, turned; see `model.init.initialise`.
        sliding_window: of the model in this stage; None for the recipe's. It is no weight, so stages may differ.
    """

    rules: Rules
    sources: Mapping[str, SourceRecipe]
    start: str = ""
    seed: int = 0
    embedding_std: float | None = None
    turned_head: bool = False
    sliding_window: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A model and the stages that make it.

    Attributes:
        name: of the file.
        model: its numbers.
        stages: by name, of `STAGES`.
    """

    name: str
    model: ModelConfig
    stages: Mapping[str, Stage]

    def stage(self, name: str) -> Stage:
        """A stage by name.

        Raises:
            ConfigError: the recipe has none of this name.
        """
        if name not in self.stages:
            raise ConfigError(f"recipe {self.name} has no [{name}]: it has {', '.join(self.stages)}")
        return self.stages[name]

    def model_of(self, name: str) -> ModelConfig:
        """The model as a stage trains it; errors as `stage`."""
        window = self.stage(name).sliding_window
        return self.model if window is None else replace(self.model, sliding_window=window)


def names() -> list[str]:
    """Of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_recipe(name: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        name: of one that comes with the package, or a file.
        changes: such as "pretrain.schedule.steps=100": values to put in place of the file's, in TOML's spelling.
    Raises:
        ConfigError: there is no such recipe, or it has an unknown key or a wrong value, which is named.
    """
    path = Path(name) if str(name).endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no recipe {name}: use {', '.join(names())}, or a file that ends in .toml") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no recipe: {error}") from None
    for change in changes:
        _apply(data, change)
    if unknown := set(data) - {"model", *STAGES}:
        known = ", ".join(("model", *STAGES))
        raise ConfigError(f"recipe {path.stem}: unknown key {', '.join(sorted(unknown))}: use {known}")
    model = _model(path.stem, data.get("model", {}))
    stages = {name: _stage(f"{path.stem}: {name}", data[name]) for name in STAGES if name in data}
    for stage in stages.values():
        if stage.start and stage.start not in stages:
            raise ConfigError(f"recipe {path.stem}: start = {stage.start!r} is none of its stages: {', '.join(stages)}")
    return Recipe(path.stem, model, stages)


def _apply(data: dict[str, Any], change: str) -> None:
    key, given, value = change.partition("=")
    *path, last = key.strip().split(".")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    if not given or not last:
        raise ConfigError(f"cannot set {change!r}: write it as pretrain.schedule.steps=100")
    for part in path:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ConfigError(f"cannot set {change!r}: {part} is a value, not a table")
    data[last] = parsed


def _model(name: str, data: Mapping[str, Any]) -> ModelConfig:
    changes = dict(data)
    base = preset(changes.pop("preset", "nano"))
    known = {f.name for f in fields(base)}
    if unknown := set(changes) - known:
        raise ConfigError(f"recipe {name}: model has no {', '.join(sorted(unknown))}")
    for key, value in changes.items():
        changes[key] = tuple(value) if isinstance(value, list) else value
    return replace(base, **changes)


def _stage(where: str, data: Mapping[str, Any]) -> Stage:
    rest = dict(data)
    sources = {
        key: _made(SourceRecipe, table, f"{where}.sources.{key}") for key, table in rest.pop("sources", {}).items()
    }
    if not sources:
        raise ConfigError(f"recipe {where} has no sources: add [{where.split(': ')[-1]}.sources.NAME]")
    schedule = _made(Schedule, rest.pop("schedule", {}), f"{where}.schedule")
    beside = {f.name for f in fields(Stage)} - {"rules", "sources"}
    own: dict[str, Any] = {key: rest.pop(key) for key in beside & set(rest)}
    rules = _made(Rules, {**rest, "schedule": schedule}, where)
    return _made(Stage, {**own, "rules": rules, "sources": sources}, where)


def _made(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """A dataclass from a table.

    Raises:
        ConfigError: a key is unknown or missing, or a value is of another type.
    """
    hints = get_type_hints(cls)
    if unknown := set(data) - set(hints):
        raise ConfigError(f"recipe {where}: unknown key {', '.join(sorted(unknown))}: use {', '.join(hints)}")
    values = {key: _value(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"recipe {where}: {f.name} is missing")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, wanted = get_origin(hint), get_args(hint)
    if origin is Literal:
        good = value in wanted
    elif origin is tuple:
        value = tuple(value) if isinstance(value, list) else value
        if wanted[-1] is ... and isinstance(value, tuple):
            wanted = wanted[:1] * len(value)
        good = isinstance(value, tuple) and len(value) == len(wanted)
        if good:
            value = tuple(_value(h, v, where) for h, v in zip(wanted, value, strict=True))
    elif hint is float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if good else value
    elif isinstance(hint, type):
        good = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    elif type(None) in wanted:
        return None if value is None else _value(wanted[0], value, where)
    else:
        good = isinstance(value, Mapping)
    if not good:
        raise ConfigError(f"recipe {where} is {value!r}: give {getattr(hint, '__name__', hint)}")
    return value


def trainer_of(
    recipe: Recipe, stage: str, data: Path, start: Path | None = None, world: World | None = None
) -> Trainer:
    """The trainer of a stage, at its beginning.

    Args:
        recipe: the recipe.
        stage: name of one of its stages.
        data: folder that `data.prepare` filled.
        start: run folder of the stage before, if this one has one.
        world: the processes of the run; this one alone by default.
    Raises:
        ConfigError: no such stage, or it needs `start`, or the weights there are of another model.
        DataError: data is missing.
        CheckpointError: `start` has no whole checkpoint.
    """
    told = recipe.stage(stage)
    config = recipe.model_of(stage)
    model = initialise(
        Transformer(config), told.seed, embedding_std=told.embedding_std, turned_head=told.turned_head
    )
    if told.start:
        folder = checkpoint.latest(start) if start is not None else None
        if folder is None:
            raise ConfigError(f"stage {stage} begins with the weights of {told.start}, of which {start} has none")
        saved = checkpoint.load(folder)
        if saved.state["config"] | {"sliding_window": config.sliding_window} != config.to_dict():
            raise ConfigError(f"{folder} holds another model than recipe {recipe.name}: give its {told.start}")
        model.load_state_dict(dict(saved.model))
    read = _Data(data, recipe.model.vocab_size)
    sources = {name: read.source(source) for name, source in told.sources.items()}
    mixture = Mixture(sources, {name: Share(s.weight, s.begin, s.end) for name, s in told.sources.items()})
    about = {name: asdict(source) | read.digests(source) for name, source in told.sources.items()}
    return Trainer(model, mixture, told.rules, about, world)


class _Data:
    """A folder that `data.prepare` filled; several sources share what is read of it."""

    def __init__(self, folder: Path, vocab_size: int):
        self.folder, self.vocab_size = folder, vocab_size

    def source(self, told: SourceRecipe) -> Source:
        """A source at its beginning."""
        return Source(self._documents(told), told.seed, told.length)

    def digests(self, told: SourceRecipe) -> dict[str, Any]:
        """What a checkpoint remembers of files, so that a run does not go on with others."""
        if told.kind in ("pairs", "echoes"):
            return {}
        tokenizer = {"tokenizer_sha256": self._plain[1]}
        if told.kind != "tokens":
            return tokenizer
        manifest = self._file(told.file).manifest
        return tokenizer | {key: manifest[key] for key in ("documents", "tokens", "bin_sha256", "licence")}

    def _documents(self, told: SourceRecipe) -> Documents:
        ids = told.ids or (0, self.vocab_size)
        if told.kind == "pairs":
            return Lookups(Pairs(ids, told.roles, told.lengths), told.seed)
        if told.kind == "echoes":
            return Lookups(Echoes(ids, told.lengths), told.seed)
        tokenizer = self._tokenizer
        if told.kind == "tokens":
            return self._file(told.file)
        mixture = Generators(
            lambda text: len(tokenizer.encode(text)),
            told.domains,
            seed=told.seed,
            lengths=told.lengths,
            questions=told.questions,
            kinds=told.kinds,
            rounds=told.rounds,
            requests=told.requests,
            offered=told.offered,
            modes=told.modes,
            filler=self._filler if told.domains.get("retrieval") else (),
        )
        if told.kind == "passages":
            return Passages(mixture, self._plain[0], told.learn)
        return Conversations(mixture, tokenizer, told.learn)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        """The one that serves.

        Raises:
            DataError: it is of another vocabulary than the model.
        """
        tokenizer = Tokenizer(self.folder)
        if tokenizer.vocab_size != self.vocab_size:
            found, wanted = tokenizer.vocab_size, self.vocab_size
            raise DataError(f"{self.folder} has a tokenizer of {found} ids, the model {wanted}: prepare it again")
        return tokenizer

    @cached_property
    def _plain(self) -> tuple[tokenizers.Tokenizer, str]:
        """The same for plain documents, and its digest."""
        return load_tokenizer(self.folder)

    @cached_property
    def _filler(self) -> list[str]:
        return [sentence for text in read_corpus(self.folder / "corpus", "prose") for sentence in sentences_of(text)]

    def _file(self, name: str) -> TokenFile:
        return TokenFile(self.folder / name)
