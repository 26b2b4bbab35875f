"""Downloads of checkpoints through signed addresses, which need no key."""

from __future__ import annotations

import asyncio
import re
from email.utils import format_datetime
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from starlette.background import BackgroundTask

from rlsys.serve.checkpoints import Checkpoint
from rlsys.serve.errors import Refusal, bad_request, not_found
from rlsys.serve.paths import checkpoint_of, parse_path
from rlsys.serve.routes.common import answer, front_of, tenant_of
from rlsys.serve.signing import ARCHIVE, Download
from rlsys.serve.tar_stream import TarStream

router = APIRouter(prefix="/api/v1")
_HOST = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # what PEFT and vLLM load


@router.get("/training_runs/{run_id}/checkpoints/{kind}/{name}/archive")
async def archive(run_id: str, kind: str, name: str, request: Request) -> Response:
    """302 to the archive; clients that ask for JSON get its address."""
    found = await _readable(request, run_id, kind, name)
    token, expires = front_of(request).signer.link(_download(request, found, ARCHIVE))
    url = _url(request, token)
    headers = {"Location": url, "Expires": format_datetime(expires, usegmt=True)}
    return answer({"url": url, "expires": expires.isoformat()}, 302, headers)


@router.get("/training_runs/{run_id}/checkpoints/external_weights/{name}/external_weights_urls")
async def external_weights_urls(run_id: str, name: str, request: Request) -> Response:
    found = await _readable(request, run_id, "external_weights", name)
    links = {
        file: front_of(request).signer.link(_download(request, found, file))
        for file in ADAPTER
        if (found.folder / file).is_file()
    }
    expires = min(end for _, end in links.values()) if links else None
    if expires is None:
        raise not_found("checkpoint", found.path.text)
    urls = {file: _url(request, token) for file, (token, _) in links.items()}
    return answer({"urls": urls, "expires": expires.isoformat()})


@router.get("/files/{token}")
async def download(token: str, request: Request) -> Response:
    front = front_of(request)
    wanted = front.signer.download_of(token)
    if wanted is None:
        raise Refusal(403, "the address of this download has ended, or is none; ask for a new one")
    found = await front.controller.readable(wanted.reader, parse_path(wanted.path))
    if _identity(found.folder) != wanted.content:
        raise not_found("checkpoint", wanted.path)
    if wanted.file == ARCHIVE:
        return await asyncio.to_thread(_archive, found)
    file = found.folder / wanted.file
    if wanted.file not in ADAPTER or file.is_symlink() or not file.is_file():
        raise not_found("file", wanted.file)
    return FileResponse(file, media_type="application/octet-stream")


def _archive(found: Checkpoint) -> Response:
    try:
        stream = TarStream(found.folder)
    except OSError:
        raise not_found("checkpoint", found.path.text) from None
    headers = {
        "Content-Disposition": f'attachment; filename="{found.path.name}.tar"',
        "Content-Length": str(stream.nbytes),
    }
    done = BackgroundTask(stream.close)  # also after a client that left
    return StreamingResponse(stream.parts(), media_type="application/x-tar", headers=headers, background=done)


def _download(request: Request, found: Checkpoint, file: str) -> Download:
    return Download(tenant_of(request), found.path.text, file, _identity(found.folder))


def _identity(folder: Path) -> str:
    """Of a checkpoint's content: a folder is replaced as a unit, and never written again."""
    try:
        found = folder.stat()
    except OSError:
        return ""
    return f"{found.st_ino:x}.{found.st_mtime_ns:x}"


async def _readable(request: Request, run_id: str, kind: str, name: str) -> Checkpoint:
    return await front_of(request).controller.readable(tenant_of(request), checkpoint_of(run_id, kind, name))


def _url(request: Request, token: str) -> str:
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        raise bad_request(f"Host: found {host[:100]!r}; wanted a name or an address, and a port")
    return f"{request.url.scheme}://{host}/api/v1/files/{token}"
