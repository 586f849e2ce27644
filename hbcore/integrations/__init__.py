"""Callbacks for trainers; each module imports the trainer that it is named after, and nothing here imports a module."""
