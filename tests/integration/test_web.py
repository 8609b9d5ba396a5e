"""The web pages as a person has them: a real Chromium, the real service with its toy trainer and toy answers, real HTTP between.

One walk goes the whole way from a key to a bill; the other tests look at what must hold on every page: colours that can be read,
no scrolling sideways on a phone, words of others never run as code, failures that say what to do.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from answer_parts import place_with, worker
from kivnun.jobs.place import Place
from kivnun.jobs.toy import ToySpec
from kivnun.service import clerk
from kivnun.service.judging import JudgeFiles
from kivnun.service.validating import ValidateJobs
from service_parts import KEY, OTHER_KEY, api, service_at
from toy_jobs import queue_job, worker_thread

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
ARGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-gpu"]
CONFIG = """
version: 1
currency: EUR
bases: {toy: {trainer: toy, price: {training: 3.0, prompt: 0.2, completion: 0.8}}, other: {trainer: toy}}
limits: {requests_per_minute: 100000}
"""
CANARY = "<img src=x onerror=window.caught=1>"
SUPERVISED = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 60}}}
PAGES = ("catalogue", "data", "tune", "jobs", "playground", "keys")
WAIT_MS = 20_000


def chats(rows: int) -> str:
    """Return a file of chats in Hebrew."""
    line = {"messages": [{"role": "user", "content": "מה השעה?"}, {"role": "assistant", "content": "השעה שבע."}]}
    return "".join(
        json.dumps({"messages": [*line["messages"][:1], {"role": "assistant", "content": f"השעה {n}."}]}, ensure_ascii=False) + "\n"
        for n in range(rows)
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place_with(tmp_path_factory.mktemp("web"), CONFIG)


@pytest.fixture(scope="module")
def url(place: Place) -> Iterator[str]:
    """Run all parts of a service; give its address."""
    stop = threading.Event()
    desk = threading.Thread(
        target=clerk.run, args=(place, stop), kwargs={"makers": {"judge_files": JudgeFiles, "validate_jobs": ValidateJobs}}
    )
    desk.start()
    try:
        with worker_thread(place), worker(place, "toy"), api(service_at(place, place.service_config())) as address:
            yield address
    finally:
        stop.set()
        desk.join(30)


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{CHROMIUM} is missing: the pages cannot be looked at")
        pytest.skip(f"no Chromium at {CHROMIUM}; set CHROMIUM to look at the pages")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGS)
        yield started
        started.close()


@dataclass
class Seen:
    """A tab, what its console said and which hosts it asked."""

    page: object
    said: list[str] = field(default_factory=list[str])
    hosts: set[str] = field(default_factory=set[str])


@pytest.fixture
def tab(browser, url: str) -> Iterator[Seen]:
    """Open a tab; at its end nothing was wrong in its console and no other host was asked."""
    seen = opened(browser, width=1440, theme="light")
    yield seen
    seen.page.context.close()
    assert seen.said == []
    assert seen.hosts <= {urlsplit(url).netloc, ""}, "the pages ask nobody but the service"


def opened(browser, width: int, theme: str) -> Seen:
    phone = {"is_mobile": width < 700, "has_touch": width < 700}
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, reduced_motion="reduce", **phone)
    context.set_default_timeout(WAIT_MS)
    seen = Seen(context.new_page())
    seen.page.on("console", lambda message: seen.said.append(message.text) if message.type in ("error", "warning") else None)
    seen.page.on("pageerror", lambda error: seen.said.append(str(error)))
    seen.page.on("request", lambda request: seen.hosts.add(urlsplit(request.url).netloc))
    return seen


def sign_in(page, url: str, key: str = KEY) -> None:
    page.goto(url)
    page.get_by_label("API key").fill(key)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Catalogue").wait_for()


def upload(page, name: str, text: str) -> None:
    page.locator("#file-chosen").set_input_files([{"name": name, "mimeType": "application/jsonl", "buffer": text.encode()}])


def test_a_person_goes_from_a_key_to_a_tuned_model_and_its_bill(tab: Seen, url: str) -> None:
    page = tab.page
    page.goto(url)
    # By keyboard alone: the field has the focus, a wrong key is told where it was typed, a good one opens the catalogue.
    page.get_by_label("API key").wait_for()
    page.keyboard.type("sk-kivnun-not-a-key")
    page.keyboard.press("Enter")
    page.get_by_text("The service does not know this key").wait_for()
    assert page.evaluate("document.activeElement.name") == "key"
    tab.said.clear()  # Chromium itself notes the 401.
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="toy", exact=True).wait_for()
    page.get_by_text("€3.00").wait_for()
    page.get_by_text("Phi-3-small-8k").wait_for()

    # A file with a broken line: its report shows the line.
    page.get_by_role("link", name="Next: your data").click()
    lines = chats(12).splitlines(keepends=True)
    upload(page, f"{CANARY}.jsonl", "".join([*lines[:4], '{"messages": [{"role": "user"}]}\n', *lines[5:]]))
    page.get_by_text("Has problems").wait_for()
    page.get_by_role("link", name=CANARY).click()
    problems = page.get_by_role("table", name="Problems by line")
    assert problems.locator("tbody tr").first.locator("td").first.inner_text() == "5"

    # A good one.
    page.get_by_role("link", name="← Data").click()
    upload(page, "שיחות.jsonl", chats(12))
    page.get_by_role("link", name="שיחות").click()
    page.get_by_text("Nothing is wrong with this file").wait_for()
    page.get_by_role("link", name="Use for training").click()

    # The plan before the job; parameters that change after it take it back.
    page.get_by_label("Suffix").fill("לילה-night")
    page.get_by_label("Epochs").fill("four")
    page.get_by_role("button", name="Check the plan").click()
    page.get_by_text("four is no number").wait_for()
    page.get_by_label("Epochs").fill("4")
    page.get_by_role("button", name="Check the plan").click()
    page.get_by_text("It fits").wait_for()
    page.get_by_label("Epochs").fill("3")
    assert page.get_by_role("button", name="Start the job").is_hidden()
    page.get_by_role("button", name="Check the plan").click()
    page.get_by_text("It fits").wait_for()
    trained = page.locator(".plan dl.tiles dd").nth(2).inner_text()
    page.keyboard.press("Enter")  # "Start the job" has the focus.

    # The job: curves, events, the model.
    page.locator(".outcome .notice").wait_for()
    assert page.locator(".outcome .title").inner_text() == "The model is ready"
    page.locator(".curve path.plot").first.wait_for()
    assert page.get_by_role("log").locator("li").filter(has_text="training loss=").count() >= 3
    page.get_by_role("button", name="Example by example").click()
    page.get_by_role("button", name="Trained 12").wait_for()
    page.get_by_role("link", name="Try the model").click()

    # Both models answer, the tuned one by its adapter; Hebrew stands right.
    page.locator(".samples button").nth(1).click()
    page.keyboard.press("Enter")
    page.locator(".pane.tuned .hash").wait_for()
    assert page.locator(".pane.base .bubble.assistant").count() == 1
    assert page.locator(".pane.tuned .bubble.user .said").evaluate("e => getComputedStyle(e).direction") == "rtl"

    # A key, shown once; and what was used.
    page.get_by_role("link", name="Next: keys and usage").click()
    page.get_by_role("button", name="New key").click()
    page.get_by_label("Name").fill("the walk")
    page.keyboard.press("Enter")
    made = page.locator("dialog .copyable code").inner_text()
    assert httpx.get(f"{url}/v1/x_me", headers={"Authorization": f"Bearer {made}"}).json()["key"]["name"] == "the walk"
    page.get_by_role("button", name="I have copied it").click()
    assert made not in page.content()
    page.get_by_role("button", name="Revoke the walk").click()
    page.get_by_role("button", name="Revoke the key").click()
    page.get_by_text("Revoked").wait_for()
    usage = page.get_by_role("table", name="Usage by model").locator("tbody tr").filter(has_text=re.compile("^toy|ft:toy"))
    assert trained in "".join(usage.all_inner_texts())
    assert page.evaluate("window.caught") is None


def test_a_job_is_watched_paused_resumed_and_cancelled(tab: Seen, url: str, place: Place) -> None:
    job = queue_job(place, spec=ToySpec(seed=3, epochs=60, batch_rows=4, step_ms=50), suffix="slow", method=SUPERVISED)
    page = tab.page
    sign_in(page, url)
    page.goto(f"{url}/#/jobs")
    page.locator(f"[data-job='{job}']").click()
    line = page.locator(".curve path.plot").first
    line.wait_for()
    before = line.get_attribute("d")
    page.wait_for_timeout(1200)
    assert line.get_attribute("d") != before, "the curve grows by itself"
    steps = page.get_by_role("log").locator("li", has_text="training loss=").all_inner_texts()
    numbers = [int(found[1]) for text in steps if (found := re.search(r"Step (\d+)/", text))]
    assert numbers == list(range(numbers[0], 0, -1)), "newest first, none missing, none twice"
    page.get_by_role("button", name="Pause").press("Enter")
    page.locator(".chip", has_text="Paused").wait_for()
    page.get_by_role("button", name="Resume").press("Enter")
    page.locator(".chip", has_text="Training").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Keep it").click()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel the job").click()
    page.get_by_text("The job was cancelled").wait_for()
    assert page.get_by_role("link", name="Plan it again").is_visible()


def test_a_big_file_goes_in_parts_and_a_part_that_is_lost_is_sent_again(tab: Seen, url: str) -> None:
    page = tab.page
    script = httpx.get(f"{url}/js/upload.js").text.replace("PART_BYTES = 64 * 1024 * 1024", "PART_BYTES = 512")
    page.route("**/js/upload.js", lambda route: route.fulfill(body=script, content_type="text/javascript"))
    lost = ["the second part"]
    parts: list[str] = []

    def sent(route) -> None:
        parts.append(route.request.url)
        if len(parts) == 2 and lost:
            lost.clear()
            route.abort()
        else:
            route.continue_()

    page.route("**/parts", sent)
    sign_in(page, url)
    page.goto(f"{url}/#/data")
    text = chats(15)
    upload(page, "big.jsonl", text)
    page.get_by_role("link", name="big.jsonl").click()
    page.get_by_text("15 rows can be trained on").wait_for()
    assert len(parts) == -(-len(text.encode()) // 512) + 1
    assert tab.said.pop().endswith("ERR_FAILED"), "Chromium notes the part that was lost"


def test_words_of_others_never_run_and_the_policy_would_stop_them(tab: Seen, url: str) -> None:
    page = tab.page
    sign_in(page, url)
    answer = {"choices": [{"index": 0, "delta": {"content": CANARY}, "finish_reason": "stop"}]}
    body = f"data: {json.dumps(answer)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    event = {"id": "ftevent-1", "created_at": 1, "level": "warn", "type": "message", "message": CANARY, "data": {}}
    job = {
        "id": "ftjob-1", "created_at": 1, "finished_at": 2, "status": "failed", "model": CANARY, "user_provided_suffix": CANARY,
        "training_file": CANARY, "result_files": [], "seed": 1, "error": {"code": CANARY, "message": CANARY, "param": None},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {CANARY: CANARY}}},
    }  # fmt: skip
    page.route("**/v1/fine_tuning/jobs/ftjob-1", lambda route: route.fulfill(json=job))
    page.route("**/v1/fine_tuning/jobs/ftjob-1/events*", lambda route: route.fulfill(json={"data": [event], "has_more": False}))
    page.route("**/v1/fine_tuning/jobs/ftjob-1/checkpoints*", lambda route: route.fulfill(json={"data": [], "has_more": False}))
    page.goto(f"{url}/#/playground")
    page.get_by_label("Your question").fill(CANARY)
    page.keyboard.press("Enter")
    page.locator(".bubble.assistant", has_text=CANARY).first.wait_for()
    page.goto(f"{url}/#/jobs/ftjob-1")
    page.get_by_role("log").get_by_text(CANARY).wait_for()
    assert page.evaluate("window.caught") is None
    assert page.locator("img[src=x]").count() == 0
    assert page.evaluate("(() => { try { document.body.innerHTML = 'x' } catch (e) { return e.name } })()") == "TypeError"
    assert page.evaluate("document.querySelectorAll('[style]').length >= 0 && document.scripts.length") == 2
    tab.said.clear()  # Chromium notes the assignment that it refused.


def test_a_failure_says_what_to_do_and_is_tried_again(tab: Seen, url: str) -> None:
    page = tab.page
    sign_in(page, url)
    page.route("**/v1/files?*", lambda route: route.abort())
    page.goto(f"{url}/#/data")
    page.get_by_text("The service does not answer.").wait_for()
    page.unroute("**/v1/files?*")
    page.get_by_role("button", name="Try again").click()
    page.get_by_role("table", name="Files").or_(page.get_by_text("No files yet")).wait_for()
    page.goto(f"{url}/#/jobs/ftjob-of-nobody")
    page.get_by_text("It may have been deleted, or it belongs to another tenant.").wait_for()
    page.get_by_text("req_").wait_for()
    # A key that is revoked while its page is open leads to the sign-in, and is gone from the tab.
    refusal = {"error": {"message": "the API key is wrong, expired or revoked", "code": "invalid_api_key"}}
    page.route("**/v1/fine_tuning/jobs?*", lambda route: route.fulfill(status=401, json=refusal))
    page.goto(f"{url}/#/jobs")
    page.get_by_text("The API key is wrong, expired or revoked.").wait_for()
    assert page.evaluate("sessionStorage.length") == 0
    tab.said.clear()  # Chromium notes each failed request.


def test_a_key_without_a_scope_is_told_which_it_lacks(tab: Seen, url: str) -> None:
    page = tab.page
    sign_in(page, url, OTHER_KEY)
    page.goto(f"{url}/#/keys")
    page.get_by_text("This key cannot make or revoke keys").wait_for()
    assert page.get_by_role("button", name="New key").count() == 0


# Every text that can be seen, with its colour over what lies below it: WCAG's ratio of 4.5 (AA) is the least.
CONTRASTS = """() => {
  const rgba = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (top, below) => top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3])).concat(1);
  const channel = (c) => (c / 255 <= .03928 ? c / 255 / 12.92 : ((c / 255 + .055) / 1.055) ** 2.4);
  const light = (colour) => .2126 * channel(colour[0]) + .7152 * channel(colour[1]) + .0722 * channel(colour[2]);
  const ground = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const { data, parentElement: element } = walker.currentNode;
    if (!data.trim() || !element.checkVisibility() || element.closest('.unseen, .skip, svg, :disabled, option')) continue;
    const below = ground(element);
    const pair = [light(over(rgba(getComputedStyle(element).color), below)), light(below)].sort((x, y) => y - x);
    const ratio = (pair[0] + .05) / (pair[1] + .05);
    if (ratio < 4.5) found.push(`${element.className} ${data} ${ratio.toFixed(2)}`);
  }
  return found;
}"""
# What has moved by itself on the way, by the browser's own measure: under 0.1 is good.
SHIFTS = """window.shifted = 0; new PerformanceObserver((list) => list.getEntries().forEach((entry) => {
  if (!entry.hadRecentInput) window.shifted += entry.value; })).observe({type: 'layout-shift', buffered: true});"""
UNNAMED = """() => [...document.querySelectorAll('button, a, input, select, textarea')].filter((e) =>
  e.checkVisibility() && !e.textContent.trim() && !e.ariaLabel && !e.labels?.length).map((e) => e.outerHTML)"""


SLOW = pytest.mark.slow
SCREENS = [(360, "dark"), *(pytest.param(*screen, marks=SLOW) for screen in ((1440, "light"), (360, "light"), (1440, "dark")))]


@pytest.mark.parametrize(("width", "theme"), SCREENS)
def test_every_page_can_be_read_and_scrolls_one_way_alone(browser, url: str, width: int, theme: str, tmp_path: Path) -> None:
    seen = opened(browser, width, theme)
    page = seen.page
    page.add_init_script(SHIFTS)
    sign_in(page, url)
    for name in PAGES:
        page.evaluate("window.shifted = 0")
        page.goto(f"{url}/#/{name}")
        page.locator("main h1").wait_for()
        page.locator("[aria-busy]").first.wait_for(state="detached")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} scrolls sideways at {width}"
        assert page.evaluate(CONTRASTS) == [], f"{name}, {theme}"
        assert page.evaluate(UNNAMED) == [], f"{name}: a control without a name"
        assert page.locator("h1").count() == 1
        assert page.evaluate("window.shifted") < 0.1, f"{name} moves while it loads"
        assert len(page.screenshot(path=tmp_path / f"{name}.png")) > 5000
    page.context.close()
    assert seen.said == []


def test_the_keyboard_alone_skips_to_the_content_and_turns_the_theme(tab: Seen, url: str) -> None:
    page = tab.page
    sign_in(page, url)
    page.locator("body").press("Tab") if page.evaluate("document.activeElement === document.body") else None
    page.evaluate("document.querySelector('.skip').focus()")
    assert page.locator(".skip").bounding_box()["y"] >= 0, "the link is shown when it has the focus"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    button = page.get_by_role("button", name="Theme").locator("visible=true")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    button.press("Enter")
    button.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_the_pages_come_with_headers_that_let_them_do_what_they_need_alone(url: str) -> None:
    with httpx.Client(base_url=url) as client:
        page = client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert (page.headers["x-content-type-options"], page.headers["referrer-policy"]) == ("nosniff", "no-referrer")
        assert "http" not in re.sub(r"</?code>|plain HTTP", "", page.text), "no address of another host"
        script = client.get("/js/main.js")
        assert script.headers["content-type"] == "text/javascript; charset=utf-8"
        again = client.get("/js/main.js", headers={"if-none-match": script.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert client.head("/").status_code == 200
        assert client.post("/").status_code == 405
        for path in ("/js/", "/web/__init__.py", "/__init__.py", "/js/../../service/app.py", "/js/%2e%2e/index.html", "/nothing"):
            assert client.get(path).json()["error"]["code"] == "not_found"
        assert client.post("/v1/models").status_code == 405, "the pages hide no route of the API"
