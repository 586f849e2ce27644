"""Which parameters run together, and the flat list of operations that a step is."""
