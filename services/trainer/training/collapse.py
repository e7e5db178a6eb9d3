"""Whether a model answers everything alike: the commonest way in which small fine-tunes fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

# Fewer answers than this say nothing.
LEAST_ANSWERS = 8
# Answers are one and the same from this share on, where no reference is as common as the second share.
CONSTANT_SHARE = 0.95
COMMON_REFERENCE_SHARE = 0.8


def is_collapsed(answers: Sequence[str], references: Sequence[str]) -> bool | None:
    """Return whether nearly all answers are the same though the references are not.

    None where that cannot be told.
    """
    if len(answers) < LEAST_ANSWERS or commonest_share(references) > COMMON_REFERENCE_SHARE:
        return None
    return commonest_share(answers) >= CONSTANT_SHARE


def commonest_share(texts: Sequence[str]) -> float:
    """Return the share of the commonest of `texts`, blanks around them aside."""
    [(_, count)] = Counter(text.strip() for text in texts).most_common(1)
    return count / len(texts)
