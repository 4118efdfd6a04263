"""The status page of a worker service in a real Chromium.

Needs the extra ``browser`` and a Chromium or Chrome on this machine (``apt install
chromium``); without them these tests are skipped. With WOVE_WS_SCREENSHOTS set to a folder
its pictures are kept there, to be looked at.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import shutil
import ssl
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import trustme
from raw_host import RawHost, occupy, pickled, wait_until
from service_thread import ServiceThread

from wove_ws_sync.worker import pages

cloudpickle.register_pickle_by_value(sys.modules[__name__])

playwright = pytest.importorskip(
    "playwright.sync_api", reason='needs pip install "wove_ws_sync[browser]"', exc_type=ImportError
)
expect = playwright.expect
expect.set_options(timeout=60_000)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
DRAWN = re.compile("M.+z")
SECRET = "planted-secret-0123456789"
SHOTS = os.environ.get("WOVE_WS_SCREENSHOTS")
EVIL = '<img src="x" onerror="window.hacked = 1"><script>window.hacked = 1</script>'
#: Runs before the page's own script, and is not under its policy.
WATCH = """
window.violations = [];
window.shift = 0;
document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
new PerformanceObserver((seen) => {
  for (const entry of seen.getEntries()) shift += entry.value;
}).observe({ type: "layout-shift", buffered: true });
"""
#: What reaches beyond the window.
WIDE = """
() => [...document.body.querySelectorAll("*")]
  .filter((node) => node.getBoundingClientRect().right > innerWidth)
  .map((node) => node.outerHTML.slice(0, 80))
"""
#: The texts that have too little contrast to what is behind them (WCAG AA).
FAINT = """
() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = numbers(color).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor, parts = numbers(color);
      if (parts.length === 3 || parts[3] === 1) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const faint = [];
  for (const node of document.body.querySelectorAll("*")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility() || node.closest("script, noscript, .hidden")) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) faint.push(`${node.tagName} ${node.className} ${node.textContent}: ${ratio.toFixed(2)}`);
  }
  return faint;
}
"""


def fail(text: str) -> None:
    raise ValueError(text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = next(filter(None, map(shutil.which, BROWSERS)), None) or driver.chromium.executable_path
        if not Path(found).exists():
            pytest.skip("there is no Chromium or Chrome on this machine (apt install chromium)")
        arguments = ["--no-sandbox", "--host-resolver-rules=MAP evil.example 127.0.0.1"]
        running = driver.chromium.launch(executable_path=found, args=arguments)
        yield running
        running.close()


class Watched:
    """A page that remembers what went wrong in it and what it asked for."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page.add_init_script(WATCH)
        self.url = url
        self.page.goto(url)

    def __getitem__(self, selector: str) -> Any:
        return self.page.locator(selector)

    def check(self) -> None:
        """Nothing was logged, nothing hurt the policy, nothing but the service was asked."""
        assert self.errors == []
        assert self.page.evaluate("violations") == []
        assert self.page.evaluate("window.hacked") is None
        assert {url for url in self.requests if not url.startswith((self.url, "data:"))} == set()
        assert len([url for url in self.requests if "status.json" in url]) > 0


@contextlib.contextmanager
def opened(browser: Any, url: str, **options: Any) -> Iterator[Watched]:
    watched = Watched(browser, url, **options)
    try:
        yield watched
    finally:
        watched.context.close()


@pytest.fixture
def service() -> Iterator[ServiceThread]:
    with ServiceThread() as running:
        yield running


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "gate"
    yield path
    path.touch()


def report(service: ServiceThread, *reported: Any) -> None:
    """Have each live run, the oldest first, report such a progress."""

    def on_loop(statistics: Any) -> None:
        dispatcher = service.service._dispatcher
        assert dispatcher is not None
        runs = sorted(dispatcher._table.live_runs(), key=lambda run: run.record.number)
        for run, (done, total, message) in zip(runs, reported, strict=False):
            statistics.progressed(run, done, total, message, 0.0)

    service.statistics(on_loop)


def test_it_follows_the_runs(browser: Any, service: ServiceThread, gate: Path) -> None:
    """From an empty page over running and waiting runs to their ends, without being loaded again."""
    with opened(browser, service.home) as page:
        expect(page["#state"]).to_have_text("Taking runs")
        for selector, text in (
            ("#live", "No runs at the moment."),
            ("#errors", "No errors so far."),
            ("#recent", "No run has ended yet."),
            ("#hosts", "No host is connected."),
            ("#throughput .nothing", "Nothing has ended in the last five minutes."),
        ):
            expect(page[selector]).to_have_text(text)
        with RawHost(service) as host:
            for name in ("first", "second", "third"):
                host.run(occupy(str(gate)), name)
            expect(page["#running"]).to_have_text("2")
            expect(page["#queued"]).to_have_text("1")
            expect(page["#live tr"]).to_have_count(3)
            expect(page["#live tr"].nth(2)).to_contain_text("waits")
            expect(page["#hosts"]).to_contain_text("127.0.0.1:")
            host.run(fail, "bad", text="there is no such invoice")
            gate.touch()
            host.wait("bad")
            expect(page["#live"]).to_have_text("No runs at the moment.")
            expect(page["#recent tr"]).to_have_count(4)
            expect(page["#recent .outcome.ok"]).to_have_count(3)
            expect(page["#errors"]).to_contain_text("ValueError: there is no such invoice")
            expect(page["#throughput .nothing"]).to_be_hidden()
            expect(page["#throughput .fill-ok"]).to_have_attribute("d", DRAWN)
            expect(page["#times .fill-p50"]).to_have_attribute("d", DRAWN)
            expect(page["#rate-note"]).to_have_text("4 since the start")
        expect(page["#hosts"]).to_have_text("No host is connected.")
        page["#errors summary"].click()
        expect(page["#errors pre"]).to_contain_text("Traceback")
        page.check()


