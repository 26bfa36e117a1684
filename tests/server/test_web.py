"""The web chat and the trace page, in a real Chromium against a real server with scripted answers."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from abyssal.chat.api import Accepted, Completion, Continued, PromptUse
from abyssal.encoding.literals import ASSISTANT, DSML, USER
from abyssal.server.app import WEB
from abyssal.server.settings import Settings, keys
from tests.server.serving import Scripted, serving

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--disable-component-update", "--disable-sync", "--disable-quic",
]  # fmt: skip
THOUGHT = "This needs arithmetic."
MARKDOWN = """## A *small* answer

1. one **bold**
   - nested `code`
2. two

| layer | reads |
|:--|--:|
| CSA | 512 |

```python
print("<hi>")
```

> quoted, see [the paper](https://example.org/a) or [not this](javascript:alert(1))"""


def call_of(name: str, **arguments: str) -> str:
    """A call as the model writes it."""
    parameters = "\n".join(
        f'<{DSML}parameter name="{key}" string="true">{value}</{DSML}parameter>' for key, value in arguments.items()
    )
    return f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="{name}">\n{parameters}\n</{DSML}invoke>\n</{DSML}tool_calls>'


def script(prompt: str) -> str:
    """Call the tool that is there, then say what it returned; echo the question otherwise."""
    thought = f"{THOUGHT}</think>" if prompt.endswith("<think>") else ""
    turn = prompt.rsplit(USER, 1)[1].removesuffix("<think>").removesuffix("</think>").removesuffix(ASSISTANT)
    if "<tool_result>" in turn:
        return thought + "It is " + turn.rsplit("<tool_result>", 1)[1].split("</tool_result>")[0] + "."
    if '"calculator"' in prompt:
        return thought + "I compute." + call_of("calculator", expression="2 * (3 + 4) ^ 2")
    if '"get_weather"' in prompt:
        return thought + call_of("get_weather", city="Oslo")
    return thought + ("" if "nothing" in turn else MARKDOWN if "markdown" in turn else f"You said: {turn}")


class Traced(Scripted):
    """Scripted answers whose tokens come with probabilities and chosen blocks."""

    async def complete(self, completion: Completion) -> AsyncIterator[Accepted | PromptUse | Continued]:
        at = 0
        async for part in super().complete(completion):
            if isinstance(part, Continued) and part.info is not None:
                p = 0.25 if at % 2 else 0.5
                top = sorted([(ord("X"), math.log(0.6 - p)), (part.info.token, math.log(p))], key=lambda pair: -pair[1])
                info = replace(part.info, logprob=math.log(p), top=tuple(top), blocks=((0, 2, 5), (1, at % 3)))
                part, at = replace(part, info=info), at + 1
            yield part


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.fail(f"{CHROMIUM} is missing: apt-get install chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(Traced(script)) as address:
        yield address


class Tabs:
    """Opens pages that remember what they should not have done."""

    def __init__(self, browser: Browser):
        self.browser = browser
        self.stack = ExitStack()
        self.faults: list[str] = []

    def serve(self, completer: Scripted, settings: Settings | None = None) -> str:
        """The URL of a server of the test's own, which outlives the pages opened after it."""
        return self.stack.enter_context(serving(completer, settings))

    def open(self, url: str, path: str = "/", *, ready: bool = True, before: str = "", **options: Any) -> Page:
        """A page of its own storage; `before` is run in it before its scripts."""
        context = self.browser.new_context(**{"viewport": {"width": 1200, "height": 800}} | options)
        self.stack.callback(context.close)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("console", lambda message: self._said(message.type, message.text))
        page.on("request", lambda r: None if r.url.startswith(f"{url}/") else self.faults.append(r.url))
        page.on("response", lambda r: self.faults.append(r.url) if "/web/" in r.url and r.status >= 400 else None)
        if before:
            page.add_init_script(before)
        page.goto(url + path)
        if ready and path == "/":
            expect(page.locator("#model")).to_have_text("nano")
        return page

    def _said(self, kind: str, text: str) -> None:
        # a refusal of the API shows up as an error of the console, whatever the page makes of it
        if kind in ("error", "warning") and not text.startswith("Failed to load resource"):
            self.faults.append(f"{kind}: {text}")


@pytest.fixture
def tabs(browser: Browser) -> Iterator[Tabs]:
    opened = Tabs(browser)
    with opened.stack:
        yield opened
        assert opened.faults == []


def ask(page: Page, text: str) -> Locator:
    """Send a message and wait for the end of its answer."""
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")
    expect(page.locator(".user").last).to_contain_text(text)
    return finished(page)


def finished(page: Page) -> Locator:
    """The last answer, once it is over."""
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    expect(page.locator(".answer").last.locator(".foot")).to_be_visible()
    return page.locator(".answer").last


def use_tool(page: Page, name: str) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label(name).check()
    page.keyboard.press("Escape")


def test_thinking_and_a_tool_that_runs_in_the_browser(tabs: Tabs) -> None:
    completer = Traced(script)
    url = tabs.serve(completer)
    page = tabs.open(url)
    use_tool(page, "Calculator")
    last = ask(page, "What is twice the square of seven?")
    expect(last.locator(".prose")).to_have_text("It is 98.")
    first = page.locator(".answer").first
    thinking = first.locator("details")
    expect(thinking.locator("summary")).to_contain_text(re.compile(r"Thought for .* s, \d+ tokens"))
    assert thinking.get_attribute("open") is None
    thinking.locator("summary").click()
    expect(thinking.get_by_text(THOUGHT)).to_be_visible()
    card = page.get_by_role("region", name="Call of calculator")
    expect(card.locator(".badge")).to_have_text("done")
    assert json.loads(card.get_by_label("Arguments").inner_text()) == {"expression": "2 * (3 + 4) ^ 2"}
    expect(card.get_by_label("Result")).to_have_text("98")

    # what the second request carried back
    assert THOUGHT in completer.prompts[1] and "2 * (3 + 4) ^ 2" in completer.prompts[1]
    assert "<tool_result>98</tool_result>" in completer.prompts[1]

    tokens = len(completer.prompts[1])
    expect(page.locator("#context-now")).to_contain_text(f"{tokens // 2:,} cached")
    expect(page.locator("#context-now")).to_contain_text("of 1,048,576 tokens")
    page.locator("#context-now").click()
    assert page.get_by_role("row").count() == 3  # the head and two requests
    expect(last.get_by_role("link", name="Trace of this answer")).to_be_visible()
    assert page.locator("#announcer").inner_text() == "Answer: It is 98."


def test_thinking_is_open_until_the_content_begins_and_stop_keeps_what_came(tabs: Tabs) -> None:
    completer = Scripted(lambda prompt: "I think about it.</think>" + "word " * 400, pause=0.02)
    url = tabs.serve(completer)
    page = tabs.open(url)
    page.get_by_label("Your message").fill("go")
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.locator("details[open] .thoughts")).to_contain_text("I think")
    expect(page.locator(".prose")).to_contain_text("word word")
    expect(page.locator("details:not([open])")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.")
    kept = page.locator(".prose").inner_text()
    assert kept.startswith("word word") and len(kept) < 1500
    page.wait_for_timeout(100)
    assert page.locator(".prose").inner_text() == kept
    deadline = time.monotonic() + 5
    while completer.active and time.monotonic() < deadline:
        page.wait_for_timeout(20)
    assert completer.active == 0
    page.reload()
    expect(page.locator(".prose")).to_have_text(kept)

    # an answer goes on while another conversation is shown
    page.get_by_label("Your message").fill("again")
    page.keyboard.press("Enter")
    expect(page.locator(".answer")).to_have_count(2)
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#conversations .pulse")).to_have_count(1)
    page.get_by_role("button", name=re.compile("^go")).click()
    expect(page.locator(".answer").last.locator(".prose")).to_contain_text("word word")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".note")).to_have_count(2)


