"""The report as a file is self-contained, safe, reproducible, and written for runs in every state."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.errors import InputError, MissingExtraError, RunDirectoryError, RunError
from fedtune.server import cli
from fedtune.server.report import write_comparison, write_report
from fedtune.server.report.canvas import draw, round_axis
from fedtune.server.run_rounds import tier_summary

MakeRun = Callable[..., Path]
HOSTILE = (
    "<script>alert(1)</script>",
    "$x_$ $\\frac{1}{",
    "]]></svg><img src=x onerror=alert(2)>",
    '" onload="alert(3)',
    "_{{ 7 * 7 }}{% raw %}",
    "\u202egnp.exe\x00\ud800",
    "日本語🦙",
    "n" * 10_000,
)


class Page(HTMLParser):
    """A parser that collects tags, attributes and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, run_writer: MakeRun) -> Page:
    """Writes and parses the report of an ordinary run, for tests that only read it."""
    return Page(write_report(run_writer(tmp_path_factory.mktemp("runs") / "run")))


def test_a_report_shows_the_headline_numbers_and_says_what_each_plot_shows(page: Page) -> None:
    for shown in ("95.0%", "fp32 FedAvg", "1:02", "812 MB", "220,000", "Bytes by round", "b" * 64, "[federation]"):
        assert shown in page.text
    assert page.tags.count("svg") == page.tags.count("figcaption") == 7


def test_a_report_loads_and_runs_nothing(page: Page) -> None:
    assert not {"script", "link", "img", "iframe", "object", "foreignobject"} & set(page.tags)
    links = [value or "" for name, value in page.attributes if name in ("href", "xlink:href", "src")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page.source))


def test_what_clients_wrote_stays_text(page: Page, make_run: MakeRun) -> None:
    answers = [{"prompt": text, "expected": text, "before": text, "after": text} for text in HOSTILE]
    run = make_run(
        clients=HOSTILE,
        dropout=lambda number, name: name if number == 2 and name != HOSTILE[0] else None,
        aborted=(2,),
        answers=answers,
    )
    hostile = Page(write_report(run))
    assert set(hostile.tags) <= set(page.tags) | {"bdi", "li", "span", "strong", "ul"}  # of lists that `page` lacks
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in hostile.text
    assert "$x_$" in hostile.text
    assert "{{ 7 * 7 }}" in hostile.text
    assert "日本語🦙" in hostile.text
    assert "n" * 2001 not in hostile.source
    assert not {"\u202e", "\x00", "\ud800"} & set(hostile.source)


def test_the_same_run_gives_the_same_bytes(make_run: MakeRun) -> None:
    run = make_run()
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_identifiers_are_not_shared_between_the_pictures_that_use_them(page: Page) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    used = [set(re.findall(r'(?:url\(|xlink:href=")#(\w+)', picture)) for picture in pictures]
    assert sum(map(len, used)) == len(set().union(*used))


