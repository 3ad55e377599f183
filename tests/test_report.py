"""The page of a check: nothing escapes, nothing is fetched, everything is there, and it can be read."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy
import pytest
from PIL import Image

from vlquant.charts import PALETTE, edge_ticks, place_in
from vlquant.check_result import Disagreement, HistogramBin, LayerErrors
from vlquant.part_limits import PartDistances
from vlquant.report import Card, bar, page, round_up, write_report
from vlquant.report_cards import CARD_BYTES, LONGEST_SIDE, MOST_CHARACTERS, MOST_PICTURES, mark_differences, show_card
from vlquant.verdict import FAIL, INCONCLUSIVE, PASS, Ground

from tests.made_up_check import OUTCOMES, made_up, made_up_cards, minimal

VOID = {"meta", "link", "br", "img"}
"""Elements of HTML without an end, of those that the page has."""
EVIL = "<script>alert(1)</script> \" ' & {{ 7 * 7 }} $x$ \u202egpj.exe\u2066 \x00\x1b[2J \ud800 </style> end"
MOST_BYTES = 8_000_000


class Page(HTMLParser):
    """Elements in the order they begin; raises AssertionError where one ends that did not begin last."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"{tag} ends at {self.getpos()}"

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module", params=[*OUTCOMES, "minimal"])
def result(request):
    return minimal() if request.param == "minimal" else made_up(request.param)


@pytest.fixture(scope="module")
def text(result):
    return page(result, made_up_cards(8) if result.disagreements else [])


def test_the_page_is_well_formed(text):
    parsed = Page(text)
    assert text.startswith("<!doctype html>")
    assert parsed.all("html") == [{"lang": "en"}]
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"] for _, attributes in parsed.elements if "href" in attributes} - {"data:,"}
    named = {attributes["aria-labelledby"] for _, attributes in parsed.elements if "aria-labelledby" in attributes}
    assert {target.removeprefix("#") for target in targets} | named <= set(ids)
    assert len(parsed.all("table")) == len(parsed.all("caption"))
    assert all(attributes["alt"] for attributes in parsed.all("img"))


def test_nothing_is_fetched_and_nothing_runs(text):
    parsed = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|javascript:", re.sub(r"base64,[^\"]*", "", text))
    assert {tag for tag, _ in parsed.elements} & {"script", "iframe", "object", "embed", "form", "base", "video"} == set()
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    assert all(attributes["src"].startswith("data:image/webp;base64,") for attributes in parsed.all("img"))
    (policy,) = (attributes["content"] for attributes in parsed.all("meta") if "http-equiv" in attributes)
    assert policy.split("; ")[:3] == ["default-src 'none'", "style-src 'unsafe-inline'", "img-src data:"]


def test_the_verdict_comes_first_with_its_grounds(result, text):
    verdict, words = result.verdict, Page(text).text.replace("\u2212", "-").replace("\u00a0", " ")
    assert words.index(verdict.outcome) < words.index("Key numbers")
    for ground in verdict.grounds:
        assert " ".join(ground.reason.split()) in words[: words.index("Key numbers")]
    if verdict.outcome == INCONCLUSIVE:
        assert "would decide" in words[: words.index("Key numbers")]


def test_every_section_is_there(result, text):
    titles = ["Key numbers", "What was run"]
    if result.generated:
        titles += ["By kind of question", "Likelihoods", "Where it comes from", "Layer by layer", "Disagreements"]
        titles += ["Form of the answers", "Scores of whole sets", "Noise floor", "Answers that flipped"]
    words = Page(text).text
    assert [title for title in titles if title not in words] == []
    for kind in result.kinds:
        assert f"{kind.kind} " in words and kind.verdict.outcome in words
    assert result.bundle_sha256 in words and result.sets[0].sha256 in words


def test_a_model_beside_itself_has_a_histogram_of_one_bin():
    result = made_up(PASS)
    same = replace(result.distribution, mean_divergence=0.0)
    bins = (HistogramBin(0.0, 1e-7, 900), HistogramBin(1e-7, 1e-6, 0))
    words = Page(page(replace(result, distribution=same, histogram=bins), [])).text
    assert "mean 0.0000" in words and "limit 0.06" not in words


def test_what_was_not_measured_is_not_shown():
    words = Page(page(minimal(), [])).text
    assert "No answers were generated" in words and "allow more memory" in words
    for title in ("By kind", "Layer by layer", "Disagreements", "Noise floor", "\u2212100.00", "pictures would decide"):
        assert title not in words


