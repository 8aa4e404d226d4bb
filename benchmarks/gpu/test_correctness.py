"""What `fastcifar doctor` says of the machine; the tests in `tests` that need a GPU run beside it."""

import pytest

from fastcifar import cli


@pytest.mark.takes(30)
def test_doctor(record_property, capsys, tiny):
    status = cli.main(["doctor", *(["--quick"] if tiny else [])])
    said = capsys.readouterr().out
    record_property("said", said)
    assert status == 0 or tiny, said
