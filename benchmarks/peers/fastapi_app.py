"""The plain loop: FastAPI in front of torch, as one writes it in an afternoon.

`python fastapi_app.py FOLDER PORT THREADS FORWARDS`: FORWARDS at once, each with THREADS threads. Decoding is in
FastAPI's thread pool, beside the model.
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel
from towers import ImageTower, to_base64


class Body(BaseModel):
    """Image files, base64."""

    images: list[str]


def application(tower: ImageTower, forwards: int) -> FastAPI:
    app = FastAPI()
    executor = ThreadPoolExecutor(forwards)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/predict")
    async def predict(body: Body) -> dict[str, str]:
        pixels = await run_in_threadpool(tower.decode, body.images)
        embeddings = await asyncio.get_running_loop().run_in_executor(executor, tower.embed, pixels)
        return {"embeddings": to_base64(embeddings)}

    return app


if __name__ == "__main__":
    folder, port, threads, forwards = sys.argv[1:]
    app = application(ImageTower(Path(folder), int(threads)), int(forwards))
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)
