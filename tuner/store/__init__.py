"""The store: our tables beside Optuna's in one database. Knows nothing of how probes are chosen or run."""