def test_a_report_goes_where_it_is_asked_to(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    with pytest.raises(SystemExit):
        cli.main(["report", str(run), "--out", str(tmp_path / "mine.html")])
    assert not (run / "report.html").exists()
    assert "svg" in Page(tmp_path / "mine.html").tags


def test_the_axis_of_a_single_round_has_its_number_alone() -> None:
    def paint(axes: Any) -> None:
        round_axis(axes, 1, 1)
        axes.set_yticks([])

    assert re.findall(r"<text[^>]*>([^<]*)</text>", draw("One", "one round", paint).svg) == ["1", "round"]


def test_the_time_line_shows_the_rounds_of_a_short_run_and_the_last_ones_of_a_long_one(make_run: MakeRun) -> None:
    assert "When clients worked in rounds 1 to 16:" in Page(write_report(make_run("short", rounds=16))).text
    assert "When clients worked in rounds 77 to 100 of 100:" in Page(write_report(make_run("long", rounds=100))).text


def test_a_run_under_way_has_a_report_that_says_so(make_run: MakeRun) -> None:
    page = Page(write_report(make_run(finished=False)))
    assert "This run is not finished." in page.text
    assert "3 of 20 rounds" in " ".join(page.text.split())


def test_a_run_that_has_ended_no_round_has_a_report(make_run: MakeRun) -> None:
    page = Page(write_report(make_run(rounds=0, finished=False)))
    assert "there is nothing to draw" in page.text
    assert "svg" not in page.tags


def test_a_run_without_evaluation_shows_training_loss_and_bytes(make_run: MakeRun) -> None:
    page = Page(write_report(make_run(evaluated=False)))
    assert "the server holds no examples out" in page.text
    assert "Exact match" not in re.findall(r"<h3>(.*?)</h3>", page.source)


def test_dropouts_are_listed_with_their_reasons(make_run: MakeRun) -> None:
    run = make_run(dropout=lambda number, name: "battery empty" if (number, name) == (2, "ben") else None)
    page = Page(write_report(run))
    assert "1 × battery empty" in page.text
    assert "1 of 9 times" in page.text


def test_a_long_list_of_dropouts_is_cut_and_says_so(make_run: MakeRun) -> None:
    run = make_run(rounds=60, dropout=lambda _number, name: None if name == "ada" else "battery empty")
    assert "The last 100 are listed" in Page(write_report(run)).text


def test_rounds_that_nobody_survived_are_drawn_as_aborted(make_run: MakeRun) -> None:
    run = make_run(dropout=lambda _number, _name: "battery empty", aborted=(1, 2, 3))
    page = Page(write_report(run))
    assert "3 rounds were aborted" in page.text
    assert "Red strips" in page.text


def test_one_client_that_lies_about_its_loss_does_not_flatten_the_plot(make_run: MakeRun) -> None:
    names = [f"c{i}" for i in range(9)]
    run = make_run(clients=names, reported_loss=lambda name, loss: 1e300 if name == "c3" else loss)
    assert "3 values far off the scale not drawn" in Page(write_report(run)).text


def test_losses_that_are_all_absurd_still_give_a_report(make_run: MakeRun) -> None:
    run = make_run(clients=["a"], reported_loss=lambda _name, _loss: 1.7e308)
    assert "far off the scale" in Page(write_report(run)).text


def test_a_thousand_clients_give_distributions_and_a_page_of_bounded_size(make_run: MakeRun) -> None:
    names = [f"client-{i:04d}" for i in range(1000)]
    page = Page(write_report(make_run(clients=names)))
    assert "80 % of clients" in page.text
    assert "60 of up to 1,000 are drawn" in page.text
    assert "client-0500" not in page.text
    assert len(page.source) < 400_000


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"not a run directory; expected a job\.toml"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rounds.jsonl", "[]\n", r"rounds\.jsonl: .*Expected `object`"),
        ("rounds.jsonl", "{\n", "not one JSON object a line"),
        ("rounds.jsonl", '{"round": -1}\n', r"Expected `int` >= 0 - at `\$\[0\]\.round`"),
        ("summary.json", "{}", r"summary\.json: .*missing required field"),
        ("summary.json", '{"seconds": NaN}', "not what a run writes"),
        ("job.toml", "= 1", "not TOML"),
    ],
)
def test_a_file_that_a_run_did_not_write_is_refused_with_the_place(
    make_run: MakeRun, name: str, content: str, problem: str
) -> None:
    run = make_run()
    (run / name).write_text(content, encoding="utf-8")
    with pytest.raises(RunDirectoryError, match=problem):
        write_report(run)


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"package {package}.*pip install .*\[server\]'"):
        write_report(make_run())


def test_runs_side_by_side_show_numbers_lines_and_the_settings_that_differ(make_run: MakeRun, tmp_path: Path) -> None:
    first, second = make_run("_first$"), make_run("second", rounds=5, finished=False)
    job = (second / "job.toml").read_text(encoding="utf-8")
    (second / "job.toml").write_text(job.replace("rounds = 20", "rounds = 40"), encoding="utf-8")
    page = Page(write_comparison([first, second], tmp_path / "comparison.html"))
    assert page.tags.count("svg") == 4
    assert page.text.count("1 _first$") == 6  # two tables and every legend
    assert re.findall(r"<code>(.*?)</code>", page.source) == ["federation.rounds"]


