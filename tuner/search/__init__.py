"""The search: what to measure next, and what the measurements prove. No torch, no database."""
