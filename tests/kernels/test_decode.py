"""Decoding rows of codes, and the measure of what rounding costs: numbers that are none must not hide the others."""

import math

import pytest
import torch
from coded_matrices import LAYOUTS, entries_of, to_torch
from independent_codec import decode, random_tensor
from numpy.random import default_rng
from small_checkpoints import small_config, small_tensors, write_small

from saccade.checkpoint.coding import Coding, find_coding
from saccade.checkpoint.encoding import ENCODINGS
from saccade.checkpoint.index import read_index
from saccade.checkpoint.read import read_tensors
from saccade.weights.dequantize import decode_rows, measure_rounding

RULES = {rule.value + rule.tensors[0].dtype: rule for layout in LAYOUTS.values() for rule in layout.rules if rule.value}


@pytest.mark.parametrize("form", sorted(RULES))
def test_any_rows_and_columns_are_those_of_the_whole_matrix(form: str) -> None:
    rule, shape = RULES[form], (200, 328)
    raw = {t.leaf: random_tensor(t, shape, rule, default_rng(0)) for t in rule.tensors}
    coding = find_coding("weight", entries_of(raw), shape)
    assert isinstance(coding, Coding) and coding.encoding in ENCODINGS
    codes, partners = to_torch(raw[coding.codes]), [to_torch(raw[name]) for name in coding.partners]
    expected = torch.from_numpy(decode(rule, raw, shape))
    for top, bottom, left, right in ((0, 200, 0, 328), (130, 131, 0, 328), (7, 150, 129, 131), (199, 200, 3, 4)):
        found = decode_rows(coding, codes[top:bottom], partners, top, (left, right))
        assert found.equal(expected[top:bottom, left:right]), (top, left)
    assert decode_rows(coding, codes[3:5], partners, 3).equal(expected[3:5])


def test_the_largest_rounding_is_that_of_the_numbers_that_are_finite() -> None:
    numbers = torch.tensor([1.0, 1.0 + 2**-9, -3.0, 0.0])
    expected = (2**-9) / (1 + 2**-9)
    for more in ((), (math.nan,), (math.inf,), (-math.inf, math.nan, 0.0)):
        exact = torch.cat([numbers, torch.tensor(more)])
        assert measure_rounding(exact, exact.bfloat16()) == pytest.approx(expected, rel=1e-6), more
    for exact in (torch.tensor([1.0, math.nan]), torch.zeros(3), torch.tensor([0.5, 2.0**100])):
        assert measure_rounding(exact, exact.bfloat16()) == 0


def test_a_number_that_overflows_is_rounded_without_bound() -> None:
    exact = torch.tensor([1.0, 3.4e38])
    assert exact.bfloat16()[1].isinf() and measure_rounding(exact, exact.bfloat16()) == math.inf


@pytest.mark.parametrize("buffer", [100, 4 << 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_whole_tensors_are_read_as_they_are(tmp_path, buffer: int, threads: int) -> None:
    tensors = dict(list(small_tensors(small_config()).items())[:6])
    tensors |= {"scalar": torch.tensor(7.0), "nothing": torch.zeros(0, 3, dtype=torch.bfloat16)}
    index = read_index(write_small(tmp_path, small_config(), tensors))
    told = []
    found = read_tensors(index, tensors, threads, buffer, told.append)
    assert list(found) == list(tensors) and sum(told) == sum(t.nbytes for t in tensors.values())
    for name, t in tensors.items():
        same = found[name].dtype == t.dtype and found[name].shape == t.shape
        assert same and found[name].view(-1).view(torch.uint8).equal(t.reshape(-1).view(torch.uint8)), name
