"""Checks a file or a model against what is publicly known of Ascend's tools, without running any of them."""
