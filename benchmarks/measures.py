"""The eight measures. Each runs servers and visitors, and returns a section of the report."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lab import FOLDER, NAMES, serve, visit
from report import Goal, Section, show

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lab import Crowd, Server

PACE = 50
LIMIT = 120.0


@dataclass
class Bench:
    """What the measures share: how thorough to be, and who takes part."""

    is_quick: bool
    kinds: list[str]
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

    def compare(self, title: str, names: list[str], run: Callable[[str], float]) -> dict[str, list[float]]:
        """Run what *names* stand for in turn, forwards and backwards; the first round warms up and does not count."""
        found: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(self.pick(3, 5)):
            for name in names[:: -1 if turn % 2 else 1]:
                value = run(name)
                when = f"round {turn}" if turn else "warm-up"
                self.say(f"{title}, {when}: {NAMES.get(name, name)} {show(value)}")
                if turn:
                    found[name].append(value)
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


def spend(server: Server, load: Load) -> tuple[float, float]:
    """Return the microseconds of server CPU that one word costs in one run, and how busy the visitors' core was."""
    with visit(server, load.visitors) as crowd:
        server.settle()
        before = server.cpu
        spread = 0.0 if load.is_burst else 0.2
        told = crowd.do("talk", text=f"{load.text} {load.words}", words=load.words, limit=LIMIT, spread=spread)
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
        Load("50 words/s × 200", f"steady {PACE}", 200, bench.pick(75, 150), {"bare": 1.3, "litestar": 1.1}),
        Load("500 words/s × 50", "steady 500", 50, bench.pick(200, 500), {"bare": 0.7}),
        Load("bursts × 40", "burst", 40, bench.pick(500, 1_000), {"bare": 0.2}),
    ]
    section.header = ["", *(load.name for load in loads), *(f"ratio to bare, {load.name}" for load in loads)]
    with ExitStack() as stack:
        kinds = bench.among("ours", "bare", "litestar", "socketio", "chainlit") if bench.is_quick else bench.kinds
        servers = {kind: stack.enter_context(serve(kind)) for kind in kinds}
        results = [compare_words(bench, section, servers, load) for load in loads]
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


def compare_words(bench: Bench, section: Section, servers: dict[str, Server], load: Load) -> dict[str, list[float]]:
    """Compare all kinds under one load."""
    busiest = 0.0

    def run(kind: str) -> float:
        nonlocal busiest
        cost, busy = spend(servers[kind], load)
        busiest = max(busiest, busy)
        return cost

    found = bench.compare(load.name, list(servers), run)
    for kind, limit in load.goals.items():
        if kind in bench.kinds:
            section.goals.append(Goal(f"ours / {NAMES[kind]}, {load.name}", ratio(found, "ours", kind), limit))
    saturated = ": too busy to trust" if busiest > 0.9 and not load.is_burst else ""
    section.notes.append(f"The visitors' core was at most {busiest:.0%} busy at {load.name}{saturated}.")
    return found


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

    def run(self) -> Search:
        hear(self._crowd_of(20), 20, 20)  # warm-up
        for size in CROWDS:
            if size < 2 * self.worst:
                self._try(size)
        while self.worst / self.best > self._bench.pick(1.3, 1.1):
            self._try(round((self.worst * self.best) ** 0.5))
        return self

    def _crowd_of(self, size: int) -> Crowd:
        if size > self._opened:
            self._crowd.do("open", count=size - self._opened)
            self._opened = size
        return self._crowd

    def _try(self, size: int) -> None:
        """Hear one crowd; a crowd that is late by bad luck is heard again."""
        told = hear(self._crowd_of(size), size, self._bench.pick(50, 100))
        if not is_in_time(told) and self._server.settle() and size < self.worst:
            told = min(told, hear(self._crowd, size, self._bench.pick(50, 100)), key=lambda each: each["p99"])
        self.lags[size] = told
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
    """Have the first *visitors* ask within a second, and sum up how late their words are."""
    content = {"text": f"due {PACE} {words}", "words": words, "limit": 2 + words / PACE, "spread": 1.0}
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
    section.bars["Largest crowd on one core (bare ASGI = 1; more is better)"] = bars
    return section


