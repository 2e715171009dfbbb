"""One file, one command. Parent side: never torch."""