def test_conversations_survive_a_reload_and_are_renamed_and_deleted(url: str, tabs: Tabs) -> None:
    page = tabs.open(url)
    ask(page, "first question")
    page.get_by_role("button", name="New conversation").click()
    ask(page, "second question")
    page.reload()
    expect(page.locator(".prose")).to_have_text("You said: second question")
    titles = page.locator("#conversations .choose")
    expect(titles).to_have_text(["second question", "first question"])
    titles.last.click()
    expect(page.locator(".prose")).to_have_text("You said: first question")
    expect(page.get_by_role("heading", level=1)).to_have_text("first question")

    titles.first.hover()
    page.get_by_role("button", name="Rename second question").click()
    page.get_by_label("New title").fill("renamed")
    page.keyboard.press("Enter")
    expect(titles).to_have_text(["renamed", "first question"])
    titles.last.hover()
    page.get_by_role("button", name="Delete first question").click()
    expect(titles).to_have_text(["renamed"])
    expect(page.locator(".prose")).to_have_text("You said: second question")
    page.get_by_role("button", name="Undo").click()
    expect(titles).to_have_text(["renamed", "first question"])
    page.reload()
    expect(titles).to_have_text(["renamed", "first question"])

    other = page.context.new_page()  # another tab of the same browser
    other.goto(url)
    ask(other, "on from there")
    expect(page.locator(".prose").last).to_have_text("You said: on from there")
    other.get_by_role("button", name="New conversation").click()
    ask(other, "third question")
    expect(titles).to_have_text(["third question", "renamed", "first question"])


