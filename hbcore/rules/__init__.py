"""What an optimizer is made of: pure functions. Nothing here imports the engine or mutates a tensor."""
