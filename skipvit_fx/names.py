"""Names under which this package leaves things where others leave theirs: one place, so that none is used twice."""

OWN_CHILD = "skipvit"
"""Name of the one child that the compiler adds; everything inserted lives below it and holds no state."""

INSERTED = f"{OWN_CHILD}."
"""How the path of an inserted module begins."""

CONSTANT_BUFFER = f"{OWN_CHILD}_constant_"
"""How the names of buffers begin that hold what the author's code makes anew in every call."""

RECORD = "skipvit"
"""Key of the record in ``fast.meta``, and of the header in a saved file."""

INSERTED_BY = "skipvit_pass"
"""Key of ``node.meta``: name of the pass that inserted the node. The author's nodes do not have it."""

CHECKPOINT = "skipvit_checkpoint"
"""Key of ``node.meta``: number of the checkpoint that the node was made in."""

WRITES = "skipvit_writes"
"""Key of ``node.meta``: the node is a method that wrote into its first argument."""

LEAF = "skipvit_leaf"
"""Attribute of a forward that calls an opaque operator: the one that it stands for."""
