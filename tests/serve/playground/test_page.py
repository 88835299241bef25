"""The page in a real browser, on the server of the other tests."""

import re
import time

import httpx
import numpy as np
import pytest

DOCUMENT = (
    "the bridge was closed for nine weeks 🙂 and ferries carried people over water , while engineers replaced"
)
INSTRUCTION = "summarise the text in two sentences ."


@pytest.fixture
def open_page(browser, served):
    """Opens the page, on request with routes that answer instead of the server. At the end nothing may have been asked
    of another host, and nothing may have gone wrong that was not meant to."""
    opened = []

    def open_one(*, width=1400, height=900, expects=(), replies=None, **options):
        page = browser.new_page(viewport={"width": width, "height": height}, **options)
        page.set_default_timeout(10_000)
        seen = {"requests": [], "complaints": [], "expects": expects}
        page.on("request", lambda request: seen["requests"].append(request.url))
        page.on("console", lambda message: seen["complaints"].append(message.text))
        page.on("pageerror", lambda error: seen["complaints"].append(str(error)))
        for path, reply in (replies or {}).items():
            page.route(f"{served.address}/{path}", reply)
        page.goto(served.address)
        opened.append((page, seen))
        return page

    yield open_one
    served.pace = 0.0
    for page, seen in opened:
        page.close()
        elsewhere = [url for url in seen["requests"] if not url.startswith((served.address, "data:"))]
        assert elsewhere == []
        unexpected = [
            text for text in seen["complaints"] if not re.search("|".join(seen["expects"]) or "^$", text)
        ]
        assert unexpected == []


def until(page, expression, arg=None):
    """`page.wait_for_function` evaluates in the page, which its policy forbids."""
    deadline = time.monotonic() + 10
    while not page.evaluate(expression, arg):
        assert time.monotonic() < deadline, f"never came true: {expression}"
        page.wait_for_timeout(20)


def ask(page, *, tokens=12, sides="a"):
    """Fill in and run; returns once the words of every answer can be pointed at."""
    page.fill("#instruction", INSTRUCTION)
    if page.locator("#document").is_visible():
        page.fill("#document", DOCUMENT)
    for side in sides:
        settings = page.locator(f".answer.{side}")
        if not settings.locator(".settings").is_visible():
            settings.locator(".settings-button").click()
        settings.locator(".max-tokens").fill(str(tokens))
    page.click("#run")
    for side in sides:
        page.wait_for_selector(f".answer.{side} .w")


def expected_marks(served, page, view, *, answer_word=None, source_word=None, model="lossless", **options):
    """From the route's own numbers: what each word shown should be marked with, by its text and place."""
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": f"{INSTRUCTION}\n\n{DOCUMENT}"}],
        "answer": page.locator(f".answer.{'a' if model == 'lossless' else 'b'} .text").inner_text(),
    }
    reply = httpx.post(f"{served.address}/playground/attribution", json=asked | options).json()
    weights = np.array(reply["weights"])[0, 0]
    rows = weights / weights.sum(1, keepdims=True)
    if view == "distinctive":
        rows = (rows - rows.mean(0)).clip(min=0)
    if source_word is not None:
        column = rows[:, source_word]
        return column / column.max()
    text = reply["source"]["text"]
    starts = [text.index(INSTRUCTION), text.index(DOCUMENT)]
    stops = [starts[0] + len(INSTRUCTION), starts[1] + len(DOCUMENT)]
    shown = [
        i
        for i, (start, stop) in enumerate(reply["source"]["words"])
        if any(a <= start and stop <= b for a, b in zip(starts, stops, strict=True))
    ]
    row = rows[answer_word][shown]
    return row / row.max()


def marks(page, place):
    return page.eval_on_selector_all(
        f"{place} .w", "words => words.map(word => Number(word.style.getPropertyValue('--a')))"
    )


def assert_marked(page, place, expected):
    """Weak marks, below 0.03, are left out."""
    until(
        page,
        "([place, most]) => Math.max(...[...document.querySelectorAll(place + ' .w')]"
        ".map(word => Number(word.style.getPropertyValue('--a')))) === most",
        arg=[place, 1],
    )
    found = marks(page, place)
    assert found == pytest.approx(np.where(expected > 0.03, expected, 0.0).tolist(), abs=1e-3)


