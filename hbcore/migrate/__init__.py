"""Other libraries' optimizer checkpoints, converted into hbcore's."""
