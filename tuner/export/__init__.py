"""Configurations in and out: our YAML today; other libraries' formats have their place here."""
