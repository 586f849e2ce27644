"""Parameters that are spread over ranks: where their pieces lie, and who computes what."""
