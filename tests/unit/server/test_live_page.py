"""The live page: its news, its safety, and, in a real browser, what people see."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from browser import browser

from fedtune.core.round_records import ClientRecord, Evaluation, RoundRecord
from fedtune.server.live.board_page import live_run
from fedtune.server.live.server_home import ServerConfig
from fedtune.server.live.status_board import Board, JobStatus, PlanStatus
from fedtune.server.run_display import Silent
from fedtune.server.watch.live_page import MAX_PAGES, page_routes
from fedtune.server.watch.live_run import LiveRun, Seen, Shown
from fedtune.server.watch.watch_server import WatchServer

SCORE = Evaluation(loss=0.5, exact_match=0.75, examples=4, tokens=9)
MARKUP = "<img src=x onerror='window.hurt=1'>\u202e"


def a_round(number: int, names: tuple[str, ...] = ("ann", "bob"), dropped: str | None = None) -> RoundRecord:
    """Returns a round whose last client may have dropped out."""
    clients = [ClientRecord(name, answered=2.5) for name in names]
    clients[-1] = ClientRecord(names[-1], dropped=dropped)
    return RoundRecord(number, 4.0, "R", 0.1, tuple(clients), 1.5 / number, eval=SCORE)


@pytest.fixture
def live(tmp_path: Path) -> LiveRun:
    return LiveRun(lambda: Shown("first", tmp_path))


# -- the news ---------------------------------------------------------------------------------------------------------


def test_a_page_is_told_everything_once_and_then_what_changed(live: LiveRun) -> None:
    seen = Seen()
    live.begin(0, 3, 2, 0)
    first = live.changes(seen)
    assert first is not None
    assert first["begin"] is True
    assert (first["job"]["name"], first["job"]["round"], first["job"]["rounds"]) == ("first", 1, 3)
    assert live.changes(seen) is None
    live.client(ClientRecord("ann", answered=2.5))
    changed = live.changes(seen)
    assert changed is not None
    assert (changed["job"]["answered"], changed["clients"]["ann"]["seconds"]) == (1, 2.5)
    live.round(a_round(1, dropped="too slow"))
    news = live.changes(seen)
    assert news is not None
    (point,) = news["rounds"]
    assert (point["round"], point["loss"], point["score"], point["metric"]) == (1, 1.5, 0.75, "Exact match")
    assert (point["asked"], point["answered"]) == (2, 1)
    assert (news["clients"]["ann"]["rounds"], news["clients"]["bob"]["dropped"]) == (1, "too slow")
    assert news["job"]["left"] == 8  # two more rounds like this one
    assert news["notes"] == ("bob: too slow",)
    live.begin(0, 5, 2, 0)  # the next job
    again = live.changes(seen)
    assert again is not None
    assert (again["begin"], "rounds" in again, again.get("gone", [])) == (True, False, [])


def test_a_run_that_goes_on_shows_the_rounds_of_an_earlier_process(live: LiveRun, tmp_path: Path) -> None:
    lines = [json.dumps(a_round(number).to_json()) + "\n" for number in (1, 2, 3)]
    (tmp_path / "rounds.jsonl").write_text("".join(lines))
    live.begin(2, 5, 2, 0)  # the third has no checkpoint, and is trained again
    news = live.changes(Seen())
    assert news is not None
    assert [point["round"] for point in news["rounds"]] == [1, 2]
    assert news["clients"]["ann"]["rounds"] == 2


def test_a_server_shows_its_devices_with_plan_prediction_and_last_contact(tmp_path: Path) -> None:
    from owner import make_server

    home = make_server(tmp_path / "cloud", ServerConfig("localhost:8443", "127.0.0.1", 0))
    board = Board(tmp_path / "status.json", "localhost:8443", Silent())
    board.device("ann", state="online", heard=1000.4, plan=PlanStatus(8, "packed", 64, 120, 1.5))
    board.job = JobStatus("lamp", "waiting for devices: 1 of 3 are there")
    board.problem("a disk was full")
    live, seen = live_run(home, board), Seen()
    live.begin(0, 3, 2, 0)
    news = live.changes(seen)
    assert news is not None
    assert (news["job"]["name"], news["job"]["state"]) == ("lamp", "waiting for devices: 1 of 3 are there")
    ann = news["clients"]["ann"]
    assert (ann["state"], ann["plan"], ann["predicted"], ann["heard"]) == ("online", "rank 8, packed", 1.5, 1000)
    assert "a disk was full" in news["notes"][-1]
    board.keep_devices(set())
    gone = live.changes(seen)
    assert gone is not None
    assert gone["gone"] == ["ann"]


def test_names_and_reasons_cannot_turn_the_direction_of_text(live: LiveRun) -> None:
    live.begin(0, 3, 2, 0)
    live.round(a_round(1, ("ann", f"bob{MARKUP}"), dropped=f"because {MARKUP}"))
    assert "\u202e" not in json.dumps(live.changes(Seen()), ensure_ascii=False)


def test_a_thousand_devices_cost_a_look_a_few_milliseconds(live: LiveRun) -> None:
    live.begin(0, 3, 1000, 0)
    live.round(a_round(1, tuple(f"device-{number}" for number in range(1000))))
    seen = Seen()
    live.changes(seen)
    began = time.process_time()
    for _ in range(10):
        assert live.changes(seen) is None
    assert (time.process_time() - began) / 10 < 0.05


# -- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture
def url(live: LiveRun) -> Iterator[str]:
    with WatchServer(page_routes(live), "0") as url:
        yield url


def first_news(url: str) -> dict[str, Any]:
    """Returns the first message of the stream."""
    with httpx.stream("GET", f"{url}/events", timeout=10) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                message: dict[str, Any] = json.loads(line.removeprefix("data: "))
                return message
    raise AssertionError("the stream ended")


def test_the_page_is_one_file_that_admits_only_its_own_script(url: str) -> None:
    answer = httpx.get(url)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.text
    assert "script-src 'sha256-" in answer.text
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert not any(mark in answer.text for mark in ("src=", "href=", "@import", "innerHTML", "https://"))


def test_the_stream_begins_with_the_whole_state(url: str, live: LiveRun) -> None:
    live.begin(0, 3, 2, 0)
    live.round(a_round(1))
    news = first_news(url)
    assert (news["begin"], len(news["rounds"]), sorted(news["clients"])) == (True, 1, ["ann", "bob"])


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
    ],
)
@pytest.mark.parametrize("path", ["", "/events"])
def test_neither_page_nor_stream_answers_another_site(url: str, path: str, headers: dict[str, str]) -> None:
    answer = httpx.get(f"{url}{path}", headers=headers)
    assert (answer.status_code, "fedtune" in answer.text) == (403, False)


def test_more_pages_than_there_is_room_for_are_told_so(live: LiveRun) -> None:
    live.begin(0, 3, 2, 0)
    with WatchServer(page_routes(live), "0") as url, httpx.Client(timeout=10) as client:
        streams = [client.stream("GET", f"{url}/events") for _ in range(MAX_PAGES)]
        lines = [stream.__enter__().iter_lines() for stream in streams]
        for each in lines:
            next(each)
        refused = httpx.get(f"{url}/events", timeout=10)
        assert (refused.status_code, refused.text) == (503, f"{MAX_PAGES} pages are open already; close one\n")
        began = time.monotonic()
        for stream in streams:
            stream.__exit__(None, None, None)
    assert time.monotonic() - began < 5.0, "open pages do not hold the server's end up"


# -- in a browser -----------------------------------------------------------------------------------------------------


@contextmanager
def another_site(target: str) -> Iterator[str]:
    """Serves a page of another origin that asks for ours in every way a page can."""
    script = f"""
      window.got = [];
      const source = new EventSource("{target}/events");
      source.onmessage = (event) => window.got.push("event");
      source.onerror = () => {{ window.refused = true; source.close(); }};
      fetch("{target}/events").then((answer) => window.got.push("fetch"), () => 0);
      const frame = document.createElement("iframe");
      frame.src = "{target}/"; document.documentElement.append(frame);
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(f"<script>{script}</script>".encode())

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_people_see_each_round_within_a_second_and_names_as_text_on_every_screen(
    url: str, live: LiveRun, tmp_path: Path
) -> None:
    live.begin(0, 9, 2, 0)
    with browser(tmp_path) as page:
        page.open(url)
        page.until("document.getElementById('name').textContent === 'first'")
        live.round(a_round(1, ("ann", MARKUP), dropped=f"because {MARKUP}"))
        began = time.monotonic()
        page.until("document.body.dataset.rounds === '1'")
        assert time.monotonic() - began < 1.0
        live.round(a_round(2))
        page.until("document.getElementById('round').textContent === '3 / 9'")
        page.until("document.getElementById('loss').textContent === '0.75'")
        assert page.evaluate("document.getElementById('score').textContent") == "75.0%"
        assert page.evaluate("document.querySelectorAll('#losses polyline').length") == 2
        text = page.evaluate("document.body.innerText")
        assert "<img src=x onerror='window.hurt=1'>" in text
        assert page.evaluate("[document.images.length, window.hurt === undefined]") == [0, True]
        for width, dark in ((1200, False), (1200, True), (360, True)):
            page.screen(width, dark=dark)
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), width
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert ground == ("rgb(15, 18, 22)" if dark else "rgb(245, 246, 248)")
            page.picture(tmp_path / f"page-{width}-{'dark' if dark else 'light'}.png")


def test_a_thousand_devices_stay_responsive(url: str, live: LiveRun, tmp_path: Path) -> None:
    names = tuple(f"device-{number}" for number in range(1000))
    live.begin(0, 9, 1000, 0)
    with browser(tmp_path) as page:
        page.open(url)
        took = []
        for number in range(1, 6):  # each changes every device's row
            live.round(a_round(number, names))
            page.until(f"document.body.dataset.rounds === '{number}'")
            took.append(float(page.evaluate("document.body.dataset.milliseconds")))
        assert page.evaluate("document.querySelectorAll('#table tr').length") == 1000
        assert sorted(took)[1] < 100.0, took  # but for moments in which other work has the processor


def test_a_page_of_another_site_gets_nothing(url: str, live: LiveRun, tmp_path: Path) -> None:
    live.begin(0, 9, 2, 0)
    with another_site(url) as foreign, browser(tmp_path) as page:
        page.open(foreign)
        page.until("window.refused")
        time.sleep(1.0)
        assert page.evaluate("window.got") == []
