"""Passes that rewrite canonical operators to the forms that are fastest on one target."""
