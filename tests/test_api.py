"""The examples in the docstrings of what is useful alone."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["fwm.ops", "fwm.layers"])
def test_examples(module):
    failed, attempted = doctest.testmod(importlib.import_module(module))
    assert failed == 0
    assert attempted >= 7
