"""Claims of the page that only a browser can show: nothing overflows, nothing is fetched, everything can be read and reached."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiltscope.engine.compare import Comparison, Method, Point
from tiltscope.engine.config import CompareConfig
from tiltscope.engine.report.manifest import complete
from tiltscope.engine.samples import Explanation

pytestmark = pytest.mark.browser

SCHEMES = ("light", "dark")
PHONE, WIDE = 375, 1280
# WCAG's contrast of each element's own text against what is painted under it; large text needs 3, and gets 4.5 here too.
CONTRAST = """() => {
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, at) => sum + c * [.2126, .7152, .0722][at], 0);
  const under = element => {
    for (let each = element; each; each = each.parentElement) {
      const colour = rgb(getComputedStyle(each).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    if (element.closest('title') || !element.checkVisibility()) continue;
    const own = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.textContent.trim()).join('');
    if (!own) continue;
    const style = getComputedStyle(element);
    const drawn = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(rgb(drawn)), light(under(element))].sort((x, y) => y - x);
    found.push({text: own.slice(0, 40), contrast: (a + .05) / (b + .05), size: parseFloat(style.fontSize)});
  }
  return found;
}"""
CLIPPED = """() => [...document.querySelectorAll('svg.plot')].filter(s => s.checkVisibility()).flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text, rect, circle')].filter(each => {
    const r = each.getBoundingClientRect();
    return r.left < box.left - .5 || r.right > box.right + .5 || r.top < box.top - .5 || r.bottom > box.bottom + .5;
  }).map(each => each.textContent || each.tagName);
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'tiltscope[dev]'")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        running = driver.chromium.launch(executable_path=chromium, args=flags)
        yield running
        running.close()


@pytest.fixture(scope="module")
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """opened(file, width, scheme) -> page; every request that it makes is on page.requests."""
    contexts: list[Any] = []

    def open_page(file: Path, width: int, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.requests = []
        page.complaints = []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("console", lambda message: page.complaints.append(message.text))
        page.goto(file.as_uri())
        page.wait_for_load_state("networkidle")
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def saved(explain_by_hand: Callable[..., Explanation], tmp_path: Path) -> Path:
    """A page with everything that makes one hard: long words, warnings, many digits."""
    made = explain_by_hand()
    long = "thebundlehasaverylongnamewithoutasinglespaceinit" * 3
    made = replace(
        made,
        name="a clock showing half past eleven",
        warnings=(f"the unguided prior is far from the pool {long}",),
        metrics={
            name: {k: None if v is None else -12345.678 for k, v in each.items()} for name, each in made.metrics.items()
        },
        answers={name: replace(each, sources=(long,) * len(each)) for name, each in made.answers.items()},
        manifest=made.manifest | {"bundle": made.manifest["bundle"] | {"name": long, "identity": f"sha256:{'9' * 64}"}},
    )
    return made.save(tmp_path / "out") / "index.html"


@pytest.fixture
def compared(explain_by_hand: Callable[..., Explanation], tmp_path: Path) -> Path:
    """A comparison's page: a sampler, one that did not come to the target, and the rivals."""
    made = explain_by_hand()
    methods = [
        Method(
            name="dps, ddpm, 50 steps" if name == "tilt" else name,
            kind="sampler" if name == "tilt" else "rival",
            lam=1.5 if name == "tilt" else None,
            matched=name != "topk",
            metrics=dict(made.metrics[name]),
            kl_source="integration",
            excess_kl_kind="lower bound" if name == "tilt" else "exact",
            samples=answer,
        )
        for name, answer in made.answers.items()
    ]
    missed = Method(
        name="none, dpmpp_2m(guided_history=True), 25 steps", kind="sampler", lam=None, matched=False, metrics={}, kl_source=None,
        excess_kl_kind=None, samples=None, note="target 1.98 was not reached; the nearest mean reached is 0.76 +- 0.27",
    )  # fmt: skip
    curves = tuple(
        Point(
            method="dps, ddpm, 50 steps",
            lam=lam,
            activation=lam,
            activation_se=0.1,
            naturalness=-lam,
            naturalness_se=0.2,
            num=8,
        )
        for lam in (0.0, 0.75, 1.5, 3.0)
    )
    manifest = made.manifest | {"command": "compare", "config": CompareConfig().to_json()}
    comparison = Comparison(
        feature=made.feature, feature_name="a clock", target=1.98, target_quantile=0.97, methods=(*methods, missed),
        curves=curves, manifest=complete(manifest | {"identity": "a" * 64}),
    )  # fmt: skip
    return comparison.save(tmp_path / "compared") / "index.html"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [320, PHONE, 768, WIDE])
