"""Make the pictures of the README: python docs/screenshots.py [folder]."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_chat_session import CHROMIUM, FLAGS, HttpReply, Link, ScriptedServer

TAG = '<script src="/chat/widget.js" data-title="{title}" data-fallback-url="mailto:tea@example.com" data-accent="#1f6f5c"{more} defer></script>'
STYLE = b"""
:root { color-scheme: light dark; --ink: light-dark(#24312d, #e8ede9); --paper: light-dark(#faf7f1, #14181a) }
body { margin: 0; font: 16px/1.6 Georgia, "DejaVu Serif", serif; color: var(--ink); background: var(--paper) }
header { display: flex; gap: 28px; align-items: baseline; padding: 26px 48px; border-bottom: 1px solid #8884 }
header b { font-size: 22px; margin-inline-end: auto }
main { padding: 40px 48px; max-width: 1000px }
h1 { font-weight: 500; font-size: 40px; line-height: 1.15; margin: 0 0 12px; max-width: 13em }
p { max-width: 34em }
.goods { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 20px; margin-top: 28px; max-width: 620px }
.goods div { border-radius: 14px; padding: 110px 16px 14px; background: linear-gradient(160deg, var(--a), var(--b)); color: #fff; font-size: 15px }
"""
SHOP = """<link rel="stylesheet" href="/shop.css">"""
GOODS = "".join(
    f'<div class="{name}">{text}</div>'
    for name, text in [("g1", "Sencha, 80 g"), ("g2", "Assam, 100 g"), ("g3", "Hojicha, 80 g")]
)
STYLE += b".g1 { --a: #9cbf8b; --b: #38624a } .g2 { --a: #c98d5f; --b: #6e3a22 } .g3 { --a: #b7a58d; --b: #5b4636 }"
ENGLISH = f"<header><b>Leaf &amp; Kettle</b><span>Teas</span><span>Cups</span><span>Shipping</span></header><main><h1>Small-batch teas, sent the week they arrive</h1><p>Picked by hand, packed in paper, at your door in three days.</p><div class='goods'>{GOODS}</div></main>"
ARABIC = f"<header><b>ورق وإبريق</b><span>الشاي</span><span>الأكواب</span></header><main><h1>شاي طازج يصلك في أسبوع وصوله</h1><p>نختاره باليد ونغلفه بالورق.</p><div class='goods'>{GOODS}</div></main>"
LONG = """Yes, we ship to **Canada** every Tuesday and Friday.

1. Orders before *noon* leave the same day.
2. Parcels up to `2 kg` cost **$9**; above that we write to you first:
   - letters take 5 to 8 days
   - parcels take 3 to 5 days
3. Duties are paid by us.

You can follow your parcel on [your orders page](https://example.com/orders). Anything else I can look up?"""


@contextmanager
def shop(browser: Browser, server: ScriptedServer, *, arabic: bool = False, **context: Any) -> Iterator[Page]:
    server.reset()
    server.greeting = "مرحبا! كيف يمكنني مساعدتك؟" if arabic else "Hello! Ask me about our teas, cups or your parcel."
    texts = (
        ' data-text-placeholder="اكتب رسالة" data-text-waiting="في الانتظار" data-text-cancel="استرجاع"'
        if arabic
        else ""
    )
    server.tag = TAG.format(title="ورق وإبريق" if arabic else "Leaf & Kettle", more=texts)
    server.page = {"head": SHOP, "body": "", "html": ' dir="rtl"' if arabic else ""}
    server.body = ARABIC if arabic else ENGLISH
    server.extra["/shop.css"] = HttpReply(200, STYLE, {"Content-Type": "text/css"})
    options = {
        "viewport": {"width": 1120, "height": 720},
        "device_scale_factor": 1,
        "reduced_motion": "reduce",
        **context,
    }
    page = browser.new_context(**options).new_page()
    page.goto(server.url)
    yield page
    page.context.close()


def open_chat(page: Page, server: ScriptedServer) -> Link:
    page.locator("[part~=launcher]").click()
    link = server.link()
    expect(page.locator("[part~=reply]")).to_be_visible()
    return link


def ask(page: Page, link: Link, text: str, count: int = 1) -> str:
    page.locator("[part~=input]").fill(text)
    page.locator("[part~=input]").press("Enter")
    return str(link.wait("message", count)["id"])


def talk(page: Page, link: Link, *, end: bool = True) -> None:
    link.reply(ask(page, link, "Do you ship to Canada?"), LONG, end="")
    if end:
        link.send("source-url", sourceId="1", url="https://example.com/shipping", title="Shipping and duties")
        link.send("source-url", sourceId="2", url="https://example.com/canada", title="Canada")
        link.send("finish")


def main(folder: Path) -> None:
    server = ScriptedServer()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)

        def picture(name: str, act: Callable[[Page], None] | None = None, **context: Any) -> None:
            with shop(browser, server, **context) as page:
                if act:
                    act(page)
                page.wait_for_timeout(600)
                page.screenshot(path=folder / f"{name}.png")

        def greeting(page: Page) -> None:
            open_chat(page, server)

        def streaming(page: Page) -> None:
            link = open_chat(page, server)
            link.reply(ask(page, link, "Do you ship to Canada?"), LONG[:150], end="")

        def sources(page: Page) -> None:
            talk(page, open_chat(page, server))

        def waiting(page: Page) -> None:
            link = open_chat(page, server)
            link.reply(ask(page, link, "Do you ship to Canada?"), LONG[:150], end="")
            ask(page, link, "And how long does it take?", 2)
            ask(page, link, "Is gift wrapping possible?", 3)

        def refused(page: Page) -> None:
            link = open_chat(page, server)
            message = ask(page, link, "And how long does it take?")
            link.send(
                "message-rejected", id=message, code="rate-limited", detail="Too many messages. Please wait 12 seconds."
            )

        def reconnecting(page: Page) -> None:
            link = open_chat(page, server)
            link.reply(ask(page, link, "Do you ship to Canada?"), LONG[:150], end="")
            page.wait_for_timeout(200)
            server.token_always = None
            link.abort()
            expect(page.get_by_text("Reconnecting")).to_be_visible()

        def idle(page: Page) -> None:
            link = open_chat(page, server)
            talk(page, link)
            link.send("session-idle", closesIn=60)

        def ended(page: Page) -> None:
            link = open_chat(page, server)
            talk(page, link)
            link.send("session-end", reason="idle")

        def arabic(page: Page) -> None:
            link = open_chat(page, server)
            link.reply(
                ask(page, link, "هل ترسلون إلى كندا؟"),
                "نعم! نرسل إلى **كندا** كل ثلاثاء:\n\n- الرسائل: 5 أيام\n- الطرود: 3 أيام",
            )
            link.reply(ask(page, link, "وكم يكلف ذلك؟", 2), "التكلفة", id="r2", end="")
            ask(page, link, "شكرا", 3)

        phone = {"viewport": {"width": 390, "height": 780}, "is_mobile": True, "has_touch": True}
        picture("closed")
        picture("greeting", greeting)
        picture("streaming", streaming)
        picture("sources", sources)
        picture("waiting", waiting)
        picture("refused", refused)
        picture("reconnecting", reconnecting)
        picture("idle", idle)
        picture("ended", ended)
        picture("dark", waiting, color_scheme="dark")
        picture("phone", sources, **phone)
        picture("right-to-left", arabic, arabic=True)
        browser.close()


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    target.mkdir(exist_ok=True, parents=True)
    main(target)