def settled(page, shown):
    until(page, "shown => document.getElementById('lens').dataset.shown === shown", arg=shown)


def test_an_answer_streams_and_shows_what_it_read(open_page, served):
    served.pace = 0.03
    page = open_page()
    page.fill("#document", DOCUMENT)
    until(page, "/18 words, \\d+ of 256 tokens/.test(document.getElementById('count').textContent)")
    page.evaluate(
        "() => { const place = document.querySelector('.answer .text'); window.lengths = new Set();"
        "new MutationObserver(() => lengths.add(place.textContent.length)).observe(place, { childList: true }); }"
    )
    ask(page)
    served.pace = 0.0
    assert page.evaluate("lengths.size") > 5
    answer = page.locator(".answer .text").inner_text()
    body = {
        "messages": [{"role": "user", "content": f"{INSTRUCTION}\n\n{DOCUMENT}"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    reply = httpx.post(f"{served.address}/v1/chat/completions", json=body).json()
    assert answer == reply["choices"][0]["message"]["content"]
    assert re.fullmatch(
        r"first word \d+\.\d\d s · \d+\.\d tokens/s · 12 tokens", page.locator(".answer .stats").inner_text()
    )

    words = page.locator(".answer .w")
    words.nth(3).hover()
    expected = expected_marks(served, page, "distinctive", answer_word=3)
    assert_marked(page, "#reading", expected)
    said = page.locator("#said").inner_text()
    assert said.startswith(f"“{words.nth(3).inner_text()}” looked more than usual at ")
    # The best of the words and its excess over the mean, as the page's text has it.
    best = page.locator("#reading .w").nth(int(expected.argmax())).inner_text()
    assert re.search(rf" at {re.escape(best)} \+\d", said)
    page.get_by_label("All attention").check()
    words.nth(5).hover()
    assert_marked(page, "#reading", expected_marks(served, page, "highlights", answer_word=5))

    page.locator("#layer").fill("3")
    page.locator("#head").select_option(index=4)
    settled(page, "highlights/2/3")
    words.nth(4).click()
    chosen = {"layers": [2], "heads": [3]}
    assert_marked(page, "#reading", expected_marks(served, page, "highlights", answer_word=4, **chosen))
    assert words.nth(4).get_attribute("aria-pressed") == "true"

    source = page.locator("#reading .w", has_text="ferries").first
    source.hover()
    number = int(source.get_attribute("data-word"))
    assert_marked(page, ".answer", expected_marks(served, page, "highlights", source_word=number, **chosen))
    page.mouse.move(5, 5)  # back to the pinned word
    assert_marked(page, "#reading", expected_marks(served, page, "highlights", answer_word=4, **chosen))
    page.locator("#edit").click()
    assert page.locator("#document").input_value() == DOCUMENT


def test_stop_keeps_what_was_written(open_page, served):
    """And of a text longer than its pane, ticks at the side show where the marks are."""
    served.pace = 0.05
    page = open_page(height=420)
    page.fill("#document", f"{DOCUMENT} . " * 6)
    page.keyboard.press("Control+Enter")
    until(page, "document.querySelector('.answer .text').textContent.length > 20")
    page.click("#stop")
    page.wait_for_selector("#run")
    assert page.locator(".answer .stats").inner_text().split(" · ")[3].startswith("stopped")
    served.pace = 0.0
    page.locator(".answer .w").nth(1).hover()
    until(page, "document.querySelectorAll('#ticks i').length > 0")
    strong = sum(mark > 0.2 for mark in marks(page, "#reading"))
    assert page.locator("#ticks i").count() == strong
    tops = page.eval_on_selector_all("#ticks i", "ticks => ticks.map(tick => parseFloat(tick.style.top))")
    assert tops == sorted(tops)
    assert 0 < tops[0] <= tops[-1] < 100
    assert all(engine.loop.is_idle for engine in served.engines.values())


def test_everything_by_keyboard(open_page):
    page = open_page()
    ask(page)
    page.locator(".answer .stats").wait_for()
    page.locator(".answer .settings .stops").focus()
    page.keyboard.press("Tab")
    focused = "document.activeElement.dataset.word"
    assert page.evaluate(focused) == "0"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == "2"
    word = page.locator(".answer .w").nth(2)
    until(page, "document.getElementById('said').textContent.includes(' looked ')")
    assert page.locator("#said").inner_text().startswith(f"“{word.inner_text()}”")
    assert max(marks(page, "#reading")) == 1.0
    assert word.evaluate("word => getComputedStyle(word).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert word.get_attribute("aria-pressed") == "true"
    page.keyboard.press("Escape")
    assert word.get_attribute("aria-pressed") == "false"
    page.keyboard.press("End")
    assert page.evaluate(focused) == str(page.locator(".answer .w").count() - 1)
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused) == "0"


def test_two_models_side_by_side(open_page, served):
    page = open_page()
    page.click("#compare")
    assert page.locator(".answer.b .model").input_value() == "published"
    ask(page, sides="ab")
    one, two = (page.locator(f".answer.{side}").bounding_box() for side in "ab")
    assert one["y"] == two["y"]
    assert two["x"] >= one["x"] + one["width"] - 1
    page.locator(".answer.b .w").nth(2).hover()
    assert_marked(
        page, "#reading", expected_marks(served, page, "distinctive", answer_word=2, model="published")
    )
    # A published pair has a softmax over the source alone, and so no words of its own in it.
    assert "own words" not in page.locator("#ledger").inner_text()
    page.locator("#reading .w", has_text="ferries").hover()
    until(page, "document.getElementById('said').textContent.includes(' was looked at ')")
    assert max(marks(page, ".answer.a")) == max(marks(page, ".answer.b")) == 1.0
    page.click("#compare")
    assert page.locator(".answer.b").count() == 0


def test_a_conversation_goes_on(open_page, served):
    page = open_page()
    page.get_by_label("Chat").check()
    ask(page)
    first = page.locator(".answer .text").inner_text()
    page.fill("#instruction", "for what ?")
    served.pace = 0.03
    with page.expect_request("**/v1/chat/completions") as asked:
        page.keyboard.press("Control+Enter")
    page.locator("#reading .w").nth(3).hover()  # of the answer before: nothing is known of the one that comes
    served.pace = 0.0
    turns = asked.value.post_data_json["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert (turns[1]["content"], turns[2]["content"]) == (first, "for what ?")
    page.wait_for_selector(".answer .w")
    assert first in page.locator(".answer .thread").inner_text()
    page.click("#fresh")
    assert page.locator(".answer .thread").inner_text() == ""


DROP = """([name, bytes]) => {
  const files = new DataTransfer();
  files.items.add(new File([new Uint8Array(bytes)], name));
  const dropped = new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: files });
  document.getElementById("document").dispatchEvent(dropped);
}"""


def test_files(open_page):
    page = open_page()
    page.evaluate(DROP, ["notes.md", list("närrisch\r\nzwei".encode())])
    until(page, "document.getElementById('document').value === 'närrisch\\nzwei'")
    page.evaluate(DROP, ["wide.txt", list("zwölf".encode("utf-16"))])
    until(page, "document.getElementById('document').value === 'zwölf'")
    problem = page.locator("#file-problem")
    for name, content, says in [
        ("paper.pdf", b"%PDF", "is a PDF. Only plain text"),
        ("odd.txt", b"\xff\x00\x81", "is not text in UTF-8"),
        ("none.txt", b"", "is empty"),
    ]:
        page.evaluate(DROP, [name, list(content)])
        until(page, "says => document.getElementById('file-problem').textContent.includes(says)", arg=says)
        assert problem.is_visible()
        assert f"“{name}”" in problem.inner_text()
    assert page.locator("#document").input_value() == "zwölf"


def refuse(status, code, message, **headers):
    def reply(route):
        route.fulfill(status=status, json={"error": {"message": message, "code": code}}, headers=headers)

    return reply


def test_refusals_in_words(open_page):
    calls = []

    def busy_then_away(route):
        calls.append(route)
        if len(calls) == 1:
            refuse(429, "busy", "too many", **{"Retry-After": "1"})(route)
        elif len(calls) == 2:
            route.abort()
        else:
            route.continue_()

    page = open_page(expects=("429", "ERR_FAILED", "400"), replies={"v1/chat/completions": busy_then_away})
    page.fill("#document", DOCUMENT)
    problem = page.locator(".answer .problem")
    page.click("#run")
    until(page, "document.querySelector('.answer .problem').textContent.startsWith('The server is busy.')")
    assert "by itself in 1 s" in problem.inner_text()
    until(page, "document.querySelector('.answer .problem').textContent.includes('Is it still running?')")
    problem.get_by_role("button").click()
    page.wait_for_selector(".answer .w")
    assert problem.is_hidden()
    page.click("#edit")
    page.fill("#document", "the " * 400)
    page.click("#run")
    until(page, "document.querySelector('.answer .problem').textContent.startsWith('Too long. The ')")


def test_a_model_without_chat_template_gets_plain_text(open_page):
    refusal = refuse(400, None, "the tokenizer has no chat template, so messages cannot be rendered")
    page = open_page(expects=("400",), replies={"v1/chat/completions": refusal})
    with page.expect_request("**/v1/completions") as asked:
        ask(page)
    assert asked.value.post_data_json["prompt"] == f"{INSTRUCTION}\n\n{DOCUMENT}"
    page.locator(".answer .w").nth(2).hover()
    until(page, "document.getElementById('said').textContent.includes(' looked ')")
    assert max(marks(page, "#reading")) == 1.0
    assert page.locator(".answer .problem").is_hidden()


def test_a_key_is_asked_for_and_kept_in_memory(open_page):
    def guarded(route):
        if route.request.headers.get("authorization") == "Bearer open sesame":
            route.continue_()
        else:
            refuse(401, "invalid_api_key", "no key")(route)

    page = open_page(expects=("401",), replies={"v1/**": guarded})
    page.fill("#key", "open barley")
    page.keyboard.press("Enter")
    page.get_by_text("does not know this key").wait_for()
    page.fill("#key", "open sesame")
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer")
    assert page.locator("#access").is_hidden()
    assert page.evaluate("JSON.stringify({...localStorage, ...sessionStorage}) + document.cookie") == "{}"


WORST_CONTRAST = """() => {
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const behind = e => {
    const layers = [];
    for (; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    const over = (under, [r, g, b, a]) => under.map((u, i) => u + ([r, g, b][i] - u) * a);
    return layers.reverse().reduce(over, [255, 255, 255]);
  };
  const worst = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.matches(":disabled, .skip, .visually-hidden, option, script")) continue;
    const [a, b] = [luminance(parse(getComputedStyle(e).color)), luminance(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    worst.push([ratio, e.tagName + "." + e.className, e.textContent.slice(0, 30)]);
  }
  return worst.sort((x, y) => x[0] - y[0])[0];
}"""


def test_it_reads_well_in_both_colours_and_at_all_widths(open_page):
    page = open_page(color_scheme="dark")
    page.click("#compare")
    ask(page, sides="ab")
    page.locator(".answer.b .w").nth(1).click()
    until(page, "document.getElementById('said').textContent.includes(' looked ')")
    theme = "document.documentElement.dataset.theme"
    assert page.evaluate(theme) == "dark"
    for colours in ("dark", "light"):
        assert page.evaluate(theme) == colours
        for width in (1400, 768, 360):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") == width
            ratio, *where = page.evaluate(WORST_CONTRAST)
            assert ratio >= 4.5, (colours, width, where)
        page.click("#theme")
    page.click("#theme")
    assert page.evaluate(theme) == "light"
    page.reload()
    assert page.evaluate(theme) == "light"  # remembered, against the system's dark
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea')].filter(e => e.checkVisibility() &&"
        " !(e.ariaLabel || e.labels?.length || e.textContent.trim() || e.getAttribute('aria-labelledby')))"
        ".map(e => e.outerHTML)"
    )
    assert unnamed == []
