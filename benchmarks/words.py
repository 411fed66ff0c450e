"""Measures 1 and 2: what a word costs, how late it is, and how many visitors one core serves."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab import NAMES, serve, visit
from measures import LIMIT, PACE, Bench, median, ratio
from report import Goal, Section, show

if TYPE_CHECKING:
    from lab import Crowd, Server


# ---- 1. What a word costs ----

VISITORS = 200


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


def spend(server: Server, crowd: Crowd, load: Load) -> tuple[float, float]:
    """Return the microseconds of server CPU that one word costs in one run, and how busy the visitors' core was."""
    server.settle()
    before = server.cpu
    content = {"text": f"{load.text} {load.words}", "words": load.words, "count": load.visitors}
    told = crowd.do("talk", **content, limit=LIMIT, spread=0.0 if load.is_burst else 0.2)
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
        Load("50 words/s × 200", f"steady {PACE}", VISITORS, bench.pick(35, 150), {"bare": 1.3, "litestar": 1.1}),
        Load("500 words/s × 50", "steady 500", 50, bench.pick(150, 500), {"bare": 0.7}),
        Load("bursts × 40", "burst", 40, bench.pick(1_000, 2_000), {"bare": 0.2}),
    ]
    section.header = ["", *(load.name for load in loads), *(f"ratio to bare, {load.name}" for load in loads)]
    with ExitStack() as stack:
        kinds = bench.among("ours", "bare", "litestar", "socketio", "chainlit") if bench.is_quick else list(bench.kinds)
        houses = {kind: house for kind in kinds if (house := open_house(bench, stack, kind))}
        kinds = list(houses)
        results = [compare_words(bench, section, houses, load) for load in loads]
    for kind in kinds:
        costs = [show(median(found[kind])) for found in results]
        section.rows.append([NAMES[kind], *costs, *(show(ratio(found, kind, "bare")) for found in results)])
    for kind, times in (("socketio", 4), ("chainlit", 8)):
        for load, found in zip(loads, results, strict=True):
            if kind in kinds:
                name = f"{NAMES[kind]} / ours, {load.name}"
                section.goals.append(Goal(name, ratio(found, kind, "ours"), times, is_most=False))
    for load, found in zip(loads, results, strict=True):
        bars = {NAMES[kind]: ratio(found, kind, "bare") for kind in kinds}
        section.bars[f"CPU per word, {load.name} visitors (bare ASGI = 1; less is better)"] = bars
    return section


def open_house(bench: Bench, stack: ExitStack, kind: str) -> tuple[Server, Crowd] | None:
    """Run a server with as many visitors as the largest load wants; nothing for a peer that does not run here."""
    try:
        server = stack.enter_context(serve(kind))
        return server, stack.enter_context(visit(server, VISITORS))
    except RuntimeError as error:
        if kind in {"ours", "bare"}:
            raise
        bench.drop(kind, error)
        return None


def compare_words(
    bench: Bench, section: Section, houses: dict[str, tuple[Server, Crowd]], load: Load
) -> dict[str, list[float]]:
    """Compare all kinds under one load."""
    busiest = 0.0

    def run(kind: str) -> float:
        nonlocal busiest
        cost, busy = spend(*houses[kind], load)
        busiest = max(busiest, busy)
        return cost

    found = bench.compare(load.name, list(houses), run)
    for kind, limit in load.goals.items():
        if kind in bench.kinds:
            section.goals.append(Goal(f"ours / {NAMES[kind]}, {load.name}", ratio(found, "ours", kind), limit))
    if not load.is_burst:
        section.notes.append(tell_busiest(load.name, busiest))
    return found


def tell_busiest(name: str, share: float) -> str:
    """Say whether the visitors could keep up."""
    doubt = ": too busy to trust, for the visitors may have been the limit" if share > 0.9 else ""
    return f"The visitors' core was at most {share:.0%} busy at {name}{doubt}."


# ---- 2. How late a word is, and how many visitors one core serves ----

CROWDS = (100, 400, 800)
LATE = 0.1  # seconds; more than that reads as a stutter
FEWEST, MOST = 10, 3_200


