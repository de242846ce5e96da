"""The parameter counts of the papers' sizes, against numbers computed apart from this code."""

import pytest

from lazypipe.model.config import parameter_count
from lazypipe.model.sizes import SIZES, size_row

# non-embedding, tied, untied, what lazy with W = 512 adds
EXPECTED = {
    "70M": (25_172_480, 50_928_128, 76_683_776, 24_624),
    "160M": (113_265_408, 151_898_880, 190_532_352, 73_872),
    "500M": (390_900_608, 435_972_992, 481_045_376, 172_368),
    "1.7B": (1_526_850_560, 1_629_873_152, 1_732_895_744, 229_824),
    "340M": (308_331_520, 341_099_520, 373_867_520, 196_992),
    "760M": (679_552_512, 728_704_512, 777_856_512, 196_992),
}
MATCHED = ("taylor", "gating", "random_qk", "text_qk", "static_qk")


def test_every_size_is_listed() -> None:
    assert list(SIZES) == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_parameters_of_a_size(name: str) -> None:
    row = size_row(name)
    assert (row["non_embedding"], row["tied"], row["untied"], row["lazy_adds"]) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_mechanisms_of_a_size_are_matched_within_a_thousandth(name: str) -> None:
    size = SIZES[name]
    standard = parameter_count(size.model(), size.vocab_size)
    for mixer in (*MATCHED, "mlp", "lazy", "sink"):
        difference = parameter_count(size.model(mixer=mixer), size.vocab_size) - standard
        assert abs(difference) < 0.001 * standard
        assert difference == 0 or mixer not in MATCHED
        if mixer == "mlp" and not size.qk_norm:
            assert abs(difference) <= size.num_layers * size.hidden_size
