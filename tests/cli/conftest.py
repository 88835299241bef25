"""The command line, called in this process."""

import sys

import pytest

from twofold.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls the command line in this process; returns exit status, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["twofold", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as exit:
            status = exit.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