def search_all(bench: Bench) -> dict[str, list[Search]]:
    """Put ours and the bare app under growing crowds in turns, the others once."""
    kinds = bench.among("ours", "bare", "chainlit") if bench.is_quick else bench.kinds
    found: dict[str, list[Search]] = {kind: [] for kind in kinds}
    for turn in range(bench.pick(1, 3)):
        chosen = kinds if turn == 0 else bench.among("ours", "bare")
        for kind in chosen[:: -1 if turn % 2 else 1]:
            with serve(kind) as server, visit(server) as crowd:
                found[kind].append(Search(bench, server, crowd).run())
    return found


def tell_lag(rounds: list[dict[int, dict[str, float]]], size: int) -> str:
    """Write the medians for one size of crowd."""
    told = [found[size] for found in rounds if size in found]
    return ", ".join(tell_ms(median(each[name] for each in told)) for name in ("p50", "p99")) if told else "–"


# ---- 3. What an idle session costs ----

KB = 1024


def sessions_memory(bench: Bench, kind: str, count: int) -> tuple[float, float]:
    """Return the kB of one session that is idle, and of one that has had a turn of 20 words."""
    with serve(kind) as server, visit(server, 1) as crowd:
        talk_short(crowd, 1)
        before = server.memory
        crowd.do("open", count=count)
        server.settle()
        idle = (server.memory - before) / count / KB
        talk_short(crowd, 0)
        server.settle()
        after = (server.memory - before) / count / KB
    bench.say(f"{NAMES[kind]}: {idle:.1f} kB idle, {after:.1f} kB after a turn")
    return idle, after


def talk_short(crowd: Crowd, count: int) -> None:
    crowd.do("talk", text=f"steady {PACE} 20", words=20, limit=LIMIT, spread=2.0 if count != 1 else 0.0, count=count)


def memory_of_a_session(bench: Bench) -> Section:
    """Measure 3, but for the CPU of idle sessions, which measure 6 has sessions enough for."""
    count = bench.pick(300, 1_000)
    section = Section(
        "Memory per session",
        f"Memory (PSS) that one of {count:,} sessions adds to the server, the server's own websocket included; and the "
        "same after a turn of 20 words in each. What a server holds by itself, with no session, is not counted.",
        ["", "idle", "after a turn", "beyond bare, idle", "beyond bare, after a turn"],
    )
    found: dict[str, list[tuple[float, float]]] = {}
    for turn in range(bench.pick(1, 3)):
        kinds = bench.among(*NAMES) if not (turn or bench.is_quick) else bench.among("ours", "bare", "litestar")
        for kind in kinds:
            if kind != "sse":  # it keeps no session
                found.setdefault(kind, []).append(sessions_memory(bench, kind, count))
    medians = {kind: [median(pair[which] for pair in pairs) for which in (0, 1)] for kind, pairs in found.items()}
    for kind, pair in medians.items():
        beyond = [kilobytes - bare for kilobytes, bare in zip(pair, medians["bare"], strict=True)]
        section.rows.append([NAMES[kind], *(f"{show(value)} kB" for value in (*pair, *beyond))])
    for which, (name, limit) in enumerate((("idle", 4), ("after a turn of 20 words", 8))):
        value = medians["ours"][which] - medians["bare"][which]
        section.goals.append(Goal(f"a session of ours beyond a bare websocket, {name}", value, limit, " kB"))
    return section


# ---- 6. Growth ----

TALKERS = 100