@pytest.mark.parametrize("field", ["distribution", "generated", "noise_floor", "blame"])
def test_every_part_may_be_missing(field):
    Page(page(replace(made_up(PASS), **{field: None}), []))


def test_layers_without_classes_and_without_errors():
    result = made_up(PASS)
    plain = tuple(LayerErrors(layer, 0.01 * layer or None, {}) for layer in range(5))
    assert "all weights" in Page(page(replace(result, layers=plain), [])).text
    unknown = tuple(LayerErrors(layer, None, {}) for layer in range(5))
    text = Page(page(replace(result, layers=unknown), [])).text
    assert "relative error of" not in text and "Each layer beside plain rounding" in text
    nothing = replace(result, layers=unknown, verdict=replace(result.verdict, parts=PartDistances()))
    assert "Layer by layer" not in Page(page(nothing, [])).text


def test_parts_are_shown_beside_their_limits():
    text = " ".join(Page(page(made_up(FAIL), [])).text.split())
    assert "layer 13 adds most: 2.70 times what plain rounding to the same bits would (the limit is 1.5)" in text
    assert "layer 13 of the language model is 2.70 times as far" in text and "13 2.70 2.56" in text
    assert "fp32 keeps 0.999999" in text


def test_the_same_result_gives_the_same_bytes(tmp_path):
    for name in ("first.html", "second.html"):
        write_report(tmp_path / name, made_up(FAIL), made_up_cards(3))
    assert (tmp_path / "first.html").read_bytes() == (tmp_path / "second.html").read_bytes()


def test_everything_is_escaped(tmp_path):
    base = made_up(FAIL)
    disagreement = Disagreement(EVIL, EVIL, EVIL, (EVIL, EVIL + "2"), EVIL, EVIL + "3", 1.0, 0.0)
    further = replace(disagreement, key=EVIL + "4")
    parts = replace(base.verdict.parts, tile=replace(base.verdict.parts.tile, key=EVIL, precision=EVIL))
    verdict = replace(base.verdict, grounds=(Ground("structure", EVIL),), parts=parts)
    evil = replace(
        base,
        bundle=EVIL,
        reference=EVIL,
        vision=EVIL,
        forced_text=EVIL,
        verdict=verdict,
        sets=(replace(base.sets[0], name=EVIL, sha256=EVIL, metrics=(EVIL,)),),
        kinds=(replace(base.kinds[0], kind=EVIL),),
        layers=(LayerErrors(0, 0.1, {EVIL: 0.2}), LayerErrors(1, 0.1, {EVIL: 0.3})),
        generated=replace(base.generated, set_scores={EVIL: {EVIL: (1.0, 2.0)}}),
        disagreements=(disagreement, further),
        recipe={EVIL: [EVIL]},
        libraries={EVIL: EVIL},
    )
    write_report(tmp_path / "report.html", evil, [Card(disagreement, (Image.new("RGB", (9, 9)),), (((0.0, 0.0, 9.0, 9.0),),))])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert parsed.all("script") == [] and "<script" not in text and len(parsed.all("style")) == 1
    assert "{{ 7 * 7 }}" in parsed.text
    assert "⟨U+202E⟩gpj.exe⟨U+2066⟩ ⟨U+0000⟩⟨U+001B⟩[2J ⟨U+D800⟩" in parsed.text
    assert not re.search("[\x00\x1b\u202a-\u202e\u2066-\u2069]", text)


def test_a_minus_is_typeset_but_names_keep_their_hyphens():
    result = replace(made_up(PASS), bundle="a-1 b -2 %")
    assert "a-1 b -2 %" in Page(page(result, [])).text


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(theme):
    colours = {role: pair[theme] for role, pair in PALETTE.items()}
    texts = ["ink", "muted", "good", "bad", "unsure", "first", "second", "third"]
    ratios = {(text, ground): contrast(colours[text], colours[ground]) for text in texts for ground in ("page", "surface")}
    ratios["ink", "mark"] = contrast(colours["ink"], colours["mark"])
    assert {pair: ratio for pair, ratio in ratios.items() if ratio < 4.5} == {}


def test_the_palette_is_all_the_colours_there_are():
    lights = [light for light, _ in PALETTE.values()]
    assert len(lights) == len(set(lights))
    text = page(made_up(PASS), [])
    body = text[text.index("<body") :]
    assert re.findall(r"#[0-9a-f]{6}\b", body) == []
    assert set(re.findall(r"var\(--([a-z]+)\)", text)) <= set(PALETTE)


