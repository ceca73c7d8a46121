"""Settings: `schema` says what there is, `load` reads it. The only room that knows OmegaConf."""
