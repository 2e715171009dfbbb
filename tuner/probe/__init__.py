"""Runs probes in worker processes and turns whatever becomes of them into replies. Never imports torch."""