def test_runs_of_the_same_name_are_told_apart(make_run: MakeRun, tmp_path: Path) -> None:
    page = Page(write_comparison([make_run("a/run"), make_run("b/run")], tmp_path / "comparison.html"))
    assert "1 run" in page.text
    assert "2 run" in page.text
    assert "None: the jobs are the same." in page.text


def judged_by(metric: str, run: Path) -> Path:
    """Makes a run one that is judged by generated answers."""
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    for evaluation in (summary["eval_before"], *(line["eval"] for line in lines)):
        evaluation |= {"metric": metric, "score": 0.4321}
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_a_run_that_is_judged_by_generated_answers_shows_its_metric_first_everywhere(make_run: MakeRun) -> None:
    page = Page(write_report(judged_by("rouge-l", make_run())))
    assert re.findall(r"<h3>(.*?)</h3>", page.source)[:3] == ["Loss", "ROUGE-L", "Exact match"]
    assert page.text.index("43.2% → 43.2%") < page.text.index("→ 95.0%")
    assert page.text.count("43.2%") >= 2 + 3, "the headline and one row a round"


def test_runs_are_compared_by_the_metric_that_they_share_and_otherwise_by_exact_match(
    make_run: MakeRun, tmp_path: Path
) -> None:
    first, second, third = (judged_by("token-f1", make_run(name)) for name in ("a", "b", "c"))
    page = Page(write_comparison([first, second], tmp_path / "same.html"))
    assert "Token F1 by bytes" in page.text
    page = Page(write_comparison([first, judged_by("loss", third)], tmp_path / "other.html"))
    assert "Exact match by bytes" in page.text


def test_one_run_is_not_a_comparison(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two run directories or more; got 1"):
        write_comparison([make_run()], tmp_path / "comparison.html")


def test_a_place_that_cannot_be_written_is_a_clean_error(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        write_comparison([make_run("a"), make_run("b")], tmp_path / "missing" / "comparison.html")


def test_tiers_kinds_and_what_was_merged_are_on_the_page(make_run: MakeRun) -> None:
    path = make_run(rounds=4)
    lines = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        ada, ben, _ = line["clients"]
        ada["tier"], ada["rank"] = 8, 4
        ben["tier"], ben["rank"], ben["dropped"] = 2, 0, "sat out"
        line["notes"] = ["tier 8: 1 of at least 3 clients; trained as tier 4", "<b>tier 2</b>"]
    summary = json.loads((path / "summary.json").read_text())
    summary["tiers"] = tier_summary(lines)
    parts = [{"id": "ada", "kind": "<i>phone", "rank": 4, "seconds": 3.0, "share": 1.0, "counts": True},
             {"id": "ben", "kind": "laptop", "rank": 16, "seconds": None, "share": 1.0, "counts": False}]  # fmt: skip
    virtual = [{"round": number, "seconds": 25.0, "deadline": None, "clients": parts} for number in range(1, 5)]
    (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "virtual.jsonl").write_text("".join(json.dumps(line) + "\n" for line in virtual))
    (path / "summary.json").write_text(json.dumps(summary))
    keys = ("tier", "merged", "sat_out", "updates", "share")
    tiers = [tuple(each[key] for key in keys) for each in summary["tiers"]]
    assert tiers == [(16, 0, 0, 4, 0.5), (8, 4, 0, 4, 0.5), (2, 0, 4, 0, 0.0)]
    page = write_report(path).read_text()
    expected = (
        "<h2>Tiers</h2>",
        "4 × <bdi>tier 8: 1 of at least 3",
        "100 s on its",
        "&lt;i&gt;phone",
        "&lt;b&gt;tier 2",
    )
    for text in expected:
        assert text in page
    assert "<i>phone" not in page


def test_a_run_of_equal_devices_says_nothing_of_tiers(make_run: MakeRun) -> None:
    assert "<h2>Tiers</h2>" not in write_report(make_run()).read_text()
