"""What people look at: one self-contained page per study, and Optuna's dashboard. Reads rows, writes no store."""
