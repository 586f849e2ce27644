"""What an optimizer remembers: codecs, step counters, and checkpoints that come back exactly as they were."""
