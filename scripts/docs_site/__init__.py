"""What the documentation site has beside the pages in ``docs/``: generated when the site is built, and never committed."""
