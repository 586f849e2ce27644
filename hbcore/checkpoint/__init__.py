"""State dicts: save, exact load, export, schema, migrations."""
