"""Writes the list of the corpus texts whose licence asks for attribution, for the model card's folder.

python -m assets.attribution --corpus CORPUS --out assets/base
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterable
from pathlib import Path

from assets.streams import CHILDREN, FICTION

_HEAD = """# Attribution

The base model was trained, among public domain books, on these texts under Creative Commons licences
([CC-BY-4.0](https://creativecommons.org/licenses/by/4.0/),
[CC-BY-SA-4.0](https://creativecommons.org/licenses/by-sa/4.0/)). The texts themselves are not in this
repository.
"""


def attribution_list(documents: Iterable[dict[str, str]]) -> str:
    """Returns a Markdown list by source and licence of every text that is not in the public domain."""
    works: dict[tuple[str, str], set[str]] = {}
    for document in documents:
        if document["licence"] != "public domain":
            author = document["author"] or "author not named"
            work = f"- {document['title']}, by {author}"
            works.setdefault((document["source"], document["licence"]), set()).add(work)
    parts = [
        f"\n## https://github.com/{source} ({licence})\n\n" + "\n".join(sorted(lines)) + "\n"
        for (source, licence), lines in sorted(works.items())
    ]
    return _HEAD + "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="List the corpus texts that ask for attribution.")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("assets/base"))
    arguments = parser.parse_args()
    documents: list[dict[str, str]] = []
    for part in [*CHILDREN, *FICTION]:
        with lzma.open(arguments.corpus / f"{part}.jsonl.xz", "rt", encoding="utf-8") as lines:
            documents.extend(json.loads(line) for line in lines)
    (arguments.out / "ATTRIBUTION.md").write_text(attribution_list(documents), encoding="utf-8")


if __name__ == "__main__":
    main()
