import pytest

from fairseq_softtopk.schedules import Schedule


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("constant", [0.8, 0.8, 0.8, 0.8, 0.8]),
        ("linear", [0.8, 0.65, 0.5, 0.2, 0.2]),
        ("exponential", [0.8, 0.8 * 0.25**0.25, 0.4, 0.2, 0.2]),
    ],
)
def test_goes_from_start_to_end_and_stays(kind, expected):
    schedule = Schedule("--x", 0.8, 0.2, 0 if kind == "constant" else 100, kind)
    assert [schedule.at(n) for n in (0, 25, 50, 100, 1000)] == pytest.approx(expected)
    assert schedule.at(None) == expected[-1]  # of a model that is not training any more
    assert schedule.at(-5) == expected[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1.0, 0.5, 10, "cosine"), "--x-schedule must be one of constant, linear, exponential, got cosine"),
        ((1.0, 0.5, 10, "constant"), "--x-updates must be 0 without a --x-schedule, got 10"),
        ((1.0, 0.5, 0, "linear"), "--x-updates must be at least 1 with --x-schedule linear, got 0"),
        ((1.0, 0.0, 9, "exponential"), "--x and --x-end must be positive .* exponential, got 1.0 and 0.0"),
    ],
)
def test_bad_settings_name_the_option(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule("--x", *arguments)
