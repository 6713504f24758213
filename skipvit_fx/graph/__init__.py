"""The rewritten model: its graph, the module that owns it, the calls that it serves, and the record of its edits."""