def test_pictures_are_small_and_few():
    noise = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (1500, 900, 3), dtype=numpy.uint8))
    whole = ((0.0, 0.0, 900.0, 1500.0),)
    disagreement = made_up(PASS).disagreements[0]
    single, many = (show_card(Card(disagreement, (noise,) * count, (whole,) * count), None) for count in (1, 32))
    assert max(single.pictures[0].width, single.pictures[0].height) <= LONGEST_SIDE
    assert len(many.pictures) == MOST_PICTURES and many.more_pictures == 32 - MOST_PICTURES
    for card in (single, many):
        assert sum(len(base64.b64decode(each.address.partition(",")[2])) for each in card.pictures) <= 1.2 * CARD_BYTES
    text = page(made_up(PASS), [Card(replace(disagreement, key=str(index)), (noise,), (whole,)) for index in range(40)])
    assert len(Page(text).all("img")) == 24
    assert len(text) < MOST_BYTES


def test_any_mode_of_picture_is_shown():
    for mode in ("L", "P", "RGBA", "1"):
        card = show_card(Card(made_up(PASS).disagreements[0], (Image.new(mode, (4000, 2)),), ((),)), None)
        data = base64.b64decode(card.pictures[0].address.partition(",")[2])
        assert Image.open(io.BytesIO(data)).size == (LONGEST_SIDE, 1)


def test_tiles_are_numbered_through_all_pictures_and_the_thumbnail_is_not_drawn():
    picture = Image.new("RGB", (200, 100))
    boxes = ((0.0, 0.0, 100.0, 100.0), (100.0, 0.0, 200.0, 100.0), (0.0, 0.0, 200.0, 100.0))
    result = made_up(PASS)
    disagreement = replace(result.disagreements[0], key=result.verdict.parts.tile.key)
    card = show_card(Card(disagreement, (picture, picture), (boxes, boxes)), replace(result.verdict.parts.tile, tile=5))
    assert [[tile.number for tile in each.tiles] for each in card.pictures] == [[1, 2], [4, 5]]
    assert [tile.worst for tile in card.pictures[1].tiles] == [False, True]
    second = card.pictures[0].tiles[1]
    assert (second.left, second.top, second.width, second.height) == ("50.000%", "0.000%", "50.000%", "100.000%")
    assert card.pictures[1].caption == "2 of 2: 200 × 100 pixels, tiles 4 and 5; tile 6 is the whole picture"


def test_differences_are_marked():
    assert mark_differences("12.50", "12.80") == (
        (("12.", False), ("5", True), ("0", False)),
        (("12.", False), ("8", True), ("0", False)),
    )
    assert mark_differences("", "a") == ((), (("a", True),))
    long = "one two three " * 40
    marked, _ = mark_differences(long + "four", long + "five")
    assert marked == ((long, False), ("four", True))
    endless, _ = mark_differences("a " * 5000, "b " * 5000)
    assert sum(len(text) for text, _ in endless) < MOST_CHARACTERS + 40
    assert endless[-1] == (f" … and {10000 - MOST_CHARACTERS:,} more characters", False)
    looped, _ = mark_differences("so " + "the a " * 400 + "end", "so " + "a the " * 300 + "end")
    assert looped[0] == ("so ", False) and any(apart for _, apart in looped)


def test_bars_are_cut_at_the_scale_and_say_so():
    found = bar(made_up(FAIL).verdict.difference, 0.015, 0.06)
    assert found.cut_low and not found.cut_high
    assert found.low == "0.00%" and found.margin == "37.50%"
    assert [round_up(share) for share in (0, 0.0123, 0.2, 3)] == [pytest.approx(each) for each in (1e-4 * 1, 0.015, 0.25, 1)]


def test_bins_have_places_and_ticks():
    edges = [0, 0.001, 0.01, 0.1, 1]
    bins = [HistogramBin(low, high, 1) for low, high in zip(edges, edges[1:], strict=False)]
    assert place_in(bins, 0.0005) == pytest.approx(0.5)
    assert place_in(bins, 0.1) == pytest.approx(3)
    assert place_in(bins, 5) is None
    assert edge_ticks(bins, most=9) == {0: "0", 1: "0.001", 2: "0.01", 3: "0.1", 4: "1"}
