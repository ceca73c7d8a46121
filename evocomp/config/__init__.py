"""Settings: `schema` defines them, `load` reads them, `options` turns them into command-line options."""
