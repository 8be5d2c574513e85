"""Runs the tests with the oldest and with the newest versions of everything the package supports: nox."""

import nox

nox.options.default_venv_backend = "venv"
PROJECT = nox.project.load_toml("pyproject.toml")["project"]


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """The lower bound of every dependency."""
    session.install("-e", ".[dev]", *(bound.replace(">=", "==") for bound in PROJECT["dependencies"]))
    session.run("pytest", *session.posargs)


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """The latest release of every dependency."""
    session.install("-e", ".[dev]")
    session.run("pytest", *session.posargs)
