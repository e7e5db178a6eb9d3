"""From a store URL to a store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from minio.credentials.providers import Provider, StaticProvider

from services.common.errors import InvalidArgument
from services.common.store.credentials import FileCredentials
from services.common.store.directory import DirectoryStore
from services.common.store.interface import ObjectStore
from services.common.store.s3 import S3Store

_RULE = (
    "file:///ABSOLUTE/FOLDER or s3://BUCKET?endpoint=http(s)://HOST:PORT[&region=REGION]"
    "[&credentials_file=/ABSOLUTE/FILE]"
)


def open_store(url: str, *, access_key: str | None = None, secret_key: str | None = None) -> ObjectStore:
    """Return the store at `url`; nothing is contacted or created before its first use.

    Args:
        url: `file:///ABSOLUTE/FOLDER` or `s3://BUCKET?endpoint=http(s)://HOST:PORT`, with
            `&region=REGION` and `&credentials_file=/ABSOLUTE/FILE` where wanted (see `FileCredentials`).
        access_key, secret_key: needed for S3 without a file of credentials.

    Raises:
        InvalidArgument: `bad_store_url` or `missing_store_credentials`.
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/") and not parts.query:
        return DirectoryStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc and parts.path in ("", "/"):
        options = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        endpoint = urlsplit(options.pop("endpoint", ""))
        region = options.pop("region", "us-east-1")
        file = options.pop("credentials_file", None)
        if (
            endpoint.scheme in ("http", "https")
            and endpoint.netloc
            and not endpoint.path.strip("/")
            and not options
            and (file is None or file.startswith("/"))
        ):
            return S3Store(
                endpoint.netloc,
                parts.netloc,
                credentials=_credentials(access_key, secret_key, file),
                secure=endpoint.scheme == "https",
                region=region,
            )
    raise InvalidArgument("bad_store_url", f"The store URL must be {_RULE}.", field="store_url", limit=_RULE)


def _credentials(access_key: str | None, secret_key: str | None, file: str | None) -> Provider:
    if file is not None:
        return FileCredentials(Path(file))
    if access_key and secret_key:
        return StaticProvider(access_key, secret_key)
    message = "An S3 store needs an access key and a secret key, or a credentials_file in its URL."
    raise InvalidArgument("missing_store_credentials", message, field="store_url")
