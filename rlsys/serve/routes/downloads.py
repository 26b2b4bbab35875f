"""Downloads of checkpoints through signed addresses, which need no key."""

from __future__ import annotations

import asyncio
import os
import tarfile
import tempfile
from email.utils import format_datetime
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from rlsys.serve.checkpoints import Checkpoint
from rlsys.serve.errors import Refusal, not_found
from rlsys.serve.paths import checkpoint_of, parse_path
from rlsys.serve.routes.common import answer, front_of, tenant_of
from rlsys.serve.signing import ARCHIVE, Download

router = APIRouter(prefix="/api/v1")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # what PEFT and vLLM load


@router.get("/training_runs/{run_id}/checkpoints/{kind}/{name}/archive")
async def archive(run_id: str, kind: str, name: str, request: Request) -> Response:
    """302 to the archive; clients that ask for JSON get its address."""
    found = await _readable(request, run_id, kind, name)
    token, expires = front_of(request).signer.link(Download(found.tenant, found.path.text, ARCHIVE))
    url = _url(request, token)
    headers = {"Location": url, "Expires": format_datetime(expires, usegmt=True)}
    return answer({"url": url, "expires": expires.isoformat()}, 302, headers)


@router.get("/training_runs/{run_id}/checkpoints/external_weights/{name}/external_weights_urls")
async def external_weights_urls(run_id: str, name: str, request: Request) -> Response:
    found = await _readable(request, run_id, "external_weights", name)
    links = {
        file: front_of(request).signer.link(Download(found.tenant, found.path.text, file))
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
    found = await front.controller.own_checkpoint(wanted.owner, parse_path(wanted.path))
    if wanted.file == ARCHIVE:
        packed = await asyncio.to_thread(_pack, found.folder)
        headers = {"Content-Disposition": f'attachment; filename="{found.path.name}.tar"'}
        return FileResponse(
            packed, media_type="application/x-tar", headers=headers, background=BackgroundTask(os.unlink, packed)
        )
    file = found.folder / wanted.file
    if wanted.file not in ADAPTER or file.is_symlink() or not file.is_file():
        raise not_found("file", wanted.file)
    return FileResponse(file, media_type="application/octet-stream")


async def _readable(request: Request, run_id: str, kind: str, name: str) -> Checkpoint:
    return await front_of(request).controller.readable(tenant_of(request), checkpoint_of(run_id, kind, name))


def _pack(folder: Path) -> str:
    """A tar of the folder's files, in a temporary file."""
    descriptor, path = tempfile.mkstemp(prefix="rlsys-archive-", suffix=".tar")
    try:
        with os.fdopen(descriptor, "wb") as out, tarfile.open(fileobj=out, mode="w") as tar:
            for file in sorted(folder.iterdir()):
                if file.is_file() and not file.is_symlink():
                    tar.add(file, arcname=file.name, filter=_anonymous)
    except BaseException:
        os.unlink(path)
        raise
    return path


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without names and numbers of this machine's users."""
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def _url(request: Request, token: str) -> str:
    return f"{str(request.base_url).rstrip('/')}/api/v1/files/{token}"
