"""Measures 7 and 8: what one visitor can do to the others, by flooding, by reading nothing, by a bursting answer."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lab import NAMES, serve, stop, visit
from measures import PACE, Bench, median
from report import Goal, Section

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab import Crowd, Server

OTHERS = 100
FLOOD = 20_000
SIZE = 4_000  # characters of a word that piles up
PILE_PACE = 1_000
BURST = 100_000


@contextmanager
def house(kind: str) -> Iterator[tuple[Server, Crowd, Crowd]]:
    """Run a server with a hundred visitors, and one more in a process of its own."""
    with serve(kind) as server, visit(server, OTHERS) as others, visit(server, 1) as one:
        yield server, others, one


def hear(others: Crowd, words: int, disturb: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Have the others talk while *disturb* is at work, and sum up how late their words are."""
    text = f"due {PACE} {words}"
    others.begin("talk", text=text, words=words, limit=words / PACE + 30, spread=0.5, stamp_every=1)
    disturb()
    return others.end()


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def neighbours(bench: Bench) -> Section:
    """Measure 7."""
    section = Section(
        "Neighbours",
        f"How late the words of {OTHERS} visitors are (p99, {PACE} words a second each) when nothing else happens, while "
        f"one more visitor sends {FLOOD:,} small valid frames a second, and while one asks for a reply of "
        f"{PILE_PACE} words of {SIZE:,} characters a second and reads nothing. Goals are what that adds to the quiet p99, "
        "since up to 16 ms of ours are meant.",
        ["", "quiet p99", "beside a flood", "beside one who reads nothing", "his answerer's pace"],
    )
    seconds = bench.pick(2, 4)
    for kind in bench.among("ours", *bench.pick((), ("bare", "litestar"))):
        found = [disturb(bench, kind, seconds) for _ in range(bench.pick(1, 3) if kind == "ours" else 1)]
        quiet, flood, stall, said = (median(each[which] for each in found) for which in range(4))
        section.rows.append([NAMES[kind], ms(quiet), ms(flood) if kind == "ours" else "–", ms(stall), f"{said:.0%}"])
        if kind == "ours":
            section.goals += [
                Goal("others' p99 beside a flood, beyond the quiet one", (flood - quiet) * 1e3, 10, " ms"),
                Goal(
                    "others' p99 beside one who reads nothing, beyond the quiet one", (stall - quiet) * 1e3, 10, " ms"
                ),
                Goal("the pace of his answerer, of what was due", said * 100, 95, " %", is_most=False),
            ]
    section.notes.append(
        "The bare apps take no frame while they answer, so a flood only fills their buffers; and they wait for the "
        "visitor who reads nothing."
    )
    return section


def disturb(bench: Bench, kind: str, seconds: int) -> tuple[float, float, float, float]:
    """Return the others' p99 in quiet, in a flood and beside one who reads nothing, and the pace of his answerer."""
    words, total = PACE * seconds, PILE_PACE * seconds
    with house(kind) as (server, others, one):
        hear(others, PACE)  # warm-up
        quiet = hear(others, words)["p99"]
        flood = 0.0
        if kind == "ours":
            flood = hear(others, words, lambda: one.begin("flood", pace=FLOOD, seconds=float(seconds)))["p99"]
            sent = one.end()
            bench.say(f"{NAMES[kind]}: {sent['sent'] / sent['seconds']:,.0f} frames a second sent, lost {sent['lost']}")
            server.settle()
        text = f"pile {PILE_PACE} {total} {SIZE}"
        stall = hear(others, words, lambda: one.begin("stall", text=text, seconds=seconds + 0.5))["p99"]
        one.end()
        told = server.read(0.5)
        if not told:  # his answerer still waits for him; it ends when he goes
            stop(one.process)
            told = server.read(5.0)
    pace = told["said"] / told["seconds"] / PILE_PACE if told else 0.0
    bench.say(
        f"{NAMES[kind]}: p99 {ms(quiet)}, flood {ms(flood)}, nothing read {ms(stall)}, answerer's pace {pace:.0%}"
    )
    return quiet, flood, stall, pace


def bursts(bench: Bench) -> Section:
    """Measure 8."""
    section = Section(
        "An answerer that bursts",
        f"How late the latest of the words of {OTHERS} visitors is ({PACE} words a second each), in quiet and while one "
        f"more gets {BURST:,} words that his answerer yields without a pause.",
        ["", "quiet, latest word", "beside the burst", "delay"],
    )
    for kind in bench.among("ours", *bench.pick((), ("bare", "litestar"))):
        found = [burst(bench, kind) for _ in range(bench.pick(1, 3) if kind == "ours" else 1)]
        quiet, beside = (median(each[which] for each in found) for which in (0, 1))
        delay = median(each[1] - each[0] for each in found)
        section.rows.append([NAMES[kind], ms(quiet), ms(beside), ms(delay)])
        if kind == "ours":
            section.goals.append(
                Goal("others' latest word beside a burst, beyond the quiet one", delay * 1e3, 20, " ms")
            )
    return section


def burst(bench: Bench, kind: str) -> tuple[float, float]:
    """Return how late the others' latest word is, in quiet and beside a burst."""

    def ask() -> None:
        time.sleep(0.7)  # when all the others talk
        one.begin("talk", text=f"burst {BURST}", words=BURST, limit=60.0)

    with house(kind) as (_, others, one):
        hear(others, PACE)  # warm-up
        quiet = hear(others, 2 * PACE)["worst"]
        beside = hear(others, 2 * PACE, ask)["worst"]
        came = one.end()["words"]
    if came != BURST:
        raise RuntimeError(f"{kind}: {came} words of a burst came, not {BURST}")
    bench.say(f"{NAMES[kind]}: latest word {ms(quiet)}, beside a burst {ms(beside)}")
    return quiet, beside
