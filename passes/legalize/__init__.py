"""Passes that write canonical operators in the form that one target runs fastest."""
