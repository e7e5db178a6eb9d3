"""The reasons that clients match on: well formed, and each with one meaning."""

from __future__ import annotations

import re
from pathlib import Path

from services.common.errors import Code
from services.common.status import TABLE
from tests.support.reasons import error_reasons

SERVICES = Path(__file__).parents[3] / "services"


def http_statuses(codes: set[str]) -> set[int]:
    return {TABLE[Code[code]].http_status for code in codes}


def test_every_reason_is_a_lower_snake_word_with_one_http_status() -> None:
    reasons = error_reasons(SERVICES)
    assert reasons["tenant_missing"] == {"UNAUTHENTICATED"}
    assert [reason for reason in reasons if not re.fullmatch(r"[a-z][a-z0-9_]{0,62}", reason)] == []
    assert {reason: codes for reason, codes in reasons.items() if len(http_statuses(codes)) > 1} == {}


def test_a_reason_that_is_a_codes_name_has_the_http_status_of_that_code() -> None:
    # A status without details gets its code as its reason, so the word must mean the same in both cases.
    bare = {code.value.lower(): code.value for code in Code}
    for reason, codes in error_reasons(SERVICES).items():
        if reason in bare:
            assert http_statuses(codes) == http_statuses({bare[reason]})
