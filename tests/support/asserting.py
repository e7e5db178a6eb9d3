"""An assert in a helper, to see that helpers' asserts are run."""

from __future__ import annotations


def assert_false() -> None:
    """Fail, where asserts of `tests.support` are run."""
    value = False
    assert value, "this assert is meant to fail"
