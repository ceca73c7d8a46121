"""Settings: `schema` says what there is, `load` reads it, `options` makes it command-line options."""
