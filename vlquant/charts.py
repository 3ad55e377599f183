"""Charts of a check's result as SVG for inside a page, whose colours they take. Only this module draws with matplotlib."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from vlquant.check_result import HistogramBin, LayerErrors
from vlquant.check_words import CLASS_WORDS, visible

PALETTE = {
    "page": ("#f6f6f4", "#121417"),
    "surface": ("#ffffff", "#1b1e22"),
    "ink": ("#1b1d21", "#e7e9ec"),
    "muted": ("#565c64", "#a5acb5"),
    "line": ("#d6d9dd", "#3a4048"),
    "good": ("#17693b", "#72cf9a"),
    "bad": ("#b01e1e", "#ff8d83"),
    "unsure": ("#7d5100", "#e6b455"),
    "first": ("#1e5fb0", "#7fb3ff"),
    "second": ("#ad450c", "#ff9f70"),
    "third": ("#6a3da1", "#c9a3ff"),
    "mark": ("#ffe7a3", "#5c4700"),
}
"""Colours by role, for a light page and for a dark one; no two of the light ones are equal, since charts are drawn in these."""

SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vlquant",
    # A name with two dollar signs is no formula.
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 12,
    "axes.labelsize": 12,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.fontsize": 12,
    "axes.linewidth": 1,
    "axes.unicode_minus": True,
    "xtick.major.width": 1,
    "ytick.major.width": 1,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    **dict.fromkeys(["axes.edgecolor", "xtick.color", "ytick.color", "axes.labelcolor"], PALETTE["muted"][0]),
    **dict.fromkeys(["text.color"], PALETTE["ink"][0]),
}
SERIES = (("first", "-", "o"), ("second", "--", "s"), ("third", "-.", "^"))
"""Colour, line and marker: each alone tells the series apart."""
MOST_MARKERS = 16
"""With more points than this not each gets a marker."""
MOST_LETTERS = 24
"""Of a class of tokens that nobody here knows."""


@dataclass(frozen=True)
class Chart:
    """The same chart twice, for letters stay readable only if a small page does not shrink a large drawing."""

    wide: str
    narrow: str


@dataclass(frozen=True)
class Mark:
    """A value named in a histogram."""

    label: str
    value: float
    role: str


def histogram_chart(bins: Sequence[HistogramBin], marks: Sequence[Mark]) -> Chart:
    """Share of answer tokens by divergence, bins equally wide; `marks` are lines across."""
    filled = [index for index, each in enumerate(bins) if each.tokens]
    shown = bins[filled[0] : filled[-1] + 1]
    total = sum(each.tokens for each in shown)

    def draw(axes: Axes, narrow: bool) -> None:
        shares = [100 * each.tokens / total for each in shown]
        axes.bar(range(len(shown)), shares, width=0.92, align="edge", color=PALETTE["first"][0])
        axes.set_xlim(-0.15, len(shown) + 0.1)
        axes.set_ylim(0, 1.3 * max(shares))
        ticks = edge_ticks(shown, most=5 if narrow else 9)
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_xlabel("KL divergence of a token in nats")
        axes.set_ylabel("share of tokens, %")
        places = [(place_in(shown, each.value), each) for each in marks]
        draw_marks(axes, sorted(((place, mark) for place, mark in places if place is not None), key=lambda each: each[0]))

    return drawn("histogram", draw)


def draw_marks(axes: Axes, places: Sequence[tuple[float, Mark]]) -> None:
    """Lines across at places that ascend, their names below one another and, where there is room, apart."""
    surface, width = PALETTE["surface"][0], axes.get_xlim()[1]
    for rank, (place, mark) in enumerate(places):
        colour, left = PALETTE[mark.role][0], place > (0.65 if rank == len(places) - 1 else 0.3) * width
        halo = [withStroke(linewidth=4, foreground=surface)]
        axes.axvline(place, color=colour, linestyle="--" if mark.role == "bad" else "-", linewidth=1.6, path_effects=halo)
        name = axes.annotate(
            mark.label,
            (place, 0.985 - 0.1 * rank),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-7 if left else 7, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top",
            color=colour,
            bbox={"facecolor": surface, "edgecolor": "none", "pad": 1.5},
        )
        name.set_in_layout(False)


def edge_ticks(bins: Sequence[HistogramBin], *, most: int) -> dict[int, str]:
    """Labels of the edges that are 0 or powers of ten, thinned to about `most`."""
    edges = [each.low for each in bins] + [bins[-1].high]
    powers = {place: exponent(edge) for place, edge in enumerate(edges) if exponent(edge) is not None}
    step = math.ceil(len(powers) / most) if powers else 1
    labels = {place: power_text(power) for place, power in powers.items() if power % step == 0}
    return labels if edges[0] > 0 else {0: "0", **labels}


def exponent(value: float) -> int | None:
    """The exponent of a power of ten; None if the value is none."""
    if value <= 0:
        return None
    power = round(math.log10(value))
    return power if math.isclose(value, 10.0**power, rel_tol=1e-6) else None


def power_text(power: int) -> str:
    """A power of ten as one reads it."""
    if -3 <= power <= 3:
        return f"{10.0**power:g}"
    return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def place_in(bins: Sequence[HistogramBin], value: float) -> float | None:
    """Where a value lies along equally wide bins; None outside of them."""
    for index, each in enumerate(bins):
        if each.low <= value < each.high:
            if each.low <= 0:
                return index + value / each.high
            return index + math.log(value / each.low) / math.log(each.high / each.low)
    return None


def layer_chart(layers: Sequence[LayerErrors]) -> Chart:
    """Relative error of every layer's linears, one line for each class of token and one for all of them."""
    names = class_names(layers)

    def draw(axes: Axes, narrow: bool) -> None:
        places = [each.layer for each in layers]
        every = math.ceil(len(layers) / (MOST_MARKERS / 2 if narrow else MOST_MARKERS))
        for index, name in enumerate(names):
            role, line, marker = SERIES[index % len(SERIES)]
            errors = [percent_or_gap(each.class_errors.get(name)) for each in layers]
            look = {"color": PALETTE[role][0], "linestyle": line, "marker": marker}
            axes.plot(places, errors, markersize=4.5, markevery=every, label=class_word(name), **look)
        overall = [percent_or_gap(each.error) for each in layers]
        look = {"linestyle": ":", "label": "all tokens"} if names else {"linestyle": "-", "marker": "o", "label": "all weights"}
        axes.plot(places, overall, color=PALETTE["ink"][0], markersize=4.5, markevery=every, **look)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if narrow else 12))
        axes.set_xlabel("layer of the language model")
        axes.set_ylabel(f"relative error of {'outputs' if names else 'weights'}, %")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2 if narrow else 4, borderaxespad=0.2, handlelength=2.6)

    return drawn("layers", draw)


