"""Claims of the page and of the folder around it: self-contained, escaped, complete, the same each time."""

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.report import manifest as manifests
from tiltscope.engine.report.metrics import METRICS
from tiltscope.engine.report.page import render
from tiltscope.engine.report.plot import Lane, histogram
from tiltscope.engine.report.words import METRIC_ROWS, number, percent, sentence
from tiltscope.engine.samples import Explanation, Samples

Make = Callable[..., Explanation]
VOID = {"meta", "link", "img", "input", "br", "rect", "line", "circle"}
HOSTILE = """<script>alert(1)</script>"><img src=x onerror='alert(2)'>{{ 7 * 7 }}&amp;"""


class Page(HTMLParser):
    """Elements in order, as (tag, attributes, text inside), and whether every tag is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[int] = []
        self.feed(text)
        self.close()
        assert not self._open, [self.elements[at][0] for at in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), attrs
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for at in self._open:
            self.elements[at][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str], str]]:
        return [(attrs, " ".join("".join(text).split())) for name, attrs, text in self.elements if name == tag]


def page_of(explanation: Explanation) -> Page:
    return Page(text_of(explanation))


def text_of(explanation: Explanation) -> str:
    return render(explanation, manifests.complete(explanation.manifest))


def test_the_page_needs_nothing_but_itself(explain_by_hand: Make) -> None:
    text = text_of(explain_by_hand())
    page = Page(text)
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "base", "form", "audio", "video", "source"}
    for tag, attrs, _ in page.elements:
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action", "poster", "xlink:href"):
                assert value.startswith(("data:", "#")), (tag, value)
    style = page.all("style")[0][1]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(
        attrs["content"] for attrs, _ in page.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")


def test_headings_come_in_order_and_ids_are_unique(explain_by_hand: Make) -> None:
    page = page_of(explain_by_hand())
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = Counter(attrs["id"] for _, attrs, _ in page.elements if "id" in attrs)
    assert max(ids.values()) == 1
    for _, attrs, _ in page.elements:
        for name in ("aria-labelledby", "for"):
            assert attrs.get(name, "answers") in ids
        if attrs.get("href", "").startswith("#"):
            assert attrs["href"][1:] in ids


def test_text_from_files_is_escaped_wherever_it_is_shown(explain_by_hand: Make) -> None:
    made = explain_by_hand()
    bundle = dict.fromkeys(("name", "identity", "licence"), HOSTILE)
    bundle |= {"attribution": [dict.fromkeys(("what", "source", "licence", "url"), HOSTILE)]}  # pyright: ignore
    hostile = replace(
        made,
        name=HOSTILE,
        feature=HOSTILE,
        warnings=(HOSTILE,),
        notes=dict.fromkeys(made.answers, HOSTILE),
        answers={name: replace(each, sources=(HOSTILE,) * len(each)) for name, each in made.answers.items()},
        manifest=made.manifest
        | {"bundle": bundle, "feature_name_source": HOSTILE, "repeat": HOSTILE, "prior": HOSTILE},
    )
    plain, page = page_of(made), page_of(hostile)
    assert page.all("h1")[0][1] == " ".join(HOSTILE.split())
    # Nothing became an element: the same ones as without it, but for those that more text brings.
    assert {tag for tag, _, _ in page.elements} <= {tag for tag, _, _ in plain.elements} | {"ul", "li", "span"}
    assert len(page.all("img")) == len(plain.all("img"))
    assert all(not name.startswith("on") for _, attrs, _ in page.elements for name in attrs)
    assert "49" not in page.all("h1")[0][1]
    assert any(HOSTILE in attrs["alt"] for attrs, _ in page.all("img"))


def test_every_metric_is_shown_and_every_gap_has_its_reason(explain_by_hand: Make) -> None:
    made = explain_by_hand()
    errors = {words.error for words in METRIC_ROWS.values() if words.error}
    assert set(METRIC_ROWS) | errors == set(METRICS)
    page = page_of(made)
    rows = page.all("tr")[1:]
    assert len(rows) == len(METRIC_ROWS)
    cells = [text for _, text in page.all("td")]
    at = 0
    footnotes = {attrs["id"]: text for attrs, text in page.all("li") if attrs.get("id", "").startswith("note-")}
    for metric in METRIC_ROWS:
        for answer in made.answers:
            value = made.metrics[answer][metric]
            assert cells[at].startswith("–" if value is None else "1"), (metric, answer, cells[at])
            if value is None:
                reason = footnotes[f"note-{cells[at].removeprefix('–')}"]
                assert len(reason) > 10
                assert reason.endswith(".")
            at += 1
    assert len(footnotes) == 4


def test_every_picture_has_its_words_and_its_heat(explain_by_hand: Make) -> None:
    page = page_of(explain_by_hand())
    pictures = [attrs for attrs, _ in page.all("img") if attrs.get("class") == "picture"]
    assert len(pictures) == 32
    assert len({attrs["alt"] for attrs in pictures}) == 32
    assert "Top-K retrieval, picture 2 of 8: picture 1, activation 2.71" in {attrs["alt"] for attrs in pictures}
    heat = [attrs for attrs, _ in page.all("img") if attrs.get("class") == "heat"]
    assert len(heat) == 32
    assert all(attrs["alt"].startswith("The feature") for attrs in heat)


def test_the_headline_says_what_was_asked(explain_by_hand: Make) -> None:
    text = " ".join(page_of(explain_by_hand()).all("header")[0][1].split())
    for part in ("clock", "blocks.5:sae:137", "bundle emoji64", "fire at 3.00", "97.0 % quantile"):
        assert part in text
    unnamed = page_of(explain_by_hand(name=None))
    assert unnamed.all("h1")[0][1] == "Unnamed feature"
    assert unnamed.all("title")[0][1].startswith("Unnamed feature · blocks.5:sae:137")


def test_trust_says_target_reached_support_and_the_priors_disagreement(explain_by_hand: Make) -> None:
    made = explain_by_hand()
    trust = next(text for attrs, text in page_of(made).all("dl") if attrs["class"].startswith("trust"))
    ess = made.calibration.ess
    assert f"About {round(ess)} natural pictures carry this target" in trust
    assert "approximate" in trust
    # Mean of the eight activations by hand: 3.00, standard deviation of 8 evenly spread over 0.8, over sqrt(8).
    spread = torch.linspace(-0.4, 0.4, 8).std() / math.sqrt(8)
    assert f"3.00 ± {spread:.2f}" in trust
    assert f"KL = {made.calibration.kl:.2f} nats" in trust
    assert "0.2 standard errors apart" in trust
    assert not [attrs for attrs, _ in page_of(made).all("ul") if attrs["class"] == "warnings"]
    away = replace(made, prior_mean=made.natural_mean + 1)
    assert "not of the distribution that the sampler tilts" in text_of(away)


def test_a_capped_tilt_is_judged_by_its_own_phi(explain_by_hand: Make) -> None:
    made = explain_by_hand()
    capped = replace(
        made, manifest=made.manifest | {"config": made.manifest["config"] | {"log_tilt": "capped(cap=2.7)"}}
    )
    trust = next(text for attrs, text in page_of(capped).all("dl") if attrs["class"].startswith("trust"))
    mean = (torch.linspace(-0.4, 0.4, 8) + 3).clamp(max=2.7).mean()
    assert f"{mean:.2f} ±" in trust
    plots = page_of(capped).all("svg")
    assert all("target" not in text for _, text in plots)


def test_more_than_64_and_what_failed_are_counted_not_hidden(
    explain_by_hand: Make, samples_by_hand: Callable[..., Samples]
) -> None:
    made = explain_by_hand()
    many = samples_by_hand("tilt", 70)
    ok = many.ok.clone()
    ok[[3, 5]] = False
    activation = many.activation.clone()
    activation[3] = torch.nan
    many = replace(many, ok=ok, activation=activation)
    page = page_of(replace(made, answers=made.answers | {"tilt": many}))
    shown = [attrs["alt"] for attrs, _ in page.all("img") if attrs["alt"].startswith("KL-minimal tilt, picture")]
    assert len(shown) == 64
    assert not [alt for alt in shown if "picture 4 of" in alt or "picture 6 of" in alt]
    notes = [text for attrs, text in page.all("p") if attrs.get("class", "").startswith("note")]
    assert "The first 64 of 68." in notes
    assert "2 not finished or not finite, and not shown." in notes
    assert "nan" not in page.all("main")[0][1].lower().split()


def test_answers_without_pictures_without_heat_or_all_failed_still_make_a_page(explain_by_hand: Make) -> None:
    made = explain_by_hand()
    for changes in (
        {"images": None, "heat": None},
        {"ok": torch.zeros(8, dtype=torch.bool), "activation": torch.full((8,), torch.nan)},
        {"heat": torch.zeros(8, 8, 8)},
    ):
        answers = {name: replace(each, **changes) for name, each in made.answers.items()}
        page = page_of(replace(made, answers=answers))
        assert len(page.all("article")) == 4


def test_the_same_explanation_is_the_same_page(explain_by_hand: Make) -> None:
    assert text_of(explain_by_hand()) == text_of(explain_by_hand())


def contents(folder: Path) -> dict[str, str]:
    files = sorted(each for each in folder.rglob("*") if each.is_file())
    return {str(each.relative_to(folder)): hashlib.sha256(each.read_bytes()).hexdigest() for each in files}


def test_the_folder_is_what_the_interface_promises(explain_by_hand: Make, tmp_path: Path) -> None:
    made = explain_by_hand(num=3)
    assert made.save(tmp_path / "out") == tmp_path / "out"
    found = contents(tmp_path / "out")
    answer = [
        "samples.png",
        "samples.safetensors",
        "samples/metadata.jsonl",
        *(f"samples/00{at}_seed0.png" for at in range(3)),
    ]
    pool = [name.replace("001_", "007_").replace("002_", "014_") for name in answer]
    expected = ["index.html", "manifest.json", *answer]
    for name in made.answers:
        expected += [f"answers/{name}/{each}" for each in (pool if name in ("topk", "hard") else answer)]
    assert sorted(found) == sorted(expected)
    assert all(found[name] == found[f"answers/tilt/{name}"] for name in answer)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["metrics"] == made.metrics
    assert [row["index"] for row in manifest["samples"]] == [0, 1, 2]
    assert manifest["repeat"].startswith("tiltscope explain blocks.5:sae:137 --num 3")
    lines = (tmp_path / "out" / "answers" / "topk" / "samples" / "metadata.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["lam"] is None  # the pool's pictures have no lambda, and JSON no NaN


def test_an_answer_keeps_its_own_order(explain_by_hand: Make, tmp_path: Path) -> None:
    made = explain_by_hand()
    topk = replace(made.answers["topk"], index=torch.tensor([900, 3, 77, 5, 1, 2, 4, 6]))
    replace(made, answers=made.answers | {"topk": topk}).save(tmp_path)
    assert load_file(tmp_path / "answers" / "topk" / "samples.safetensors")["index"].tolist() == topk.index.tolist()


def test_saving_again_leaves_what_the_page_shows_and_nothing_else(explain_by_hand: Make, tmp_path: Path) -> None:
    explain_by_hand(num=8).save(tmp_path / "again")
    explain_by_hand(num=3).save(tmp_path / "again")
    explain_by_hand(num=3).save(tmp_path / "once")
    assert contents(tmp_path / "again") == contents(tmp_path / "once")


def test_another_explanations_folder_is_refused_untouched(explain_by_hand: Make, tmp_path: Path) -> None:
    made = explain_by_hand(num=2)
    made.save(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="holds another run"):
        replace(made, manifest=made.manifest | {"identity": "00" * 32}).save(tmp_path)
    assert contents(tmp_path) == before


def test_one_answer_can_be_saved_alone(explain_by_hand: Make, tmp_path: Path) -> None:
    topk = explain_by_hand().answers["topk"]
    topk.save(tmp_path)
    topk.save(tmp_path)
    assert (tmp_path / "samples" / "049_seed0.png").exists()
    with pytest.raises(ConfigError, match="another run"):
        explain_by_hand().answers["hard"].save(tmp_path)


@given(st.floats(-1e6, 1e6), st.integers(0, 4))
def test_a_number_is_read_back_to_its_last_digit(value: float, digits: int) -> None:
    read = float(number(value, digits).replace("−", "-").replace(",", ""))
    assert abs(read - value) <= 0.5000001 * 10**-digits
    assert (read == 0) == (value == 0)  # a small number is not called zero


@given(st.floats(0, 1))
def test_a_share_is_not_rounded_into_certainty(share: float) -> None:
    text = percent(share)
    assert text.endswith(" %")
    if 1e-6 < share < 1 - 1e-6:
        assert 0 < float(text.removesuffix(" %")) < 100


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_no_number_is_a_dash(value: float | None) -> None:
    assert number(value) == "–"


def test_a_sentence_keeps_its_capitals() -> None:
    assert sentence("the ESS is low") == "The ESS is low."
    assert sentence("Done.") == "Done."


def test_the_plot_puts_everything_where_it_belongs() -> None:
    natural = np.array([0.0] * 999 + [10.0])
    drawn = Page(
        str(
            histogram(
                natural, target=7.5, natural_mean=0.01, lanes=[Lane("Tilt", "tilt", [2.5, 7.5])], width=400, name="wide"
            )
        )
    )
    axis = next(attrs for attrs, _ in drawn.all("line") if attrs["class"] == "axis")
    left, right = float(axis["x1"]), float(axis["x2"])

    def x(value: float) -> float:
        return left + value / 10 * (right - left)

    target = next(attrs for attrs, _ in drawn.all("line") if attrs["class"] == "target")
    assert float(target["x1"]) == pytest.approx(x(7.5), abs=0.02)
    ticks = [float(attrs["x1"]) for attrs, _ in drawn.all("line") if attrs["class"].startswith("sample")]
    assert ticks == pytest.approx([x(2.5), x(7.5)], abs=0.02)
    assert float(drawn.all("circle")[0][0]["cx"]) == pytest.approx(x(5.0), abs=0.02)
    heights = [float(attrs["height"]) for attrs, _ in drawn.all("rect")]
    assert heights[0] / heights[1] == pytest.approx(math.log(1000) / math.log(2), rel=0.01)  # log(1 + count)
    assert "mean 5.00" in drawn.all("title")[0][1]


@pytest.mark.parametrize("natural", [[2.0] * 9, [0.0, 1e-9], [-5.0, 5e6]])
def test_the_plot_survives_any_range(natural: list[float]) -> None:
    drawn = str(
        histogram(
            np.array(natural),
            target=natural[0],
            natural_mean=natural[0],
            lanes=[Lane("Tilt", "tilt", [])],
            width=300,
            name="n",
        )
    )
    assert "nan" not in drawn
    Page(drawn)