def test_answer_again_and_edit(tabs: Tabs) -> None:
    answers = iter(["one", "two", "three", "four"])
    completer = Scripted(lambda prompt: "</think>" + next(answers))
    url = tabs.serve(completer)
    page = tabs.open(url)
    ask(page, "hello")
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".prose")).to_have_text(["two"])
    ask(page, "more")
    expect(page.locator(".prose")).to_have_text(["two", "three"])
    page.get_by_role("article").filter(has_text="hello").hover()
    page.get_by_role("button", name="Edit this message").first.click()
    page.get_by_label("Edit your message").fill("goodbye")
    page.keyboard.press("Enter")
    expect(page.locator(".prose")).to_have_text(["four"])
    expect(page.locator(".bubble")).to_have_text(["goodbye"])
    expect(page.get_by_role("heading", level=1)).to_have_text("goodbye")
    assert "hello" not in completer.prompts[-1] and "goodbye" in completer.prompts[-1]


def test_the_result_of_an_own_tool_is_typed_by_hand(url: str, tabs: Tabs) -> None:
    page = tabs.open(url)
    page.get_by_role("button", name="Settings").click()
    own = page.get_by_label("Your own tools")
    own.fill('[{"type": "function"}]')
    expect(page.locator("#custom-problem")).to_contain_text("Tool 1 is not of the form")
    page.keyboard.press("Escape")
    page.get_by_label("Your message").fill("Is it raining?")
    page.keyboard.press("Enter")  # the sheet opens at what is wrong
    own.fill('[{"type": "function", "function": {"name": "get_weather"}}]')
    expect(page.locator("#custom-problem")).to_be_hidden()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#waiting")).to_contain_text("1 call above waits for your result.")
    page.reload()
    page.get_by_label("Result of get_weather").fill("rain <b>&amp;</b> wind")
    page.get_by_role("button", name="Give the result").click()
    expect(page.locator(".prose").last).to_have_text("It is rain <b>&amp;</b> wind.")
    expect(page.locator("#waiting")).to_be_hidden()


def test_keyboard_alone(tabs: Tabs) -> None:
    completer = Scripted(script)
    url = tabs.serve(completer)
    page = tabs.open(url)

    def tab_to(name: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            focused = page.evaluate("""() => {
                const at = document.activeElement;
                return at.ariaLabel || at.labels?.[0]?.textContent || at.value || at.textContent.trim();
            }""")
            if focused.startswith(name):
                return
        pytest.fail(f"Tab does not reach {name}")

    page.keyboard.type("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    page.keyboard.press("Enter")
    finished(page)
    expect(page.locator(".bubble")).to_have_text("line one\nline two")
    tab_to("high")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_label("Non-think")).to_be_checked()
    tab_to("Settings")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    tab_to("System prompt")
    page.keyboard.type("Be brief.")
    tab_to("Calculator")
    page.keyboard.press("Space")
    page.keyboard.press("Escape")
    tab_to("Skip to the message box")
    page.keyboard.press("Enter")
    tab_to("Answer again")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator(".prose").last).to_have_text("It is 98.")
    assert "Be brief." in completer.prompts[-1] and completer.prompts[-1].endswith(f"{ASSISTANT}</think>")
    tab_to("Edit this message")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Edit this message")).to_be_focused()


