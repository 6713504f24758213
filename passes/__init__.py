"""The graph passes, one per file: they live in passes/ and are imported as skipvit_fx.passes."""

if __name__ != "skipvit_fx.passes":
    raise ImportError(f"import the graph passes as skipvit_fx.passes, not as {__name__}")
