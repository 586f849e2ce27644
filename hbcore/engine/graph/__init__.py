"""A chain of pure functions as one elementwise graph, cut into passes."""