class Search:
    """One server under growing crowds, then the largest that it serves in time, by bisection."""

    def __init__(self, bench: Bench, server: Server, crowd: Crowd) -> None:
        self.lags: dict[int, dict[str, float]] = {}
        self.best, self.worst = FEWEST, MOST
        self._bench, self._server, self._crowd = bench, server, crowd
        self._opened = 0
        self.busiest = 0.0

    def run(self) -> Search:
        hear(self._crowd_of(20), 20, 20)  # warm-up
        for size in CROWDS:
            if size < 2 * self.worst:
                self._try(size)
        while self.worst / self.best > self._bench.pick(1.4, 1.12):
            self._try(round((self.worst * self.best) ** 0.5))
        return self

    def _crowd_of(self, size: int) -> Crowd:
        if size > self._opened:
            self._crowd.do("open", count=size - self._opened)
            self._opened = size
            self._server.settle()
        return self._crowd

    def _try(self, size: int) -> None:
        """Hear one crowd; a crowd that is late by bad luck is heard again."""
        told = hear(self._crowd_of(size), size, self._bench.pick(30, 80))
        if LATE <= told["p99"] < 2 * LATE and self._server.settle():
            told = min(told, hear(self._crowd, size, self._bench.pick(30, 80)), key=lambda each: each["p99"])
        self.lags[size] = told
        self.busiest = max(self.busiest, told["busy"])
        is_settled = self._server.settle()
        kind = NAMES[self._server.kind]
        self._bench.say(f"{kind}, {size} visitors: p50 {tell_ms(told['p50'])}, p99 {tell_ms(told['p99'])}")
        if is_in_time(told) and is_settled:
            self.best = max(self.best, size)
        else:
            self.worst = max(min(self.worst, size), self.best + 1)


def is_in_time(told: dict[str, float]) -> bool:
    return told["words"] == told["wanted"] and told["p99"] < LATE


def hear(crowd: Crowd, visitors: int, words: int) -> dict[str, float]:
    """Have the first *visitors* ask, not all at once, and sum up how late their words are."""
    spread = 0.5 * words / PACE
    content = {"text": f"due {PACE} {words}", "words": words, "limit": spread + words / PACE + 1, "spread": spread}
    return crowd.do("talk", **content, count=visitors, stamp_every=-(-visitors // 200))


def tell_ms(seconds: float) -> str:
    return "over 1 s" if seconds > 1 else f"{seconds * 1e3:.1f} ms"


def lag_of_a_word(bench: Bench) -> Section:
    """Measure 2."""
    section = Section(
        "Word lag, and the largest crowd",
        f"How long after it was due a word arrives, at {PACE} words a second for each visitor; due times are fixed in "
        "advance, so a server that falls behind does not slow its own clock. The largest crowd is the most visitors "
        "whose p99 stays under 100 ms, found by bisection. Of our lag up to 16 ms are meant: words wait for company "
        "until the screen's next refresh.",
        ["", *(f"{size} visitors: p50, p99" for size in CROWDS), "largest crowd", "× bare"],
    )
    found = search_all(bench)
    crowds = {kind: [float(each.best) for each in rounds] for kind, rounds in found.items()}
    bars = {NAMES[kind]: median(sizes) / median(crowds["bare"]) for kind, sizes in crowds.items()}
    for kind, rounds in found.items():
        cells = [tell_lag([each.lags for each in rounds], size) for size in CROWDS]
        section.rows.append([NAMES[kind], *cells, f"{median(crowds[kind]):,.0f}", show(bars[NAMES[kind]])])
    section.goals.append(Goal("largest crowd, ours / bare ASGI", ratio(crowds, "ours", "bare"), 0.9, is_most=False))
    if "chainlit" in crowds:
        times = median(crowds["ours"]) / median(crowds["chainlit"])
        section.goals.append(Goal("largest crowd, ours / Chainlit", times, 8, is_most=False))
    busiest = max(each.busiest for rounds in found.values() for each in rounds)
    section.notes.append(tell_busiest("the largest crowds", busiest))
    section.bars["Largest crowd on one core (bare ASGI = 1; more is better)"] = bars
    return section


def search_all(bench: Bench) -> dict[str, list[Search]]:
    """Put ours and the bare app under growing crowds in turns, the others once."""
    kinds = bench.among("ours", "bare", "chainlit") if bench.is_quick else bench.kinds
    found: dict[str, list[Search]] = {kind: [] for kind in kinds}
    for turn in range(bench.pick(1, 2)):
        chosen = kinds if turn == 0 else bench.among("ours", "bare")
        for kind in chosen[:: -1 if turn % 2 else 1]:
            with serve(kind) as server, visit(server) as crowd:
                found[kind].append(Search(bench, server, crowd).run())
    return found


def tell_lag(rounds: list[dict[int, dict[str, float]]], size: int) -> str:
    """Write the medians for one size of crowd."""
    told = [found[size] for found in rounds if size in found]
    return ", ".join(tell_ms(median(each[name] for each in told)) for name in ("p50", "p99")) if told else "–"
