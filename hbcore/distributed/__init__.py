"""Sharded parameters: where their shards are, and which rank computes what."""
