"""Windows of many sensors as graphs over time: classified, and their masked channels filled in."""