def test_progress_bars_move(browser: Any, service: ServiceThread, gate: Path) -> None:
    """With a total there is a bar, without one a number; a message stands beside both."""
    with opened(browser, service.home) as page, RawHost(service) as host:
        for name in ("a", "b"):
            host.run(occupy(str(gate)), name)
            host.wait(name, "task_started")
        expect(page["#running"]).to_have_text("2")
        expect(page["#live progress:visible"]).to_have_count(0)
        report(service, (3, 12, "page 3"), (1200, None, ""))
        bar = page["#live tr"].nth(0).locator("progress")
        expect(bar).to_be_visible()
        assert bar.evaluate("bar => bar.position") == 0.25
        expect(page["#live tr"].nth(0)).to_contain_text("25 %")
        expect(page["#live tr"].nth(0)).to_contain_text("page 3")
        expect(page["#live tr"].nth(1)).to_contain_text("1,200 done")
        expect(page["#live tr"].nth(1).locator("progress")).to_be_hidden()
        report(service, (12, 12, "done"))
        expect(page["#live tr"].nth(0)).to_contain_text("100 %")
        page.check()


def test_what_tasks_say_is_text(browser: Any, service: ServiceThread, gate: Path) -> None:
    """Names, errors and messages that hold HTML are shown as they are."""
    with opened(browser, service.home) as page, RawHost(service) as host:
        host.send(
            type="run_task",
            run_id=EVIL,
            task_id=EVIL,
            callable_pickle=pickled(occupy(str(gate))),
            args_pickle=None,
        )
        expect(page["#running"]).to_have_text("1")
        report(service, (1, 2, EVIL))
        expect(page["#live .bar"]).to_contain_text(EVIL)
        expect(page["#live .cut"].first).to_have_text(EVIL)
        host.run(fail, "bad", text=EVIL)
        host.wait("bad")
        expect(page["#errors .message"]).to_have_text(f"ValueError: {EVIL}")
        gate.touch()
        expect(page["#recent tr"]).to_have_count(2)
        expect(page["#recent"]).to_contain_text(EVIL)
        assert page["img"].count() == 0
        assert page["script"].count() == 1
        page.check()


def test_injected_script_does_not_run(browser: Any, service: ServiceThread) -> None:
    """Should a text ever become HTML, the policy of the page still stops it."""
    with opened(browser, service.home) as page:
        expect(page["#state"]).to_have_text("Taking runs")
        outcome = page.page.evaluate(
            "html => { try { document.body.innerHTML += html; } catch (error) { return error.name; } }",
            EVIL,
        )
        assert outcome == "TypeError"
        page.page.evaluate(
            """() => { const script = document.createElement("script");
                try { script.append("window.hacked = 1"); document.body.append(script); } catch (e) {} }"""
        )
        page.page.evaluate("document.body.setAttribute('style', 'display: none')")
        assert page.page.evaluate("window.hacked") is None
        expect(page["main"]).to_be_visible()
        assert set(page.page.evaluate("violations")) == {"require-trusted-types-for", "style-src-attr"}


def test_a_lost_worker_is_said_and_found_again(browser: Any) -> None:
    """What was known stays there, marked; the next worker at the address is shown without a reload."""
    with ServiceThread() as first:
        port = first.port
        page = Watched(browser, first.home)
        try:
            expect(page["#state"]).to_have_text("Taking runs")
            expect(page["#notice"]).to_be_hidden()
            first.call(first.service.stop())
            expect(page["#notice"]).to_contain_text("Trying again")
            expect(page["#notice"]).to_contain_text("This is how it was at")
            expect(page["#state"]).to_have_class("lost")
            with ServiceThread(port=port):
                expect(page["#state"]).to_have_text("Taking runs")
                expect(page["#notice"]).to_be_hidden()
                assert page.page.evaluate("document.body.className") == ""
        finally:
            page.context.close()


