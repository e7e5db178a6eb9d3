"""The reasons that clients match on: well formed, and each with one meaning."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from services.common.errors import Code
from services.common.status import TABLE
from tests.support.reasons import error_reasons

REASONS = error_reasons(Path(__file__).parents[3] / "services")


def http_statuses(codes: Iterable[Code]) -> set[int]:
    return {TABLE[code].http_status for code in codes}


def test_every_reason_is_a_lower_snake_word() -> None:
    assert set(REASONS["tenant_missing"]) == {Code.UNAUTHENTICATED}
    assert [reason for reason in REASONS if not re.fullmatch(r"[a-z][a-z0-9_]{0,62}", reason)] == []


def test_a_reason_has_one_http_status() -> None:
    # Whoever matches on a reason must not need the status to know what happened: give each case its own word.
    ambiguous = {reason: codes for reason, codes in REASONS.items() if len(http_statuses(codes)) > 1}
    assert ambiguous == {}


def test_a_reason_that_is_a_codes_name_has_the_http_status_of_that_code() -> None:
    # A status without details gets its code as its reason, so the word must mean the same in both cases.
    for code in Code:
        codes = REASONS.get(code.value.lower(), {})
        assert http_statuses(codes) <= http_statuses([code]), codes
