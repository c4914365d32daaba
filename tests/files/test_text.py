"""Tests that text from a file does no harm on a terminal, in a log and in a spreadsheet."""

import time

import pytest

from lightning_dist.files.card import Card
from lightning_dist.files.text import MOST_IN_A_LINE, csv_cell, error_line, printable


@pytest.mark.parametrize(
    "text", ["\x1b[2J", "\x9b2J", "a\rb", "\x07", "\u202ereversed", "\ud800", "\x00"]
)
def test_what_a_terminal_would_execute_is_escaped(text):
    shown = printable(text)
    assert shown.isprintable()
    assert shown.isascii()


def test_other_text_is_not_changed():
    text = "Löwe, 狮子, 🦁 = 'lion' (100 %)"
    assert printable(text) == text
    assert csv_cell(text) == text


def test_a_long_text_is_cut_in_the_middle_and_fast():
    text = "start" + "\x1b" * 50_000_000 + "end"
    begin = time.monotonic()
    shown = error_line(text)
    assert time.monotonic() - begin < 2
    assert shown.startswith("start")
    assert shown.endswith("end")
    assert len(shown) < 5 * MOST_IN_A_LINE


def test_an_error_is_one_line_with_its_type():
    assert error_line(ValueError("a\n  b")) == "ValueError: a b"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r=", " =", "\uff1d", "\uff0d"])
def test_a_formula_is_text_in_a_spreadsheet(start):
    cell = f'{start}HYPERLINK("http://x","y")'
    assert csv_cell(cell) == "'" + printable(cell)


@pytest.mark.parametrize("text", ["\x1b[2J", "\x9b2J", "a\rb", "\ud800", "\x7f"])
def test_a_cell_has_no_control_characters(text):
    assert csv_cell(text) == printable(text)


def test_a_name_of_a_file_is_the_same_in_a_cell():
    """Screenshots of macOS have a narrow no-break space in their names."""
    name = "12.00.00\u202fPM \u3000 é.png"
    assert csv_cell(name) == name


@pytest.mark.parametrize("value", [-1.5, "-1.5", "+3", "1e-3", "-inf", None, 7, "a=b", ""])
def test_numbers_and_plain_text_are_not_changed(value):
    assert csv_cell(value) == value


def test_a_card_from_a_file_is_described_in_printable_text():
    line = Card(source="\x1b[2J" * 10_000, origin="run").describe()
    assert line.isprintable()
    assert len(line) < 3000
