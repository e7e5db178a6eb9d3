"""MkDocs hooks: reference pages, pages from the repository's root, and links that hold in both places."""

from __future__ import annotations

import os
import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from docs.tooling.cli_reference import cli_page  # noqa: E402 - once the repository can be imported
from docs.tooling.openapi_reference import http_page, openapi_document  # noqa: E402
from docs.tooling.proto_reference import proto_pages  # noqa: E402
from docs.tooling.settings_reference import settings_page  # noqa: E402

# Documents that live elsewhere in the repository, by their page.
_ELSEWHERE = {
    "index.md": "README.md",
    "architecture.md": "ARCHITECTURE.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "bundled-base.md": "assets/base/README.md",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is written by the code or lives elsewhere."""
    pages = {page: (ROOT / source).read_text("utf-8") for page, source in _ELSEWHERE.items()}
    pages |= {f"reference/{name}.md": text for name, text in proto_pages().items()}
    pages |= {
        "reference/http.md": http_page(openapi_document()),
        "reference/settings.md": settings_page(),
        "reference/commands.md": cli_page(),
    }
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "loss.svg", abs_src_path=str(ROOT / "assets/base/loss.svg")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to their pages, or, without a page, into names."""
    if page.file.src_uri.startswith("reference/"):
        return markdown
    folder = posixpath.dirname(_source_of(page.file.src_uri))

    def lead(found: re.Match[str]) -> str:
        mark, text, target, fragment = found.groups()
        if "://" in target:
            return found[0]
        source = posixpath.normpath(posixpath.join(folder, target))
        destination = _page_of(source)
        if files.get_file_from_path(destination) is None:
            assert (ROOT / source).exists(), f"{page.file.src_uri} links to {target}"
            return f"{text} (`{source}`)"
        here = posixpath.dirname(page.file.src_uri) or "."
        return f"{mark}[{text}]({os.path.relpath(destination, here)}{fragment or ''})"

    return _LINK.sub(lead, markdown)


def _source_of(page: str) -> str:
    """Return where a page's text lies in the repository."""
    return _ELSEWHERE.get(page, f"docs/{page}")


def _page_of(source: str) -> str:
    """Return the page that shows a file of the repository, or the name that such a page would have."""
    if source == "assets/base/loss.svg":
        return "loss.svg"
    shown = {path: page for page, path in _ELSEWHERE.items()}
    return shown.get(source, source.removeprefix("docs/"))
