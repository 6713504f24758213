"""One rewrite in progress: what passes work on, what they promise, and how their result is checked."""
