"""What we claim, re-runnable. Each benchmark prints machine, versions, interval, and the command to repeat it."""
