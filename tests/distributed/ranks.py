"""The processes that tests of several ranks run on: what fails there fails here, and the next job is not harmed."""

from __future__ import annotations

from hbcore.testing.ranks import Pool as Pool
from hbcore.testing.ranks import free_port as free_port

on_ranks = Pool().run
