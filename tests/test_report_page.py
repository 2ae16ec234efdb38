"The report in a real browser: it loads nothing else, shows everything, and prints without cuts."
import base64
import json
import re

import pytest

from kdoct.app.report import report_html
from kdoct.core.presets import preset
from kdoct.core.runs import create_run
from kdoct.evaluate.all_folds import evaluate_run
from kdoct.evaluate.simulated import write_simulated_stages

A4, LETTER = (8.27, 11.69), (8.5, 11)   # inches
MARGIN = 14/25.4


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    "report.html of two simulated folds, one of them exported, and a third whose teacher failed."
    with pytest.MonkeyPatch.context() as env:
        env.setenv("KDOCT_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
        run = create_run(
            "page",
            preset(
                "tiny",
                **{
                    "teacher.average": "swa",
                    "teacher.swa_start": 1,
                    "evaluate.views": ["identity", "hflip"],
                },
            ),
        )
        for k in (0, 1): write_simulated_stages(run, k)
        run.record(
            "fold_2/teacher",
            status="failed",
            error="loss is not finite <nan> in epoch 3",
            notebook="fold_2/notebooks/teacher.ipynb",
        )
        run.record("fold_1/student", notes=["4 images were read twice"])
        formats = {
            "onnx": dict(
                kept=True, bytes=13_700_000, latency_ms=48.1, difference=2e-6, files=["model.onnx"]
            ),
            "int8": dict(kept=False, reason="1.1 times faster, not 1.3"),
        }
        run.record("fold_0/deploy", student=dict(name="page student", formats=formats))
        return report_html(run, [0, 1, 2], result=evaluate_run(run, [0, 1], verbose=False))


# Two frames: a page that is printed before it is laid out has one sheet.
_LAID_OUT = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))"


def opened(browser, page):
    browser.get(page.as_uri())
    browser.execute_async_script(_LAID_OUT)
    return browser


def requests(browser):
    "Addresses that the page asked for."
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    return [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]


def test_it_asks_for_nothing_but_itself(browser, page):
    loaded = [u for u in requests(opened(browser, page)) if not u.startswith("data:")]
    assert loaded == [page.as_uri()]


def test_the_console_stays_empty(browser, page):
    assert opened(browser, page).get_log("browser") == []


def test_every_figure_is_shown_with_a_text(browser, page):
    figures = opened(browser, page).execute_script(
        "return [...document.images].map(i => [i.complete && i.naturalWidth, i.clientWidth, i.alt])"
    )
    assert len(figures) >= 10 and all(own > 0 and shown > 0 and alt for own, shown, alt in figures)


@pytest.mark.parametrize("width", [1280, 1024, 480])
def test_nothing_hangs_over_the_edge_of_the_window(browser, page, width):
    browser.set_window_size(width, 800)
    over = opened(browser, page).execute_script(
        "return document.scrollingElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert over <= 0, f"{over} px too wide: only tables may scroll, each in its own frame"


def test_every_section_is_reached_from_the_top(browser, page):
    missing = opened(browser, page).execute_script(
        "return [...document.querySelectorAll('nav a')].map(a => a.getAttribute('href')).filter(h "
        "=> !document.querySelector(h + ' h2'))"
    )
    assert missing == []


def test_what_went_wrong_is_said(browser, page):
    from selenium.webdriver.common.by import By
    text = opened(browser, page).find_element(By.ID, "wrong").text
    for output in (
        "Fold 2, teacher, failed: loss is not finite <nan> in epoch 3",
        "Fold 2 has no predictions of the student", "4 images were read twice",
    ):
        assert output in text


def test_formats_that_were_exported_are_shown_with_the_reason_of_one_left_out(browser, page):
    from selenium.webdriver.common.by import By
    text = opened(browser, page).find_element(By.ID, "formats").text
    assert "page student" in text and "48.1" in text and "1.1 times faster, not 1.3" in text


def test_tables_of_scores_have_their_protocol_in_a_column(browser, page):
    heads = opened(browser, page).execute_script(
        "return [...document.querySelectorAll('#results table')].map(t => [t.caption.textContent, "
        "[...t.tHead.rows[0].cells].map(c => c.textContent)])"
    )
    assert heads and not [caption for caption, head in heads if head[-1] != "protocol"]


# --- on paper

def printed(browser, page, paper):
    "The page laid out for paper: browser in print style, at the width between the margins."
    opened(browser, page)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(media="print"))
    width, height = (round(96*(inches - 2*MARGIN)) for inches in paper)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        dict(width=width, height=height, deviceScaleFactor=1, mobile=False),
    )
    return browser, width, height


@pytest.fixture
def on_screen_again(browser):
    yield
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(media=""))


@pytest.mark.usefixtures("on_screen_again")
@pytest.mark.parametrize("paper", [A4, LETTER], ids=["A4", "Letter"])
def test_no_table_and_no_figure_is_cut_on_paper(browser, page, paper):
    browser, width, height = printed(browser, page, paper)
    wide = browser.execute_script("""
        return [...document.querySelectorAll('table, figure, p, ul, h1, h2, h3')]
            .filter(e => !e.closest('.broad'))
            .filter(e => e.getBoundingClientRect().right > arguments[0] + 1)
            .map(e => (e.caption || e).textContent.slice(0, 60))""", width)
    high = browser.execute_script("""
        return [...document.querySelectorAll('figure, tr')]
            .filter(e => e.getBoundingClientRect().height > arguments[0])
            .map(e => e.textContent.slice(0, 60))""", height)
    assert (wide, high) == ([], [])


@pytest.mark.usefixtures("on_screen_again")
def test_figures_and_rows_stay_on_one_page(browser, page):
    browser, _, _ = printed(browser, page, A4)
    breaks = browser.execute_script(
        "return [...document.querySelectorAll('figure, tr')].map(e => "
        "getComputedStyle(e).breakInside)"
    )
    assert set(breaks) == {"avoid"}


@pytest.mark.parametrize("paper", [A4, LETTER], ids=["A4", "Letter"])
def test_it_prints(browser, page, paper):
    pdf = base64.b64decode(
        opened(browser, page).execute_cdp_cmd(
            "Page.printToPDF",
            dict(
                paperWidth=paper[0],
                paperHeight=paper[1],
                printBackground=True,
                preferCSSPageSize=True,
            ),
        )["data"]
    )
    boxes = {
        tuple(round(float(v) / 72, 1) for v in b.split()[2:])
        for b in re.findall(rb"/MediaBox\s*\[([\d. ]+)\]", pdf)
    }
    assert pdf.startswith(b"%PDF") and 4 < len(re.findall(rb"/Type\s*/Page\b", pdf)) < 60
    assert boxes == {tuple(round(v, 1) for v in paper)}, (
        "the page's own style must leave the paper to the printer"
    )


# --- what is folded, and what is whole

def test_the_whole_recipe_is_folded_and_what_was_changed_is_not(browser, page):
    folded = opened(browser, page).execute_script(
        "return [...document.querySelectorAll('#recipe table')].map(t => t.closest('details') !== "
        "null && !t.closest('details').open)"
    )
    assert folded == [False, True]


def test_no_caption_is_cut(browser, page):
    cut = opened(browser, page).execute_script("""
        return [...document.querySelectorAll('caption')]
            .filter(c => !c.closest('.titled') && c.scrollWidth > c.clientWidth + 1)
            .map(c => c.textContent.slice(0, 60))""")
    assert cut == []
