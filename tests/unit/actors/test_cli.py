"""How the command line ends on an error."""

from __future__ import annotations

import pytest

from actors import cli
from rlsys import errors

KINDS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.RlsysError)
]  # some are also errors of Python's


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_rlsys_is_its_message_alone_whatever_else_it_is(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(**_: object) -> None:
        raise kind("what, where, and what would be right")

    monkeypatch.setattr(cli, "app", command)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert capsys.readouterr().err == f"{kind.__name__}: what, where, and what would be right\n"
