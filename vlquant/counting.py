"""Numbers with their nouns, in words that people read."""


def counted(number: int, noun: str) -> str:
    """"1 tile", "2 tiles": for nouns whose plural ends in s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
