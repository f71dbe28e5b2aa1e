"""Memory and time of a run, reckoned from its config and config.json, before a GPU is taken."""
