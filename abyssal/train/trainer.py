"""One step of pre-training: documents, losses, clipping, optimisers, a line of numbers (training.md 3, 7)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.base.errors import ConfigError
from abyssal.base.machine import resident_bytes
from abyssal.model import Transformer
from abyssal.model.moe import Gate
from abyssal.train.adamw import AdamWRule
from abyssal.train.balance import max_violation, move_bias
from abyssal.train.checkpoint import Saved
from abyssal.train.gauges import Gauges
from abyssal.train.losses import cross_entropy, reading_queries
from abyssal.train.muon import MuonRule, narrowest_fast
from abyssal.train.optimiser import Optimiser, Rates
from abyssal.train.order import Mixture
from abyssal.train.packing import Pack, with_skips
from abyssal.train.qat import quantised
from abyssal.train.schedule import Schedule
from abyssal.train.spikes import SpikeWatch, Verdict
from abyssal.train.watch import Watch
from abyssal.train.world import World, local

CSA = 4  # tokens of a block whose indexer learns
ANTICIPATION = 500  # steps of anticipatory routing after a spike
Choices = dict[str, Tensor]  # of each router that chooses by score, [T, K]


@dataclass(frozen=True)
class Rules:
    """Numbers of a run; two runs with equal rules, data and start are equal to the last bit.

    Attributes:
        schedule: what changes over the run.
        tokens: of a pass at most.
        passes: of a step; their gradients add up.
        length: tokens of a sequence over which experts are balanced; neighbours are joined up to it.
        muon, adamw: peak learning rates; muon = 0 gives all matrices to AdamW.
        embedding: that of the embedding; None for AdamW's. Rows of rare tokens are seldom touched, so that a short
            run needs a higher one.
        clip: largest norm of the gradient, of the model and of its indexers each.
        index: weight of the indexers' loss.
        balance: weight of the balance loss.
        topk: blocks that a CSA query reads once selection is sparse; None for the configured number.
        skip_share: of the sequences, how many get position skips.
        skip_limit: their positions stay below it.
        seed: of the skips.
        bfloat16_muon: orthogonalise in bfloat16 where the processor multiplies it, which is several times as fast;
            elsewhere it is tens of times slower than float32, which is then taken.
        recompute: blocks run again on the way back in place of keeping all that they made: long sequences fit, a
            step takes about a third longer, and no bit changes.
    """

    schedule: Schedule
    tokens: int = 4096
    passes: int = 1
    length: int = 1024
    muon: float = 0.006
    adamw: float = 0.003
    embedding: float | None = None
    clip: float = 1.0
    index: float = 0.5
    balance: float = 1e-4
    topk: int | None = None
    skip_share: float = 0.0
    skip_limit: int = 1 << 20
    seed: int = 0
    bfloat16_muon: bool = False
    recompute: bool = False


@dataclass
class _Clock:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin


def joined(lengths: Sequence[int], least: int) -> list[int]:
    """Neighbouring sequences joined until each has `least` tokens or more; what is left joins the last one."""
    found, held = [], 0
    for length in lengths:
        held += length
        if held >= least:
            found.append(held)
            held = 0
    if held and found:
        found[-1] += held
    elif held:
        found = [held]
    return found


class Trainer:
    """A model on its way through the data.

    Args:
        model: unpacked, float32; its parameters record gradients but for the routers' bias.
        data: where the next sequences come from.
        rules: the numbers.
        sources: what the data is made of, as JSON: a checkpoint of others is refused.
        world: the processes of the run, which share the passes of each step; this one alone by default. All have
            the same model, data and rules at the start.

    Attributes:
        step_number: steps that are done.
        tokens: tokens that the model has read.
        muon_dtypes: from which step on Muon has orthogonalised in what; a run that goes on elsewhere may change.
        anticipating: steps of anticipatory routing that are left: experts are those that the parameters before the
            last update chose, weights those of the current ones, so that router and experts do not drive each other.

    Raises:
        ConfigError: the passes of a step, or the experts, do not share out over the processes.
    """

    def __init__(
        self,
        model: Transformer,
        data: Mixture,
        rules: Rules,
        sources: Mapping[str, Any] | None = None,
        world: World | None = None,
    ):
        self.model, self.data, self.rules = model, data, rules
        self.sources = dict(sources or {})
        self.world = world or World()
        if rules.passes % self.world.size:
            raise ConfigError(
                f"passes = {rules.passes} do not share out over {self.world.size} processes: make it a multiple"
            )
        self.world.spread(model)
        dtype = narrowest_fast(self.world) if rules.bfloat16_muon else torch.float32
        self.muon_dtypes: list[tuple[int, str]] = [(0, str(dtype).removeprefix("torch."))]
        self.optimiser = Optimiser(model, MuonRule(dtype=dtype), AdamWRule(), self.world, bool(rules.muon))
        self.spikes = SpikeWatch()
        self.step_number = 0
        self.tokens = 0
        self.anticipating = 0
        self._ahead: list[tuple[Pack, Choices]] = []  # of the next step, while anticipating
        self._place = data.state_dict()  # in the data, before what was fetched ahead
        self._gates = {name: module for name, module in model.named_modules() if isinstance(module, Gate)}
        self._indexers = [p for name, p in model.named_parameters() if ".indexer." in name and p.requires_grad]
        own = set(map(id, self._indexers))
        self._others = [p for p in self.optimiser.params if id(p) not in own]
        self._csa_layers = sum(ratio == CSA for ratio in model.config.backbone_ratios)

    def _packs(self, step: int) -> list[Pack]:
        r, packs = self.rules, []
        for number in range(r.passes):
            packed = self.data.take(r.tokens)
            if r.skip_share:
                packed = with_skips(packed, r.skip_limit, r.skip_share, (r.seed, step, number))
            packs.append(packed)
        return packs

    def step(self) -> dict[str, Any]:
        """Learn from the next sequences.

        A step whose loss or gradient is not finite changes nothing but the place in the data. Where `verdict` is
        "roll back", whoever runs the trainer calls `go_back`; that step has not been applied either.

        Returns:
            the line of metrics.
        """
        r, step, clock = self.rules, self.step_number, _Clock()
        with clock("data"):
            work = self._ahead or [(packed, {}) for packed in self._packs(step)]
            self._ahead, self._place = [], self.data.state_dict()
        losses, loads, gauges = self._learn(work, clock)
        if self.anticipating:
            self.anticipating -= 1
        if self.anticipating:
            with clock("ahead"):
                packs = self._packs(step + 1)
                choices = {id(packed): self._choices(packed) for packed in self.world.share(packs)}
                self._ahead = [(packed, choices.get(id(packed), {})) for packed in packs]
        with clock("update"):
            norm, index_norm = (self.world.clip(params, r.clip) for params in (self._others, self._indexers))
            verdict = self.spikes.judge(losses["loss"], norm + index_norm)
            factor = r.schedule.rate(step)
            updates = {"muon": 0.0, "adamw": 0.0}
            if verdict is Verdict.APPLY:
                own = None if r.embedding is None else r.embedding * factor
                updates = self.optimiser.step(Rates(r.muon * factor, r.adamw * factor, own))
                for name, load_E in loads.items():
                    move_bias(self._gates[name], load_E, r.schedule.bias_step(step))
            self.model.zero_grad()
            squares = [local(p.detach()).square().sum() for p in self.optimiser.params]
        tokens = sum(packed.tokens for packed, _ in work)
        self.step_number += 1
        self.tokens += tokens
        return {
            "step": self.step_number,
            "tokens": self.tokens,
            "rate": factor,
            **losses,
            "grad_norm": norm,
            "index_grad_norm": index_norm,
            "update_rms": updates,
            "param_norm": float(self.world.sum(torch.stack(squares).sum()).sqrt()),
            "max_violation": {name: max_violation(load_E) for name, load_E in loads.items()},
            "index_recall": gauges.recall,
            "sink_mass": gauges.sink_mass,
            "verdict": verdict.value,
            "tokens_per_s": tokens / sum(clock.seconds.values()),
            "seconds": clock.seconds,
            "memory": resident_bytes(),
        }

    @torch.no_grad()
    def _choices(self, packed: Pack) -> Choices:
        """What the routers choose with the parameters as they are."""
        watch = Watch(packed.lengths, topk=self._topk(packed))
        with quantised(self.model, self.rules.schedule.formats(self.step_number)):
            self.world.inside(lambda: self._hidden(packed, watch))
        return {name: watch.chosen[gate] for name, gate in self._gates.items() if gate.bias is not None}

    def _hidden(self, packed: Pack, watch: Watch) -> tuple[Tensor, Tensor | None]:
        """What the head reads of a pass, and of its MTP block."""
        out, batch = packed.run(self.model, watch)
        if not self.model.mtp:
            return out.z_TD, None
        return out.z_TD, self.model.draft(out.streams_TND, packed.targets_T, batch)[0]

    def _topk(self, packed: Pack) -> int | None:
        """How many blocks queries read; while selection is dense, a number that none exceeds."""
        return max(packed.lengths) // CSA if self.rules.schedule.dense(self.step_number) else self.rules.topk

    def _learn(
        self, work: Sequence[tuple[Pack, Choices]], clock: _Clock
    ) -> tuple[dict[str, float], dict[str, Tensor], Gauges]:
        """Gradients of all passes; the losses' means over the step, the load of every expert, what CSA layers read."""
        r, step = self.rules, self.step_number
        packs = [packed for packed, _ in work]
        targets = max(sum(int(packed.learned_T.sum()) for packed in packs), 1)
        later = max(sum(int(packed.later_learned_T.sum()) for packed in packs), 1)
        queries = max(self._csa_layers * sum(reading_queries(packed.lengths, CSA) for packed in packs), 1)
        balanced = [joined(packed.lengths, r.length) for packed in packs]
        routers = sum(gate.bias is not None for gate in self._gates.values())
        sequences = max(routers * sum(map(len, balanced)), 1)
        totals = dict.fromkeys(("loss", "mtp_loss", "balance_loss", "index_loss"), 0.0)
        loads: dict[str, Tensor] = {}
        gauges = Gauges(CSA, r.topk or self.model.config.index_topk)
        names = {gate: name for name, gate in self._gates.items()}

        def losses(packed: Pack, watch: Watch) -> tuple[Tensor, ...]:
            z_TD, later_z_TD = self._hidden(packed, watch)
            head = self.model.head.weight
            main = cross_entropy(z_TD, head, packed.targets_T, packed.learned_T / targets)
            draft = main.new_zeros(())
            if later_z_TD is not None:
                draft = cross_entropy(later_z_TD, head, packed.later_T, packed.later_learned_T / later)
            # the weights of spec 3.3 and 3.4 are of one layer: sums over layers, means over all else
            return main, draft, watch.balance / sequences, watch.index / queries

        with quantised(self.model, r.schedule.formats(step)):
            for (packed, choices), lengths in self.world.share(list(zip(work, balanced, strict=True))):
                given: dict[nn.Module, Tensor] = {self._gates[name]: chosen for name, chosen in choices.items()}
                topk = self._topk(packed)
                watch = Watch(
                    lengths,
                    topk=topk,
                    attention=bool(self._csa_layers),
                    choices=given,
                    gauges=gauges,
                    recompute=r.recompute,
                )
                with clock("forward"):
                    parts = self.world.inside(partial(losses, packed, watch))
                    main, draft, balance, index = parts
                with clock("backward"):
                    total = main + r.schedule.mtp_weight(step) * draft
                    total = total + r.balance * routers * balance + r.index * self._csa_layers * index
                    total.backward()
                for name, value in zip(totals, parts, strict=True):
                    totals[name] += value.item()
                for gate, load_E in watch.loads.items():
                    name = names[gate]
                    loads[name] = loads[name] + load_E if name in loads else load_E
        self.world.settle(max(length for packed in packs for length in packed.lengths))
        counted = gauges.found, gauges.sought, gauges.sink, gauges.heads
        sums = self.world.sum(torch.tensor([*totals.values(), *counted], dtype=torch.float64)).tolist()
        gauges = Gauges(gauges.ratio, gauges.topk, *sums[len(totals) :])
        return dict(zip(totals, sums, strict=False)), {n: self.world.sum(load_E) for n, load_E in loads.items()}, gauges

    def saved(self) -> Saved:
        """All of the trainer's state; tensors are not copied."""
        state = {
            "step": self.step_number,
            "tokens": self.tokens,
            "rules": asdict(self.rules),
            "muon_dtypes": self.muon_dtypes,
            "sources": self.sources,
            "config": self.model.config.to_dict(),
            "data": self._place,
            "anticipating": self.anticipating,
            "spikes": self.spikes.state_dict(),
            "torch_rng": torch.get_rng_state().numpy().tobytes().hex(),
        }
        ahead = {
            f"ahead.{number}.{name}": chosen_TK
            for number, (_, choices) in enumerate(self._ahead)
            for name, chosen_TK in choices.items()
        }
        return Saved(self.model.state_dict(), self.optimiser.state_dict() | ahead, state)

    def resume(self, saved: Saved) -> None:
        """Go on where `saved` was taken.

        Raises:
            ConfigError: it is of a run with other rules, other sources or another model.
        """
        mine = self.saved().state
        defaults = asdict(Rules(Schedule(self.rules.schedule.steps)))
        theirs = {**saved.state, "rules": _filled(saved.state["rules"], defaults) | {"recompute": self.rules.recompute}}
        for part in ("rules", "config", "sources"):
            differing = _differences(mine[part], theirs[part])
            if differing:
                raise ConfigError(
                    f"the checkpoint was made under other {part} ({', '.join(differing)}): resume with its own,"
                    " or begin a new run"
                )
        self.model.load_state_dict(dict(saved.model))
        self.optimiser.load_state_dict(saved.optim)
        self.step_number, self.tokens = saved.state["step"], saved.state["tokens"]
        self.data.load_state_dict(saved.state["data"])
        self._place, self._ahead = self.data.state_dict(), []
        here = self.muon_dtypes[-1][1]
        before = [(step, name) for step, name in saved.state.get("muon_dtypes", [(0, here)])]
        self.muon_dtypes = before if before[-1][1] == here else [*before, (self.step_number, here)]
        self.anticipating = saved.state["anticipating"]
        if any(name.startswith("ahead.") for name in saved.optim):
            for number, packed in enumerate(self._packs(self.step_number)):
                head = f"ahead.{number}."
                choices = {name.removeprefix(head): t for name, t in saved.optim.items() if name.startswith(head)}
                self._ahead.append((packed, choices))
        self.spikes.load_state_dict(saved.state["spikes"])
        raw = bytearray.fromhex(saved.state["torch_rng"])
        torch.set_rng_state(torch.frombuffer(raw, dtype=torch.uint8))

    def go_back(self, saved: Saved, steps: int = ANTICIPATION) -> None:
        """Begin again where `saved` was taken, with anticipatory routing for some steps, after a spike.

        Raises:
            ConfigError: as for `resume`.
        """
        self.resume(saved)
        self.anticipating = steps


def _filled(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Rules of a checkpoint, with the defaults of those that it does not know yet."""
    missing = {key: default for key, default in defaults.items() if key not in values}
    return missing | {
        key: _filled(value, defaults.get(key, {})) if isinstance(value, Mapping) else value
        for key, value in values.items()
    }


def _differences(mine: Any, theirs: Any, path: str = "") -> list[str]:
    """Names of the entries that differ, as JSON sees them."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return [
            name
            for key in sorted(mine.keys() | theirs.keys())
            for name in _differences(mine.get(key), theirs.get(key), f"{path}.{key}".lstrip("."))
        ]
    mine, theirs = (list(value) if isinstance(value, tuple) else value for value in (mine, theirs))
    return [] if mine == theirs else [path]