def test_html_stays_text_and_markdown_becomes_elements(url: str, tabs: Tabs) -> None:
    page = tabs.open(url)
    attack = '<img src=x onerror="window.hit=1"><script>window.hit=1</script><b>bold</b>'
    answer = ask(page, attack)
    expect(page.locator(".bubble")).to_have_text(attack)
    expect(answer.locator(".prose")).to_have_text(f"You said: {attack}")
    assert page.locator(".message :is(img, script, b)").count() == 0
    assert page.evaluate("window.hit") is None

    prose = ask(page, "markdown please").locator(".prose")
    expect(prose.locator("h4 em")).to_have_text("small")
    expect(prose.locator("ol > li")).to_have_count(2)
    expect(prose.locator("ol > li > ul > li > code")).to_have_text("code")
    expect(prose.locator("td.to-end")).to_have_text("512")
    expect(prose.locator("figure pre")).to_have_text('print("<hi>")')
    expect(prose.get_by_role("link")).to_have_count(1)
    assert prose.get_by_role("link").get_attribute("rel") == "noopener noreferrer"
    expect(prose.locator("blockquote")).to_contain_text("[not this](javascript:alert(1))")


def test_markdown_of_any_text_is_whole_and_ends(url: str, tabs: Tabs) -> None:
    page = tabs.open(url)
    broken, lost = page.evaluate("""async () => {
        const { Prose } = await import('/web/markdown.js');
        const bits = ['*', '**', '_', '`', '```\\n', '[a](https://b.c)', '[', '](', '\\n', '\\n\\n', '  - x', '1. y',
            '> ', '# h', '|a|b|', '\\n|-|-|\\n', 'word ', '\\\\', '<i>', '~~', 'https://x.y/(z)', '    '];
        let seed = 7;
        const next = (n) => (seed = (seed * 1103515245 + 12345) % 2147483648) % n;
        const broken = [];
        for (let i = 0; i < 400; i++) {
            const text = Array.from({ length: 1 + next(30) }, () => bits[next(bits.length)]).join('');
            const whole = new Prose();
            const grown = new Prose();
            whole.show(text);
            for (let end = 1; end <= text.length; end += 1 + next(9)) grown.show(text.slice(0, end));
            grown.show(text);
            const words = (s) => (s.match(/word/g) ?? []).length;
            const lost = words(whole.el.textContent) !== words(text) && !/\\|-\\|/.test(text);
            if (whole.el.innerHTML !== grown.el.innerHTML || lost || whole.el.querySelector('i')) broken.push(text);
        }
        const many = ['*a ', '**', '[', '[a](', '`', '> ', '- ', '_a', '|', '~~~\\n', '  ', '# ', '\\\\', '1. a\\n '];
        const lost = many.filter((bit) => {
            const prose = new Prose();
            prose.show(bit.repeat(10000) + '\\n\\nthe end');  // never, where an expression backtracks
            return !prose.el.textContent.includes('the end');
        });
        return [broken, lost];
    }""")
    assert broken == [] and lost == []


def test_the_calculator_computes_and_refuses(url: str, tabs: Tabs) -> None:
    page = tabs.open(url)
    wanted = {
        "1 + 2 * 3": "7", "0.1 + 0.2": "0.3", "-2^2": "-4", "2**3**2": "512", "2^-1": "0.5", "7 % 4": "3", "5!": "120",
        "sqrt(2)^2": "2", "max(1, 2, 3) - min(4, 5)": "-1", "round(pi * 100) / 100": "3.14", "(1 + 2) * -3": "-9",
        "1e3 / 8": "125", "1 / 0": None, "2 +": None, "alert(1)": None, "constructor": None, "(" * 999 + "1": None,
        "1 2": None, "": None, "[1]": None, "-" * 9999 + "1": "-1",
    }  # fmt: skip
    found = page.evaluate(
        """async (texts) => {
            const { calculate } = await import('/web/calculator.js');
            return texts.map((text) => { try { return calculate(text); } catch (e) { return e.stack ? null : e; } });
        }""",
        list(wanted),
    )
    assert dict(zip(wanted, found, strict=True)) == wanted


def test_light_and_dark(url: str, tabs: Tabs) -> None:
    def colours(page: Page) -> list[str]:
        return page.evaluate("[...document.querySelectorAll('body, h1, button')].map((e) => getComputedStyle(e).color)"
                             ".concat(getComputedStyle(document.body).backgroundColor)")  # fmt: skip

    for path in ("/", "/trace"):
        page = tabs.open(url, path, color_scheme="light")
        light = colours(page)
        page.emulate_media(color_scheme="dark")
        dark = colours(page)
        assert dark[0] != light[0] and dark[-1] != light[-1]
        page.emulate_media(color_scheme="light")
        page.get_by_role("button", name="Switch to the dark theme").click()
        page.mouse.move(0, 0)
        expect(page.locator("html")).to_have_attribute("data-theme", "dark")
        page.reload()
        expect(page.get_by_role("button", name="Switch to the light theme")).to_be_visible()
        assert colours(page)[0] == dark[0] and colours(page)[-1] == dark[-1]


