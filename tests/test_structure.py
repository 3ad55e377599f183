"""Any difference in what a bundle is shown is named; without one nothing is said."""

import pytest
from PIL import Image

from vlquant.request import EncodedRequest, Request, encode_request
from vlquant.structure import first_difference, stop_faults, structure_faults

PICTURE = Image.radial_gradient("L").rotate(30).convert("RGB").resize((900, 448))


@pytest.fixture
def encoded(small_case) -> EncodedRequest:
    return encode_request(Request("What?", images=[PICTURE]), small_case.config, small_case.tokenizer)


def other(encoded, **changes) -> EncodedRequest:
    fields = {name: getattr(encoded, name) for name in EncodedRequest.__dataclass_fields__}
    return EncodedRequest(**{**fields, **changes})


def test_the_same_has_no_faults(encoded):
    assert list(structure_faults("q", encoded, other(encoded, tiles=[tile.copy() for tile in encoded.tiles]))) == []


def test_another_system_message_shows_in_the_ids(encoded, small_case):
    request = Request("What?", images=[PICTURE], system_message="You are a parrot.")
    (fault,) = structure_faults("q 7", encoded, encode_request(request, small_case.config, small_case.tokenizer))
    assert fault.startswith("q 7: the prompts' token ids differ from token ")


def test_tiles_in_another_order(encoded):
    assert len(encoded.tiles) > 2
    tiles = [encoded.tiles[1], encoded.tiles[0], *encoded.tiles[2:]]
    (fault,) = structure_faults("q", encoded, other(encoded, tiles=tiles))
    assert fault == f"q: 2 of {len(tiles)} tiles show something else, the first is tile 1"


def test_other_numbers_of_tiles(encoded, small_case):
    request = Request("What?", images=[PICTURE], max_tiles=1)
    faults = list(structure_faults("q", encoded, encode_request(request, small_case.config, small_case.tokenizer)))
    assert any("pictures are cut into" in fault for fault in faults)


def test_stop_tokens(small_case, named_case):
    mine, theirs = (small_case.config, small_case.tokenizer), named_case("qwen2_internvl2_5_vit6b")
    assert list(stop_faults(mine, mine)) == []
    (fault,) = stop_faults(mine, (theirs.config, theirs.tokenizer))
    assert fault.startswith("answers end with token ")


def test_the_first_difference():
    assert [first_difference([1, 2, 3], other) for other in ([1, 2, 4], [1, 2], [0], [1, 2, 3, 4])] == [2, 2, 0, 3]
