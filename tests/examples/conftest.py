import pytest


@pytest.fixture
def refuse(call, capsys):
    """Runs an example by the fixture ``call`` of a test file; it must end in a message, which is returned."""

    def refuse(*arguments):
        with pytest.raises(SystemExit) as end:
            call(*arguments)
        assert end.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    return refuse
