# SPDX-License-Identifier: Apache-2.0
"""Uses the page of examples/browser/ as a person would, in Debian's Chromium without a window, and
prints what its models computed, a JSON line for each text.

    python tests/browser.py [--dtype q8] [--screenshot docs/browser.png]

Fails if the page shows an error, or asks for anything but the files of examples/. It needs the
models that the page names, `npm install` in examples/, and playwright.
"""

import argparse
import functools
import http.server
import json
import tempfile
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# A browser of a distribution, which asks nobody for updates. As root it has no sandbox.
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("fp32", "q8"), default="fp32")
    parser.add_argument("--screenshot", type=Path)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    args = parser.parse_args()

    handler = functools.partial(Quiet, directory=EXAMPLES)
    server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://localhost:{server.server_port}/"
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        browser = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=args.chromium,
            args=FLAGS,
            viewport={"width": 1000, "height": 680},
        )
        strange = []
        browser.on(
            "request",
            lambda x: x.url.startswith((address, "data:", "blob:")) or strange.append(x.url),
        )
        page = browser.new_page()
        page.goto(address + "browser/")
        page.select_option("#dtype", args.dtype)
        for form in ("#fill", "#compare"):
            page.click(f"{form} button")
            page.wait_for_selector(f"{form} button:enabled")
            assert page.query_selector(f"{form} table"), page.inner_text(f"{form} output")
        if args.screenshot:
            page.screenshot(path=args.screenshot)
        for line in page.evaluate(COMPUTED, args.dtype):
            print(json.dumps(line))
        browser.close()
    assert not strange, f"the page asked for {', '.join(strange)}"


# The numbers that the page has rounded.
COMPUTED = """async (dtype) => {
    const { fill, embed } = await import("/browser/models.js");
    const text = document.getElementById("masked").value;
    const texts = document.getElementById("sentences").value.trim().split("\\n");
    const embeddings = await embed(texts, dtype);
    const guesses = { text, guesses: await fill(text, dtype) };
    return [guesses, ...texts.map((text, i) => ({ text, embedding: embeddings[i] }))];
}"""


if __name__ == "__main__":
    main()
