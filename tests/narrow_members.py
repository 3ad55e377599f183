"""Published models with their own vocabulary, template and tower style, and next to no width: for families without goldens."""

from dataclasses import replace

from vlquant.members import MEMBERS, Member


def narrow(name: str) -> Member:
    """The member called `name`, small."""
    member = MEMBERS[name]
    tower = replace(member.tower, hidden_size=32, layers=1, heads=2, intermediate_size=64)
    more = {key: value for key, value in member.more.items() if key != "head_dim"}
    if "rope_scaling" in more and "short_factor" in more["rope_scaling"]:
        more["rope_scaling"] = more["rope_scaling"] | {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    shape = {"hidden_size": 64, "layers": 2, "heads": 4, "key_value_heads": 2, "intermediate_size": 64}
    return replace(member, tower=tower, more=more, **shape)
