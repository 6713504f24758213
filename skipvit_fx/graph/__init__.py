"""The rewritten model: its graph, the module that owns it, the calls that it answers, and the record of its edits."""
