"""What a registry acknowledged, and whether it still serves it after a crash."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from lorafleet.registry.v1 import adapter_pb2, base_model_pb2, file_pb2
from services.common.errors import Code, LorafleetError
from tests.support.registry import Client, Upload, base_message, sha256

ADAPTER = "billing"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ALIAS = "prod"
PAGE = 1000


@dataclass
class Published:
    """An acknowledged version."""

    seed: int
    is_deleted: bool = False


class Ledger:
    """Makes random calls, notes what was acknowledged, and compares.

    `lost` names what was acknowledged and is not served as it was; `half_visible` what is listed and cannot
    be read whole, or was never asked for.
    """

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._seeds = itertools.count(1)
        self._versions: dict[int, Published] = {}
        self._files: dict[str, bytes] = {}
        self._deleted_files: set[str] = set()
        self._alias: tuple[int, int] = (0, 0)
        # What was asked for when the registry died: it may have happened or not.
        self._open_publish: int | None = None
        self._open_delete: int | None = None
        self._open_alias: int | None = None
        self._open_files: set[str] = set()
        self.num_acknowledged = 0
        self.lost: list[str] = []
        self.half_visible: list[str] = []

    async def operate(self, client: Client, what: str) -> None:
        """Make one random call, most often of the kind that `what` names."""
        operations = {
            "publish": self._publish,
            "blob": self._publish,
            "store": self._move_alias,
            "alias": self._move_alias,
            "delete": self._delete,
            "gc": self._delete,
            "file": self._create_file,
            "file_delete": self._delete_file,
            "upload": self._upload,
        }
        name = what if self._draw.random() < 0.6 else self._draw.choice(list(operations))
        await operations[name](client)
        self.num_acknowledged += 1

    async def audit(self, client: Client, *, sample: int | None) -> None:
        """Compare everything that is listed; read back so many versions and files, all where None."""
        request = base_model_pb2.CreateBaseModelRequest(base_model=base_message())
        await client.call(client.bases.CreateBaseModel, request)
        await self._audit_versions(client, sample)
        await self._audit_alias(client)
        await self._audit_files(client, sample)

    async def _publish(self, client: Client) -> None:
        self._open_publish = self._open_publish or next(self._seeds)
        await self._finish_publish(client)

    async def _finish_publish(self, client: Client) -> None:
        seed = self._open_publish
        assert seed is not None
        version = await client.publish(Upload.made(seed), adapter=ADAPTER, key=f"key-{seed}")
        known = self._versions.setdefault(version.version, Published(seed))
        if known.seed != seed:
            self.lost.append(f"version {version.version} was given to {known.seed} and to {seed}")
        self._open_publish = None

    async def _delete(self, client: Client) -> None:
        live = [number for number, version in self._versions.items() if not version.is_deleted]
        if len(live) < 3:
            await self._publish(client)
            return
        self._open_delete = self._draw.choice(live)
        request = adapter_pb2.DeleteVersionRequest(adapter=ADAPTER, version=self._open_delete)
        await client.call(client.adapters.DeleteVersion, request)
        self._versions[self._open_delete].is_deleted = True
        self._open_delete = None

    async def _move_alias(self, client: Client) -> None:
        live = [number for number, version in self._versions.items() if not version.is_deleted]
        if not live:
            await self._publish(client)
            return
        self._open_alias = self._draw.choice(live)
        move = await client.set_alias(ALIAS, self._open_alias, expected=self._alias[0], adapter=ADAPTER)
        self._alias = (move.generation, move.version)
        self._open_alias = None

    async def _create_file(self, client: Client) -> None:
        data = self._new_data()
        self._open_files.add(sha256(data))
        file = await client.create_file(data)
        self._files[file.id] = data

    async def _upload(self, client: Client) -> None:
        data = self._new_data()
        self._open_files.add(sha256(data))
        header = file_pb2.CreateFileHeader(filename="a", purpose=file_pb2.FILE_PURPOSE_FINE_TUNE)
        request = file_pb2.StartUploadRequest(header=header, size_bytes=len(data))
        upload = await client.call(client.files.StartUpload, request)
        middle = len(data) // 2
        for offset, part in ((0, data[:middle]), (middle, data[middle:])):
            append = file_pb2.AppendUploadRequest(upload_id=upload.id, offset=offset, data=part)
            await client.call(client.files.AppendUpload, iter([append]))
        complete = file_pb2.CompleteUploadRequest(upload_id=upload.id, digest=sha256(data))
        file = await client.call(client.files.CompleteUpload, complete)
        self._files[file.id] = data

    async def _delete_file(self, client: Client) -> None:
        if not self._files:
            await self._create_file(client)
            return
        file_id = self._draw.choice(list(self._files))
        # Once asked for, it may be gone.
        del self._files[file_id]
        self._deleted_files.add(file_id)
        await client.call(client.files.DeleteFile, file_pb2.DeleteFileRequest(file_id=file_id))

    async def _audit_versions(self, client: Client, sample: int | None) -> None:
        request = adapter_pb2.ListVersionsRequest(adapter=ADAPTER, page_size=PAGE, include_deleted=True)
        if not self._versions and self._open_publish is None:
            return
        try:
            listed = (await client.call(client.adapters.ListVersions, request)).versions
        except LorafleetError as error:
            if error.code is not Code.NOT_FOUND or self._versions:
                raise
            listed = []
        found = {version.version: version for version in listed}
        for number in set(found) - set(self._versions):
            if self._open_publish is None:
                self.half_visible.append(f"version {number} was never asked for")
            else:
                await self._read_back(client, number, self._open_publish)
        if self._open_publish is not None:
            await self._finish_publish(client)
        if self._open_delete is not None:
            state = found[self._open_delete].state
            self._versions[self._open_delete].is_deleted = state == adapter_pb2.VERSION_STATE_DELETED
            self._open_delete = None
        live = []
        for number, version in self._versions.items():
            if number not in found and version.seed < max(entry.seed for entry in self._versions.values()):
                self.lost.append(f"version {number} is not listed")
            elif number in found:
                is_deleted = found[number].state == adapter_pb2.VERSION_STATE_DELETED
                if is_deleted != version.is_deleted:
                    self.lost.append(f"version {number}: deleted is {is_deleted}")
            if not version.is_deleted:
                live.append(number)
        chosen = live if sample is None else self._draw.sample(live, min(sample, len(live))) + live[-1:]
        for number in chosen:
            await self._read_back(client, number, self._versions[number].seed)

    async def _read_back(self, client: Client, number: int, seed: int) -> None:
        upload = Upload.made(seed)
        try:
            weights = await client.download(f"{ADAPTER}:{number}", WEIGHTS)
            config = await client.download(f"{ADAPTER}:{number}", CONFIG)
        except LorafleetError as error:
            if error.code is Code.UNAVAILABLE:
                raise
            self.lost.append(f"version {number}: {error}")
            return
        if (config, weights) != (upload.config, upload.weights):
            self.lost.append(f"version {number} has other bytes")

    async def _audit_alias(self, client: Client) -> None:
        if self._alias[0] == 0 and self._open_alias is None:
            return
        request = adapter_pb2.ListAliasHistoryRequest(adapter=ADAPTER, alias=ALIAS, page_size=PAGE)
        try:
            moves = (await client.call(client.adapters.ListAliasHistory, request)).moves
        except LorafleetError as error:
            if error.code is not Code.NOT_FOUND or self._alias[0]:
                raise
            moves = []
        generations = [move.generation for move in moves]
        if generations != list(range(len(generations), 0, -1)):
            self.lost.append(f"generations {generations[:5]} have gaps")
        now = (moves[0].generation, moves[0].version) if moves else (0, 0)
        possible = [self._alias]
        if self._open_alias is not None:
            possible.append((self._alias[0] + 1, self._open_alias))
        if now not in possible:
            self.lost.append(f"the alias is at {now}, not {possible}")
        self._alias, self._open_alias = now, None

    async def _audit_files(self, client: Client, sample: int | None) -> None:
        request = file_pb2.ListFilesRequest(page_size=PAGE)
        listed: dict[str, file_pb2.File] = {
            file.id: file for file in (await client.call(client.files.ListFiles, request)).files
        }
        for file_id, file in listed.items():
            if file_id not in self._files and file.digest not in self._open_files:
                self.half_visible.append(f"file {file_id} was never asked for")
        for file_id in self._files.keys() - listed.keys():
            self.lost.append(f"file {file_id} is not listed")
        ids = sorted(listed)
        for file_id in ids if sample is None else self._draw.sample(ids, min(sample, len(ids))):
            data = await client.download_file(file_id)
            if sha256(data) != listed[file_id].digest:
                self.half_visible.append(f"file {file_id} has other bytes")

    def _new_data(self) -> bytes:
        return f"{next(self._seeds)}\n".encode() * self._draw.randint(1, 50)