def test_phone_width(url: str, tabs: Tabs) -> None:
    page = tabs.open(url, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    ask(page, "markdown " * 20)
    for path in ("/", "/trace"):
        page.goto(url + path)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.goto(url)
    expect(page.get_by_role("button", name="New conversation")).to_be_hidden()
    page.get_by_role("button", name="Conversations", exact=True).click()
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_role("button", name="New conversation")).to_be_hidden()
    expect(page.locator(".message")).to_have_count(0)


def test_the_bottom_is_followed_until_the_reader_scrolls_up(tabs: Tabs) -> None:
    url = tabs.serve(Scripted(lambda prompt: "</think>" + "line\n\n" * 300, pause=0.004))
    page = tabs.open(url)
    page.get_by_label("Your message").fill("go")
    page.keyboard.press("Enter")
    log = page.locator("#log")
    left = "(e) => e.scrollHeight - e.scrollTop - e.clientHeight"
    expect(page.locator(".prose p").nth(60)).to_be_attached()
    assert log.evaluate(left) < 60
    log.hover()
    page.mouse.wheel(0, -5)
    page.wait_for_timeout(200)
    assert log.evaluate(left) > 5
    page.mouse.wheel(0, -300)
    expect(page.get_by_role("button", name="Latest")).to_be_visible()
    page.wait_for_timeout(200)
    assert log.evaluate(left) > 200
    page.get_by_role("button", name="Latest").click()
    page.wait_for_timeout(200)
    assert log.evaluate(left) < 60
    page.keyboard.press("Escape")


def test_an_api_key_is_asked_for_and_forgotten_with_the_tab(tabs: Tabs) -> None:
    url = tabs.serve(Scripted(script), Settings(api_keys=keys(["s3cret"])))
    page = tabs.open(url, ready=False)
    page.get_by_label("Key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("missing or wrong")
    page.get_by_label("Key", exact=True).fill("s3cret")
    page.get_by_role("button", name="Use it").click()
    expect(page.locator("#model")).to_have_text("nano")
    ask(page, "hello")
    assert "s3cret" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    expect(page.locator("#model")).to_have_text("nano")


def test_refusals_and_broken_connections_are_shown(tabs: Tabs) -> None:
    url = tabs.serve(Scripted(script, context=200))
    page = tabs.open(url)

    def answered_with(events: str) -> None:
        page.unroute_all()
        headers = {"content-type": "text/event-stream", "x-abyssal-notes": "one, two", "x-abyssal-repaired": "three"}
        page.route("**/completions", lambda route: route.fulfill(body=events, headers=headers))

    ask(page, "long " * 100)
    expect(page.locator(".note.failed")).to_contain_text("the context holds 200")
    page.get_by_role("button", name="New conversation").click()
    answered_with('data: {"choices": [{"delta": {"content": "half"}}]}\r\n\r\n: keep-alive\n\n')
    ask(page, "cut off")
    expect(page.locator(".prose")).to_have_text("half")
    expect(page.locator(".foot-note")).to_have_text(["one", "two", "repaired: three"])
    expect(page.locator(".note.failed")).to_have_text("The connection ended before the answer did")
    answered_with('data: {"error": {"message": "out of memory"}}\n\n')
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".note.failed")).to_have_text("out of memory")
    page.unroute_all()
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".prose")).to_have_text("You said: cut off")


def test_corrupt_and_full_storage(url: str, tabs: Tabs) -> None:
    rubbish = {
        "abyssal.chat.a": "{", "abyssal.chat.b": "[]", "abyssal.settings": '{"tools": 3, "temperature": "x"}',
        "abyssal.current": "nowhere", "abyssal.theme": "plaid",
        "abyssal.chat.c": json.dumps({"id": "c", "title": 3, "messages": [
            None, {"role": "user", "content": "kept"}, {"role": "assistant", "content": 7, "calls": [{}, None]}]}),
    }  # fmt: skip
    page = tabs.open(url, before=f"Object.assign(localStorage, {json.dumps(rubbish)})")
    expect(page.get_by_role("status")).to_contain_text("Could not read 2 stored conversations")
    page.get_by_role("button", name="Untitled").first.click()
    expect(page.locator(".bubble")).to_have_text("kept")
    ask(page, "and on")

    full = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };"
    page = tabs.open(url, before=full)
    expect(ask(page, "hello").locator(".prose")).to_have_text("You said: hello")
    expect(page.get_by_role("status")).to_contain_text("storage is full")

    closed = "Object.defineProperty(window, '{}', {{ get() {{ throw new DOMException('no', 'SecurityError'); }} }});"
    page = tabs.open(url, before=closed.format("localStorage") + closed.format("sessionStorage"))
    expect(ask(page, "hello").locator(".prose")).to_have_text("You said: hello")


