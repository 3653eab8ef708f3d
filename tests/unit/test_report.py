"""The HTML report: structure, escaping, self-containedness."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import OutputError
from bitwright.report.page import Page, Section, render_page, write_page
from bitwright.report.plots import DECADES, MAX_BARS, MAX_LABEL, bar_chart, shortened
from bitwright.table import Column, Table

NAME, LOSS, PRECISION = (
    Column("name", "operator"),
    Column("loss", "loss", "", 6),
    Column("precision", "precision"),
)


def losses(*numbers: float | None, precision: str = "int8") -> Table:
    rows = [{"name": f"op{i}", "loss": x, "precision": precision} for i, x in enumerate(numbers)]
    return Table("Losses", (NAME, LOSS, PRECISION), tuple(rows))


class Outline(HTMLParser):
    """Counts elements, collects text by element and every attribute, and checks that tags are balanced."""

    VOID = frozenset({"meta", "link", "br", "img", "rect", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.opened == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.opened.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.opened and data.strip():
            self.texts.setdefault(self.opened[-1], []).append(data.strip())


def outline(*sections: Section, title: str = "Bitwright: net", subtitle: str = "target x") -> Outline:
    return Outline(render_page(Page(title, subtitle, sections)))


def test_a_page_holds_every_section_with_its_table_chart_and_note() -> None:
    found = outline(
        Section(losses(0.5, 0.25), bar=("name", "loss"), note="measured on 30"), Section(losses(1.0))
    )

    assert found.texts["h1"] == ["Bitwright: net"]
    assert found.texts["h2"] == ["Losses", "Losses"]
    assert found.texts["p"] == ["target x", "measured on 30"]
    assert (found.tags.count("table"), found.tags.count("figure"), found.tags.count("rect")) == (2, 1, 2)
    assert found.texts["td"] == [
        "op0",
        "0.500000",
        "int8",
        "op1",
        "0.250000",
        "int8",
        "op0",
        "1.000000",
        "int8",
    ]


def test_text_is_escaped_wherever_it_comes_from() -> None:
    evil = "<script>alert('x')</script>\" onload=\"evil"
    rows = ({"name": evil, "loss": 0.5, "precision": evil},)
    table = Table(evil, (Column("name", evil, evil), LOSS, PRECISION), rows)

    found = outline(Section(table, bar=("name", "loss"), note=evil), title=evil, subtitle=evil)

    assert found.tags.count("script") == 1
    assert not any(name.startswith("on") for _, name, _ in found.attributes)
    assert found.texts["h1"] == [evil]
    assert found.texts["h2"] == [evil]
    assert evil in found.texts["td"]


def test_a_page_needs_no_other_file_and_no_network() -> None:
    text = render_page(Page("t", "s", (Section(losses(0.5), bar=("name", "loss")),)))

    assert not re.search(r"https?://|//cdn|@import|url\(", text)
    assert not any(name in ("src", "href", "srcset") for _, name, _ in Outline(text).attributes)
    assert len(text) < 30_000


def test_an_empty_table_is_said_to_be_empty() -> None:
    found = outline(Section(Table("Nothing", (NAME, LOSS), ()), bar=("name", "loss")))

    assert "table" not in found.tags
    assert "figure" not in found.tags
    assert found.texts["p"][-1] == "No rows."


def test_a_page_without_sections_is_whole() -> None:
    assert outline().texts["h1"] == ["Bitwright: net"]


def test_numbers_are_aligned_to_the_right_and_sorted_by_their_full_value() -> None:
    found = outline(Section(losses(0.123456789, None)))

    cells = [(name, value) for tag, name, value in found.attributes if tag == "td"]
    assert [c for c in cells if c != ("class", "short")] == [
        ("class", "number"),
        ("data-sort", "0.123456789"),
        ("class", "number"),
        ("data-sort", ""),
    ]


def test_only_long_texts_are_broken_into_lines() -> None:
    """A remedy of five words took five lines beside columns of numbers."""
    rows = ({"name": "range of the data only, 12 segments"}, {"name": "a long reason " * 5})
    cells = outline(Section(Table("t", (NAME,), rows))).attributes

    assert [value for tag, _, value in cells if tag == "td"] == ["short"]


def test_a_column_of_words_and_numbers_is_text() -> None:
    rows = ({"name": "all"}, {"name": 3})
    assert ("td", "class", "number") not in outline(Section(Table("t", (NAME,), rows))).attributes


def test_float_operators_have_a_colour_of_their_own() -> None:
    table = Table(
        "t",
        (NAME, LOSS, PRECISION),
        ({"name": "a", "loss": 2.0, "precision": "float"}, {"name": "b", "loss": 1.0, "precision": "int8"}),
    )
    found = outline(Section(table, bar=("name", "loss")))

    assert [v for t, n, v in found.attributes if (t, n) == ("rect", "class")] == ["p-float", "p-int8"]
    assert found.texts["span"][1:3] == ["float", "int8"]


def test_many_rows_give_the_largest_bars_only() -> None:
    chart = bar_chart(losses(*(float(i) for i in range(100))), "name", "loss")

    assert len(chart.bars) == MAX_BARS
    assert chart.omitted == 100 - MAX_BARS
    assert [b.label for b in chart.bars[:2]] == ["op99", "op98"]


@pytest.mark.parametrize("cell", [None, float("nan"), float("inf"), "text", True])
def test_rows_without_a_finite_number_have_no_bar(cell: object) -> None:
    chart = bar_chart(Table("t", (NAME, LOSS), ({"name": "a", "loss": cell},)), "name", "loss")

    assert chart.bars == ()
    assert chart.omitted == 1


def test_lengths_are_shares_of_the_largest_and_of_its_decades() -> None:
    chart = bar_chart(losses(1.0, 0.1, 0.01, 0.0, -1.0), "name", "loss")

    assert [b.linear for b in chart.bars] == pytest.approx([100, 10, 1, 0, 0])
    assert [b.logarithmic for b in chart.bars] == pytest.approx([100, 50, 0, 0, 0])


def test_the_logarithmic_axis_ends_some_decades_below_the_largest() -> None:
    chart = bar_chart(losses(1.0, 1e-3, 1e-30), "name", "loss")

    assert [b.logarithmic for b in chart.bars] == pytest.approx([100, 100 * (DECADES - 3) / DECADES, 0])


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=60))
def test_bars_of_any_numbers_lie_in_the_chart(numbers: list[float]) -> None:
    chart = bar_chart(losses(*numbers), "name", "loss")

    assert all(0 <= length <= 100 for b in chart.bars for length in (b.linear, b.logarithmic))
    assert len(chart.bars) + chart.omitted == len(numbers)


def test_writing_leaves_only_the_page(tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", Page("t", "", ()))

    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_page_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"report\.html: expected a place that can be written to"):
        write_page(tmp_path / "file" / "report.html", Page("t", "", ()))


def test_long_labels_lose_their_middle_and_still_differ() -> None:
    """Names that differ in their first part, in a number in the middle, or in their last part alone looked alike."""
    attention = "self_attention._generated_scaled_dot_product_attention_0"
    ends = [f"blocks.{i}.{attention}.{part}" for i in (1, 3) for part in ("mask", "softmax")]
    middles = [f"encoder.layers.encoder_layer_{i}.{attention}" for i in range(12)]
    for names in (ends, middles):
        short = shortened([*names, "conv1"])
        assert len(set(short)) == len(names) + 1
        assert {len(s) for s in short[:-1]} == {MAX_LABEL}
        assert short[-1] == "conv1"
        assert all(n.startswith(s.split("…")[0]) for n, s in zip(names, short, strict=False))
        assert all(n.endswith(s.split("…")[1]) for n, s in zip(names, short, strict=False))
    alike = [f"{'a' * 40}{i}{'b' * 40}" for i in range(3)]
    short_of_end = f"{ends[0][:33]}…{ends[0][-8:]}"
    assert shortened([*alike, ends[0]]) == [*alike, short_of_end]


def test_cells_of_tables_are_not_hidden_with_labels() -> None:
    """`.short` is also the class of short cells, which vanished on narrow screens."""
    page = render_page(Page("t", "", (Section(losses(0.5), ("name", "loss")),)))
    hiding = re.findall(r"([^{}]*)\{\s*display:\s*none;?\s*\}", page)
    rules = [rule.strip() for rules in hiding for rule in rules.split(",")]
    assert {".label .short", ".label .whole"} <= set(rules)
    assert not {".short", ".whole"} & set(rules)
