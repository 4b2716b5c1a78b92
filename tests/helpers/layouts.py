"""The forms of a state: one member for each set of slots; and how a matrix may lie on a mesh with the axes a and b."""

from cases import MEMBERS
from jax.sharding import PartitionSpec

#: All codecs are among theirs. Members with the same slots differ in arithmetic alone.
BY_SLOTS = tuple({frozenset(case.member.slots): case for case in MEMBERS}.values())
SPECS = {
    "last": PartitionSpec(None, "b"),
    "both": PartitionSpec("a", "b"),
    "stacked": PartitionSpec(("a", "b")),
    "none": PartitionSpec(),
}
