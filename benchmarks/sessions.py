"""Measures 3 and 6: what a session holds, what an idle one costs, and what many of them change."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lab import FOLDER, NAMES, on_core, serve, visit
from measures import LIMIT, PACE, Bench, median, ratio
from report import Goal, Section, show

if TYPE_CHECKING:
    from lab import Crowd, Server


# ---- 3. What an idle session costs ----

KB = 1024
FIRST = 20  # sessions that fill what the start has left free, before memory is compared


def sessions_memory(bench: Bench, kind: str, count: int) -> tuple[float, float]:
    """Return the kB of one session that is idle, and of one that has had a turn of 20 words."""
    with serve(kind) as server, visit(server, FIRST) as crowd:
        talk_short(crowd)
        before = server.memory
        crowd.do("open", count=count)
        server.settle()
        idle = (server.memory - before) / count / KB
        talk_short(crowd)
        server.settle()
        after = (server.memory - before) / count / KB
    bench.say(f"{NAMES[kind]}: {idle:.1f} kB idle, {after:.1f} kB after a turn")
    return idle, after


def talk_short(crowd: Crowd) -> None:
    """Give each visitor a turn of 20 words."""
    crowd.do("talk", text=f"steady {PACE} 20", words=20, limit=LIMIT, spread=1.0)


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
        kinds = bench.among("ours", "bare") if turn or bench.is_quick else bench.kinds
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
PART = 1_000  # sessions, whose memory that of the later ones is compared with
INTERVAL = 25.0  # seconds between our pings; uvicorn's are 20 s apart


@dataclass
class House:
    """A server with some sessions open."""

    server: Server
    crowd: Crowd
    sessions: int
    memory: dict[int, int] = field(default_factory=dict)  # of the server, by the number of its sessions
    idle: float = 0.0

    def fill(self, seconds: float) -> None:
        """Begin to open the sessions, spread over *seconds*, and note on the way what they hold."""
        self.crowd.do("open", count=TALKERS)
        talk_short(self.crowd)
        self.memory[TALKERS] = self.server.memory
        opened = min(PART, self.sessions)
        self.crowd.do("open", count=opened - TALKERS, seconds=seconds * opened / self.sessions)
        self.memory[opened] = self.server.memory
        self.crowd.begin("open", count=self.sessions - opened, seconds=seconds * (1 - opened / self.sessions))

    def rest(self) -> None:
        """Wait until the sessions are open, note what they hold, and begin to watch what they cost."""
        self.crowd.end()
        self.memory[self.sessions] = self.server.memory
        self.idle = self.server.cpu

    def weight(self, first: int, last: int) -> float:
        """Return the kB that each session has added from the *first* to the *last*."""
        return (self.memory[last] - self.memory[first]) / (last - first) / KB

    def wake(self, seconds: float) -> None:
        """Note the share of a core that the sessions have cost while nobody talked."""
        self.idle = (self.server.cpu - self.idle) / seconds

    def cost(self, words: int) -> float:
        """Return the microseconds of a word for a hundred talkers, what the idle cost by the way taken off."""
        before, begun = self.server.cpu, time.monotonic()
        told = self.crowd.do("talk", text=f"steady {PACE} {words}", words=words, limit=LIMIT, spread=0.2, count=TALKERS)
        spent = self.server.cpu - before - self.idle * (time.monotonic() - begun)
        return float(spent / told["words"] * 1e6)


def growth(bench: Bench) -> Section:
    """Measure 6, and what idle sessions cost."""
    many = bench.pick(1_500, 5_000)
    few = 2 * TALKERS
    opening = bench.pick(3.0, INTERVAL)
    section = Section(
        "Idle sessions and growth",
        f"Servers of ours with {few} and {many:,} sessions, and a bare one with {many:,}, opened evenly over "
        f"{opening:g} s. Then nobody talks for {INTERVAL:g} s, in which each session is pinged once by us and once or twice "
        f"by uvicorn; and then {TALKERS} talk at {PACE} words a second, on each server in turn. What idle sessions cost "
        f"by the way is taken off a word's CPU; memory is what a session adds after the first {TALKERS}, which fill what "
        "a server's start has left free.",
        ["sessions", "CPU per word", "memory per session", "idle, share of a core"],
    )
    with ExitStack() as stack:
        plan = {"few": ("ours", few), "many": ("ours", many), "bare": ("bare", many)}
        houses = {name: open_house(stack, kind, size) for name, (kind, size) in plan.items()}
        imports = rest_all(bench, list(houses.values()), opening)
        for name, house in houses.items():
            bench.say(f"{name}: {house.sessions} sessions, {house.idle:.2%} of a core")
        words = bench.pick(30, 150)
        found = bench.compare(f"{TALKERS} talkers", list(houses), lambda name: houses[name].cost(words))
    for name, house in houses.items():
        weight = house.weight(TALKERS, house.sessions)
        cells = [f"{show(median(found[name]))} µs", f"{show(weight)} kB", f"{house.idle:.2%}"]
        section.rows.append([f"{NAMES[house.server.kind]}, {house.sessions:,}", *cells])
    section.goals += [
        Goal(f"CPU of {many:,} idle sessions, pings included", houses["many"].idle * 100, 5, " %"),
        Goal(f"CPU per word, {many:,} / {few} sessions", ratio(found, "many", "few"), 1.25),
        Goal(
            f"memory of a session, {PART + 1:,}th to {many:,}th / {TALKERS + 1}st to {PART:,}th",
            houses["many"].weight(PART, many) / houses["many"].weight(TALKERS, PART),
            1.25,
        ),
        imports,
    ]
    return section


def open_house(stack: ExitStack, kind: str, sessions: int) -> House:
    server = stack.enter_context(serve(kind))
    return House(server, stack.enter_context(visit(server)), sessions)


def rest_all(bench: Bench, houses: list[House], opening: float) -> Goal:
    """Open all sessions over *opening* seconds, and leave them alone; other interpreters start meanwhile."""
    for house in houses:
        house.fill(opening)
    for house in houses:
        house.rest()
    begun = time.monotonic()
    imports = import_time(bench)
    time.sleep(max(0.0, begun + INTERVAL - time.monotonic()))
    for house in houses:
        house.wake(time.monotonic() - begun)
    return imports


def import_time(bench: Bench) -> Goal:
    """Compare the CPU of many interpreter starts, with Litestar and with the module besides."""
    host = "from litestar import Litestar, get, websocket"
    programs = {"host": host, "ours": f"{host}; import chat_session"}
    found: dict[str, list[float]] = {name: [] for name in programs}
    with TemporaryDirectory() as folder:
        for turn in range(bench.pick(5, 16)):
            for name, program in programs.items():
                seconds = start_python(program, folder)
                if turn:  # the first compiles
                    found[name].append(seconds)
    bench.say(f"import: Litestar {median(found['host']):.3f} s, with ours {median(found['ours']):.3f} s")
    return Goal("importing Litestar and the module / Litestar alone", ratio(found, "ours", "host"), 1.1)


def start_python(program: str, folder: str) -> float:
    """Return the CPU seconds of one interpreter's life, which finds and leaves its bytecode in *folder*."""
    names = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
    names.pop("PYTHONDONTWRITEBYTECODE", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", program]
    subprocess.run(command, cwd=FOLDER.parent, check=True, preexec_fn=on_core(-1), env=names)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
