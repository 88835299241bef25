"""The report holds what it was given, needs nothing else, and looks right in a browser."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from tests.evaluate.examples import SIX, TASKS, cost, six_models
from twofold.evaluate.frontier import frontier, reference_lengths, wanted_timings
from twofold.evaluate.labels import Box, place
from twofold.evaluate.pictures import NARROW, WIDE, draw, format_cost, format_count, points_of, round_steps
from twofold.evaluate.report import report_html, write_report

COMMAND = "twofold frontier a b -o 'out <1>'"
VERSIONS = {"python": "3.12.1", "torch": "2.13.0"}
VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture(scope="module")
def found():
    models = six_models()
    models[2] = replace(models[2], model="<b>&t5gemma-2b-2b", settings=models[2].settings | {"limit": 7})
    costs = {}
    reference = reference_lengths(models, tuple(TASKS))
    for model, (name, (config, _, speed)) in zip(models, SIX.items(), strict=True):
        assert name in model.model
        costs[model.model] = cost(config, wanted_timings(model, tuple(TASKS), reference, 8), speed=speed)
    return frontier(models, costs, allows_differences=True)


@pytest.fixture(scope="module")
def folder(found, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "out"
    files = write_report(found, folder, command=COMMAND, versions=VERSIONS)
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in files)
    return folder


class Page(HTMLParser):
    """Checks nesting, and collects texts, attributes and tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.seen = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.seen if name == tag]


def test_the_page_parses_and_has_every_number(found, folder):
    page = Page((folder / "index.html").read_text())
    text = " ".join(" ".join(page.texts).split()).replace("−", "-")
    for entry in found.entries:
        assert entry.name in text
        scores = [entry.score, *(task.score for task in entry.tasks.values())]
        for score in scores:
            assert f"{score.value:.1f} {score.low:.1f} to {score.high:.1f}" in text
        if entry.difference is not None:
            differences = [entry.difference, *(task.difference for task in entry.tasks.values())]
            for one in differences:
                assert f"{one.value:+.1f} {one.low:+.1f} to {one.high:+.1f}" in text
        size = entry.footprint
        for number in (size.weight_bytes, size.weight_bytes_per_token, size.cache_bytes_per_token):
            assert f"{format_count(number)}B" in text
        assert format_count(entry.flops) in text
        for seconds in (
            *entry.latency_s.values(),
            entry.reference.first_token_s["median"],
            entry.reference.token_s,
        ):
            assert format_cost(seconds, "latency") in text
        assert f"{entry.throughput.tokens_per_s:.1f}" in text
    for words in (
        "limit: gemma-2-2b has 200",
        COMMAND,
        "3.12.1",
        "2.13.0",
        "a processor",
        "2,000 bootstrap draws",
    ):
        assert words in text
    assert "t5gemma-9b-2b 3 of 500" in text


