"""How fast engines are: timing in alternation, and the tuning table."""
