"""Reads the built site as a person does, in a headless browser: links, anchors, console, and the width of pages.

    python docs/check.py [folder for screenshots]

Needs playwright and a Chromium, which CHROMIUM names if it is not on the path.
"""

import functools
import http.server
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from playwright.sync_api import Page, TimeoutError, sync_playwright

SITE = Path(__file__).resolve().parent.parent / "site"
WIDTHS = (390, 1280)
SEEN = """() => ({
    links: [...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href')),
    ids: [...document.querySelectorAll('[id]')].map(e => e.id),
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.getAttribute('src')),
    wide: document.documentElement.scrollWidth > innerWidth,
    title: document.querySelector('h1')?.innerText ?? '',
})"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of the folder, on a free port of this machine."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def read(page: Page, base: str, name: str, shots: Path | None) -> tuple[dict, list[str]]:
    """What is on a page, and what is wrong with it, at all widths."""
    wrong: list[str] = []
    said = lambda m: wrong.append(f"console: {m.text}") if m.type in ("error", "warning") else None  # noqa: E731
    failed = lambda r: wrong.append(f"cannot load {r.url}")  # noqa: E731
    asked = lambda r: None if r.url.startswith((base, "data:", "blob:")) else wrong.append(f"asks for {r.url}")  # noqa: E731
    thrown = lambda e: wrong.append(f"script: {e}")  # noqa: E731
    listeners = {"console": said, "requestfailed": failed, "request": asked, "pageerror": thrown}
    for event, listener in listeners.items():
        page.on(event, listener)
    seen: dict = {}
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        answer = page.goto(base + name, wait_until="networkidle")
        if answer is None or not answer.ok:
            wrong.append("cannot be loaded")
        seen = page.evaluate(SEEN)
        wrong += [f"picture {source} is broken" for source in seen["broken"]]
        wrong += [f"wider than {width} pixels"] * seen["wide"] + ["has no title"] * (not seen["title"])
        if shots is not None:
            page.screenshot(path=shots / f"{name.replace('/', '-').removesuffix('.html')}-{width}.png", full_page=True)
    for event, listener in listeners.items():
        page.remove_listener(event, listener)
    return seen, wrong


def finds(page: Page, base: str, word: str) -> bool:
    """Whether the search of the site finds a word."""
    page.set_viewport_size({"width": WIDTHS[-1], "height": 900})
    page.goto(f"{base}index.html", wait_until="networkidle")
    page.click("input.md-search__input")
    page.keyboard.type(word)  # the search listens to keys
    try:
        page.wait_for_selector(".md-search-result__item", timeout=20_000)
    except TimeoutError:
        return False
    return True


def main(shots: Path | None) -> int:
    """The number of things that are wrong."""
    names = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html"))
    if not names:
        sys.exit("there is no site: make docs")
    if shots is not None:
        shots.mkdir(parents=True, exist_ok=True)
    browsers = [os.environ.get("CHROMIUM"), *map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))]
    pages, wrong = {}, []
    with served(SITE) as base, sync_playwright() as playwright:
        path = next((found for found in browsers if found), None)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        for name in names:
            pages[name], found = read(page, base, name, shots)
            wrong += [f"{name}: {what}" for what in found]
        if not finds(page, base, "partition"):
            wrong.append("the search finds nothing")
        browser.close()
        for name, seen in pages.items():
            for link in seen["links"]:
                target, anchor = urldefrag(urljoin(base + name, link))
                if not target.startswith(base):
                    if urlsplit(target).scheme not in ("http", "https"):
                        wrong.append(f"{name}: {link} leads nowhere")
                    continue
                place = unquote(target.removeprefix(base)) or "index.html"
                if place not in pages and not (SITE / place).is_file():
                    wrong.append(f"{name}: {link} leads to no page")
                elif anchor and place in pages and unquote(anchor) not in pages[place]["ids"]:
                    wrong.append(f"{name}: {link} leads to no place on {place}")
    print("\n".join(dict.fromkeys(wrong)) or f"{len(pages)} pages, at {WIDTHS} pixels: nothing is wrong")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(1 if main(Path(sys.argv[1]) if len(sys.argv) > 1 else None) else 0)