def test_a_trace_token_by_token(tabs: Tabs) -> None:
    completer = Traced(script)
    url = tabs.serve(completer)
    page = tabs.open(url, "/trace")
    expect(page.locator("#message")).to_contain_text("No request is kept yet")
    page.get_by_role("link", name="Chat").click()
    expect(page.locator("#model")).to_have_text("nano")
    ask(page, "hello there")
    page.get_by_role("link", name="Trace of this answer").click()
    prompt = completer.prompts[0]
    answer = f"{THOUGHT}</think>You said: hello there"

    chips = page.get_by_role("listbox", name="Prompt tokens").get_by_role("option")
    expect(chips).to_have_count(len(prompt))
    expect(page.locator("#prompt .cached")).to_have_count(len(prompt) // 2)
    expect(page.locator("#facts")).to_contain_text("/v1/chat/completions")
    sampled = page.get_by_role("listbox", name="Sampled tokens").get_by_role("option")
    assert "".join(sampled.all_inner_texts()).startswith(answer.replace(" ", "·"))
    panel = page.get_by_role("complementary", name="Selected token")
    expect(panel).to_contain_text("50.0% likely, choice 1")
    page.keyboard.press("ArrowRight")
    expect(sampled.nth(1)).to_have_attribute("aria-selected", "true")
    expect(panel).to_contain_text("25.0% likely, choice 2")
    expect(panel.get_by_role("listitem")).to_have_text(["X35.0%", "h25.0%", "all others40.0%"])
    shades = [sampled.nth(i).evaluate("(e) => getComputedStyle(e).backgroundColor") for i in range(3)]
    assert shades[0] == shades[2] != shades[1]

    # blocks 0, 2 and 5 of the first layer, then those of the second
    def lit() -> list[int]:
        return [int(str(chip.get_attribute("data-position"))) for chip in page.locator(".flow .chip.lit").all()]

    assert lit() == [*range(4), *range(8, 12), *range(20, 24)]
    expect(page.locator("#blocks-words")).to_contain_text("CSA layer 0 read 3 of the")
    page.get_by_label("Layer").select_option("1")
    assert lit() == [*range(4, 8)]
    page.locator("#strip").click(position={"x": 40, "y": 20})
    expect(page.get_by_label("Layer")).to_have_value("0")
    expect(panel).to_contain_text("Prompt token")
    page.keyboard.press("End")
    expect(chips.last).to_have_attribute("aria-selected", "true")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    chips.nth(3).hover()
    expect(page.get_by_role("tooltip")).to_have_text(f"position 3, id {ord(prompt[3])}")
    page.goto(f"{url}/trace?id=req_nothing")
    expect(page.locator("#message")).to_contain_text("keeps no trace req_nothing")
    page.get_by_role("navigation").get_by_role("link").first.click()
    expect(sampled.first).to_be_visible()


def test_a_trace_of_20000_tokens_is_folded(tabs: Tabs) -> None:
    url = tabs.serve(Traced(lambda prompt: "</think>yes"))
    page = tabs.open(url)
    ask(page, "long text " * 2000)
    page.get_by_role("link", name="Trace of this answer").click()
    chips = page.locator("#prompt .chip")
    expect(chips.first).to_be_visible()
    assert 2000 <= chips.count() <= 3000
    page.get_by_role("button", name="Show the first 2,000 of them").click()
    assert 4000 <= chips.count() <= 5000
    page.locator("#strip").click(position={"x": 600, "y": 20})  # a block in the fold
    expect(page.locator("#prompt [aria-selected=true]")).to_be_in_viewport()


def test_pages_need_nothing_but_this_folder(url: str) -> None:
    for path in ("/", "/trace"):
        with urlopen(url + path) as response:
            page = response.read().decode()
            assert "default-src 'self'" in response.headers["Content-Security-Policy"]
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|//", page)
    for file in WEB.iterdir():
        text = file.read_text()
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), file.name
        hosts = set(re.findall(r"https?://[\w.]+", text)) - {"http://www.w3.org"}
        assert hosts == set(), file.name
