"""Every case of the fault suite, few times: nothing is lost, nothing goes wrong. ``python -m tests.faults``
does the same by hand, and more often.
"""

from pathlib import Path

import pytest

from tests.faults.cases import CASES, attempt
from tests.faults.table import Context


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_survived(name: str, tmp_path: Path) -> None:
    for part, row in attempt(name, Context(tmp_path)).items():
        assert (part, row.lost, row.wrong) == (part, [], [])
        if row.missing:
            pytest.skip(row.missing)
        assert row.tries > 0
