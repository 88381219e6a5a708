"""Signed scales: symmetric, robust to giants, and with ticks that say powers of ten."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hesscope.figures.numbers import number, share, with_error
from hesscope.figures.scales import array, limit, magnitude_norm, signed_norm, threshold, ticks
from hesscope.figures.style import MAGNITUDE, SIGNED

SAMPLES = {
    "wide": np.random.default_rng(0).standard_normal(500) * 10.0 ** np.random.default_rng(1).uniform(-9, 3, 500),
    "negative only": -np.arange(1.0, 50.0),
    "zeros": np.zeros(9),
    "one": np.array([3e-7]),
    "not finite": np.array([1.0, np.nan, -np.inf, 0.0]),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_limits_are_symmetric_and_zero_is_white(name: str) -> None:
    norm = signed_norm(SAMPLES[name])
    assert norm.vmin == -limit(SAMPLES[name])
    assert norm.vmax == limit(SAMPLES[name])
    assert SIGNED(float(norm(0.0))) == (1.0, 1.0, 1.0, 1.0)
    assert MAGNITUDE(float(magnitude_norm(SAMPLES[name])(0.0))) == (1.0, 1.0, 1.0, 1.0)


def test_opposite_numbers_get_mirrored_places() -> None:
    norm = signed_norm(SAMPLES["wide"])
    x = np.array([1e-6, 0.01, 1.0, 100.0])
    assert np.allclose(norm(x) - 0.5, 0.5 - norm(-x))


def test_the_threshold_ignores_a_giant_and_a_cloud_of_rounding() -> None:
    assert threshold(np.array([*[1.0] * 99, 1e3])) == 1.0
    assert threshold(np.array([*[1e-12] * 99, 1.0])) == 1e-4
    assert threshold(np.array([0.0, 2.0, -2.0])) == pytest.approx(0.2)


def test_ticks_are_few_symmetric_powers_of_ten() -> None:
    places, labels = ticks(1e-4, 0.5)
    assert places == [-v for v in places[::-1]]
    assert 0.0 in places
    assert len(places) <= 7
    assert labels[-1] == "0.1"
    assert labels[0] == "\N{MINUS SIGN}0.1"
    assert ticks(0.05, 0.09)[0] == [-0.09, 0.0, 0.09]


def test_half_precision_becomes_an_array() -> None:
    assert array(torch.tensor([1.5], dtype=torch.bfloat16)).tolist() == [1.5]


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (6.98294, 0.3712, "6.98 ± 0.37"),
        (-662.2, 46.0, "−662 ± 46"),
        (1234.5, 130.0, "1234 ± 130"),
        (6.98e-7, 3.7e-8, "(6.98 ± 0.37)e−7"),
        (2.0, 0.0, "2.000 ± 0"),
        (2.0, float("inf"), "2.000 ± ∞"),
    ],
)
def test_a_value_has_the_digits_that_its_error_allows(value: float, error: float, text: str) -> None:
    assert with_error(value, error) == text


def test_numbers_in_words() -> None:
    assert number(10.0444, 3) == "10.0"
    assert number(-100.0, 3) == "−100"
    assert number(3000.0, 3) == "3000"
    assert number(3e7, 3) == "3.00e+07"
    assert number(99.96, 3) == "100"
    assert number(-0.0) == "0"
    assert number(float("-inf")) == "−∞"
    assert [share(p) for p in (0.0, 0.001, 0.42, 0.999, 1.0)] == ["0%", "<1%", "42%", ">99%", "100%"]
