"""Memory and time of a run, computed from its config and config.json before a GPU is taken."""
