from helpers.notebook.tables import markdown


def test_numbers_stand_to_the_right_and_what_is_missing_is_a_dash():
    rows = [{"net": "a|b", "cycles": 12345, "ms": 0.0123456}, {"net": "c", "cycles": None, "ms": None}]
    assert markdown(rows).splitlines() == [
        "| net | cycles | ms |",
        "| --- | ---: | ---: |",
        "| a\\|b | 12,345 | 0.01235 |",
        "| c | – | – |",
    ]
