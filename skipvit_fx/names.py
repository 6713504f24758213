"""The names under which this package stores things in objects that it shares with others."""

OWN_CHILD = "skipvit"
"""Name of the only child that the compiler adds; every inserted module is below it and holds no state."""

INSERTED = f"{OWN_CHILD}."
"""Prefix of the paths of inserted modules."""

CONSTANT_BUFFER = f"{OWN_CHILD}_constant_"
"""Prefix of the names of buffers that hold constants which the author's code builds in every call."""

RECORD = "skipvit"
"""Key of the record in ``fast.meta``, and of the header in a saved file."""

SEARCH = "skipvit_search"
"""Key of the summary of the search that found the plan, in ``fast.meta`` and in a saved file."""

INSERTED_BY = "skipvit_pass"
"""Key in ``node.meta`` of the name of the pass that inserted the node. The author's nodes do not have it."""

CHECKPOINT = "skipvit_checkpoint"
"""Key in ``node.meta`` of the number of the checkpoint that the node was made in."""

WRITES = "skipvit_writes"
"""Key of ``node.meta``: the node is a method that wrote into its first argument."""

LEAF = "skipvit_leaf"
"""Attribute of a forward that calls an opaque operator: the original forward."""
