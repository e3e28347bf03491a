# Written by "make tangle". Edits made here are lost.
"""speedrun.data: __main__, loader, shards, sources, texts, tokenizer, writer."""
