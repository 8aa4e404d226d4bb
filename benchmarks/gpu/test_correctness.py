"""The result of `fastcifar doctor` on this machine; the tests in `tests` that need a GPU run beside it."""

import pytest


@pytest.mark.takes(30)
def test_doctor(record_property, fastcifar, tiny):
    record_property("said", fastcifar("doctor", *(["--quick"] if tiny else []), accepted=(0, 1) if tiny else (0,)))
