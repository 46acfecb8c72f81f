"""The cases of a day: what is drawn, and when."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

from conftest import ROOT
from drawing import draw

ITEMS = [
    SimpleNamespace(callspec=SimpleNamespace(indices={"mask": mask, "func_d": func_d, "fused": fused}))
    for mask, func_d, fused in itertools.product(range(5), range(3), range(2))
]


def drawn(day: int, **options: int) -> list[int]:
    return [ITEMS.index(item) for item in draw(ITEMS, f"day {day}", **options)]


def test_each_value_of_each_parameter_is_there():
    for day in range(100):
        chosen = drawn(day)
        assert 5 <= len(chosen) <= 8
        for name, count in (("mask", 5), ("func_d", 3), ("fused", 2)):
            assert {ITEMS[index].callspec.indices[name] for index in chosen} == {*range(count)}


def test_a_number_of_cases():
    for cases in (1, 4, 12, 30, 99):
        assert len({*drawn(1, cases=cases)}) == min(cases, len(ITEMS))
    # Those that bring a new value come first.
    assert drawn(1, cases=12)[: len(drawn(1))] == drawn(1)


def test_each_case_has_its_day():
    assert {index for day in range(100) for index in drawn(day, cases=4)} == {*range(len(ITEMS))}
    assert drawn(1, cases=4) == drawn(1, cases=4)
    assert len({tuple(drawn(day, cases=4)) for day in range(20)}) == 20


def test_all_on_one_day_of_some():
    days = [drawn(day, days=3) for day in range(300)]
    assert all(each in ([], [*range(len(ITEMS))]) for each in days)
    assert 70 < sum(map(bool, days)) < 130
    some = [drawn(day, days=3, cases=4) for day in range(300)]
    assert [len(each) for each in some] == [4 * bool(each) for each in days]


def test_which_cases_run(python):
    code = f"""import sys, pytest
sys.path.insert(0, {str(ROOT / "tests")!r})
import drawing

@pytest.mark.drawn(cases=3)
@pytest.mark.parametrize("x", range(9))
def test(x): pass

if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]], [drawing]))
"""
    assert "3 passed, 6 deselected" in python(code=code).stdout
    assert "9 passed" in python("-k", "test", code=code).stdout
    assert "9 passed" in python("--cases", "all", code=code).stdout