def test_the_page_is_accessible_as_markup(folder):
    page = Page((folder / "index.html").read_text())
    ids = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    pictures = page.all("svg")
    assert len(pictures) == 4  # two, for wide screens and for phones
    for picture in pictures:
        assert picture["role"] == "img"
        assert set(picture["aria-labelledby"].split()) <= set(ids)
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"
    headings = [int(tag[1]) for tag, _ in page.seen if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    for _, attributes in page.seen:
        for key in ("href", "xlink:href"):
            if attributes.get(key, "").startswith("#"):
                assert attributes[key][1:] in ids


def test_the_page_needs_nothing_else(folder):
    page = (folder / "index.html").read_text()
    assert not re.search(
        r'(?:src|href|action|poster|data)\s*=\s*["\']?(?!["\']?(?:#|data:))', page.replace("data:,", "data:")
    )
    assert not re.search(r"@import|<script|<iframe|https?://", page)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_names_are_text_and_not_markup(folder):
    page = (folder / "index.html").read_text()
    assert "<b>&t5gemma" not in page
    assert "&lt;b&gt;&amp;t5gemma-2b-2b" in page


def test_the_numbers_beside_it(found, folder):
    numbers = json.loads((folder / "frontier.json").read_text())
    assert numbers["command"] == COMMAND
    assert [entry["name"] for entry in numbers["entries"]] == [entry.name for entry in found.entries]
    assert numbers["entries"][0]["score"]["low"] == found.entries[0].score.low
    assert numbers["on_flops"] == list(found.on_flops)
    assert (folder / "quality-latency.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (folder / "quality-flops.svg").read_text()


def test_without_costs_or_with_one_model_there_is_still_a_report(tmp_path):
    models = six_models(only=["gemma-2-2b", "t5gemma-2b-2b"])
    page = report_html(frontier(models, {}), command=COMMAND, versions=VERSIONS)
    assert Page(page).all("svg") == []
    assert "Latency was not measured" in page
    files = write_report(frontier(models[:1], {}), tmp_path, command=COMMAND, versions=VERSIONS)
    assert [file.name for file in files] == ["index.html", "frontier.json"]
    flops_alone = frontier(models, {"gemma-2-2b": cost(SIX["gemma-2-2b"][0])})
    assert len(Page(report_html(flops_alone, command=COMMAND, versions=VERSIONS)).all("svg")) == 2


def test_a_metric_without_interval_says_so():
    models = six_models(only=["gemma-2-2b", "t5gemma-2b-2b"])
    models = [
        replace(m, tasks=m.tasks | {"wmt": replace(m.tasks["scitldr"], task="wmt", metric="bleu", values=())})
        for m in models
    ]
    page = report_html(frontier(models, {}), command=COMMAND, versions=VERSIONS)
    assert "wmt: no scores of single examples" in page
    assert "no interval" in page


@pytest.mark.parametrize("shape", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("kind", ["flops", "latency"])
def test_names_in_pictures_cover_nothing(found, kind, shape):
    points = points_of(found, kind)
    figure = draw(points, kind, shape)
    axes, renderer = figure.axes[0], figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert len(boxes) == len(points)
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert box.x0 >= axes.bbox.x0 - 1
        assert box.x1 <= figure.bbox.x1
        for point in points:
            x, y = axes.transData.transform((point.cost, point.score))
            assert not box.contains(x, y)


def test_small_differences_look_small(found):
    """Costs a few percent and scores a tenth of a point apart do not fill a picture."""
    near = [
        replace(point, cost=1e9 * (1 + 0.03 * i), cheapest=1e9, dearest=1e9, score=50 + 0.1 * i, low=None, high=None)
        for i, point in enumerate(points_of(found, "flops")[:2])
    ]  # fmt: skip
    axes = draw(near, "flops", WIDE).axes[0]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert right - left > 10 * 0.03e9
    assert top - bottom > 10 * 0.1


def test_names_of_points_on_one_spot_are_kept_apart():
    anchors = [(200.0, 100.0)] * 5
    boxes = place(anchors, [(60.0, 12.0)] * 5, [Box(194, 94, 206, 106)], Box(0, 0, 400, 200))
    for i, box in enumerate(boxes):
        assert box.overlap(Box(194, 94, 206, 106)) == 0
        assert all(box.overlap(other) == 0 for other in boxes[i + 1 :])
    (edge,) = place([(395.0, 100.0)], [(60.0, 12.0)], [], Box(0, 0, 400, 200))
    assert edge.right <= 395


def test_numbers_in_words():
    assert [format_count(x) for x in (12, 999.6, 1234, 61_234_000_000, 2.5e15)] == [
        "12.0", "1.00 k", "1.23 k", "61.2 G", "2.50 P",
    ]  # fmt: skip
    assert [format_cost(x, "latency") for x in (0.0123, 0.62, 1.0, 75.2)] == [
        "12.3 ms", "620 ms", "1.00 s", "75.2 s",
    ]  # fmt: skip
    assert round_steps(1.2, 11, most=4) == [2, 5, 10]
    assert round_steps(150, 900, most=6) == [150, 200, 300, 500, 700]
    assert round_steps(1, 1e7, most=4) == [1, 100, 1e4, 1e6]


CONTRAST = """() => {
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const worst = [];
  for (const e of document.querySelectorAll('h1,h2,h3,p,li,dt,dd,th,td,span,pre,figcaption,strong,svg text')) {
    if (!e.textContent.trim() || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), drawn = e.closest('svg');
    const [a, b] = [luminance(parse(drawn ? style.fill : style.color)), luminance(behind(e))];
    worst.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName, e.textContent.slice(0, 30)]);
  }
  return worst.sort((x, y) => x[0] - y[0])[0];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_in_a_browser(browser, folder, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    address = (folder / "index.html").as_uri()
    page.goto(address)
    assert [url for url in requests if not url.startswith("data:")] == [address]
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    visible = [page.locator(tag).first.is_visible() for tag in ("h1", "h2", "table", ".finding", ".warning")]
    assert all(visible)
    drawn = [svg.bounding_box() for svg in page.locator("svg").all() if svg.is_visible()]
    assert len(drawn) == 2
    for box in drawn:
        assert 250 <= box["width"] <= width
        assert box["height"] > 200
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].filter(e => e.getClientRects().length)"
        ".map(e => e.getBoundingClientRect().height))"
    )
    assert smallest >= 9
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 23, 27)")
    ratio, tag, text = page.evaluate(CONTRAST)
    assert ratio >= 4.5, f"{tag} {text!r} has a contrast of {ratio:.2f}"
    page.close()


def test_on_paper(browser, folder):
    """Printed from a dark screen, the page is white."""
    page = browser.new_page(color_scheme="dark")
    page.goto((folder / "index.html").as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len([svg for svg in page.locator("svg").all() if svg.is_visible()]) == 2
    page.close()
