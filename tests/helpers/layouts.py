"""How a matrix may lie on a mesh with the axes a and b."""

from jax.sharding import PartitionSpec

SPECS = {
    "first": PartitionSpec("a"),
    "last": PartitionSpec(None, "b"),
    "both": PartitionSpec("a", "b"),
    "stacked": PartitionSpec(("a", "b")),
    "none": PartitionSpec(),
}
