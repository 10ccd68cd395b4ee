"""Tables fit the width of a terminal, and lose settings before results, whole columns before
characters.
"""

import io

from rich.console import Console

from egtrain.tables import Column, print_line, print_table, table_lines

COLUMNS = [
    Column("preset", ["resnet-sgd", "resnet-sgd", "resnet-eg"], left=True),
    Column("K", ["1", "16", "16"], leave_out=2),
    Column("rate", ["0.1", "1.6", "1.6"], leave_out=1),
    Column("test accuracy", ["91.25 ± 0.12 %", "90.00 %", "–"]),
    Column("steps to 90 %", ["1,000", "100", "90"]),
]


def test_a_table_with_room_has_each_title_on_one_line() -> None:
    for width in (None, 60):
        assert table_lines(COLUMNS, width) == [
            "preset       K  rate   test accuracy  steps to 90 %",
            "resnet-sgd   1   0.1  91.25 ± 0.12 %          1,000",
            "resnet-sgd  16   1.6         90.00 %            100",
            "resnet-eg   16   1.6               –             90",
        ]


def test_titles_fold_between_words_before_anything_is_left_out() -> None:
    assert table_lines(COLUMNS, 43) == [
        "                                      steps",
        "                                         to",
        "preset       K  rate   test accuracy   90 %",
        "resnet-sgd   1   0.1  91.25 ± 0.12 %  1,000",
        "resnet-sgd  16   1.6         90.00 %    100",
        "resnet-eg   16   1.6               –     90",
    ]


def test_columns_are_left_out_in_order_of_worth_and_named() -> None:
    lines = table_lines(COLUMNS, 40)
    assert lines[-1] == "(no room for K)"
    assert [line.split()[-1] for line in lines[-4:-1]] == ["1,000", "100", "90"]
    assert "rate" in "".join(lines)
    assert table_lines(COLUMNS, 35)[-1] == "(no room for K, rate)"


def test_names_stand_above_their_rows_where_there_is_no_room_beside_them() -> None:
    lines = table_lines(COLUMNS, 24)
    assert lines[-6:] == [
        "resnet-sgd",
        "91.25 ± 0.12 %  1,000",
        "       90.00 %    100",
        "resnet-eg",
        "             –     90",
        "(no room for K, rate)",
    ]
    assert max(map(len, lines)) <= 24


def test_a_terminal_gets_lines_of_its_width_and_a_file_all_there_is() -> None:
    words = "nine words that are longer than the line is"
    for terminal, first, said in (
        (True, "(no room for K, rate)", "nine words that are longer than the\nline is\n"),
        (False, "resnet-eg   16   1.6               –             90", f"{words}\n"),
    ):
        written = io.StringIO()
        console = Console(file=written, width=35, force_terminal=terminal, color_system=None)
        print_table(COLUMNS, console)
        assert written.getvalue().splitlines()[-1] == first
        written.seek(0)
        written.truncate()
        print_line(words, console)
        assert written.getvalue() == said