def class_names(layers: Sequence[LayerErrors]) -> list[str]:
    """Classes of tokens of which some layer has an error: the known ones first."""
    found = {name for each in layers for name, error in each.class_errors.items() if error is not None}
    return [name for name in CLASS_WORDS if name in found] + sorted(found - set(CLASS_WORDS))


def class_word(name: str) -> str:
    """A class of tokens in words."""
    return CLASS_WORDS.get(name, visible(name)[:MOST_LETTERS])


def percent_or_gap(error: float | None) -> float:
    """A percentage, or what leaves a gap in a line."""
    return math.nan if error is None else 100 * error


def drawn(name: str, draw: Callable[[Axes, bool], None]) -> Chart:
    """What `draw` puts on axes, wide and narrow; `name` begins the ids inside."""
    sizes = {"wide": (14, 4.8), "narrow": (4.6, 4.2)}
    return Chart(**{form: svg(f"{name}-{form}", size, lambda axes: draw(axes, form == "narrow")) for form, size in sizes.items()})


def svg(name: str, size: tuple[float, float], draw: Callable[[Axes], None]) -> str:
    """One drawing as an element of a page; the same on every machine, whatever its owner set for matplotlib."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        figure = Figure(size, layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="y", color=PALETTE["line"][0], linewidth=1)
        axes.set_axisbelow(True)
        draw(axes)
        written = io.StringIO()
        nothing = dict.fromkeys(["Date", "Creator", "Format", "Type"])
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    return for_a_page(written.getvalue(), name)


def for_a_page(text: str, name: str) -> str:
    """A file of matplotlib's as an element of a page: no rules or ids that reach beyond it, colours by their roles."""
    roles = {light: f"var(--{role})" for role, (light, _) in PALETTE.items()}
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in [child for child in parent if local(child.tag) in ("style", "metadata")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = local(element.tag)
        element.text = element.text and element.text.strip()
        element.tail = None
        element.attrib = {local(key): page_value(element.tag, local(key), value, name) for key, value in element.attrib.items()}
        if element.tag in ("g", "svg"):
            element.attrib.pop("id", None)
    root.attrib = {"viewBox": root.attrib["viewBox"], "aria-hidden": "true", "focusable": "false"}
    return themed(ElementTree.tostring(root, encoding="unicode"), roles)


def local(name: str) -> str:
    """A name without its namespace."""
    return name.rpartition("}")[2]


def page_value(tag: str, key: str, value: str, name: str) -> str:
    """An attribute's value with ids that nothing else in the page has, and with the page's own font."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return f"#{name}-{value.removeprefix('#')}"
    if tag == "text" and key == "style":
        return re.sub(r"font-family:[^;]*;?\s*|font: [^;]*?(?=[\d.]+px)", "", value)
    return " ".join(value.replace("url(#", f"url(#{name}-").split())


def themed(text: str, roles: Mapping[str, str]) -> str:
    """The text with each colour replaced by its role."""
    return re.sub("|".join(roles), lambda found: roles[found[0]], text)
