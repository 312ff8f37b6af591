"""Prices: plain functions that the shop's tests, scripts and tasks call directly."""

from dataclasses import dataclass
from decimal import Decimal

PRICES = {"teapot": Decimal("24.00"), "cup": Decimal("6.50"), "tray": Decimal("31.90")}
VAT = {"DE": Decimal("0.19"), "FR": Decimal("0.20"), "CH": Decimal("0.081")}


class UnknownArticleError(LookupError):
    def __init__(self, article: str) -> None:
        super().__init__(article)
        self.article = article

    def __str__(self) -> str:
        return f"no article {self.article!r}"


@dataclass(frozen=True)
class Quote:
    net: Decimal
    vat: Decimal

    @property
    def total(self) -> Decimal:
        return self.net + self.vat


def quote(articles: dict[str, int], country: str) -> Quote:
    for article in articles:
        if article not in PRICES:
            raise UnknownArticleError(article)
    net = sum((PRICES[article] * count for article, count in articles.items()), Decimal(0))
    return Quote(net=net, vat=(net * VAT[country]).quantize(Decimal("0.01")))
