"""The eight measures. Each runs servers and visitors, and returns a section of the report."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lab import NAMES, serve, visit
from report import Goal, Section, show

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lab import Server

PACE = 50
LIMIT = 120.0


@dataclass
class Bench:
    """What the measures share: how thorough to be, who takes part, and what was learnt on the way."""

    is_quick: bool
    kinds: list[str]
    cost: dict[str, float] = field(default_factory=dict[str, float])
    begun: float = field(default_factory=time.monotonic)

    def pick(self, quick: Any, full: Any) -> Any:
        """Choose by thoroughness."""
        return quick if self.is_quick else full

    def say(self, text: str) -> None:
        """Show progress."""
        print(f"  {time.monotonic() - self.begun:5.0f} s  {text}", flush=True)

    def among(self, *kinds: str) -> list[str]:
        """Return those of *kinds* that take part."""
        return [kind for kind in kinds if kind in self.kinds]

    def compare(self, title: str, kinds: list[str], run: Callable[[str, bool], float]) -> dict[str, list[float]]:
        """Run *kinds* in turn, forwards and backwards; the first round warms up and does not count."""
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn in range(self.pick(3, 6)):
            for kind in kinds[:: -1 if turn % 2 else 1]:
                value = run(kind, turn == 0)
                self.say(f"{title}, {f'round {turn}' if turn else 'warm-up'}: {NAMES[kind]} {show(value)}")
                if turn:
                    found[kind].append(value)
        return found


def ratio(found: dict[str, list[float]], one: str, other: str) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(found[one], found[other], strict=True))


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


# ---- 1. What a word costs ----


@dataclass(frozen=True)
class Load:
    """A load, and the goals under it: the most that a word of ours may cost, by whose."""

    name: str
    text: str
    visitors: int
    words: int
    goals: dict[str, float]

    @property
    def is_burst(self) -> bool:
        return self.text.startswith("burst")


def spend(server: Server, load: Load, words: int) -> tuple[float, float]:
    """Return the microseconds of server CPU that one word costs in one run, and how busy the visitors' core was."""
    with visit(server, load.visitors) as crowd:
        server.settle()
        before = server.cpu
        spread = 0.0 if load.is_burst else 0.2
        told = crowd.do("talk", text=f"{load.text} {words}", words=words, limit=LIMIT, spread=spread)
        spent = server.cpu - before
    if told["words"] != told["wanted"]:
        raise RuntimeError(f"{server.kind}: {told['words']} words came, not {told['wanted']}")
    return spent / told["words"] * 1e6, told["busy"]


def cost_of_a_word(bench: Bench) -> Section:
    """Measure 1."""
    section = Section(
        "CPU per word",
        "Server CPU (µs) per word that arrives, all told: the answerer, the framework, the server, the kernel. Medians "
        "of the rounds; goals are medians of the rounds' ratios.",
    )
    loads = [
        Load("50 words/s × 200", f"steady {PACE}", 200, bench.pick(100, 200), {"bare": 1.3, "litestar": 1.1}),
        Load("500 words/s × 50", "steady 500", 50, bench.pick(250, 500), {"bare": 0.7}),
        Load("bursts × 40", "burst", 40, bench.pick(500, 1_000), {"bare": 0.2}),
    ]
    section.header = ["", *(load.name for load in loads), *(f"ratio to bare, {load.name}" for load in loads)]
    with ExitStack() as stack:
        servers = {kind: stack.enter_context(serve(kind)) for kind in bench.kinds}
        results = [compare_words(bench, section, servers, load) for load in loads]
    for kind in bench.kinds:
        costs = [show(median(found[kind])) for found in results]
        section.rows.append([NAMES[kind], *costs, *(show(ratio(found, kind, "bare")) for found in results)])
    bench.cost = {kind: median(results[0][kind]) for kind in bench.kinds}
    for kind, times in (("socketio", 4), ("chainlit", 8)):
        for load, found in zip(loads, results, strict=True):
            if kind in bench.kinds:
                name = f"{NAMES[kind]} / ours, {load.name}"
                section.goals.append(Goal(name, ratio(found, kind, "ours"), times, is_most=False))
    for load, found in zip(loads, results, strict=True):
        bars = {NAMES[kind]: ratio(found, kind, "bare") for kind in bench.kinds}
        section.bars[f"CPU per word, {load.name} visitors (bare ASGI = 1; less is better)"] = bars
    return section


def compare_words(bench: Bench, section: Section, servers: dict[str, Server], load: Load) -> dict[str, list[float]]:
    """Compare all kinds under one load."""
    busiest = 0.0

    def run(kind: str, is_warm_up: bool) -> float:  # noqa: FBT001 - the bench's own
        nonlocal busiest
        cost, busy = spend(servers[kind], load, load.words // (4 if is_warm_up else 1))
        busiest = max(busiest, 0.0 if is_warm_up else busy)
        return cost

    found = bench.compare(load.name, bench.kinds, run)
    for kind, limit in load.goals.items():
        if kind in bench.kinds:
            section.goals.append(Goal(f"ours / {NAMES[kind]}, {load.name}", ratio(found, "ours", kind), limit))
    saturated = ": too busy to trust" if busiest > 0.9 and not load.is_burst else ""
    section.notes.append(f"The visitors' core was at most {busiest:.0%} busy at {load.name}{saturated}.")
    return found
