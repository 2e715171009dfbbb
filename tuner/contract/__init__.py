"""The words every room speaks: frozen types and pure functions. Imports nothing else of ours, and never torch."""
