"""Tables of what can be chosen by name."""

import pytest

from fwm.errors import UserError
from fwm.registry import Table, recording, remembered


def test_a_recorded_entry_may_be_made_again_but_replaces_none_of_fwms_own():
    table = Table("rule_of_this_test")
    table["sum"] = 1
    for value in (2, 3):
        with recording() as entries:
            table["mine"] = value
        assert (entries, table["mine"]) == (["rule_of_this_test=mine"], value)
    with recording(), pytest.raises(UserError, match="rule_of_this_test sum is one of fwm's own"):
        table["sum"] = 4
    assert table["sum"] == 1
    with pytest.raises(UserError, match="unknown rule_of_this_test 'max': expected one of sum, m"):
        table["max"]
    assert (table.get("max"), table.get("sum", 0)) == (None, 1)


def test_what_is_remembered_of_names_is_forgotten_when_they_mean_something_else():
    table, calls = Table("rule_of_this_test"), []
    compiled = remembered(lambda name: calls.append(name) or table.get(name))
    table["mine"] = 1
    assert [compiled("mine"), compiled("mine"), calls] == [1, 1, ["mine"]]
    table["mine"] = 2
    assert compiled("mine") == 2
    del table["mine"]
    assert compiled("mine") is None
