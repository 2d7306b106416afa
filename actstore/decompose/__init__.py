"""Decompositions and similarities of sites: every one is a fold over blocks that one scan reads."""
