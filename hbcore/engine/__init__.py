"""How a chain of rules runs: planning, tracing, backends, fallback. Nothing here knows an optimizer by name."""
