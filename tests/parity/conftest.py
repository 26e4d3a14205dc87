"""Collects the errors that the parity tests measure and shows them as a table when the run ends."""

import pytest

_measured: list[tuple[str, float, float]] = []


@pytest.fixture
def measure():
    """measure(name, error, bar): asserts error < bar, and keeps the figure for the table."""

    def check(name: str, error: float, bar: float) -> None:
        _measured.append((name, error, bar))
        assert error < bar, f"{name}: {error:.2e} is not below {bar:.0e}"

    return check


def pytest_terminal_summary(terminalreporter):
    if _measured:
        terminalreporter.section("errors against PyTorch")
        for name, error, bar in _measured:
            terminalreporter.write_line(f"| {name:44} | {error:.1e} | {bar:.0e} |")