@dataclass
class House:
    """A server of ours with some sessions open."""

    server: Server
    crowd: Crowd
    sessions: int
    memory: float = 0.0
    idle: float = 0.0

    def fill(self, seconds: float) -> None:
        """Open the sessions, spread over *seconds*, and note what each holds."""
        self.crowd.do("open", count=1)
        talk_short(self.crowd, 1)
        before = self.server.memory
        self.crowd.do("open", count=self.sessions - 1, seconds=seconds)
        self.memory = (self.server.memory - before) / (self.sessions - 1) / KB

    def rest(self, seconds: float) -> None:
        """Note the share of a core that the sessions cost while nobody talks."""
        before = self.server.cpu
        time.sleep(seconds)
        self.idle = (self.server.cpu - before) / seconds

    def cost(self, words: int) -> float:
        """Return the microseconds of a word for a hundred talkers, what the idle cost by the way taken off."""
        before, begun = self.server.cpu, time.monotonic()
        told = self.crowd.do("talk", text=f"steady {PACE} {words}", words=words, limit=LIMIT, spread=0.2, count=TALKERS)
        spent = self.server.cpu - before - self.idle * (time.monotonic() - begun)
        return float(spent / told["words"] * 1e6)


def growth(bench: Bench) -> Section:
    """Measure 6, and what idle sessions cost."""
    many, few = bench.pick(1_500, 5_000), TALKERS
    interval = bench.pick(
        12.5, 25.0
    )  # pings come every 25 s; sessions opened evenly over half of it ping for half of it
    section = Section(
        "Idle sessions and growth",
        f"One server of ours with {few} sessions, one with {many:,}, opened evenly over {interval:g} s so that their pings "
        f"(one in 25 s from us, one in 20 s from uvicorn) are spread. Then nobody talks for {2 * interval:g} s, and "
        f"then {TALKERS} talk at {PACE} words a second, on each server in turn; the CPU that idle sessions cost by the "
        "way is measured and taken off a word's.",
        ["sessions", "CPU per word", "memory per session", "idle, share of a core"],
    )
    with ExitStack() as stack:
        houses = {str(size): open_house(stack, size) for size in (few, many)}
        for house in houses.values():
            house.fill(interval if house.sessions == many else 0.0)
        for house in houses.values():
            house.rest(2 * interval if house.sessions == many else 5.0)
            bench.say(f"{house.sessions} sessions: {house.memory:.1f} kB each, {house.idle:.2%} of a core")
        found = bench.compare("100 talkers among", list(houses), lambda name: houses[name].cost(bench.pick(50, 150)))
    for name, house in houses.items():
        cells = [f"{show(median(found[name]))} µs", f"{show(house.memory)} kB", f"{house.idle:.2%}"]
        section.rows.append([f"{house.sessions:,}", *cells])
    small, large = houses[str(few)], houses[str(many)]
    section.goals += [
        Goal(f"CPU of {many:,} idle sessions, pings included", large.idle * 100, 5, " %"),
        Goal(f"CPU per word, {many:,} / {few} sessions", ratio(found, str(many), str(few)), 1.25),
        Goal(f"memory per session, {many:,} / {few} sessions", large.memory / small.memory, 1.25),
        import_time(bench),
    ]
    return section


def open_house(stack: ExitStack, sessions: int) -> House:
    server = stack.enter_context(serve("ours"))
    return House(server, stack.enter_context(visit(server)), sessions)


def import_time(bench: Bench) -> Goal:
    """Compare the CPU of many interpreter starts, with Litestar and with the module besides."""
    host = "from litestar import Litestar, get, websocket"
    programs = {"host": host, "ours": f"{host}; import chat_session"}
    found: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(bench.pick(6, 21)):
        for name, program in programs.items():
            seconds = start_python(program)
            if turn:
                found[name].append(seconds)
    bench.say(f"import: Litestar {median(found['host']):.3f} s, with ours {median(found['ours']):.3f} s")
    return Goal("importing Litestar and the module / Litestar alone", ratio(found, "ours", "host"), 1.1)


def start_python(program: str) -> float:
    """Return the CPU seconds of one interpreter's life."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], cwd=FOLDER.parent, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
