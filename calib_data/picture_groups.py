"""Which questions show a picture in common, and a choice of such groups. Opens no picture."""

import os
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

from vlquant.request import is_file
from vlquant.shards import file_hash

Shown = tuple[str | Path, ...]
"""What the pictures of a question are known by: texts such as hashes, or files."""


def by_contents(shown: Sequence[Shown]) -> list[tuple[str, ...]]:
    """The same with files known by their contents; a file whose size no other has is not read for that."""
    paths = {each for pictures in shown for each in pictures if isinstance(each, Path)}
    places = {path: os.path.realpath(path) if is_file(path) else str(path) for path in paths}
    sizes = {place: os.path.getsize(place) for path, place in places.items() if is_file(path)}
    common = Counter(sizes.values())
    hashes = {place: file_hash(Path(place)) for place, size in sizes.items() if common[size] > 1}

    def name(each: str | Path) -> str:
        return each if isinstance(each, str) else hashes.get(places[each], places[each])

    return [tuple(map(name, pictures)) for pictures in shown]


def groups_of(shown: Sequence[Sequence[Hashable]]) -> list[list[int]]:
    """Positions that show a picture in common, or others between them do, in the order of the first."""
    parents, first = list(range(len(shown))), {}

    def root(position: int) -> int:
        while parents[position] != position:
            parents[position] = parents[parents[position]]
            position = parents[position]
        return position

    for position, pictures in enumerate(shown):
        for picture in pictures:
            joined = sorted((root(first.setdefault(picture, position)), root(position)))
            parents[joined[1]] = joined[0]
    groups: dict[int, list[int]] = {}
    for position in range(len(shown)):
        groups.setdefault(root(position), []).append(position)
    return list(groups.values())


def taken(groups: Sequence[list[int]], limit: int | None, *, seed: int) -> list[list[int]]:
    """Groups that the seed decides until they have `limit` positions, in their order; all if there is no limit."""
    if limit is None:
        return list(groups)
    chosen, positions = [], 0
    for place in random.Random(seed).sample(range(len(groups)), len(groups)):
        if positions >= limit:
            break
        chosen.append(place)
        positions += len(groups[place])
    return [groups[place] for place in sorted(chosen)]
