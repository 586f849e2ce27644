"""Prepares a run of the examples' tests like one of hbcore's own."""

import surroundings  # noqa: F401  sets environment variables, which torch reads when it is imported
