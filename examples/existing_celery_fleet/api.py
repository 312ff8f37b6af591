"""A web service that awaits the shop's own functions on the shop's own Celery fleet."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from shop import pricing, suppliers

from wove import DeliveryTimeoutError, ExecutorRuntime, WoveError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

T = TypeVar("T")

ENVIRONMENTS = {
    "shop": {
        "executor": "celery",
        "executor_config": {"app": "shop.celery:app"},
        "delivery_timeout": 4,  # seconds: nobody looks at a spinning page for longer
    }
}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    # Started in the process that serves (also under `uvicorn --workers 4`), stopped with it.
    async with ExecutorRuntime(ENVIRONMENTS) as runtime:
        app.state.fleet = runtime["shop"]
        yield


app = FastAPI(lifespan=lifespan)


class Basket(BaseModel):
    articles: dict[str, int]
    country: Literal["CH", "DE", "FR"]


@app.post("/quotes")
async def quote(basket: Basket, request: Request) -> dict[str, str]:
    fleet = request.app.state.fleet
    price = await fleet.run(pricing.quote, basket.articles, country=basket.country)
    return {"net": str(price.net), "vat": str(price.vat), "total": str(price.total)}


@app.get("/offers/{article}")
async def offers(article: str, request: Request, patience: float = 0.0) -> list[str]:
    fleet = request.app.state.fleet
    return await while_connected(request, fleet.run(suppliers.offers, article, patience=patience))


# An exception raised on a worker arrives as what it was, so errors are handled as if the call were local.
@app.exception_handler(pricing.UnknownArticleError)
async def unknown_article(_request: Request, error: pricing.UnknownArticleError) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=404)


@app.exception_handler(DeliveryTimeoutError)
async def too_slow(_request: Request, _error: DeliveryTimeoutError) -> JSONResponse:
    return JSONResponse({"detail": "our workers are too busy to answer now"}, status_code=504)


@app.exception_handler(WoveError)
async def no_fleet(_request: Request, _error: WoveError) -> JSONResponse:
    return JSONResponse({"detail": "our workers cannot be reached now"}, status_code=503)


async def while_connected(request: Request, call: Coroutine[Any, Any, T]) -> T:
    """Await a call for as long as its client does.

    By itself a handler runs on when its client has gone. Cancelling the call also cancels the work: what is
    queued is taken back, a coroutine on a worker is cancelled there.
    """
    work = asyncio.ensure_future(call)
    departure = asyncio.ensure_future(client_left(request))
    try:
        await asyncio.wait({work, departure}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise HTTPException(499, "the client closed the connection")
        return work.result()
    finally:
        work.cancel()
        departure.cancel()
        await asyncio.wait({work, departure})


async def client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
