"""Measure the page while a long reply comes: 2,000 words at 200 words a second, by default.

Prints the frames drawn, the longest task and the share of the main thread that the page used.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_chat_session import CHROMIUM, FLAGS, ScriptedServer

WATCH = """
window.tasks = []
new PerformanceObserver((list) => tasks.push(...list.getEntries().map((entry) => entry.duration))).observe({ type: "longtask" })
window.draws = 0
addEventListener("load", () => {})
"""


def words(count: int, paragraph: int) -> list[str]:
    """Return words with some Markdown among them, a new paragraph after every *paragraph* words (0: never)."""
    marks = ["**bold** ", "`code` ", "[link](https://example.com/a) ", "*soft* "]
    out = [marks[i // 9 % 4] if i % 9 == 0 else f"word{i} " for i in range(count)]
    return [word + ("\n\n- " if paragraph and i % paragraph == paragraph - 1 else "") for i, word in enumerate(out)]


def measure(count: int, rate: float, paragraph: int) -> dict[str, float]:
    server = ScriptedServer()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1000, "height": 760})
        page.add_init_script(WATCH)
        page.goto(server.url)
        page.locator("[part~=launcher]").click()
        link = server.link()
        page.locator("[part~=input]").fill("Tell me everything.")
        page.keyboard.press("Enter")
        link.reply(link.wait("message")["id"], end="")
        devtools = page.context.new_cdp_session(page)
        devtools.send("Performance.enable")

        def busy() -> float:
            found = {m["name"]: m["value"] for m in devtools.send("Performance.getMetrics")["metrics"]}
            return float(found["TaskDuration"])

        page.evaluate("tasks.length = 0")
        before, begun = busy(), time.monotonic()
        for number, word in enumerate(words(count, paragraph)):
            link.send("text-delta", id="r1", delta=word)
            time.sleep(max(0.0, begun + number / rate - time.monotonic()))
        link.send("finish")
        page.wait_for_function(
            "document.querySelector('chat-session').shadowRoot.querySelector('[data-state=finished]')"
        )
        took = time.monotonic() - begun
        used = busy() - before
        longest = page.evaluate("Math.max(0, ...tasks)")
        long = page.evaluate("tasks.length")
        browser.close()
    return {"seconds": took, "busy": used / took, "long tasks": long, "longest ms": longest}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--words", type=int, default=2_000)
    parser.add_argument("--rate", type=float, default=200.0)
    options = parser.parse_args()
    for name, paragraph in (("paragraphs", 40), ("one paragraph", 0)):
        print(name, {k: round(v, 3) for k, v in measure(options.words, options.rate, paragraph).items()})
