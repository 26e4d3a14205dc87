"""Collects the errors that the parity tests measure and shows them as a table when the run ends."""

import pytest


@pytest.fixture
def measure(record_property):
    """measure(name, error, bar): asserts error < bar, and keeps the figure for the table."""

    def check(name: str, error: float, bar: float) -> None:
        record_property("error", (name, float(error), bar))
        assert error < bar, f"{name}: {error:.2e} is not below {bar:.0e}"

    return check


def pytest_terminal_summary(terminalreporter):
    """The figures come with the tests' reports, from whichever process ran them."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    measured = [value for report in reports for name, value in report.user_properties if name == "error"]
    if measured:
        terminalreporter.section("errors against PyTorch")
        for name, error, bar in measured:
            terminalreporter.write_line(f"| {name:44} | {error:.1e} | {bar:.0e} |")
