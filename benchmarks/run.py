"""Measure chat_session against what people would use instead, and write docs/benchmarks.md and its plot.

    pip install -e ".[bench]" && python benchmarks/run.py [--quick] [--only 1,2]

All in one run: ours and the peers, interleaved, on uvicorn's default websocket implementation with uvloop, one process
on one core, the visitors on another. It takes less than 15 minutes on two cores, and with --quick less than three,
whose report goes to build/. Chainlit gets an environment of its own in the user's cache folder. All traffic is local.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import distance
import lab
import neighbours
import sessions
import words
from measures import Bench
from report import Section, document, plot

if TYPE_CHECKING:
    from collections.abc import Callable

MEASURES: dict[int, Callable[[Bench], Section]] = {
    1: words.cost_of_a_word,
    2: words.lag_of_a_word,
    3: sessions.memory_of_a_session,
    4: distance.click_to_greeting,
    5: distance.second_turn,
    6: sessions.growth,
    7: neighbours.neighbours,
    8: neighbours.bursts,
}


def run(bench: Bench, numbers: list[int]) -> list[Section]:
    """Run the measures; one that breaks is told of, and the others go on."""
    sections = []
    for number in numbers:
        bench.say(f"{number}. {(MEASURES[number].__name__).replace('_', ' ')}")
        try:
            section = MEASURES[number](bench)
        except Exception as error:  # noqa: BLE001 - it is told of, and counts as missed
            section = Section(f"measure {number}", "", notes=[f"**Not measured**: {error!r}"], is_measured=False)
        section.title = f"{number}. {section.title}"
        print(f"\n{section.text}\n", flush=True)
        sections.append(section)
    return sections


def main(*, is_quick: bool, numbers: list[int], folder: Path) -> int:
    """Measure, print and write, and return how many goals were missed."""
    absent = lab.missing()
    bench = Bench(is_quick, [kind for kind in lab.NAMES if kind not in absent], absent)
    machine = lab.describe_machine()
    print(machine, *(f"Not run: {lab.NAMES[kind]}: {why}" for kind, why in absent.items()), sep="\n", flush=True)
    sections = run(bench, numbers)
    folder.mkdir(exist_ok=True)
    has_plot = plot(folder / "benchmarks.svg", sections)
    minutes = (time.monotonic() - bench.begun) / 60
    command = f"python benchmarks/run.py{' --quick' if is_quick else ''}"
    head = [
        f"Written by `{command}` on {datetime.now(UTC):%Y-%m-%d}, in {minutes:.0f} minutes. {machine}.",
        SETUP,
        *(f"Not run: {lab.NAMES[kind]}, since {why}." for kind, why in absent.items()),
        *(["![Ratios to the bare app](benchmarks.svg)"] * has_plot),
    ]
    (folder / "benchmarks.md").write_text(document(head, sections), encoding="utf-8")
    print(f"Written to {folder / 'benchmarks.md'} in {minutes:.1f} minutes.")
    return sum(not goal.is_met for section in sections for goal in section.goals) + sum(
        not section.is_measured for section in sections
    )


SETUP = (
    "Every server is one uvicorn process with its default websocket implementation, uvloop, no compression, on one core; "
    "the visitors are raw sockets in one process on another core. *Bare ASGI* sends the same frames with no token, "
    "session or limit. All have the same answerer."
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs; the report goes to build/")
    parser.add_argument("--only", default="", help="numbers of measures, such as 1,7; the report goes to build/")
    options = parser.parse_args()
    chosen = [int(number) for number in options.only.split(",")] if options.only else list(MEASURES)
    place = Path(__file__).resolve().parent.parent / ("build" if options.quick or options.only else "docs")
    sys.exit(min(1, main(is_quick=options.quick, numbers=chosen, folder=place)))