def test_a_comparison_fits_is_readable_and_fetches_nothing(
    opened: Callable[..., Any], compared: Path, width: int, scheme: str
) -> None:
    page = opened(compared, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.complaints == []
    assert [each for each in page.requests if not each.startswith(("file:", "data:"))] == []
    faint = [each for each in page.evaluate(CONTRAST) if each["contrast"] < 4.5]
    assert faint == []
    assert page.locator("table tbody tr").count() == 5
    assert page.locator("text=Not at the target").is_visible()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [320, PHONE, 768, WIDE, 1920])
def test_nothing_overflows_and_nothing_is_clipped(
    opened: Callable[..., Any], saved: Path, width: int, scheme: str
) -> None:
    page = opened(saved, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CLIPPED) == []
    plots = page.evaluate(
        "[...document.querySelectorAll('svg.plot')].filter(s => s.checkVisibility()).map(s => s.clientWidth)"
    )
    assert len(plots) == 1
    assert plots[0] <= width


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [PHONE, WIDE])
def test_all_text_can_be_read(opened: Callable[..., Any], saved: Path, width: int, scheme: str) -> None:
    page = opened(saved, width, scheme)
    for checked in (False, True):
        page.set_checked("#heat", checked)
        found = page.evaluate(CONTRAST)
        assert len(found) > 150
        assert [each for each in found if each["contrast"] < 4.5] == []
        assert [each for each in found if each["size"] < 11] == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, dark[4:-1].split(","))) < 128) == (scheme == "dark")


def test_every_image_is_drawn_and_described_and_nothing_is_fetched(opened: Callable[..., Any], saved: Path) -> None:
    page = opened(saved, WIDE)
    images = page.evaluate("[...document.images].map(i => [i.alt, i.naturalWidth, i.naturalHeight, i.complete])")
    assert len(images) == 65  # 32 pictures, each with its heat, and the key
    assert all(alt and wide > 0 and high > 0 and complete for alt, wide, high, complete in images)
    assert [url for url in page.requests if not url.startswith("data:")] == [saved.as_uri()]
    assert page.complaints == []


def test_a_64_pixel_picture_is_enlarged_by_a_whole_factor(opened: Callable[..., Any], saved: Path) -> None:
    page = opened(saved, WIDE)
    sizes = page.evaluate("[...document.querySelectorAll('.picture')].map(i => [i.clientWidth, i.clientHeight])")
    assert sizes == [[128, 128]] * 32
    assert page.evaluate("getComputedStyle(document.querySelector('.picture')).imageRendering") == "pixelated"


def test_answers_stand_side_by_side_on_a_wide_screen_and_below_each_other_on_a_phone(
    opened: Callable[..., Any], saved: Path
) -> None:
    corners = "[...document.querySelectorAll('article')].map(a => a.getBoundingClientRect()).map(r => [r.left, r.top])"
    wide = opened(saved, WIDE)
    assert len({left for left, _ in wide.evaluate(corners)}) == 4
    assert len({top for _, top in wide.evaluate(corners)}) == 1
    first = (
        "[...document.querySelectorAll('article')].map(a => a.querySelector('.picture').getBoundingClientRect().top)"
    )
    assert len(set(wide.evaluate(first))) == 1
    assert len({left for left, _ in opened(saved, PHONE).evaluate(corners)}) == 1


def test_the_keyboard_reaches_the_heat_and_the_table(opened: Callable[..., Any], saved: Path) -> None:
    page = opened(saved, WIDE)
    visible = "getComputedStyle(document.querySelector('.heat')).visibility"
    assert page.evaluate(visible) == "hidden"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "heat"
    page.keyboard.press("Space")
    assert page.evaluate(visible) == "visible"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Metrics by answer"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#note-1"
    # Each picture lies exactly under its heat.
    boxes = page.evaluate(
        "[...document.querySelectorAll('.frame')].map(f => [...f.querySelectorAll('img')]"
        ".map(i => JSON.stringify(i.getBoundingClientRect())))"
    )
    assert all(picture == heat for picture, heat in boxes)


def test_64_pictures_an_answer_fit_too_and_the_whole_table(
    opened: Callable[..., Any], explain_by_hand: Callable[..., Explanation], tmp_path: Path
) -> None:
    file = explain_by_hand(num=64).save(tmp_path / "out") / "index.html"
    for width in (PHONE, WIDE):
        page = opened(file, width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.images].filter(i => !i.naturalWidth).length") == 0
        # Numbers of an ordinary size: no column is hidden behind scrolling.
        assert page.evaluate("(e => e.scrollWidth - e.clientWidth)(document.querySelector('.scroll'))") == 0
