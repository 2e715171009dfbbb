"""The one loop: probes and production train through the same code and differ only in `until` and `hooks`."""
