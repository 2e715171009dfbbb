"""Is what is measured what will run? Probes, gates and promises against plain loops of the same jobs."""
