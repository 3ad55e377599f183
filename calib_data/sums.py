"""Calculations for word problems: numbers drawn at random, and what follows from them. Knows no language."""

import random
from collections.abc import Callable


def shopping(chance: random.Random) -> dict[str, int]:
    """Two kinds of goods, paid with a note of 100."""
    first, second, price, other = chance.randint(2, 6), chance.randint(2, 9), chance.randint(4, 9), chance.randint(1, 4)
    cost, more = first * price, second * other
    total = cost + more
    return {
        "first": first, "second": second, "price": price, "other": other,
        "cost": cost, "more": more, "total": total, "change": 100 - total,
    }  # fmt: skip


def journey(chance: random.Random) -> dict[str, int]:
    """There at one speed, and back at a slower one that the distance allows in whole hours."""
    slow, hours = chance.choice((40, 50, 60)), chance.choice((2, 3, 4))
    return {"fast": slow * 2, "slow": slow, "hours": hours, "distance": slow * 2 * hours, "back": 2 * hours, "both": 3 * hours}


def discount(chance: random.Random) -> dict[str, int]:
    """A price after so many percent off, and after a coupon."""
    price, percent, coupon = chance.randrange(100, 400, 20), chance.choice((10, 15, 20, 25, 30)), chance.randint(5, 15)
    off = price * percent // 100
    return {"price": price, "percent": percent, "off": off, "rest": price - off, "coupon": coupon, "final": price - off - coupon}


def garden(chance: random.Random) -> dict[str, int]:
    """A rectangle's area and its fence."""
    width, extra, cost = chance.randint(4, 12), chance.randint(2, 8), chance.randint(5, 20)
    length = width + extra
    around = 2 * (width + length)
    return {
        "width": width, "length": length, "area": width * length, "half": width + length,
        "around": around, "cost": cost, "total": around * cost,
    }  # fmt: skip


def savings(chance: random.Random) -> dict[str, int]:
    """Simple interest over some years."""
    capital, rate, years = chance.randrange(1000, 9000, 500), chance.randint(2, 6), chance.randint(2, 5)
    yearly = capital * rate // 100
    return {
        "capital": capital, "rate": rate, "years": years,
        "yearly": yearly, "interest": yearly * years, "total": capital + yearly * years,
    }  # fmt: skip


def scores(chance: random.Random) -> dict[str, int]:
    """Four marks with a whole mean, and what the fifth has to be to raise the mean by one."""
    mean, a, b = chance.randint(75, 85), chance.randint(1, 9), chance.randint(1, 9)
    marks = [mean - a, mean + b, mean + a + 2, mean - b - 2]
    return {
        "a": marks[0], "b": marks[1], "c": marks[2], "d": marks[3], "sum": 4 * mean, "mean": mean,
        "wanted": mean + 1, "needed_sum": 5 * (mean + 1), "fifth": mean + 5,
    }  # fmt: skip


def book(chance: random.Random) -> dict[str, int]:
    """Pages read by the day; the rest takes so many days at another pace."""
    daily, days, more, rest_days = chance.randint(12, 25), chance.randint(4, 8), chance.randint(3, 9), chance.randint(3, 6)
    read, pace = daily * days, daily + more
    rest = pace * rest_days
    return {
        "daily": daily, "days": days, "read": read, "pace": pace, "more": more,
        "rest": rest, "rest_days": rest_days, "pages": read + rest, "all_days": days + rest_days,
    }  # fmt: skip


def animals(chance: random.Random) -> dict[str, int]:
    """Heads and legs of hens and rabbits."""
    rabbits, hens = chance.randint(4, 15), chance.randint(5, 20)
    heads, legs = rabbits + hens, 4 * rabbits + 2 * hens
    return {
        "rabbits": rabbits, "hens": hens, "heads": heads, "legs": legs,
        "least": 2 * heads, "extra": 2 * rabbits, "rabbit_legs": 4 * rabbits, "hen_legs": 2 * hens,
    }  # fmt: skip


SUMS: dict[str, Callable[[random.Random], dict[str, int]]] = {
    each.__name__: each for each in (shopping, journey, discount, garden, savings, scores, book, animals)
}
