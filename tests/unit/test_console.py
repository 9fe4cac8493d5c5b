from mimscale.console import print_table


def test_square_brackets_are_printed_as_they_are(capsys):
    print_table("a [quick] try", ["name [of it]", "times"], [["[bold]", "0.50 [at most 0.85, unknown]"]])
    shown = capsys.readouterr().err
    for text in ("a [quick] try", "name [of it]", "[bold]", "0.50 [at most 0.85, unknown]"):
        assert text in shown
