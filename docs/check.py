"""Open every page of the built site in headless Chromium and look for what a reader would stumble over.

    sphinx-build --fail-on-warning --keep-going docs docs/_build
    python docs/check.py [SITE] [--screenshots DIR]

On each page: links and their fragments lead somewhere, pictures are there, nothing is asked of another host, the
console has no errors, every formula is rendered, and on a narrow screen the page is no wider than that. Exit status 1,
with a list, where something is not so.
"""

import argparse
import collections
import contextlib
import functools
import http.server
import pathlib
import shutil
import sys
import threading
import urllib.parse
from collections.abc import Iterator

from playwright.sync_api import ConsoleMessage, Page, Request, Response, Route, sync_playwright

WIDE, NARROW = (1280, 900), (390, 844)
#: A browser that asks nobody for anything.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]
#: What a page tells of itself: its fragments, its links, and what is wrong with it.
LOOK = r"""async () => {
    await window.MathJax?.startup?.promise;
    const wrong = [];
    for (const picture of document.images) {
        picture.loading = "eager";
        await picture.decode().catch(() => {});
        if (!picture.naturalWidth) wrong.push(`picture ${picture.getAttribute("src")} is missing`);
    }
    for (const node of document.querySelectorAll("span.math, div.math"))
        if (!node.querySelector("mjx-container svg, mjx-container mjx-math"))
            wrong.push(`formula is not rendered: ${node.textContent.slice(0, 80)}`);
    for (const error of document.querySelectorAll("mjx-merror, [data-mjx-error]"))
        wrong.push(`formula has an error: ${error.getAttribute("data-mjx-error") ?? error.textContent}`);
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node; (node = walker.nextNode());)
        if (/\\\(|\\\[|\$\$/.test(node.data) && !node.parentElement.closest("pre, code, script, style, mjx-container"))
            wrong.push(`formula as text: ${node.data.trim().slice(0, 80)}`);
    return {
        wrong,
        fragments: [...document.querySelectorAll("[id]")].map((node) => node.id),
        links: [...document.querySelectorAll("a[href]")].map((node) => node.href),
    };
}"""
#: What sticks out on the right of a narrow window, but for what scrolls in a container of its own within the article.
OVERFLOW = r"""() => {
    const width = document.documentElement.clientWidth;
    const article = document.querySelector("article") ?? document.body;
    const scrolls = (node) => node !== article
        && (getComputedStyle(node).overflowX !== "visible" || scrolls(node.parentElement));
    return [...article.querySelectorAll("*")]
        .map((node) => [node, node.getBoundingClientRect().right])
        .filter(([node, right]) => right > width + 1 && !scrolls(node))
        .map(([node, right]) => `${node.tagName.toLowerCase()} ${node.className} ends at ${right} px`);
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a word."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def served(site: pathlib.Path) -> Iterator[str]:
    """The address of the site on this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Visit:
    """A browser's page, and what goes wrong on it."""

    def __init__(self, page: Page, root: str) -> None:
        self.page, self.root, self.wrong = page, root, list[str]()
        page.route("**/*", self._only_here)
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.wrong.append(f"script: {error}"))
        page.on("requestfailed", self._failed)
        page.on("response", self._response)

    def _only_here(self, route: Route) -> None:
        if route.request.url.startswith((self.root, "data:", "blob:")):
            route.continue_()
        else:
            self.wrong.append(f"asks another host: {route.request.url}")
            route.abort()

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.wrong.append(f"console: {message.text}")

    def _failed(self, request: Request) -> None:
        if request.url.startswith(self.root):
            self.wrong.append(f"request failed: {request.url} ({request.failure})")

    def _response(self, response: Response) -> None:
        if response.status >= 400:
            self.wrong.append(f"{response.status}: {response.url}")


def check(site: pathlib.Path, chromium: str, screenshots: pathlib.Path | None) -> dict[str, list[str]]:
    """What is wrong, by page."""
    wrong: dict[str, list[str]] = collections.defaultdict(list)
    fragments: dict[str, set[str]] = {}
    links: dict[str, list[str]] = {}
    with served(site) as root, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        for file in sorted(site.rglob("*.html")):
            name = file.relative_to(site).as_posix()
            if name.startswith("_"):  # What a theme or an extension brought along.
                continue
            visit = Visit(browser.new_page(viewport={"width": WIDE[0], "height": WIDE[1]}), root)
            visit.page.goto(root + name, wait_until="load")
            seen = visit.page.evaluate(LOOK)
            fragments[name], links[name] = set(seen["fragments"]), seen["links"]
            _picture(visit.page, screenshots, name, "wide")
            visit.page.set_viewport_size({"width": NARROW[0], "height": NARROW[1]})
            overflow = visit.page.evaluate(OVERFLOW)
            _picture(visit.page, screenshots, name, "narrow")
            visit.page.close()
            wrong[name] += [
                *visit.wrong,
                *seen["wrong"],
                *(f"wider than the window of {NARROW[0]} px: {x}" for x in overflow[:3]),
            ]
        browser.close()
        for name, found in links.items():
            for link in dict.fromkeys(found):
                if link.startswith(root):
                    path, fragment = (urllib.parse.unquote(x) for x in urllib.parse.urldefrag(link.removeprefix(root)))
                    if not (site / path).exists():
                        wrong[name].append(f"link to {path}, which is not there")
                    elif fragment and path in fragments and fragment not in fragments[path]:
                        wrong[name].append(f"link to {path}#{fragment}: the page has no such place")
    return wrong


def _picture(page: Page, folder: pathlib.Path | None, name: str, width: str) -> None:
    if folder is not None:
        path = folder / f"{name.removesuffix('.html').replace('/', '-')}-{width}.png"
        page.screenshot(path=path, full_page=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    built = pathlib.Path(__file__).parent / "_build"
    parser.add_argument("site", nargs="?", type=pathlib.Path, default=built, help="the built site (docs/_build)")
    parser.add_argument(
        "--screenshots", type=pathlib.Path, metavar="DIR", help="pictures of each page, wide and narrow"
    )
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    parser.add_argument("--chromium", default=browser, help="the browser (chromium or google-chrome on the PATH)")
    options = parser.parse_args()
    if options.chromium is None:
        parser.error("there is no chromium on the PATH: --chromium says where one is")
    if not (options.site / "index.html").exists():
        parser.error(f"no site in {options.site}: sphinx-build --fail-on-warning --keep-going docs {options.site}")
    if options.screenshots is not None:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    wrong = check(options.site, options.chromium, options.screenshots)
    lines = [f"{name}: {what}" for name, found in wrong.items() for what in dict.fromkeys(found)]
    if lines:
        sys.exit("\n".join(lines))
    print(f"{len(wrong)} pages: nothing is missing, broken or too wide")


if __name__ == "__main__":
    main()