def test_a_drain_is_said(
    browser: Any, service: ServiceThread, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that is held when it begins is answered; later the service can be asked no more."""
    monkeypatch.setattr(pages, "_HOLD", 8.0)  # less than the page waits
    with opened(browser, service.home) as page, RawHost(service) as host:
        host.run(occupy(str(gate)))
        host.wait("r", "task_started")
        expect(page["#running"]).to_have_text("1")
        server = service.service._server
        assert server is not None
        while not any("?hold" in url for url in page.requests):
            page.page.wait_for_timeout(20)  # which hears of requests
        wait_until(lambda: len(server.handler_tasks) == 2)  # of the host, and of the page
        drained = service.drain()
        expect(page["#state"]).to_contain_text("Draining")
        expect(page["#notice"]).to_contain_text("The worker drains")
        gate.touch()
        drained.result(60)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(
    browser: Any, service: ServiceThread, gate: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    """Nothing is wider than the window or moves by itself; every text has the contrast of WCAG AA."""
    look = {"viewport": {"width": width, "height": 844}, "color_scheme": scheme}
    with opened(browser, service.home, **look) as page, RawHost(service) as host:
        expect(page["#state"]).to_have_text("Taking runs")
        for number in range(6):
            host.run(fail if number % 3 == 2 else (lambda text: text), f"run-{number}", text="word " * 40)
            host.wait(f"run-{number}")
        for number in range(12):
            host.run(occupy(str(gate)), f"{'w' * 60}-{number}")
        expect(page["#running"]).to_have_text("2")
        report(service, (3, 12, "page 3 of the invoices of March"), (1200, None, "rows"))
        expect(page["#live"]).to_contain_text("25 %")
        expect(page["#recent tr"]).to_have_count(6)
        assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.page.evaluate(WIDE) == []
        assert page.page.evaluate(FAINT) == []
        assert page.page.evaluate("shift") < 0.05  # from 0.1 on it would be noticed
        folder = Path(SHOTS) if SHOTS else tmp_path
        path = folder / f"page-{width}-{scheme}.png"
        page.page.screenshot(path=str(path), full_page=True)
        assert path.stat().st_size > 10_000
        page.check()


def test_it_can_be_found_through_by_ear(browser: Any, service: ServiceThread) -> None:
    """Landmarks, headings, column heads, named curves; only the state is announced."""
    with opened(browser, service.home) as page:
        expect(page["#state"]).to_have_text("Taking runs")
        for role in ("banner", "main", "contentinfo"):
            assert page.page.get_by_role(role).count() == 1
        assert page.page.get_by_role("heading", level=1).count() == 1
        assert page.page.get_by_role("heading", level=2).count() == 6
        assert page.page.get_by_role("columnheader").count() == 12
        for name in ("In progress", "Last errors", "Lately ended", "Hosts"):
            assert page.page.get_by_role("region", name=name).count() > 0
        images = page.page.get_by_role("img")
        assert [images.nth(each).get_attribute("aria-label") for each in range(images.count())] == [
            "Nothing has ended in the last five minutes."
        ] * 2
        assert page["[aria-live], [role=status], [role=alert]"].count() == 2
        assert page["html"].get_attribute("lang") == "en"


def test_the_secret_opens_it(browser: Any) -> None:
    """A browser asks for it once and sends it with each request of the page, here over TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost", "127.0.0.1").configure_cert(context)
    security = {"type": "signed", "secret": SECRET}
    with ServiceThread(host="0.0.0.0", security=security, ssl_context=context) as service:
        home = f"https://localhost:{service.port}/"
        known = {"ignore_https_errors": True, "http_credentials": {"username": "me", "password": SECRET}}
        with opened(browser, home, **known) as page:
            expect(page["#state"]).to_have_text("Taking runs")
            page.page.wait_for_event("requestfinished", predicate=lambda request: "?hold" in request.url)
            assert page.page.evaluate("violations") == []
            assert SECRET not in page.page.content()
        with opened(browser, "about:blank", ignore_https_errors=True) as page:
            answer = page.page.request.get(home)
            assert answer.status == 401


@contextlib.contextmanager
def site(body: bytes) -> Iterator[str]:
    """Serve a page of somebody else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://localhost:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_foreign_page_reads_nothing(browser: Any, service: ServiceThread) -> None:
    """Not by fetch, not in a frame, not as a script, not by a name that was pointed here."""
    with site(b"<title>elsewhere</title>") as elsewhere, opened(browser, elsewhere) as page:
        for path in ("", "status.json", "metrics"):
            read = page.page.evaluate(
                "url => fetch(url).then(answer => answer.text()).catch(error => error.name)",
                service.home + path,
            )
            assert read == "TypeError"
        blind = "url => fetch(url, {mode: 'no-cors'}).then(answer => answer.type).catch(error => error.name)"
        assert page.page.evaluate(blind, service.home + "status.json") in ("opaque", "TypeError")
        page.page.evaluate(
            """url => new Promise((done) => { const frame = document.createElement("iframe");
                frame.onload = done; frame.src = url; document.body.append(frame); })""",
            service.home,
        )
        assert "throughput" not in page.page.frames[-1].content()
    with opened(browser, f"http://evil.example:{service.port}/") as page:
        assert "throughput" not in page.page.content()
        assert service.service.counters["refused_reader"] >= 4
